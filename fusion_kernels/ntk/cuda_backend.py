"""Tangent kernels on NVIDIA GPUs: the compiled tiles of `csrc/cuda/ntk.h`.

Each set of rows becomes one operand, its inputs, slopes and hidden values side by side, rounded or split as the
precision says and multiplied by the weights of outputs and neurons. A tile of the kernel is then computed by one block
of threads, all products together: memory beyond the result is that of the operands, of the size of the inputs and the
hidden values. No sum depends on the launch: the same call has the same bits. Pre-activations are products by cuBLAS in
the dtype; kernels with an axis of outputs are products by cuBLAS altogether (`outputs.py`).

Precisions are those of `fusion_kernels.ntk.types`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusion_kernels import gpu, native
from fusion_kernels.ffn import FFN
from fusion_kernels.library import check_name
from fusion_kernels.ntk.outputs import outputs_gram
from fusion_kernels.ntk.passes import left_and_right
from fusion_kernels.ntk.strips import sums_by_strips
from fusion_kernels.ntk.types import Differentiated, check_names

# The names that this backend knows: it takes none for another, and refuses a new one until that stands here.
_KERNELS, _REDUCTIONS = ("gd", "sign"), ("trace", "full", "diagonal", "vector")


def why_not(device: torch.device | None = None) -> str | None:
    """In one line why the backend cannot run on the device, or on any if None; None if it can."""
    return gpu.no_gpu(device) or native.cuda_unavailable()


def _operand(*given: Any) -> Tensor:
    """The compiled one, which the library registers when it is loaded."""
    operand: Tensor = native.cuda_operators().ntk_operand(*given)
    return operand


def ntk_gram(
    x1: Tensor,
    x2: Tensor | None,
    ffn: FFN,
    params: Sequence[str],
    kernel: str,
    reduce: str = "trace",
    direction: Tensor | None = None,
    metric: Tensor | None = None,
    precision: str = "highest",
    block_size: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return the kernel; arguments and result as in `fusion_kernels.ntk.reference.ntk_gram`.

    Args:
        precision: `"highest"`; for the trace or a vector in float32 also `"tf32x3"`, `"bf16x3"` or `"bf16"`.
        block_size: rows at a time where there is an axis of outputs; of no meaning otherwise.
    """
    check_names(kernel, reduce, direction, _KERNELS, _REDUCTIONS)
    if reduce in ("full", "diagonal"):
        return outputs_gram(x1, x2, ffn, params, kernel, reduce, metric, block_size, out)
    if out is None:
        out = x1.new_empty(len(x1), len(x1 if x2 is None else x2))
    symmetric = x2 is None and kernel == "gd"
    for one, other, how in left_and_right(_operand, x1, x2, ffn, params, metric, kernel, direction, precision):
        native.cuda_operators().ntk_tiles(one, other, *how, symmetric, out)
    return out


def ntk_sums(
    x1: Tensor,
    x2: Tensor | None,
    a: Differentiated,
    b: Differentiated,
    kernel: str,
    direction: Tensor | None = None,
    block_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums over two kernels; arguments and result as in `fusion_kernels.ntk.reference.ntk_sums`.

    By strips: see `strips.py`.
    """
    check_name("kernel", kernel, _KERNELS)
    compiled = native.cuda_operators()
    return sums_by_strips(
        x1, x2, a, b, kernel, direction, block_size, operand=_operand,
        tiles=lambda one, other, how, out: compiled.ntk_tiles(one, other, *how, False, out), add=compiled.ntk_strip,
    )  # fmt: skip
