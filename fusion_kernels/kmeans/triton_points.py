"""Points as the Triton kernels of k-means see them: weights, and the inner products of the centred points."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fusion_kernels.gpu import capability, launch, packed, pointers, shared_memory
from fusion_kernels.kmeans import _triton_gram as gram_kernels
from fusion_kernels.kmeans import triton_heuristics
from fusion_kernels.kmeans.types import FAR

# A squared distance is known up to this multiple of the squared norms that it comes from: what float32 accumulation
# leaves, and what the reference grants float64. The fast mode needs no more: its Gram matrix is that of rounded points.
SLACK = {torch.float32: 8 * torch.finfo(torch.float32).eps, torch.float64: 16 * torch.finfo(torch.float64).eps}


@dataclass
class Points:
    """The points of B problems as the kernels see them.

    Attributes:
        x: (B, N, D), as given, float32 or float64.
        mean: (B, D), what is subtracted before products are formed.
        weight: (B, N) float64.
        total: (B,) float64, sums of weight.
        gram: (B, N, stride), inner products of the centred points, scaled by one power of two per problem.
        diagonal: (B, N), of gram.
        finite: (B,) bool, of x and of given centroids.
        products: (B, K, stride), of centroids with points.
        norms: (B, K), squared norms of the centroids.
    """

    x: Tensor
    mean: Tensor
    weight: Tensor
    total: Tensor
    gram: Tensor
    diagonal: Tensor
    finite: Tensor
    products: Tensor
    norms: Tensor


def prepare(x: Tensor, sample_weight: Tensor | None, start: Tensor | None, n_clusters: int, exact: bool) -> Points:
    """Centre the points and form their Gram matrix; with given centroids `start` (B, K, D), their products too."""
    B, N, D = x.shape
    K = n_clusters
    weight = x.new_ones((B, N), dtype=torch.float64) if sample_weight is None else packed(sample_weight.double())
    total, mean = weight.new_empty(B), x.new_empty(B, D)
    launch(gram_kernels._total_kernel, B, value_ptr=weight, total_ptr=total, N=N, BLOCK=512)
    launch(
        gram_kernels._column_mean_kernel,
        B * -(-D // 128),
        x_ptr=x,
        weight_ptr=weight,
        total_ptr=total,
        mean_ptr=mean,
        N=N,
        D=D,
        BN=32,
        BD=128,
    )

    stride = triton_heuristics.round_up(N, triton_heuristics.STRIDE_MULTIPLE)
    gram, products = x.new_empty(B, N, stride), x.new_empty(B, K, stride)
    norms = x.new_empty(B, K)
    if x.dtype == torch.float64:
        finite = _gram_float64(x, mean, start, gram, products, norms)
    else:
        finite = _gram_float32(x, mean, start, gram, products, norms, exact)
    diagonal = gram.diagonal(dim1=1, dim2=2).contiguous()
    return Points(x, mean, weight, total, gram, diagonal, finite, products, norms)


def _gram_float64(
    x: Tensor, mean: Tensor, start: Tensor | None, gram: Tensor, products: Tensor, norms: Tensor
) -> Tensor:
    """Fill gram, and with `start` products and norms; return whether the inputs are finite, per problem."""
    N = x.shape[1]
    finite = is_finite(x)
    if start is not None:
        finite &= is_finite(start)
    for b in range(len(x)):
        # One problem at a time: a batched product may round differently than a single one.
        centred = x[b] - mean[b]
        _, exponent = torch.frexp(centred.abs().amax())
        centred = torch.ldexp(centred, -exponent)
        lower = torch.tril(centred @ centred.T)
        gram[b, :, :N] = lower + torch.tril(lower, -1).T
        if start is not None:
            origin = torch.ldexp(start[b] - mean[b], -exponent).clamp(-FAR[x.dtype], FAR[x.dtype])
            products[b, :, :N] = origin @ centred.T
            norms[b] = origin.square().sum(1)
    return finite


@dataclass
class Split:
    """Centred rows as two float16 numbers per entry: (B, n, depth) planes, exponents (B, n), finite (B, n)."""

    high: Tensor
    low: Tensor
    exponent: Tensor
    finite: Tensor


def split(x: Tensor, mean: Tensor, exact: bool) -> Split:
    """Split the rows of x (B, n, D) float32, contiguous, less mean (B, D); without `exact` there is no low part."""
    B, n, D = x.shape
    depth = triton_heuristics.round_up(D, triton_heuristics.DEPTH_MULTIPLE)
    high = torch.empty(B, n, depth, dtype=torch.float16, device=x.device)
    exponent = torch.empty(B, n, dtype=torch.int32, device=x.device)
    rows = Split(high, torch.empty_like(high) if exact else high, exponent, torch.empty_like(exponent))
    launch(
        gram_kernels._split_kernel,
        B * n,
        pointers(rows),
        x_ptr=x,
        mean_ptr=mean,
        N=n,
        D=D,
        depth=depth,
        SPLIT=exact,
        BD=64 if D <= 64 else 1024,
    )
    return rows


def _gram_float32(
    x: Tensor, mean: Tensor, start: Tensor | None, gram: Tensor, products: Tensor, norms: Tensor, exact: bool
) -> Tensor:
    """As `_gram_float64`, on tensor cores."""
    points = split(x, mean, exact)
    largest = points.exponent.amax(1)
    finite = points.finite.amin(1) > 0
    scale = to_one_exponent(points, largest)
    _gram(points, scale, points, scale, gram, exact)
    if start is not None:
        origin = split(packed(start), mean, exact)
        finite &= origin.finite.amin(1) > 0
        origin_scale = to_one_exponent(origin, largest)
        _gram(origin, origin_scale, points, scale, products, exact)
        row_norms(origin, origin_scale, norms, exact)
    return finite


def row_norms(rows: Split, scale: Tensor, norms: Tensor, exact: bool) -> None:
    """Fill norms (B, n) with the squared norms of the rows times their scales (B, n)."""
    launch(
        gram_kernels._row_norm_kernel,
        norms.numel(),
        pointers(rows),
        scale_ptr=scale,
        norm_ptr=norms,
        depth=rows.high.shape[2],
        SPLIT=exact,
        BD=256,
    )


def to_one_exponent(rows: Split, largest: Tensor) -> Tensor:
    """(B, n) float32 powers of two that bring the split rows to one exponent per problem, points to entries below 1."""
    far = int(math.log2(FAR[torch.float32]))
    exponent = ((rows.exponent - largest[:, None]).clamp(max=far) - 15).clamp(min=-126)
    return ((exponent + 127) << 23).view(torch.float32)


def _gram(a: Split, a_scale: Tensor, b: Split, b_scale: Tensor, out: Tensor, exact: bool) -> None:
    B, M, depth = a.high.shape
    N = b.high.shape[1]
    symmetric = a is b
    config = triton_heuristics.gram_config(N, exact, shared_memory(out.device), capability(out.device)[0])
    BM, BN = config.tile
    side = -(-N // BN)
    tiles = side * (side + 1) // 2 if symmetric else -(-M // BM) * side
    launch(
        gram_kernels._gram_kernel,
        B * tiles,
        a_high_ptr=a.high,
        a_low_ptr=a.low,
        a_scale_ptr=a_scale,
        b_high_ptr=b.high,
        b_low_ptr=b.low,
        b_scale_ptr=b_scale,
        out_ptr=out,
        M=M,
        N=N,
        depth=depth,
        stride=out.shape[2],
        SYMMETRIC=symmetric,
        SPLIT=exact,
        BM=BM,
        BN=BN,
        BD=config.depth,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def is_finite(x: Tensor) -> Tensor:
    """(B,) bool: no NaN, no infinity, and in float64, which is what squares are formed in, none too large to square."""
    return x.square().sum((1, 2)).isfinite() if x.dtype == torch.float64 else x.isfinite().all(2).all(1)
