"""Which GPUs the kernels are for, which releases of Triton are refused there, and what fits on a multiprocessor."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusion_kernels import BackendUnavailableError, gpu
from fusion_kernels.experts import operators as experts
from fusion_kernels.ffn import FFN
from fusion_kernels.kmeans import gpu_backend as kmeans_backend
from fusion_kernels.mlp import gpu_backend as mlp_backend
from fusion_kernels.ntk import triton_backend as ntk_backend


def forget() -> None:
    """What was found out about this machine."""
    gpu.no_gpu.cache_clear()
    gpu.why_not.cache_clear()


class Machine:
    """A stand-in for the GPUs of a machine, by the compute capabilities of its devices."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch
        self.capturing = False
        patch.setattr(gpu, "importlib", SimpleNamespace(import_module=self._triton, util=importlib.util))
        patch.setattr(importlib.util, "find_spec", lambda name: name)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        self.has((9, 0))

    def has(self, *capabilities: tuple[int, int], triton: str = "3.6.0") -> None:
        self.capabilities, self.triton = capabilities, triton
        forget()
        self.patch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        self.patch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        self.patch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index or 0])

    def _triton(self, _: str) -> Any:
        return SimpleNamespace(__version__=self.triton)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    yield Machine(monkeypatch)
    monkeypatch.undo()
    forget()


def cuda(index: int) -> torch.device:
    return torch.device("cuda", index)


class OnGpu(torch.Tensor):
    """A tensor that says it is on the first GPU."""

    is_cuda = True  # type: ignore[assignment]
    device = cuda(0)  # type: ignore[assignment]


def test_an_old_gpu_refuses_for_itself(machine: Machine) -> None:
    machine.has((7, 5), (8, 6))
    assert gpu.why_not() is None
    assert gpu.why_not(cuda(1)) is None
    assert gpu.why_not(cuda(0)) == "it needs a GPU of compute capability 8.0 or newer"
    machine.has((7, 5))
    assert gpu.why_not() == gpu.why_not(cuda(0)) == "it needs a GPU of compute capability 8.0 or newer"
    machine.has()
    assert gpu.why_not() == "torch finds no CUDA device"


def test_other_makers_are_refused_by_name(machine: Machine) -> None:
    machine.has()
    machine.patch.setattr(torch.xpu, "is_available", lambda: True)
    assert str(gpu.no_gpu()).startswith("it is for NVIDIA GPUs, and this one is Intel's: its tiles and its bounds")
    forget()
    machine.patch.setattr(torch.version, "hip", "7.0")
    assert str(gpu.no_gpu()).startswith("it is for NVIDIA GPUs, and this torch is built for AMD's: its tiles")


@pytest.mark.parametrize("why_not", [kmeans_backend.why_not, mlp_backend.resident_why_not, ntk_backend.why_not])
def test_a_triton_that_errs_on_a_gpu_is_refused_there(machine: Machine, why_not: Any) -> None:
    for capability in ((10, 0), (10, 3)):
        for version in ("3.6.0", "3.8.1+git123"):
            machine.has(capability, triton=version)
            reason = str(why_not(cuda(0)))
            assert reason.startswith(f"triton {version} adds products up wrongly in its kernels (")
            assert reason.endswith(f"on compute capability {capability[0]}.{capability[1]}: install triton>=3.9")
            assert why_not() == reason
            # Kernels that it compiles rightly.
            assert gpu.why_not(cuda(0)) is None
        machine.has(capability, triton="3.9.0")
        assert why_not(cuda(0)) is None
    for capability in ((8, 0), (9, 0), (12, 0)):
        machine.has(capability)
        assert why_not(cuda(0)) is None
    # One device that is served is enough where none is named.
    machine.has((10, 0), (9, 0))
    assert why_not() is None
    assert why_not(cuda(0)) is not None


def test_a_gpu_that_is_refused_runs_nothing(machine: Machine) -> None:
    machine.has((10, 0))
    x = torch.zeros(4, 2).as_subclass(OnGpu)
    with pytest.raises(BackendUnavailableError, match=r"kmeans: backend 'triton' on cuda:0: triton 3\.6\.0 adds"):
        kmeans_backend._check_device(x)
    ffn = FFN(torch.zeros(3, 2), torch.zeros(3, 2), "relu")
    with pytest.raises(BackendUnavailableError, match=r"mlp: backend 'resident' on cuda:0: triton 3\.6\.0 adds"):
        mlp_backend.resident_forward(x, ffn, 2)


def test_k_means_says_that_a_graph_cannot_record_it(machine: Machine) -> None:
    x = torch.zeros(4, 2).as_subclass(OnGpu)
    kmeans_backend._check_device(x)
    machine.capturing = True
    with pytest.raises(RuntimeError, match="a CUDA graph cannot record: cluster before the capture begins"):
        kmeans_backend._check_device(x)
    kmeans_backend._check_device(torch.zeros(4, 2))


def test_grouped_products_where_torch_has_one_launch_for_them(machine: Machine) -> None:
    x = torch.zeros(4, 16, dtype=torch.bfloat16).as_subclass(OnGpu)
    ffn = FFN(torch.zeros(2, 8, 16), torch.zeros(2, 8, 16), "relu")
    expected = {(8, 0): "loop", (9, 0): "grouped_mm", (10, 0): "grouped_mm", (10, 3): "grouped_mm", (12, 0): "loop"}
    for capability, backend in expected.items():
        machine.has(capability)
        assert experts._without_measurements(x, ffn) == backend


def test_views_between_boundaries_are_copied() -> None:
    base = torch.arange(40.0)
    assert gpu.packed(base[4:]).data_ptr() == base[4:].data_ptr()
    for odd in (base[1:33], base[3:35].view(4, 8), base.view(5, 8).mT):
        copy = gpu.packed(odd)
        assert copy.is_contiguous()
        assert gpu.on_boundary(copy, None)
        assert torch.equal(copy, odd)
    assert not gpu.on_boundary(base, base[1:])


def test_programs_at_once() -> None:
    hopper, consumer = gpu.MULTIPROCESSORS[90], gpu.MULTIPROCESSORS[86]
    # 65,536 registers: two programs of 256 threads with 128 each, one with a single register more.
    assert gpu.programs_at_once(128, 98_304, 8, hopper) == 2
    assert gpu.programs_at_once(129, 98_304, 8, hopper) == 1
    # 228 KiB of shared memory, of which each program takes 1 KiB beside its own.
    assert gpu.programs_at_once(32, 113 * 1024, 4, hopper) == 2
    assert gpu.programs_at_once(32, 113 * 1024 + 1, 4, hopper) == 1
    # Then warps, and programs.
    assert gpu.programs_at_once(32, 0, 8, hopper) == 8
    assert gpu.programs_at_once(32, 0, 8, consumer) == 6
    assert gpu.programs_at_once(16, 0, 1, consumer) == 16
