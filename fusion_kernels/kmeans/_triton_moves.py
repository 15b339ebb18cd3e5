"""Device code: Hartigan's moves of single points, on the products and norms that `_triton_sweep` keeps."""

import triton
import triton.language as tl

from fusion_kernels.kmeans._triton_sweep import FIXED, RUNNING, _list_changed


@triton.jit
def _costs(b, c, j, label, diagonal, weight, products_ptr, norms_ptr, counts_ptr, mass_ptr, K, stride):
    """(BK, BN): what the points j (BN,) would cost in the clusters c (BK,); inf in their own, and in a cluster K.

    Costs of points without weight, whose label is negative, mean nothing.
    """
    active = label >= 0
    filled = tl.load(counts_ptr + b * K + c, mask=c < K, other=0) > 0
    norm = tl.load(norms_ptr + b * K + c, mask=filled, other=0.0)
    mass = tl.load(mass_ptr + b * K + c, mask=filled, other=1.0)
    # Finite, so that a weight that is 0 in this precision has no share rather than NaN.
    inverse = tl.minimum(1.0 / mass, 1e38).to(diagonal.dtype)
    mask = filled[:, None] & active[None, :]
    product = tl.load(products_ptr + (b * K + c)[:, None] * stride + j[None, :], mask=mask, other=0.0)
    distance = diagonal[None, :] + (norm[:, None] - 2.0 * product)
    cost = distance / (1.0 + weight.to(diagonal.dtype)[None, :] * inverse[:, None])
    # A cluster without points costs nothing to enter.
    cost = tl.where(filled[:, None], cost, 0.0)
    return tl.where((c < K)[:, None] & (c[:, None] != label[None, :]), cost, float("inf"))


@triton.jit
def _merged(least, target, second, least_too, target_too, second_too):
    """Of two sets of clusters the least cost, the first cluster that has it, and the least cost of all others."""
    other = (least_too < least) | ((least_too == least) & (target_too < target))
    second = tl.minimum(tl.minimum(second, second_too), tl.maximum(least, least_too))
    return tl.minimum(least, least_too), tl.where(other, target_too, target), second


@triton.jit
def _with(costs, c, least, target, second, K):
    """(least, target, second) with the clusters c (BK,) beside, whose costs are (BK, BN)."""
    low = tl.min(costs, 0)
    lowest = tl.min(tl.where(costs == low[None, :], c[:, None], K), 0)
    rest = tl.min(tl.where(c[:, None] == lowest[None, :], float("inf"), costs), 0)
    return _merged(least, target, second, low, lowest, rest)


