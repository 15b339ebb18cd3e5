"""k-means on the CPU: the compiled engine on Gram matrices, or plain products where those cost more.

The points of a problem are centred and scaled by a power of two, multiplied with themselves once (float32 for float32
points, else float64), and every seeding, iteration and move then reads the Gram matrix only: see `csrc/cpu/kmeans.h`.
What is computed is the reference's, in the dtype of the points: near-ties within a few rounding errors of that dtype
may be decided differently on the way. The final centroids are means of the original points and the inertia is summed
from direct distances, both in float64. The engine lists the points whose nearest centroid products of that dtype leave
in doubt, and those are decided from the points themselves. Where too many are, or the clusters are as small as the
rounding, a float32 problem is solved in float64. Problems are independent and every sum has one order, so that a
problem has the same bits alone, in a batch, in chunks of any size, and on any number of threads.

Where a Gram matrix costs more than it saves (many points per cluster: see `heuristics.py`) or exceeds the workspace, a
problem is solved by the reference's own steps in the dtype of the points ("direct"): products by BLAS, whose rounding
may depend on the number of threads; what they leave in doubt is decided in the same way. So is one with
`metric="cosine"`, but for its seeds.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from fusion_kernels import native
from fusion_kernels.kmeans import heuristics
from fusion_kernels.kmeans import reference as reference
from fusion_kernels.kmeans.metrics import directions
from fusion_kernels.kmeans.seeding import random_seeds, seeding_levels
from fusion_kernels.kmeans.settling import RESOLVED, Means, Partition, distances_of, label_idle, settle
from fusion_kernels.kmeans.types import FAR, Algorithm, Metric, Options, Results, Seeding, Status
from fusion_kernels.library import by_member

#: The options that this backend does: any other is declined, until it stands here.
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
#: Bytes of Gram matrices and what is computed from them at a time, unless the caller says otherwise.
WORKSPACE_BYTES = 2 << 30
# Weights this small, beside the largest, weigh nothing in the direct form: one of 0 would leave a mean undefined.
_LEAST_WEIGHT = 2.0**-100


@dataclass(frozen=True)
class _Solved:
    """Results of a chunk of b problems, as in the public result, with `converged` (b,) in place of the status."""

    labels: Tensor
    centroids: Tensor
    inertia: Tensor
    n_iter: Tensor
    converged: Tensor

    def put(self, where: Tensor, other: _Solved) -> None:
        """Let the problems `where` have the results of `other`."""
        for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True):
            mine[where] = theirs

    def partition(self, b: int, options: Options) -> Partition:
        """Problem b alone."""
        converged = bool(self.converged[b])
        at_means = converged and (options.hartigan or options.tol == 0.0)
        return Partition(
            self.labels[b].clone(),
            self.centroids[b].clone(),
            float(self.inertia[b]),
            int(self.n_iter[b]),
            converged,
            at_means,
        )


@dataclass(frozen=True)
class _Prepared:
    """Points (b, n, D padded) less their means `offset` (b, D) float64, times powers of two `scale` (b,)."""

    points: Tensor
    offset: Tensor
    scale: Tensor

    def bring(self, centroids: Tensor) -> Tensor:
        """Given centroids (b, K, D) in the coordinates of the points, float64."""
        far = FAR[self.points.dtype]
        return ((centroids.to(torch.float64) - self.offset[:, None]) * self.scale[:, None, None]).clamp_(-far, far)


def kmeans(x: Tensor, sample_weight: Tensor | None, init: Tensor | None, options: Options) -> Results:
    """Cluster each problem of a batch; arguments and results as in `fusion_kernels.kmeans.reference.kmeans`.

    `options.workspace_bytes` bounds the memory for Gram matrices and what is computed from them, 2 GiB by default. It
    changes how many problems are solved at a time, and whether one that does not fit is solved directly.

    Raises:
        ValueError: Hartigan moves on a problem for which neither a Gram matrix nor the (N, K) distances of the direct
            form fit into the workspace.
    """
    solve: dict[Metric, Callable[..., Results]] = {
        Metric.EUCLIDEAN: _kmeans,
        Metric.COSINE: functools.partial(reference.on_sphere, _kmeans),
    }
    return by_member(solve, options.metric)(x, sample_weight, init, options)


def _kmeans(x: Tensor, sample_weight: Tensor | None, init: Tensor | None, options: Options) -> Results:
    (B, N, D), n_clusters = x.shape, options.n_clusters
    x = x.contiguous()
    workspace = WORKSPACE_BYTES if options.workspace_bytes is None else options.workspace_bytes
    results = (
        torch.zeros(B, N, dtype=torch.int64),
        x.new_zeros(B, n_clusters, D),
        torch.zeros(B, dtype=torch.float64),
        torch.zeros(B, n_clusters, dtype=torch.int64),
        torch.zeros(B, dtype=torch.int64),
        torch.zeros(B, dtype=torch.int64),
    )
    w = torch.ones(B, N, dtype=torch.float64) if sample_weight is None else sample_weight.to(torch.float64)
    plain = (w > 0).all(1) if n_clusters < N else torch.zeros(B, dtype=torch.bool)
    with native.exact_products():
        for chunk in _chunks(plain.nonzero().squeeze(1), N, D, x.element_size(), workspace, options):
            _solve_plain(x, w, init, chunk, options, workspace, results)
        for b in (~plain).nonzero().squeeze(1).tolist():
            _solve_special(x, w, init, b, options, workspace, results)
    return reference.in_dtype(results, x.dtype)


def assign(x: Tensor, centroids: Tensor) -> Tensor:
    """Nearest centroids (B, N) int64 of x (B, N, D) among centroids (B, K, D)."""
    with native.exact_products():
        labels: Tensor = native.operators().nearest(x.contiguous(), centroids.contiguous())
    return labels


def _nearest(rows: Tensor, centroids: Tensor, current: Tensor | None) -> Tensor:
    """`reference.settling.nearest`, compiled."""
    found: Tensor = native.operators().nearest(rows[None], centroids[None])[0]
    if current is None:
        return found
    point = (found != current).nonzero().squeeze(1)
    pair = torch.stack([found[point], current[point]], 1).sort(1).values
    doubts = torch.stack([torch.zeros_like(pair), point[:, None].expand(-1, 2), pair], 2).view(-1, 3)
    decided: Tensor = native.operators().decide(rows[None], centroids[None], current[None].contiguous(), doubts)[0]
    return decided


def _means(rows: Tensor, w: Tensor, labels: Tensor, empty: Tensor) -> Tensor:
    """Means (K, D) in float64, rounded, of rows (n, D) by label; clusters without points take theirs from `empty`."""
    ends = torch.bincount(labels, minlength=len(empty)).cumsum(0)
    offsets = torch.cat([ends.new_zeros(1), ends])[None]
    order = labels.argsort(stable=True)
    arguments = (rows[None], w[None].contiguous(), labels[None].contiguous(), offsets, order, empty[None].contiguous())
    means: Tensor = native.operators().finish(*arguments)[0][0]
    return means


def _directions(rows: Tensor, w: Tensor, labels: Tensor, empty: Tensor) -> Tensor:
    """Their directions; clusters whose mean has none take that of `empty`."""
    return directions(_means(rows, w, labels, empty), empty)


def _means_by(options: Options) -> Means:
    return by_member({Metric.EUCLIDEAN: _means, Metric.COSINE: _directions}, options.metric)


def _runs_at_a_time(problems: int, n_init: int) -> int:
    """How many runs have their matrices in memory together: as many as threads, or one that has all threads."""
    threads = torch.get_num_threads()
    return threads if problems * n_init >= threads else 1


def _chunks(problems: Tensor, n: int, D: int, element_size: int, workspace: int, options: Options) -> Iterator[Tensor]:
    """Problems to solve together: as many as the workspace holds, at least one."""
    if not len(problems):
        return
    each = heuristics.gram_bytes(n, 0, element_size, 0) + n * (D + 16) * element_size
    shared = _runs_at_a_time(len(problems), options.n_init) * (n + 32) * options.n_clusters * element_size
    yield from problems.split(max(1, (workspace - shared) // each))


def _solve_plain(
    x: Tensor, w: Tensor, init: Tensor | None, chunk: Tensor, options: Options, workspace: int, results: Results
) -> None:
    """Problems whose points all have weight and outnumber the clusters."""
    # Without a copy where the chunk is a range of the batch.
    whole = slice(int(chunk[0]), int(chunk[-1]) + 1)
    select: slice | Tensor = whole if whole.stop - whole.start == len(chunk) else chunk
    solved = _solve(x[select], w[select], None if init is None else init[select], options, workspace)
    labels, centroids, inertia, counts, n_iter, status = results
    labels[select] = solved.labels
    centroids[select] = solved.centroids
    inertia[select] = solved.inertia
    n_iter[select] = solved.n_iter
    counts[select] = _counts(solved.labels, options.n_clusters)
    status[select] = torch.where(solved.converged, int(Status.OK), int(Status.MAX_ITER))
    status[select] = torch.where((counts[select] > 0).all(1), status[select], int(Status.EMPTY_CLUSTERS))
    status[select] = torch.where(solved.inertia.isnan(), int(Status.NON_FINITE), status[select])


def _counts(labels: Tensor, n_clusters: int) -> Tensor:
    counts = torch.zeros(len(labels), n_clusters, dtype=torch.int64)
    return counts.scatter_add_(1, labels, torch.ones_like(labels))


def _solve_special(
    x: Tensor, w: Tensor, init: Tensor | None, b: int, options: Options, workspace: int, results: Results
) -> None:
    """A problem with points without weight, or with no more points than clusters."""
    start = None if init is None else init[b]
    special = reference.special_case(x[b], w[b], start, options)
    if special is None:
        partition, status = _solve_weighted_points(x[b], w[b], start, options, workspace)
    else:
        partition, status = special
    labels, centroids, inertia, counts, n_iter, statuses = results
    labels[b] = partition.labels
    centroids[b] = partition.centroids
    inertia[b] = partition.inertia
    n_iter[b] = partition.n_iter
    counts[b] = torch.bincount(partition.labels, minlength=options.n_clusters)
    statuses[b] = int(status)


def _solve_weighted_points(
    rows: Tensor, w: Tensor, start: Tensor | None, options: Options, workspace: int
) -> tuple[Partition, Status]:
    """One problem by its points of positive weight; the others are labelled at the end."""
    active = (w > 0).nonzero().squeeze(1)
    if start is not None and not start.is_floating_point():
        start = start[active]
    if len(active) <= options.n_clusters:
        best = reference.one_point_each(rows[active], options.n_clusters)
    else:
        solved = _solve(rows[None, active], w[None, active], None if start is None else start[None], options, workspace)
        best = solved.partition(0, options)
    filled = torch.bincount(best.labels, minlength=options.n_clusters) > 0
    labels = torch.zeros(len(rows), dtype=torch.int64)
    labels[active] = best.labels
    idle = w == 0
    moves = options.max_iter > 0 and len(active) > options.n_clusters
    labels[idle], centroids = label_idle(rows[idle], best.centroids, filled, moves, _nearest)
    return (
        dataclasses.replace(best, labels=labels, centroids=centroids),
        reference.status_of(best.converged, bool(filled.all())),
    )


def _solve(
    x: Tensor, w: Tensor, init: Tensor | None, options: Options, workspace: int, dtype: torch.dtype | None = None
) -> _Solved:
    """x (b, n, D) contiguous with weights w (b, n) > 0 in float64, n > K, by the form that costs less.

    Args:
        dtype: of the products; None for that of x, and float64 for the problems that this does not resolve.
    """
    b, n, D = x.shape
    products = x if dtype is None else x.to(dtype)
    prepared = _prepare(products, w, options)
    finite = prepared.scale.isfinite()
    if init is not None and init.is_floating_point():
        finite &= init.to(torch.float64).square().sum((1, 2)).isfinite()
    if not bool(finite.all()):
        return _without_spoilt(x, w, init, finite, options, workspace, dtype)
    seeding = options.seeding.value if init is None else "centroids" if init.is_floating_point() else "labels"
    shape = heuristics.Shape(n, D, options.n_clusters, options.n_init, seeding, options.hartigan, options.max_iter)
    runs = _runs_at_a_time(b, options.n_init)
    fits = heuristics.gram_bytes(n, options.n_clusters, products.element_size(), runs) <= workspace
    del products
    if fits and heuristics.prefers_gram(shape) and options.metric is Metric.EUCLIDEAN:
        solved, resolved = _solve_gram(x, w, init, options, prepared)
    elif shape.hartigan and n * options.n_clusters * prepared.points.element_size() > workspace:
        raise ValueError(
            f"Hartigan moves on {n} points and {options.n_clusters} clusters need more than workspace_bytes="
            f"{workspace}: raise it, or use algorithm='lloyd'"
        )
    else:
        solved, resolved = _solve_direct(x, w, init, options, prepared, fits)
    if not bool(resolved.all()):
        del prepared
        for problem in (~resolved).nonzero():
            start = None if init is None else init[problem]
            solved.put(problem, _solve(x[problem], w[problem], start, options, workspace, torch.float64))
    return solved


def _prepare(x: Tensor, w: Tensor, options: Options) -> _Prepared:
    """The points as their products are formed; of problems that are not finite the scale is NaN."""
    if options.metric is Metric.EUCLIDEAN:
        return _Prepared(*native.operators().prepare(x, w.contiguous()))
    # Unit vectors are in range, and their cosines are taken at the origin.
    finite = x.isfinite().all(2).all(1)
    offset = torch.zeros(len(x), x.shape[2], dtype=torch.float64)
    return _Prepared(x, offset, torch.where(finite, 1.0, math.nan).to(torch.float64))


def _without_spoilt(
    x: Tensor,
    w: Tensor,
    init: Tensor | None,
    finite: Tensor,
    options: Options,
    workspace: int,
    dtype: torch.dtype | None,
) -> _Solved:
    """The problems that are finite, and the results that stand for the others."""
    (b, n, D), K = x.shape, options.n_clusters
    solved = _Solved(
        torch.zeros(b, n, dtype=torch.int64),
        x.new_full((b, K, D), math.nan),
        torch.full((b,), math.nan, dtype=torch.float64),
        torch.zeros(b, dtype=torch.int64),
        torch.ones(b, dtype=torch.bool),
    )
    if bool(finite.any()):
        start = None if init is None else init[finite]
        solved.put(finite, _solve(x[finite], w[finite], start, options, workspace, dtype))
    return solved


def _solve_gram(
    x: Tensor, w: Tensor, init: Tensor | None, options: Options, prepared: _Prepared
) -> tuple[_Solved, Tensor]:
    """Solve on the Gram matrix; also (b,) bool, whether the dtype of the products is wide enough for the problem."""
    ops = native.operators()
    offset, scale, dtype = prepared.offset, prepared.scale, prepared.points.dtype
    levels = seeds = labels = products = norms = None
    K = options.n_clusters
    if init is None:
        draw = {
            Seeding.PLUS_PLUS: lambda: (level_draws(options), None),
            Seeding.RANDOM: lambda: (None, _drawn(w, options)),
        }
        levels, seeds = by_member(draw, options.seeding)()
    elif init.is_floating_point():
        centred = prepared.bring(init)
        norms = centred.square().sum(2)
        padding = prepared.points.shape[2] - x.shape[2]
        products = ops.cross(torch.nn.functional.pad(centred.to(dtype), (0, padding)), prepared.points)
    else:
        labels = init.contiguous()
    gram = ops.gram(prepared.points)
    del prepared
    labels, offsets, members, n_iter, converged, doubts, resolved = ops.cluster(
        gram, w.contiguous(), levels, seeds, labels, products, norms, K, options.n_init, options.algorithm.value,
        options.max_iter, options.tol, x.shape[2], offset.norm(dim=1) * scale, torch.finfo(x.dtype).eps / 2,
    )  # fmt: skip
    # Centroids that never had members: those given, or, where labels were, the mean of all points.
    fallback = None
    if init is not None:
        fallback = init if init.is_floating_point() else offset[:, None].expand(-1, K, -1).to(x.dtype)
        fallback = fallback.contiguous()
    centroids, inertia = ops.finish(x, w.contiguous(), labels, offsets, members, fallback)
    solved = _Solved(labels, centroids, inertia, n_iter, converged)
    decided = ops.decide(x, centroids, labels, doubts)
    empty = (_counts(decided, K) == 0).any(1) & (options.max_iter > 0)
    for b in ((decided != labels).any(1) | empty).nonzero().squeeze(1).tolist():
        if bool(resolved[b]):
            _settle(x, w, solved, b, options, decided[b])
    return solved, resolved


def _settle(x: Tensor, w: Tensor, solved: _Solved, b: int, options: Options, decided: Tensor | None = None) -> None:
    """Make problem b what its rounded centroids make it: `reference.settling.settle`, compiled."""
    refills = options.max_iter > 0
    settled = settle(x[b], w[b], solved.partition(b, options), refills, _nearest, _means_by(options), decided)
    solved.labels[b], solved.centroids[b], solved.inertia[b] = settled.labels, settled.centroids, settled.inertia


def level_draws(options: Options) -> Tensor:
    """(n_init, 1 + (K - 1) trials): what k-means++ draws by, for every problem the same."""
    generator = torch.Generator().manual_seed(options.seed)
    draws = [seeding_levels(options.n_clusters, generator) for _ in range(options.n_init)]
    return torch.stack([torch.cat([first, rest.flatten()]) for first, rest in draws])


def _drawn(w: Tensor, options: Options) -> Tensor:
    """(b, n_init, K) distinct points of the problems with weights w (b, n), each by the same random stream."""
    problems = []
    for own in w:
        generator = torch.Generator().manual_seed(options.seed)
        problems.append([random_seeds(own, options.n_clusters, generator) for _ in range(options.n_init)])
    return torch.stack([torch.stack(runs) for runs in problems])


def _plus_plus(points: Tensor, w: Tensor, options: Options) -> Tensor:
    """(n_init, K) seeds of one problem, drawn on the Gram matrix: where else that has no use."""
    ops, K = native.operators(), options.n_clusters
    centred, _, _ = ops.prepare(points[None], w[None].contiguous())
    gram, generator = ops.gram(centred), torch.Generator().manual_seed(options.seed)
    seeds = []
    for _ in range(options.n_init):
        levels = torch.cat([draws.flatten() for draws in seeding_levels(K, generator)])[None]
        # Stopped before the first assignment, every list of members is a seed.
        start = (gram, w[None].contiguous(), levels, None, None, None, None, K, 1, "lloyd", 0, 0.0, points.shape[1])
        seeds.append(ops.cluster(*start)[2])
    return torch.stack(seeds)


def _best_run(points: Tensor, w: Tensor, start: Tensor | None, options: Options, fits: bool) -> Partition:
    """`reference.best_run`, with seeds from the Gram matrix if it fits and costs less than reading points for each."""
    K, n = options.n_clusters, len(points)
    on_gram = options.metric is Metric.COSINE and fits and n <= 2 * heuristics.MEMORY_COST * K
    if start is not None or options.seeding is not Seeding.PLUS_PLUS or not on_gram:
        return reference.best_run(points, w, start, options)
    once = dataclasses.replace(options, n_init=1)
    runs = [reference.best_run(points, w, points[seeds], once) for seeds in _plus_plus(points, w.double(), options)]
    return min(runs, key=lambda run: run.inertia)


def _solve_direct(
    x: Tensor, w: Tensor, init: Tensor | None, options: Options, prepared: _Prepared, fits: bool
) -> tuple[_Solved, Tensor]:
    """One problem after the other by the reference's steps on the prepared points; as `_solve_gram`."""
    (b, _, D), dtype = x.shape, prepared.points.dtype
    solved = _Solved(
        torch.zeros(x.shape[:2], dtype=torch.int64),
        x.new_zeros(b, options.n_clusters, D),
        torch.zeros(b, dtype=torch.float64),
        torch.zeros(b, dtype=torch.int64),
        torch.ones(b, dtype=torch.bool),
    )
    resolved = torch.ones(b, dtype=torch.bool)
    starts = prepared.bring(init).to(dtype) if init is not None and init.is_floating_point() else init
    for p in range(b):
        # A copy: the bits of a product can depend on where in memory, and so where in the batch, a problem lies.
        points = prepared.points[p, :, :D].clone(memory_format=torch.contiguous_format)
        share = (w[p] / w[p].max()).clamp(min=_LEAST_WEIGHT)
        found = _best_run(points, share.to(dtype), None if starts is None else starts[p], options, fits)
        centroids = (found.centroids.double() / prepared.scale[p] + prepared.offset[p]).to(x.dtype)
        if found.at_means or options.hartigan:
            centroids = _means_by(options)(x[p], w[p], found.labels, centroids)
        elif init is not None and options.max_iter == 0:
            centroids = init[p] if init.is_floating_point() else centroids
        solved.labels[p], solved.centroids[p], solved.n_iter[p] = found.labels, centroids, found.n_iter
        solved.converged[p] = found.converged
        solved.inertia[p] = float(w[p] @ distances_of(x[p], centroids, found.labels))
        if dtype == torch.float32 and options.max_iter > 0:
            filled = torch.bincount(found.labels, minlength=options.n_clusters).min() > 0
            moment = float(share @ points.double().square().sum(1))
            resolved[p] = bool(filled) and found.inertia > RESOLVED * moment
        if bool(resolved[p]):
            _settle(x, w, solved, p, options)
    return solved, resolved
