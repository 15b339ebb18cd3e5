"""Device code: passes of Walsh-Hadamard transforms over tiles in registers, and what Fastfood does around them."""

import triton
import triton.language as tl

#: What a pass loads: entries; theta with signs, folded; H B theta, mixed by Pi and G; rows that are cut short.
ENTRIES: tl.constexpr = tl.constexpr(0)
FOLDED: tl.constexpr = tl.constexpr(1)
MIXED: tl.constexpr = tl.constexpr(2)
FILLED: tl.constexpr = tl.constexpr(3)
#: What it stores, beside entries: rows that are cut short, scaled; those of theta's gradient, with signs.
CUT: tl.constexpr = tl.constexpr(4)
UNFOLDED: tl.constexpr = tl.constexpr(5)


@triton.jit
def _word(x, first, second):
    """`reference.mixed`, of uint32."""
    x = x ^ first.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = x ^ second.to(tl.uint32)
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _signed(x, i, first, second):
    """x with the sign of B's entry i (uint32)."""
    return tl.where((_word(i, first, second) >> 31) != 0, -x, x)


@triton.jit
def _ones(x):
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    return (x + (x >> 16)) & 0x3F


@triton.jit
def _gaussian(i, whole0, whole1, part0, part1):
    """G's entry i (uint32), as int32."""
    part = _word(i, part0, part1)
    total = (_ones(_word(i, whole0, whole1)) << 16) + (part & 0xFFFF) + (part >> 16)
    return total.to(tl.int32) - ((16 << 16) + 0xFFFF)


