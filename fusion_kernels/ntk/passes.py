"""What the tile kernels for GPUs multiply: the passes over a tangent kernel of one number per pair of rows.

Each set of rows becomes an operand, its inputs, slopes and hidden values side by side, multiplied by the weights of
outputs and neurons. How an operand is computed and stored is the business of who multiplies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from fusion_kernels.ffn import FFN
from fusion_kernels.ntk.weighting import Weights, weigh


class Products(NamedTuple):
    """How two operands are multiplied.

    Attributes:
        inputs: columns of inputs; 0 if they are not multiplied.
        neurons: columns of each kind of slopes and of hidden values.
        slopes: how many kinds there are.
        hidden: whether there are hidden values.
        bias: what is added to the products of inputs.
        constant: what is added to everything.
        accumulate: whether all of it is added to the result of the pass before.
    """

    inputs: int
    neurons: int
    slopes: int
    hidden: bool
    bias: float
    constant: float
    accumulate: bool


@dataclass(frozen=True)
class _Pass:
    """One sum of products: slopes whose products are multiplied by those of the inputs, a bias, or both."""

    slopes: tuple[str, ...]
    weights: bool
    bias: bool


def _passes(params: Sequence[str], gated: bool) -> list[_Pass]:
    """The slopes in as few passes over the result as there are ways to multiply them; at least one."""
    names = ("in", "gate") if gated else ("in",)
    passes: dict[tuple[bool, bool], tuple[str, ...]] = {}
    for name in names:
        flags = f"w_{name}" in params, f"b_{name}" in params
        if any(flags):
            passes[flags] = (*passes.get(flags, ()), name)
    return [_Pass(slopes, *flags) for flags, slopes in passes.items()] or [_Pass((), False, False)]


def left_and_right(
    operand: Callable[..., Tensor],
    x1: Tensor,
    x2: Tensor | None,
    ffn: FFN,
    params: Sequence[str],
    metric: Tensor | None,
    kernel: str,
    direction: Tensor | None,
    precision: str,
) -> Iterator[tuple[Tensor, Tensor, Products]]:
    """Both operands of each pass, and how they are multiplied.

    Args:
        operand: of rows x, their pre-activations and those of the gate or None, biases included; what to multiply
            these by first, or None; the weights of hidden values, slopes and the gate's slopes; the block's function;
            whether values are replaced by their signs; whether there are inputs, slopes, the gate's slopes and hidden
            values; the precision. It returns (planes, rows, columns).
        others: as in `fusion_kernels.ntk.reference.ntk_gram`.

    Yields:
        The operands, which are one where the kernel is symmetric, and how they are multiplied.
    """
    gated, symmetric = ffn.gated, x2 is None and kernel == "gd"
    left, right, shrink, coefficient = weigh(ffn, metric, kernel, direction)

    def rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x = x.contiguous()
        gate = None if ffn.w_gate is None else F.linear(x, ffn.w_gate, ffn.b_gate)
        return x, F.linear(x, ffn.w_in, ffn.b_in), gate

    def of(values: tuple[Tensor, Tensor, Tensor | None], w: Weights, wanted: tuple[bool | str, ...]) -> Tensor:
        return operand(*values, shrink, w.of_hidden, w.of_in, w.of_gate, *ffn.function, w.signs, *wanted)

    first = rows(x1)
    second = first if x2 is None else rows(x2)
    for number, part in enumerate(_passes(params, gated)):
        with_hidden = number == 0 and "w_out" in params
        wanted = (part.weights, "in" in part.slopes, "gate" in part.slopes, with_hidden, precision)
        one = of(first, left, wanted)
        other = one if symmetric else of(second, right, wanted)
        inputs, bias = x1.shape[1] if part.weights else 0, float(part.bias)
        constant = coefficient if number == 0 and "b_out" in params else 0.0
        yield one, other, Products(inputs, len(ffn.w_in), len(part.slopes), with_hidden, bias, constant, number > 0)
