"""Lloyd's iteration in plain loops, and what holds of any result of k-means, by brute force."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from fusion_kernels.kmeans import KMeansResult

Array = npt.NDArray[Any]


# --- the oracle ------------------------------------------------------------------------------------------------------


def oracle_lloyd(x: Tensor, w: Tensor, init: Tensor, max_iter: int) -> tuple[Array, Array, float, int]:
    """Lloyd's iteration with relocation, point by point, from given centroids."""
    points, weights = x.double().numpy(), w.double().numpy()
    centroids = init.double().numpy().copy()
    n, K = len(points), len(centroids)
    labels: Array = np.full(n, -1)
    for iteration in range(1, max_iter + 1):
        new = np.array([oracle_nearest(p, centroids) for p in points])
        cost = np.array([weights[j] * ((points[j] - centroids[new[j]]) ** 2).sum() for j in range(n)])
        for cluster in range(K):
            if (new == cluster).any():
                continue
            crowded = np.array([(new == new[j]).sum() > 1 for j in range(n)])
            point = int(np.where(crowded, cost, -1.0).argmax())
            new[point], cost[point] = cluster, 0.0
        if (new == labels).all():
            return labels, centroids, oracle_inertia(points, weights, labels, centroids), iteration
        labels = new
        for cluster in range(K):
            inside = [j for j in range(n) if labels[j] == cluster]
            centroids[cluster] = sum(weights[j] * points[j] for j in inside) / sum(weights[j] for j in inside)
    labels = np.array([oracle_nearest(p, centroids) for p in points])
    return labels, centroids, oracle_inertia(points, weights, labels, centroids), max_iter


def oracle_nearest(point: Array, centroids: Array) -> int:
    return int(((centroids - point) ** 2).sum(1).argmin())


def oracle_inertia(points: Array, weights: Array, labels: Array, centroids: Array) -> float:
    return float(sum(weights[j] * ((points[j] - centroids[labels[j]]) ** 2).sum() for j in range(len(points))))


# --- invariants by brute force ---------------------------------------------------------------------------------------


def squared_distances(x: Tensor, centroids: Tensor) -> Tensor:
    return torch.stack([(x.double() - c).square().sum(1) for c in centroids.double()], dim=1)


def assert_nearest(x: Tensor, result: KMeansResult) -> None:
    """Every label's centroid is nearest up to the rounding of the centroids."""
    distances = squared_distances(x, result.centroids)
    gap = distances.gather(1, result.labels[:, None]).squeeze(1) - distances.min(1).values
    eps = torch.finfo(result.centroids.dtype).eps
    scale = x.double().square().sum(1) + 1e-300
    assert float((gap / scale).max()) <= 16 * eps


def assert_consistent(x: Tensor, w: Tensor, result: KMeansResult) -> None:
    """Counts and inertia are those of the labels and centroids."""
    distances = squared_distances(x, result.centroids).gather(1, result.labels[:, None]).squeeze(1)
    assert torch.equal(result.counts, torch.bincount(result.labels, minlength=len(result.centroids)))
    expected = float((w.double() * distances).sum())
    scale = float((w.double() * x.double().square().sum(1)).sum())
    assert float(result.inertia) == pytest.approx(expected, rel=1e-6, abs=1e-12 * scale)


def assert_means(x: Tensor, w: Tensor, result: KMeansResult) -> None:
    eps = torch.finfo(result.centroids.dtype).eps
    for k in range(len(result.centroids)):
        inside = (result.labels == k) & (w > 0)
        if inside.any():
            weights = w[inside].double()
            mean = (weights[:, None] * x[inside].double()).sum(0) / weights.sum()
            torch.testing.assert_close(result.centroids[k].double(), mean, rtol=2 * eps, atol=1e-14)


def best_single_move(x: Tensor, w: Tensor, labels: Tensor, K: int) -> float:
    """Largest decrease of the inertia by moving one point, recomputing the two clusters' inertias from scratch."""

    def cost(members: Tensor) -> float:
        if not bool(members.any()):
            return 0.0
        weights, rows = w[members].double(), x[members].double()
        mean = (weights[:, None] * rows).sum(0) / weights.sum()
        return float((weights * (rows - mean).square().sum(1)).sum())

    best = -math.inf
    before = [cost(labels == k) for k in range(K)]
    for j in range(len(x)):
        a = int(labels[j])
        without = labels == a
        without[j] = False
        if not bool(without.any()):
            continue
        left = cost(without)
        for b in range(K):
            if b != a:
                joined = labels == b
                joined[j] = True
                best = max(best, before[a] + before[b] - left - cost(joined))
    return best
