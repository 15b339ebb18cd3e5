"""One run of k-means over a batch of problems: its state on the device, and the launches that change it."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from fusion_kernels.gpu import launch
from fusion_kernels.kmeans import _triton_moves as move_kernels
from fusion_kernels.kmeans import _triton_results as result_kernels
from fusion_kernels.kmeans import _triton_sweep as sweep_kernels
from fusion_kernels.kmeans import triton_heuristics
from fusion_kernels.kmeans.triton_points import SLACK, Points

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


class Run:
    """State of one run over B problems, and the launches that change it.

    Attributes:
        labels: (B, N) int32; -1 without weight, -2 not assigned yet.
        counts: (B, K) int32, points by label.
        state, n_iter: (B,) int32.
    """

    def __init__(self, points: Points, state: Tensor, labels: Tensor, counts: Tensor, tol: float) -> None:
        self.points, self.state, self.labels, self.counts = points, state, labels, counts
        self.B, self.N, _ = points.x.shape
        self.K, self.tol = counts.shape[1], tol
        self.stride = points.gram.shape[2]
        dtype = points.x.dtype
        self.slack = SLACK[dtype]
        self.config = triton_heuristics.sweep_config(self.N, self.K, dtype == torch.float64)
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
        self.list_all(self.state != State.SPOILED)
        self.rebuild(tol=False)
        self.changed.zero_()
        self.assign(sweep_kernels.GIVEN)
        self.commit(sweep_kernels.GIVEN)
        self.rebuild(tol=False)

    def rebuild(self, tol: bool) -> None:
        """Sum the centroids on the list again."""
        p, P = self.points, triton_heuristics.list_programs(self.B, self.K)
        launch(
            sweep_kernels._members_kernel,
            self.B * P, self.n_changed, self.list, self.begin, self.labels, p.weight, p.products, self.members,
            self.share, self.mass, self.cross, self.N, self.K, self.stride, P, TOL=tol, BLOCK=self.config.scan, BM=128,
        )  # fmt: skip
        self._sum_products(tol)

    def _sum_products(self, tol: bool) -> None:
        p, config = self.points, self.config
        tiles = -(-self.N // config.columns)
        P = triton_heuristics.list_programs(self.B, self.K, tiles)
        launch(
            sweep_kernels._products_kernel,
            self.B * P * tiles, self.n_changed, self.list, self.begin, self.length, self.members, self.share, p.gram,
            p.products, self.N, self.K, self.stride, P, U=config.members, BN=config.columns,
        )  # fmt: skip
        P = triton_heuristics.list_programs(self.B, self.K)
        launch(
            sweep_kernels._norms_kernel,
            self.B * P, self.n_changed, self.list, self.begin, self.length, self.members, self.share, p.products,
            self.cross, p.norms, self.shift, self.N, self.K, self.stride, P, TOL=tol, BLOCK=128,
        )  # fmt: skip

    def assign(self, mode: Any) -> None:
        """Nearest centroids into `assigned`; mode IDLE labels the points without weight."""
        p, config = self.points, self.config
        idle = mode is sweep_kernels.IDLE
        launch(
            sweep_kernels._assign_kernel,
            self.B * -(-self.N // config.points), self.state, p.products, p.norms,
            self.counts if idle else self.length, p.diagonal, p.weight, self.labels,
            self.labels if idle else self.assigned, self.cost, self.counts, self.slack, self.N, self.K, self.stride,
            MODE=mode, BN=config.points, BK=config.clusters,
        )  # fmt: skip

    def commit(self, mode: Any) -> None:
        """Make `assigned` the labels, with the consequences of the mode."""
        launch(
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
                launch(
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
            launch(
                move_kernels._best_move_kernel,
                self.B * -(-self.N // config.points), self.state, p.products, p.norms, self.counts, self.mass,
                p.diagonal, p.weight, self.labels, self.cost, self.target, self.slack, self.N, self.K, self.stride,
                BN=config.points, BK=config.clusters,
            )  # fmt: skip
            launch(
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
        launch(
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
        """Before round i."""
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
