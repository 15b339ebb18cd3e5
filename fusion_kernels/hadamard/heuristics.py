"""From the number of entries to the passes of a kernel that holds a tile in registers."""

from __future__ import annotations

from typing import NamedTuple

#: Bits of a tile's index, and of those the most that a pass over distant entries takes: rows of its tiles then have 16
#: entries side by side, two sectors of memory or more. 16 entries per thread.
TILE_BITS, FAR_BITS, NUM_WARPS = 12, 8, 8


class Pass(NamedTuple):
    """Bits [low, low + bits) of the index, `width` neighbours at a time."""

    low: int
    bits: int
    width: int


def passes(bits: int) -> list[Pass]:
    """What a transform of 2^bits entries does one after the other; one pass at least."""
    near = min(bits, TILE_BITS)
    found, done = [Pass(0, near, 1)], near
    while done < bits:
        left = -(-(bits - done) // FAR_BITS)
        some = -(-(bits - done) // left)
        found.append(Pass(done, some, 1 << (TILE_BITS - some)))
        done += some
    return found


def runs(rows: int, entries: int, blocks: int) -> int:
    """Into how many parts, a power of two, to split sums over `blocks` terms of `rows` times `entries` numbers.

    A GPU has work for 2^18 threads; a part has 8 terms at least.
    """
    wanted = max(1, (1 << 18) // max(1, rows * entries))
    return 1 << max(0, min(wanted, blocks // 8).bit_length() - 1)
