"""The block on the CPU: tokens in chunks whose hidden tile stays in the cache, with compiled activations.

Products go through torch's BLAS, but for float32 ones. Of these, such of up to 20 tokens with weights whose rows are
contiguous are dot products, because a BLAS takes longer to begin than to multiply; and larger ones, on processors with
AVX2 that are not Intel's, are the library's own (`csrc/cpu/gemm.h`, `FUSION_KERNELS_CPU_PRODUCTS`). What lies between
them is one pass over the tile: the activation, or its derivative together with the activation once more for W_out's
gradient, computed in float32 (float64 for float64) whatever the dtype. The scale is a factor in that pass: weights are
not copied. No hidden tensor exists beyond what the level saves, and the gradients of the weights are summed over chunks
where they end up, in float32 for half precision. Results are the same bits run to run. With another number of threads a
BLAS may split a product, and sums over tokens have other chunks: then they round differently.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusion_kernels import native
from fusion_kernels.ffn import FFN
from fusion_kernels.mlp.types import Gradients, Needs, Outputs, Saved


def forward(x: Tensor, ffn: FFN, checkpoint_level: int) -> Outputs:
    """See `fusion_kernels.mlp.operators`."""
    outputs: Outputs = native.operators().mlp.default(x, *_tensors(ffn, x), *ffn.function, checkpoint_level)
    return outputs


def output(x: Tensor, ffn: FFN) -> Tensor:
    """y of the forward, which keeps nothing."""
    y: Tensor = native.operators().mlp_output.default(x, *_tensors(ffn, x), *ffn.function)
    return y


def backward(dy: Tensor, x: Tensor, ffn: FFN, kept: Saved, checkpoint_level: int, needs: Needs) -> Gradients:
    """See `fusion_kernels.mlp.operators`."""
    found = native.operators().mlp_backward.default(
        dy if dy.stride(1) == 1 else dy.contiguous(), x, *_tensors(ffn, x), *kept, *ffn.function,
        needs.bits,
    )  # fmt: skip
    return Gradients(*found).asked(x, ffn, needs)


def _tensors(ffn: FFN, x: Tensor) -> list[Tensor | None]:
    """The block's tensors as the compiled operators take them.

    Those are in the dtype of x, vectors contiguous, and the scale contiguous in the dtype of their sums.
    """
    dtype, (*tensors, scale) = x.dtype, ffn.tensors
    # Most often all are so already, and then looking is all that there is time for.
    found = [
        t if t is None or (t.dtype is dtype and (t.ndim == 2 or t.is_contiguous())) else _cast(t, dtype)
        for t in tensors
    ]
    sums = torch.float64 if dtype is torch.float64 else torch.float32
    return [*found, None if scale is None else scale.to(sums).contiguous()]


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype) if t.ndim == 2 else t.to(dtype).contiguous()
