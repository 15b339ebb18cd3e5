"""The Triton kernel of sampled products, interpreted on the CPU, against float64: its own proof, and odd shapes."""

from __future__ import annotations

import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton_interpreter  # noqa: F401, I001 - before any kernel is defined
import torch

from fusion_kernels.proof.cases import failure
from fusion_kernels.sparse import gpu_cases, triton_backend
from fusion_kernels.sparse.reference import sampled_product

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(300, 20, 33, 61), (5, 7, 9, 1), (256, 3, 4, 12), (0, 4, 4, 3), (4, 4, 4, 0)], ids=str
)
def test_it_proves_itself(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    assert failure(gpu_cases.sampled_case(dtype, shape, CPU)) is None


def test_a_step_that_is_left_out_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One token of 300, in bfloat16."""
    whole = triton_backend.sampled_product
    monkeypatch.setattr(triton_backend, "sampled_product", lambda g, x, *at: whole(g[1:], x[1:], *at))
    case = gpu_cases.sampled_case(torch.bfloat16, (300, 20, 33, 61), CPU)
    assert ": found errs by " in str(failure(case))


def test_strides_that_are_not_those_of_rows() -> None:
    g, x, rows, columns = gpu_cases.draw((40, 12, 10, 30), torch.float32)
    found = triton_backend.sampled_product(g.T.contiguous().T, x[:, :10], rows, columns)
    assert torch.allclose(found, sampled_product(g, x, rows, columns), atol=1e-4)


def test_float64_is_declined() -> None:
    assert "float64" in str(triton_backend.takes(torch.float64))
    assert triton_backend.takes(torch.float32) is None
