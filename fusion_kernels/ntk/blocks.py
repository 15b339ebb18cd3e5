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

from fusion_kernels.ntk import heuristics
from fusion_kernels.ntk.reference import FFN, symmetric, transposed


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
    a1, slopes1 = ffn.factors(x1)
    is_symmetric = x2 is None and kernel == "gd"
    w_out = v2 = ffn.w_out
    a2, slopes2, right = a1, slopes1, x1
    if x2 is not None:
        a2, slopes2 = ffn.factors(x2)
        right = x2
    if kernel == "sign":
        a2, slopes2, right, v2 = a2.sign(), {name: s.sign() for name, s in slopes2.items()}, right.sign(), v2.sign()
    if metric is not None:
        left, other = (metric.sqrt(), metric.sqrt()) if kernel == "gd" else (metric, torch.ones_like(metric))
        a1, slopes1 = a1 * left, {name: s * left for name, s in slopes1.items()}
        a2, slopes2 = a2 * other, {name: s * other for name, s in slopes2.items()}

    rows, columns, neurons, outputs = len(x1), len(right), *w_out.shape
    axes = (outputs, outputs) if reduce == "full" else (outputs,)
    if out is None:
        out = x1.new_empty(rows, columns, *axes)
    widest = columns * (outputs**2 if reduce == "full" else neurons)
    step = heuristics.row_block(2 * widest * x1.element_size()) if block_size is None else block_size
    terms = [name for name in slopes1 if f"w_{name}" in params or f"b_{name}" in params]
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        here, there = slice(begin, end), slice(0, end if is_symmetric else columns)
        same = x1.new_zeros(end - begin, len(right[there]))
        if "w_out" in params:
            same += a1[here] @ a2[there].T
        if "b_out" in params:
            same += 1.0
        inputs = x1[here] @ right[there].T
        over = {name: inputs * (f"w_{name}" in params) + float(f"b_{name}" in params) for name in terms}
        tile = out[here, there]
        if reduce == "full":
            for number, name in enumerate(terms):
                first = (slopes1[name][here, None] * w_out.T).flatten(0, 1)
                second = (slopes2[name][there, None] * v2.T).flatten(0, 1)
                product = (first @ second.T).view(len(same), outputs, same.shape[1], outputs).transpose(1, 2)
                if number:
                    tile.addcmul_(over[name][..., None, None], product)
                else:
                    torch.mul(over[name][..., None, None], product, out=tile)
            if not terms:
                tile.zero_()
            tile.diagonal(dim1=2, dim2=3).add_(same[..., None])
        else:
            pairs = x1.new_zeros(*same.shape, neurons)
            for name in terms:
                pairs += over[name][..., None] * slopes1[name][here, None] * slopes2[name][None, there]
            torch.add(pairs @ (w_out * v2), same[..., None], out=tile)
        if is_symmetric:
            tile[:, begin:] = symmetric(tile[:, begin:])
            out[:begin, here] = transposed(tile[:, :begin])
    return out
