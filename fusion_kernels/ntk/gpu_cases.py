"""What tangent kernels for GPUs prove themselves with: every entry against float64.

A bound follows a kernel from its inputs to its sums, each value with what rounding may have done to it so far: n
products sum up to within n units of their absolute values, whatever their order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fusion_kernels.activations import get_activation
from fusion_kernels.ffn import FFN
from fusion_kernels.ntk import cuda_backend, triton_backend
from fusion_kernels.ntk import reference as reference
from fusion_kernels.ntk.operators import exactly
from fusion_kernels.ntk.strips import precision_of
from fusion_kernels.ntk.types import Differentiated
from fusion_kernels.proof.cases import Case, Found, beyond, first_of

#: Of each dtype and precision: unit roundoff of what a product multiplies, and of its sums, which tensor cores cut off.
UNITS = {
    (torch.float64, "highest"): (2.0**-53, 2.0**-53),
    (torch.float32, "highest"): (2.0**-24, 2.0**-24),
    (torch.float32, "tf32x3"): (1.5 * 2.0**-22, 2.0**-23),
    (torch.float32, "bf16x3"): (1.5 * 2.0**-16, 2.0**-23),
    (torch.float32, "bf16"): (2.0**-8, 2.0**-23),
}
#: Of gelu and silu: the largest slope and curvature, and the units within which they are evaluated.
SLOPE, CURVATURE, EVALUATION = 1.13, 0.8, 8
#: What may stand beside a sum before it is rounded for the last time: weights, a bias, a constant, another pass.
BESIDE = 8


@dataclass(frozen=True)
class Problem:
    """A kernel: rows of both sides, None for one of a set with itself, inputs, neurons and outputs; and its options."""

    rows: int
    others: int | None
    d: int
    neurons: int
    outputs: int
    gated: bool
    kernel: str
    along: bool
    params: tuple[str, ...]

    @property
    def name(self) -> str:
        form, of = "gated" if self.gated else "plain", "vector" if self.along else "trace"
        sizes = f"{self.rows} x {self.others or self.rows} rows, {self.d} inputs, {self.neurons} neurons"
        return f"{form} {self.kernel} {of} by {' '.join(self.params)}, {sizes}"


_PLAIN, _GATED = ("w_in", "b_in", "w_out", "b_out"), ("w_in", "b_in", "w_gate", "b_gate", "w_out", "b_out")
#: One set of rows and two; more than one row of tiles, and rests of tiles and of steps.
EVERY = [
    Problem(300, None, 65, 70, 5, False, "gd", False, _PLAIN),
    Problem(129, 201, 130, 33, 3, True, "sign", True, _GATED),
]
#: Two passes; the tiles of few rows, of which there is one; a side without inputs.
FURTHER = [
    Problem(150, None, 65, 70, 5, True, "gd", True, ("w_in", "b_gate", "w_out")),
    Problem(17, 5, 31, 123, 1, False, "gd", False, _PLAIN),
    Problem(1, None, 1, 1, 1, True, "sign", False, ("b_in", "w_out")),
]


def of_triton(device: torch.device) -> list[Case]:
    """The cases of `triton` on a device."""
    return _cases(triton_backend, device)


def of_cuda(device: torch.device) -> list[Case]:
    """The same of `cuda`."""
    return _cases(cuda_backend, device)


def _cases(backend: Any, device: torch.device) -> list[Case]:
    function = backend.ntk_gram
    return [
        *(gram_case(function, problem, *how, device) for how in UNITS for problem in EVERY),
        *(gram_case(function, problem, torch.float32, "bf16x3", device) for problem in FURTHER),
        *(
            sums_case(backend.ntk_sums, problem, dtype, device)
            for dtype in (torch.float32, torch.float64)
            for problem in EVERY
        ),
    ]


def gram_case(
    function: Callable[..., Tensor], problem: Problem, dtype: torch.dtype, precision: str, device: torch.device
) -> Case:
    """One kernel."""
    x1, x2, ffn, direction = draw(problem, dtype)

    def options(of: Callable[[Tensor], Tensor]) -> tuple[object, ...]:
        along = None if direction is None else of(direction)
        return ffn.map(of), problem.params, problem.kernel, "vector" if problem.along else "trace", along

    def run() -> Found:
        def there(t: Tensor) -> Tensor:
            return t.to(device)

        second = None if x2 is None else there(x2)
        return {"K": exactly(function)(there(x1), second, *options(there), None, precision)}

    def wrong(found: Found) -> str | None:
        wide = (x1.double(), None if x2 is None else x2.double())
        exact = reference.ntk_gram(*wide, *options(Tensor.double))  # type: ignore[arg-type]
        reason = beyond("K", found["K"], exact, bound(problem, dtype, precision))
        if reason is None and x2 is None and problem.kernel == "gd" and not torch.equal(found["K"], found["K"].T):
            return "K is not symmetric"
        return reason

    return Case(f"{precision} of {dtype}, {problem.name}", run, wrong)


class _Compared(NamedTuple):
    """What sums over two kernels are told."""

    x1: Tensor
    x2: Tensor | None
    a: Differentiated
    b: Differentiated
    kernel: str
    direction: Tensor | None


def sums_case(
    function: Callable[..., tuple[Tensor, ...]], problem: Problem, dtype: torch.dtype, device: torch.device
) -> Case:
    """Sums over the kernel of a block by all its parts and that by its output weights, in strips of 100 rows."""
    x1, x2, ffn, direction = draw(problem, dtype)
    both = problem, replace(problem, params=("w_out",))

    def given(of: Callable[[Tensor], Tensor]) -> _Compared:
        a, b = (Differentiated(ffn.map(of), each.params, None) for each in both)
        along = None if direction is None else of(direction)
        return _Compared(of(x1), None if x2 is None else of(x2), a, b, problem.kernel, along)

    def run() -> Found:
        found = exactly(function)(*given(lambda t: t.to(device)), 100)
        return dict(zip(("sums", "rows", "columns"), found, strict=True))

    def wrong(found: Found) -> str | None:
        wide = given(Tensor.double)
        precision = precision_of(dtype)
        how = problem.kernel, "vector" if problem.along else "trace", wide.direction
        a, b = (
            _Value(reference.ntk_gram(wide.x1, wide.x2, block.ffn, block.params, *how), bound(each, dtype, precision))
            for block, each in zip((wide.a, wide.b), both, strict=True)
        )
        difference = _Value(a.value - b.value, a.error + b.error)
        products = [left * right for left, right in ((a, a), (a, b), (b, b), (difference, difference))]
        # All of them are added up in float64, in whatever order.
        total = 2.0**-53 * a.value.numel()
        allowed = {
            "sums": torch.stack([(each.error + total * (each.value.abs() + each.error)).sum() for each in products]),
            "rows": torch.stack([(each.error + total * each.value.abs()).sum(1) for each in (a, b)]),
            "columns": torch.stack([(each.error + total * each.value.abs()).sum(0) for each in (a, b)]),
        }
        exact = reference.ntk_sums(*wide)
        return first_of(
            *(beyond(name, found[name], true, allowed[name]) for name, true in zip(allowed, exact, strict=True))
        )

    return Case(f"sums in {dtype}, {problem.name}", run, wrong)


def draw(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, FFN, Tensor | None]:
    """Both sides' rows, the block and the direction: the same on every machine."""
    d, neurons, outputs = problem.d, problem.neurons, problem.outputs
    generator = torch.Generator().manual_seed(problem.rows + d + neurons)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    ffn = FFN(
        w_in=normal(neurons, d) / d**0.5,
        w_out=normal(neurons, outputs) / neurons**0.5,
        activation="silu" if problem.gated else "gelu",
        w_gate=normal(neurons, d) / d**0.5 if problem.gated else None,
        b_in=normal(neurons),
        b_gate=normal(neurons) if problem.gated else None,
        b_out=normal(outputs),
    )
    x2 = None if problem.others is None else normal(problem.others, d)
    return normal(problem.rows, d), x2, ffn, normal(outputs) if problem.along else None


