"""Weighted k-means, the slow and obvious way: the specification of `fusion_kernels::kmeans`.

One problem after the other, each with a random stream of its own that starts at `seed`, so that no problem can see
another one: its result is the same bits alone or in any batch. Whatever the dtype of `x`, points are centred (their
weighted mean is subtracted) and the arithmetic is float64; only the results are rounded to the dtype of `x`. That
keeps cancellation in `|x|² - 2 x·c + |c|²` out of the specification, and leaves near-ties to be decided by the data.

Sources: Lloyd 1982 (the iteration); Arthur & Vassilvitskii 2007 (k-means++, here in the greedy variant with several
trials per step); Hartigan 1975 and Telgarsky & Vattani 2010 (moves of single points that lower the inertia).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor

from fusion_kernels.kmeans.settling import Partition, label_idle, nearest, settle
from fusion_kernels.library import check_name

# A squared distance of a point x is known up to a few rounding errors of |x|²: differences below this multiple of
# eps |x|² are ties. It covers the largest error seen for sums of tens of thousands of terms.
_SLACK = 16
# Entries of one block of point-to-centroid distances (64 MiB of float64).
_BLOCK_ENTRIES = 1 << 23

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Status(IntEnum):
    """How one k-means problem ended. Where several hold, the largest value is reported.

    Attributes:
        OK: converged; every cluster has points.
        MAX_ITER: stopped by `max_iter` before it converged. The result is valid.
        EMPTY_CLUSTERS: some clusters have no points: there are fewer (distinct ones of positive weight) than clusters,
            or `max_iter` is 0. The result is valid; the centroids of empty clusters are finite.
        ZERO_WEIGHT: every weight is zero. Labels, centroids and inertia are 0.
        NON_FINITE: NaN, infinity or squares out of range in `x` or `init`. Labels are 0, centroids and inertia NaN.
        LARGE_INERTIA: the inertia is infinite in its dtype, all else right. Scale x or weights down, or pass float64.

    Examples:
        >>> fusion_kernels.Status(int(fusion_kernels.kmeans(torch.zeros(5, 2), 3).status)).name
        'EMPTY_CLUSTERS'
    """

    OK = 0
    MAX_ITER = 1
    EMPTY_CLUSTERS = 2
    ZERO_WEIGHT = 3
    NON_FINITE = 4
    LARGE_INERTIA = 5


ALGORITHMS = ("hartigan", "lloyd")
SEEDINGS = ("k-means++", "random")


@dataclass(frozen=True)
class Options:
    """How problems are to be solved: what every backend is told, in the order of the operator's schema.

    Attributes:
        n_clusters: K.
        seeding: `"k-means++"` or `"random"`; meaningless where centroids or labels are given.
        n_init: seedings to try.
        algorithm: `"hartigan"` or `"lloyd"`.
        max_iter: most Lloyd iterations, and most rounds of Hartigan moves after them.
        tol: squared shift of all centroids at which Lloyd stops, relative to the mean variance of a column.
        seed: of the random stream, which every problem starts anew.
        workspace_bytes: bound on a backend's own memory, or None for its default; the reference has none to bound.
    """

    n_clusters: int
    seeding: str = "k-means++"
    n_init: int = 1
    algorithm: str = "hartigan"
    max_iter: int = 100
    tol: float = 0.0
    seed: int = 0
    workspace_bytes: int | None = None

    def __post_init__(self) -> None:
        """Raise ValueError unless algorithm and seeding are known: no backend can take one for another."""
        check_name("algorithm", self.algorithm, ALGORITHMS)
        check_name("init", self.seeding, SEEDINGS)

    @property
    def hartigan(self) -> bool:
        """Whether Hartigan's moves follow Lloyd's iteration."""
        return self.algorithm == "hartigan"


@dataclass(frozen=True)
class _Points:
    """The n points of positive weight of one problem, in one dtype: that of the arithmetic.

    Attributes:
        rows: (n, D), as given.
        offset: (D,), their weighted mean.
        x: (n, D), rows - offset.
        w: (n,), the weights.
        sq: (n,), squared norms of x.
        slack: (n,), how far two squared distances of a point may differ and still be a tie.
    """

    rows: Tensor
    offset: Tensor
    x: Tensor
    w: Tensor
    sq: Tensor
    slack: Tensor


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
    special = special_case(rows, w, start, n_clusters)
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
        best = settle(rows[active], w[active], best, options.max_iter > 0, nearest, rounded_means)

    labels = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    labels[active] = best.labels
    filled = torch.bincount(best.labels, minlength=n_clusters) > 0
    idle = w == 0
    moves = options.max_iter > 0 and len(active) > n_clusters
    labels[idle], centroids = label_idle(rows[idle], best.centroids, filled, moves, nearest)
    status = status_of(best.converged, bool(filled.all()))
    return replace(best, labels=labels, centroids=centroids), status


def special_case(rows: Tensor, w: Tensor, start: Tensor | None, n_clusters: int) -> tuple[Partition, Status] | None:
    """The result for one problem that needs no clustering: not finite, no weight, or no more points than clusters.

    Args:
        rows: (N, D) points.
        w: (N,) weights.
        start: None, (K, D) initial centroids or (N,) labels.
    """
    N, D = rows.shape
    zeros = torch.zeros(N, dtype=torch.int64, device=rows.device)
    given_centroids = start is not None and start.is_floating_point()
    if not is_finite(rows) or (start is not None and given_centroids and not is_finite(start)):
        return Partition(zeros, rows.new_full((n_clusters, D), math.nan), math.nan, 0, True), Status.NON_FINITE
    if N > 0 and not bool((w > 0).any()):
        return Partition(zeros, rows.new_zeros(n_clusters, D), 0.0, 0, True), Status.ZERO_WEIGHT
    if n_clusters >= N:
        return one_point_each(rows, n_clusters), Status.EMPTY_CLUSTERS if n_clusters > N else Status.OK
    return None


def moment(rows: Tensor, w: Tensor) -> float:
    """Weighted sum of the squared distances of the points (n, D) to their weighted mean, in float64."""
    offset = (w / w.sum()) @ rows.to(torch.float64)
    return float(w @ (rows.to(torch.float64) - offset).square().sum(1))


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


def rounded_means(rows: Tensor, w: Tensor, labels: Tensor, empty: Tensor) -> Tensor:
    """`_means` in float64, rounded to the dtype of `rows`."""
    return _means(rows.to(torch.float64), w, labels, empty.to(torch.float64)).to(rows.dtype)


def best_run(rows: Tensor, w: Tensor, start: Tensor | None, options: Options) -> Partition:
    """The best of `n_init` runs on n > K points of positive weight, in the dtype of `rows`; the first of equals."""
    points = _centre(rows, w)
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


def _centre(rows: Tensor, w: Tensor) -> _Points:
    offset = (w / w.sum()) @ rows
    x = rows - offset
    sq = x.square().sum(1)
    return _Points(rows, offset, x, w, sq, _SLACK * torch.finfo(x.dtype).eps * sq)


def _run(points: _Points, start: Tensor | None, options: Options, generator: torch.Generator) -> Partition:
    """Seed, iterate, and return the partition with centroids in the original coordinates."""
    labels = None
    if start is None:
        draw = _seed_random if options.seeding == "random" else _seed_plus_plus
        centroids = points.x[draw(points, options.n_clusters, generator)]
    elif start.is_floating_point():
        centroids = start
    else:
        centroids = _means(points.x, points.w, start, points.x.new_zeros(options.n_clusters, points.x.shape[1]))
        labels = _relocate(points, start, centroids)
        centroids = _means(points.x, points.w, labels, centroids)

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
        centroids = _means(points.rows, points.w, labels, centroids)
    return Partition(labels, centroids, inertia, n_iter, converged, at_means and converged)


def _seed_plus_plus(points: _Points, n_clusters: int, generator: torch.Generator) -> Tensor:
    """k-means++: draw by weight times squared distance, keep the best of 2 + floor(ln K) trials of every step.

    Draws are made on the CPU, so that every device sees the same ones. When every point coincides with a seed, the
    first seed fills the remaining places.
    """
    first, levels = seeding_levels(n_clusters, generator)
    device = points.x.device
    seeds = _draw(points.w, first).to(device)
    closest = _seed_distances(points, seeds)[0]
    for step in range(n_clusters - 1):
        mass = points.w * closest
        if not bool((mass > 0).any()):
            return torch.cat([seeds, seeds[:1].expand(n_clusters - len(seeds))])
        candidates = _draw(mass, levels[step]).to(device)
        distances = torch.minimum(closest, _seed_distances(points, candidates))
        best = int((distances @ points.w).argmin())
        seeds = torch.cat([seeds, candidates[best : best + 1]])
        closest = distances[best]
    return seeds


def seeding_levels(n_clusters: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The uniform draws of one k-means++ seeding, all at its start: (1,), then (K - 1, trials), float64 on the CPU.

    A seeding that ends early has then left the stream where any other does, for the next one to go on from.
    """
    trials = 2 + int(math.log(n_clusters))
    first = torch.rand(1, dtype=torch.float64, generator=generator)
    return first, torch.rand(n_clusters - 1, trials, dtype=torch.float64, generator=generator)


