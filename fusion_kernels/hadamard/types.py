"""Numbers that all implementations of Fastfood share: keys from a seed, and the sizes that follow from shapes."""

from __future__ import annotations

import functools
from typing import NamedTuple

#: The most entries of a transform. Indices, and what they are mixed to, then fit 32 bits.
MOST_BITS = 30
#: Halves of an index are mixed into each other so many times: `reference.permutation`.
ROUNDS = 4
_WORD = 0xFFFFFFFF


class Keys(NamedTuple):
    """Pairs of 32-bit keys that `reference.mixed` takes, in the order in which compiled code gets them.

    Attributes:
        signs: of B.
        whole, part: of G: the words whose bits are counted, and those between two counts.
        rounds: of Pi, one pair per round.
    """

    signs: tuple[int, int]
    whole: tuple[int, int]
    part: tuple[int, int]
    rounds: tuple[tuple[int, int], ...]

    @property
    def flat(self) -> list[int]:
        """All of them, as a list of numbers."""
        return [key for pair in (self.signs, self.whole, self.part, *self.rounds) for key in pair]


@functools.lru_cache(maxsize=4096)
def keys_of(seed: int) -> Keys:
    """The keys of a seed, any integer: two seeds that are equal modulo 2^64 are one.

    Source: Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators" (SplitMix64).
    """
    pairs: list[tuple[int, int]] = []
    state, most = seed, 0xFFFFFFFFFFFFFFFF
    for _ in range(3 + ROUNDS):
        state = (state + 0x9E3779B97F4A7C15) & most
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & most
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & most
        z ^= z >> 31
        pairs.append((z & _WORD, z >> 32))
    return Keys(pairs[0], pairs[1], pairs[2], tuple(pairs[3:]))


def bits_of(n: int) -> int:
    """The least b with 2^b >= n, for n >= 1."""
    return (n - 1).bit_length()
