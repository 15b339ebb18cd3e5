"""The last steps of k-means, on the points as they were given: centroids as they are returned, labels that fit them.

A run works on centred points and on centroids that are not rounded. What it returns must hold for what is returned: the
label of every point is the nearest of the rounded centroids, by squared distances that are sums of squared differences
in float64. Products of points decide nothing here but which clusters come into question.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

#: Squared distances that agree to this are equal, and so are those below that many squared norms of their point: what
#: sums in float64, and means that are rounded to it, leave.
TIE = 2.0**-48
NOTHING = 2.0**-98
#: Passes over the points in which a fixed point of means and labels is looked for. One finds nothing to do, nearly
#: always; rounded centroids may never come to rest.
PASSES = 16
#: Of what the points have about their mean, the share that a partition in float32 must leave to be trusted.
RESOLVED = 2.0**-13
# By how much a product can miss, relative to the squared norms of both.
_BLUR = 24
# Entries of one block of point-to-centroid distances (64 MiB of float64).
_BLOCK_ENTRIES = 1 << 23

#: Labels (n,) of points (n, D) by centroids (K, D), and by the labels that stay where distances are equal.
Nearest = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
#: Means (K, D) of points (n, D) of weights (n,) by label; clusters without points take theirs from the last argument.
Means = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Partition:
    """Labels (n,) of the points and centroids (K, D), both in the coordinates of the caller's choice.

    Attributes:
        at_means: the centroids are the means of their points, at a fixed point of the algorithm.
    """

    labels: Tensor
    centroids: Tensor
    inertia: float
    n_iter: int
    converged: bool
    at_means: bool = False


def settle(
    rows: Tensor,
    w: Tensor,
    found: Partition,
    refills: bool,
    nearest: Nearest,
    means: Means,
    decided: Tensor | None = None,
) -> Partition:
    """Make the labels of a partition those of its centroids, and at a fixed point these the means of their points.

    Args:
        rows: (n, D) points of positive weight, as given.
        w: (n,) float64.
        found: labels, and centroids in the dtype of `rows`.
        refills: whether a cluster without points is given the one that costs most.
        decided: what `nearest` says of `found`, where that is known.
    """
    labels, centroids = found.labels, found.centroids
    for step in range(PASSES if found.at_means else 1):
        if step:
            centroids = means(rows, w, labels, centroids)
        assigned = nearest(rows, centroids, labels) if step or decided is None else decided
        if refills:
            assigned, centroids = _refill(rows, w, assigned, centroids)
        done = torch.equal(assigned, labels)
        labels = assigned
        if done:
            break
    inertia = found.inertia if labels is found.labels else float(w @ distances_of(rows, centroids, labels))
    return replace(found, labels=labels, centroids=centroids, inertia=inertia)


def _refill(rows: Tensor, w: Tensor, labels: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Put the centroid of every cluster without points where the one is that costs most, until none or no cost is left.

    A point that is a centroid never leaves it for another: there are at most as many steps as points.
    """
    counts = torch.bincount(labels, minlength=len(centroids))
    if int(counts.min()) > 0:
        return labels, centroids
    labels, centroids = labels.clone(), centroids.clone()
    distances = distances_of(rows, centroids, labels)
    nothing = NOTHING * distances_of(rows, torch.zeros_like(centroids[:1]), torch.zeros_like(labels))
    while int(counts.min()) == 0:
        cost = torch.where((counts[labels] > 1) & (distances > nothing), w * distances, 0.0)
        point, cluster = int(cost.argmax()), int(counts.argmin())
        if float(cost[point]) <= 0.0:
            break
        centroids[cluster] = rows[point]
        others = distances_of(rows, centroids, torch.full_like(labels, cluster))
        nearer = others * (1 + TIE) < distances
        labels[nearer], distances[nearer] = cluster, others[nearer]
        counts = torch.bincount(labels, minlength=len(centroids))
    return labels, centroids