@triton.jit
def _source(i, r00, r01, r10, r11, r20, r21, r30, r31, ROW_BITS: tl.constexpr):
    """Where Pi takes entry i (uint32) from."""
    LOW: tl.constexpr = (ROW_BITS + 1) // 2
    LOW_MASK: tl.constexpr = (1 << LOW) - 1
    HIGH_MASK: tl.constexpr = (1 << (ROW_BITS // 2)) - 1
    right = i & LOW_MASK
    left = i >> LOW
    right = right ^ (_word(left, r00, r01) & LOW_MASK)
    left = left ^ (_word(right, r10, r11) & HIGH_MASK)
    right = right ^ (_word(left, r20, r21) & LOW_MASK)
    left = left ^ (_word(right, r30, r31) & HIGH_MASK)
    return (left << LOW) | right


@triton.jit
def _target(i, r00, r01, r10, r11, r20, r21, r30, r31, ROW_BITS: tl.constexpr):
    """Which entry Pi takes from i (uint32): the inverse of :func:`_source`."""
    LOW: tl.constexpr = (ROW_BITS + 1) // 2
    LOW_MASK: tl.constexpr = (1 << LOW) - 1
    HIGH_MASK: tl.constexpr = (1 << (ROW_BITS // 2)) - 1
    right = i & LOW_MASK
    left = i >> LOW
    left = left ^ (_word(right, r30, r31) & HIGH_MASK)
    right = right ^ (_word(left, r20, r21) & LOW_MASK)
    left = left ^ (_word(right, r10, r11) & HIGH_MASK)
    right = right ^ (_word(left, r00, r01) & LOW_MASK)
    return (left << LOW) | right


@triton.jit
def _sum_and_difference(y, BIT: tl.constexpr):
    """y (2, 2, ...) along one bit of its index, the lowest of which is its last axis."""
    AXIS: tl.constexpr = len(y.shape) - 1 - BIT
    # The other one of two, whatever they are: a sum of bits without carry, less its own.
    own = y.to(tl.int64 if y.dtype == tl.float64 else tl.int32, bitcast=True)
    other = (own ^ tl.xor_sum(own, AXIS, keep_dims=True)).to(y.dtype, bitcast=True)
    second = tl.reshape(tl.arange(0, 2), [1] * AXIS + [2] + [1] * BIT)
    return other + tl.where(second == 1, -y, y)


@triton.jit
def _sums_and_differences(x, FROM: tl.constexpr, BITS: tl.constexpr, TILE_BITS: tl.constexpr):
    """x (2^TILE_BITS,) transformed along BITS bits of its index from bit FROM on, the lowest first."""
    y = tl.reshape(x, [2] * TILE_BITS)
    for bit in tl.static_range(FROM, FROM + BITS):
        y = _sum_and_difference(y, bit)
    return tl.reshape(y, [1 << TILE_BITS])


@triton.jit(do_not_specialize=[
    "total", "length", "size", "signs0", "signs1", "whole0", "whole1", "part0", "part1", "r00", "r01", "r10", "r11",
    "r20", "r21", "r30", "r31",
])  # fmt: skip
def _pass_kernel(
    x_ptr, y_ptr, scale_ptr, total, length, size, signs0, signs1, whole0, whole1, part0, part1, r00, r01, r10, r11, r20,
    r21, r30, r31, LOW: tl.constexpr, BITS: tl.constexpr, WIDTH_BITS: tl.constexpr, TILE_BITS: tl.constexpr,
    ROW_BITS: tl.constexpr, U_BITS: tl.constexpr, LOAD: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """Bits [LOW, LOW + BITS) of `total` entries in rows of 2^ROW_BITS: x transformed to y, which may be x.

    In one piece: what the first and the last pass do beside is short, and needs the indices. A tile is 2^BITS rows of
    2^WIDTH_BITS neighbours, as often as there is room; x_ptr has rows of `length` (FOLDED), 2^U_BITS (MIXED) or `size`
    (FILLED), y_ptr of `size` (CUT) or `length` (UNFOLDED).
    """
    t = tl.arange(0, 1 << TILE_BITS)
    unit = tl.program_id(0).to(tl.int64) * (1 << (TILE_BITS - BITS - WIDTH_BITS)) + (t >> (BITS + WIDTH_BITS))
    row = ((t >> WIDTH_BITS) & ((1 << BITS) - 1)).to(tl.int64)
    across: tl.constexpr = LOW - WIDTH_BITS
    flat = ((unit >> across) << (LOW + BITS)) + (row << LOW)
    flat += ((unit & ((1 << across) - 1)) << WIDTH_BITS) + (t & ((1 << WIDTH_BITS) - 1))
    there = flat < total
    b = flat >> ROW_BITS
    i = flat & ((1 << ROW_BITS) - 1)
    index = i.to(tl.uint32)
    if LOAD == FOLDED:
        x = tl.zeros((1 << TILE_BITS,), x_ptr.dtype.element_ty)
        for first in range(0, length, 1 << ROW_BITS):
            theta = tl.load(x_ptr + b * length + first + i, mask=there & (first + i < length), other=0.0)
            x += _signed(theta, (first + i).to(tl.uint32), signs0, signs1)
    elif LOAD == MIXED:
        source = _source(index, r00, r01, r10, r11, r20, r21, r30, r31, ROW_BITS) & ((1 << U_BITS) - 1)
        x = tl.load(x_ptr + (b << U_BITS) + source.to(tl.int64), mask=there, other=0.0)
        x = x * _gaussian(index, whole0, whole1, part0, part1).to(x.dtype)
    elif LOAD == FILLED:
        x = tl.load(x_ptr + b * size + i, mask=there & (i < size), other=0.0)
    else:
        x = tl.load(x_ptr + flat, mask=there, other=0.0)
    y = _sums_and_differences(x, WIDTH_BITS, BITS, TILE_BITS)
    if STORE == CUT:
        tl.store(y_ptr + b * size + i, y * tl.load(scale_ptr), mask=there & (i < size))
    elif STORE == UNFOLDED:
        y = y * tl.load(scale_ptr)
        for first in range(0, length, 1 << ROW_BITS):
            signed = _signed(y, (first + i).to(tl.uint32), signs0, signs1)
            tl.store(y_ptr + b * length + first + i, signed, mask=there & (first + i < length))
    else:
        tl.store(y_ptr + flat, y, mask=there)


@triton.jit(do_not_specialize=[
    "total", "terms", "whole0", "whole1", "part0", "part1", "r00", "r01", "r10", "r11", "r20", "r21", "r30", "r31",
])  # fmt: skip
def _unmix_kernel(
    z_ptr, u_ptr, total, terms, whole0, whole1, part0, part1, r00, r01, r10, r11, r20, r21, r30, r31,
    ROW_BITS: tl.constexpr, U_BITS: tl.constexpr, RUN_BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """u (total,) = (rows, 2^RUN_BITS, 2^U_BITS): sums of `terms` of Pi^T G z (rows, 2^ROW_BITS), 2^U_BITS apart."""
    flat = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = flat < total
    j = flat & ((1 << U_BITS) - 1)
    run = (flat >> U_BITS) & ((1 << RUN_BITS) - 1)
    b = flat >> (U_BITS + RUN_BITS)
    u = tl.zeros((BLOCK,), u_ptr.dtype.element_ty)
    for term in range(terms):
        place = j + ((run * terms + term) << U_BITS)
        i = _target(place.to(tl.uint32), r00, r01, r10, r11, r20, r21, r30, r31, ROW_BITS)
        z = tl.load(z_ptr + (b << ROW_BITS) + i.to(tl.int64), mask=there, other=0.0)
        u += z * _gaussian(i, whole0, whole1, part0, part1).to(u.dtype)
    tl.store(u_ptr + flat, u, mask=there)
