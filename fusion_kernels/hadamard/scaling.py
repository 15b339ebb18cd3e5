"""What P is divided by: a sum over all of G, which is drawn for it once per seed and size and not kept."""

from __future__ import annotations

import functools

import torch

from fusion_kernels import native
from fusion_kernels.hadamard import reference as reference
from fusion_kernels.hadamard.types import bits_of, keys_of


def scale_of(size: int, seed: int) -> float:
    """`reference.scale` of a P with `size` rows."""
    return reference.scale(size, _energy(seed, bits_of(size)))


@functools.lru_cache(maxsize=65536)
def _energy(seed: int, bits: int) -> int:
    """`reference.energy`, by the compiled library where there is one."""
    if native.UNAVAILABLE is not None:
        return reference.energy(seed, bits)
    parts = torch.zeros(2, dtype=torch.int64, device="cpu")
    native.operators().fastfood_energy(parts, keys_of(seed).flat, bits)
    high, low = parts.tolist()
    return (high << 20) + low
