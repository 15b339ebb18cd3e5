"""The specification as a backend: everything is computed again in the backward, from the formulas as they stand."""

from __future__ import annotations

from torch import Tensor

from fusion_kernels.ffn import FFN
from fusion_kernels.mlp import reference as reference
from fusion_kernels.mlp.folding import fold_scale
from fusion_kernels.mlp.operators import saved
from fusion_kernels.mlp.types import Gradients, Needs, Outputs, Saved


def forward(x: Tensor, ffn: FFN, checkpoint_level: int) -> Outputs:
    """See `fusion_kernels.mlp.operators`."""
    before, behind = reference.factors(ffn.scale)
    z, g, a = reference.hidden(x, ffn, before)
    y = reference.project(a, fold_scale(ffn.w_out, behind, x.dtype).mT, ffn.b_out)
    return saved(y, z, g, a, checkpoint_level)


def backward(dy: Tensor, x: Tensor, ffn: FFN, kept: Saved, checkpoint_level: int, needs: Needs) -> Gradients:
    """See `fusion_kernels.mlp.operators`; the saved tensors are not used."""
    return reference.mlp_backward(dy, x, ffn, needs)
