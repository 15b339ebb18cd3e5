"""Shapes to launch configurations for the Triton kernels of the MLP: pure functions, nothing is timed at run time.

A tile's cost is what its products and its epilogue keep a multiprocessor from doing anything else. Where two programs
fit on one, the epilogue of one runs beside the products of the other. No number here was measured on a GPU: they are
rates from data sheets, and instructions counted in compiled code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fusion_kernels.gpu import (
    LARGE_SHARED_MEMORY,
    MULTIPROCESSORS,
    SMALL_SHARED_MEMORY,
    Multiprocessor,
    programs_at_once,
)

#: What the products of float32 inputs are made of, or that the inputs have 16 bits.
HALF, TF32, IEEE = "half", "tf32", "ieee"
#: Entries that a tile could multiply in the time in which it loads one row or column: what makes large tiles cheaper.
_LOAD = 64
#: Tokens and warps of the hidden-resident kernel and the float32 accumulators per thread that leave registers for the
#: rest, by whether there is much shared memory; then its outputs and inputs per step, and stages.
_RESIDENT_ROWS = {
    True: ((128, 8, 96), (64, 4, 64), (64, 8, 128), (32, 4, 96), (16, 4, 64)),
    False: ((128, 8, 96), (64, 4, 64), (64, 8, 64), (32, 4, 96), (16, 4, 64)),
}
_RESIDENT_ODD_ROWS = ((64, 8, 32), (16, 4, 16))
_RESIDENT_STEPS = ((128, 64, 3), (128, 64, 2), (64, 64, 3), (64, 64, 2), (64, 32, 3), (64, 32, 2), (32, 32, 2))
#: Entries of a tile per thread that an epilogue works on at a time.
_EPILOGUE = 16
#: Multiply-adds per cycle of a multiprocessor by kind of product, with little and with much shared memory.
_RATE = {(HALF, True): 2048, (HALF, False): 1024, (TF32, True): 1024, (TF32, False): 512}
_RATE |= {(IEEE, True): 128, (IEEE, False): 128}
#: Instructions per entry of an epilogue (GELU and its derivative; addresses, conversion, store), of 128 per cycle.
_EPILOGUE_INSTRUCTIONS, _ISSUED = 40, 128
#: How much of the shorter of the two another program does not hide.
_SHOWN = 0.125
#: Registers that a thread needs, for each accumulator and beside them; operands pass through registers, too, where
#: products are not by `wgmma` or later.
_REGISTERS, _REGISTERS_BESIDE = {True: 1.0, False: 1.6}, 62
#: What a thread is never denied: no kernel needs more to get by without local memory.
_REGISTERS_LEFT = 128
#: Tokens of an expert that sums over them are made for: their number changes, the kernel does not.
TOKENS = 1024
#: Tokens up to which the products of a decoding step count as few, and the least rows of a tile that trains.
DECODED, TRAINED = 16, 64
#: Entries per program of a pointwise pass.
_POINTS = 2048


@dataclass(frozen=True)
class Gpu:
    """What configurations depend on: bytes of shared memory per program, how many multiprocessors, and what one has."""

    shared_memory: int
    multiprocessors: int
    multiprocessor: Multiprocessor = MULTIPROCESSORS[86]

    @property
    def large(self) -> bool:
        """It has the shared memory of a GPU for data centres since compute capability 9.0."""
        return self.shared_memory >= LARGE_SHARED_MEMORY


@dataclass(frozen=True)
class TileConfig:
    """Launch configuration of a product: tile (BM, BN), BK entries per step, GROUP tiles down, then across."""

    BM: int
    BN: int
    BK: int
    GROUP: int
    num_warps: int
    num_stages: int

    @property
    def parts(self) -> int:
        """Parts of the tile that the epilogue works on one after the other: registers for another program stay free."""
        return max(1, self.BM * self.BN // (_EPILOGUE * 32 * self.num_warps))

    def shared(self, kind: str, wide: bool) -> int:
        """Bytes of its stages; `wide` as in `tile_candidates`."""
        operands = self.BM + (2 if wide else 1) * self.BN
        return self.num_stages * operands * self.BK * (2 if kind == HALF else 4)

    def programs(self, kind: str, gpu: Gpu, wide: bool) -> int:
        """How many programs run on a multiprocessor at once; `wide` as in `tile_candidates`."""
        accumulators = (2 if wide else 1) * self.BM * self.BN // (32 * self.num_warps)
        registers = round(_REGISTERS_BESIDE + _REGISTERS[gpu.large] * accumulators)
        return programs_at_once(registers, self.shared(kind, wide), self.num_warps, gpu.multiprocessor)

    def registers(self, kind: str, gpu: Gpu, wide: bool) -> int | None:
        """What a thread may take at most, so that `programs` fit; None where that is up to the compiler."""
        programs = self.programs(kind, gpu, wide)
        if programs < 2 or kind == IEEE or not gpu.large:
            return None
        return max(_REGISTERS_LEFT, 65_536 // (programs * 32 * self.num_warps) // 8 * 8)


@dataclass(frozen=True)
class ResidentConfig:
    """Launch configuration of `_resident_kernel`: BM tokens, H0 + H1 neurons, BK inputs and BN outputs per step."""

    BM: int
    H0: int
    H1: int
    BK: int
    BN: int
    num_warps: int
    num_stages: int


_TILES = {
    # 16-bit inputs, 227 KiB of shared memory.
    (HALF, True): (
        TileConfig(128, 256, 64, 8, 8, 3),
        TileConfig(128, 128, 64, 8, 8, 3),
        TileConfig(128, 64, 64, 8, 8, 3),
        TileConfig(64, 128, 64, 8, 4, 3),
        TileConfig(64, 64, 64, 8, 4, 4),
        TileConfig(32, 64, 64, 8, 4, 4),
        TileConfig(16, 64, 128, 8, 4, 3),
        TileConfig(16, 16, 128, 8, 2, 3),
    ),
    # 99 KiB.
    (HALF, False): (
        TileConfig(128, 128, 32, 8, 8, 4),
        TileConfig(128, 64, 32, 8, 8, 4),
        TileConfig(64, 64, 64, 8, 4, 4),
        TileConfig(32, 64, 64, 8, 4, 4),
        TileConfig(16, 64, 128, 8, 4, 3),
        TileConfig(16, 16, 128, 8, 2, 3),
    ),
    (TF32, True): (
        TileConfig(128, 128, 32, 8, 8, 4),
        TileConfig(64, 64, 32, 8, 8, 4),
        TileConfig(16, 64, 64, 8, 4, 3),
        TileConfig(16, 16, 64, 8, 2, 3),
    ),
    (TF32, False): (
        TileConfig(128, 64, 32, 8, 8, 3),
        TileConfig(64, 64, 32, 8, 4, 3),
        TileConfig(16, 64, 64, 8, 4, 3),
        TileConfig(16, 16, 64, 8, 2, 3),
    ),
    # Sums without tensor cores need a register per entry of the operands.
    (IEEE, True): (TileConfig(64, 64, 16, 8, 8, 3), TileConfig(32, 32, 16, 8, 4, 3), TileConfig(16, 16, 32, 8, 4, 3)),
    (IEEE, False): (TileConfig(64, 64, 16, 8, 8, 3), TileConfig(32, 32, 16, 8, 4, 3), TileConfig(16, 16, 32, 8, 4, 3)),
}

#: Where entries can only be loaded one by one, which takes many addresses.
_ODD_TILES = (TileConfig(64, 64, 32, 8, 8, 2), TileConfig(32, 64, 32, 8, 8, 2), TileConfig(16, 32, 32, 8, 4, 2))


def tile_candidates(kind: str, gpu: Gpu, wide: bool, aligned: bool = True) -> tuple[TileConfig, ...]:
    """Configurations that fit the GPU.

    Args:
        wide: for kernels that hold two accumulators, or two tiles beside one.
        aligned: rows begin at multiples of 16 entries.
    """
    if not aligned and kind != IEEE:
        return _ODD_TILES if kind == HALF else _ODD_TILES[1:]
    candidates = _TILES[kind, gpu.large]
    # Two accumulators take the registers of one of twice the columns.
    most = max(config.BM * config.BN // config.num_warps for config in candidates)
    fitting = (c for c in candidates if c.shared(kind, wide) <= gpu.shared_memory)
    return tuple(c for c in fitting if not wide or 2 * c.BM * c.BN // c.num_warps <= most)


def tile_config(
    rows: int,
    columns: int,
    depth: int,
    kind: str,
    gpu: Gpu,
    *,
    wide: bool = False,
    aligned: bool = True,
    problems: int = 1,
) -> TileConfig:
    """For `problems` products of (rows, columns) entries, each a sum over `depth`.

    Every tile is compiled by itself, and the number of rows, of tokens that is, changes from call to call: it only says
    whether they are those of a decoding step, or fill the GPU, or lie between, which makes three tiles at most.

    Args:
        wide, aligned: as in `tile_candidates`.
    """
    candidates = tile_candidates(kind, gpu, wide, aligned)

    def tiles(config: TileConfig, rows: int) -> int:
        return problems * -(-rows // config.BM) * -(-columns // config.BN)

    def busy(config: TileConfig, per_multiprocessor: float) -> float:
        """Cycles in which a multiprocessor computes so many tiles."""
        operands = _LOAD * (config.BM + (2 if wide else 1) * config.BN)
        accumulators = (2 if wide else 1) * config.BM * config.BN
        products = (accumulators + operands) * depth / _RATE[kind, gpu.large]
        epilogue = config.BM * config.BN * _EPILOGUE_INSTRUCTIONS / _ISSUED
        shown = _SHOWN if config.programs(kind, gpu, wide) > 1 else 1.0
        return per_multiprocessor * (max(products, epilogue) + shown * min(products, epilogue))

    def fastest(among: Sequence[TileConfig], rows: int) -> TileConfig:
        return min(among, key=lambda c: busy(c, -(-tiles(c, rows) // gpu.multiprocessors)))

    # So many that what the last wave leaves idle does not count.
    many = 1 << 20
    large = min(candidates, key=lambda c: busy(c, tiles(c, many) / gpu.multiprocessors))
    if 2 * tiles(large, rows) >= gpu.multiprocessors:
        return large
    if rows <= DECODED:
        return fastest(candidates, DECODED)
    # Numbers between are represented by their middle; tiles of few rows would read the weights again and again.
    fill = max(1, gpu.multiprocessors * large.BM * large.BN // (columns * problems))
    tall = [c for c in candidates if c.BM >= TRAINED] or candidates
    return fastest(tall, max(TRAINED, round((TRAINED * fill) ** 0.5)))


def resident_candidates(h: int, kind: str, gpu: Gpu, gated: bool, aligned: bool = True) -> tuple[ResidentConfig, ...]:
    """Configurations of the hidden-resident kernel that fit the GPU; none where h is too large, or for float32.

    Args:
        gated: for two input projections.
        aligned: rows of x and of the input projections begin at multiples of 16 entries.
    """
    if kind != HALF:
        return ()
    H0, H1 = hidden_parts(h)
    fits = []
    rows = _RESIDENT_ROWS[gpu.large] if aligned else _RESIDENT_ODD_ROWS
    for BM, num_warps, most in rows:
        hidden = (H0 + H1) * (2 if gated else 1)
        if BM * hidden > most * 32 * num_warps:
            continue
        for BN, BK, num_stages in _RESIDENT_STEPS if aligned else _RESIDENT_STEPS[-1:]:
            first = num_stages * (BM + hidden) * BK
            second = num_stages * (H0 + H1) * BN + BM * (H0 + H1 + BN)
            if 2 * max(first, second) <= gpu.shared_memory:
                fits.append(ResidentConfig(BM, H0, H1, BK, BN, num_warps, num_stages))
                break
    return tuple(fits)


def resident_config(T: int, h: int, kind: str, gpu: Gpu, gated: bool, aligned: bool = True) -> ResidentConfig | None:
    """For T tokens and h neurons, or None where they do not fit; the rest as in `resident_candidates`."""

    def cost(config: ResidentConfig) -> int:
        return -(-T // (config.BM * gpu.multiprocessors)) * (config.BM + _LOAD)

    return min(resident_candidates(h, kind, gpu, gated, aligned), key=cost, default=None)


def hidden_parts(h: int) -> tuple[int, int]:
    """Two powers of two, at least 16 and the second possibly 0, with the smallest sum that is not below h."""
    whole = max(16, 1 << (h - 1).bit_length())
    first = whole // 2
    if first < 16:
        return whole, 0
    second = max(16, 1 << max(0, h - first - 1).bit_length())
    return (first, second) if whole >= 256 or first + second < whole else (whole, 0)


def pointwise_block(R: int, C: int) -> tuple[int, int]:
    """Rows and columns per program of a pass over (R, C) entries."""
    columns = min(_POINTS, 1 << (max(1, C) - 1).bit_length())
    return min(_POINTS // columns, 1 << (max(1, R) - 1).bit_length()), columns


def gpu_of(capability: int) -> Gpu:
    """The large GPU of a compute capability (80, 90, ...); 99 KiB stand for every one that is not of a data centre."""
    large = 90 <= capability < 110
    shared_memory, count = (LARGE_SHARED_MEMORY, 132) if large else (SMALL_SHARED_MEMORY, 108)
    return Gpu(shared_memory, count, MULTIPROCESSORS[capability])
