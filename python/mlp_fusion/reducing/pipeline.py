"""From FFNs to reduced FFNs: the method on FFNs of one shape side by side, then the corrections."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from fusion_kernels import gpu
from fusion_kernels.ntk import Kernel
from mlp_fusion.calibration.local_training import train_locally
from mlp_fusion.calibration.matching import MATCHING_ROWS, match_ntk
from mlp_fusion.calibration.refit import Refit, refit
from mlp_fusion.calibration.statistics import FFNStatistics
from mlp_fusion.choices import METHODS, PLAIN_METHOD
from mlp_fusion.families import FFNSite
from mlp_fusion.methods import Method, Reduction, get_method
from mlp_fusion.neurons import NeuronBundle, Parameterization
from mlp_fusion.settings import FuseSettings

#: Called as `progress(done, total)`, in units of FFNs reduced and, where FFNs are tuned, of steps of each.
Progress = Callable[[int, int], None]

#: An expert that fewer tokens reach is reduced by its weights alone: what so few say is chance.
LEAST_TOKENS = 32

#: Bytes of neuron vectors that a method works on side by side on a CPU; on a GPU a share of the memory that is left, as
#: copies of them and a method's workspace need as much again and more.
BATCH_BYTES, BATCH_SHARE = 256 * 2**20, 8


@dataclass(frozen=True)
class Recipe:
    """How FFNs are reduced.

    Attributes:
        method: the compression method.
        seed: of the method and of the rows whose kernel is matched.
        parameterization: the parameterization that the reduced FFNs will have.
        refit: fit output weights and bias to the calibration rows afterwards.
        tune_steps: steps of local tuning after that; 0 for none, or where `refit` is False.
        match: the kernel to match the scale to after that, or None.
    """

    method: Method
    seed: int
    parameterization: Parameterization
    refit: bool = False
    tune_steps: int = 0
    match: Kernel | None = None

    @staticmethod
    def of(settings: FuseSettings) -> Recipe:
        """What of `settings`, resolved, a single FFN is reduced by."""
        s, kernel = settings, cast("Kernel | None", settings.match)
        return Recipe(
            get_method(s.method),
            s.seed,
            s.parameterization,
            refit=bool(s.refit),
            tune_steps=s.tune_steps or 0,
            match=kernel,
        )


@dataclass(frozen=True, eq=False)
class ReducedFFN:
    """One FFN after method and corrections.

    Attributes:
        reduction: of the method, its bundle corrected; B = 1.
        seconds: wall-clock time of the method; FFNs worked on side by side share theirs equally.
        correction_seconds: of refit, tuning and matching; FFNs tuned side by side share that equally.
        ridge, held_out_error: of the refit, before any tuning; None without.
        trained: whether it was trained locally; None where that was not asked for.
        by_weights: whether no token was there to learn from, though others had some; None where there was no text.
    """

    reduction: Reduction
    seconds: float
    correction_seconds: float = 0.0
    ridge: float | None = None
    held_out_error: float | None = None
    trained: bool | None = None
    by_weights: bool | None = None

    @property
    def bundle(self) -> NeuronBundle:
        """What it computes now."""
        return self.reduction.bundle


def working_precision(bundle: NeuronBundle) -> NeuronBundle:
    """float64 stays; anything lower is worked on in float32."""
    return bundle.to(dtype=bundle.working_dtype)


def _stacked(bundles: Sequence[NeuronBundle], *, as_they_are: bool) -> NeuronBundle:
    """Them side by side, contiguous: strides must not decide about bits. In working precision unless `as_they_are`.

    Of a single one no more is copied than that takes; no method writes to what it gets.
    """
    joined = bundles[0] if len(bundles) == 1 else NeuronBundle.stack(bundles)
    return (joined if as_they_are else working_precision(joined)).map(_contiguous)


def _contiguous(tensor: Tensor) -> Tensor:
    """torch transposes a matrix faster than a stack of one."""
    return tensor[0].contiguous().unsqueeze(0) if len(tensor) == 1 else tensor.contiguous()


def _by_weights(
    bundle: NeuronBundle, width: int, *, seed: int, statistics: Sequence[FFNStatistics] | None = None
) -> Reduction:
    """`PLAIN_METHOD` without text, its scale folded: it lies beside what methods make that need text, without scale."""
    found = get_method(PLAIN_METHOD)(bundle, width, seed=seed)
    return dataclasses.replace(found, bundle=found.bundle.parameterized("folded"))


#: Of experts that no text has reached, where the method needs some.
_INSTEAD = Method(PLAIN_METHOD, _by_weights, METHODS[PLAIN_METHOD])


def _goes_as_it_is(method: Method, bundle: NeuronBundle) -> bool:
    """Whether a method that has no statistics takes the bundle in the precision that it has."""
    named = bundle.named()
    return method.entry.takes_bfloat16 and "scale" not in named and named["w_in"].dtype == torch.bfloat16


def with_enough_tokens(site: FFNSite, statistics: FFNStatistics) -> FFNStatistics:
    """The statistics of an FFN; none to speak of, of an expert that few tokens have reached."""
    few = site.is_expert and statistics.tokens < LEAST_TOKENS
    return dataclasses.replace(statistics, tokens=0) if few else statistics


def progress_units(recipe: Recipe) -> int:
    """What one FFN counts in :data:`Progress`."""
    return 1 + (recipe.tune_steps if recipe.refit else 0)


def _batch_bytes(device: torch.device) -> int:
    """Bytes of neuron vectors side by side on the device: what a method finds does not depend on it."""
    return max(BATCH_BYTES, gpu.free_memory(device) // BATCH_SHARE) if device.type == "cuda" else BATCH_BYTES


def reduce_ffns(
    recipe: Recipe,
    bundles: Sequence[NeuronBundle],
    widths: Sequence[int],
    statistics: Sequence[FFNStatistics] | None,
    progress: Progress | None = None,
    batch_bytes: int | None = None,
) -> list[ReducedFFN]:
    """Reduce FFNs (each with B = 1) to their widths; FFNs of one shape and width go through the method side by side.

    An FFN whose width is what it has already keeps its neurons. `statistics` holds one entry per FFN; one that has seen
    no token is reduced without, by :data:`mlp_fusion.choices.PLAIN_METHOD` where the method needs some. Tuned side by
    side are those whose rows are of the same sequences, as an encoder's and a decoder's are not, and whose errors are
    weighed alike, as an expert's and a dense one's are not. Side by side are as
    many as have `batch_bytes` of neuron vectors in float32, by default :data:`BATCH_BYTES`, on a GPU an eighth of its
    free memory if that is more.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for number, (bundle, width) in enumerate(zip(bundles, widths, strict=True)):
        rows: object = None
        if statistics is not None:
            own, tuned = statistics[number], recipe.refit and recipe.tune_steps > 0
            rows = (own.sequence.numpy().tobytes(), own.sensitivity is None) if tuned else own.tokens > 0
        groups.setdefault((bundle.layout, bundle.w_in.device, width, rows), []).append(number)
    results: dict[int, ReducedFFN] = {}
    done, units = 0, progress_units(recipe)

    def report(now: int) -> None:
        if progress is not None:
            progress(now, units * len(bundles))

    def stepped(before: int, ffns: int, step: int) -> None:
        report(before + step * ffns)

    for members in groups.values():
        first = bundles[members[0]]
        problem_bytes = 4 * first.width * first.vector_length
        size = max(1, (batch_bytes or _batch_bytes(first.w_in.device)) // problem_bytes)
        for chunk in (members[i : i + size] for i in range(0, len(members), size)):
            started = time.perf_counter()
            known = None if statistics is None else [statistics[n] for n in chunk]
            if known is not None and known[0].tokens == 0:
                known = None
            narrower = widths[chunk[0]] != first.width
            method = recipe.method
            if known is None and statistics is not None and method.needs_statistics:
                method = _INSTEAD
            as_they_are = narrower and known is None and _goes_as_it_is(method, first)
            stacked = _stacked([bundles[n] for n in chunk], as_they_are=as_they_are)
            if not narrower:
                reduction = Reduction.plain(stacked)
            else:
                reduction = method(stacked, widths[chunk[0]], seed=recipe.seed, statistics=known)
            seconds = (time.perf_counter() - started) / len(chunk)
            alone = None if statistics is None else known is None
            each = [
                ReducedFFN(_select(reduction, position), seconds, by_weights=alone) for position in range(len(chunk))
            ]
            if known is not None and reduction.bundle.width < first.width:
                each = _fit(recipe, stacked, each, known, functools.partial(stepped, done, len(chunk)))
            for position, n in enumerate(chunk):
                ffn = each[position]
                if statistics is not None and narrower:
                    ffn = _match(recipe, stacked.select(position), ffn, None if known is None else known[position])
                results[n] = ffn
                report(done + (units - 1) * len(chunk) + position + 1)
            done += units * len(chunk)
    return [results[n] for n in range(len(bundles))]


def _fit(
    recipe: Recipe,
    originals: NeuronBundle,
    ffns: Sequence[ReducedFFN],
    statistics: Sequence[FFNStatistics],
    progress: Callable[[int], None],
) -> list[ReducedFFN]:
    """Refit, one by one; then tuning, all side by side."""
    if not recipe.refit:
        return list(ffns)
    fitted: list[Refit] = []
    seconds: list[float] = []
    trained: list[bool | None] = [None] * len(ffns)
    for ffn, known in zip(ffns, statistics, strict=True):
        started = time.perf_counter()
        fitted.append(refit(ffn.reduction.bundle, known))
        seconds.append(time.perf_counter() - started)
    if recipe.tune_steps > 0:
        started = time.perf_counter()
        start = NeuronBundle.stack([fit.bundle for fit in fitted])
        tuned = train_locally(
            start, statistics, steps=recipe.tune_steps, seed=recipe.seed, originals=originals, progress=progress
        )
        fitted = [dataclasses.replace(fit, bundle=tuned.bundle.select(n)) for n, fit in enumerate(fitted)]
        trained = [not each for each in tuned.before.isnan().tolist()]
        shared = (time.perf_counter() - started) / len(ffns)
        seconds = [own + shared for own in seconds]
    return [
        dataclasses.replace(
            ffn,
            reduction=dataclasses.replace(ffn.reduction, bundle=fit.bundle),
            correction_seconds=own,
            ridge=fit.ridge,
            held_out_error=fit.held_out_error,
            trained=was,
        )
        for ffn, fit, own, was in zip(ffns, fitted, seconds, trained, strict=True)
    ]


def _match(recipe: Recipe, original: NeuronBundle, ffn: ReducedFFN, statistics: FFNStatistics | None) -> ReducedFFN:
    """Match the kernel, where it is asked for; without text, the scale is what it is."""
    if recipe.match is None:
        return ffn
    if statistics is None:
        return _with_scale(ffn)
    started = time.perf_counter()
    x = statistics.rows(MATCHING_ROWS, seed=recipe.seed)
    bundle = match_ntk(original, ffn.reduction.bundle, x, kernel=recipe.match, parameterization=recipe.parameterization)
    return dataclasses.replace(
        ffn,
        reduction=dataclasses.replace(ffn.reduction, bundle=bundle),
        correction_seconds=ffn.correction_seconds + time.perf_counter() - started,
    )


def _with_scale(ffn: ReducedFFN) -> ReducedFFN:
    """With a scale of ones where it has none: those beside it, which are matched, have one."""
    bundle = ffn.bundle
    if bundle.scale is not None:
        return ffn
    like = torch.promote_types(bundle.w_out.dtype, torch.float32)
    scaled = bundle.unfolded(torch.ones(bundle.w_out.shape[:2], dtype=like, device=bundle.w_out.device))
    return dataclasses.replace(ffn, reduction=dataclasses.replace(ffn.reduction, bundle=scaled))


def _select(reduction: Reduction, index: int) -> Reduction:
    def pick(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[index : index + 1]

    return Reduction(
        bundle=reduction.bundle.select(index),
        counts=pick(reduction.counts),
        inertia=pick(reduction.inertia),
        iterations=pick(reduction.iterations),
        status=(reduction.status[index],),
        clustered_by=reduction.clustered_by,
    )
