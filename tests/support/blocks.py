"""Feed-forward blocks and their eager counterpart, for the tests of `fused_mlp` and `fused_glu_mlp`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

import pytest
import torch
from rounding import MANY, Arithmetic, Rounded, assert_rounding, gated
from torch import Tensor
from torch.nn import functional as F

from fusion_kernels import Gate, fused_glu_mlp, fused_mlp, native
from fusion_kernels.activations import get_activation
from fusion_kernels.ffn import FFN
from fusion_kernels.gates import PLAIN

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BACKENDS = [
    pytest.param("cpu", marks=pytest.mark.skipif(native.UNAVAILABLE is not None, reason="no compiled library")),
    "torch",
    "reference",
]
#: Forms of a gate; 2.7 is a number of no dtype but float64.
GATES = {
    "above": Gate(7.0, "above", 1.0),
    "both": Gate(2.7, "both"),
    "after": Gate(2.7, "after", -0.3),
    "up": Gate(2.7),
    "offset": Gate(up_offset=1.0),
}


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
    gating: Gate = field(default_factory=Gate)

    @property
    def ffn(self) -> FFN:
        """The block that they make of it."""
        stored = (self.w_in, self.w_out, self.w_gate, self.b_in, self.b_gate, self.b_out, self.scale)
        return FFN.of_linears(stored, self.activation, self.gating)

    def tensors(self) -> dict[str, Tensor]:
        """What there is, by name, but for dy."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("dy", "activation", "gating")}
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
            self.activation, level, gating=self.gating, backend=backend,
        )  # fmt: skip

    def eager(self) -> Tensor:
        """What a module of ordinary layers computes, the scale as a factor of its own."""
        phi = get_activation(self.activation).function
        before, behind = (None, self.scale) if self.scale is None or self.scale.ndim == 1 else self.scale.flip(0)
        inside = (self.w_in, self.b_in) if self.w_gate is None else (self.w_gate, self.b_gate)
        limit, clamp, offset = self.gating.arguments

        def scaled(t: Tensor) -> Tensor:
            return t if before is None else (t * before).to(t.dtype)

        g = scaled(F.linear(self.x, *inside))
        if clamp in ("above", "both"):
            g = torch.clamp(g, -limit if clamp == "both" else None, limit)
        a = phi(g)
        if clamp == "after":
            a = torch.clamp(a, max=limit)
        if self.w_gate is not None:
            up = F.linear(self.x, self.w_in, self.b_in)
            up = up if limit is None and offset == 0 else scaled(up)
            a = a * ((up if limit is None else torch.clamp(up, -limit, limit)) + offset)
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
        up_before = None if self.gating.plain else before
        value, slope, up, passes = gated(times(inside, before), times(z, up_before), self.activation, self.gating)
        a = (value * up).stored() if "w_gate" in given else value
        found = {"y": linear(times(a, behind), w_out, given.get("b_out"))}

        # Without a scale torch forms the gradient of W_out as K does, with one it may scale before or behind the sum.
        k = (dy.T @ a).stored()
        found["w_out"] = times(k, behind).or_by((dy.T @ times(a, behind)).stored())
        dh = (dy @ w_out).stored()
        da = times(dh, behind)
        if behind is not None:  # which may be in the weights instead
            da = da.or_by((dy @ (w_out * behind).stored()).stored())
        inner = ((da * up).stored() if "w_gate" in given else da) * slope
        dup = (da * value).stored() * passes
        dz = times(dup.stored(), up_before) if "w_gate" in given else times(inner.stored(), before)
        dg = times(inner.stored(), before)
        found |= {"w_in": (dz.T @ x).stored(), "b_in": dz.sum(0).stored(), "b_out": dy.sum(0).stored()}
        found["x"] = (dz @ w_in).stored()
        if "w_gate" in given:
            found |= {"w_gate": (dg.T @ x).stored(), "b_gate": dg.sum(0).stored()}
            found["x"] = (found["x"] + (dg @ given["w_gate"]).stored()).stored()
        if scale is not None:
            d_behind = (dh * a).stored().sum(0).stored().or_by((k * w_out).sum(0).stored())
            d_before = (inner.stored() * inside).stored().sum(0).stored()
            if "w_gate" in given and not self.gating.plain:
                d_before = (d_before + (dup.stored() * z).stored().sum(0).stored()).stored()
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
    gating: Gate = PLAIN,
    spread: float = 1.0,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> MLPCall:
    """A random block with x of `shape` (..., d) without d.

    scale is `"float"`, `"int"`, None, or `"both"` for (2, h): one behind the activation and one before it. `spread` is
    that of x, and so about that of what goes into the activation.
    """
    g = torch.Generator().manual_seed(seed)

    def draw(*size: int, by: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=g, dtype=torch.float64) * by).to(dtype)

    counts = torch.randint(1, 9, (h,), generator=g)
    scales = {None: None, "int": counts, "float": counts.to(dtype) + 0.25}
    scales["both"] = torch.stack([counts.to(dtype) ** 0.5, counts.to(dtype) ** -0.5])
    return MLPCall(
        x=draw(*shape, d, by=spread),
        dy=draw(*shape, d_out),
        w_in=draw(h, d, by=max(d, 1) ** -0.5),
        w_out=draw(d_out, h, by=max(h, 1) ** -0.5),
        w_gate=draw(h, d, by=max(d, 1) ** -0.5) if gated else None,
        b_in=draw(h, by=0.1) if bias else None,
        b_gate=draw(h, by=0.1) if bias and gated else None,
        b_out=draw(d_out, by=0.1) if bias else None,
        scale=scales[scale],
        activation=activation,
        gating=gating,
    )


def computed(block: MLPCall, run: Callable[[MLPCall], Tensor]) -> dict[str, Tensor]:
    """y and the gradients for dy, by name, each in the dtype of what it belongs to."""
    block = block.to(block.x.dtype).training()
    y = run(block)
    found = block.gradients(y) | {"y": y.detach()}
    leaves = block.leaves() | {"y": block.x}
    assert {name: t.dtype for name, t in found.items()} == {name: leaves[name].dtype for name in found}
    return found


def check(block: MLPCall, backend: str, dtype: torch.dtype, levels: Sequence[int] = (0, 1, 2)) -> None:
    """The fused block in `dtype` is what rounding makes of float64, and as near to it as ordinary layers are."""
    low = block.to(dtype)
    exact, bounds = computed(low.to(torch.float64), MLPCall.eager), low.bounds(dtype)
    # float64 has nothing to be compared with; of few hidden values torch's errors would be luck.
    many = dtype != torch.float64 and low.x[..., 0].numel() * len(low.w_in) >= MANY
    torchs = [computed(low, run) for run in (MLPCall.eager, MLPCall.folded)] if many else []
    for level in levels:
        found = computed(low, lambda b, level=level: b.fused(level, backend))
        assert_rounding(found, exact, {name: bounds[name] for name in exact}, *torchs)
