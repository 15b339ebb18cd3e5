"""Device code: greedy k-means++ on rows of Gram (Arthur & Vassilvitskii 2007)."""

import triton
import triton.language as tl

from fusion_kernels.kmeans._triton_sweep import RUNNING


@triton.jit
def _draw(b, weight_ptr, closest_ptr, levels, cursor_total, N, HAS_DISTANCE: tl.constexpr, BLOCK: tl.constexpr):
    """The first points at which the running sum of mass exceeds each of the levels (T,); mass 0 is never drawn."""
    drawn = tl.zeros_like(levels).to(tl.int32) + N
    level = levels * cursor_total
    before = tl.zeros((), tl.float64)
    last = tl.zeros((), tl.int32)
    for first in range(0, N, BLOCK):
        j = first + tl.arange(0, BLOCK)
        mass = tl.load(weight_ptr + b * N + j, mask=j < N, other=0.0)
        if HAS_DISTANCE:
            mass = mass * tl.load(closest_ptr + b * N + j, mask=j < N, other=0.0).to(tl.float64)
        running = before + tl.cumsum(mass, 0)
        above = (running[None, :] > level[:, None]) & (mass > 0)[None, :]  # (T, BLOCK)
        drawn = tl.minimum(drawn, tl.min(tl.where(above, j[None, :], N), 1))
        last = tl.maximum(last, tl.max(tl.where(mass > 0, j, 0), 0))
        before += tl.sum(mass, 0)
    # A level may round up to the whole sum.
    return tl.minimum(drawn, last)


@triton.jit
def _closest(b, seed, gram_ptr, diagonal_ptr, weight_ptr, closest_ptr, slack_factor, N, stride,
             FIRST: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Let the point `seed` be a seed: update closest (B, N), return the sum of weight times it."""
    total = tl.zeros((BLOCK,), tl.float64)
    norm = tl.load(diagonal_ptr + b * N + seed)
    for first in range(0, N, BLOCK):
        j = first + tl.arange(0, BLOCK)
        diagonal = tl.load(diagonal_ptr + b * N + j, mask=j < N, other=0.0)
        product = tl.load(gram_ptr + (b * N + seed) * stride + j, mask=j < N, other=0.0)
        distance = norm + diagonal - 2.0 * product
        distance = tl.where(distance > diagonal * slack_factor, distance, 0.0)
        if not FIRST:
            distance = tl.minimum(distance, tl.load(closest_ptr + b * N + j, mask=j < N, other=0.0))
        tl.store(closest_ptr + b * N + j, distance, mask=j < N)
        total += tl.load(weight_ptr + b * N + j, mask=j < N, other=0.0) * distance.to(tl.float64)
    # The next reader of an entry may be another thread.
    tl.debug_barrier()
    return tl.sum(total, 0)


@triton.jit(do_not_specialize_on_alignment=["levels_ptr"])
def _plus_plus_kernel(
    state_ptr,
    gram_ptr,
    diagonal_ptr,
    weight_ptr,
    total_ptr,
    levels_ptr,
    closest_ptr,
    seeds_ptr,
    slack_factor,
    N,
    K,
    stride,
    TRIALS: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
    BT: tl.constexpr,
):
    """seeds (B, K) int32: every next one is the best of TRIALS draws by weight times squared distance.

    One program per problem. levels (1 + (K - 1) TRIALS,) float64 are uniform random numbers, one for the first seed and
    TRIALS for every other one, the same for all problems. The first seed fills the places that are left once every
    point coincides with a seed. T is a power of two of at least TRIALS; closest (B, N) is scratch; total (B,) the sums
    of weight.
    """
    b = tl.program_id(0).to(tl.int64)
    if tl.load(state_ptr + b) == RUNNING:
        t = tl.arange(0, T)
        level = tl.load(levels_ptr + tl.zeros((T,), tl.int32))
        seed = tl.min(
            _draw(b, weight_ptr, closest_ptr, level, tl.load(total_ptr + b), N, False, BLOCK), 0
        )  # fmt: skip
        tl.store(seeds_ptr + b * K, seed)
        mass = _closest(
            b, seed, gram_ptr, diagonal_ptr, weight_ptr, closest_ptr, slack_factor, N, stride, True, BLOCK
        )  # fmt: skip
        opening = seed
        step = 1
        while (step < K) & (mass > 0.0):
            level = tl.load(levels_ptr + 1 + (step - 1) * TRIALS + t, mask=t < TRIALS, other=0.0)
            drawn = _draw(b, weight_ptr, closest_ptr, level, mass, N, True, BLOCK)  # (T,)
            norm = tl.load(diagonal_ptr + b * N + drawn)
            cost = tl.zeros((T,), tl.float64)
            for first in range(0, N, BT):
                j = first + tl.arange(0, BT)
                diagonal = tl.load(diagonal_ptr + b * N + j, mask=j < N, other=0.0)
                slack = diagonal * slack_factor
                mask = (t < TRIALS)[:, None] & (j < N)[None, :]
                rows = gram_ptr + (b * N + drawn)[:, None] * stride
                distance = norm[:, None] + diagonal[None, :] - 2.0 * tl.load(rows + j[None, :], mask=mask, other=0.0)
                distance = tl.where(distance > slack[None, :], distance, 0.0)
                closest = tl.load(closest_ptr + b * N + j, mask=j < N, other=0.0)
                distance = tl.minimum(distance, closest[None, :])
                weight = tl.load(weight_ptr + b * N + j, mask=j < N, other=0.0)
                cost += tl.sum(distance.to(tl.float64) * weight[None, :], 1)
            cost = tl.where(t < TRIALS, cost, float("inf"))
            best = tl.min(tl.where(cost == tl.min(cost, 0), t, T), 0)
            seed = tl.sum(tl.where(t == best, drawn, 0), 0)
            tl.store(seeds_ptr + b * K + step, seed)
            tl.debug_barrier()
            mass = _closest(
                b, seed, gram_ptr, diagonal_ptr, weight_ptr, closest_ptr, slack_factor, N, stride, False, BLOCK
            )  # fmt: skip
            step += 1
        for first in range(step, K, BLOCK):
            c = first + tl.arange(0, BLOCK)
            tl.store(seeds_ptr + b * K + c, tl.zeros((BLOCK,), tl.int32) + opening, mask=c < K)
