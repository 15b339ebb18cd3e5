"""The block on the CPU: tokens in chunks whose hidden tile stays in the cache, with compiled activations.

Products go through torch's BLAS. What lies between them is one pass over the tile: the activation, or its derivative
together with the activation once more for W_out's gradient, computed in float32 (float64 for float64) whatever the
dtype. No hidden tensor exists beyond what the level saves, and the gradients of the weights are summed over chunks where
they end up, in float32 for half precision. Results are the same bits run to run; with another number of threads a BLAS
may split a product, and then round, differently.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fusion_kernels import native
from fusion_kernels.mlp.operators import Gradients, Outputs, packed
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
    outputs: Outputs = native.operators().mlp(
        x, w_in.to(x.dtype), _vector(b_in, x), None if w_gate is None else w_gate.to(x.dtype), _vector(b_gate, x),
        fold_scale(w_out, scale, x.dtype), _vector(b_out, x), _ACTIVATIONS[activation], checkpoint_level,
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
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    dx, dw_in, db_in, dw_gate, db_gate, k, db_out = native.operators().mlp_backward(
        dy, x, w_in.to(x.dtype), _vector(b_in, x), None if w_gate is None else w_gate.to(x.dtype), _vector(b_gate, x),
        fold_scale(w_out, scale, x.dtype), z, g, a, _ACTIVATIONS[activation],
        sum(1 << bit for bit, want in enumerate(wanted) if want),
    )  # fmt: skip
    dw_out, dp = output_gradients(k, w_out, scale, needs)
    inputs = (x, w_in, b_in, w_gate, b_gate, w_out, b_out, scale)
    found = (dx, dw_in, db_in, dw_gate, db_gate, dw_out, db_out, dp)
    return packed(
        x,
        [
            gradient.to(t.dtype) if need and t is not None and gradient is not None else None
            for t, gradient, need in zip(inputs, found, needs, strict=True)
        ],
    )


def _vector(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype).contiguous()