def _draw(mass: Tensor, levels: Tensor) -> Tensor:
    """Indices on the CPU, one per level in [0, 1), with probability proportional to `mass`."""
    cumulative = (mass / mass.max()).cpu().to(torch.float64).cumsum(0)
    # The first index whose cumulative mass exceeds the level has mass of its own: mass 0 is never drawn.
    return torch.searchsorted(cumulative, levels * cumulative[-1], right=True)


def _seed_distances(points: _Points, seeds: Tensor) -> Tensor:
    """(L, n) squared distances of all points to the points `seeds`, exactly 0 where they coincide up to rounding."""
    distances = points.sq[seeds, None] + points.sq - 2 * (points.x[seeds] @ points.x.T)
    return torch.where(distances > points.slack, distances, 0.0)


def _seed_random(points: _Points, n_clusters: int, generator: torch.Generator) -> Tensor:
    return random_seeds(points.w, n_clusters, generator).to(points.x.device)


def random_seeds(w: Tensor, n_clusters: int, generator: torch.Generator) -> Tensor:
    """(K,) distinct points on the CPU, drawn one after the other with probability proportional to the weights w (n,).

    Exponential clocks with the weights as rates: the order in which they ring is that of such draws.
    """
    uniform = torch.rand(len(w), dtype=torch.float64, generator=generator)
    rings = -torch.log1p(-uniform) / w.cpu()
    return rings.argsort(stable=True)[:n_clusters]


