"""Kernels with an axis of outputs, in row blocks: products of (rows x outputs, neurons) matrices, no Jacobian.

    full      K[n, m, o, p] = [o = p] D[n, m] + sum_t E_t[n, m] sum_j (S_nj v_jo) (S'_mj v'_jp)
    diagonal  K[n, m, o]    =         D[n, m] + sum_j (sum_t E_t[n, m] S_nj S'_mj) v_jo v'_jo

D are the hidden values and the output bias, E_t the inputs and bias of term t (`in` or `gate`), S its slopes. `full` is
one product whose floor is writing the result; only its part on and below the diagonal is computed for one set of rows.
Beside the result it needs a (N2 outputs, neurons) matrix, `diagonal` blocks of 64 MiB.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusion_kernels.ffn import FFN
from fusion_kernels.ntk import heuristics
from fusion_kernels.ntk.reference import Side, sides, symmetric, transposed


def outputs_gram(
    x1: Tensor,
    x2: Tensor | None,
    ffn: FFN,
    params: Sequence[str],
    kernel: str,
    reduce: str,
    metric: Tensor | None,
    block_size: int | None,
    out: Tensor | None,
) -> Tensor:
    """Return `"full"` or `"diagonal"`; arguments and result as in `fusion_kernels.ntk.reference.ntk_gram`."""
    left, right = sides(x1, x2, ffn, metric, kernel)
    is_symmetric = x2 is None and kernel == "gd"
    rows, columns, (neurons, outputs) = len(x1), len(right.x), ffn.w_out.shape
    write, axes, widest = _write_diagonal, [outputs], columns * neurons
    if reduce == "full":
        write, axes, widest = _write_full, [outputs, outputs], columns * outputs**2
    if out is None:
        out = x1.new_empty(rows, columns, *axes)
    step = heuristics.row_block(2 * widest * x1.element_size()) if block_size is None else block_size
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        here, there = slice(begin, end), slice(0, end if is_symmetric else columns)
        tile = out[here, there]
        write(tile, left[here], right[there], params)
        if is_symmetric:
            tile[:, begin:] = symmetric(tile[:, begin:])
            out[:begin, here] = transposed(tile[:, :begin])
    return out


def _terms(one: Side, other: Side, params: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """D and the E_t of the rows on the left with those on the right, each (rows, columns)."""
    same = one.x.new_zeros(len(one.x), len(other.x))
    if "w_out" in params:
        same += one.hidden @ other.hidden.T
    if "b_out" in params:
        same += 1.0
    inputs = one.x @ other.x.T
    names = [name for name in one.slopes if f"w_{name}" in params or f"b_{name}" in params]
    return same, {name: inputs * (f"w_{name}" in params) + float(f"b_{name}" in params) for name in names}


def _write_full(tile: Tensor, one: Side, other: Side, params: Sequence[str]) -> None:
    """tile (rows, columns, outputs, outputs) = the kernel of the rows on the left with those on the right."""
    same, over = _terms(one, other, params)
    outputs = one.w_out.shape[1]
    for number, (name, inputs) in enumerate(over.items()):
        first = (one.slopes[name][:, None] * one.w_out.T).flatten(0, 1)
        second = (other.slopes[name][:, None] * other.w_out.T).flatten(0, 1)
        product = (first @ second.T).view(len(same), outputs, same.shape[1], outputs).transpose(1, 2)
        if number:
            tile.addcmul_(inputs[..., None, None], product)
        else:
            torch.mul(inputs[..., None, None], product, out=tile)
    if not over:
        tile.zero_()
    tile.diagonal(dim1=2, dim2=3).add_(same[..., None])


def _write_diagonal(tile: Tensor, one: Side, other: Side, params: Sequence[str]) -> None:
    """tile (rows, columns, outputs) = the same for equal outputs on both sides."""
    same, over = _terms(one, other, params)
    pairs = one.x.new_zeros(*same.shape, one.w_out.shape[0])
    for name, inputs in over.items():
        pairs += inputs[..., None] * one.slopes[name][:, None] * other.slopes[name][None]
    torch.add(pairs @ (one.w_out * other.w_out), same[..., None], out=tile)
