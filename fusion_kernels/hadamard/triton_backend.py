"""Transforms and Fastfood with Triton: few passes over memory, and nothing drawn is stored.

Triton is imported when a function is first called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusion_kernels.gpu import device_guard, launch, packed
from fusion_kernels.hadamard import heuristics
from fusion_kernels.hadamard.scaling import scale_of
from fusion_kernels.hadamard.types import bits_of, keys_of

_UNMIX_BLOCK = 256
_KEYS = (
    "signs0", "signs1", "whole0", "whole1", "part0", "part1", "r00", "r01", "r10", "r11", "r20", "r21", "r30", "r31",
)  # fmt: skip


def hadamard(x: Tensor) -> Tensor:
    """See `reference.hadamard`."""
    bits, x = bits_of(x.shape[-1]), packed(x.detach())
    y = torch.empty_like(x)
    with device_guard(x):
        _transform(x, y, x.shape[:-1].numel(), bits, {})
    return y


def fastfood(theta: Tensor, size: int, seed: int) -> Tensor:
    """See `reference.fastfood`."""
    from fusion_kernels.hadamard import _triton_hadamard as kernels

    theta = packed(theta.detach())
    rows, length = theta.shape[:-1].numel(), theta.shape[-1]
    bits = bits_of(size)
    # H repeats what comes of the entries that are not zero by filling up.
    u_bits = min(bits, bits_of(length))
    shared = _shared(theta, length, size, seed)
    u, mixed = theta.new_empty(rows, 1 << u_bits), theta.new_empty(rows, 1 << bits)
    y = theta.new_empty(*theta.shape[:-1], size)
    with device_guard(theta):
        _transform(theta, u, rows, u_bits, shared, load=kernels.FOLDED)
        _transform(u, y, rows, bits, shared, load=kernels.MIXED, store=kernels.CUT, between=mixed, u_bits=u_bits)
    return y


def fastfood_transposed(y: Tensor, length: int, seed: int) -> Tensor:
    """See `reference.fastfood_transposed`."""
    from fusion_kernels.hadamard import _triton_hadamard as kernels

    y = packed(y.detach())
    rows, size = y.shape[:-1].numel(), y.shape[-1]
    bits = bits_of(size)
    u_bits = min(bits, bits_of(length))
    shared = _shared(y, length, size, seed)
    z = y.new_empty(rows, 1 << bits)
    theta = y.new_empty(*y.shape[:-1], length)
    runs = heuristics.runs(rows, 1 << u_bits, 1 << (bits - u_bits))
    u = y.new_empty(rows, runs, 1 << u_bits)
    with device_guard(y):
        _transform(y, z, rows, bits, shared, load=kernels.FILLED)
        launch(
            kernels._unmix_kernel,
            -(-u.numel() // _UNMIX_BLOCK),
            {name: shared[name] for name in _KEYS},
            z_ptr=z,
            u_ptr=u,
            total=u.numel(),
            terms=(1 << (bits - u_bits)) // runs,
            ROW_BITS=bits,
            U_BITS=u_bits,
            RUN_BITS=bits_of(runs),
            BLOCK=_UNMIX_BLOCK,
            num_warps=4,
            num_stages=1,
        )
        folded = u.sum(1)
        _transform(folded, theta, rows, u_bits, shared, store=kernels.UNFOLDED, between=folded)
    return theta


def _shared(x: Tensor, length: int, size: int, seed: int) -> dict[str, Any]:
    """What all passes of a call are told: keys as signed numbers of 32 bits, so that kernels have one form."""
    keys = dict(zip(_KEYS, (key - (1 << 32) if key >> 31 else key for key in keys_of(seed).flat), strict=True))
    scale = torch.full((1,), scale_of(size, seed), dtype=x.dtype, device=x.device)
    return {"scale_ptr": scale, "length": length, "size": size, **keys}


def _transform(
    x: Tensor,
    y: Tensor,
    rows: int,
    bits: int,
    shared: dict[str, Any],
    *,
    load: Any = None,
    store: Any = None,
    between: Tensor | None = None,
    u_bits: int = 0,
) -> None:
    """y = the transforms of `rows` rows of 2^bits entries from x.

    Args:
        load, store: what the first pass does beside, and the last; see `_triton_hadamard`.
        between: what the passes before the last write to; None for y.
        u_bits: of the rows that are mixed.
    """
    from fusion_kernels.hadamard import _triton_hadamard as kernels

    passes, total = heuristics.passes(bits), rows << bits
    told = {"scale_ptr": None, **dict.fromkeys((*_KEYS, "length", "size"), 0), **shared}
    if total == 0:
        return
    source = x
    for number, (low, some, width) in enumerate(passes):
        before = load if number == 0 else None
        behind = store if number + 1 == len(passes) else None
        target = y if number + 1 == len(passes) or between is None else between
        launch(
            kernels._pass_kernel,
            -(-total // (1 << heuristics.TILE_BITS)),
            told,
            x_ptr=source,
            y_ptr=target,
            total=total,
            LOW=low,
            BITS=some,
            WIDTH_BITS=bits_of(width),
            TILE_BITS=heuristics.TILE_BITS,
            # Where rows do not matter, one form of the kernel serves all.
            ROW_BITS=0 if before is None and behind is None else bits,
            U_BITS=u_bits if before == kernels.MIXED else 0,
            LOAD=kernels.ENTRIES if before is None else before,
            STORE=kernels.ENTRIES if behind is None else behind,
            num_warps=heuristics.NUM_WARPS,
            num_stages=1,
        )
        source = target
