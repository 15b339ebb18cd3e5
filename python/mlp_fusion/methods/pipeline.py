"""From FFNs to reduced FFNs: the method on FFNs of one shape side by side, then the corrections one by one."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusion_kernels.ntk import Kernel
from mlp_fusion.calibration.matching import MATCHING_ROWS, match_ntk
from mlp_fusion.calibration.refit import refit
from mlp_fusion.calibration.statistics import FFNStatistics
from mlp_fusion.methods import Method, Reduction
from mlp_fusion.neurons import NeuronBundle, Parameterization

#: Called as `progress(done, total)` with FFNs.
Progress = Callable[[int, int], None]

#: Bytes of neuron vectors that a method works on side by side.
BATCH_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Recipe:
    """How FFNs are reduced.

    Attributes:
        method: the compression method.
        seed: of the method and of the rows whose kernel is matched.
        form: the parameterization that the reduced FFNs will have.
        refit: fit output weights and bias to the calibration rows afterwards.
        match: the kernel to match the scale to after that, or None.
    """

    method: Method
    seed: int
    form: Parameterization
    refit: bool = False
    match: Kernel | None = None


@dataclass(frozen=True, eq=False)
class ReducedFFN:
    """One FFN after method and corrections.

    Attributes:
        reduction: of the method, its bundle corrected; B = 1.
        seconds: wall-clock time of the method; FFNs worked on side by side share theirs equally.
        correction_seconds: of refit and matching.
        ridge, held_out_error: of the refit; None without.
    """

    reduction: Reduction
    seconds: float
    correction_seconds: float = 0.0
    ridge: float | None = None
    held_out_error: float | None = None


def working_precision(bundle: NeuronBundle) -> NeuronBundle:
    """float64 stays; anything lower is worked on in float32."""
    return bundle.to(dtype=torch.promote_types(bundle.w_in.dtype, torch.float32))


def reduce_ffns(
    recipe: Recipe,
    bundles: Sequence[NeuronBundle],
    widths: Sequence[int],
    statistics: Sequence[FFNStatistics] | None,
    progress: Progress | None = None,
) -> list[ReducedFFN]:
    """Reduce FFNs (each with B = 1) to their widths; FFNs of one shape and width go through the method side by side.

    An FFN whose width is what it has already keeps its neurons. `statistics` holds one entry per FFN.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for number, (bundle, width) in enumerate(zip(bundles, widths, strict=True)):
        groups.setdefault((bundle.layout, bundle.w_in.device, width), []).append(number)
    results: dict[int, ReducedFFN] = {}
    for members in groups.values():
        first = bundles[members[0]]
        problem_bytes = 4 * first.width * first.vectors().shape[-1]
        size = max(1, BATCH_BYTES // problem_bytes)
        for chunk in (members[i : i + size] for i in range(0, len(members), size)):
            started = time.perf_counter()
            stacked = working_precision(NeuronBundle.stack([bundles[n] for n in chunk]))
            known = None if statistics is None else [statistics[n] for n in chunk]
            if widths[chunk[0]] == first.width:
                reduction = Reduction.plain(stacked)
            else:
                reduction = recipe.method(stacked, widths[chunk[0]], seed=recipe.seed, statistics=known)
            seconds = (time.perf_counter() - started) / len(chunk)
            for position, n in enumerate(chunk):
                alone = ReducedFFN(_select(reduction, position), seconds)
                if known is not None and reduction.bundle.width < first.width:
                    alone = _correct(recipe, stacked.select(position), alone, known[position])
                results[n] = alone
                if progress is not None:
                    progress(len(results), len(bundles))
    return [results[n] for n in range(len(bundles))]


def _correct(recipe: Recipe, original: NeuronBundle, ffn: ReducedFFN, statistics: FFNStatistics) -> ReducedFFN:
    started = time.perf_counter()
    bundle, ridge, held_out_error = ffn.reduction.bundle, None, None
    if recipe.refit:
        fitted = refit(bundle, statistics)
        bundle, ridge, held_out_error = fitted.bundle, fitted.ridge, fitted.held_out_error
    if recipe.match is not None:
        x = statistics.rows(MATCHING_ROWS, seed=recipe.seed)
        bundle = match_ntk(original, bundle, x, kernel=recipe.match, form=recipe.form)
    return ReducedFFN(
        reduction=dataclasses.replace(ffn.reduction, bundle=bundle),
        seconds=ffn.seconds,
        correction_seconds=time.perf_counter() - started,
        ridge=ridge,
        held_out_error=held_out_error,
    )


def _select(reduction: Reduction, index: int) -> Reduction:
    def pick(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[index : index + 1]

    return Reduction(
        bundle=reduction.bundle.select(index),
        counts=pick(reduction.counts),
        inertia=pick(reduction.inertia),
        iterations=pick(reduction.iterations),
        status=(reduction.status[index],),
    )
