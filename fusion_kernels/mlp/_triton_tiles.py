"""Device code that the kernels of the MLP share: activations, which tile a program computes, and its product.

A product is `a (rows, K) · b (K, N)` with float32 accumulators, where b is a weight in either layout. Rows belong to
experts when a map of the tiles is given: expert e owns rows `offsets[e]` to `offsets[e + 1]`, a tile never crosses from
one expert to the next, and the map says whose it is, so that the host need not know the offsets. The grid is sized by
the worst case, and the tiles left over have no rows. The rows of a may lie anywhere, where a list says: experts read
their tokens so, and write results back.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoids(x):
    """sigmoid(x) and 1 - sigmoid(x), both with all their digits, from one exponential that cannot overflow."""
    small = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + small)
    small *= large
    return tl.where(x < 0.0, small, large), tl.where(x < 0.0, large, small)


@triton.jit
def short(like) -> tl.constexpr:
    """Whether a tensor has 16 bits per number: values that go there need fewer digits than float32 has."""
    return tl.constexpr(like.dtype.element_ty.primitive_bitwidth == 16)


@triton.jit
def gelu_short(z):
    """GELU and its derivative from one exponential, for results of 16 bits.

    The normal distribution's lower tail is a polynomial of degree 5 in 1 / (1 + p |z|) times the exponential that the
    derivative needs too; the upper one is 1 less that, so that small values keep their digits. It errs by at most
    7.5e-8 (Abramowitz & Stegun 1964, 7.1.26, for half of erfc), 5e-7 as float32 computes it; in the lower tail, down to
    -6, by 0.4 % of itself. float16 rounds 1/4 to within 6e-5, bfloat16 everything to within 0.2 %.
    """
    x = tl.abs(z) * 0.7071067811865476
    # A square root's reciprocal is one instruction, a division several.
    root = tl.rsqrt(1.0 + 0.3275911 * x)
    t = root * root
    density = tl.exp(-x * x)
    tail = ((((0.5307027145 * t - 0.7265760135) * t + 0.7107068705) * t - 0.142248368) * t + 0.127414796) * t * density
    cdf = tl.where(z < 0.0, tail, 1.0 - tail)
    return z * cdf, cdf + z * density * 0.3989422804014327


@triton.jit
def activation(z, ACTIVATION: tl.constexpr, SHORT: tl.constexpr):
    """Value and derivative of an activation at z, both float32; what the caller does not use is not computed.

    SHORT: results go to 16 bits.
    """
    if ACTIVATION == "gelu" and SHORT:
        value, slope = gelu_short(z)
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        value = z * cdf
        slope = cdf + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh u) / 2 = sigmoid(2u), without the cancellation.
        share, rest = sigmoids(1.5957691216057308 * (z + 0.044715 * z * z * z))
        value = z * share
        slope = share + value * rest * (1.5957691216057308 + 0.21406444881780076 * z * z)
    elif ACTIVATION == "quick_gelu":
        share, rest = sigmoids(1.702 * z)
        value = z * share
        slope = share * (1.0 + 1.702 * z * rest)
    elif ACTIVATION == "silu":
        share, rest = sigmoids(z)
        value = z * share
        slope = share * (1.0 + z * rest)
    elif ACTIVATION == "relu":
        # NaN stays NaN; the slope is 0 at the kink.
        value = tl.where(z <= 0.0, 0.0, z)
        slope = tl.where(z <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "relu2":
        kept = tl.where(z <= 0.0, 0.0, z)
        value = kept * kept
        slope = 2.0 * kept
    else:
        tl.static_assert(ACTIVATION == "none", "unknown activation")
        value = z
        slope = z * 0.0 + 1.0
    return value, slope


@triton.jit
def gated(gate, up, ACTIVATION: tl.constexpr, GATE: tl.constexpr, SHORT: tl.constexpr):
    """(value, slope, up): what multiplies up, its derivative by `gate`, and the limited up with its offset.

    GATE: None where there are no limits, else the fields of `fusion_kernels.gates.Gate`. SHORT: as in `activation`.
    """
    if GATE is None:
        value, slope = activation(gate, ACTIVATION, SHORT)
    else:
        LIMIT: tl.constexpr = GATE[0]
        CLAMP: tl.constexpr = GATE[1]
        inside = gate
        if CLAMP == "above" or CLAMP == "both":
            inside = tl.where(inside > LIMIT, LIMIT, inside)
            if CLAMP == "both":
                inside = tl.where(inside < -LIMIT, -LIMIT, inside)
        value, slope = activation(inside, ACTIVATION, SHORT)
        if CLAMP == "above" or CLAMP == "both":
            slope = tl.where(gate <= LIMIT, slope, 0.0)
            if CLAMP == "both":
                slope = tl.where(gate >= -LIMIT, slope, 0.0)
        elif CLAMP == "after":
            slope = tl.where(value <= LIMIT, slope, 0.0)
            value = tl.where(value > LIMIT, LIMIT, value)
        if LIMIT is not None:
            up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
        up += GATE[2]
    return value, slope, up


@triton.jit
def through_up(gradient, up, GATE: tl.constexpr):
    """`gradient` where the limit lets up through, else 0."""
    if GATE is not None:
        LIMIT: tl.constexpr = GATE[0]
        if LIMIT is not None:
            gradient = tl.where((up >= -LIMIT) & (up <= LIMIT), gradient, 0.0)
    return gradient


@triton.jit
def stored(value, like):
    """float32 numbers as they would be read back from a tensor of `like`'s dtype.

    Activations are taken of z so rounded: the result is the same whether z was saved, recomputed, or never stored.
    """
    return value.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def tile_of(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """(m, n) of a program's tile: GROUP tiles down, then across, so that programs that run together share in L2."""
    band = pid // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - band * GROUP, GROUP)
    within = pid % (GROUP * tiles_n)
    return band * GROUP + within % height, within // height


