"""k-means on the CPU: the compiled engine on Gram matrices, or plain products where those cost more.

The points of a problem are centred and scaled by a power of two, multiplied with themselves once (float32 for float32
points, else float64), and every seeding, iteration and move then reads the Gram matrix only: see `csrc/cpu/kmeans.h`.
What is computed is the reference's, in the dtype of the points: near-ties within a few rounding errors of that dtype
may be decided differently. The final centroids are means of the original points and the inertia is summed from direct
distances, both in float64. Problems are independent and every sum has one order, so that a problem has the same bits
alone, in a batch, in chunks of any size, and on any number of threads.

Where a Gram matrix costs more than it saves (many points per cluster: see `tuning.py`) or exceeds the workspace, a
problem is solved by the reference's own steps in the dtype of the points ("direct"): products by BLAS, whose rounding
may depend on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fusion_kernels import native
from fusion_kernels.kmeans import tuning
from fusion_kernels.reference import kmeans as reference
from fusion_kernels.reference.kmeans import Options, Partition, Results, Status

#: Bytes of Gram matrices and what is computed from them at a time, unless the caller says otherwise.
WORKSPACE_BYTES = 2 << 30
# Centroids this far away, in units of the largest coordinate of the points, are equally far for every point.
_FAR = {torch.float32: 2.0**40, torch.float64: 2.0**400}


@dataclass(frozen=True)
class _Solved:
    """Results of a chunk of b problems, as in the public result, with `converged` (b,) in place of the status."""

    labels: Tensor
    centroids: Tensor
    inertia: Tensor
    n_iter: Tensor
    converged: Tensor


def kmeans(x: Tensor, sample_weight: Tensor | None, init: Tensor | None, options: Options) -> Results:
    """Cluster each problem of a batch; arguments and results as in `fusion_kernels.reference.kmeans.kmeans`.

    `options.workspace_bytes` bounds the memory for Gram matrices and what is computed from them, 2 GiB by default. It
    changes how many problems are solved at a time, and whether one that does not fit is solved directly.

    Raises:
        ValueError: Hartigan moves on a problem for which neither a Gram matrix nor the (N, K) distances of the direct
            form fit into the workspace.
    """
    (B, N, D), n_clusters = x.shape, options.n_clusters
    x = x.contiguous()
    workspace = WORKSPACE_BYTES if options.workspace_bytes is None else options.workspace_bytes
    results = (
        torch.zeros(B, N, dtype=torch.int64),
        x.new_zeros(B, n_clusters, D),
        x.new_zeros(B),
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
    return results


def assign(x: Tensor, centroids: Tensor) -> Tensor:
    """Nearest centroids (B, N) int64 of x (B, N, D) among centroids (B, K, D)."""
    with native.exact_products():
        labels: Tensor = native.operators().nearest(x.contiguous(), centroids.contiguous())
    return labels


def _runs_at_a_time(problems: int, n_init: int) -> int:
    """How many runs have their matrices in memory together: as many as threads, or one that has all threads."""
    threads = torch.get_num_threads()
    return threads if problems * n_init >= threads else 1


def _chunks(problems: Tensor, n: int, D: int, element_size: int, workspace: int, options: Options) -> Iterator[Tensor]:
    """Problems to solve together: as many as the workspace holds, at least one."""
    if not len(problems):
        return
    each = tuning.gram_bytes(n, 0, element_size, 0) + n * (D + 16) * element_size
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
    inertia[select] = solved.inertia.to(inertia.dtype)
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
    special = reference.special_case(x[b], w[b], start, options.n_clusters)
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
        best = Partition(
            solved.labels[0],
            solved.centroids[0],
            float(solved.inertia[0]),
            int(solved.n_iter[0]),
            bool(solved.converged[0]),
        )
    filled = torch.bincount(best.labels, minlength=options.n_clusters) > 0
    labels = torch.zeros(len(rows), dtype=torch.int64)
    labels[active] = best.labels
    idle = (w == 0).nonzero().squeeze(1)
    candidates = filled.nonzero().squeeze(1)
    labels[idle] = candidates[native.operators().nearest(rows[None, idle], best.centroids[None, candidates])[0]]
    return (
        Partition(labels, best.centroids, best.inertia, best.n_iter, best.converged),
        reference.status_of(best.converged, bool(filled.all())),
    )


def _solve(x: Tensor, w: Tensor, init: Tensor | None, options: Options, workspace: int) -> _Solved:
    """x (b, n, D) contiguous with weights w (b, n) > 0 in float64, n > K, by the form that costs less."""
    b, n, D = x.shape
    seeding = options.seeding if init is None else "centroids" if init.is_floating_point() else "labels"
    shape = tuning.Shape(
        n, D, options.n_clusters, options.n_init, seeding, options.algorithm == "hartigan", options.max_iter
    )
    runs = _runs_at_a_time(b, options.n_init)
    fits = tuning.gram_bytes(n, options.n_clusters, x.element_size(), runs) <= workspace
    if fits and tuning.prefers_gram(shape):
        return _solve_gram(x, w, init, options)
    if shape.hartigan and n * options.n_clusters * x.element_size() > workspace:
        raise ValueError(
            f"Hartigan moves on {n} points and {options.n_clusters} clusters need more than workspace_bytes="
            f"{workspace}: raise it, or use algorithm='lloyd'"
        )
    return _solve_direct(x, w, init, options)


def _solve_gram(x: Tensor, w: Tensor, init: Tensor | None, options: Options) -> _Solved:
    ops = native.operators()
    w = w.contiguous()
    points, offset, scale = ops.prepare(x, w)
    finite = scale.isfinite()
    if init is not None and init.is_floating_point():
        finite &= init.to(torch.float64).square().sum((1, 2)).isfinite()
    if not bool(finite.all()):
        return _without_spoilt(x, w, init, finite, options)

    levels = seeds = labels = products = norms = None
    K = options.n_clusters
    if init is None:
        generator = torch.Generator().manual_seed(options.seed)
        if options.seeding == "k-means++":
            draws = [reference.seeding_levels(K, generator) for _ in range(options.n_init)]
            levels = torch.stack([torch.cat([first, rest.flatten()]) for first, rest in draws])
        else:
            seeds = torch.stack([_random_seeds(problem, K, options) for problem in w])
    elif init.is_floating_point():
        centred = (init.to(torch.float64) - offset[:, None]) * scale[:, None, None]
        centred = centred.clamp_(-_FAR[x.dtype], _FAR[x.dtype])
        norms = centred.square().sum(2)
        padding = points.shape[2] - x.shape[2]
        products = ops.cross(torch.nn.functional.pad(centred.to(x.dtype), (0, padding)), points)
    else:
        labels = init.contiguous()
    gram = ops.gram(points)
    del points
    labels, offsets, members, n_iter, converged = ops.cluster(
        gram, w, levels, seeds, labels, products, norms, K, options.n_init, options.algorithm == "hartigan",
        options.max_iter, options.tol, x.shape[2],
    )  # fmt: skip
    # Centroids that never had members: those given, or, where labels were, the mean of all points.
    fallback = None
    if init is not None:
        fallback = init if init.is_floating_point() else offset[:, None].expand(-1, K, -1).to(x.dtype)
        fallback = fallback.contiguous()
    centroids, inertia = ops.finish(x, w, labels, offsets, members, fallback)
    return _Solved(labels, centroids, inertia, n_iter, converged)


def _random_seeds(w: Tensor, n_clusters: int, options: Options) -> Tensor:
    """(n_init, K) distinct points of one problem, every problem by the same random stream."""
    generator = torch.Generator().manual_seed(options.seed)
    return torch.stack([reference.random_seeds(w, n_clusters, generator) for _ in range(options.n_init)])


def _without_spoilt(x: Tensor, w: Tensor, init: Tensor | None, finite: Tensor, options: Options) -> _Solved:
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
        others = _solve_gram(x[finite], w[finite], None if init is None else init[finite], options)
        solved.labels[finite] = others.labels
        solved.centroids[finite] = others.centroids
        solved.inertia[finite] = others.inertia
        solved.n_iter[finite] = others.n_iter
        solved.converged[finite] = others.converged
    return solved


def _solve_direct(x: Tensor, w: Tensor, init: Tensor | None, options: Options) -> _Solved:
    """One problem after the other by the reference's steps in the dtype of x."""
    settled: list[Partition] = []
    for b in range(len(x)):
        start = None if init is None else init[b]
        special = reference.special_case(x[b], w[b], start, options.n_clusters)
        settled.append(
            special[0] if special is not None else reference.best_run(x[b], w[b].to(x.dtype), start, options)
        )
    labels = torch.stack([s.labels for s in settled])
    centroids = torch.stack([s.centroids for s in settled])
    converged = torch.tensor([s.converged for s in settled])
    # The reference's centroids and inertia in float64, where the centroids are the means of their members.
    at_means = options.algorithm == "hartigan" or options.tol == 0.0
    counts = _counts(labels, options.n_clusters) * (converged | (options.algorithm == "hartigan"))[:, None] * at_means
    ends = counts.flatten().cumsum(0).view_as(counts)
    offsets = torch.cat([ends[:, :1] - counts[:, :1], ends], dim=1)
    members = labels.argsort(dim=1, stable=True)[counts.any(1)].flatten()
    centroids, inertia = native.operators().finish(x, w.contiguous(), labels, offsets, members, centroids)
    return _Solved(labels, centroids, inertia, torch.tensor([s.n_iter for s in settled]), converged)
