"""Device code: Hartigan's moves of single points, on the products and norms that `_triton_sweep` keeps."""

import triton
import triton.language as tl

from fusion_kernels.kmeans._triton_sweep import FIXED, RUNNING, _list_changed


@triton.jit
def _best_move_kernel(
    state_ptr,
    products_ptr,
    norms_ptr,
    counts_ptr,
    mass_ptr,
    diagonal_ptr,
    weight_ptr,
    labels_ptr,
    gain_ptr,
    target_ptr,
    slack_factor,
    N,
    K,
    stride,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """For every point the cluster to move to and by how much that lowers the inertia.

    gain (B, N) float64, -1 where no move is worth more than the rounding errors of its two distances; target (B, N).
    """
    tiles = tl.cdiv(N, BN)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    if tl.load(state_ptr + b) == RUNNING:
        j = (tl.program_id(0) % tiles) * BN + tl.arange(0, BN)
        label = tl.load(labels_ptr + b * N + j, mask=j < N, other=-1)
        active = label >= 0
        diagonal = tl.load(diagonal_ptr + b * N + j, mask=active, other=0.0)
        weight = tl.load(weight_ptr + b * N + j, mask=active, other=0.0)
        narrow = weight.to(diagonal.dtype)
        best = tl.full((BN,), float("inf"), diagonal.dtype)
        target = tl.zeros((BN,), tl.int32)
        for first in range(0, K, BK):
            c = first + tl.arange(0, BK)
            filled = tl.load(counts_ptr + b * K + c, mask=c < K, other=0) > 0
            norm = tl.load(norms_ptr + b * K + c, mask=filled, other=0.0)
            mass = tl.load(mass_ptr + b * K + c, mask=filled, other=1.0)
            # Finite, so that a weight that is 0 in this precision has no share rather than NaN.
            inverse = tl.minimum(1.0 / mass, 1e38).to(diagonal.dtype)
            mask = filled[:, None] & active[None, :]
            product = tl.load(products_ptr + (b * K + c)[:, None] * stride + j[None, :], mask=mask, other=0.0)
            distance = diagonal[None, :] + (norm[:, None] - 2.0 * product)
            cost = distance / (1.0 + narrow[None, :] * inverse[:, None])  # (BK, BN)
            # A cluster without points costs nothing to enter.
            cost = tl.where(filled[:, None], cost, 0.0)
            cost = tl.where((c < K)[:, None] & (c[:, None] != label[None, :]), cost, float("inf"))
            low = tl.min(cost, 0)
            lowest = tl.min(tl.where(cost == low[None, :], c[:, None], K), 0)
            better = low < best
            best = tl.where(better, low, best)
            target = tl.where(better, lowest, target)
        norm = tl.load(norms_ptr + b * K + label, mask=active, other=0.0)
        mass = tl.load(mass_ptr + b * K + label, mask=active, other=0.0)
        product = tl.load(products_ptr + (b * K + label) * stride + j, mask=active, other=0.0)
        here = (diagonal + (norm - 2.0 * product)).to(tl.float64)
        rest = mass - weight
        leave = mass / tl.where(rest > 0.0, rest, 1.0)
        gain = weight * (leave * here - best.to(tl.float64))
        slack = (diagonal + norm).to(tl.float64) * slack_factor
        worth = active & (rest > 0.0) & (gain > weight * (leave + 1.0) * slack)
        tl.store(gain_ptr + b * N + j, tl.where(worth, gain, -1.0), mask=j < N)
        tl.store(target_ptr + b * N + j, target, mask=j < N)


@triton.jit
def _move(b, i, n, candidate_ptr, labels_ptr, target_ptr, changed_ptr, N, K):
    """Of the candidates i (BLOCK,) the points, their clusters, their targets, and whether neither of these is taken."""
    j = tl.load(candidate_ptr + b * N + i, mask=i < n, other=0)
    source = tl.load(labels_ptr + b * N + j, mask=i < n, other=0)
    target = tl.load(target_ptr + b * N + j, mask=i < n, other=0)
    taken = tl.load(changed_ptr + b * K + source) | tl.load(changed_ptr + b * K + target)
    return j, source, target, (i < n) & (taken == 0)


@triton.jit
def _move_the_best(
    b, n, candidate_ptr, labels_ptr, gain_ptr, target_ptr, changed_ptr, counts_ptr, bid_ptr, bidder_ptr, N, K,
    BLOCK: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One turn of `_select_moves_kernel`: make every move that is the best of the free ones at both of its clusters.

    Atomics are relaxed: a problem is one program's, whose barriers order them with its loads. Any other order would be
    that of the whole device, a fence for each.
    """
    for first in range(0, K, BK):
        c = first + tl.arange(0, BK)
        tl.store(bid_ptr + b * K + c, tl.zeros((BK,), tl.int64), mask=c < K)
        tl.store(bidder_ptr + b * K + c, tl.zeros((BK,), tl.int32) + N, mask=c < K)
    tl.debug_barrier()
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        j, source, target, free = _move(b, i, n, candidate_ptr, labels_ptr, target_ptr, changed_ptr, N, K)
        bid = tl.load(gain_ptr + b * N + j, mask=i < n, other=0.0).to(tl.int64, bitcast=True)
        tl.atomic_max(bid_ptr + b * K + source, bid, mask=free, sem="relaxed")
        tl.atomic_max(bid_ptr + b * K + target, bid, mask=free, sem="relaxed")
    tl.debug_barrier()
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        j, source, target, free = _move(b, i, n, candidate_ptr, labels_ptr, target_ptr, changed_ptr, N, K)
        bid = tl.load(gain_ptr + b * N + j, mask=i < n, other=0.0).to(tl.int64, bitcast=True)
        at_source = free & (tl.load(bid_ptr + b * K + source) == bid)
        at_target = free & (tl.load(bid_ptr + b * K + target) == bid)
        tl.atomic_min(bidder_ptr + b * K + source, j, mask=at_source, sem="relaxed")
        tl.atomic_min(bidder_ptr + b * K + target, j, mask=at_target, sem="relaxed")
    tl.debug_barrier()
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        j, source, target, _ = _move(b, i, n, candidate_ptr, labels_ptr, target_ptr, changed_ptr, N, K)
        # Bidders of this turn are free, so this cannot be a move of an earlier one.
        best = tl.load(bidder_ptr + b * K + source) == j
        best = best & (tl.load(bidder_ptr + b * K + target) == j) & (source != target) & (i < n)
        one = tl.full((BLOCK,), 1, tl.int32)
        tl.store(changed_ptr + b * K + source, one, mask=best)
        tl.store(changed_ptr + b * K + target, one, mask=best)
        tl.atomic_add(counts_ptr + b * K + source, -one, mask=best, sem="relaxed")
        tl.atomic_add(counts_ptr + b * K + target, one, mask=best, sem="relaxed")
        tl.store(labels_ptr + b * N + j, target, mask=best)
    tl.debug_barrier()


@triton.jit
def _select_moves_kernel(
    state_ptr,
    n_iter_ptr,
    n_changed_ptr,
    list_ptr,
    begin_ptr,
    length_ptr,
    changed_ptr,
    labels_ptr,
    gain_ptr,
    target_ptr,
    counts_ptr,
    candidate_ptr,
    bid_ptr,
    bidder_ptr,
    N,
    K,
    BLOCK: tl.constexpr,
    BK: tl.constexpr,
):
    """Make the moves of a round: those that a walk by falling gain, then rising index, takes if no earlier one touches
    their two clusters. One program per problem.

    Without walking: the best move at both of its clusters is taken in any case, and shuts out the others there; repeat
    with what is left. Bids are integers (the bits of a positive float64 are ordered as it is), so that their order does
    not matter. candidate (B, N) int32, bid (B, K) int64 and bidder (B, K) int32 are scratch. A cluster's changed flag
    says at the same time that it is taken.
    """
    b = tl.program_id(0).to(tl.int64)
    n_changed = 0
    if tl.load(state_ptr + b) == RUNNING:
        n = 0
        for first in range(0, N, BLOCK):
            j = first + tl.arange(0, BLOCK)
            worth = tl.load(gain_ptr + b * N + j, mask=j < N, other=-1.0) > 0.0
            tl.store(candidate_ptr + b * N + n + tl.cumsum(worth.to(tl.int32), 0) - 1, j, mask=worth)
            n += tl.sum(worth.to(tl.int32), 0)
        tl.store(n_iter_ptr + b, tl.load(n_iter_ptr + b) + 1)
        if n == 0:
            tl.store(state_ptr + b, FIXED)
        left = n
        while left > 0:
            _move_the_best(
                b, n, candidate_ptr, labels_ptr, gain_ptr, target_ptr, changed_ptr, counts_ptr, bid_ptr, bidder_ptr,
                N, K, BLOCK, BK,
            )  # fmt: skip
            left = 0
            for first in range(0, n, BLOCK):
                i = first + tl.arange(0, BLOCK)
                _, _, _, free = _move(b, i, n, candidate_ptr, labels_ptr, target_ptr, changed_ptr, N, K)
                left += tl.sum(free.to(tl.int32), 0)
            tl.debug_barrier()
        if n > 0:
            n_changed = _list_changed(b, changed_ptr, counts_ptr, list_ptr, begin_ptr, length_ptr, K, BK)
    tl.store(n_changed_ptr + b, n_changed)