@triton.jit(do_not_specialize=["tiles", "height"])
def _tile_map_kernel(offsets_ptr, map_ptr, tiles, height, E, BE: tl.constexpr, BT: tl.constexpr):
    """map (tiles, 3): expert, first row and end of the rows of every tile of at most `height` rows, expert by expert.

    Program e writes the tiles of expert e, BT at a time; program E those that are left over, whose rows end at 0. BE is
    a power of two and at least E.
    """
    expert = tl.program_id(0)
    e = tl.arange(0, BE)
    begin = tl.load(offsets_ptr + e, mask=e < E, other=0)
    stop = tl.load(offsets_ptr + e + 1, mask=e < E, other=0)
    count = tl.cdiv(stop - begin, height)
    own = e == expert
    at = tl.sum(tl.where(e < expert, count, 0), 0)
    until = tl.where(expert < E, at + tl.sum(tl.where(own, count, 0), 0), tiles)
    first = tl.sum(tl.where(own, begin, 0), 0)
    end = tl.sum(tl.where(own, stop, 0), 0)
    for start in range(at, until, BT):
        tile = start + tl.arange(0, BT)
        entry = map_ptr + tile.to(tl.int64) * 3
        written = tile < until
        tl.store(entry, tl.zeros_like(tile) + expert, mask=written)
        tl.store(entry + 1, first + (tile - at) * height, mask=written)
        tl.store(entry + 2, tl.zeros_like(tile) + end, mask=written)


@triton.jit
def rows_of(tile, map_ptr, T, BM: tl.constexpr):
    """Expert (int64), first row and end of the rows of a tile of at most BM rows; first >= end for a tile left over.

    map_ptr: what `_tile_map_kernel` has written, or None: expert 0 owns the rows [0, T).
    """
    if map_ptr is None:
        expert = 0
        first = tile * BM
        end = T
    else:
        entry = map_ptr + tile.to(tl.int64) * 3
        expert = tl.load(entry).to(tl.int64)
        first = tl.load(entry + 1)
        end = tl.load(entry + 2)
    return expert, first, end


@triton.jit
def lying(first, end, rows_ptr, BM: tl.constexpr):
    """(BM,) int64: where the rows of a tile lie, as `rows_ptr` says unless it is None.

    Rows past the end are the last one: no masks for them in a loop, and nothing of them is stored.
    """
    rows = tl.minimum(first + tl.arange(0, BM), end - 1).to(tl.int64)
    if rows_ptr is not None:
        rows = tl.load(rows_ptr + rows)
    return rows


@triton.jit
def load(ptr, rows, columns, EVEN_ROWS: tl.constexpr, EVEN_COLUMNS: tl.constexpr):
    """A tile with zeros where the mask `rows` (R, 1) or `columns` (1, C) is false; EVEN: it is true."""
    if EVEN_ROWS and EVEN_COLUMNS:
        tile = tl.load(ptr)
    elif EVEN_COLUMNS:
        tile = tl.load(ptr, mask=rows, other=0.0)
    elif EVEN_ROWS:
        tile = tl.load(ptr, mask=columns, other=0.0)
    else:
        tile = tl.load(ptr, mask=rows & columns, other=0.0)
    return tile


@triton.jit
def accumulate(
    acc,
    a_ptr,
    b_ptr,
    rows,
    n,
    N,
    K,
    a_stride,
    b_stride_n,
    b_stride_k,
    PRECISION: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BK: tl.constexpr,
):
    """acc (BM, BN) += a[rows] · b[:, n], rows as `lying` gives them; EVEN_N, EVEN_K where the tiles divide N and K."""
    k = tl.arange(0, BK)
    a = a_ptr + rows[:, None] * a_stride + k[None, :]
    b = b_ptr + n.to(tl.int64)[None, :] * b_stride_n + k.to(tl.int64)[:, None] * b_stride_k
    for start in range(0, K, BK):
        inside = k < K - start
        left = load(a, None, inside[None, :], True, EVEN_K)
        right = load(b, inside[:, None], (n < N)[None, :], EVEN_K, EVEN_N)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
        a += BK
        b += BK * b_stride_k
    return acc


@triton.jit
def halves(tile):
    """The left and the right half of a tile's columns: epilogues work on parts, which take fewer registers."""
    BM: tl.constexpr = tile.shape[0]
    BN: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, (BM, 2, BN // 2)), (0, 2, 1)))
