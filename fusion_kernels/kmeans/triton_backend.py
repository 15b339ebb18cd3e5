"""k-means with Triton: the host side, which prepares the problems and launches kernels without waiting for them.

Everything after the preparation works on the Gram matrix of the centred points: seeding reads rows of it, Lloyd's
iteration and Hartigan's moves read weighted sums of rows of it. The points themselves are read again only for the
final means and inertia. Gram takes N² entries per problem, so the batch is cut into parts that fit a workspace.

Rounds of the iterations are launched up to `max_iter`; problems that are done skip theirs on the device. The host does
not wait to find out whether all are done: it asks for a copy of the answer now and then, and stops launching when one
has arrived that says so, which changes no result. Without such an answer, rounds that find nothing to do cost their
launches.

float64 points use a float64 Gram matrix from torch and the same kernels otherwise.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from fusion_kernels.kmeans import _triton_gram as gram_kernels
from fusion_kernels.kmeans import _triton_moves as move_kernels
from fusion_kernels.kmeans import _triton_results as result_kernels
from fusion_kernels.kmeans import _triton_seed as seed_kernels
from fusion_kernels.kmeans import _triton_sweep as sweep_kernels
from fusion_kernels.kmeans import triton_tuning as tuning
from fusion_kernels.reference.kmeans import Results, Status

PRECISIONS = ("exact", "fast")

# A squared distance is known up to this multiple of the squared norms that it comes from: what float32 accumulation
# leaves, and what the reference grants float64. The fast mode needs no more: its Gram matrix is that of rounded points.
_SLACK = {torch.float32: 8 * torch.finfo(torch.float32).eps, torch.float64: 16 * torch.finfo(torch.float64).eps}
# Rounds between two questions whether all problems are done.
_POLL_EVERY = 8


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


def kmeans(
    x: Tensor,
    sample_weight: Tensor | None,
    init: Tensor | None,
    n_clusters: int,
    seeding: str,
    n_init: int,
    algorithm: str,
    max_iter: int,
    tol: float,
    seed: int,
    precision: str = "exact",
    workspace: int = tuning.WORKSPACE,
) -> Results:
    """Cluster each problem of a batch; arguments and results as in `fusion_kernels.reference.kmeans.kmeans`.

    Args:
        precision: `"exact"` multiplies float32 points to nearly float32 accuracy; `"fast"` clusters the centred points
            rounded to 11 significant bits per entry. Means and inertia are those of x in either case. float64 is
            always exact.
        workspace: bytes that the problems worked on at the same time may take. Changes no result.

    Raises:
        ValueError: one problem alone needs more memory than the device has.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: use one of {', '.join(PRECISIONS)}")
    B, N, D = x.shape
    guard = torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
    with guard:
        if n_clusters >= N:
            return _one_point_each(x, sample_weight, init, n_clusters)
        size = tuning.problem_bytes(N, n_clusters, D, x.element_size(), precision == "exact")
        _check_memory(size, x)
        options = _Options(n_clusters, seeding, n_init, algorithm, max_iter, tol, seed, precision)
        at_once = max(1, workspace // size)
        parts = [
            _cluster(
                x[b : b + at_once].contiguous(),
                None if sample_weight is None else sample_weight[b : b + at_once],
                None if init is None else init[b : b + at_once],
                options,
            )
            for b in range(0, max(B, 1), at_once)
        ]
    labels, centroids, inertia, counts, n_iter, status = (
        fields[0] if len(parts) == 1 else torch.cat(fields) for fields in zip(*parts, strict=True)
    )
    return labels, centroids, inertia, counts, n_iter, status


def _check_memory(size: int, x: Tensor) -> None:
    if not x.is_cuda:
        return
    there = torch.cuda.get_device_properties(x.device).total_memory
    if size > there:
        raise ValueError(
            f"{x.shape[1]} points need {size >> 30} GiB for their inner products, more than the device has: "
            "use backend='reference', or cluster a sample"
        )


@dataclass(frozen=True)
class _Options:
    n_clusters: int
    seeding: str
    n_init: int
    algorithm: str
    max_iter: int
    tol: float
    seed: int
    precision: str


@dataclass
class _Points:
    """The points of B problems as the kernels see them.

    Attributes:
        x: (B, N, D), as given.
        mean: (B, D), what is subtracted before products are formed.
        weight: (B, N) float64.
        total: (B,) float64, sums of weight.
        gram: (B, N, stride), inner products of the centred points, scaled by one power of two per problem.
        diagonal: (B, N), of gram.
        finite: (B,) bool, of x and of given centroids.
        products: (B, K, stride), of centroids with points.
        norms: (B, K), squared norms of the centroids.
    """

    x: Tensor
    mean: Tensor
    weight: Tensor
    total: Tensor
    gram: Tensor
    diagonal: Tensor
    finite: Tensor
    products: Tensor
    norms: Tensor


def _launch(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
    kernel[(programs,)](*arguments, **options)


# --- preparation -----------------------------------------------------------------------------------------------------


def _prepare(x: Tensor, sample_weight: Tensor | None, start: Tensor | None, options: _Options) -> _Points:
    """Centre the points and form their Gram matrix; with given centroids `start` (B, K, D), their products too."""
    B, N, D = x.shape
    K = options.n_clusters
    weight = x.new_ones((B, N), dtype=torch.float64) if sample_weight is None else sample_weight.double().contiguous()
    total, mean = weight.new_empty(B), x.new_empty(B, D)
    _launch(gram_kernels._total_kernel, B, weight, total, N, BLOCK=512)
    _launch(gram_kernels._column_mean_kernel, B * -(-D // 128), x, weight, total, mean, N, D, BN=32, BD=128)

    stride = tuning.round_up(N, tuning.STRIDE_MULTIPLE)
    gram, products = x.new_empty(B, N, stride), x.new_empty(B, K, stride)
    norms = x.new_empty(B, K)
    if x.dtype == torch.float64:
        finite = _gram_float64(x, mean, start, gram, products, norms)
    else:
        finite = _gram_float32(x, mean, start, gram, products, norms, options.precision == "exact")
    diagonal = gram.diagonal(dim1=1, dim2=2).contiguous()
    return _Points(x, mean, weight, total, gram, diagonal, finite, products, norms)


def _gram_float64(
    x: Tensor, mean: Tensor, start: Tensor | None, gram: Tensor, products: Tensor, norms: Tensor
) -> Tensor:
    """Fill gram, and with `start` products and norms; return whether the inputs are finite, per problem."""
    N = x.shape[1]
    finite = _finite(x)
    if start is not None:
        finite &= _finite(start)
    for b in range(len(x)):
        # One problem at a time: a batched product may round differently than a single one.
        centred = x[b] - mean[b]
        peak = centred.abs().amax()
        if start is not None:
            origin = start[b] - mean[b]
            peak = torch.maximum(peak, origin.abs().amax())
        _, exponent = torch.frexp(peak)
        scale = torch.ldexp(torch.ones_like(peak), -exponent)
        centred = centred * scale
        lower = torch.tril(centred @ centred.T)
        gram[b, :, :N] = lower + torch.tril(lower, -1).T
        if start is not None:
            origin = origin * scale
            products[b, :, :N] = origin @ centred.T
            norms[b] = origin.square().sum(1)
    return finite


@dataclass
class _Split:
    """Centred rows as two float16 numbers per entry: (B, n, depth) planes, exponents (B, n), finite (B, n)."""

    high: Tensor
    low: Tensor
    exponent: Tensor
    finite: Tensor


def _split(x: Tensor, mean: Tensor, exact: bool) -> _Split:
    B, n, D = x.shape
    depth = tuning.round_up(D, tuning.DEPTH_MULTIPLE)
    high = torch.empty(B, n, depth, dtype=torch.float16, device=x.device)
    low = torch.empty_like(high) if exact else high
    exponent = torch.empty(B, n, dtype=torch.int32, device=x.device)
    finite = torch.empty_like(exponent)
    _launch(
        gram_kernels._split_kernel,
        B * n, x, mean, high, low, exponent, finite, n, D, depth,
        SPLIT=exact, BD=64 if D <= 64 else 1024,
    )  # fmt: skip
    return _Split(high, low, exponent, finite)


def _gram_float32(
    x: Tensor, mean: Tensor, start: Tensor | None, gram: Tensor, products: Tensor, norms: Tensor, exact: bool
) -> Tensor:
    """As `_gram_float64`, on tensor cores."""
    points = _split(x, mean, exact)
    largest = points.exponent.amax(1)
    finite = points.finite.amin(1) > 0
    origin = None
    if start is not None:
        origin = _split(start.contiguous(), mean, exact)
        largest = torch.maximum(largest, origin.exponent.amax(1))
        finite &= origin.finite.amin(1) > 0
    scale = _scale(points, largest)
    _gram(points, scale, points, scale, gram, exact)
    if origin is not None:
        origin_scale = _scale(origin, largest)
        _gram(origin, origin_scale, points, scale, products, exact)
        B, K, depth = origin.high.shape
        _launch(
            gram_kernels._row_norm_kernel, B * K, origin.high, origin.low, origin_scale, norms, depth,
            SPLIT=exact, BD=256,
        )  # fmt: skip
    return finite


def _scale(rows: _Split, largest: Tensor) -> Tensor:
    """(B, n) float32 powers of two that bring the split rows to entries below 1 with one exponent per problem."""
    exponent = (rows.exponent - largest[:, None] - 15).clamp(min=-126)
    return ((exponent + 127) << 23).view(torch.float32)


def _gram(a: _Split, a_scale: Tensor, b: _Split, b_scale: Tensor, out: Tensor, exact: bool) -> None:
    B, M, depth = a.high.shape
    N = b.high.shape[1]
    symmetric = a is b
    if out.is_cuda:
        shared_memory = torch.cuda.get_device_properties(out.device).shared_memory_per_block_optin
    else:
        shared_memory = tuning.SMALL_SHARED_MEMORY
    config = tuning.gram_config(N, exact, shared_memory)
    BM, BN = config.tile
    side = -(-N // BN)
    tiles = side * (side + 1) // 2 if symmetric else -(-M // BM) * side
    _launch(
        gram_kernels._gram_kernel,
        B * tiles, a.high, a.low, a_scale, b.high, b.low, b_scale, out, M, N, depth, out.shape[2],
        SYMMETRIC=symmetric, SPLIT=exact, BM=BM, BN=BN, BD=config.depth, CHUNK=config.chunk,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


# --- runs ------------------------------------------------------------------------------------------------------------


class _Run:
    """State of one run over B problems, and the launches that change it.

    Attributes:
        labels: (B, N) int32; -1 without weight, -2 not assigned yet.
        counts: (B, K) int32, points by label.
        state, n_iter: (B,) int32.
    """

    def __init__(self, points: _Points, state: Tensor, labels: Tensor, counts: Tensor, options: _Options) -> None:
        self.points, self.state, self.labels, self.counts = points, state, labels, counts
        self.B, self.N, _ = points.x.shape
        self.K, self.tol = options.n_clusters, options.tol
        self.stride = points.gram.shape[2]
        dtype = points.x.dtype
        self.slack = _SLACK[dtype]
        self.config = tuning.sweep_config(self.N, self.K, dtype == torch.float64)
        B, N, K = self.B, self.N, self.K
        integers: Callable[..., Tensor] = labels.new_empty
        self.n_iter = labels.new_zeros(B)
        self.assigned = integers((B, N))
        self.members, self.share = integers((B, N)), points.gram.new_empty(B, N)
        self.changed = labels.new_ones((B, K))
        self.n_changed, self.list = integers(B), integers((B, K))
        self.begin, self.length = integers((B, K)), integers((B, K))
        self.mass, self.cross, self.shift = (points.weight.new_empty(B, K) for _ in range(3))
        self.cost = points.weight.new_empty(B, N)
        self.target, self.bidder = integers((B, N)), integers((B, K))
        self.bid = torch.empty(B, K, dtype=torch.int64, device=labels.device)
        variance = (points.weight * points.diagonal).sum(1) / (points.total * points.x.shape[2])
        self.smallest_shift = self.tol * variance

    def list_all(self, where: Tensor) -> None:
        """Put all clusters of the problems `where` (B,) on the list of changed ones, with as many members as counts."""
        self.n_changed = torch.where(where, self.K, 0).to(torch.int32)
        self.list = torch.arange(self.K, dtype=torch.int32, device=where.device).expand(self.B, -1).contiguous()
        self.length = self.counts.clone()
        self.begin = (self.counts.cumsum(1) - self.counts).to(torch.int32)

    def start_from_points(self, seeds: Tensor, where: Tensor) -> None:
        """Let the points seeds (B, K) be the centroids of the problems `where`."""
        counts, self.counts = self.counts, torch.ones_like(self.counts)
        self.list_all(where)
        self.counts = counts
        self.members[:, : self.K] = seeds
        self.share[:, : self.K] = 1
        self._sum_products(tol=False)

    def start_from_labels(self) -> None:
        """Let the means of the labelled points be the centroids, and refill the clusters that have none."""
        # Clusters without points lie on the mean of all points, which is the origin here.
        self.points.products.zero_()
        self.points.norms.zero_()
        self.list_all(self.state != State.SPOILED)
        self.rebuild(tol=False)
        self.changed.zero_()
        self.assign(sweep_kernels.GIVEN)
        self.commit(sweep_kernels.GIVEN)
        self.rebuild(tol=False)

    def rebuild(self, tol: bool) -> None:
        """Sum the centroids on the list again."""
        p, P = self.points, tuning.list_programs(self.B, self.K)
        _launch(
            sweep_kernels._members_kernel,
            self.B * P, self.n_changed, self.list, self.begin, self.labels, p.weight, p.products, self.members,
            self.share, self.mass, self.cross, self.N, self.K, self.stride, P, TOL=tol, BLOCK=self.config.scan,
        )  # fmt: skip
        self._sum_products(tol)

    def _sum_products(self, tol: bool) -> None:
        p, config = self.points, self.config
        tiles = -(-self.N // config.columns)
        P = tuning.list_programs(self.B, self.K, tiles)
        _launch(
            sweep_kernels._products_kernel,
            self.B * P * tiles, self.n_changed, self.list, self.begin, self.length, self.members, self.share, p.gram,
            p.products, self.N, self.K, self.stride, P, U=config.members, BN=config.columns,
        )  # fmt: skip
        P = tuning.list_programs(self.B, self.K)
        _launch(
            sweep_kernels._norms_kernel,
            self.B * P, self.n_changed, self.list, self.begin, self.length, self.members, self.share, p.products,
            self.cross, p.norms, self.shift, self.N, self.K, self.stride, P, TOL=tol, BLOCK=128,
        )  # fmt: skip

    def assign(self, mode: Any) -> None:
        """Nearest centroids into `assigned`; mode IDLE labels the points without weight."""
        p, config = self.points, self.config
        idle = mode is sweep_kernels.IDLE
        _launch(
            sweep_kernels._assign_kernel,
            self.B * -(-self.N // config.points), self.state, p.products, p.norms,
            self.counts if idle else self.length, p.diagonal, p.weight, self.labels,
            self.labels if idle else self.assigned, self.cost, self.counts, self.slack, self.N, self.K, self.stride,
            MODE=mode, BN=config.points, BK=config.clusters,
        )  # fmt: skip

    def commit(self, mode: Any) -> None:
        """Make `assigned` the labels, with the consequences of the mode."""
        _launch(
            sweep_kernels._commit_kernel,
            self.B, self.state, self.n_iter, self.n_changed, self.list, self.begin, self.length, self.changed,
            self.labels, self.assigned, self.cost, self.counts, self.N, self.K,
            MODE=mode, BLOCK=self.config.scan, BK=self.config.scan,
        )  # fmt: skip

    def lloyd(self, max_iter: int) -> Tensor:
        """Iterate; return the labels (B, N) that the centroids are the means of."""
        poll = _Poll(self.state)
        for i in range(max_iter):
            if poll.all_done(i):
                break
            self.assign(sweep_kernels.STEP)
            self.commit(sweep_kernels.STEP)
            self.rebuild(self.tol > 0)
            if self.tol > 0:
                _launch(
                    sweep_kernels._settle_kernel, self.B, self.state, self.n_changed, self.list, self.shift,
                    self.smallest_shift, self.K, BLOCK=256,
                )  # fmt: skip
        means_of = self.labels.clone()
        self.assign(sweep_kernels.LAST)
        self.commit(sweep_kernels.LAST)
        return means_of

    def hartigan(self, max_iter: int) -> Tensor:
        """Move single points, from what :meth:`lloyd` left; return the labels."""
        self.rebuild(tol=False)
        over = (self.state == State.ALONE) | (self.state == State.SPOILED)
        self.state = torch.where(over, self.state, int(State.RUNNING))
        p, config = self.points, self.config
        poll = _Poll(self.state)
        for i in range(max_iter):
            if poll.all_done(i):
                break
            _launch(
                move_kernels._best_move_kernel,
                self.B * -(-self.N // config.points), self.state, p.products, p.norms, self.counts, self.mass,
                p.diagonal, p.weight, self.labels, self.cost, self.target, self.slack, self.N, self.K, self.stride,
                BN=config.points, BK=config.clusters,
            )  # fmt: skip
            _launch(
                move_kernels._select_moves_kernel,
                self.B, self.state, self.n_iter, self.n_changed, self.list, self.begin, self.length, self.changed,
                self.labels, self.cost, self.target, self.counts, self.assigned, self.bid, self.bidder, self.N, self.K,
                BLOCK=config.scan, BK=config.scan,
            )  # fmt: skip
            self.rebuild(tol=False)
        return self.labels.clone()

    def inertia(self) -> Tensor:
        """(B,) float64, in units that are a problem's own."""
        p, cost = self.points, self.points.weight.new_empty(self.B)
        _launch(
            result_kernels._partition_cost_kernel,
            self.B, p.products, p.norms, p.diagonal, p.weight, self.labels, cost, self.N, self.K, self.stride,
            BLOCK=self.config.scan,
        )  # fmt: skip
        return cost


class _Poll:
    """Whether no problem is running any more, as far as is known without waiting for the device."""

    def __init__(self, state: Tensor) -> None:
        self.state = state
        self.asks = state.is_cuda and not torch.cuda.is_current_stream_capturing()
        self.answer: Tensor | None = None
        self.arrived: torch.cuda.Event | None = None

    def all_done(self, i: int) -> bool:
        if not self.state.is_cuda:
            return not bool((self.state == State.RUNNING).any())
        if self.arrived is not None:
            if not self.arrived.query():
                return False
            self.arrived = None
            if self.answer is not None and bool(self.answer):
                return True
        if self.asks and i % _POLL_EVERY == _POLL_EVERY - 1:
            if self.answer is None:
                self.answer = torch.zeros((), dtype=torch.bool, pin_memory=True)
            self.answer.copy_((self.state != State.RUNNING).all(), non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()
        return False


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
        return _Outcome(
            *(torch.where(better.view(-1, *[1] * (mine.ndim - 1)), theirs, mine) for mine, theirs in pairs)
        )


def _cluster(x: Tensor, sample_weight: Tensor | None, init: Tensor | None, options: _Options) -> Results:
    """The problems of one part of the batch, N > K."""
    B, N, _ = x.shape
    K = options.n_clusters
    if B == 0:
        return _one_point_each(x, sample_weight, init, K)
    given = init if init is not None and init.is_floating_point() else None
    points = _prepare(x, sample_weight, given, options)
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
        run = _Run(points, state.clone(), labels.clone(), counts.clone(), options)
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
        if options.algorithm == "hartigan":
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
        self, points: _Points, active: Tensor, rank: Tensor, n_active: Tensor, state: Tensor, options: _Options
    ) -> None:
        self.points, self.active, self.rank, self.n_active = points, active, rank, n_active
        self.state, self.options = state, options
        B, N, _ = points.x.shape
        generator = torch.Generator().manual_seed(options.seed)
        self.trials = 2 + int(math.log(options.n_clusters))
        random = options.seeding == "random"
        n = N if random else 1 + (options.n_clusters - 1) * self.trials
        numbers = torch.rand(options.n_init * n, dtype=torch.float64, generator=generator)
        # A point's clock rings after an exponential time with its weight as the rate.
        self.numbers = (-torch.log1p(-numbers) if random else numbers).to(points.x.device)
        self.cursor = torch.zeros(B, dtype=torch.int64, device=points.x.device)

    def __call__(self, run: int) -> Tensor:
        """(B, K) int32 indices of the seeds of a run; runs are drawn in order."""
        points, K = self.points, self.options.n_clusters
        B, N, _ = points.x.shape
        if self.options.seeding == "random":
            clock = self.numbers[(run * self.n_active[:, None] + self.rank).clamp(min=0)]
            rings = torch.where(self.active, clock / points.weight, math.inf)
            return rings.argsort(dim=1, stable=True)[:, :K].to(torch.int32)
        seeds = torch.zeros(B, K, dtype=torch.int32, device=points.x.device)
        T = 1 << (self.trials - 1).bit_length()
        scan, block = tuning.seeding_block(N, self.trials)
        _launch(
            seed_kernels._plus_plus_kernel,
            B, self.state, points.gram, points.diagonal, points.weight, points.total, self.numbers, self.cursor,
            torch.empty_like(points.diagonal), seeds, _SLACK[points.x.dtype], N, K, points.gram.shape[2],
            TRIALS=self.trials, T=T, BLOCK=scan, BT=block, num_warps=8,
        )  # fmt: skip
        return seeds


# --- results ---------------------------------------------------------------------------------------------------------


def _results(points: _Points, best: _Outcome, centroids: Tensor, spoiled: Tensor, options: _Options) -> Results:
    """Means and inertia of the best run from the points themselves; `centroids` holds those of empty clusters."""
    x, K = points.x, options.n_clusters
    B, N, D = x.shape
    run = _Run(points, best.state, best.means_of, _count(best.means_of, K), options)
    run.list_all(~spoiled)
    P = tuning.list_programs(B, K)
    _launch(
        sweep_kernels._members_kernel,
        B * P, run.n_changed, run.list, run.begin, run.labels, points.weight, points.products, run.members, run.share,
        run.mass, run.cross, N, K, run.stride, P, TOL=False, BLOCK=run.config.scan,
    )  # fmt: skip
    _launch(
        result_kernels._means_kernel,
        B * K * -(-D // 256), x, points.weight, run.begin, run.length, run.members, run.mass, centroids, N, D, K,
        U=4, BD=256,
    )  # fmt: skip
    cost, inertia = points.weight.new_empty(B, N), points.weight.new_empty(B)
    _launch(
        result_kernels._point_cost_kernel,
        B * N, x, points.weight, best.labels, centroids, cost, N, D, K, BD=64 if D <= 64 else 512,
    )  # fmt: skip
    _launch(gram_kernels._total_kernel, B, cost, inertia, N, BLOCK=512)

    labels = torch.where(spoiled[:, None], 0, best.labels).long()
    counts = _count(labels, K).long()
    converged = (best.state == State.FIXED) | (best.state == State.SETTLED) | (best.state == State.ALONE)
    status = torch.where(converged, int(Status.OK), int(Status.MAX_ITER))
    status = torch.where((counts == 0).any(1), int(Status.EMPTY_CLUSTERS), status)
    return _spoil(labels, centroids, inertia.to(x.dtype), counts, best.n_iter.long(), status, spoiled, ~points.finite)


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
        return integer((0, N), 0), x.new_empty(0, K, D), x.new_empty(0), integer((0, K), 0), integer(0, 0), integer(0, 0)
    finite = _finite(x)
    if init is not None and init.is_floating_point():
        finite &= _finite(init)
    spoiled = ~finite
    if sample_weight is not None and N > 0:
        spoiled |= ~(sample_weight > 0).any(1)
    last = x[:, -1:] if N else x.new_zeros(B, 1, D)
    centroids = torch.cat([x, last.expand(-1, K - N, -1)], 1)
    labels = torch.arange(N, device=x.device).expand(B, -1)
    counts = (torch.arange(K, device=x.device) < N).long().expand(B, -1)
    status = integer((B,), int(Status.EMPTY_CLUSTERS if K > N else Status.OK))
    return _spoil(labels, centroids, x.new_zeros(B), counts, integer((B,), 0), status, spoiled, ~finite)


def _finite(x: Tensor) -> Tensor:
    """(B,) bool: no NaN, no infinity, and in float64, which is what squares are formed in, none too large to square."""
    return x.square().sum((1, 2)).isfinite() if x.dtype == torch.float64 else x.isfinite().all(2).all(1)
