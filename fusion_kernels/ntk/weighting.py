"""The weights of outputs, neurons and metric, for the factors of a kernel of one number per pair of rows.

Multiplied by them, what is left is a sum of products of matrices of rows, which the compiled tiles compute
(`csrc/cpu/ntk.h`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusion_kernels.ffn import FFN
from fusion_kernels.ntk.reference import contraction


@dataclass(frozen=True)
class Weights:
    """What the factors of one set of rows are multiplied by, neuron by neuron, each (neurons,).

    Attributes:
        of_hidden: for the hidden values.
        of_in: for the slopes of the input weights.
        of_gate: for the slopes of the gate, in a gated block.
        signs: whether the products are then replaced by their signs.
    """

    of_hidden: Tensor
    of_in: Tensor
    of_gate: Tensor | None
    signs: bool


def weigh(
    ffn: FFN, metric: Tensor | None, kernel: str, direction: Tensor | None
) -> tuple[Weights, Weights, Tensor | None, float]:
    """Return the weights of both sets of rows, the factor of pre-activations, and `[o = o']`.

    In `"gd"` the weights are the same, so that the kernel of one set of rows with itself is a Gram matrix. Arguments
    as in `fusion_kernels.ntk.reference.ntk_gram`.
    """
    w_out, scale, a = ffn.w_out, ffn.scale, ffn.scale_exponent
    p = w_out.new_ones(w_out.shape[0]) if scale is None else scale
    m = torch.ones_like(p) if metric is None else metric
    weight1, weight2, coefficient = contraction(w_out, direction, kernel)

    def weights(of_hidden: Tensor, of_slopes: Tensor, signs: bool) -> Weights:
        of_slopes = of_slopes * p ** (1 - 2 * a)
        return Weights(of_hidden * p ** (1 - a), of_slopes, of_slopes if ffn.gated else None, signs)

    if kernel == "gd":
        root = m.sqrt()
        left = right = weights(root * coefficient**0.5, root * weight1, False)
    else:
        left = weights(m * coefficient, m * weight1, False)
        right = weights(torch.ones_like(m), weight2, True)
    return left, right, None if scale is None or a == 0 else p**-a, coefficient
