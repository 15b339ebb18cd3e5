"""Expert by expert, each by the backend that answers (or is pinned) for a single block.

On a GPU this waits for the ends of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fusion_kernels.mlp import mlp_backend
from fusion_kernels.mlp.operators import MLP, MLP_BACKWARD, Gradients, Outputs, packed
from fusion_kernels.reference.experts import spans


def forward(
    x: Tensor,
    ends: Tensor,
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
    """See `fusion_kernels.experts.operators`."""
    weights = (w_in, b_in, w_gate, b_gate, w_out, b_out, scale)
    S, h = len(x), w_in.shape[1]
    kept = checkpoint_level < 2
    y = x.new_zeros(S, w_out.shape[1])
    z = x.new_zeros((S, h) if kept else (0,))
    g = x.new_zeros((S, h) if kept and w_gate is not None else (0,))
    a = x.new_zeros((S, h) if checkpoint_level == 0 else (0,))
    for expert, rows in spans(ends):
        of_expert = (None if w is None else w[expert] for w in weights)
        found = MLP.direct(x[rows], *of_expert, activation, checkpoint_level, mlp_backend.name)
        for whole, part in zip((y, z, g, a), found, strict=True):
            if len(whole):
                whole[rows] = part
    return y, z, g, a


def backward(
    dy: Tensor,
    x: Tensor,
    ends: Tensor,
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
    """See `fusion_kernels.experts.operators`."""
    weights = (w_in, b_in, w_gate, b_gate, w_out, b_out, scale)
    # An expert without rows has gradients of zero.
    totals = [
        t.new_zeros(t.shape) if need and t is not None else None
        for t, need in zip((x, *weights), needs, strict=True)
    ]  # fmt: skip
    for expert, rows in spans(ends):
        of_expert = (None if w is None else w[expert] for w in weights)
        saved = (t[rows] if len(t) else t for t in (z, g, a))
        found = MLP_BACKWARD.direct(
            dy[rows], x[rows], *of_expert, *saved, activation, checkpoint_level, mlp_backend.name, list(needs)
        )
        if totals[0] is not None:
            totals[0][rows] = found[0]
        for total, part in zip(totals[1:], found[1:], strict=True):
            if total is not None:
                total[expert] = part
    return packed(x, totals)
