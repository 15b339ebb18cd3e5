"""MLP fusion as published: cluster the neurons, one fused neuron per cluster, scaled by the cluster's size.

Source: NTK-approximating MLP Fusion for Efficient Language Model Fine-tuning (ICML 2023, arXiv 2307.08941), section 4.
Rows `[w_in, b_in, w_out]`, k-means++ seeding, Lloyd iterations; centroids are the fused neurons, cluster sizes the
scale. The published code takes the best of 30 initialisations; seeds differ by a fraction of a percent in inertia, so
one is used here.
"""

from __future__ import annotations

import torch

from fusion_kernels import Status, kmeans
from mlp_fusion.methods import Reduction, method
from mlp_fusion.neurons import NeuronBundle


@method("fusion")
def fusion(bundle: NeuronBundle, width: int, *, seed: int) -> Reduction:
    """Reduce each FFN of `bundle` to `width` neurons; see the module's docstring.

    Raises:
        ValueError: a weight is NaN or Inf.
    """
    rows = bundle.vectors()
    rows = rows if rows.dtype == torch.float64 else rows.float()
    found = kmeans(rows, width, init="k-means++", algorithm="lloyd", seed=seed)
    statuses = tuple(Status(int(s)) for s in found.status)
    if Status.NON_FINITE in statuses:
        raise ValueError("a weight is NaN or Inf: nothing can be clustered")
    # The centroids of the result and `reduce` are the same means; `reduce` is the one definition of a fused neuron.
    reduced = bundle.reduce(found.labels, n_clusters=width)
    return Reduction(
        bundle=reduced,
        counts=found.counts,
        inertia=found.inertia,
        iterations=found.n_iter,
        status=tuple(s.name.lower() for s in statuses),
    )
