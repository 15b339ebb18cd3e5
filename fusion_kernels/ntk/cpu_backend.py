"""Tangent kernels on the CPU: the compiled tiles of `csrc/cpu/ntk.h`.

Hidden values and slopes are multiplied by the weights of outputs and neurons when those are computed, so that a kernel
is a sum of products of matrices, combined tile by tile. Memory beyond the result: (N, neurons) matrices and, per
thread, three tiles. The bits do not depend on the number of threads. Kernels with an axis of outputs are products by
BLAS (`outputs.py`), whose rounding may.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusion_kernels import native
from fusion_kernels.ffn import FFN
from fusion_kernels.library import check_name
from fusion_kernels.ntk import heuristics
from fusion_kernels.ntk.outputs import outputs_gram
from fusion_kernels.ntk.types import Differentiated, check_names
from fusion_kernels.ntk.weighting import Weights, weigh

# The names that this backend knows: it takes none for another, and refuses a new one until that stands here.
_KERNELS, _REDUCTIONS = ("gd", "sign"), ("trace", "full", "diagonal", "vector")


def why_not(device: torch.device | None = None) -> str | None:
    """In one line why the backend cannot run here, or None."""
    return native.UNAVAILABLE


@dataclass(frozen=True)
class _Sides:
    """What the compiled tiles of one block need: hidden values and slopes of both sides, terms and the constant."""

    hidden1: Tensor | None
    hidden2: Tensor | None
    slopes1: Tensor
    slopes2: Tensor
    terms: list[int]
    constant: float

    def arguments(self) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor, list[int], float]:
        return self.hidden1, self.hidden2, self.slopes1, self.slopes2, self.terms, self.constant


def _terms(params: Sequence[str], neurons: int, gated: bool) -> list[int]:
    """Begin, number of columns, weights and bias of each term of the slopes; equal ones that touch are one."""
    names = ("in", "gate") if gated else ("in",)
    flags = [(int(f"w_{name}" in params), int(f"b_{name}" in params)) for name in names]
    if gated and flags[0] == flags[1]:
        return [0, 2 * neurons, *flags[0]] if any(flags[0]) else []
    return [n for k, flag in enumerate(flags) if any(flag) for n in (k * neurons, neurons, *flag)]


def _sides(
    x1: Tensor,
    x2: Tensor | None,
    ffn: FFN,
    params: Sequence[str],
    metric: Tensor | None,
    kernel: str,
    direction: Tensor | None,
) -> _Sides:
    left, right, shrink, coefficient = weigh(ffn, metric, kernel, direction)
    tensors = [None if t is None else t.contiguous() for t in (ffn.w_in, ffn.w_gate, ffn.b_in, ffn.b_gate)]

    def side(x: Tensor, w: Weights) -> tuple[Tensor, Tensor]:
        weights = (w.of_hidden, w.of_in, w.of_gate)
        return native.operators().ntk_factors(x, *tensors, shrink, *weights, *ffn.function, w.signs)

    first = side(x1, left)
    second = first if x2 is None and kernel == "gd" else side(x1 if x2 is None else x2, right)
    hidden1, hidden2 = (first[0], second[0]) if "w_out" in params else (None, None)
    constant = coefficient if "b_out" in params else 0.0
    terms = _terms(params, len(ffn.w_in), ffn.gated)
    return _Sides(hidden1, hidden2, first[1], second[1], terms, constant)


def _rows(x1: Tensor, x2: Tensor | None, kernel: str) -> tuple[Tensor, Tensor | None, Tensor]:
    """The rows of both sides, contiguous, and those of the second as the product of inputs takes them."""
    x1 = x1.contiguous()
    x2 = None if x2 is None else x2.contiguous()
    right = x1 if x2 is None else x2
    return x1, x2, right.sign() if kernel == "sign" else right


def ntk_gram(
    x1: Tensor,
    x2: Tensor | None,
    ffn: FFN,
    params: Sequence[str],
    kernel: str,
    reduce: str = "trace",
    direction: Tensor | None = None,
    metric: Tensor | None = None,
    precision: str = "highest",
    block_size: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return the kernel; arguments and result as in `fusion_kernels.ntk.reference.ntk_gram`.

    Args:
        block_size: edge of the tiles; rows at a time where there is an axis of outputs.
    """
    check_names(kernel, reduce, direction, _KERNELS, _REDUCTIONS)
    check_name("precision", precision, ("highest",))
    if reduce in ("full", "diagonal"):
        return outputs_gram(x1, x2, ffn, params, kernel, reduce, metric, block_size, out)
    x1, x2, right = _rows(x1, x2, kernel)
    sides = _sides(x1, x2, ffn, params, metric, kernel, direction)
    if out is None:
        out = x1.new_empty(len(x1), len(right))
    edge = heuristics.tile_edge(max(out.shape)) if block_size is None else block_size
    is_symmetric = x2 is None and kernel == "gd"
    native.operators().ntk_gram(x1, right, *sides.arguments(), is_symmetric, edge, out)
    return out


def ntk_sums(
    x1: Tensor,
    x2: Tensor | None,
    a: Differentiated,
    b: Differentiated,
    kernel: str,
    direction: Tensor | None = None,
    block_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums over two kernels; arguments and result as in `fusion_kernels.ntk.reference.ntk_sums`."""
    check_name("kernel", kernel, _KERNELS)
    x1, x2, right = _rows(x1, x2, kernel)
    of_a, of_b = (_sides(x1, x2, *block, kernel, direction).arguments() for block in (a, b))
    edge = heuristics.tile_edge(max(len(x1), len(right))) if block_size is None else block_size
    is_symmetric = x2 is None and kernel == "gd"
    return native.operators().ntk_sums(x1, right, *of_a, *of_b, is_symmetric, edge)
