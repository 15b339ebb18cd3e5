"""When entries of a product are computed one by one, and when out of whole blocks of it."""

from __future__ import annotations

#: Numbers that a block of the product has at most: 4 MiB of float32.
BLOCK = 1 << 20
#: Rows that a block has at least: a product of fewer keeps no multiplier busy.
LEAST_ROWS = 64
#: What one multiplication of an entry by itself costs, counted in those of a whole product; and, of the columns that
#: are laid out first, what one number costs. As one thread of a CPU with AVX2 was seen to take.
CPU_ENTRY, CPU_LAYOUT = 3.0, 40.0
#: The same of a GPU, whose tensor cores make 16-bit products of whole tiles: estimated from the bytes that are moved.
GPU_ENTRY, GPU_SHORT_ENTRY, GPU_LAYOUT = 8.0, 64.0, 32.0


def block_rows(N: int, d: int) -> int:
    """Rows of a block of an (N, d) product."""
    return max(1, min(N, max(LEAST_ROWS, BLOCK // max(d, 1))))


def one_by_one(T: int, N: int, d: int, k: int, *, on_gpu: bool, short: bool) -> bool:
    """Whether k dot products of T numbers are cheaper than an (N, d) product of T.

    Args:
        on_gpu: where.
        short: the numbers have 16 bits.
    """
    entry, layout = (GPU_SHORT_ENTRY if short else GPU_ENTRY, GPU_LAYOUT) if on_gpu else (CPU_ENTRY, CPU_LAYOUT)
    return T * (k * entry + min(k, N) * layout + min(k, d) * layout) < T * N * d
