"""Weighted k-means, the slow and obvious way: the specification of `fusion_kernels::kmeans`.

One problem after the other, each with a random stream of its own that starts at `seed`, so that no problem can see
another one: its result is the same bits alone or in any batch. Whatever the dtype of `x`, points are centred (their
weighted mean is subtracted) and the arithmetic is float64; only the results are rounded to the dtype of `x`. That
keeps cancellation in `|x|² - 2 x·c + |c|²` out of the specification, and leaves near-ties to be decided by the data.

Sources: Lloyd 1982 (the iteration); Arthur & Vassilvitskii 2007 (k-means++, here in the greedy variant with several
trials per step); Hartigan 1975 and Telgarsky & Vattani 2010 (moves of single points that lower the inertia); Dhillon &
Modha 2001 and Hornik et al. 2012 (spherical k-means, `metric="cosine"`); Dhillon, Guan & Kogan 2002 (its moves).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from enum import Enum

import torch
from torch import Tensor

from fusion_kernels.kmeans.metrics import BY_METRIC, Points, means_of, squared_distances, unit_rows, weights_of
from fusion_kernels.kmeans.seeding import plus_plus, random_seeds
from fusion_kernels.kmeans.settling import Partition, label_idle, nearest, settle
from fusion_kernels.kmeans.types import Algorithm, Metric, Options, Results, Seeding, Status
from fusion_kernels.library import by_member

#: The options that stand here: any other is declined, until it does.
KNOWN: frozenset[Enum] = frozenset(
    {
        Seeding.PLUS_PLUS,
        Seeding.RANDOM,
        Algorithm.HARTIGAN,
        Algorithm.LLOYD,
        Metric.EUCLIDEAN,
        Metric.COSINE,
    }
)
# Entries of one block of point-to-centroid distances (64 MiB of float64).
_BLOCK_ENTRIES = 1 << 23


def kmeans(x: Tensor, sample_weight: Tensor | None, init: Tensor | None, options: Options) -> Results:
    """Cluster each problem of a batch; see :func:`fusion_kernels.kmeans.kmeans` for the meaning of the arguments.

    Args:
        x: (B, N, D) float32 or float64.
        sample_weight: (B, N), dtype of x, non-negative and finite; None for ones.
        init: None to seed by `options.seeding`; (B, K, D), dtype of x, centroids; or (B, N) int64 labels in [0, K).
        options: the rest.

    Returns:
        labels (B, N) int64, centroids (B, K, D) and inertia (B,) in the dtype of x, counts (B, K), n_iter (B,) and
        status (B,) int64.
    """
    solve: dict[Metric, Callable[..., Results]] = {
        Metric.EUCLIDEAN: _kmeans,
        Metric.COSINE: functools.partial(on_sphere, _kmeans),
    }
    return by_member(solve, options.metric)(x, sample_weight, init, options)


def on_sphere(
    solve: Callable[..., Results], x: Tensor, sample_weight: Tensor | None, init: Tensor | None, options: Options
) -> Results:
    """`metric="cosine"`: the results of `solve` for the points, and the given centroids, divided by their norms.

    Points of zeros get weight 0 on the way; their labels are those of the first cluster that has points. `solve` finds
    centroids of norm 1 and counts squared distances, which are halved here.
    """
    unit = unit_rows(x)
    zeros = ~unit.any(2)
    if bool(zeros.any()):
        w = x.new_ones(x.shape[:2]) if sample_weight is None else sample_weight
        sample_weight = torch.where(zeros, 0.0, w)
    start = unit_rows(init) if init is not None and init.is_floating_point() else init
    labels, centroids, inertia, counts, n_iter, status = solve(unit, sample_weight, start, options)
    if bool(zeros.any()):
        counts = torch.zeros_like(counts).scatter_add_(1, labels, (~zeros).long())
        first = (counts > 0).to(torch.uint8).argmax(1, keepdim=True)
        labels = torch.where(zeros, first, labels)
        counts.scatter_add_(1, labels, zeros.long())
    return labels, centroids, inertia / 2, counts, n_iter, status


def _kmeans(x: Tensor, sample_weight: Tensor | None, init: Tensor | None, options: Options) -> Results:
    (B, N, D), n_clusters = x.shape, options.n_clusters
    labels = torch.zeros(B, N, dtype=torch.int64, device=x.device)
    centroids = x.new_zeros(B, n_clusters, D)
    inertia = torch.zeros(B, dtype=torch.float64, device=x.device)
    counts = torch.zeros(B, n_clusters, dtype=torch.int64, device=x.device)
    n_iter = torch.zeros(B, dtype=torch.int64, device=x.device)
    status = torch.zeros(B, dtype=torch.int64, device=x.device)
    for b in range(B):
        rows = x[b].contiguous()
        w = rows.new_ones(N, dtype=torch.float64) if sample_weight is None else sample_weight[b].to(torch.float64)
        start = None if init is None else init[b]
        if start is not None and start.is_floating_point():
            start = start.to(torch.float64)
        settled, problem_status = _cluster(rows, w, start, options)
        labels[b] = settled.labels
        centroids[b] = settled.centroids
        inertia[b] = settled.inertia
        counts[b] = torch.bincount(settled.labels, minlength=n_clusters)
        n_iter[b] = settled.n_iter
        status[b] = int(problem_status)
    return in_dtype((labels, centroids, inertia, counts, n_iter, status), x.dtype)


def in_dtype(results: Results, dtype: torch.dtype) -> Results:
    """The results with their inertia, float64, in `dtype`, and the status of problems for which that is too narrow."""
    labels, centroids, inertia, counts, n_iter, status = results
    narrow = inertia.to(dtype)
    status = torch.where(narrow.isinf(), int(Status.LARGE_INERTIA), status)
    return labels, centroids, narrow, counts, n_iter, status


def _cluster(rows: Tensor, w: Tensor, start: Tensor | None, options: Options) -> tuple[Partition, Status]:
    """One problem: the special cases, then the best of `n_init` runs on the points of positive weight."""
    n_clusters = options.n_clusters
    special = special_case(rows, w, start, options)
    if special is not None:
        return special

    # Points without weight take no part: they are labelled at the end. The others are copied even when they are all
    # points, because the bits of a product can depend on where in memory, and so where in the batch, a problem lies.
    active = (w > 0).nonzero().squeeze(1)
    if start is not None and not start.is_floating_point():
        start = start[active]
    if len(active) <= n_clusters:
        best = one_point_each(rows[active], n_clusters)
    else:
        best = best_run(rows[active].to(torch.float64), w[active], start, options)
        best = replace(best, centroids=best.centroids.to(rows.dtype))
        _, means = by_member(BY_METRIC, options.metric)
        best = settle(rows[active], w[active], best, options.max_iter > 0, nearest, means)

    labels = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    labels[active] = best.labels
    filled = torch.bincount(best.labels, minlength=n_clusters) > 0
    idle = w == 0
    moves = options.max_iter > 0 and len(active) > n_clusters
    labels[idle], centroids = label_idle(rows[idle], best.centroids, filled, moves, nearest)
    status = status_of(best.converged, bool(filled.all()))
    return replace(best, labels=labels, centroids=centroids), status


def special_case(rows: Tensor, w: Tensor, start: Tensor | None, options: Options) -> tuple[Partition, Status] | None:
    """The result for one problem that needs no clustering: not finite, no weight, or no more points than clusters.

    Args:
        rows: (N, D) points.
        w: (N,) weights.
        start: None, (K, D) initial centroids or (N,) labels.
    """
    (N, D), n_clusters = rows.shape, options.n_clusters
    zeros = torch.zeros(N, dtype=torch.int64, device=rows.device)
    given_centroids = start is not None and start.is_floating_point()
    if not is_finite(rows) or (start is not None and given_centroids and not is_finite(start)):
        return Partition(zeros, rows.new_full((n_clusters, D), math.nan), math.nan, 0, True), Status.NON_FINITE
    if N > 0 and not bool((w > 0).any()):
        return Partition(zeros, rows.new_zeros(n_clusters, D), 0.0, 0, True), Status.ZERO_WEIGHT
    without_direction = options.metric is Metric.COSINE and not bool(rows.any(1).all())
    if n_clusters >= N and not without_direction:
        return one_point_each(rows, n_clusters), Status.EMPTY_CLUSTERS if n_clusters > N else Status.OK
    return None


def is_finite(rows: Tensor) -> bool:
    """Whether the sum of squares is finite in float64."""
    return math.isfinite(float(rows.to(torch.float64).square().sum()))


def status_of(converged: bool, all_filled: bool) -> Status:
    """How a problem that was clustered ended."""
    if not all_filled:
        return Status.EMPTY_CLUSTERS
    return Status.OK if converged else Status.MAX_ITER


def assign(x: Tensor, centroids: Tensor) -> Tensor:
    """Nearest of the centroids (B, K, D) to each point of x (B, N, D): (B, N) int64, ties the lowest id.

    A point that is not finite is labelled 0, and so are all if a centroid is not.
    """
    labels = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device)
    for b in range(len(x)):
        labels[b] = nearest(x[b], centroids[b])
    return labels


def best_run(rows: Tensor, w: Tensor, start: Tensor | None, options: Options) -> Partition:
    """The best of `n_init` runs on n > K points of positive weight, in the dtype of `rows`; the first of equals."""
    seen_as, _ = by_member(BY_METRIC, options.metric)
    points = seen_as.of(rows, w)
    if start is not None and start.is_floating_point():
        start = start - points.offset
    generator = torch.Generator().manual_seed(options.seed)
    best = _run(points, start, options, generator)
    for _ in range(options.n_init - 1):
        other = _run(points, start, options, generator)
        best = other if other.inertia < best.inertia else best
    return best


def one_point_each(rows: Tensor, n_clusters: int) -> Partition:
    """No more points than clusters: every point is a centroid; the clusters left over repeat the last point."""
    n, D = rows.shape
    labels = torch.arange(n, device=rows.device)
    last = rows[-1:] if n else rows.new_zeros(1, D)
    return Partition(labels, torch.cat([rows, last.expand(n_clusters - n, D)]), 0.0, 0, True)


def _run(points: Points, start: Tensor | None, options: Options, generator: torch.Generator) -> Partition:
    """Seed, iterate, and return the partition with centroids in the original coordinates."""
    labels = None
    if start is None:
        centroids = points.x[_seeds(points, options, generator)]
    elif start.is_floating_point():
        centroids = start
    else:
        centroids = points.centroids(start, points.anywhere(options.n_clusters))
        labels = _relocate(points, start, centroids)
        centroids = points.centroids(labels, centroids)

    labels, centroids, n_iter, converged = _lloyd(points, labels, centroids, options.max_iter, options.tol)
    # Lloyd that was stopped returns the centroids that its labels are nearest to, not the labels' means.
    at_means = converged and options.tol == 0.0
    if options.hartigan:
        labels, centroids, rounds, converged = _hartigan(points, labels, centroids, options.max_iter)
        n_iter += rounds
        at_means = True
    inertia = float(points.w @ (points.x - centroids[labels]).square().sum(1))
    centroids = centroids + points.offset
    if at_means:
        centroids = points.placed(means_of(points.rows, points.w, labels, centroids), centroids)
    return Partition(labels, centroids, inertia, n_iter, converged, at_means and converged)


def _seeds(points: Points, options: Options, generator: torch.Generator) -> Tensor:
    n_clusters = options.n_clusters
    draw = {
        Seeding.PLUS_PLUS: lambda: plus_plus(points.x, points.w, points.sq, points.slack, n_clusters, generator),
        Seeding.RANDOM: lambda: random_seeds(points.w, n_clusters, generator).to(points.x.device),
    }
    return by_member(draw, options.seeding)()


def _lloyd(
    points: Points, labels: Tensor | None, centroids: Tensor, max_iter: int, tol: float
) -> tuple[Tensor, Tensor, int, bool]:
    """Lloyd's iteration: labels, the centroids that they are nearest to, passes made, whether it converged."""
    variance = points.w @ points.sq / (points.w.sum() * points.x.shape[1])
    smallest_shift = tol * float(variance)
    n_iter, converged = 0, False
    while n_iter < max_iter and not converged:
        n_iter += 1
        assigned = _relocate(points, _assign(points, centroids, labels), centroids)
        if labels is not None and torch.equal(assigned, labels):
            return labels, centroids, n_iter, True
        labels = assigned
        moved = points.centroids(labels, centroids)
        converged = tol > 0.0 and float((moved - centroids).square().sum()) <= smallest_shift
        centroids = moved
    # The labels are those of the previous centroids; the caller gets the ones of these.
    final = _assign(points, centroids, labels)
    return final, centroids, n_iter, converged or (labels is not None and torch.equal(final, labels))


