"""The specification as a backend: everything is computed again in the backward, from the formulas as they stand."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fusion_kernels.mlp import reference as reference
from fusion_kernels.mlp.operators import Gradients, Outputs, Saved, saved
from fusion_kernels.mlp.reference import Block


def forward(x: Tensor, block: Block, checkpoint_level: int) -> Outputs:
    """See `fusion_kernels.mlp.operators`."""
    before, behind = reference.factors(block.scale)
    z, g, a = reference.hidden(x, block, before)
    y = reference.project(a, reference.fold_scale(block.w_out, behind, x.dtype), block.b_out)
    return saved(y, z, g, a, checkpoint_level)


def backward(
    dy: Tensor, x: Tensor, block: Block, kept: Saved, checkpoint_level: int, needs: Sequence[bool]
) -> Gradients:
    """See `fusion_kernels.mlp.operators`; the saved tensors are not used."""
    return reference.mlp_backward(dy, x, block, needs)
