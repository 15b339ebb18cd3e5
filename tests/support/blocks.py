"""Feed-forward blocks and their eager counterpart, for the tests of `fused_mlp` and `fused_glu_mlp`."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from fusion_kernels import fused_glu_mlp, fused_mlp
from fusion_kernels.activations import get_activation


@dataclass
class MLPBlock:
    """x, the upstream gradient, and the tensors of a block; gated when `w_gate` is there."""

    x: Tensor
    dy: Tensor
    w_in: Tensor
    w_out: Tensor
    w_gate: Tensor | None = None
    b_in: Tensor | None = None
    b_gate: Tensor | None = None
    b_out: Tensor | None = None
    scale: Tensor | None = None
    activation: str = "gelu"

    def tensors(self) -> dict[str, Tensor]:
        """What there is, by name, but for dy."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("dy", "activation")}
        return {name: t for name, t in named.items() if t is not None}

    def leaves(self) -> dict[str, Tensor]:
        """What can have a gradient."""
        return {name: t for name, t in self.tensors().items() if t.is_floating_point()}

    def to(self, dtype: torch.dtype) -> MLPBlock:
        """Detached copies in `dtype`; an integer scale stays one."""
        moved = {name: t.detach().to(dtype, copy=True) for name, t in self.leaves().items()}
        return replace(self, **moved, dy=self.dy.detach().to(dtype, copy=True))

    def training(self) -> MLPBlock:
        """All that can have a gradient asks for it."""
        for t in self.leaves().values():
            t.requires_grad_()
        return self

    def fused(self, level: int = 1, backend: str = "auto") -> Tensor:
        """The public function's result."""
        if self.w_gate is None:
            return fused_mlp(
                self.x, self.w_in, self.b_in, self.w_out, self.b_out, self.scale, self.activation, level,
                backend=backend,
            )  # fmt: skip
        return fused_glu_mlp(
            self.x, self.w_gate, self.w_in, self.w_out, self.b_gate, self.b_in, self.b_out, self.scale,
            self.activation, level, backend=backend,
        )  # fmt: skip

    def eager(self) -> Tensor:
        """What a module of ordinary layers computes, the scale as a factor of its own."""
        phi = get_activation(self.activation).function
        before, behind = (None, self.scale) if self.scale is None or self.scale.ndim == 1 else self.scale.flip(0)
        inside = (self.w_in, self.b_in) if self.w_gate is None else (self.w_gate, self.b_gate)
        g = F.linear(self.x, *inside)
        a = phi(g if before is None else (g * before).to(g.dtype))
        if self.w_gate is not None:
            a = a * F.linear(self.x, self.w_in, self.b_in)
        return F.linear(a if behind is None else (a * behind).to(a.dtype), self.w_out, self.b_out)

    def gradients(self, y: Tensor) -> dict[str, Tensor]:
        """Gradients of y for dy, by name."""
        leaves = {name: t for name, t in self.leaves().items() if t.requires_grad}
        return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), self.dy), strict=True))


def make_block(
    *shape: int,
    d: int = 12,
    h: int = 9,
    d_out: int = 7,
    gated: bool = False,
    bias: bool = True,
    scale: str | None = "float",
    activation: str = "gelu",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> MLPBlock:
    """A random block with x of `shape` (..., d) without d.

    scale is `"float"`, `"int"`, None, or `"both"` for (2, h): one behind the activation and one before it.
    """
    g = torch.Generator().manual_seed(seed)

    def draw(*size: int, by: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=g, dtype=torch.float64) * by).to(dtype)

    counts = torch.randint(1, 9, (h,), generator=g)
    scales = {None: None, "int": counts, "float": counts.to(dtype) + 0.25}
    scales["both"] = torch.stack([counts.to(dtype) ** 0.5, counts.to(dtype) ** -0.5])
    return MLPBlock(
        x=draw(*shape, d),
        dy=draw(*shape, d_out),
        w_in=draw(h, d, by=max(d, 1) ** -0.5),
        w_out=draw(d_out, h, by=max(h, 1) ** -0.5),
        w_gate=draw(h, d, by=max(d, 1) ** -0.5) if gated else None,
        b_in=draw(h, by=0.1) if bias else None,
        b_gate=draw(h, by=0.1) if bias and gated else None,
        b_out=draw(d_out, by=0.1) if bias else None,
        scale=scales[scale],
        activation=activation,
    )


def reordered(block: MLPBlock) -> list[MLPBlock]:
    """The block with its tokens in other orders: gradients of its parameters are the same sums, rounded otherwise."""
    if block.x.ndim < 2:
        return []
    orders = _orders(block.x.shape[-2])
    found = [replace(block, x=block.x[..., order, :], dy=block.dy[..., order, :]) for order in orders]
    return [b.to(block.x.dtype) for b in found]


def with_neurons_reordered(block: MLPBlock) -> list[MLPBlock]:
    """The block with its neurons in other orders: gradients of x are the same sums, rounded otherwise."""

    def pick(t: Tensor | None, order: Tensor) -> Tensor | None:
        return None if t is None else t[order]

    return [
        replace(
            block, w_in=block.w_in[order], b_in=pick(block.b_in, order), w_gate=pick(block.w_gate, order),
            b_gate=pick(block.b_gate, order), w_out=block.w_out[:, order],
            scale=None if block.scale is None else block.scale[..., order],
        ).to(block.x.dtype)
        for order in _orders(block.w_in.shape[0])
    ]  # fmt: skip


def _orders(n: int) -> list[Tensor]:
    return [torch.arange(n).flip(0), torch.arange(n).roll(n // 2), torch.arange(n).roll(1)]


def assert_as_good(found: Tensor, exact: Tensor, what: str, *peers: Tensor) -> None:
    """At most twice the error of torch in the same dtype, in the maximum and in RMS, beside float64 `exact`.

    The worst of `peers` counts, which may be the same sums in several orders: over few entries one alone may be lucky.
    Added is a unit in the last place of the largest entry, half of one in RMS. float64 itself is compared to 64 units.
    """
    assert found.shape == exact.shape, what
    if not exact.numel():
        return
    error, theirs = (found.double() - exact).abs(), [(peer.double() - exact).abs() for peer in peers]
    ulp = torch.finfo(found.dtype).eps * float(exact.abs().max()) * (64 if found.dtype == torch.float64 else 1)
    worst = max(float(e.max()) for e in theirs)
    assert float(error.max()) <= 2 * worst + ulp, (what, float(error.max()), worst)
    rms, allowed = float(error.square().mean().sqrt()), max(float(e.square().mean().sqrt()) for e in theirs)
    assert rms <= 2 * allowed + 0.5 * ulp, (what, rms, allowed)
