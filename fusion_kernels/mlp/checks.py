"""What the public functions of blocks refuse, in their callers' words."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fusion_kernels.activations import get_activation
from fusion_kernels.ffn import FFN

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SCALES = (*FLOATS, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_options(x: Tensor, activation: str, checkpoint_level: int) -> None:
    """Raise ValueError for an unknown activation or level, or an x of a dtype that no backend takes."""
    get_activation(activation)
    if checkpoint_level not in (0, 1, 2):
        raise ValueError(f"checkpoint_level must be 0, 1 or 2, got {checkpoint_level!r}")
    if x.dtype not in FLOATS:
        raise ValueError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")


def check_tensors(x: Tensor, ffn: FFN, names: Mapping[str, str], *, both_factors: bool = False) -> None:
    """Raise a ValueError that names what does not fit `w_in` and the outputs of `w_out`, or x.

    Args:
        ffn: its `w_in` and `w_out` have as many dimensions as they should.
        names: what the caller calls a tensor, where that is not its name in `FFN`. To the caller, `w_out` is as in
            `torch.nn.Linear`.
        both_factors: whether a scale may be (2, N).
    """
    shapes = ffn.shapes()
    for field, t in ffn.named().items():
        name, shape, found = names.get(field, field), shapes[field], tuple(t.shape)
        if field == "scale":
            if t.dtype not in SCALES:
                raise ValueError(f"scale must have a floating-point or integer dtype, got {t.dtype}")
            if both_factors and found == (2, *shape):
                shape = found
        elif t.dtype not in FLOATS:
            raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {t.dtype}")
        if field == "w_out":
            shape, found = (*shape[:-2], shape[-1], shape[-2]), tuple(t.mT.shape)
        if found != shape:
            raise ValueError(f"{name} must be {shape}, got {found}")
        if t.device != x.device:
            raise ValueError(f"{name} is on {t.device}, x is on {x.device}")
    if ffn.b_gate is not None and ffn.w_gate is None:
        raise ValueError("b_gate is there without w_gate")
    if not ffn.gating.plain and ffn.w_gate is None:
        raise ValueError("gating has limits or an offset, and there is no w_gate")
