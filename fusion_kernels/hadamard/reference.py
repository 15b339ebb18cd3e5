"""The Walsh-Hadamard transform and Fastfood as their formulas stand: the specification, in plain torch.

Every random number is a function of a seed and an index, in integers of 32 bits: the same on every device and in every
implementation. Nothing is drawn one after the other, and so nothing of it need be kept.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from fusion_kernels.hadamard.types import bits_of, keys_of

_WORD = 0xFFFFFFFF
#: Indices at a time where a sum needs no more.
_AT_ONCE = 1 << 20


def hadamard(x: Tensor) -> Tensor:
    """H x over the last axis, H_1 = 1, H_2n = [[H_n, H_n], [H_n, -H_n]]: neighbours first, halves last.

    Every entry is a tree of additions whose order follows from its index alone. Implementations keep that order, and so
    have the same bits.
    """
    L, y = x.shape[-1], x
    for bit in range(bits_of(L)):
        pairs = y.unflatten(-1, (L >> (bit + 1), 2, 1 << bit))
        a, b = pairs.unbind(-2)
        y = torch.stack((a + b, a - b), -2).flatten(-3)
    return y.clone() if y is x else y


def fastfood(theta: Tensor, size: int, seed: int) -> Tensor:
    """P theta, the first `size` entries of scale H G Pi H B theta: (..., d) to (..., size).

    With L the least power of two that is not below `size`. theta is filled up with zeros to L entries; where it has
    more, it is folded: entries that are L apart are added up after B has given each of them a sign of its own.
    """
    L = 1 << bits_of(size)
    signed = theta * signs(seed, theta.shape[-1], theta.device).to(theta.dtype)
    y = hadamard(_folded(signed, L))
    y = y[..., permutation(seed, bits_of(L), theta.device)] * gaussians(seed, L, theta.device).to(theta.dtype)
    return hadamard(y)[..., :size] * scale(size, energy(seed, bits_of(size)))


def fastfood_transposed(y: Tensor, length: int, seed: int) -> Tensor:
    """P^T y for theta of `length` entries: (..., size) to (..., length)."""
    size = y.shape[-1]
    L = 1 << bits_of(size)
    z = hadamard(torch.nn.functional.pad(y, (0, L - size))) * gaussians(seed, L, y.device).to(y.dtype)
    back = permutation(seed, bits_of(L), y.device).argsort()
    z = hadamard(z[..., back])
    repeated = z.repeat(*[1] * (y.ndim - 1), -(-length // L))[..., :length]
    return repeated * signs(seed, length, y.device).to(y.dtype) * scale(size, energy(seed, bits_of(size)))


def mixed(x: Tensor, keys: tuple[int, int]) -> Tensor:
    """A word of 32 bits for each x in [0, 2^32), int64: a bijection that a pair of keys chooses.

    Source: the constants are Ettinger's and Wellons's ("Prospecting for hash functions", 2018), between two keys.
    """
    x = x ^ keys[0]
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = x ^ keys[1]
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def signs(seed: int, n: int, device: torch.device | None = None) -> Tensor:
    """(n,) int64 of -1 and 1: the diagonal of B."""
    return 1 - 2 * (mixed(torch.arange(n, device=device), keys_of(seed).signs) >> 31)


def gaussians(seed: int, n: int, device: torch.device | None = None, first: int = 0) -> Tensor:
    """(n,) int64: the diagonal of G from entry `first`, times a standard deviation that `scale` divides out again.

    The number of ones among 32 random bits, with a triangle between two numbers: the density is piecewise linear
    through that of a binomial distribution. Its distribution function is within 0.002 of the normal one. Every value is
    an integer below 2^21, which float32 holds exactly.
    """
    index, keys = torch.arange(first, first + n, device=device), keys_of(seed)
    part = mixed(index, keys.part)
    return (_ones(mixed(index, keys.whole)) << 16) + (part & 0xFFFF) + (part >> 16) - ((16 << 16) + 0xFFFF)


def permutation(seed: int, bits: int, device: torch.device | None = None) -> Tensor:
    """(2^bits,) int64: Pi takes entry `permutation[i]` to place i.

    Rounds of a Feistel network: each half of an index's bits is in turn changed by what the other is mixed to, which
    is undone by the same in reverse order.
    """
    index = torch.arange(1 << bits, device=device)
    low, high = (bits + 1) // 2, bits // 2
    right, left = index & ((1 << low) - 1), index >> low
    for number, keys in enumerate(keys_of(seed).rounds):
        if number % 2 == 0:
            right = right ^ (mixed(left, keys) & ((1 << low) - 1))
        else:
            left = left ^ (mixed(right, keys) & ((1 << high) - 1))
    return (left << low) | right


def scale(size: int, energy: int) -> float:
    """1 / sqrt(size * energy), energy the sum of G^2: every column of P then has a norm of about 1."""
    return 1 / math.sqrt(size * energy)


@functools.lru_cache(maxsize=65536)
def energy(seed: int, bits: int) -> int:
    """The sum of the squares of 2^bits :func:`gaussians`, exactly."""
    L = 1 << bits
    parts = (gaussians(seed, min(_AT_ONCE, L), first=first) for first in range(0, L, _AT_ONCE))
    return sum(int(drawn.square().sum()) for drawn in parts)


def _ones(x: Tensor) -> Tensor:
    """How many of 32 bits are set."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    return ((((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101) & _WORD) >> 24


def _folded(x: Tensor, L: int) -> Tensor:
    """(..., L): filled up with zeros, or blocks of L added up in their order."""
    blocks = -(-x.shape[-1] // L)
    blocks_of = torch.nn.functional.pad(x, (0, blocks * L - x.shape[-1])).unflatten(-1, (blocks, L)).unbind(-2)
    total = blocks_of[0]
    for block in blocks_of[1:]:
        total = total + block
    return total
