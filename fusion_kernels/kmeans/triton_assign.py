"""Nearest centroids with Triton: products and the search for the least distance in one kernel, no (N, K) matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from fusion_kernels.gpu import capability, device_guard, launch, packed, shared_memory
from fusion_kernels.kmeans import _triton_assign as assign_kernels
from fusion_kernels.kmeans import reference as reference
from fusion_kernels.kmeans import triton_heuristics
from fusion_kernels.kmeans.settling import nearest
from fusion_kernels.kmeans.triton_points import SLACK, Split, row_norms, split, to_one_exponent

#: Bytes of split points at a time: what is kept beside points and labels.
POINTS_BYTES = 1 << 30


def assign(x: Tensor, centroids: Tensor) -> Tensor:
    """Nearest centroids (B, N) int64 of x (B, N, D) among centroids (B, K, D), both float32 or both float64.

    Ties go to the lowest id; points that are not finite to 0. What products on tensor cores leave in doubt is decided
    by the reference's own steps, which are all there is for float64.
    """
    if x.dtype == torch.float64:
        return reference.assign(x, centroids)
    B, N, D = x.shape
    labels = torch.zeros(B, N, dtype=torch.int64, device=x.device)
    if B == 0 or N == 0:
        return labels
    with device_guard(x):
        # What is nearest does not depend on the origin, and rounding is least with one among the centroids.
        origin = centroids.double().mean(1).float()
        centres = split(packed(centroids), origin, exact=True)
        largest = centres.exponent.amax(1)
        at_once = max(1, POINTS_BYTES // (B * triton_heuristics.round_up(D, triton_heuristics.DEPTH_MULTIPLE) * 4))
        for begin in range(0, N, at_once):
            points = split(packed(x[:, begin : begin + at_once]), origin, exact=True)
            labels[:, begin : begin + at_once] = _nearest(points, centres, largest, N)
        for b in range(B):
            doubtful = (labels[b] < 0).nonzero().squeeze(1)
            labels[b, doubtful] = nearest(x[b, doubtful], centroids[b])
    return labels


def _nearest(points: Split, centres: Split, largest: Tensor, total: int) -> Tensor:
    """(B, n) labels of some of `total` points per problem, negative where another centroid may be nearer."""
    (B, n, depth), K = points.high.shape, centres.high.shape[1]
    scales, norms = [], []
    for rows in (points, centres):
        scale = to_one_exponent(rows, largest)
        norm = torch.empty_like(scale)
        row_norms(rows, scale, norm, exact=True)
        scales.append(scale)
        norms.append(norm)
    labels = torch.empty(B, n, dtype=torch.int64, device=points.high.device)
    config = triton_heuristics.nearest_config(total, shared_memory(labels.device), capability(labels.device)[0])
    BN, BK = config.tile
    launch(
        assign_kernels._nearest_kernel,
        B * -(-n // BN),
        x_high_ptr=points.high,
        x_low_ptr=points.low,
        x_scale_ptr=scales[0],
        x_norm_ptr=norms[0],
        c_high_ptr=centres.high,
        c_low_ptr=centres.low,
        c_scale_ptr=scales[1],
        c_norm_ptr=norms[1],
        labels_ptr=labels,
        slack_factor=SLACK[torch.float32],
        N=n,
        K=K,
        depth=depth,
        BN=BN,
        BK=BK,
        BD=config.depth,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return torch.where(points.finite > 0, labels, 0)
