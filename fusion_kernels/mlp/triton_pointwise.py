"""One pass over the hidden activations: what is left to do beside products that cuBLAS makes.

All tensors are (T, h) with contiguous rows, of one dtype; results are new and contiguous. Activations are named as in
`fusion_kernels.activations`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusion_kernels.mlp import _triton_pointwise as kernels
from fusion_kernels.mlp import triton_heuristics
from fusion_kernels.mlp.triton_launch import ceil_div, kind, row_stride, start

_SUM_BLOCK = 64


def act_forward(z: Tensor, activation: str) -> Tensor:
    """activation(z)."""
    return _forward(z, None, activation)


def act_backward(da: Tensor, z: Tensor, activation: str, need_a: bool) -> tuple[Tensor, Tensor | None]:
    """da * activation'(z), and activation(z) if `need_a`."""
    dz, _, a = _backward(da, z, None, activation, need_a)
    return dz, a


def glu_act_forward(zg: Tensor, zu: Tensor, activation: str) -> Tensor:
    """activation(zg) * zu."""
    return _forward(zg, zu, activation)


def glu_act_backward(
    da: Tensor, zg: Tensor, zu: Tensor, activation: str, need_a: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """da * zu * activation'(zg), da * activation(zg), and activation(zg) * zu if `need_a`."""
    dzg, dzu, a = _backward(da, zg, zu, activation, need_a)
    assert dzu is not None
    return dzg, dzu, a


def column_sums(x: Tensor, offsets: Tensor | None = None, tile: int = 1) -> Tensor:
    """Sums of the rows of x in float32, always in the same order: (n,), or with offsets (E, n) for each expert's rows.

    Args:
        x: (R, n) with contiguous rows.
        offsets: (E + 1,) int32, expert e owns the tokens `offsets[e]` to `offsets[e + 1]`.
        tile: x has a row for every `tile` tokens of an expert, the last of them for what is left; experts follow each
            other without gaps. A row for every token if 1.
    """
    R, n = x.shape
    E = 1 if offsets is None else offsets.shape[0] - 1
    out = torch.empty((n,) if offsets is None else (E, n), dtype=torch.float32, device=x.device)
    start(
        kernels._column_sums_kernel, E * ceil_div(n, _SUM_BLOCK), x, out, offsets, R, n, E, row_stride(x),
        TILE=tile, BR=_SUM_BLOCK, BC=_SUM_BLOCK, BE=1 << (E - 1).bit_length(), num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


def _forward(z: Tensor, up: Tensor | None, activation: str) -> Tensor:
    kind(z.dtype)
    a = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    R, C, strides = _extent(z, up)
    BR, BC = triton_heuristics.pointwise_block(R, C)
    start(
        kernels._act_kernel, ceil_div(R, BR) * ceil_div(C, BC), z, up, a, R, C, *strides,
        ACTIVATION=activation, BR=BR, BC=BC, num_warps=4, num_stages=1,
    )  # fmt: skip
    return a


def _backward(
    da: Tensor, z: Tensor, up: Tensor | None, activation: str, need_a: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    kind(z.dtype)
    dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    dup = None if up is None else torch.empty_like(dz)
    a = torch.empty_like(dz) if need_a else None
    R, C, strides = _extent(da, z, up)
    BR, BC = triton_heuristics.pointwise_block(R, C)
    start(
        kernels._act_backward_kernel, ceil_div(R, BR) * ceil_div(C, BC), da, z, up, dz, dup, a, R, C, *strides,
        ACTIVATION=activation, BR=BR, BC=BC, num_warps=4, num_stages=1,
    )  # fmt: skip
    return dz, dup, a


def _extent(*tensors: Tensor | None) -> tuple[int, int, list[int]]:
    """Rows, columns and the strides of the rows (0 for None); contiguous tensors are one long row."""
    given = [x for x in tensors if x is not None]
    strides = [0 if x is None else row_stride(x) for x in tensors]
    if all(x.is_contiguous() for x in given):
        return 1, given[0].numel(), [0] * len(tensors)
    return given[0].shape[0], given[0].shape[1], strides
