"""The block on the CPU: tokens in chunks whose hidden tile stays in the cache, with compiled activations.

Products go through torch's BLAS. What lies between them is one pass over the tile: the activation, or its derivative
together with the activation once more for W_out's gradient, computed in float32 (float64 for float64) whatever the
dtype. No hidden tensor exists beyond what the level saves, and the gradients of the weights are summed over chunks
where they end up, in float32 for half precision. Results are the same bits run to run; with another number of threads a
BLAS may split a product, and then round, differently.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fusion_kernels import native
from fusion_kernels.mlp.operators import Gradients, Outputs
from fusion_kernels.mlp.torch_backend import output_gradients
from fusion_kernels.reference.mlp import fold_scale

#: As in `csrc/cpu/mlp_pointwise.h`.
_ACTIVATIONS = {"gelu": 0, "gelu_tanh": 1, "relu": 2, "relu2": 3, "silu": 4}


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
    outputs: Outputs = native.operators().mlp.default(
        x, _cast(w_in, x), _cast(b_in, x), _cast(w_gate, x), _cast(b_gate, x),
        w_out if scale is None and w_out.dtype == x.dtype else fold_scale(w_out, scale, x.dtype), _cast(b_out, x),
        _ACTIVATIONS[activation], checkpoint_level,
    )  # fmt: skip
    return outputs


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
    """See `fusion_kernels.mlp.operators`."""
    wanted = (*needs[:5], needs[5] or needs[7], needs[6])
    dx, *sums = native.operators().mlp_backward.default(
        dy if dy.stride(1) == 1 else dy.contiguous(), x,
        _cast(w_in, x), _cast(b_in, x), _cast(w_gate, x), _cast(b_gate, x),
        w_out if scale is None and w_out.dtype == x.dtype else fold_scale(w_out, scale, x.dtype),
        z, g, a, _ACTIVATIONS[activation],
        sum(1 << bit for bit, want in enumerate(wanted) if want),
    )  # fmt: skip
    inputs = (w_in, b_in, w_gate, b_gate, w_out, b_out)
    # K stays as wide as it is for the products with the scale and with W_out.
    dw_in, db_in, dw_gate, db_gate, k, db_out = (
        (t if like is w_out else t.to(like.dtype)) if want and like is not None else None
        for t, like, want in zip(sums, inputs, wanted[1:], strict=True)
    )
    dw_out, dp = (None, None) if k is None else output_gradients(k, w_out, scale, needs)
    return dx if needs[0] else None, dw_in, db_in, dw_gate, db_gate, dw_out, db_out, dp


def _cast(t: Tensor | None, x: Tensor) -> Tensor | None:
    """`t` as the compiled operators take it: in the dtype of x, and contiguous if it is a vector."""
    if t is None or (t.dtype == x.dtype and (t.ndim == 2 or t.is_contiguous())):
        return t
    return t.to(x.dtype) if t.ndim == 2 else t.to(x.dtype).contiguous()
