"""What a metric of k-means is: the distance of a point and a centroid, what a centroid is, and what a move costs.

The reference's iteration asks :class:`Points` for all of these; a metric is a subclass of it and a line in `BY_METRIC`.
Other backends use what is below it. Sources are those of `reference.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusion_kernels.kmeans.settling import Means
from fusion_kernels.kmeans.types import Metric

# A squared distance of a point x is known up to a few rounding errors of |x|²: differences below this multiple of
# eps |x|² are ties. It covers the largest error seen for sums of tens of thousands of terms.
_SLACK = 16
# A sum of unit vectors this short, beside the sum of their weights, has no direction.
_NO_DIRECTION = 2.0**-20


@dataclass(frozen=True)
class Points:
    """The n points of positive weight of one problem, in one dtype: that of the arithmetic.

    Attributes:
        rows: (n, D), as given.
        offset: (D,), their weighted mean.
        x: (n, D), rows - offset.
        w: (n,), the weights.
        sq: (n,), squared norms of x.
        slack: (n,), how far two squared distances of a point may differ and still be a tie.

    The methods say what a centroid is, and what a move of a point costs.
    """

    rows: Tensor
    offset: Tensor
    x: Tensor
    w: Tensor
    sq: Tensor
    slack: Tensor

    @classmethod
    def of(cls, rows: Tensor, w: Tensor) -> Points:
        """The points `rows` (n, D) of weights w (n,), with what their arithmetic needs."""
        return cls._about((w / w.sum()) @ rows, rows, w)

    @classmethod
    def _about(cls, offset: Tensor, rows: Tensor, w: Tensor) -> Points:
        x = rows - offset
        sq = x.square().sum(1)
        return cls(rows, offset, x, w, sq, _SLACK * torch.finfo(x.dtype).eps * sq)

    def centroids(self, labels: Tensor, before: Tensor) -> Tensor:
        """(K, D) centroids of the points by label, where x is; those of `before` (K, D) for clusters without points."""
        return self.placed(means_of(self.x, self.w, labels, before), before)

    def placed(self, means: Tensor, before: Tensor) -> Tensor:
        """The centroids (K, D) of clusters with these means that had the centroids `before`."""
        return means

    def anywhere(self, n_clusters: int) -> Tensor:
        """(K, D) centroids of clusters that never had points: the mean of all."""
        return self.x.new_zeros(n_clusters, self.x.shape[1])

    def compared(self, means: Tensor) -> Tensor:
        """(n, K): what is to be known of the points and the means for the next two."""
        return squared_distances(self.x, self.sq, means)

    def entering(self, compared: Tensor, W: Tensor, means: Tensor) -> Tensor:
        """(n, K): by how much the inertia rises where a point enters a cluster of weight W (K,), per weight of it."""
        return compared * (W / (W + self.w[:, None]))

    def leaving(self, own: Tensor, labels: Tensor, W: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
        """(n,): by how much it falls where a point leaves its own cluster, and how far gains may be off, per weight.

        Args:
            own: (n,), of `compared`, the entries of the points' own clusters.
        """
        rest = W[labels] - self.w
        leave = W[labels] / torch.where(rest > 0, rest, 1.0)
        return leave * own, (leave + 1) * self.slack


class Directions(Points):
    """Points of norm 1, whose centroids have it too: the direction of the weighted sum S of a cluster's points.

    With |x - c|² = 2 (1 - cos), twice the inertia is the weighted sum of squared distances to the centroids, and the
    inertia of a cluster is W - |S|. Nothing is subtracted: cosines are taken at the origin.
    """

    @classmethod
    def of(cls, rows: Tensor, w: Tensor) -> Points:
        return cls._about(torch.zeros_like(rows[0]), rows, w)

    def placed(self, means: Tensor, before: Tensor) -> Tensor:
        return directions(means, before)

    def anywhere(self, n_clusters: int) -> Tensor:
        """The first point: their mean may have no direction."""
        return self.x[:1].expand(n_clusters, -1)

    def compared(self, means: Tensor) -> Tensor:
        return self.x @ means.T

    def entering(self, compared: Tensor, W: Tensor, means: Tensor) -> Tensor:
        w, norms = self.w[:, None], W * means.norm(dim=1)
        twice = 2 * W * compared + w
        longer = norms + (norms.square() + w * twice).clamp(min=0).sqrt()
        return 1 - twice / longer

    def leaving(self, own: Tensor, labels: Tensor, W: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
        norms = (W * means.norm(dim=1))[labels]
        twice = 2 * W[labels] * own - self.w
        shorter = norms + (norms.square() - self.w * twice).clamp(min=0).sqrt()
        return 1 - twice / shorter, 4 * self.slack


def unit_rows(x: Tensor) -> Tensor:
    """x (..., D) with rows divided by their norms, in its dtype; zeros stay zeros, what is not finite becomes NaN."""
    wide = x.to(torch.float64)
    # First by the largest entry: its square may be too large, or 0.
    largest = wide.abs().amax(-1, keepdim=True)
    wide = wide / torch.where(largest == 0, 1.0, largest)
    norms = wide.norm(dim=-1, keepdim=True)
    return (wide / torch.where(norms == 0, 1.0, norms)).to(x.dtype)


def directions(means: Tensor, before: Tensor) -> Tensor:
    """(K, D) means of unit vectors divided by their norms; where these vanish, the rows of `before` (K, D)."""
    vanish = ~(means.norm(dim=1, keepdim=True) > _NO_DIRECTION)
    return torch.where(vanish, before, unit_rows(means))


def squared_distances(x: Tensor, sq: Tensor, centroids: Tensor) -> Tensor:
    """(n, K) squared distances of the centred points x (n, D) with squared norms sq (n,) to the centroids (K, D)."""
    return (x @ centroids.T).mul_(-2).add_(sq[:, None]).add_(centroids.square().sum(1))


def means_of(x: Tensor, w: Tensor, labels: Tensor, empty: Tensor) -> Tensor:
    """(K, D) weighted means of the rows of x (n, D) by label; clusters without rows take theirs from `empty`.

    Segments of sorted rows are summed one row after the other: the same order, and the same bits, on every run.
    """
    lengths = torch.bincount(labels, minlength=len(empty))
    order = labels.argsort(stable=True)
    # Weights become shares of their cluster first: the mean of a single point is then exactly that point.
    share = w / weights_of(w, labels, len(empty))[labels]
    sums = torch.segment_reduce(x[order] * share[order, None], "sum", lengths=lengths, axis=0)
    return torch.where(lengths[:, None] > 0, sums, empty)


def weights_of(w: Tensor, labels: Tensor, n_clusters: int) -> Tensor:
    """(K,) sums of the weights w (n,) by label."""
    order = labels.argsort(stable=True)
    # The column keeps the sum sequential on every device, as in `means_of`.
    sums = torch.segment_reduce(w[order, None], "sum", lengths=torch.bincount(labels, minlength=n_clusters), axis=0)
    return sums.squeeze(1)


def rounded_means(rows: Tensor, w: Tensor, labels: Tensor, empty: Tensor) -> Tensor:
    """`means_of` in float64, rounded to the dtype of `rows`."""
    return means_of(rows.to(torch.float64), w, labels, empty.to(torch.float64)).to(rows.dtype)


def rounded_directions(rows: Tensor, w: Tensor, labels: Tensor, empty: Tensor) -> Tensor:
    """The directions of these means."""
    return directions(rounded_means(rows, w, labels, empty), empty)


#: For every metric: how points are seen, and what rounded centroids are made of.
BY_METRIC: dict[Metric, tuple[type[Points], Means]] = {
    Metric.EUCLIDEAN: (Points, rounded_means),
    Metric.COSINE: (Directions, rounded_directions),
}
