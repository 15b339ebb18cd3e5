"""What k-means is asked and what it answers: names, options, results, and the numbers that all backends share.

Imported by the reference, every backend and the public functions; imports none of them.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from fusion_kernels.library import by_member, member


class Algorithm(Enum):
    """What follows the seeding; the values are what callers and the operator's schema say.

    Attributes:
        HARTIGAN: Lloyd's iteration, then moves of single points.
        LLOYD: Lloyd's iteration.
    """

    HARTIGAN = "hartigan"
    LLOYD = "lloyd"


class Metric(Enum):
    """What the distance of a point and a centroid is; the values are what callers and the operator's schema say.

    Attributes:
        EUCLIDEAN: the square of the Euclidean distance; centroids are means.
        COSINE: 1 - cos; centroids are directions.
    """

    EUCLIDEAN = "euclidean"
    COSINE = "cosine"


class Seeding(Enum):
    """How initial centroids are drawn; the values are what callers and the operator's schema say."""

    PLUS_PLUS = "k-means++"
    RANDOM = "random"


class Status(IntEnum):
    """How one k-means problem ended. Where several hold, the largest value is reported.

    Attributes:
        OK: converged; every cluster has points.
        MAX_ITER: stopped by `max_iter` before it converged. The result is valid.
        EMPTY_CLUSTERS: some clusters have no points: there are fewer (distinct ones of positive weight) than clusters,
            or `max_iter` is 0. The result is valid; the centroids of empty clusters are finite.
        ZERO_WEIGHT: every weight is zero, or with `metric="cosine"` every point that has one. Labels, centroids and
            inertia are 0.
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


@dataclass(frozen=True)
class Options:
    """How problems are to be solved: what every backend is told, in the order of the operator's schema.

    Names become members of their enumerations, so that no backend can take one for another.

    Attributes:
        n_clusters: K.
        seeding: meaningless where centroids or labels are given.
        n_init: seedings to try.
        algorithm: what follows the seeding.
        max_iter: most Lloyd iterations, and most rounds of Hartigan moves after them.
        tol: squared shift of all centroids at which Lloyd stops, relative to the mean variance of a column.
        seed: of the random stream, which every problem starts anew.
        workspace_bytes: bound on a backend's own memory, or None for its default; the reference has none to bound.
        metric: what the distance of a point and a centroid is.

    Raises:
        ValueError: a name is unknown.
    """

    n_clusters: int
    seeding: Seeding = Seeding.PLUS_PLUS
    n_init: int = 1
    algorithm: Algorithm = Algorithm.HARTIGAN
    max_iter: int = 100
    tol: float = 0.0
    seed: int = 0
    workspace_bytes: int | None = None
    metric: Metric = Metric.EUCLIDEAN

    def __post_init__(self) -> None:
        object.__setattr__(self, "seeding", member("init", self.seeding, Seeding))
        object.__setattr__(self, "algorithm", member("algorithm", self.algorithm, Algorithm))
        object.__setattr__(self, "metric", member("metric", self.metric, Metric))

    @property
    def hartigan(self) -> bool:
        """Whether Hartigan's moves follow Lloyd's iteration."""
        return by_member({Algorithm.HARTIGAN: True, Algorithm.LLOYD: False}, self.algorithm)

    def beyond(self, known: Collection[Enum]) -> str | None:
        """The first option, as callers write it, whose member is none of those `known`; None if all are."""
        for argument, asked in (("init", self.seeding), ("algorithm", self.algorithm), ("metric", self.metric)):
            if asked not in known:
                return f"{argument}={asked.value!r}"
        return None


class KMeansResult(NamedTuple):
    """What `kmeans` returns. Shapes are for x (B, N, D); for x (N, D) every one lacks the leading B.

    Attributes:
        labels: (B, N) int64, the cluster of every point.
        centroids: (B, K, D), float64 for float64 x, else float32.
        inertia: (B,), dtype of centroids: weighted sum of the distances of the points to their centroids: squared ones,
            or with `metric="cosine"` 1 - cos.
        counts: (B, K) int64, points per cluster.
        n_iter: (B,) int64, passes over the points: Lloyd iterations plus rounds of Hartigan moves, each with the
            last one that finds nothing to change.
        status: (B,) int64, a :class:`Status` for every problem.

    Examples:
        >>> found = fusion_kernels.kmeans(torch.randn(2, 100, 3), 4)
        >>> found.labels.shape, found.centroids.shape, found.inertia.shape
        (torch.Size([2, 100]), torch.Size([2, 4, 3]), torch.Size([2]))
        >>> found.counts.sum(dim=1)
        tensor([100, 100])
    """

    labels: Tensor
    centroids: Tensor
    inertia: Tensor
    counts: Tensor
    n_iter: Tensor
    status: Tensor


#: The fields of :class:`KMeansResult` with their batch dimension, as backends return them.
Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

#: Given centroids this far away, in units of the largest coordinate of the points, are brought nearer: they are equally
#: far for every point, and their squares must not overflow.
FAR = {torch.float32: 2.0**40, torch.float64: 2.0**400}


def trials(n_clusters: int) -> int:
    """Candidates of one step of greedy k-means++."""
    return 2 + int(math.log(n_clusters))
