"""Device code: Lloyd's iteration on inner products; no kernel here sees a point's coordinates.

Per problem, `products` (K, stride) holds x_j · m_c for centroid c and point j, and `norms` (K,) holds |m_c|². A
centroid is a weighted mean of points, so its row of products is the weighted mean of their rows of Gram, and its norm
the mean of its own row over its members. Only the clusters that changed since are summed again, from a work list that
the device keeps; the others keep their bits. Sums run over a cluster's members by rising index: no floating-point
atomics, and the same bits on every run.

Labels: -1 a point without weight, which takes no part; -2 a point without a cluster yet. A problem that is done is
skipped by every kernel, so that the host may launch rounds without asking whether any problem is still running.
"""

from enum import IntEnum

import triton
import triton.language as tl


class State(IntEnum):
    """Of a problem, on the device.

    Attributes:
        RUNNING: takes part in the next round.
        FIXED: at a fixed point.
        SETTLED: Lloyd stopped by `tol`.
        ALONE: no more points of positive weight than clusters, each a cluster of its own.
        STOPPED: by `max_iter`.
        SPOILED: not finite, or without weight; nothing is computed.
    """

    RUNNING = 0
    FIXED = 1
    SETTLED = 2
    ALONE = 3
    STOPPED = 4
    SPOILED = 5


# As kernels see them: the compiler takes no members of an enumeration.
RUNNING: tl.constexpr = tl.constexpr(int(State.RUNNING))
FIXED: tl.constexpr = tl.constexpr(int(State.FIXED))
SETTLED: tl.constexpr = tl.constexpr(int(State.SETTLED))
STOPPED: tl.constexpr = tl.constexpr(int(State.STOPPED))
SPOILED: tl.constexpr = tl.constexpr(int(State.SPOILED))

# What _assign_kernel and _commit_kernel are launched for.
STEP: tl.constexpr = tl.constexpr(0)
LAST: tl.constexpr = tl.constexpr(1)
GIVEN: tl.constexpr = tl.constexpr(2)
IDLE: tl.constexpr = tl.constexpr(3)


@triton.jit
def _list_changed(b, changed_ptr, counts_ptr, list_ptr, begin_ptr, length_ptr, K, BK: tl.constexpr):
    """Write the list of changed clusters and where their members go, clear the flags, return the list's length."""
    tl.debug_barrier()
    n = 0
    begin = 0
    for first in range(0, K, BK):
        c = first + tl.arange(0, BK)
        flag = tl.load(changed_ptr + b * K + c, mask=c < K, other=0)
        count = tl.load(counts_ptr + b * K + c, mask=c < K, other=0)
        tl.store(list_ptr + b * K + n + tl.cumsum(flag, 0) - 1, c, mask=flag > 0)
        tl.store(begin_ptr + b * K + c, begin + tl.cumsum(count, 0) - count, mask=flag > 0)
        tl.store(length_ptr + b * K + c, count, mask=flag > 0)
        tl.store(changed_ptr + b * K + c, tl.zeros((BK,), tl.int32), mask=c < K)
        n += tl.sum(flag, 0)
        begin += tl.sum(count, 0)
    return n