def _assign(points: Points, centroids: Tensor, labels: Tensor | None = None) -> Tensor:
    """(n,) labels of the nearest centroids; ties up to rounding keep the current label, else take the lowest id.

    Staying at a tie is what ends the iteration: a point between two equally near centroids would otherwise follow
    their rounding errors back and forth.
    """
    n, K = len(points.x), len(centroids)
    assigned = torch.empty(n, dtype=torch.int64, device=points.x.device)
    step = max(1, _BLOCK_ENTRIES // K)
    for begin in range(0, n, step):
        block = slice(begin, begin + step)
        distances = squared_distances(points.x[block], points.sq[block], centroids)
        bound = distances.amin(1) + points.slack[block]
        assigned[block] = (distances <= bound[:, None]).to(torch.uint8).argmax(1)
        if labels is not None:
            current = distances.gather(1, labels[block, None]).squeeze(1)
            stay = current <= bound + points.slack[block]
            assigned[block] = torch.where(stay, labels[block], assigned[block])
    return assigned


def _relocate(points: Points, labels: Tensor, centroids: Tensor) -> Tensor:
    """Give every empty cluster the point that costs most where it is, from a cluster with other members.

    In order of cluster id, by the largest weighted squared distance, ties to the lowest index; nothing moves once
    all points lie on their centroids.
    """
    members = torch.bincount(labels, minlength=len(centroids))
    empty = (members == 0).nonzero().squeeze(1).tolist()
    if not empty:
        return labels
    labels = labels.clone()
    distances = (points.x - centroids[labels]).square().sum(1)
    cost = torch.where(distances > points.slack, points.w * distances, 0.0)
    for cluster in empty:
        available = torch.where(members[labels] > 1, cost, 0.0)
        largest = available.max()
        if float(largest) <= 0.0:
            break
        point = int((available == largest).nonzero()[0])
        members[labels[point]] -= 1
        members[cluster] += 1
        labels[point] = cluster
        cost[point] = 0.0
    return labels


def _hartigan(points: Points, labels: Tensor, centroids: Tensor, max_iter: int) -> tuple[Tensor, Tensor, int, bool]:
    """Move single points while that lowers the inertia: labels, their centroids, rounds made, whether it converged.

    Moving x of weight w from cluster a to b changes both means, and lowers the inertia by exactly
    `w (W_a / (W_a - w) |x - a|² - W_b / (W_b + w) |x - b|²)`. Moves between disjoint pairs of clusters do not affect
    each other, so that a round of them lowers it by the sum.
    """
    x, w, K = points.x, points.w, len(centroids)
    point = torch.arange(len(x), device=x.device)
    labels = labels.clone()
    means = means_of(x, w, labels, centroids)
    compared = points.compared(means)
    for n_iter in range(1, max_iter + 1):
        W = weights_of(w, labels, K)
        cost = points.entering(compared, W, means)
        cost[point, labels] = math.inf
        enter, target = cost.min(1)
        leave, slack = points.leaving(compared[point, labels], labels, W, means)
        gain = w * (leave - enter)
        # Nothing is left beside a single point, nor, in float64, beside one that outweighs the others completely.
        movable = (W[labels] > w) & (gain > w * slack)
        if not bool(movable.any()):
            return labels, points.placed(means, centroids), n_iter, True
        moves = _disjoint_moves(movable.nonzero().squeeze(1), gain, labels, target)
        touched = torch.zeros(K, dtype=torch.bool, device=x.device)
        touched[labels[moves]] = True
        touched[target[moves]] = True
        labels[moves] = target[moves]
        # The other clusters keep their members, and so their means and distances.
        members = touched[labels]
        means = means_of(x[members], w[members], labels[members], means)
        compared[:, touched] = points.compared(means[touched])
    return labels, points.placed(means, centroids), max_iter, False


def _disjoint_moves(movable: Tensor, gain: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """The moves of a round: by falling gain, then rising index, those whose two clusters no earlier one touches."""
    order = movable[gain[movable].argsort(descending=True, stable=True)]
    taken: set[int] = set()
    moves: list[int] = []
    for j, a, b in zip(order.tolist(), labels[order].tolist(), target[order].tolist(), strict=True):
        if a not in taken and b not in taken:
            taken.update((a, b))
            moves.append(j)
    return torch.tensor(moves, dtype=torch.int64, device=labels.device)
