"""The whole forward pass of an MLP with few neurons in one kernel: hidden activations are never written to memory."""

from __future__ import annotations

import torch
from torch import Tensor

from fusion_kernels.gates import PLAIN, Gate
from fusion_kernels.gpu import on_boundary
from fusion_kernels.mlp import _triton_resident as kernels
from fusion_kernels.mlp import triton_heuristics
from fusion_kernels.mlp.triton_heuristics import ResidentConfig
from fusion_kernels.mlp.triton_launch import (
    ceil_div,
    contiguous,
    gate_of,
    gpu,
    input_precision,
    kind,
    row_stride,
    start,
)


def resident_fits(h: int, d: int, dtype: torch.dtype, sm: int, *, gated: bool = False) -> bool:
    """Whether h neurons fit on a GPU of compute capability `sm` (80, 90, ...), by shared memory and registers.

    It does not say that the kernel is faster there. Inputs are streamed, so that d matters only by d % 16: rows that
    begin anywhere take registers for addresses. float32 never fits.
    """
    return bool(triton_heuristics.resident_candidates(h, kind(dtype), triton_heuristics.gpu_of(sm), gated, d % 16 == 0))


def mlp_resident(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2s: Tensor,
    b2: Tensor | None,
    activation: str,
    *,
    config: ResidentConfig | None = None,
) -> Tensor:
    """activation(x w1ᵀ + b1) w2sᵀ + b2 (T, d_out), of x (T, d), w1 (h, d), w2s (d_out, h), all with contiguous rows.

    Raises:
        ValueError: h neurons do not fit on the GPU (see `resident_fits`).
    """
    return _resident(x, w1, None, b1, None, w2s, b2, activation, PLAIN, config)


def glu_resident(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    wd_s: Tensor,
    bd: Tensor | None,
    activation: str,
    *,
    gating: Gate = PLAIN,
    config: ResidentConfig | None = None,
) -> Tensor:
    """(activation(x w_gateᵀ + b_gate) * (x w_upᵀ + b_up)) wd_sᵀ + bd (T, d_out); else as `mlp_resident`.

    `gating` says within which limits.
    """
    return _resident(x, w_gate, w_up, b_gate, b_up, wd_s, bd, activation, gating, config)


def _resident(
    x: Tensor,
    w: Tensor,
    up: Tensor | None,
    bias: Tensor | None,
    up_bias: Tensor | None,
    out_w: Tensor,
    out_bias: Tensor | None,
    activation: str,
    gating: Gate,
    config: ResidentConfig | None,
) -> Tensor:
    (T, d), (O, h) = x.shape, out_w.shape  # noqa: E741
    precision = kind(x.dtype)
    if config is None:
        aligned = all(row_stride(rows) % 16 == 0 and on_boundary(rows) for rows in (x, w, up) if rows is not None)
        config = triton_heuristics.resident_config(T, h, precision, gpu(x.device), up is not None, aligned)
    if config is None:
        raise ValueError(f"{h} neurons of {x.dtype} do not fit on the GPU at once: use the epilogue kernels")
    y = torch.empty(T, O, dtype=x.dtype, device=x.device)
    start(
        kernels._resident_kernel,
        ceil_div(T, config.BM),
        x,
        x_ptr=x,
        w_ptr=w,
        up_ptr=up,
        bias_ptr=contiguous(bias),
        up_bias_ptr=contiguous(up_bias),
        out_w_ptr=out_w,
        out_bias_ptr=contiguous(out_bias),
        y_ptr=y,
        T=T,
        h=h,
        d=d,
        O=O,
        x_stride=row_stride(x),
        w_stride=row_stride(w),
        up_stride=0 if up is None else row_stride(up),
        out_w_stride=row_stride(out_w),
        ACTIVATION=activation,
        GATE=gate_of(gating, x.dtype),
        PRECISION=input_precision(precision),
        EVEN_H=h == config.H0 + config.H1,
        EVEN_D=d % config.BK == 0,
        EVEN_O=O % config.BN == 0,
        BM=config.BM,
        H0=config.H0,
        H1=config.H1,
        BK=config.BK,
        BN=config.BN,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y
