"""The Triton backend of the experts, interpreted on the CPU, against the one that goes expert by expert."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton_interpreter  # noqa: F401, I001 - before any kernel is defined
import torch
from blocks import GATES
from torch import Tensor

from fusion_kernels.experts import loop_backend, triton_backend
from fusion_kernels.ffn import FFN
from fusion_kernels.gates import PLAIN, Gate
from fusion_kernels.mlp import triton_linear, triton_tiles
from fusion_kernels.mlp.types import Needs

pytestmark = pytest.mark.slow


def layer(gated: bool, bias: bool, scaled: bool, gating: Gate = PLAIN) -> FFN:
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int, there: bool = True) -> Tensor | None:
        return torch.randn(*shape, generator=g) * (0.3 if gating.plain else 3.0) if there else None

    E, h, d, d_out = 4, 17, 9, 5
    tensors = (
        draw(E, h, d), draw(E, h, d_out), draw(E, h, d, there=gated), draw(E, h, there=bias),
        draw(E, h, there=gated and bias), draw(E, d_out, there=bias),
        torch.rand(E, h, generator=g) + 0.5 if scaled else None,
    )  # fmt: skip
    return FFN.of(tensors, "silu", gating=gating)


@pytest.mark.parametrize(("gated", "bias", "scaled"), [(True, False, True), (True, True, False), (False, True, True)])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_as_expert_by_expert(gated: bool, bias: bool, scaled: bool, level: int) -> None:
    for k in (1, 2):
        compare(layer(gated, bias, scaled), level, k)


@pytest.mark.parametrize("gate", GATES)
def test_limits_of_gates(gate: str) -> None:
    compare(layer(True, True, True, GATES[gate]), 1, 2)


def compare(ffn: FFN, level: int, k: int) -> None:
    # 24 tokens or 12 with two choices each; an expert without rows, and three rows without expert.
    x, order, ends = torch.randn(24 // k, 9), torch.randperm(24), torch.tensor([7, 7, 20, 21])
    found = triton_backend.forward(x, order, ends, ffn, level)
    expected = loop_backend.forward(x, order, ends, ffn, level)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6 * max(1.0, float(b.abs().max())) if b.numel() else 0.0)
    dy = torch.randn(5, 24).t()
    run = (dy, x, order, ends, ffn, found[1:], level)
    every = Needs(*(t is not None for t in (x, *ffn.tensors)))
    half = Needs(*(need and i % 2 == 0 for i, need in enumerate(every)))
    for needs in (every, half, Needs(*(name == "w_out" for name in Needs._fields))):
        gradients, wanted = triton_backend.backward(*run, needs), loop_backend.backward(*run, needs)
        for name, need, a, b in zip(Needs._fields, needs, gradients, wanted, strict=True):
            assert (a is not None) == (b is not None) == need, name
            if need:
                near = {"rtol": 5e-5, "atol": 5e-6 * max(1.0, float(b.abs().max()))}
                torch.testing.assert_close(a, b, **near, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("gated", [False, True])
def test_a_pass_maps_its_tiles_once(gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products that have tiles of the same height share the map: forward, and a backward that computes all again."""
    made: list[int] = []
    used: list[int] = []
    for module, heights in ((triton_tiles, made), (triton_linear, used)):

        def start(
            kernel: Any, *where: Any, heights: list[int] = heights, launch: Any = module.start, **own: Any
        ) -> None:
            if "map_ptr" in own:
                heights.append(own["BM"] if "BM" in own else own["height"])
            launch(kernel, *where, **own)

        monkeypatch.setattr(module, "start", start)
    ffn, x, order, ends = layer(gated, True, True), torch.randn(12, 9), torch.randperm(24), torch.tensor([7, 7, 20, 21])
    y, *kept = triton_backend.forward(x, order, ends, ffn, 2)
    assert len(used) == 2
    assert sorted(made) == sorted(set(used))
    made.clear()
    used.clear()
    needs = Needs(*(t is not None for t in (x, *ffn.tensors)))
    triton_backend.backward(y, x, order, ends, ffn, (kept[0], kept[1], kept[2]), 2, needs)
    assert len(used) == 3
    assert sorted(made) == sorted(set(used))
