"""k-means with Triton: the host side, which prepares the problems and launches kernels without waiting for them.

Everything after the preparation works on the Gram matrix of the centred points: seeding reads rows of it, Lloyd's
iteration and Hartigan's moves read weighted sums of rows of it. The points themselves are read again only for the
final means and inertia. Gram takes N² entries per problem, so the batch is cut into parts that fit a workspace.

Rounds of the iterations are launched up to `max_iter`; problems that are done skip theirs on the device. The host asks
now and then whether all are done, goes on launching while the answer is on its way, and stops when one has arrived that
says so, which changes no result. It waits only for the answer to the question before the last one.

float64 points use a float64 Gram matrix from torch and the same kernels otherwise; so do float32 points that products
in float32 cannot tell apart. What is found is settled by the reference's steps, one problem after the other: labels
and rounded centroids then belong together, whatever rounding did on the way.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fusion_kernels.gpu import device_guard, free_memory, launch, packed, pointers
from fusion_kernels.kmeans import _triton_gram as gram_kernels
from fusion_kernels.kmeans import _triton_results as result_kernels
from fusion_kernels.kmeans import _triton_seed as seed_kernels
from fusion_kernels.kmeans import _triton_sweep as sweep_kernels
from fusion_kernels.kmeans import triton_heuristics
from fusion_kernels.kmeans._triton_sweep import State
from fusion_kernels.kmeans.reference import in_dtype
from fusion_kernels.kmeans.triton_points import SLACK, Points, is_finite, prepare
from fusion_kernels.kmeans.triton_run import Run
from fusion_kernels.kmeans.triton_settling import resolved_problems, settle_problem
from fusion_kernels.kmeans.types import Options, Results, Seeding, Status, trials
from fusion_kernels.library import by_member

PRECISIONS = ("exact", "fast")


def kmeans(
    x: Tensor, sample_weight: Tensor | None, init: Tensor | None, options: Options, *, precision: str = "exact"
) -> Results:
    """Cluster each problem of a batch; arguments and results as in `fusion_kernels.kmeans.reference.kmeans`.

    `options.workspace_bytes` bounds what the problems worked on at the same time take, though one always is; by default
    half of the memory that the device has left. It changes no result.

    Args:
        precision: `"exact"` multiplies float32 points to nearly float32 accuracy; `"fast"` clusters the centred points
            rounded to 11 significant bits per entry. Means and inertia are those of x in either case. float64 is
            always exact.

    Raises:
        ValueError: one problem alone needs more memory than the device has.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: use one of {', '.join(PRECISIONS)}")
    with device_guard(x):
        return in_dtype(_found(x, sample_weight, init, options, precision), x.dtype)


def _found(x: Tensor, sample_weight: Tensor | None, init: Tensor | None, options: Options, precision: str) -> Results:
    """The results, settled, with inertia in float64."""
    N, exact = x.shape[1], precision == "exact"
    if options.n_clusters >= N:
        return _one_point_each(x, sample_weight, init, options.n_clusters)
    results = _clustered(x, sample_weight, init, options, exact)
    if x.dtype == torch.float32 and exact and options.max_iter > 0:
        again = ~resolved_problems(x, sample_weight, results)
        if bool(again.any()):
            weight = None if sample_weight is None else sample_weight[again].double()
            start = None if init is None else init[again]
            start = start.double() if start is not None and start.is_floating_point() else start
            for mine, theirs in zip(results, _clustered(x[again].double(), weight, start, options, exact), strict=True):
                mine[again] = theirs.to(mine.dtype)
    for b in range(len(x)):
        own = [field[b] for field in results]
        settle_problem(x[b], None if sample_weight is None else sample_weight[b], own, options, exact)
    return results


