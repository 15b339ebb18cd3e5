"""MLP fusion: cluster the neurons, one fused neuron per cluster, scaled by the cluster's size.

Three methods share the clustering. `published` is that of the paper: raw rows `[w_in, b_in, w_out]`, k-means++ seeding
and Lloyd iterations, every neuron alike. `fusion` is what it became here:

- blocks balanced: the input part and the output part of a row get the same total variance, so that neither decides
  alone which neurons are alike;
- the input part measured as the inputs see it: |w - w'|^2 becomes E[((w - w').[x, 1])^2], the mean squared difference
  of the pre-activations (calibrated);
- neurons weighted, in clustering and in means, by what they matter: the variance of the activation times |w_out|^2
  (calibrated), or |w_out| (without data: products with the norm of the input weights and squares did no better);
- Hartigan's moves after Lloyd's iterations.

`cluster` is `published` with the sizes folded into the output weights: the same function, trained as a plain FFN.

Source: NTK-approximating MLP Fusion for Efficient Language Model Fine-tuning (ICML 2023, arXiv 2307.08941), section 4.
Its code takes the best of 30 initialisations; seeds differ by a fraction of a percent in inertia, so one is used here.
Its baseline without the scale puts the square root of the size on both sides of the activation, which is a different
function for every activation but ReLU; `cluster` does not. The metric by the covariance of inputs is that of SliceGPT
(arXiv 2401.15024).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusion_kernels import Status, kmeans
from fusion_kernels.kmeans import OPERATOR
from fusion_kernels.kmeans.blocks import fits as kmeans_blocks_fits
from fusion_kernels.kmeans.blocks import kmeans_blocks
from fusion_kernels.kmeans.means import row_norms
from fusion_kernels.kmeans.types import Options
from mlp_fusion.calibration.statistics import FFNStatistics
from mlp_fusion.methods import Reduction
from mlp_fusion.neurons import NeuronBundle

#: Balanced and weighted rows take a few hundred rounds of Hartigan's moves where raw ones take a hundred at most.
_MOST_ROUNDS = 1000


def fusion(
    bundle: NeuronBundle, width: int, *, seed: int, statistics: Sequence[FFNStatistics] | None = None
) -> Reduction:
    """Reduce each FFN of `bundle` to `width` neurons; see the module's docstring.

    Raises:
        ValueError: a weight is NaN or Inf.
    """
    weights, blocks = neuron_weights(bundle, statistics), input_and_output_blocks(bundle, statistics)
    return _fused(bundle, _grouped(blocks, weights, width, seed), weights, width)


def published(
    bundle: NeuronBundle, width: int, *, seed: int, statistics: Sequence[FFNStatistics] | None = None
) -> Reduction:
    """The paper's clustering, without data; see the module's docstring.

    Raises:
        ValueError: a weight is NaN or Inf.
    """
    found = kmeans(in_range(bundle.vectors()), width, init="k-means++", algorithm="lloyd", max_iter=100, seed=seed)
    groups = _Groups(found.labels, found.inertia, found.n_iter, found.status, _backend(found.labels, Options(width)))
    return _fused(bundle, groups, None, width)


def cluster(
    bundle: NeuronBundle, width: int, *, seed: int, statistics: Sequence[FFNStatistics] | None = None
) -> Reduction:
    """The paper's clustering with the sizes inside `w_out`: no scale, and so no care for the tangent kernel.

    Raises:
        ValueError: a weight is NaN or Inf.
    """
    found = published(bundle, width, seed=seed)
    folded = found.bundle.parameterized("folded")
    return dataclasses.replace(found, bundle=folded)


class _Groups(NamedTuple):
    """Labels (B, N), of each problem what :class:`fusion_kernels.KMeansResult` says, and who found them."""

    labels: Tensor
    inertia: Tensor
    n_iter: Tensor
    status: Tensor
    backend: str


def _backend(like: Tensor, options: Options) -> str:
    """The backend that k-means runs on for tensors there."""
    return OPERATOR.select("auto", like.device, options).name


def _grouped(blocks: Sequence[Tensor], weights: Tensor, width: int, seed: int) -> _Groups:
    """The clusters of balanced rows: from products of the blocks where these decide, else from the rows."""
    if not kmeans_blocks_fits(blocks, options := Options(width, max_iter=_MOST_ROUNDS, seed=seed)):
        return _of_rows(blocks, weights, width, seed)
    found = kmeans_blocks(blocks, weights, options)
    groups = _Groups(found.labels, found.inertia.to(weights.dtype), found.n_iter, found.status, "cpu")
    for n in (~found.settled).nonzero().squeeze(1).tolist():
        own = _of_rows([block[n : n + 1] for block in blocks], weights[n : n + 1], width, seed)
        for mine, theirs in zip(groups[:-1], own[:-1], strict=True):
            mine[n] = theirs[0]
    return groups


def _of_rows(blocks: Sequence[Tensor], weights: Tensor, width: int, seed: int) -> _Groups:
    rows = in_range(_balanced([block.to(weights.dtype) for block in blocks]))
    found = kmeans(rows, width, sample_weight=weights, init="k-means++", max_iter=_MOST_ROUNDS, seed=seed)
    by = _backend(rows, Options(width, max_iter=_MOST_ROUNDS))
    return _Groups(found.labels, found.inertia, found.n_iter, found.status, by)


def _fused(bundle: NeuronBundle, found: _Groups, weights: Tensor | None, width: int) -> Reduction:
    """One neuron for each group."""
    statuses = tuple(Status(int(s)) for s in found.status)
    if Status.NON_FINITE in statuses:
        raise ValueError("a weight is NaN or Inf: nothing can be clustered")
    labels = found.labels
    if any(int(torch.bincount(own, minlength=width).min()) == 0 for own in labels):
        labels = torch.stack([_shared_out(own, x, width) for own, x in zip(labels, bundle.vectors(), strict=True)])
    # The one definition of a fused neuron: means of raw rows, whatever the metric that grouped them.
    reduced = bundle.reduce(labels, weights, n_clusters=width, dtype=bundle.working_dtype)
    return Reduction(
        bundle=reduced,
        counts=torch.stack([torch.bincount(own, minlength=width) for own in labels]),
        inertia=found.inertia,
        iterations=found.n_iter,
        status=tuple("few_distinct" if s == Status.EMPTY_CLUSTERS else s.name.lower() for s in statuses),
        clustered_by=found.backend,
    )


def squares_fit(t: Tensor) -> bool:
    """Whether squares of the largest numbers, and sums of such, are normal numbers of float32."""
    largest = max(abs(float(bound)) for bound in torch.aminmax(t)) if t.numel() else 0.0
    return largest == 0.0 or 1e-14 < largest < 1e14


def in_range(t: Tensor) -> Tensor:
    """float32, or float64 where squares want it or it is float64 already."""
    return t.float() if t.dtype != torch.float64 and squares_fit(t) else t.double()


def _shared_out(labels: Tensor, rows: Tensor, width: int) -> Tensor:
    """Labels (N,) in which every cluster has members: the largest share theirs with those that have none.

    With fewer distinct neurons than clusters, identical neurons are fused into several equal ones, which share what
    they stand for: the outputs are the same, and no fused neuron is all zeros, by whose norm something may divide
    (DoRA). Silent neurons, `rows` of zeros, are shared out last.
    """
    counts = torch.bincount(labels, minlength=width)
    labels = labels.clone()
    silent = torch.zeros_like(counts, dtype=torch.bool).index_fill(0, labels[~rows.any(dim=1)], True)
    for cluster in (counts == 0).nonzero().squeeze(1).tolist():
        fits = torch.where(silent & bool(((counts > 1) & ~silent).any()), 0, counts)
        largest = int(fits.argmax())
        if int(fits[largest]) < 2:
            break
        members = (labels == largest).nonzero().squeeze(1)
        moved = members[1::2]
        labels[moved] = cluster
        counts[largest] -= len(moved)
        counts[cluster] = len(moved)
        silent[cluster] = silent[largest]
    return labels


def neuron_weights(bundle: NeuronBundle, statistics: Sequence[FFNStatistics] | None) -> Tensor:
    """`(B, N)` positive weights of the neurons, with mean 1; see the module's docstring.

    A floor of a millionth keeps neurons that never fire in some cluster's mean.
    """
    weights = row_norms(bundle.parameterized("folded").w_out) if statistics is None else importance(bundle, statistics)
    mean = weights.mean(dim=1, keepdim=True)
    weights = torch.where(mean > 0, weights / mean.where(mean > 0, torch.ones_like(mean)), torch.ones_like(weights))
    return weights.clamp(min=1e-6).to(bundle.working_dtype)


def importance(bundle: NeuronBundle, statistics: Sequence[FFNStatistics]) -> Tensor:
    """`(B, N)` :meth:`FFNStatistics.importance` of every problem, in the dtype of the weights if that has the range."""
    each = [s.importance(bundle.select(n)).double() for n, s in enumerate(statistics)]
    stacked = torch.stack(each)
    return stacked.to(bundle.w_in.dtype) if squares_fit(stacked) else stacked


def balanced_rows(bundle: NeuronBundle, statistics: Sequence[FFNStatistics] | None) -> Tensor:
    """`(B, N, D')` rows to cluster: input blocks in the metric of the inputs, then `w_out`, of equal total variance."""
    return _balanced(input_and_output_blocks(bundle, statistics))


def _balanced(blocks: Sequence[Tensor]) -> Tensor:
    return torch.cat([_unit_variance(block) for block in blocks], dim=-1)


def input_and_output_blocks(bundle: NeuronBundle, statistics: Sequence[FFNStatistics] | None) -> list[Tensor]:
    """The blocks of :func:`balanced_rows`, each with the variance that it has."""
    bundle = bundle.canonical()
    blocks = []
    for weight, bias in ((bundle.w_gate, bundle.b_gate), (bundle.w_in, bundle.b_in)):
        if weight is None:
            continue
        block = weight
        if bias is not None or statistics is not None:
            column = weight.new_zeros(*weight.shape[:2], 1) if bias is None else bias.unsqueeze(-1)
            block = torch.cat([weight, column], dim=-1)
        if statistics is not None:
            block = block @ torch.stack([_factor(s.input_moment) for s in statistics]).to(block.dtype)
        blocks.append(block)
    return [*blocks, bundle.w_out]


def _factor(moment: Tensor) -> Tensor:
    """F with F F^T = the second moment of the inputs, so that |w F| is the root mean square of w.[x, 1].

    A slight ridge: with fewer tokens than inputs, directions that no token had must not count for nothing.
    """
    ridge = 1e-4 * moment.diagonal().mean()
    return torch.linalg.cholesky(moment + ridge * torch.eye(len(moment), dtype=moment.dtype, device=moment.device))


def _unit_variance(block: Tensor) -> Tensor:
    wide = in_range(block)
    centred = wide - wide.mean(dim=1, keepdim=True)
    spread = torch.linalg.vector_norm(centred, dim=(1, 2), keepdim=True, dtype=torch.float64).to(block.dtype)
    return block / spread.where(spread > 0, torch.ones_like(spread))
