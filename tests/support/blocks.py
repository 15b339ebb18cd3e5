"""Feed-forward blocks and their eager counterpart, for the tests of `fused_mlp` and `fused_glu_mlp`."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from rounding import Arithmetic, Rounded
from torch import Tensor
from torch.nn import functional as F

from fusion_kernels import fused_glu_mlp, fused_mlp
from fusion_kernels.activations import get_activation
from fusion_kernels.ffn import FFN


@dataclass
class MLPCall:
    """A call of `fused_mlp` or, with `w_gate`, of `fused_glu_mlp`: x, the upstream gradient, and what they take.

    `w_out` is theirs, (d_out, h).
    """

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

    @property
    def ffn(self) -> FFN:
        """The block that they make of it."""
        return FFN(
            self.w_in, self.w_out.mT, self.activation, self.w_gate, self.b_in, self.b_gate, self.b_out, self.scale
        )

    def tensors(self) -> dict[str, Tensor]:
        """What there is, by name, but for dy."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("dy", "activation")}
        return {name: t for name, t in named.items() if t is not None}

    def leaves(self) -> dict[str, Tensor]:
        """What can have a gradient."""
        return {name: t for name, t in self.tensors().items() if t.is_floating_point()}

    def to(self, dtype: torch.dtype) -> MLPCall:
        """Detached copies in `dtype`; an integer scale stays one."""
        moved = {name: t.detach().to(dtype, copy=True) for name, t in self.leaves().items()}
        return replace(self, **moved, dy=self.dy.detach().to(dtype, copy=True))

    def training(self) -> MLPCall:
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

    def folded(self) -> Tensor:
        """The same, the scale behind the activation in the weights of the last layer."""
        if self.scale is None:
            return self.eager()
        behind = self.scale if self.scale.ndim == 1 else self.scale[0]
        before = None if self.scale.ndim == 1 else torch.stack([torch.ones_like(behind), self.scale[1]])
        return replace(self, w_out=(self.w_out * behind).to(self.w_out.dtype), scale=before).eager()

    def bounds(self, dtype: torch.dtype, dy: Rounded | None = None) -> dict[str, Rounded]:
        """How far y and every gradient may be from float64 when they are computed in `dtype`.

        The gradients are for this block's dy, or for one that is itself rounded.
        """
        by = Arithmetic(dtype)
        given = {name: by.exact(t) for name, t in self.tensors().items()}
        w_in, w_out, scale = (given.get(name) for name in ("w_in", "w_out", "scale"))
        before, behind = (None, scale) if scale is None or scale.value.ndim == 1 else (scale[1], scale[0])
        x = by.exact(self.x.flatten(0, -2))
        dy = by.exact(self.dy.flatten(0, -2)) if dy is None else dy

        def linear(x: Rounded, weight: Rounded, bias: Rounded | None) -> Rounded:
            z = x @ weight.T
            return z.stored() if bias is None else (z.stored() + bias).stored()

        def times(t: Rounded, factor: Rounded | None) -> Rounded:
            return t if factor is None else (t * factor).stored()

        z = linear(x, w_in, given.get("b_in"))
        inside = linear(x, given["w_gate"], given.get("b_gate")) if "w_gate" in given else z
        value, slope = times(inside, before).activated(self.activation)
        value, slope = value.stored(), slope.stored()
        a = (value * z).stored() if "w_gate" in given else value
        found = {"y": linear(times(a, behind), w_out, given.get("b_out"))}

        # Without a scale torch forms the gradient of W_out as K does, with one it may scale before or behind the sum.
        k = (dy.T @ a).stored()
        found["w_out"] = times(k, behind).or_by((dy.T @ times(a, behind)).stored())
        dh = (dy @ w_out).stored()
        da = times(dh, behind)
        if behind is not None:  # which may be in the weights instead
            da = da.or_by((dy @ (w_out * behind).stored()).stored())
        inner = ((da * z).stored() if "w_gate" in given else da) * slope
        dz = (da * value).stored() if "w_gate" in given else times(inner.stored(), before)
        dg = times(inner.stored(), before)
        found |= {"w_in": (dz.T @ x).stored(), "b_in": dz.sum(0).stored(), "b_out": dy.sum(0).stored()}
        found["x"] = (dz @ w_in).stored()
        if "w_gate" in given:
            found |= {"w_gate": (dg.T @ x).stored(), "b_gate": dg.sum(0).stored()}
            found["x"] = (found["x"] + (dg @ given["w_gate"]).stored()).stored()
        if scale is not None:
            d_behind = (dh * a).stored().sum(0).stored().or_by((k * w_out).sum(0).stored())
            d_before = (inner.stored() * inside).stored().sum(0).stored()
            found["scale"] = d_behind if before is None else d_behind.stack(d_before)
        found |= {"x": found["x"].view(*self.x.shape), "y": found["y"].view(*self.dy.shape)}
        return found

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
) -> MLPCall:
    """A random block with x of `shape` (..., d) without d.

    scale is `"float"`, `"int"`, None, or `"both"` for (2, h): one behind the activation and one before it.
    """
    g = torch.Generator().manual_seed(seed)

    def draw(*size: int, by: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=g, dtype=torch.float64) * by).to(dtype)

    counts = torch.randint(1, 9, (h,), generator=g)
    scales = {None: None, "int": counts, "float": counts.to(dtype) + 0.25}
    scales["both"] = torch.stack([counts.to(dtype) ** 0.5, counts.to(dtype) ** -0.5])
    return MLPCall(
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