@triton.jit(do_not_specialize=["P"])
def _members_kernel(
    n_changed_ptr,
    list_ptr,
    begin_ptr,
    labels_ptr,
    weight_ptr,
    products_ptr,
    members_ptr,
    share_ptr,
    mass_ptr,
    cross_ptr,
    N,
    K,
    stride,
    P,
    TOL: tl.constexpr,
    BLOCK: tl.constexpr,
    BM: tl.constexpr,
):
    """The members of every changed cluster by rising index, their shares of its weight, and that weight.

    P programs per problem take turns with the list. members, share (B, N): those of a cluster begin at its begin;
    mass (B, K) float64. With TOL, cross (B, K) gets the product of the new centroid with the old one.
    """
    b = (tl.program_id(0) // P).to(tl.int64)
    n = tl.load(n_changed_ptr + b)
    for i in range(tl.program_id(0) % P, n, P):
        c = tl.load(list_ptr + b * K + i)
        begin = tl.load(begin_ptr + b * K + c)
        found = 0
        mass = tl.zeros((BLOCK,), tl.float64)
        for first in range(0, N, BLOCK):
            j = first + tl.arange(0, BLOCK)
            inside = tl.load(labels_ptr + b * N + j, mask=j < N, other=-1) == c
            rank = tl.cumsum(inside.to(tl.int32), 0) - 1
            tl.store(members_ptr + b * N + begin + found + rank, j, mask=inside)
            mass += tl.load(weight_ptr + b * N + j, mask=inside, other=0.0)
            found += tl.sum(inside.to(tl.int32), 0)
        total = tl.sum(mass, 0)
        tl.store(mass_ptr + b * K + c, total)
        tl.debug_barrier()
        cross = tl.zeros((BM,), tl.float64)
        for first in range(0, found, BM):
            k = first + tl.arange(0, BM)
            j = tl.load(members_ptr + b * N + begin + k, mask=k < found, other=0)
            share = tl.load(weight_ptr + b * N + j, mask=k < found, other=0.0) / total
            tl.store(share_ptr + b * N + begin + k, share.to(share_ptr.dtype.element_ty), mask=k < found)
            if TOL:
                old = tl.load(products_ptr + (b * K + c) * stride + j, mask=k < found, other=0.0)
                cross += share * old.to(tl.float64)
        if TOL:
            tl.store(cross_ptr + b * K + c, tl.sum(cross, 0))
        tl.debug_barrier()


@triton.jit(do_not_specialize=["P"])
def _products_kernel(
    n_changed_ptr,
    list_ptr,
    begin_ptr,
    length_ptr,
    members_ptr,
    share_ptr,
    gram_ptr,
    products_ptr,
    N,
    K,
    stride,
    P,
    U: tl.constexpr,
    BN: tl.constexpr,
):
    """Rows of products of the changed clusters: shares of rows of gram (B, N, stride), U members at a time."""
    tiles = tl.cdiv(N, BN)
    pid = tl.program_id(0)
    j = (pid % tiles) * BN + tl.arange(0, BN)
    b = (pid // tiles // P).to(tl.int64)
    n = tl.load(n_changed_ptr + b)
    dtype = products_ptr.dtype.element_ty
    for i in range(pid // tiles % P, n, P):
        c = tl.load(list_ptr + b * K + i)
        begin = tl.load(begin_ptr + b * K + c)
        length = tl.load(length_ptr + b * K + c)
        row = tl.zeros((BN,), dtype)
        for first in range(0, length, U):
            k = first + tl.arange(0, U)
            member = tl.load(members_ptr + b * N + begin + k, mask=k < length, other=0)
            share = tl.load(share_ptr + b * N + begin + k, mask=k < length, other=0.0)
            mask = (k < length)[:, None] & (j < N)[None, :]
            rows = tl.load(gram_ptr + (b * N + member)[:, None] * stride + j[None, :], mask=mask, other=0.0)  # (U, BN)
            row += tl.sum(share[:, None] * rows, 0)
        # A cluster without members keeps the centroid that it had.
        tl.store(products_ptr + (b * K + c) * stride + j, row, mask=(j < N) & (tl.zeros_like(j) < length))


@triton.jit(do_not_specialize=["P"])
def _norms_kernel(
    n_changed_ptr,
    list_ptr,
    begin_ptr,
    length_ptr,
    members_ptr,
    share_ptr,
    products_ptr,
    cross_ptr,
    norms_ptr,
    shift_ptr,
    N,
    K,
    stride,
    P,
    TOL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """norms of the changed clusters; with TOL, shift (B, K) float64 gets the squared way that their centroids went."""
    b = (tl.program_id(0) // P).to(tl.int64)
    n = tl.load(n_changed_ptr + b)
    for i in range(tl.program_id(0) % P, n, P):
        c = tl.load(list_ptr + b * K + i)
        begin = tl.load(begin_ptr + b * K + c)
        length = tl.load(length_ptr + b * K + c)
        norm = tl.zeros((BLOCK,), tl.float64)
        for first in range(0, length, BLOCK):
            k = first + tl.arange(0, BLOCK)
            member = tl.load(members_ptr + b * N + begin + k, mask=k < length, other=0)
            share = tl.load(share_ptr + b * N + begin + k, mask=k < length, other=0.0)
            own = tl.load(products_ptr + (b * K + c) * stride + member, mask=k < length, other=0.0)
            norm += share.to(tl.float64) * own.to(tl.float64)
        total = tl.sum(norm, 0)
        if TOL:
            old = tl.load(norms_ptr + b * K + c).to(tl.float64)
            shift = total + old - 2.0 * tl.load(cross_ptr + b * K + c)
            tl.store(shift_ptr + b * K + c, tl.where(length > 0, shift, 0.0))
            tl.debug_barrier()
        tl.store(norms_ptr + b * K + c, total.to(norms_ptr.dtype.element_ty), mask=length > 0)


@triton.jit
def _nearest(
    b, j, slack, best, nearest, products_ptr, norms_ptr, filled_ptr, N, K, stride, BK: tl.constexpr
):  # fmt: skip
    """The least norm - 2 product of the points j (BN,), and the first cluster within slack of it; `best` is inf."""
    for first in range(0, K, BK):
        c = first + tl.arange(0, BK)
        filled = tl.load(filled_ptr + b * K + c, mask=c < K, other=0) > 0
        norm = tl.load(norms_ptr + b * K + c, mask=filled, other=float("inf"))
        mask = filled[:, None] & (j < N)[None, :]
        product = tl.load(products_ptr + (b * K + c)[:, None] * stride + j[None, :], mask=mask, other=0.0)
        value = norm[:, None] - 2.0 * product  # (BK, BN)
        low = tl.min(value, 0)
        near = value <= (low + slack)[None, :]
        lowest = tl.min(tl.where(near, c[:, None], K), 0)
        better = low < best - slack
        best = tl.where(better, low, best)
        nearest = tl.where(better, lowest, nearest)
    return best, nearest


@triton.jit
def _assign_kernel(
    state_ptr,
    products_ptr,
    norms_ptr,
    filled_ptr,
    diagonal_ptr,
    weight_ptr,
    labels_ptr,
    assigned_ptr,
    cost_ptr,
    counts_ptr,
    slack_factor,
    N,
    K,
    stride,
    MODE: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Nearest centroids: assigned (B, N), their weighted squared distances cost (B, N), and the new counts (B, K).

    Distances within the slack are ties: they go to the current cluster, else to the lowest id. Clusters whose entry of
    filled (B, K) is 0 are passed over. GIVEN keeps the labels and computes the cost; IDLE assigns the points without
    weight, and nothing else.
    """
    tiles = tl.cdiv(N, BN)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    state = tl.load(state_ptr + b)
    if MODE == IDLE:
        run = state != SPOILED
    elif MODE == LAST:
        run = (state == RUNNING) | (state == SETTLED)
    else:
        run = state == RUNNING
    if run:
        j = (tl.program_id(0) % tiles) * BN + tl.arange(0, BN)
        current = tl.load(labels_ptr + b * N + j, mask=j < N, other=-3)
        diagonal = tl.load(diagonal_ptr + b * N + j, mask=j < N, other=0.0)
        slack = diagonal * slack_factor
        best = tl.full((BN,), float("inf"), diagonal.dtype)
        nearest = tl.zeros((BN,), tl.int32)
        if MODE != GIVEN:
            best, nearest = _nearest(
                b, j, slack, best, nearest, products_ptr, norms_ptr, filled_ptr, N, K, stride, BK
            )  # fmt: skip
        if MODE == IDLE:
            tl.store(assigned_ptr + b * N + j, nearest, mask=current == -1)
        else:
            known = current >= 0
            at = tl.where(known, current, 0)
            norm = tl.load(norms_ptr + b * K + at, mask=known, other=0.0)
            here = norm - 2.0 * tl.load(products_ptr + (b * K + at) * stride + j, mask=known, other=0.0)
            # The error of a distance grows with both norms.
            margin = slack + norm * slack_factor
            stay = known
            if MODE != GIVEN:
                stay = stay & (here <= best + 2.0 * margin)
            assigned = tl.where(stay, current, nearest)
            distance = diagonal + tl.where(stay, here, best)
            weight = tl.load(weight_ptr + b * N + j, mask=j < N, other=0.0)
            cost = tl.where((distance > margin) & (weight > 0.0), weight * distance.to(tl.float64), 0.0)
            tl.store(cost_ptr + b * N + j, cost, mask=j < N)
            tl.store(assigned_ptr + b * N + j, tl.where(current == -1, -1, assigned), mask=j < N)
            moved = (assigned != current) & (current != -1) & (j < N)
            tl.atomic_add(counts_ptr + b * K + assigned, tl.full((BN,), 1, tl.int32), mask=moved, sem="relaxed")
            tl.atomic_add(counts_ptr + b * K + at, tl.full((BN,), -1, tl.int32), mask=moved & known, sem="relaxed")


@triton.jit
def _relocate(b, assigned_ptr, cost_ptr, counts_ptr, N, K, BLOCK: tl.constexpr):
    """Give every empty cluster the dearest point of a cluster with other members, in order of cluster id."""
    empty = 0
    for first in range(0, K, BLOCK):
        c = first + tl.arange(0, BLOCK)
        empty += tl.sum((tl.load(counts_ptr + b * K + c, mask=c < K, other=1) == 0).to(tl.int32), 0)
    while empty > 0:
        target = K
        for first in range(0, K, BLOCK):
            c = first + tl.arange(0, BLOCK)
            count = tl.load(counts_ptr + b * K + c, mask=c < K, other=1)
            target = tl.minimum(target, tl.min(tl.where(count == 0, c, K), 0))
        top = tl.zeros((), tl.float64)
        point = N
        for first in range(0, N, BLOCK):
            j = first + tl.arange(0, BLOCK)
            label = tl.load(assigned_ptr + b * N + j, mask=j < N, other=-1)
            others = tl.load(counts_ptr + b * K + label, mask=label >= 0, other=0) > 1
            cost = tl.load(cost_ptr + b * N + j, mask=others, other=0.0)
            dearest = tl.max(cost, 0)
            at = tl.min(tl.where(cost == dearest, j, N), 0)
            point = tl.where(dearest > top, at, point)
            top = tl.maximum(top, dearest)
        # Nothing is left to move once all available points lie on their centroids.
        empty = tl.where(top > 0.0, empty - 1, 0)
        if top > 0.0:
            label = tl.load(assigned_ptr + b * N + point)
            count = tl.load(counts_ptr + b * K + label)
            tl.debug_barrier()
            tl.store(counts_ptr + b * K + label, count - 1)
            tl.store(counts_ptr + b * K + target, 1)
            tl.store(assigned_ptr + b * N + point, target)
            tl.store(cost_ptr + b * N + point, top * 0.0)
        tl.debug_barrier()


@triton.jit
def _commit_kernel(
    state_ptr,
    n_iter_ptr,
    n_changed_ptr,
    list_ptr,
    begin_ptr,
    length_ptr,
    changed_ptr,
    labels_ptr,
    assigned_ptr,
    cost_ptr,
    counts_ptr,
    N,
    K,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
    BK: tl.constexpr,
):
    """Refill empty clusters, make assigned the labels, decide whether that was the end, and list what changed.

    One program per problem. STEP counts a pass and ends at a fixed point; LAST takes the nearest centroids as they are
    and decides between converged and stopped; GIVEN only refills.
    """
    b = tl.program_id(0).to(tl.int64)
    state = tl.load(state_ptr + b)
    run = state == RUNNING
    if MODE == LAST:
        run = run | (state == SETTLED)
    n_changed = 0
    if run:
        if MODE != LAST:
            _relocate(b, assigned_ptr, cost_ptr, counts_ptr, N, K, BLOCK)
        moves = 0
        for first in range(0, N, BLOCK):
            j = first + tl.arange(0, BLOCK)
            new = tl.load(assigned_ptr + b * N + j, mask=j < N, other=0)
            old = tl.load(labels_ptr + b * N + j, mask=j < N, other=0)
            moved = new != old
            one = tl.full((BLOCK,), 1, tl.int32)
            tl.store(changed_ptr + b * K + new, one, mask=moved)
            tl.store(changed_ptr + b * K + old, one, mask=moved & (old >= 0))
            tl.store(labels_ptr + b * N + j, new, mask=moved)
            moves += tl.sum(moved.to(tl.int32), 0)
        if MODE == STEP:
            tl.store(n_iter_ptr + b, tl.load(n_iter_ptr + b) + 1)
            if moves == 0:
                tl.store(state_ptr + b, FIXED)
        if MODE == LAST and state == RUNNING:
            tl.store(state_ptr + b, tl.where(moves == 0, FIXED, STOPPED))
        if moves > 0:
            n_changed = _list_changed(b, changed_ptr, counts_ptr, list_ptr, begin_ptr, length_ptr, K, BK)
    tl.store(n_changed_ptr + b, n_changed)


@triton.jit
def _settle_kernel(state_ptr, n_changed_ptr, list_ptr, shift_ptr, smallest_ptr, K, BLOCK: tl.constexpr):
    """SETTLED once the squared shift of all centroids together is no more than smallest (B,) float64."""
    b = tl.program_id(0).to(tl.int64)
    n = tl.load(n_changed_ptr + b)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        c = tl.load(list_ptr + b * K + i, mask=i < n, other=0)
        total += tl.load(shift_ptr + b * K + c, mask=i < n, other=0.0)
    if (tl.load(state_ptr + b) == RUNNING) & (tl.sum(total, 0) <= tl.load(smallest_ptr + b)):
        tl.store(state_ptr + b, SETTLED)
