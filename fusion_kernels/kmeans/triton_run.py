"""One run of k-means over a batch of problems: its state on the device, and the launches that change it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusion_kernels.gpu import launch, pointers, recorded
from fusion_kernels.kmeans import _triton_moves as move_kernels
from fusion_kernels.kmeans import _triton_results as result_kernels
from fusion_kernels.kmeans import _triton_sweep as sweep_kernels
from fusion_kernels.kmeans import triton_heuristics
from fusion_kernels.kmeans._triton_sweep import State
from fusion_kernels.kmeans.triton_points import SLACK, Points

# Rounds between two questions whether all problems are done, and how many of them may be on their way unanswered. So
# many rounds are recorded and launched as one graph: a round is five launches, which may take the host longer than the
# device.
_POLL_EVERY, _UNANSWERED = 8, 2


class Run:
    """State of one run over B problems, and the launches that change it.

    Every tensor here and among the points is the argument of the kernels' parameter `<name>_ptr`. Clusters whose
    centroids are to be summed again are on a list of work that the device keeps.

    Attributes:
        labels: (B, N) int32; -1 without weight, -2 not assigned yet.
        assigned: (B, N) int32, the labels to come; scratch for moves.
        counts: (B, K) int32, points by label.
        state, n_iter: (B,) int32.
        changed: (B, K) int32, flags of clusters that are not on the list yet.
        n_changed, list: (B,) and (B, K) int32, the list.
        begin, length: (B, K) int32, where the members of a listed cluster begin, and how many there are.
        members, share: (B, N), the members of the listed clusters, and their shares of its weight.
        mass: (B, K) float64, the weight of every cluster.
        cross, shift: (B, K) float64, products of new centroids with old ones, and how far they went.
        cost: (B, N) float64, weighted squared distances, or what a move gains.
        target, least, second: (B, N), of moves: the cheapest other cluster, -1 where it is to be searched for, what it
            costs, and what every other one costs at least.
        bid, bidder: (B, K), of moves.
        smallest_shift: (B,) float64, at which Lloyd's iteration has settled.
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
        self.least, self.second = (points.diagonal.new_empty(B, N) for _ in range(2))
        self.bid = torch.empty(B, K, dtype=torch.int64, device=labels.device)
        variance = (points.weight * points.diagonal).sum(1) / (points.total * points.x.shape[2])
        self.smallest_shift = self.tol * variance

    def launch(self, kernel: Any, programs: int, **own: Any) -> None:
        """Launch a kernel on this run: what it has parameters for, and does not get from `own`, is here."""
        sizes = {"N": self.N, "K": self.K, "stride": self.stride, "slack_factor": self.slack}
        launch(kernel, programs, pointers(self.points, self) | sizes, **own)

    def launch_on_list(self, kernel: Any, tiles: int = 1, **own: Any) -> None:
        """Launch a kernel whose programs take turns with the list, each for one of `tiles` tiles."""
        P = triton_heuristics.list_programs(self.B, self.K, tiles)
        self.launch(kernel, self.B * P * tiles, P=P, **own)

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

    def rebuild(self, tol: bool, moves: bool = False) -> None:
        """Sum the centroids on the list again, which many are on, or those of a round of `moves`."""
        self.find_members(tol)
        self._sum_products(tol, moves)

    def find_members(self, tol: bool) -> None:
        """The members of the clusters on the list, their shares and the clusters' weights."""
        self.launch_on_list(sweep_kernels._members_kernel, TOL=tol, BLOCK=min(1024, self.config.scan), BM=512)

    def _sum_products(self, tol: bool, moves: bool = False) -> None:
        config = self.config
        columns, members = (config.moved_columns, config.moved_members) if moves else (config.columns, config.members)
        self.launch_on_list(sweep_kernels._products_kernel, -(-self.N // columns), U=members, BN=columns)
        self.launch_on_list(sweep_kernels._norms_kernel, TOL=tol, BLOCK=512)

    def assign(self, mode: Any) -> None:
        """Nearest centroids into `assigned`; mode IDLE labels the points without weight."""
        config, idle = self.config, mode is sweep_kernels.IDLE
        self.launch(
            sweep_kernels._assign_kernel,
            self.B * -(-self.N // config.points),
            filled_ptr=self.counts if idle else self.length,
            assigned_ptr=self.labels if idle else self.assigned,
            MODE=mode,
            BN=config.points,
            BK=config.clusters,
        )

    def commit(self, mode: Any) -> None:
        """Make `assigned` the labels, with the consequences of the mode."""
        scan, warps = self.config.scan, self.config.warps
        self.launch(sweep_kernels._commit_kernel, self.B, MODE=mode, BLOCK=scan, BK=scan, num_warps=warps)

    def lloyd(self, max_iter: int) -> Tensor:
        """Iterate; return the labels (B, N) that the centroids are the means of."""
        self._iterate(self._step, max_iter)
        means_of = self.labels.clone()
        self.assign(sweep_kernels.LAST)
        self.commit(sweep_kernels.LAST)
        return means_of

    def _step(self) -> None:
        self.assign(sweep_kernels.STEP)
        self.commit(sweep_kernels.STEP)
        self.rebuild(self.tol > 0)
        if self.tol > 0:
            self.launch(sweep_kernels._settle_kernel, self.B, smallest_ptr=self.smallest_shift, BLOCK=256)

    def hartigan(self, max_iter: int) -> Tensor:
        """Move single points, from what :meth:`lloyd` left; return the labels."""
        self.rebuild(tol=False)
        over = (self.state == State.ALONE) | (self.state == State.SPOILED)
        self.state = torch.where(over, self.state, int(State.RUNNING))
        self.target.fill_(-1)
        self._iterate(self._move, max_iter)
        return self.labels.clone()

    def _move(self) -> None:
        config = self.config
        self.launch(
            move_kernels._best_move_kernel,
            self.B * -(-self.N // config.points),
            gain_ptr=self.cost,
            lost_ptr=self.assigned,
            BN=config.points,
            BC=config.changed,
            BR=config.again,
            BK=config.every,
        )
        self.launch(
            move_kernels._select_moves_kernel,
            self.B,
            gain_ptr=self.cost,
            candidate_ptr=self.assigned,
            BLOCK=config.scan,
            BK=config.scan,
            num_warps=config.warps,
        )
        self.rebuild(tol=False, moves=True)

    def _iterate(self, once: Callable[[], None], most: int) -> None:
        """Do rounds until all problems are done, or `most` of them. What a round launches is the same every time."""

        def many() -> None:
            for _ in range(_POLL_EVERY):
                once()

        poll, at, replay = _Poll(self.state), 0, None
        while at < most and not poll.all_done(at):
            rounds = min(poll.until_asking(at), most - at)
            if rounds < _POLL_EVERY:
                for _ in range(rounds):
                    once()
            else:
                # Rounds have been done one by one before, and so all kernels are there.
                replay = recorded(many) if replay is None else replay
                replay()
            at += rounds

    def inertia(self) -> Tensor:
        """(B,) float64, in units that are a problem's own."""
        cost = self.points.weight.new_empty(self.B)
        self.launch(
            result_kernels._partition_cost_kernel,
            self.B,
            cost_ptr=cost,
            BLOCK=self.config.scan,
            num_warps=self.config.warps,
        )
        return cost


def _runs_ahead(state: Tensor) -> bool:
    """Whether the host need not wait for what it launches."""
    return state.is_cuda


class _Poll:
    """Whether no problem is running any more, as far as is known while the device is kept busy.

    The host asks every few rounds, and goes on launching while the answer is on its way, but never further than the
    answers to the last two questions allow: rounds of problems that are done find nothing to do, yet cost launches.
    """

    def __init__(self, state: Tensor) -> None:
        self.state = state
        self.questions: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def all_done(self, i: int) -> bool:
        """Before round i."""
        if not _runs_ahead(self.state):
            return not bool((self.state == State.RUNNING).any())
        asks = i % _POLL_EVERY == _POLL_EVERY - 1
        while self.questions and (self.questions[0][1].query() or (asks and len(self.questions) == _UNANSWERED)):
            answer, arrived = self.questions.popleft()
            arrived.synchronize()
            if bool(answer):
                return True
        if asks:
            self.questions.append(self._ask())
        return False

    def until_asking(self, i: int) -> int:
        """Rounds from round i on before which nothing is asked, but for the first of them."""
        return _POLL_EVERY - (i + 1) % _POLL_EVERY if _runs_ahead(self.state) else 1

    def _ask(self) -> tuple[Tensor, torch.cuda.Event]:
        """What will hold the answer, on the host, and the event after which it does."""
        answer, arrived = torch.zeros((), dtype=torch.bool, pin_memory=True), torch.cuda.Event()
        answer.copy_((self.state != State.RUNNING).all(), non_blocking=True)
        arrived.record()
        return answer, arrived
