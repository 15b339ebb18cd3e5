"""What rounding alone may do to a result: a bound for every entry, and the error that is usual over many of them.

`Rounded` is a float64 value with a bound on how far a computation of it in some dtype may be from it, whatever the
order of its sums. `+`, `*` and `@` propagate the bound from the sums of absolute values (Higham, Accuracy and Stability
of Numerical Algorithms, section 3.1): n products sum up to within gamma_n = n u / (1 - n u) of their absolute values,
with u the unit roundoff. `assert_rounding` holds a result to two rules:

- every entry lies within its bound. No processor that rounds to nearest and evaluates activations to within
  `EVALUATION` units goes beyond it. It is the worst case, and so it catches what is wrong, not what is imprecise: a
  term left out, a wrong factor, a sum in a lower precision.
- over `MANY` entries and more, the RMS of the errors, each relative to its bound, is at most `RATIO` times that of
  torch in the same dtype. This catches what is imprecise: 10 units in the last place of every entry, or 20 of a tenth
  of them, where sums are as long as in the tests. Among fewer entries torch's own error would be luck: results of
  `SOME` and more are pooled with the others of one call, each relative to torch's, or left out where these are too few.

A single entry that is a few units off beside a long sum is caught by neither. `tests/fusion_kernels/test_rounding.py`
shows all of this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusion_kernels.activations import get_activation
from fusion_kernels.gates import Gate

#: Entries of which an RMS error says something, alone and beside others.
MANY, SOME = 200, 32
#: How many times torch's RMS error one may be.
RATIO = 2.0
#: Units within which an activation is evaluated, relative to its argument, and its derivative, absolute.
EVALUATION = 8
#: The largest curvature of each activation. That of relu is in its kink.
CURVATURE = {"gelu": 0.8, "gelu_tanh": 0.85, "quick_gelu": 0.86, "relu": 0.0, "relu2": 2.0, "silu": 0.5}


@dataclass(frozen=True)
class Arithmetic:
    """How a computation in `dtype` rounds: what it stores to that dtype, its sums as at least float32 does.

    Attributes:
        operand: unit roundoff of what `stored` rounds to; None for that of `dtype`.
        total: unit roundoff of sums; None for that of `dtype` or float32.
    """

    dtype: torch.dtype
    operand: float | None = None
    total: float | None = None

    @property
    def unit(self) -> float:
        return torch.finfo(self.dtype).eps / 2

    @property
    def sum_unit(self) -> float:
        wide = torch.promote_types(self.dtype, torch.float32)
        return torch.finfo(wide).eps / 2 if self.total is None else self.total

    def gamma(self, n: int) -> float:
        """What n roundings of a sum do to it, relative to its absolute values."""
        return n * self.sum_unit / (1 - n * self.sum_unit)

    @property
    def tiny(self) -> float:
        """What is lost where a result underflows."""
        info = torch.finfo(self.dtype)
        return max(info.tiny * info.eps, torch.finfo(torch.float32).tiny)

    def exact(self, t: Tensor) -> Rounded:
        """What is given, as it is."""
        wide = t.detach().double()
        return Rounded(wide, torch.zeros_like(wide), self)


@dataclass(frozen=True)
class Rounded:
    """A value (float64), and how far from it its computation may be (float64, not negative)."""

    value: Tensor
    error: Tensor
    by: Arithmetic

    @property
    def largest(self) -> Tensor:
        """The largest absolute values that a computation may come to."""
        return self.value.abs() + self.error

    @property
    def T(self) -> Rounded:  # noqa: N802 - as tensors have it
        return Rounded(self.value.T, self.error.T, self.by)

    def __getitem__(self, index: Any) -> Rounded:
        return Rounded(self.value[index], self.error[index], self.by)

    def view(self, *shape: int) -> Rounded:
        return Rounded(self.value.reshape(shape), self.error.reshape(shape), self.by)

    def stack(self, *others: Rounded) -> Rounded:
        """Itself and others, one above the other."""
        every = (self, *others)
        return Rounded(torch.stack([r.value for r in every]), torch.stack([r.error for r in every]), self.by)

    def rounded(self, times: int = 1) -> Rounded:
        """After some more roundings in the precision of sums."""
        return Rounded(self.value, self.error + self.by.gamma(times) * self.largest, self.by)

    def stored(self) -> Rounded:
        """After it went through a tensor."""
        unit = self.by.unit if self.by.operand is None else self.by.operand
        return Rounded(self.value, self.error + unit * self.largest + self.by.tiny, self.by)

    def __neg__(self) -> Rounded:
        return Rounded(-self.value, self.error, self.by)

    def __add__(self, other: Rounded) -> Rounded:
        return Rounded(self.value + other.value, self.error + other.error, self.by).rounded()

    def __mul__(self, other: Rounded) -> Rounded:
        error = self.error * other.largest + self.value.abs() * other.error
        return Rounded(self.value * other.value, error, self.by).rounded()

    def __matmul__(self, other: Rounded) -> Rounded:
        error = self.error @ other.largest + self.value.abs() @ other.error
        error += self.by.gamma(self.value.shape[-1]) * (self.largest @ other.largest)
        return Rounded(self.value @ other.value, error, self.by)

    def sum(self, dim: int) -> Rounded:
        error = self.error.sum(dim) + self.by.gamma(self.value.shape[dim]) * self.largest.sum(dim)
        return Rounded(self.value.sum(dim), error, self.by)

    def or_by(self, other: Rounded) -> Rounded:
        """The same value, computed in either way."""
        return Rounded(self.value, torch.maximum(self.error, other.error), self.by)

    def clamp(self, low: float | None, high: float | None) -> tuple[Rounded, Rounded]:
        """The value within limits, and 1 where they let it through; either where it may come to both sides of one."""
        v, e = self.value, self.error
        clamped, error, unsure, inside = v, e, torch.zeros_like(v, dtype=torch.bool), torch.ones_like(v)
        for limit, sign in ((low, -1.0), (high, 1.0)):
            if limit is None:
                continue
            own = self.by.unit * abs(limit)  # the limit is one of the dtype
            beyond = sign * (v - limit)
            clamped = torch.where(beyond > 0, limit, clamped)
            error = torch.where(beyond > e + own, own, torch.where(beyond >= -e - own, error + own, error))
            unsure |= beyond.abs() <= e + own
            inside = torch.where(beyond > 0, 0.0, inside)
        return Rounded(clamped, error, self.by), Rounded(inside, unsure.double(), self.by)

    def sign(self) -> Rounded:
        """A sign is right, or anything where a computation may come to the other side of 0."""
        unsure = (self.value.abs() <= self.error) & (self.error > self.by.tiny)
        return Rounded(self.value.sign(), 2.0 * unsure, self.by)

    def activated(self, name: str) -> tuple[Rounded, Rounded]:
        """The activation and its derivative, by their slope and curvature around the value."""
        phi, curvature = get_activation(name), CURVATURE[name]
        z, e, unit = self.value, self.error, EVALUATION * self.by.unit
        slope = phi.derivative(z)
        if name == "relu":
            unsure = (z.abs() <= e) & (e > self.by.tiny)
            return (
                Rounded(z.relu(), torch.where(z + e > 0, e, 0.0), self.by),
                Rounded(slope, unsure.double(), self.by),
            )
        value_error = (slope.abs() + curvature * e) * e
        if name == "relu2":
            value = z.relu().square()
            return Rounded(value, value_error + self.by.unit * value, self.by), Rounded(slope, curvature * e, self.by)
        value = Rounded(phi.function(z), value_error + unit * self.largest, self.by)
        return value, Rounded(slope, curvature * e + unit, self.by)


def gated(gate: Rounded, up: Rounded, activation: str, gating: Gate) -> tuple[Rounded, Rounded, Rounded, Rounded]:
    """Of a gated block: what multiplies up, its derivative, the limited up with its offset, and that one's derivative.

    Args:
        gate: of a plain block, what goes into the activation.
    """
    limit, clamp, offset = gating.arguments
    low, high = (-limit if clamp == "both" else None, limit) if clamp in ("above", "both") else (None, None)
    gate, inside = gate.clamp(low, high)
    value, slope = gate.activated(activation)
    value, below = value.stored().clamp(None, limit if clamp == "after" else None)
    up, passes = up.clamp(*((None, None) if limit is None else (-limit, limit)))
    if offset:
        up = (up + up.by.exact(torch.full_like(up.value, offset)).stored()).stored()
    return value, slope.stored() * inside * below, up, passes


def within_bound(found: Tensor, exact: Tensor, bound: Rounded) -> Tensor:
    """Each entry's error over its bound, at most 1 where rounding is all that happened; 0 where both are 0.

    float64 itself rounds as much as what is compared with it: both may be off by the bound.
    """
    allowed = bound.error * (2.0 if bound.by.dtype == torch.float64 else 1.0)
    error = (found.detach().cpu().double() - exact).abs()
    # A NaN stays one, and an error where none may be becomes infinite.
    return torch.where((error == 0) & (allowed == 0), 0.0, error / allowed)


def assert_rounding(
    found: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    bounds: Mapping[str, Rounded],
    *torchs: Mapping[str, Tensor],
) -> None:
    """Results by name are what rounding makes of the float64 `exact`: see the top of this module.

    Args:
        found: what was computed.
        bounds: of each.
        torchs: what torch computes in the same dtype; where it may go about it in several ways, the worst counts. None
            asks for the bounds alone.
    """
    assert set(found) == set(exact)
    pools: dict[str, list[Tensor]] = {}
    for name, own in found.items():
        assert own.shape == exact[name].shape, name
        errors, *usual = (
            within_bound(t, exact[name], bounds[name]).flatten() for t in (own, *(t[name] for t in torchs))
        )
        assert bool((errors <= 1).all()), f"{name}: {float(errors.max()):.2f} times what rounding may do"
        if usual and len(errors) >= SOME:
            worst = max(float(e.square().mean().sqrt()) for e in usual)
            pools.setdefault(name if len(errors) >= MANY else "together", []).append(
                torch.where(errors == 0, 0.0, errors / worst)
            )
    for name, pool in pools.items():
        times = torch.cat(pool)
        if len(times) >= MANY:
            rms = float(times.square().mean().sqrt())
            assert rms <= RATIO, f"{name}: an RMS error of {rms:.2f} times torch's"