def _clustered(x: Tensor, sample_weight: Tensor | None, init: Tensor | None, options: Options, exact: bool) -> Results:
    """The problems of the batch in parts that fit the workspace, N > K."""
    (B, N, D), n_clusters = x.shape, options.n_clusters
    size = triton_heuristics.problem_bytes(N, n_clusters, D, x.element_size(), exact)
    if x.is_cuda:
        _check_memory(size, N, torch.cuda.get_device_properties(x.device).total_memory)
    at_once = max(1, _workspace(x, options) // size)
    parts = [
        _cluster(
            packed(x[b : b + at_once]),
            None if sample_weight is None else sample_weight[b : b + at_once],
            None if init is None else init[b : b + at_once],
            options,
            exact,
        )
        for b in range(0, max(B, 1), at_once)
    ]
    labels, centroids, inertia, counts, n_iter, status = (
        fields[0] if len(parts) == 1 else torch.cat(fields) for fields in zip(*parts, strict=True)
    )
    return labels, centroids, inertia, counts, n_iter, status


def _workspace(x: Tensor, options: Options) -> int:
    """Bytes for the problems worked on at the same time; all of them at once where kernels are interpreted."""
    if options.workspace_bytes is not None:
        return options.workspace_bytes
    return free_memory(x.device) // 2 if x.is_cuda else sys.maxsize


def _check_memory(size: int, n_points: int, there: int) -> None:
    if size > there:
        raise ValueError(
            f"{n_points} points need {size >> 30} GiB for their inner products, more than the device has: "
            "use backend='reference', or cluster a sample"
        )


@dataclass
class _Outcome:
    """What is kept of a run: labels, the labels whose means the centroids are, seeds, passes, states, inertia."""

    labels: Tensor
    means_of: Tensor
    seeds: Tensor
    n_iter: Tensor
    state: Tensor
    inertia: Tensor

    def or_better(self, other: _Outcome) -> _Outcome:
        """Per problem the outcome of smaller inertia, the earlier one of equals."""
        better = other.inertia < self.inertia
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return _Outcome(*(torch.where(better.view(-1, *[1] * (mine.ndim - 1)), theirs, mine) for mine, theirs in pairs))


def _cluster(x: Tensor, sample_weight: Tensor | None, init: Tensor | None, options: Options, exact: bool) -> Results:
    """The problems of one part of the batch, N > K."""
    B, K = len(x), options.n_clusters
    if B == 0:
        return _one_point_each(x, sample_weight, init, K)
    given = init if init is not None and init.is_floating_point() else None
    points = prepare(x, sample_weight, given, K, exact)
    active = points.weight > 0
    rank = active.cumsum(1) - 1
    n_active = rank[:, -1] + 1
    spoiled = ~points.finite | (n_active == 0)
    alone = ~spoiled & (n_active <= K)
    state = torch.where(alone, int(State.ALONE), int(State.RUNNING))
    state = torch.where(spoiled, int(State.SPOILED), state).to(torch.int32)
    # The active points in order, then the last of them again: the centroids where every point is its own.
    in_order = (~active).to(torch.uint8).argsort(dim=1, stable=True)
    place = torch.minimum(torch.arange(K, device=x.device), (n_active[:, None] - 1).clamp(min=0))
    own_seeds = in_order.gather(1, place).to(torch.int32)
    labels = torch.where(active, -2 if init is None or given is not None else init, -1)
    labels = torch.where(alone[:, None] & active, rank, labels)
    labels = torch.where(spoiled[:, None], -1, labels).to(torch.int32)
    counts = _count(labels, K)
    draw = _Seeding(points, active, rank, n_active, state, options)

    best: _Outcome | None = None
    for i in range(options.n_init):
        run = Run(points, state.clone(), labels.clone(), counts.clone(), options.tol)
        seeds = own_seeds
        if init is None:
            seeds = torch.where(alone[:, None], own_seeds, draw(i))
            run.start_from_points(seeds, ~spoiled)
        elif given is not None:
            run.start_from_points(seeds, alone)
            run.length.fill_(1)
        else:
            run.start_from_labels()
        means_of = run.lloyd(options.max_iter)
        if options.hartigan:
            means_of = run.hartigan(options.max_iter)
        inertia = run.inertia()
        if sample_weight is not None:
            run.assign(sweep_kernels.IDLE)
        outcome = _Outcome(run.labels, means_of, seeds, run.n_iter, run.state, inertia)
        best = outcome if best is None else best.or_better(outcome)
    assert best is not None

    fallback = x.gather(1, best.seeds.long().unsqueeze(2).expand(-1, -1, x.shape[2]))
    if init is not None:
        elsewhere = given if given is not None else points.mean.unsqueeze(1)
        fallback = torch.where(alone[:, None, None], fallback, elsewhere)
    return _results(points, best, fallback.contiguous(), spoiled, options)


def _count(labels: Tensor, K: int) -> Tensor:
    """(B, K) int32, points by label; negative labels count nowhere."""
    counts = labels.new_zeros((len(labels), K), dtype=torch.int32)
    return counts.scatter_add_(1, labels.clamp(min=0).long(), (labels >= 0).to(torch.int32))


class _Seeding:
    """Draws seeds with the reference's random numbers, in its order, whatever the problems beside a problem are."""

    def __init__(
        self, points: Points, active: Tensor, rank: Tensor, n_active: Tensor, state: Tensor, options: Options
    ) -> None:
        self.points, self.active, self.rank, self.n_active = points, active, rank, n_active
        self.state, self.options = state, options
        N = points.x.shape[1]
        generator = torch.Generator().manual_seed(options.seed)
        self.trials = trials(options.n_clusters)
        random = self.random = by_member({Seeding.PLUS_PLUS: False, Seeding.RANDOM: True}, options.seeding)
        n = self.per_run = N if random else 1 + (options.n_clusters - 1) * self.trials
        numbers = torch.rand(options.n_init * n, dtype=torch.float64, generator=generator)
        # A point's clock rings after an exponential time with its weight as the rate.
        self.numbers = (-torch.log1p(-numbers) if random else numbers).to(points.x.device)

    def __call__(self, run: int) -> Tensor:
        """(B, K) int32 indices of the seeds of a run; runs are drawn in order."""
        points, K = self.points, self.options.n_clusters
        B, N, _ = points.x.shape
        if self.random:
            clock = self.numbers[(run * self.n_active[:, None] + self.rank).clamp(min=0)]
            rings = torch.where(self.active, clock / points.weight, math.inf)
            return rings.argsort(dim=1, stable=True)[:, :K].to(torch.int32)
        seeds = torch.zeros(B, K, dtype=torch.int32, device=points.x.device)
        T = 1 << (self.trials - 1).bit_length()
        scan, block, num_warps = triton_heuristics.seeding_block(N, self.trials, points.x.dtype == torch.float64)
        launch(
            seed_kernels._plus_plus_kernel,
            B,
            pointers(points),
            state_ptr=self.state,
            levels_ptr=self.numbers[run * self.per_run :],
            closest_ptr=torch.empty_like(points.diagonal),
            seeds_ptr=seeds,
            slack_factor=SLACK[points.x.dtype],
            N=N,
            K=K,
            stride=points.gram.shape[2],
            TRIALS=self.trials,
            T=T,
            BLOCK=scan,
            BT=block,
            num_warps=num_warps,
        )
        return seeds


# --- results ---------------------------------------------------------------------------------------------------------


def _results(points: Points, best: _Outcome, centroids: Tensor, spoiled: Tensor, options: Options) -> Results:
    """Means and inertia of the best run from the points themselves; `centroids` holds those of empty clusters."""
    x, K = points.x, options.n_clusters
    B, N, D = x.shape
    run = Run(points, best.state, best.means_of, _count(best.means_of, K), options.tol)
    run.list_all(~spoiled)
    run.find_members(tol=False)
    run.launch(result_kernels._means_kernel, B * K * -(-D // 256), centroid_ptr=centroids, D=D, U=4, BD=256)
    inertia = points.weight.new_empty(B)
    run.launch(
        result_kernels._point_cost_kernel,
        B * N,
        labels_ptr=best.labels,
        centroid_ptr=centroids,
        D=D,
        BD=64 if D <= 64 else 512,
    )
    launch(gram_kernels._total_kernel, B, value_ptr=run.cost, total_ptr=inertia, N=N, BLOCK=512)

    labels = torch.where(spoiled[:, None], 0, best.labels).long()
    counts = _count(labels, K).long()
    converged = (best.state == State.FIXED) | (best.state == State.SETTLED) | (best.state == State.ALONE)
    status = torch.where(converged, int(Status.OK), int(Status.MAX_ITER))
    status = torch.where((counts == 0).any(1), int(Status.EMPTY_CLUSTERS), status)
    return _spoil(labels, centroids, inertia, counts, best.n_iter.long(), status, spoiled, ~points.finite)


def _spoil(
    labels: Tensor,
    centroids: Tensor,
    inertia: Tensor,
    counts: Tensor,
    n_iter: Tensor,
    status: Tensor,
    spoiled: Tensor,
    not_finite: Tensor,
) -> Results:
    """Put in the results of the problems that have none: NaN where they are not finite, else zeros for no weight."""
    nothing = torch.where(not_finite, math.nan, 0.0).to(centroids.dtype)
    why = torch.where(not_finite, int(Status.NON_FINITE), int(Status.ZERO_WEIGHT))
    all_in_first = torch.zeros_like(counts)
    all_in_first[:, 0] = labels.shape[1]
    return (
        torch.where(spoiled[:, None], 0, labels),
        torch.where(spoiled[:, None, None], nothing[:, None, None], centroids),
        torch.where(spoiled, nothing, inertia),
        torch.where(spoiled[:, None], all_in_first, counts),
        torch.where(spoiled, 0, n_iter),
        torch.where(spoiled, why, status),
    )


def _one_point_each(x: Tensor, sample_weight: Tensor | None, init: Tensor | None, K: int) -> Results:
    """No more points than clusters: every point is a centroid; the clusters left over repeat the last point."""
    B, N, D = x.shape
    integer: Callable[..., Tensor] = torch.zeros(B, dtype=torch.int64, device=x.device).new_full
    if B == 0:
        none = integer((0,), 0)
        return (
            integer((0, N), 0),
            x.new_empty(0, K, D),
            x.new_empty(0, dtype=torch.float64),
            integer((0, K), 0),
            none,
            none.clone(),
        )
    finite = is_finite(x)
    if init is not None and init.is_floating_point():
        finite &= is_finite(init)
    spoiled = ~finite
    if sample_weight is not None and N > 0:
        spoiled |= ~(sample_weight > 0).any(1)
    last = x[:, -1:] if N else x.new_zeros(B, 1, D)
    centroids = torch.cat([x, last.expand(-1, K - N, -1)], 1)
    labels = torch.arange(N, device=x.device).expand(B, -1)
    counts = (torch.arange(K, device=x.device) < N).long().expand(B, -1)
    status = integer((B,), int(Status.EMPTY_CLUSTERS if K > N else Status.OK))
    return _spoil(
        labels, centroids, x.new_zeros(B, dtype=torch.float64), counts, integer((B,), 0), status, spoiled, ~finite
    )
