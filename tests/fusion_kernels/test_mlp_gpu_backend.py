"""The paths on the Triton kernels, interpreted on the CPU: every argument reaches its place, forward and backward."""

from __future__ import annotations

import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton_interpreter  # noqa: F401, I001 - before any kernel is defined
import torch
from blocks import make_block
from rounding import assert_rounding

from fusion_kernels.mlp import gpu_backend, reference_backend
from fusion_kernels.mlp.reference import Block

NAMES = ("x", "w_in", "b_in", "w_gate", "b_gate", "w_out", "b_out", "scale")
PATHS = {
    "cublas": (gpu_backend.cublas_forward, gpu_backend.cublas_backward),
    "epilogue": (gpu_backend.epilogue_forward, gpu_backend.epilogue_backward),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_paths(level: int, gated: bool, path: str) -> None:
    b = make_block(9, gated=gated, dtype=torch.float32)
    block = Block(b.w_in, b.b_in, b.w_gate, b.b_gate, b.w_out, b.b_out, b.scale, "gelu")
    forward, backward = PATHS[path]
    found = forward(b.x, block, level)
    ideal = reference_backend.forward(b.x, block, level)
    for one, other in zip(found, ideal, strict=True):
        torch.testing.assert_close(one, other)
    every = [t is not None for t in (b.x, *block.tensors)]
    wide, bounds = b.to(torch.float64).training(), b.bounds(torch.float32)
    exact = wide.gradients(wide.eager())
    for needs in (every, [i in (5, 7) for i in range(8)], [i in (0, 2) for i in range(8)]):
        gradients = backward(b.dy, b.x, block, found[1:], level, needs)
        named = dict(zip(NAMES, gradients, strict=True))
        assert {name for name, t in named.items() if t is not None} == {
            name for name, need in zip(NAMES, needs, strict=True) if need and name in exact
        }
        there = {name: t for name, t in named.items() if t is not None}
        assert_rounding(there, {name: exact[name] for name in there}, bounds)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_resident_forward(gated: bool) -> None:
    b = make_block(9, d=16, h=16, d_out=16, gated=gated, dtype=torch.float16)
    block = Block(b.w_in, b.b_in, b.w_gate, b.b_gate, b.w_out, b.b_out, b.scale, "gelu")
    y, *rest = gpu_backend.resident_forward(b.x, block, 2)
    assert_rounding({"y": y}, {"y": b.to(torch.float64).eager()}, {"y": b.bounds(torch.float16)["y"]})
    assert [t.numel() for t in rest] == [0, 0, 0]
    with pytest.raises(
        ValueError, match="backend 'resident' never has the hidden tensors that checkpoint_level=1 saves"
    ):
        gpu_backend.resident_forward(b.x, block, 1)