def _lloyd(
    points: _Points, labels: Tensor | None, centroids: Tensor, max_iter: int, tol: float
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
        moved = _means(points.x, points.w, labels, centroids)
        converged = tol > 0.0 and float((moved - centroids).square().sum()) <= smallest_shift
        centroids = moved
    # The labels are those of the previous centroids; the caller gets the ones of these.
    final = _assign(points, centroids, labels)
    return final, centroids, n_iter, converged or (labels is not None and torch.equal(final, labels))


def _assign(points: _Points, centroids: Tensor, labels: Tensor | None = None) -> Tensor:
    """(n,) labels of the nearest centroids; ties up to rounding keep the current label, else take the lowest id.

    Staying at a tie is what ends the iteration: a point between two equally near centroids would otherwise follow
    their rounding errors back and forth.
    """
    n, K = len(points.x), len(centroids)
    assigned = torch.empty(n, dtype=torch.int64, device=points.x.device)
    step = max(1, _BLOCK_ENTRIES // K)
    for begin in range(0, n, step):
        block = slice(begin, begin + step)
        distances = _distances(points.x[block], points.sq[block], centroids)
        bound = distances.amin(1) + points.slack[block]
        assigned[block] = (distances <= bound[:, None]).to(torch.uint8).argmax(1)
        if labels is not None:
            current = distances.gather(1, labels[block, None]).squeeze(1)
            stay = current <= bound + points.slack[block]
            assigned[block] = torch.where(stay, labels[block], assigned[block])
    return assigned


def _distances(x: Tensor, sq: Tensor, centroids: Tensor) -> Tensor:
    """(n, K) squared distances of the centred points x (n, D) with squared norms sq (n,) to the centroids (K, D)."""
    return (x @ centroids.T).mul_(-2).add_(sq[:, None]).add_(centroids.square().sum(1))


def _means(x: Tensor, w: Tensor, labels: Tensor, empty: Tensor) -> Tensor:
    """(K, D) weighted means of the rows of x (n, D) by label; clusters without rows take theirs from `empty`.

    Segments of sorted rows are summed one row after the other: the same order, and the same bits, on every run.
    """
    lengths = torch.bincount(labels, minlength=len(empty))
    order = labels.argsort(stable=True)
    # Weights become shares of their cluster first: the mean of a single point is then exactly that point.
    share = w / _weights(w, labels, len(empty))[labels]
    sums = torch.segment_reduce(x[order] * share[order, None], "sum", lengths=lengths, axis=0)
    return torch.where(lengths[:, None] > 0, sums, empty)


def _weights(w: Tensor, labels: Tensor, n_clusters: int) -> Tensor:
    """(K,) sums of the weights w (n,) by label."""
    order = labels.argsort(stable=True)
    # The column keeps the sum sequential on every device, as in `_means`.
    sums = torch.segment_reduce(w[order, None], "sum", lengths=torch.bincount(labels, minlength=n_clusters), axis=0)
    return sums.squeeze(1)


def _relocate(points: _Points, labels: Tensor, centroids: Tensor) -> Tensor:
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


def _hartigan(points: _Points, labels: Tensor, centroids: Tensor, max_iter: int) -> tuple[Tensor, Tensor, int, bool]:
    """Move single points while that lowers the inertia: labels, their means, rounds made, whether it converged.

    Moving x of weight w from cluster a to b changes both means, and lowers the inertia by exactly
    `w (W_a / (W_a - w) |x - a|² - W_b / (W_b + w) |x - b|²)`. Moves between disjoint pairs of clusters do not affect
    each other, so that a round of them lowers it by the sum.
    """
    x, w, K = points.x, points.w, len(centroids)
    point = torch.arange(len(x), device=x.device)
    labels = labels.clone()
    centroids = _means(x, w, labels, centroids)
    distances = _distances(x, points.sq, centroids)
    for n_iter in range(1, max_iter + 1):
        W = _weights(w, labels, K)
        rest = W[labels] - w
        # Nothing is left beside a single point, nor, in float64, beside one that outweighs the others completely.
        movable = rest > 0
        leave = W[labels] / torch.where(movable, rest, 1.0)
        cost = distances * (W / (W + w[:, None]))
        cost[point, labels] = math.inf
        enter, target = cost.min(1)
        gain = w * (leave * distances[point, labels] - enter)
        movable &= gain > w * (leave + 1) * points.slack
        if not bool(movable.any()):
            return labels, centroids, n_iter, True
        moves = _disjoint_moves(movable.nonzero().squeeze(1), gain, labels, target)
        touched = torch.zeros(K, dtype=torch.bool, device=x.device)
        touched[labels[moves]] = True
        touched[target[moves]] = True
        labels[moves] = target[moves]
        # The other clusters keep their members, and so their means and distances.
        members = touched[labels]
        centroids = _means(x[members], w[members], labels[members], centroids)
        distances[:, touched] = _distances(x, points.sq, centroids[touched])
    return labels, centroids, max_iter, False


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