def label_idle(rows: Tensor, centroids: Tensor, filled: Tensor, moves: bool, nearest: Nearest) -> tuple[Tensor, Tensor]:
    """Labels of points (m, D) without weight by the nearest centroid of a cluster that is `filled` (K,), and centroids.

    Args:
        moves: whether the centroids of the others, which shape nothing either, are put where the first of these is: no
            point is then nearer to one of them.
    """
    clusters = filled.nonzero().squeeze(1)
    labels = clusters[nearest(rows, centroids[clusters], None)]
    if moves and len(rows):
        centroids = torch.where(filled[:, None], centroids, centroids[clusters[0]])
    return labels, centroids


def distances_of(rows: Tensor, centroids: Tensor, labels: Tensor) -> Tensor:
    """(n,) float64 squared distances of the points to the centroids of their labels."""
    step = max(1, _BLOCK_ENTRIES // rows.shape[1])
    parts = [
        (rows[i : i + step].double() - centroids[labels[i : i + step]].double()).square().sum(1)
        for i in range(0, len(rows), step)
    ]
    return torch.cat(parts) if parts else rows.new_zeros(0, dtype=torch.float64)


def nearest(rows: Tensor, centroids: Tensor, current: Tensor | None = None) -> Tensor:
    """(n,) labels of the nearest of the centroids (K, D) to the points (n, D); ties stay, or take the lowest id.

    Points that are not finite, and all if a centroid is not, keep their label or get 0.
    """
    n, K = len(rows), len(centroids)
    labels = torch.zeros(n, dtype=torch.int64, device=rows.device) if current is None else current.clone()
    centres = centroids.to(torch.float64)
    offset = centres.mean(0)
    # A power of two, so that no square over- or underflows.
    unit = torch.ldexp(torch.ones_like(offset[0]), -torch.frexp((centres - offset).abs().amax()).exponent)
    centres = (centres - offset) * unit
    norms = centres.square().sum(1)
    if not bool(norms.isfinite().all()):
        return labels
    error = _BLUR * torch.finfo(torch.float64).eps
    step = max(1, _BLOCK_ENTRIES // max(K, rows.shape[1]))
    for begin in range(0, n, step):
        block = rows[begin : begin + step]
        x = (block.to(torch.float64) - offset) * unit
        sq = x.square().sum(1)
        distances = (x @ centres.T).mul_(-2).add_(sq[:, None]).add_(norms)
        slack = error * (sq[:, None] + norms)
        near = distances - slack <= (distances + slack).amin(1)[:, None]
        near |= ~sq.isfinite()[:, None]
        found = near.to(torch.uint8).argmax(1)
        several = (near.sum(1) > 1).nonzero().squeeze(1)
        at = labels[begin : begin + step]
        kept = at[several]
        at.copy_(found)
        at[several] = _decided(block[several], centroids, near[several], kept, unit)
    return labels


def _decided(rows: Tensor, centroids: Tensor, near: Tensor, kept: Tensor, unit: Tensor) -> Tensor:
    """(m,) nearest of the centroids that are `near` (m, K); `kept` (m,) where it ties, or nothing is a number."""
    pairs = near.nonzero()
    step = max(1, _BLOCK_ENTRIES // rows.shape[1])
    distances = torch.cat(
        [
            ((rows[part[:, 0]].double() - centroids[part[:, 1]].double()) * unit).square().sum(1)
            for part in pairs.split(step)
        ]
    )
    distances = distances.nan_to_num(nan=torch.inf, posinf=torch.inf)
    least = distances.new_full((len(rows),), torch.inf).scatter_reduce(0, pairs[:, 0], distances, "amin")
    nothing = NOTHING * (rows.double() * unit).square().sum(1)
    tied = (distances <= torch.maximum(least * (1 + TIE), nothing)[pairs[:, 0]]) & distances.isfinite()
    lowest = kept.new_full((len(rows),), len(centroids))
    lowest = lowest.scatter_reduce(0, pairs[:, 0], torch.where(tied, pairs[:, 1], len(centroids)), "amin")
    stays = torch.zeros_like(lowest).scatter_reduce(
        0, pairs[:, 0], (tied & (pairs[:, 1] == kept[pairs[:, 0]])).long(), "amax"
    )
    return torch.where((stays > 0) | (lowest == len(centroids)), kept, lowest)
