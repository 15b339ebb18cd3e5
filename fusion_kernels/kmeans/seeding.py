"""Where k-means begins: points drawn as seeds, with random numbers that are the same for every backend and device."""

from __future__ import annotations

import torch
from torch import Tensor

from fusion_kernels.kmeans.types import trials


def plus_plus(x: Tensor, w: Tensor, sq: Tensor, slack: Tensor, n_clusters: int, generator: torch.Generator) -> Tensor:
    """(K,) seeds by k-means++: draw by weight times squared distance, keep the best of the trials of every step.

    Draws are made on the CPU, so that every device sees the same ones. When every point coincides with a seed, the
    first seed fills the remaining places.

    Args:
        x: (n, D) points.
        w: (n,) weights.
        sq: (n,) squared norms of x.
        slack: (n,) squared distances up to which a point coincides with a seed.
    """
    first, levels = seeding_levels(n_clusters, generator)
    device = x.device
    seeds = _draw(w, first).to(device)
    closest = _distances(x, sq, slack, seeds)[0]
    for step in range(n_clusters - 1):
        mass = w * closest
        if not bool((mass > 0).any()):
            return torch.cat([seeds, seeds[:1].expand(n_clusters - len(seeds))])
        candidates = _draw(mass, levels[step]).to(device)
        distances = torch.minimum(closest, _distances(x, sq, slack, candidates))
        best = int((distances @ w).argmin())
        seeds = torch.cat([seeds, candidates[best : best + 1]])
        closest = distances[best]
    return seeds


def seeding_levels(n_clusters: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The uniform draws of one k-means++ seeding, all at its start: (1,), then (K - 1, trials), float64 on the CPU.

    A seeding that ends early has then left the stream where any other does, for the next one to go on from.
    """
    first = torch.rand(1, dtype=torch.float64, generator=generator)
    return first, torch.rand(n_clusters - 1, trials(n_clusters), dtype=torch.float64, generator=generator)


def _draw(mass: Tensor, levels: Tensor) -> Tensor:
    """Indices on the CPU, one per level in [0, 1), with probability proportional to `mass`."""
    cumulative = (mass / mass.max()).cpu().to(torch.float64).cumsum(0)
    # The first index whose cumulative mass exceeds the level has mass of its own: mass 0 is never drawn.
    return torch.searchsorted(cumulative, levels * cumulative[-1], right=True)


def _distances(x: Tensor, sq: Tensor, slack: Tensor, seeds: Tensor) -> Tensor:
    """(L, n) squared distances of all points to the points `seeds`, exactly 0 where they coincide up to rounding."""
    distances = sq[seeds, None] + sq - 2 * (x[seeds] @ x.T)
    return torch.where(distances > slack, distances, 0.0)


def random_seeds(w: Tensor, n_clusters: int, generator: torch.Generator) -> Tensor:
    """(K,) distinct points on the CPU, drawn one after the other with probability proportional to the weights w (n,).

    Exponential clocks with the weights as rates: the order in which they ring is that of such draws.
    """
    uniform = torch.rand(len(w), dtype=torch.float64, generator=generator)
    rings = -torch.log1p(-uniform) / w.cpu()
    return rings.argsort(stable=True)[:n_clusters]
