"""Norms of rows, and weighted sums and means of the rows of each label, in one order: the same bits on every run.

Scattered additions have no order on a GPU, and products with one-hot rows cost as much as a Gram matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusion_kernels import native


def cluster_means(rows: Tensor, weights: Tensor, labels: Tensor, n_clusters: int) -> Tensor:
    """The weighted mean of the rows of each label; of a single row, that row.

    Args:
        rows: (B, N, D) of a floating dtype, in any strides, which change no bit.
        weights: (B, N) non-negative, float32 or float64.
        labels: (B, N) integers in `[0, n_clusters)`.
        n_clusters: K.

    Returns:
        (B, K, D) float32, or float64 where the rows or the weights are; zeros where there is no positive weight.
    """
    dtype = torch.promote_types(torch.promote_types(rows.dtype, weights.dtype), torch.float32)
    kept = dtype if dtype == torch.float64 else rows.dtype
    if native.UNAVAILABLE is None and rows.device.type == "cpu":
        taken = rows.to(torch.float32 if kept == torch.float16 else kept).contiguous()
        w, label = weights.double().contiguous(), labels.long().contiguous()
        means: Tensor = native.operators().means(taken, w, label, n_clusters)
        return means
    mass = cluster_sums(torch.ones_like(weights, dtype=dtype).unsqueeze(-1), weights, labels, n_clusters)
    sums = cluster_sums(rows.to(dtype), weights, labels, n_clusters)
    return sums.div_(mass.clamp(min=torch.finfo(mass.dtype).tiny))


def cluster_sums(rows: Tensor, weights: Tensor, labels: Tensor, n_clusters: int) -> Tensor:
    """(B, K, D) sums, in the order of the rows (B, N, D), of them times weights (B, N) of their dtype, by label."""
    problem = torch.arange(len(labels), device=labels.device).unsqueeze(-1)
    bag = (labels.long() + problem * n_clusters).flatten()
    ends = torch.bincount(bag, minlength=len(labels) * n_clusters).cumsum(0)
    order = bag.argsort(stable=True)
    sums = torch.nn.functional.embedding_bag(
        order,
        rows.reshape(-1, rows.shape[2]),
        torch.cat([ends.new_zeros(1), ends]),
        mode="sum",
        per_sample_weights=weights.to(rows.dtype).flatten()[order],
        include_last_offset=True,
    )
    return sums.view(len(labels), n_clusters, rows.shape[2])


def row_norms(rows: Tensor) -> Tensor:
    """(B, N) float64 norms of rows (B, N, D) of a floating dtype, in any strides, whose squares need not fit it."""
    if native.UNAVAILABLE is None and rows.device.type == "cpu" and rows.dtype in (torch.float32, torch.bfloat16):
        squares: Tensor = native.operators().moments(rows.contiguous())[1]
        return squares.sqrt()
    return torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64)
