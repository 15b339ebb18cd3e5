"""k-means of points in several blocks of columns that count alike, without forming the points: for the CPU.

The rows that are clustered are those of all blocks side by side, each block divided by the root of its total variance.
Their Gram matrix is a sum of those of the blocks, and centring subtracts from it what centring the rows would: no row
is scaled, centred, joined with others or read a second time. Blocks that bfloat16 holds exactly, as it does those of
most checkpoints, are multiplied in it, at half of the cost and with the accuracy of float32 (`csrc/cpu/bfloat16.h`).

Centroids are not returned. Labels are decided by the Gram matrix alone, as those of `fusion_kernels.kmeans` are before
its last step. Where that does not decide, a problem is not `settled` and is left to `fusion_kernels.kmeans`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusion_kernels import native
from fusion_kernels.kmeans import heuristics
from fusion_kernels.kmeans.cpu_backend import WORKSPACE_BYTES, level_draws
from fusion_kernels.kmeans.types import Options, Status

#: What blocks may be stored in, and the bytes of an entry of their Gram matrices.
_TAKEN, _ENTRY = (torch.float32, torch.bfloat16), 4
#: Of the squares of the points, the share that is left about their mean: with less, subtracting it costs accuracy.
_SPREAD = 0.25
#: Variances of a block whose products are neither lost nor out of range in float32.
_LEAST, _MOST = 1e-20, 1e20


@dataclass(frozen=True)
class BlocksResult:
    """What :func:`kmeans_blocks` finds of B problems of N points.

    Attributes:
        labels: (B, N) int64.
        inertia: (B,) float64, of the rows as they are clustered.
        n_iter, status: (B,) int64, as of :class:`fusion_kernels.KMeansResult`.
        settled: (B,) bool. Where False, the rest says nothing.
    """

    labels: Tensor
    inertia: Tensor
    n_iter: Tensor
    status: Tensor
    settled: Tensor


def fits(blocks: Sequence[Tensor], options: Options) -> bool:
    """Whether :func:`kmeans_blocks` takes these blocks, and is the cheaper way for them."""
    first = blocks[0]
    if native.UNAVAILABLE is not None or any(b.dtype not in _TAKEN or b.device.type != "cpu" for b in blocks):
        return False
    (_, n, _), k = first.shape, options.n_clusters
    columns = sum(block.shape[2] for block in blocks)
    shape = heuristics.Shape(n, columns, k, 1, options.seeding.value, options.hartigan, options.max_iter)
    needed = heuristics.gram_bytes(n, k, _ENTRY, 1)
    return 0 < k < n and needed <= WORKSPACE_BYTES and heuristics.prefers_gram(shape)


def kmeans_blocks(blocks: Sequence[Tensor], sample_weight: Tensor, options: Options) -> BlocksResult:
    """Cluster the rows of `blocks` (B, N, d), float32 or bfloat16, which :func:`fits`, with positive weights (B, N).

    Every problem has the same bits alone as in a batch, and on any number of threads.
    """
    b, n, _ = blocks[0].shape
    together = max(1, WORKSPACE_BYTES // heuristics.gram_bytes(n, options.n_clusters, _ENTRY, 1))
    parts = [
        _solve([block[i : i + together] for block in blocks], sample_weight[i : i + together].double(), options)
        for i in range(0, b, together)
    ]
    return BlocksResult(*(torch.cat([getattr(part, name) for part in parts]) for name in BlocksResult.__annotations__))


def _solve(blocks: Sequence[Tensor], w: Tensor, options: Options) -> BlocksResult:
    ops, K, w = native.operators(), options.n_clusters, w.contiguous()
    gram, settled = _gram(blocks, w)
    labels = torch.zeros(w.shape, dtype=torch.int64)
    inertia = torch.zeros(len(w), dtype=torch.float64)
    n_iter, status = torch.zeros(len(w), dtype=torch.int64), torch.zeros(len(w), dtype=torch.int64)
    select = settled.nonzero().squeeze(1)
    if len(select) == 0:
        return BlocksResult(labels, inertia, n_iter, status, settled)
    if len(select) < len(w):
        gram, w = gram[select], w[select]
    columns = sum(block.shape[2] for block in blocks)
    found, _, _, rounds, converged, _, resolved = ops.cluster(
        gram, w, level_draws(options), None, None, None, None, K, 1, options.algorithm.value, options.max_iter,
        options.tol, columns,
    )  # fmt: skip
    labels[select], n_iter[select], inertia[select] = found, rounds, ops.inertia(gram, w, found, K)
    status[select] = torch.where(converged, int(Status.OK), int(Status.MAX_ITER))
    filled = torch.stack([torch.bincount(own, minlength=K).min() > 0 for own in found])
    settled[select] = resolved & filled
    return BlocksResult(labels, inertia, n_iter, status, settled)


def _gram(blocks: Sequence[Tensor], w: Tensor) -> tuple[Tensor, Tensor]:
    """Gram matrices (B, n, padded) of the balanced rows about their weighted mean; (B,) bool, which are exact."""
    ops, (b, n, _) = native.operators(), blocks[0].shape
    settled = torch.ones(b, dtype=torch.bool)
    gram = torch.zeros(b, n, _row_entries(n), dtype=torch.float32)
    with native.exact_products():
        for block in blocks:
            points = block.contiguous()
            variance, squares = ops.moments(points)[0].unbind(1)
            fits_float32 = (variance > _LEAST) & (squares < _MOST)
            settled &= fits_float32 & (variance > _SPREAD * squares)
            ops.add_products(gram, points, torch.where(fits_float32, 1 / variance, 0.0))
    about_mean, squares = ops.centre(gram, w).unbind(1)
    settled &= about_mean > _SPREAD * squares
    return gram, settled


def _row_entries(n: int) -> int:
    """Entries of a row of a Gram matrix: padded, and not a multiple of the page size, at which the rows of a column
    would compete for the same few lines of the cache."""
    padded = -(-n // 16) * 16
    return padded + 16 if padded * _ENTRY % 4096 == 0 else padded
