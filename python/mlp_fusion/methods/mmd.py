"""Kernel herding by gradient descent: a few neurons whose rows are distributed like those of all.

An FFN is N times a mean over its neurons. K random ones are moved, by AdamW, until the maximum mean discrepancy (MMD)
between both sets of rows is small; each then stands for N / K neurons, which is its scale.

Source: a baseline of MLP Fusion (arXiv 2307.08941); MMD from Gretton et al. 2012. The published code multiplies by the
square root of N / K on both sides of the activation, which is another function than N / K behind it for every
activation but ReLU, counts the output bias twice, and calls a Laplacian kernel Gaussian. Here the kernel is Gaussian,
with the median distance as its width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mlp_fusion.calibration.statistics import FFNStatistics
from mlp_fusion.errors import InputError
from mlp_fusion.methods import Reduction
from mlp_fusion.methods.fusion import squares_fit
from mlp_fusion.neurons import NeuronBundle

STEPS = 100
#: Step size, as a share of the root mean square of the rows' entries.
_STEP_SIZE = 0.02


def mmd(bundle: NeuronBundle, width: int, *, seed: int, statistics: Sequence[FFNStatistics] | None = None) -> Reduction:
    """`width` neurons after 100 steps of AdamW on the squared MMD, each with scale N / width.

    Reduction.inertia is the squared MMD that is left, up to the term of the original rows alone.

    Raises:
        InputError: the distances of the rows leave the range of float32.
    """
    rows = bundle.parameterized("folded").vectors()
    if not squares_fit(rows):
        raise InputError(f"weights of up to {float(rows.abs().max()):.0e} are not for method 'mmd': use another method")
    generator = torch.Generator().manual_seed(seed)
    start = torch.randperm(bundle.width, generator=generator)[:width].to(rows.device)
    found = [_herd(problem, problem[start]) for problem in rows]
    moved = torch.stack([points for points, _ in found])
    scale = torch.full(
        (bundle.batch, width), bundle.width / width,
        dtype=torch.promote_types(rows.dtype, torch.float32), device=rows.device,
    )  # fmt: skip
    left = torch.stack([loss for _, loss in found])
    return Reduction(bundle.with_vectors(moved, scale), None, left, None, ("ok",) * bundle.batch)


def _herd(rows: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    bandwidth = torch.cdist(start, start).flatten().median().square().clamp(min=torch.finfo(rows.dtype).tiny)

    def kernel(one: Tensor, other: Tensor) -> Tensor:
        norms = one.square().sum(1, keepdim=True) + other.square().sum(1)
        return torch.exp(-(norms - 2.0 * one @ other.T).clamp(min=0.0) / (2.0 * bandwidth))

    def discrepancy(points: Tensor) -> Tensor:
        return kernel(points, points).mean() - 2.0 * kernel(points, rows).mean()

    points = start.clone().requires_grad_()
    step = _STEP_SIZE * float(rows.square().mean().sqrt())
    optimizer = torch.optim.AdamW([points], lr=step, weight_decay=0.0)
    with torch.enable_grad():
        for _ in range(STEPS):
            optimizer.zero_grad()
            discrepancy(points).backward()
            optimizer.step()
    return points.detach(), discrepancy(points.detach())
