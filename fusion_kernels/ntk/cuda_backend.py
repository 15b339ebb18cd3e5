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
from fusion_kernels.ntk import heuristics
from fusion_kernels.ntk.outputs import outputs_gram
from fusion_kernels.ntk.passes import left_and_right
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

    Strips of both kernels, of `ROW_BLOCK_BYTES` unless `block_size` says how many rows, are computed by the tiles, side
    by side in memory that the next strips use again, and added up in one order: one block of threads with the
    accumulators of two kernels would need more registers than there are. float32 goes by `"tf32x3"`, whose errors are
    float32's.
    """
    check_name("kernel", kernel, _KERNELS)
    precision = "tf32x3" if x1.dtype == torch.float32 else "highest"
    passes = [list(left_and_right(_operand, x1, x2, *block, kernel, direction, precision)) for block in (a, b)]
    n1, n2 = len(x1), len(x1 if x2 is None else x2)
    symmetric = x2 is None and kernel == "gd"
    step = heuristics.row_block(2 * n2 * x1.element_size()) if block_size is None else block_size
    strips = x1.new_empty(2, min(step, n1) * n2)
    sums = x1.new_zeros((n2 + 127) // 128, 4, dtype=torch.float64)
    rows, columns = (x1.new_zeros(2, n, dtype=torch.float64) for n in (n1, n2))
    for begin in range(0, n1, step):
        end = min(begin + step, n1)
        width = end if symmetric else n2
        pair = [strip[: (end - begin) * width].view(end - begin, width) for strip in strips]
        for strip, of_one in zip(pair, passes, strict=True):
            for one, other, how in of_one:
                native.cuda_operators().ntk_tiles(one[:, begin:end], other[:, :width], *how, False, strip)
        native.cuda_operators().ntk_strip(*pair, begin, symmetric, sums, rows[:, begin:end], columns)
    if symmetric:
        rows += columns
        columns = rows.clone()
    return sums.sum(0), rows, columns
