"""The paths on the Triton kernels, interpreted on the CPU: every argument reaches its place, forward and backward."""

from __future__ import annotations

import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton_interpreter  # noqa: F401, I001 - before any kernel is defined
import torch
from blocks import GATES, MLPCall, make_block
from rounding import assert_rounding

from fusion_kernels.mlp import gpu_backend, reference_backend
from fusion_kernels.mlp.folding import with_one_factor
from fusion_kernels.mlp.types import Needs

NAMES = Needs._fields
PATHS = {
    "cublas": (gpu_backend.cublas_forward, gpu_backend.cublas_backward),
    "epilogue": (gpu_backend.epilogue_forward, gpu_backend.epilogue_backward),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_paths(level: int, gated: bool, path: str) -> None:
    b = make_block(9, gated=gated, dtype=torch.float32)
    forward, backward = PATHS[path]
    found = forward(b.x, b.ffn, level)
    ideal = reference_backend.forward(b.x, b.ffn, level)
    for one, other in zip(found, ideal, strict=True):
        torch.testing.assert_close(one, other)
    every = tuple(b.tensors())
    wide, bounds = b.to(torch.float64).training(), b.bounds(torch.float32)
    exact = wide.gradients(wide.eager())
    for asked in (every, ("w_out", "scale"), ("x", "b_in")):
        needs = Needs(*(name in asked for name in NAMES))
        gradients = backward(b.dy, b.x, b.ffn, found[1:], level, needs)
        named = gradients._asdict()
        assert {name for name, t in named.items() if t is not None} == set(asked) & set(exact)
        there = {name: t.mT if name == "w_out" else t for name, t in named.items() if t is not None}
        assert_rounding(there, {name: exact[name] for name in there}, bounds)


def limited(gate: str, dtype: torch.dtype, **options: object) -> MLPCall:
    return make_block(
        9, gated=True, activation="quick_gelu", gating=GATES[gate], spread=12.0, dtype=torch.float64, **options
    ).to(dtype)  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("gate", GATES)
def test_limits_of_gates(gate: str, dtype: torch.dtype, path: str) -> None:
    for level, scale in ((0, "float"), (1, "both"), (2, "both")):
        b = limited(gate, dtype, scale=scale)
        forward, backward = with_one_factor(*PATHS[path])
        y, *kept = forward(b.x, b.ffn, level)
        needs = Needs(*(name in b.tensors() for name in NAMES))
        gradients = backward(b.dy, b.x, b.ffn, kept, level, needs)._asdict()
        found = {"y": y, **{name: t for name, t in gradients.items() if t is not None}}
        found["w_out"] = found["w_out"].mT
        wide, bounds = b.to(torch.float64).training(), b.bounds(dtype)
        exact = wide.gradients(wide.eager()) | {"y": wide.eager()}
        names = [
            name for name in found if scale == "float" or name not in ("w_in", "w_gate", "b_in", "b_gate", "scale")
        ]
        assert_rounding({n: found[n] for n in names}, {n: exact[n] for n in names}, bounds)
        for name in set(found) - set(names):  # the factor is folded into weights, which rounds them
            largest = float(exact[name].abs().max())
            near = {"rtol": 0.0, "atol": (2e-6 if dtype == torch.float32 else 2e-2) * largest}
            torch.testing.assert_close(found[name].double(), exact[name], **near)


@pytest.mark.parametrize("gate", GATES)
def test_limits_of_gates_in_a_resident_forward(gate: str) -> None:
    b = limited(gate, torch.float16, d=16, h=16, d_out=16)
    y, *_ = gpu_backend.resident_forward(b.x, b.ffn, 2)
    assert_rounding({"y": y}, {"y": b.to(torch.float64).eager()}, {"y": b.bounds(torch.float16)["y"]})


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_resident_forward(gated: bool) -> None:
    b = make_block(9, d=16, h=16, d_out=16, gated=gated, dtype=torch.float16)
    y, *rest = gpu_backend.resident_forward(b.x, b.ffn, 2)
    assert_rounding({"y": y}, {"y": b.to(torch.float64).eager()}, {"y": b.bounds(torch.float16)["y"]})
    assert [t.numel() for t in rest] == [0, 0, 0]
    with pytest.raises(
        ValueError, match="backend 'resident' never has the hidden tensors that checkpoint_level=1 saves"
    ):
        gpu_backend.resident_forward(b.x, b.ffn, 1)
