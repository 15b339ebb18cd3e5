"""Inner products of per-sample gradients of a feed-forward block over sequences of tokens.

The gradient of sample n is `g_n = sum_t J(x_nt)' c_nt`, a sum over S tokens of outer products a_t b_t of each linear
layer: (x, S o c v') for the input weights and (A, c) for the output weights. Its inner products are

    <g_n, g_m> = sum_{t, s} (a_nt . a_ms) (b_nt . b_ms)          ghost: from (S, S) products, no gradient
               = <A_n' B_n, A_m' B_m>                            direct: from gradients, a few columns at a time

and which of them costs less depends on S: see `tuning.py`. A bias is a layer with a = 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from fusion_kernels.ntk import tuning
from fusion_kernels.ntk.block import Block, Prepared, prepare
from fusion_kernels.ntk.jacobian import (
    block_factors,
    check_columns,
    check_tangents,
    exactly,
    moved_parts,
    pushed_forward,
)

Form = Literal["auto", "ghost", "direct"]

# A layer of the gradient: activations (N, S, di), backpropagated (N, S, do), and whether weight and bias count.
_Layer = tuple[Tensor, Tensor, bool, bool]


def _prepare(
    block: Block, x: Tensor, cotangents: Tensor, params: str | Sequence[str] | None, metric: Tensor | None, form: Form
) -> Prepared:
    if x.ndim != 3:
        raise ValueError(f"x must be (N, S, d), sequences of tokens, got {tuple(x.shape)}")
    if form not in get_args(Form):
        raise ValueError(f"unknown form {form!r}: use one of {', '.join(get_args(Form))}")
    prepared = prepare(block, {"x": x.flatten(0, 1)}, params, metric, {"cotangents": cotangents})
    check_columns("cotangents", cotangents, (*x.shape[:2], prepared.outputs))
    return prepared


def _layers(prepared: Prepared) -> Iterator[_Layer]:
    c = prepared.rows["cotangents"]
    n, s = c.shape[:2]
    x = prepared.rows["x"]
    hidden, slopes = block_factors(prepared, x)
    root = hidden.new_ones(hidden.shape[1]) if prepared.metric is None else prepared.metric.sqrt()
    back = c.flatten(0, 1) @ prepared.tensors["w_out"].T * root
    for name, slope in slopes.items():
        weight, bias = f"w_{name}" in prepared.parts, f"b_{name}" in prepared.parts
        if weight or bias:
            yield x.view(n, s, x.shape[1]), (slope * back).view(n, s, slope.shape[1]), weight, bias
    weight, bias = "w_out" in prepared.parts, "b_out" in prepared.parts
    if weight:
        yield (hidden * root).view(n, s, hidden.shape[1]), c, True, False
    if bias:
        yield c.new_zeros(n, s, 0), c, False, True


def gradient_gram(
    block: Block,
    x: Tensor,
    cotangents: Tensor,
    *,
    params: str | Sequence[str] | None = None,
    metric: Tensor | None = None,
    form: Form = "auto",
) -> Tensor:
    """Return all inner products of per-sample gradients: a tangent kernel of sequences, contracted by `cotangents`.

    Args:
        block, params, metric: as in `ntk_gram`.
        x: (N, S, d), the block's inputs at every token.
        cotangents: (N, S, outputs), the derivative of each sample's loss by the block's outputs.
        form: `"ghost"` or `"direct"` to insist on one; they differ by rounding and cost.

    Returns:
        (N, N), exactly symmetric, in the dtype of the computation. Memory beyond it: a few (N S, neurons) matrices and
        blocks of 64 MiB, or a token's products with all others where those are larger.

    Raises:
        ValueError: as in `ntk_gram`, cotangents that do not fit, or an unknown form.

    Sources: Goodfellow, "Efficient Per-Example Gradient Computations", 2015, arXiv 1510.01799; Li et al., "Large
    Language Models Can Be Strong Differentially Private Learners", 2022, arXiv 2110.05679 (the ghost form).
    """
    prepared = _prepare(block, x, cotangents, params, metric, form)

    def run(_: Tensor) -> Tensor:
        n, s = cotangents.shape[:2]
        gram = prepared.rows["x"].new_zeros(n, n)
        for a, b, weight, bias in _layers(prepared):
            if form == "ghost" or (
                form == "auto" and tuning.ghost_gram_is_cheaper(n, s, a.shape[2] + bias, b.shape[2])
            ):
                _add_ghost_gram(gram, a, b, weight, bias)
            else:
                _add_direct_gram(gram, a, b, weight, bias)
        return gram.tril() + gram.tril(-1).T

    return exactly(run)(prepared.rows["x"])


def _add_ghost_gram(gram: Tensor, a: Tensor, b: Tensor, weight: bool, bias: bool) -> None:
    """Add the lower triangle of a layer's Gram, in blocks of samples, or of a sample's tokens where one is too many."""
    n, s = a.shape[:2]
    step = tuning.row_block(2 * n * s * s * a.element_size())
    tokens = tuning.row_block(2 * n * s * a.element_size())
    for begin in range(0, n, step):
        here, there = slice(begin, min(begin + step, n)), slice(0, min(begin + step, n))
        for first in range(0, s, tokens):
            some = slice(first, first + tokens)
            products = b[here, some].flatten(0, 1) @ b[there].flatten(0, 1).T
            if weight:
                products *= (a[here, some].flatten(0, 1) @ a[there].flatten(0, 1).T).add_(float(bias))
            gram[here, there] += products.view(here.stop - begin, -1, there.stop, s).sum((1, 3))


def _add_direct_gram(gram: Tensor, a: Tensor, b: Tensor, weight: bool, bias: bool) -> None:
    """Add a layer's Gram from its gradients, a few columns of them at a time."""
    step = tuning.row_block(len(a) * max(1, a.shape[2]) * a.element_size())
    for columns in b.split(step, dim=2) if weight else ():
        gradients = torch.bmm(a.mT, columns).flatten(1)
        gram += gradients @ gradients.T
    if bias:
        sums = b.sum(1)
        gram += sums @ sums.T


