"""What the Triton kernels of small blocks prove themselves with: see `fusion_kernels.proof`.

Forward and backward of each backend against float64. An entry may err by a few units in the last place of the root of
the sum of squares that it comes from: roundings of independent terms add up so, and a tile that is left out, counted
twice or added up in a lower precision is far beyond.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusion_kernels.activations import get_activation
from fusion_kernels.ffn import FFN
from fusion_kernels.mlp import gpu_backend, reference
from fusion_kernels.mlp.types import Needs
from fusion_kernels.proof.cases import Case, Found, beyond, first_of

#: Units in the last place that an entry may be off, of the root of its sum of squares.
UNITS = 3
#: Tokens, inputs, neurons: whole tiles and a rest, and rows that no vector load fits.
SHAPES = {torch.bfloat16: [(300, 768, 192), (65, 123, 50)], torch.float16: [(300, 256, 192)]}
BACKENDS = {
    "cublas": (gpu_backend.cublas_forward, gpu_backend.cublas_backward),
    "epilogue": (gpu_backend.epilogue_forward, gpu_backend.epilogue_backward),
}


def blocks(device: torch.device) -> list[Case]:
    """The cases of `cublas` and `epilogue` on a device."""
    return [
        block_case(name, dtype, shape, gated, device)
        for name in BACKENDS
        for dtype, shapes in SHAPES.items()
        for shape in shapes
        for gated in (False, True)
    ]


def block_case(name: str, dtype: torch.dtype, shape: tuple[int, int, int], gated: bool, device: torch.device) -> Case:
    """One backend on one block."""
    T, d, h = shape
    x, dy, ffn = draw(T, d, h, gated, dtype)
    forward, backward = BACKENDS[name]

    def run() -> Found:
        there, block = x.to(device), ffn.map(lambda t: t.to(device))
        y, *kept = forward(there, block, 1)
        needs = Needs(True, *(t is not None for t in block.tensors))
        found = backward(dy.to(device), there, block, (kept[0], kept[1], kept[2]), 1, needs)
        return {"y": y, **{name: t for name, t in found._asdict().items() if t is not None}}

    def wrong(found: Found) -> str | None:
        return off(found, x, dy, ffn)

    return Case(f"{name}, {'gated' if gated else 'plain'}, {dtype}, {T} x {d} x {h}", run, wrong)


def draw(
    T: int, d: int, h: int, gated: bool, dtype: torch.dtype, experts: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor, FFN]:
    """Tokens, gradients of their results, and a block with all its tensors, the same on every machine."""
    g = torch.Generator().manual_seed(T + d + h)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*size, generator=g, dtype=torch.float64)).to(dtype)

    ffn = FFN(
        normal(*experts, h, d, scale=d**-0.5),
        normal(*experts, h, d, scale=h**-0.5),
        "silu" if gated else "gelu",
        normal(*experts, h, d, scale=d**-0.5) if gated else None,
        normal(*experts, h),
        normal(*experts, h) if gated else None,
        normal(*experts, d),
    )
    return normal(T, d), normal(T, d), ffn


def off(found: Found, x: Tensor, dy: Tensor, ffn: FFN) -> str | None:
    """In one line what of the results of forward and backward is off."""
    wide, dy, block = x.double(), dy.double(), ffn.map(Tensor.double)
    needs = Needs(True, *(t is not None for t in ffn.tensors))
    exact = {"y": reference.mlp(wide, block), **reference.mlp_backward(dy, wide, block, needs)._asdict()}
    allowed = sizes(wide, dy, block)
    unit = UNITS * torch.finfo(x.dtype).eps
    reasons = (beyond(name, t, exact[name], unit * (allowed[name] + exact[name].abs())) for name, t in found.items())
    return first_of(*reasons)


def sizes(x: Tensor, dy: Tensor, ffn: FFN) -> dict[str, Tensor]:
    """Of each result the root of the sum of squares that its entries come from, in float64."""
    phi = get_activation(ffn.activation)
    z, g, a = reference.hidden(x, ffn)
    one = torch.ones((), dtype=x.dtype)
    # An activation and its slope change by about as much as their argument.
    up = one if g is None else one + z.abs()
    inside = z.abs() if g is None else g.abs()
    hidden = a.abs() + inside * up
    da = _root(dy, ffn.w_out.mT)
    slope = da * (one + inside) * up
    found = {
        "y": _root(hidden, ffn.w_out) + (0 if ffn.b_out is None else ffn.b_out.abs()),
        "w_out": _root(hidden.mT, dy),
        "b_out": dy.square().sum(0).sqrt(),
    }
    through = {"in": slope} if g is None else {"in": da * (phi.function(inside).abs() + inside), "gate": slope}
    dx = torch.zeros_like(x)
    for name, dz in through.items():
        weight = ffn.w_in if name == "in" else ffn.w_gate
        assert weight is not None
        dx = dx + _root(dz, weight).square()
        found |= {f"w_{name}": _root(dz.mT, x), f"b_{name}": dz.square().sum(0).sqrt()}
    return {**found, "x": dx.sqrt()}


def _root(a: Tensor, b: Tensor) -> Tensor:
    return (a.square() @ b.square()).sqrt()
