"""Points like the neurons of a trained network, and how near labels are, for the tests and benchmarks of k-means."""

from __future__ import annotations

import torch
from torch import Tensor


def neuron_like(
    n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """(n, d): a power-law spectrum, lognormal norms, 5% near duplicates, 1% exact duplicates and 1% zero rows.

    The columns are not rotated: k-means would not see it. Every kind of device draws its own.
    """
    g = torch.Generator(device).manual_seed(seed)
    like = {"generator": g, "device": device}
    spectrum = torch.arange(1, d + 1, dtype=torch.float32, device=device).pow(-0.5)
    x = torch.randn(n, d, **like).mul_(spectrum)
    x *= torch.randn(n, 1, **like).mul_(0.5).exp_()
    kind = torch.rand(n, **like)
    source = torch.randint(n, (n,), **like)
    near, exact, zero = kind < 0.05, (kind >= 0.05) & (kind < 0.06), (kind >= 0.06) & (kind < 0.07)
    noise = torch.randn(n, d, **like).mul_(1e-3).mul_(spectrum)
    x = torch.where(near[:, None], x[source] + noise, x)
    x[exact] = x[source[exact]]
    x[zero] = 0
    return x.to(dtype)


def squared_distances(x: Tensor, centroids: Tensor) -> Tensor:
    """(n, K) in float64, from differences."""
    return torch.cdist(x.double(), centroids.double(), compute_mode="donot_use_mm_for_euclid_dist").square()


def nearest_gap(x: Tensor, centroids: Tensor, labels: Tensor) -> float:
    """How much farther than the nearest the labels' centroids are, relative to the points' squared norms.

    Norms are those from the mean of the centroids: what the rounding of a product-based distance is relative to.
    """
    distances = squared_distances(x, centroids)
    gap = distances.gather(1, labels[:, None]).squeeze(1) - distances.min(1).values
    return float((gap / squared_distances(x, centroids.double().mean(0)[None]).squeeze(1)).max())
