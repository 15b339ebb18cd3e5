"""One pass over the hidden activations: what is left to do beside products that cuBLAS makes.

All tensors are (T, h) with contiguous rows, of one dtype; results are new and contiguous. Activations are named as in
`fusion_kernels.activations`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusion_kernels.gates import PLAIN, Gate
from fusion_kernels.mlp import _triton_pointwise as kernels
from fusion_kernels.mlp import triton_heuristics
from fusion_kernels.mlp.triton_launch import ceil_div, gate_of, kind, row_stride, start

_SUM_BLOCK = 64


def act_forward(z: Tensor, activation: str) -> Tensor:
    """activation(z)."""
    return _forward(z, None, activation, PLAIN)


def act_backward(da: Tensor, z: Tensor, activation: str, need_a: bool) -> tuple[Tensor, Tensor | None]:
    """da * activation'(z), and activation(z) if `need_a`."""
    dz, _, a = _backward(da, z, None, activation, need_a, PLAIN)
    return dz, a


def glu_act_forward(zg: Tensor, zu: Tensor, activation: str, gating: Gate = PLAIN) -> Tensor:
    """activation(zg) * zu, within the limits of `gating`."""
    return _forward(zg, zu, activation, gating)


def glu_act_backward(
    da: Tensor, zg: Tensor, zu: Tensor, activation: str, need_a: bool, gating: Gate = PLAIN
) -> tuple[Tensor, Tensor, Tensor | None]:
    """da * zu * activation'(zg), da * activation(zg), and activation(zg) * zu if `need_a`, within `gating`'s limits."""
    dzg, dzu, a = _backward(da, zg, zu, activation, need_a, gating)
    assert dzu is not None
    return dzg, dzu, a


def column_sums(x: Tensor, offsets: Tensor | None = None, tile: int = 1, *, rows: Tensor | None = None) -> Tensor:
    """Sums of the rows of x in float32, always in the same order: (n,), or with offsets (E, n) for each expert's rows.

    Args:
        x: (R, n) with contiguous rows.
        offsets: (E + 1,) int32, expert e owns the tokens `offsets[e]` to `offsets[e + 1]`.
        rows: with offsets, (T,) int64: which row of x that of each token is; by default they lie as they are owned.
        tile: x has a row for every `tile` tokens of an expert, the last of them for what is left; experts follow each
            other without gaps. A row for every token if 1.
    """
    R, n = x.shape
    E = 1 if offsets is None else offsets.shape[0] - 1
    out = torch.empty((n,) if offsets is None else (E, n), dtype=torch.float32, device=x.device)
    start(
        kernels._column_sums_kernel,
        E * ceil_div(n, _SUM_BLOCK),
        x,
        x_ptr=x,
        rows_ptr=rows,
        out_ptr=out,
        offsets_ptr=offsets,
        R=R,
        C=n,
        E=E,
        stride=row_stride(x),
        TILE=tile,
        BR=_SUM_BLOCK,
        BC=_SUM_BLOCK,
        BE=1 << (E - 1).bit_length(),
        num_warps=4,
        num_stages=2,
    )
    return out


def _forward(z: Tensor, up: Tensor | None, activation: str, gating: Gate) -> Tensor:
    kind(z.dtype)
    a = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    _start(kernels._act_kernel, {"z": z, "up": up}, activation, gating, a_ptr=a)
    return a


def _backward(
    da: Tensor, z: Tensor, up: Tensor | None, activation: str, need_a: bool, gating: Gate
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    kind(z.dtype)
    dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    dup = None if up is None else torch.empty_like(dz)
    a = torch.empty_like(dz) if need_a else None
    inputs = {"da": da, "z": z, "up": up}
    _start(kernels._act_backward_kernel, inputs, activation, gating, dz_ptr=dz, dup_ptr=dup, a_ptr=a)
    return dz, dup, a


def _start(kernel: Any, inputs: dict[str, Any], activation: str, gating: Gate, **outputs: Any) -> None:
    """Launch a kernel on inputs of one shape, which have strides of their own, and contiguous outputs.

    Contiguous inputs are one long row.
    """
    given = [x for x in inputs.values() if x is not None]
    strides: dict[str, Any] = {f"{name}_stride": 0 if x is None else row_stride(x) for name, x in inputs.items()}
    R, C = given[0].shape
    if all(x.is_contiguous() for x in given):
        R, C, strides = 1, given[0].numel(), dict.fromkeys(strides, 0)
    BR, BC = triton_heuristics.pointwise_block(R, C)
    start(
        kernel,
        ceil_div(R, BR) * ceil_div(C, BC),
        given[0],
        **{f"{name}_ptr": x for name, x in inputs.items()},
        **strides,
        **outputs,
        R=R,
        C=C,
        ACTIVATION=activation,
        GATE=gate_of(gating, given[0].dtype),
        BR=BR,
        BC=BC,
        num_warps=4,
        num_stages=1,
    )