def gradient_norms(
    block: Block,
    x: Tensor,
    cotangents: Tensor,
    *,
    params: str | Sequence[str] | None = None,
    metric: Tensor | None = None,
    form: Form = "auto",
) -> Tensor:
    """Return the Euclidean norm of each sample's gradient: (N,); arguments as in `gradient_gram`."""
    prepared = _prepare(block, x, cotangents, params, metric, form)

    def run(_: Tensor) -> Tensor:
        n, s = cotangents.shape[:2]
        squares = prepared.rows["x"].new_zeros(n)
        for a, b, weight, bias in _layers(prepared):
            inputs, outputs = a.shape[2], b.shape[2]
            ghost = form == "ghost" or (form == "auto" and tuning.ghost_norm_is_cheaper(s, inputs, outputs))
            step = tuning.row_block(2 * (s * s if ghost else inputs * outputs) * a.element_size())
            tokens = tuning.row_block(2 * s * a.element_size())
            for begin in range(0, n, step):
                here = slice(begin, begin + step)
                if weight and ghost:
                    for first in range(0, s, tokens):
                        some = slice(first, first + tokens)
                        products = torch.bmm(a[here, some], a[here].mT)
                        squares[here] += products.mul_(torch.bmm(b[here, some], b[here].mT)).sum((1, 2))
                elif weight:
                    squares[here] += torch.bmm(a[here].mT, b[here]).square().sum((1, 2))
            if bias:
                squares += b.sum(1).square().sum(1)
        return squares.clamp_(min=0).sqrt_()

    return exactly(run)(prepared.rows["x"])


def gradient_dots(block: Block, x: Tensor, cotangents: Tensor, direction: Mapping[str, Tensor]) -> Tensor:
    """Return the inner product of each sample's gradient with one direction, without forming a gradient.

    Args:
        block, x, cotangents: as in `gradient_gram`.
        direction: part -> tensor of the part's shape, with its batch dimension of 1: a gradient of other data, say.

    Returns:
        (N,), in the dtype of the computation.

    Raises:
        ValueError: as in `gradient_gram`, or a direction that does not fit the block.

    Source: Wang et al., "Data Shapley in One Training Run", 2024, arXiv 2406.11011 (the ghost dot product).
    """
    if x.ndim != 3:
        raise ValueError(f"x must be (N, S, d), sequences of tokens, got {tuple(x.shape)}")
    others = {"cotangents": cotangents, **check_tangents(block, direction, "direction")}
    prepared = prepare(block, {"x": x.flatten(0, 1)}, moved_parts(direction), None, others)
    check_columns("cotangents", cotangents, (*x.shape[:2], prepared.outputs))
    c = prepared.rows["cotangents"]
    moved = exactly(pushed_forward)(prepared.rows["x"], prepared, "direction")
    return (moved.view_as(c) * c).sum((1, 2))