@triton.jit
def _search_again(
    b, lost_ptr, n, labels_ptr, diagonal_ptr, weight_ptr, products_ptr, norms_ptr, counts_ptr, mass_ptr, least_ptr,
    target_ptr, second_ptr, N, K, stride, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Search all clusters for the n points of a list, BR of them at a time; write what is found of them."""
    for first in range(0, n, BR):
        r = first + tl.arange(0, BR)
        j = tl.load(lost_ptr + r, mask=r < n, other=0)
        label = tl.load(labels_ptr + b * N + j, mask=r < n, other=-1)
        diagonal = tl.load(diagonal_ptr + b * N + j, mask=r < n, other=0.0)
        weight = tl.load(weight_ptr + b * N + j, mask=r < n, other=0.0)
        least = tl.full((BR,), float("inf"), diagonal.dtype)
        second = tl.full((BR,), float("inf"), diagonal.dtype)
        target = tl.zeros((BR,), tl.int32) + K
        for start in range(0, K, BK):
            c = start + tl.arange(0, BK)
            costs = _costs(
                b, c, j, label, diagonal, weight, products_ptr, norms_ptr, counts_ptr, mass_ptr, K, stride
            )  # fmt: skip
            least, target, second = _with(costs, c, least, target, second, K)
        tl.store(least_ptr + b * N + j, least, mask=r < n)
        tl.store(target_ptr + b * N + j, target, mask=r < n)
        tl.store(second_ptr + b * N + j, second, mask=r < n)


@triton.jit
def _gain(b, j, label, diagonal, weight, least, products_ptr, norms_ptr, mass_ptr, slack_factor, K, stride):
    """(BN,) float64: by how much the points' moves at the cost `least` lower the inertia, or -1."""
    active = label >= 0
    norm = tl.load(norms_ptr + b * K + label, mask=active, other=0.0)
    mass = tl.load(mass_ptr + b * K + label, mask=active, other=0.0)
    product = tl.load(products_ptr + (b * K + label) * stride + j, mask=active, other=0.0)
    here = (diagonal + (norm - 2.0 * product)).to(tl.float64)
    rest = mass - weight
    leave = mass / tl.where(rest > 0.0, rest, 1.0)
    gain = weight * (leave * here - tl.where(active, least, 0.0).to(tl.float64))
    slack = (diagonal + norm).to(tl.float64) * slack_factor
    worth = active & (rest > 0.0) & (gain > weight * (leave + 1.0) * slack)
    return tl.where(worth, gain, -1.0)


@triton.jit
def _best_move_kernel(
    state_ptr,
    n_changed_ptr,
    list_ptr,
    products_ptr,
    norms_ptr,
    counts_ptr,
    mass_ptr,
    diagonal_ptr,
    weight_ptr,
    labels_ptr,
    least_ptr,
    target_ptr,
    second_ptr,
    lost_ptr,
    gain_ptr,
    slack_factor,
    N,
    K,
    stride,
    BN: tl.constexpr,
    BC: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """For every point the cluster to move to and by how much that lowers the inertia.

    gain (B, N) float64, -1 where no move is worth more than the rounding errors of its two distances.

    From round to round stay the cheapest other cluster target (B, N), or -1, what it costs, least (B, N), and a bound
    second (B, N) that no other cluster costs less than: only those on the list cost something else since, and are
    looked at, BC at a time. A point that moved, or whose target is on the list with none there now below the bound, is
    lost, and searched for among all clusters, BK at a time for BR points. What is found is what a search among all
    clusters finds for every point. lost (B, N) int32 is scratch.
    """
    tiles = tl.cdiv(N, BN)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    if tl.load(state_ptr + b) == RUNNING:
        begin = (tl.program_id(0) % tiles) * BN
        j = begin + tl.arange(0, BN)
        at = b * N + j
        label = tl.load(labels_ptr + at, mask=j < N, other=-1)
        active = label >= 0
        diagonal = tl.load(diagonal_ptr + at, mask=active, other=0.0)
        weight = tl.load(weight_ptr + at, mask=active, other=0.0)
        target = tl.load(target_ptr + at, mask=active, other=-1)
        found = (target >= 0) & (target != label)
        bound = tl.load(second_ptr + at, mask=found, other=0.0)
        least = tl.full((BN,), float("inf"), diagonal.dtype)
        nearest = tl.zeros((BN,), tl.int32) + K
        second = tl.full((BN,), float("inf"), diagonal.dtype)
        listed = tl.zeros((BN,), tl.int32)
        n_changed = tl.load(n_changed_ptr + b)
        for first in range(0, n_changed, BC):
            i = first + tl.arange(0, BC)
            c = tl.load(list_ptr + b * K + i, mask=i < n_changed, other=K)
            costs = _costs(
                b, c, j, label, diagonal, weight, products_ptr, norms_ptr, counts_ptr, mass_ptr, K, stride
            )  # fmt: skip
            least, nearest, second = _with(costs, c, least, nearest, second, K)
            listed = tl.maximum(listed, tl.max((c[:, None] == target[None, :]).to(tl.int32), 0))
        before = tl.load(least_ptr + at, mask=found & (listed == 0), other=float("inf"))
        least, target, second = _merged(before, target, bound, least, nearest, second)
        lost = active & ~(found & ((listed == 0) | (least < bound)))
        n = tl.sum(lost.to(tl.int32), 0)
        if n > 0:
            lost_ptrs = lost_ptr + b * N + begin
            tl.store(lost_ptrs + tl.cumsum(lost.to(tl.int32), 0) - 1, j, mask=lost)
            tl.debug_barrier()
            _search_again(
                b, lost_ptrs, n, labels_ptr, diagonal_ptr, weight_ptr, products_ptr, norms_ptr, counts_ptr, mass_ptr,
                least_ptr, target_ptr, second_ptr, N, K, stride, BR, BK,
            )  # fmt: skip
            tl.debug_barrier()
            least = tl.where(lost, tl.load(least_ptr + at, mask=lost, other=0.0), least)
            target = tl.where(lost, tl.load(target_ptr + at, mask=lost, other=0), target)
            second = tl.where(lost, tl.load(second_ptr + at, mask=lost, other=0.0), second)
        tl.store(least_ptr + at, least, mask=active)
        tl.store(target_ptr + at, target, mask=active)
        tl.store(second_ptr + at, second, mask=active)
        gain = _gain(
            b, j, label, diagonal, weight, least, products_ptr, norms_ptr, mass_ptr, slack_factor, K, stride
        )  # fmt: skip
        tl.store(gain_ptr + at, gain, mask=j < N)


@triton.jit
def _move(b, i, n, candidate_ptr, labels_ptr, target_ptr, changed_ptr, N, K):
    """Of the candidates i (BLOCK,) the points, their clusters, their targets, and whether neither of these is taken."""
    j = tl.load(candidate_ptr + b * N + i, mask=i < n, other=0)
    source = tl.load(labels_ptr + b * N + j, mask=i < n, other=0)
    target = tl.load(target_ptr + b * N + j, mask=i < n, other=0)
    taken = tl.load(changed_ptr + b * K + source) | tl.load(changed_ptr + b * K + target)
    return j, source, target, (i < n) & (taken == 0)


@triton.jit
def _bid(
    b, n, candidate_ptr, labels_ptr, gain_ptr, target_ptr, changed_ptr, bid_ptr, bidder_ptr, N, K, BLOCK: tl.constexpr
):
    """Let every free candidate bid for its clusters, which have no bidder yet; return how many there are.

    Atomics are relaxed: a problem is one program's, whose barriers order them with its loads. Any other order would be
    that of the whole device, a fence for each.
    """
    left = 0
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        j, source, target, free = _move(b, i, n, candidate_ptr, labels_ptr, target_ptr, changed_ptr, N, K)
        bid = tl.load(gain_ptr + b * N + j, mask=i < n, other=0.0).to(tl.int64, bitcast=True)
        tl.atomic_max(bid_ptr + b * K + source, bid, mask=free, sem="relaxed")
        tl.atomic_max(bid_ptr + b * K + target, bid, mask=free, sem="relaxed")
        nobody = tl.zeros((BLOCK,), tl.int32) + N
        tl.store(bidder_ptr + b * K + source, nobody, mask=free)
        tl.store(bidder_ptr + b * K + target, nobody, mask=free)
        left += tl.sum(free.to(tl.int32), 0)
    tl.debug_barrier()
    return left


@triton.jit
def _move_the_best(
    b, n, candidate_ptr, labels_ptr, gain_ptr, target_ptr, changed_ptr, counts_ptr, bid_ptr, bidder_ptr, N, K,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Make every move that is the best of the free ones at both of its clusters, as `_bid` left them; bids end."""
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
        j = tl.load(candidate_ptr + b * N + i, mask=i < n, other=0)
        source = tl.load(labels_ptr + b * N + j, mask=i < n, other=0)
        target = tl.load(target_ptr + b * N + j, mask=i < n, other=0)
        # Taken clusters keep their bidder: who moved before comes to lie at its target, and is told by that.
        best = tl.load(bidder_ptr + b * K + source, mask=i < n, other=-1) == j
        best = best & (tl.load(bidder_ptr + b * K + target, mask=i < n, other=-1) == j) & (source != target)
        one = tl.full((BLOCK,), 1, tl.int32)
        tl.store(changed_ptr + b * K + source, one, mask=best)
        tl.store(changed_ptr + b * K + target, one, mask=best)
        tl.store(bid_ptr + b * K + source, tl.zeros((BLOCK,), tl.int64), mask=i < n)
        tl.store(bid_ptr + b * K + target, tl.zeros((BLOCK,), tl.int64), mask=i < n)
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
        for first in range(0, K, BK):
            c = first + tl.arange(0, BK)
            tl.store(bid_ptr + b * K + c, tl.zeros((BK,), tl.int64), mask=c < K)
        tl.debug_barrier()
        left = n
        while left > 0:
            left = _bid(
                b, n, candidate_ptr, labels_ptr, gain_ptr, target_ptr, changed_ptr, bid_ptr, bidder_ptr, N, K, BLOCK
            )  # fmt: skip
            if left > 0:
                _move_the_best(
                    b, n, candidate_ptr, labels_ptr, gain_ptr, target_ptr, changed_ptr, counts_ptr, bid_ptr,
                    bidder_ptr, N, K, BLOCK,
                )  # fmt: skip
        if n > 0:
            n_changed = _list_changed(b, changed_ptr, counts_ptr, list_ptr, begin_ptr, length_ptr, K, BK)
    tl.store(n_changed_ptr + b, n_changed)
