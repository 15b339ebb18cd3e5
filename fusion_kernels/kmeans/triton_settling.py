"""What the Triton kernels have found, brought into the form that results are promised in: `kmeans/settling.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusion_kernels.kmeans.metrics import rounded_means
from fusion_kernels.kmeans.reference import status_of
from fusion_kernels.kmeans.settling import RESOLVED, Partition, label_idle, nearest, settle
from fusion_kernels.kmeans.types import Options, Results, Status


def resolved_problems(x: Tensor, sample_weight: Tensor | None, results: Results) -> Tensor:
    """(B,) bool: float32 is wide enough for what the clusters leave of the distances of the points x (B, N, D)."""
    _, _, inertia, counts, _, status = results
    w = x.new_ones(x.shape[:2], dtype=torch.float64) if sample_weight is None else sample_weight.double()
    special = (status == Status.ZERO_WEIGHT) | (status == Status.NON_FINITE) | ((w > 0).sum(1) <= counts.shape[1])
    moments = [0.0 if skip else _moment(rows, own) for rows, own, skip in zip(x, w, special.tolist(), strict=True)]
    wide = inertia > RESOLVED * torch.tensor(moments, dtype=torch.float64, device=x.device)
    return special | (wide & (counts.amin(1) > 0))


def settle_problem(
    x: Tensor, sample_weight: Tensor | None, results: Sequence[Tensor], options: Options, exact: bool
) -> None:
    """Settle the results of one problem x (N, D), in place; of rounded points (not `exact`) the labels only."""
    labels, centroids, inertia, counts, n_iter, status = results
    w = x.new_ones(len(x), dtype=torch.float64) if sample_weight is None else sample_weight.double()
    active, K, refills = w > 0, len(centroids), options.max_iter > 0
    if int(status) in (Status.ZERO_WEIGHT, Status.NON_FINITE):
        return
    if int(active.sum()) > K:
        converged = int(status) == Status.OK or (int(status) == Status.EMPTY_CLUSTERS and n_iter < options.max_iter)
        at_means = bool(converged) and exact and (options.hartigan or options.tol == 0.0)
        found = Partition(labels[active], centroids.clone(), float(inertia), int(n_iter), bool(converged), at_means)
        found = settle(x[active], w[active], found, refills, nearest, rounded_means)
        labels[active] = found.labels
        centroids.copy_(found.centroids)
        inertia.fill_(found.inertia)
        filled = torch.bincount(found.labels, minlength=K) > 0
        status.fill_(int(status_of(found.converged, bool(filled.all()))))
    filled = torch.bincount(labels[active], minlength=K) > 0
    labels[~active], moved = label_idle(x[~active], centroids, filled, refills and int(active.sum()) > K, nearest)
    centroids.copy_(moved)
    counts.copy_(torch.bincount(labels, minlength=K))


def _moment(rows: Tensor, w: Tensor) -> float:
    """Weighted sum of the squared distances of the points (n, D) to their weighted mean, in float64."""
    offset = (w / w.sum()) @ rows.to(torch.float64)
    return float(w @ (rows.to(torch.float64) - offset).square().sum(1))