@dataclass(frozen=True)
class _Value:
    """A float64 value, and how far from it its computation may be."""

    value: Tensor
    error: Tensor

    def rounded(self, unit: float) -> _Value:
        return _Value(self.value, self.error + unit * (self.value.abs() + self.error))

    def __mul__(self, other: _Value) -> _Value:
        error = self.error * (other.value.abs() + other.error) + self.value.abs() * other.error
        return _Value(self.value * other.value, error)

    def sign(self) -> _Value:
        """Right, or anything where a computation may come to the other side of 0."""
        return _Value(self.value.sign(), 2.0 * (self.value.abs() <= self.error).double())

    def products(self, other: _Value, unit: float) -> _Value:
        """self (N1, n) other' (n, N2)."""
        one, two = self.value.abs(), other.value.abs() + other.error
        error = self.error @ two.T + one @ other.error.T
        error += self.value.shape[1] * unit * ((one + self.error) @ two.T)
        return _Value(self.value @ other.value.T, error)


def _factors(ffn: FFN, x: Tensor, unit: float) -> dict[str, _Value]:
    """Hidden values and slopes of the rows x, computed with `unit`."""

    def linear(w: Tensor, b: Tensor | None) -> _Value:
        largest = F.linear(x.abs(), w.abs(), None if b is None else b.abs())
        return _Value(F.linear(x, w, b), (x.shape[1] + 2) * unit * largest)

    z = linear(ffn.w_in, ffn.b_in)
    inner = z if ffn.w_gate is None else linear(ffn.w_gate, ffn.b_gate)
    phi = get_activation(ffn.activation)
    evaluated = EVALUATION * unit
    value = _Value(phi.function(inner.value), SLOPE * inner.error + evaluated * inner.value.abs())
    slope = _Value(phi.derivative(inner.value), CURVATURE * inner.error + evaluated)
    if ffn.w_gate is None:
        return {"hidden": value, "in": slope}
    return {"hidden": value * z, "in": value, "gate": slope * z}


