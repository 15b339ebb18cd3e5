"""The specification as a backend: everything is computed again in the backward, from the formulas as they stand."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from fusion_kernels.mlp.operators import Gradients, Outputs, saved
from fusion_kernels.reference import mlp as reference


def forward(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    scale: Tensor | None,
    activation: str,
    checkpoint_level: int,
    backend: str,
) -> Outputs:
    """See `fusion_kernels.mlp.operators`."""
    before, behind = reference.factors(scale)
    z, g, a = reference.hidden(x, w_in, b_in, w_gate, b_gate, activation, before)
    y = F.linear(a, reference.fold_scale(w_out, behind, x.dtype), None if b_out is None else b_out.to(x.dtype))
    return saved(y, z, g, a, checkpoint_level)


def backward(
    dy: Tensor,
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    scale: Tensor | None,
    z: Tensor,
    g: Tensor,
    a: Tensor,
    activation: str,
    checkpoint_level: int,
    backend: str,
    needs: Sequence[bool],
) -> Gradients:
    """See `fusion_kernels.mlp.operators`; the saved tensors are not used."""
    block = (w_in, b_in, w_gate, b_gate, w_out, b_out, scale)
    return reference.mlp_backward(dy, x, *block, activation, needs)