def bound(problem: Problem, dtype: torch.dtype, precision: str) -> Tensor:
    """(rows, others): how far each entry may be from the exact kernel."""
    x1, x2, ffn, direction = draw(problem, dtype)
    unit, (operand, total) = torch.finfo(dtype).eps / 2, UNITS[dtype, precision]
    ffn, along = ffn.map(Tensor.double), None if direction is None else direction.double()
    weight1, weight2, coefficient = reference.contraction(ffn.w_out, along, problem.kernel)
    gd = problem.kernel == "gd"
    of_hidden = (coefficient**0.5, coefficient**0.5) if gd else (coefficient, 1.0)

    def side(x: Tensor, weight: Tensor, of_hidden: float, signs: bool) -> dict[str, _Value]:
        # A sum over outputs whose terms cancel may be far off what is left of it.
        largest = weight.abs() if along is None else ffn.w_out.abs() @ along.abs()
        weights = _Value(weight, torch.zeros_like(weight) if signs else (problem.outputs + 4) * unit * largest)
        found = _factors(ffn, x, unit)
        hidden = found.pop("hidden")
        held = {name: slope * weights for name, slope in found.items()} | {
            "hidden": _Value(of_hidden * hidden.value, of_hidden * hidden.error),
            "x": _Value(x, torch.zeros_like(x)),
        }
        if signs:
            return {name: each.sign() for name, each in held.items()}
        return {name: each.rounded(BESIDE * unit).rounded(operand) for name, each in held.items()}

    left = side(x1.double(), weight1, of_hidden[0], False)
    right = side((x1 if x2 is None else x2).double(), weight2, of_hidden[1], not gd)
    products = {name: left[name].products(right[name], total) for name in left}
    params = problem.params
    one = torch.ones_like(products["x"].value)
    terms = [_Value(coefficient * ("b_out" in params) * one, 0.0 * one)]
    if "w_out" in params:
        terms.append(products["hidden"])
    for name in products.keys() - {"hidden", "x"}:
        over = _Value(one * (f"b_{name}" in params), 0.0 * one)
        if f"w_{name}" in params:
            over = _Value(products["x"].value + over.value, products["x"].error)
        if f"w_{name}" in params or f"b_{name}" in params:
            terms.append(over.rounded(total) * products[name])
    # The products of one term may be added to what the others came to.
    last = (BESIDE + 2 * problem.neurons) * total
    return torch.stack([term.rounded(last).error for term in terms]).sum(0)
