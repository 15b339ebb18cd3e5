"""`fuse`: shrink the FFNs of a loaded model in place."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mlp_fusion.calibration import FFNStatistics, collect, output_sensitivities
from mlp_fusion.calibration.statistics import take_calibration
from mlp_fusion.calibration.text import Calibration, calibration_batches
from mlp_fusion.choices import CALIBRATION_SENTENCES
from mlp_fusion.errors import InputError
from mlp_fusion.families import Architecture, FFNSite
from mlp_fusion.measure import FFNRow, FusionReport, ffn_errors, relative_error
from mlp_fusion.measure.errors import OPTIMIZER_KERNELS
from mlp_fusion.measure.report import CalibrationRecord
from mlp_fusion.methods import get_method
from mlp_fusion.neurons import NeuronBundle
from mlp_fusion.reducing.pipeline import (
    Progress,
    Recipe,
    ReducedFFN,
    progress_units,
    reduce_ffns,
    working_precision,
)
from mlp_fusion.reducing.sequential import reduce_sequentially
from mlp_fusion.reducing.widths import allocate_widths, hidden_state_changes
from mlp_fusion.running.batches import Batch, random_batch, token_mask
from mlp_fusion.running.taps import Activations, capture_activations
from mlp_fusion.selection import (
    Layers,
    Width,
    check_options,
    parameterization_for,
    resolve_layers,
    resolve_width,
)
from mlp_fusion.store.record import check_config, fused_config, replace_config
from mlp_fusion.store.states import know_forms

#: Token positions that errors are measured on; the kernels need this many squared numbers.
SAMPLE_ROWS = 512
#: An entry's forward pass must agree with the model's own to this many units of rounding, and to this share at most.
_SELF_TEST_ULPS, _SELF_TEST_SHARE = 64, 0.05


@dataclass(frozen=True)
class Options:
    """The options of `fuse` that do not depend on the model, checked by :func:`check_options`."""

    recipe: Recipe
    optimizer: str | None
    calibrated: bool
    sequential: bool
    budget: float | None


def _options(
    method: str,
    *,
    optimizer: str | None,
    seed: int,
    calibrated: bool,
    refit: bool | None,
    match: str | None,
    tune_steps: int,
    sequential: bool,
    budget: float | None,
) -> Options:
    """The checked options as the reductions take them."""
    form = parameterization_for(optimizer)
    kernel: Any = OPTIMIZER_KERNELS[form] if match == "auto" else match
    fit = calibrated if refit is None else refit
    recipe = Recipe(get_method(method), seed, form, refit=fit, tune_steps=tune_steps, match=kernel)
    return Options(recipe, optimizer, calibrated, sequential, budget)


def fuse(
    model: nn.Module,
    width: Width | str,
    layers: Layers = None,
    method: str = "fusion",
    *,
    optimizer: str | None = "adamw",
    seed: int = 0,
    sample: Batch | Iterable[Batch] | None = None,
    calibration: Calibration | None = None,
    refit: bool | None = None,
    match: str | None = None,
    tune_steps: int = 0,
    sequential: bool = False,
    budget: float | None = None,
    calibration_sentences: int = CALIBRATION_SENTENCES,
    calibration_rows: int | None = None,
    progress: Progress | None = None,
) -> FusionReport:
    """Shrink the FFNs of a loaded Hugging Face model, in place.

    The model then trains like any other, in a bare loop or in `transformers.Trainer`; `save_pretrained` writes a plain
    checkpoint. Build the optimiser after this call: the FFNs' parameters are new.

    Args:
        model: a `PreTrainedModel` of a supported architecture, in memory, unquantised, without adapters.
        width: neurons to keep in each FFN: a count (`768`) or a share (`0.25`), the share rounded to a multiple that
            engines can serve; `"auto"` gives each FFN what its errors on the calibration text call for, within
            `budget`.
        layers: which layers: None or `"all"`, a range, a list, or a text such as `"4-11"` or `"last:8"`.
        method: name of the compression method.
        optimizer: what the model will be trained with; picks the parameterization that keeps its training dynamics:
            explicit scale for Adam-like ones, split scale for SGD-like ones, None folds the scale (inference).
        seed: of the method, of the sample's and the calibration's rows, and of the sample itself where none is given.
        sample: batches that the reported errors are measured on, as a tokenizer returns them. None: the calibration
            text, or else random token ids, which run the real layers but are not real text.
        calibration: text that the method and its corrections learn from; a few hundred sentences suffice. Batches, the
            path of a text file, a list of sentences, or a `datasets` dataset: see
            :func:`mlp_fusion.calibration.text.calibration_batches`. An iterable that is no list is read for 262,144
            tokens. The model runs over the text once (four times when sequential). Memory: see
            :func:`mlp_fusion.calibration.collect`.
        refit: fit each reduced FFN's output weights and bias to the original's outputs, by ridge regression; None:
            whenever there is calibration text.
        match: tangent kernel that the scale is matched to: `"gd"` (gradient descent), `"sign"` (Adam-like), `"auto"`
            for the one of `optimizer`, or None to keep the method's scale. Outputs do not depend on it.
        tune_steps: Adam steps by which each reduced FFN learns the original's outputs on the calibration text, all FFNs
            of one shape side by side, between two refits; 0 for none. A few hundred for a few hundred sentences; a few
            thousand need thousands, and their rows kept. See :func:`mlp_fusion.calibration.tune`, and
            :func:`mlp_fusion.calibration.output_sensitivities` for the gradients through the model that it takes.
        sequential: calibrate each FFN on the inputs that the already reduced ones before it produce, so that it leads
            the hidden states back to the original model's; see :mod:`mlp_fusion.reducing.sequential`.
        budget: with `width="auto"`, the share of the FFNs' parameters to keep.
        calibration_sentences: how many sentences of a file, a list or a dataset are read: the first ones.
        calibration_rows: input and output rows that each FFN keeps of the calibration text, to fit and to tune on:
            `2 d` numbers each, for all FFNs at once unless sequential. None: 16,384, or fewer that fit into 256 MiB.
        progress: called as `progress(done, total)` with FFNs done, counting steps where they are tuned.

    Returns:
        A `FusionReport` with a row per FFN.

    Raises:
        InputError: the model or an option cannot be worked on; the model is then as it was.
    """
    started = time.perf_counter()
    architecture, sites = find_ffns(model)
    config: Any = model.config
    asked: dict[str, Any] = {
        "optimizer": optimizer, "seed": seed, "calibrated": calibration is not None, "refit": refit, "match": match,
        "tune_steps": tune_steps, "sequential": sequential, "budget": budget,
    }  # fmt: skip
    check_options(
        width, method, calibration_sentences=calibration_sentences, calibration_rows=calibration_rows, **asked
    )
    options = _options(method, **asked)
    form = options.recipe.form
    indices = set(resolve_layers(layers, [site.index for site in sites]))
    chosen = [site for site in sites if site.index in indices]
    originals = [architecture.read(site, config) for site in chosen]
    widths = [] if isinstance(width, str) else [resolve_width(width, bundle.width) for bundle in originals]
    check_finite(model)
    before = count_parameters(model)

    known = (
        None
        if calibration is None
        else take_calibration(calibration_batches(calibration, model, sentences=calibration_sentences))
    )
    calibrating = time.perf_counter()
    statistics = None
    if known is not None and (not sequential or budget is not None):
        statistics = collect(model, architecture, chosen, known, seed=seed, rows=calibration_rows)
    sensitivities: list[Tensor | None] = [None] * len(chosen)
    if known is not None and options.recipe.tune_steps > 0:
        sensitivities = [*output_sensitivities(model, architecture, chosen, known, seed=seed)]
    calibration_seconds = time.perf_counter() - calibrating if statistics is not None else None
    if sample is None and statistics is not None:
        activations = [_sampled(s, seed) for s in statistics]
    else:
        batches: Any = sample if sample is not None else known
        if batches is None:
            batches = random_batch(model, seed=seed)
        activations = capture_activations(model, architecture, chosen, batches, rows=SAMPLE_ROWS, seed=seed)
    for site, bundle, rows in zip(chosen, originals, activations, strict=True):
        _self_test(architecture, site, bundle, rows)
    if budget is not None and statistics is not None and known is not None:
        effects = functools.partial(hidden_state_changes, model, architecture, chosen, known)
        widths = allocate_widths(options.recipe, originals, statistics, budget, effects, progress)
    if known is not None and sequential:
        reduce = functools.partial(_reduce_one, options.recipe, originals, widths, sensitivities, progress)
        reduced = reduce_sequentially(model, architecture, chosen, known, reduce, seed=seed, rows=calibration_rows)
    else:
        if statistics is not None:
            statistics = [
                dataclasses.replace(s, sensitivity=found) for s, found in zip(statistics, sensitivities, strict=True)
            ]
        reduced = reduce_ffns(options.recipe, originals, widths, statistics, progress)
    report_rows = [
        _row(site, original, ffn, form, sampled)
        for site, original, ffn, sampled in zip(chosen, originals, reduced, activations, strict=True)
    ]
    after_widths = {site.index: architecture.neurons(site) for site in sites}
    after_widths.update({site.index: k for site, k in zip(chosen, widths, strict=True)})
    # An FFN that a budget leaves whole stays the model's own, and has no scale to be restored.
    narrowed = [n for n, bundle in enumerate(originals) if reduced[n].reduction.bundle.width < bundle.width]
    fused = [chosen[n].index for n in narrowed]
    # Methods that choose neurons give them no scale: there is no form to go on training in, and none to restore.
    scaled = any(reduced[n].reduction.bundle.scale is not None for n in narrowed)
    kept = form if scaled else "folded"
    changed = fused_config(config, architecture, after_widths, fused, method=method, form=kept)
    # Everything that can go wrong has gone right: only now is the model touched.
    for n in narrowed:
        architecture.install(chosen[n], reduced[n].reduction.bundle, form)
    replace_config(model, changed)
    know_forms(model, architecture)
    after = count_parameters(model)
    described = "the given sample" if sample is not None else "random token ids"
    return FusionReport(
        model_type=config.model_type,
        method=method,
        optimizer=optimizer,
        parameterization=form,
        seed=seed,
        sample=described if known is None or sample is not None else "the calibration text, which was fitted to",
        sample_rows=len(activations[0].x),
        parameters_before=before[0],
        parameters_after=after[0],
        bytes_before=before[1],
        bytes_after=after[1],
        seconds=time.perf_counter() - started,
        rows=report_rows,
        calibration=_describe(options, known, calibration_seconds),
    )


def _sampled(statistics: FFNStatistics, seed: int) -> Activations:
    """Rows to measure errors on from those that calibration has kept: the model need not run again."""
    order = torch.randperm(len(statistics.x), generator=torch.Generator().manual_seed(seed))
    chosen = order[:SAMPLE_ROWS].to(statistics.x.device)
    return Activations(statistics.x[chosen], statistics.y[chosen])


def _reduce_one(
    recipe: Recipe,
    originals: Sequence[NeuronBundle],
    widths: Sequence[int],
    sensitivities: Sequence[Tensor | None],
    progress: Progress | None,
    number: int,
    statistics: FFNStatistics,
) -> ReducedFFN:
    """One of the FFNs, whose statistics are only now known."""

    def report(done: int, _total: int) -> None:
        if progress is not None:
            units = progress_units(recipe)
            progress(units * number + done, units * len(originals))

    known = dataclasses.replace(statistics, sensitivity=sensitivities[number])
    return reduce_ffns(recipe, [originals[number]], [widths[number]], [known], report)[0]


def _describe(options: Options, batches: Sequence[Batch] | None, seconds: float | None) -> CalibrationRecord | None:
    if batches is None:
        return None
    recipe = options.recipe
    return CalibrationRecord(
        tokens=sum(int(token_mask(batch).sum()) for batch in batches),
        refit=recipe.refit,
        match=recipe.match,
        tune_steps=recipe.tune_steps,
        sequential=options.sequential,
        budget=options.budget,
        seconds=seconds,
    )


def find_ffns(model: nn.Module) -> tuple[Architecture, list[FFNSite]]:
    """The architecture of `model` and its unfused FFNs.

    Raises:
        InputError: not a Hugging Face model, one that `check_config` refuses, or no FFN found.
    """
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if not model_type:
        raise InputError(f"{type(model).__name__} has no config.model_type: give a Hugging Face model")
    architecture = check_config(config)
    sites = architecture.sites(model)
    if not sites:
        raise InputError(f"no FFN found in {type(model).__name__} where the {model_type!r} architecture has them")
    layers = config.num_hidden_layers
    if [site.index for site in sites] != list(range(layers)):
        raise InputError(f"the model has {len(sites)} FFNs, its config says {layers} layers: mend the config")
    if any("base_layer" in name for name, _ in model.named_modules()):
        raise InputError("the model carries adapters: merge adapters into the weights first (merge_and_unload)")
    return architecture, sites


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Number and bytes of the model's parameters; tied ones count once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters)


def check_finite(model: nn.Module) -> None:
    """Raise InputError where a weight of `model` is NaN or infinite."""
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and parameter.is_floating_point() and not bool(parameter.isfinite().all()):
            raise InputError(f"{name} holds NaN or Inf: the checkpoint is damaged")


def _self_test(architecture: Architecture, site: FFNSite, bundle: NeuronBundle, rows: Activations) -> None:
    """Compare the bundle with the model's own FFN on real inputs: a wrong entry must not pass unnoticed."""
    bundle = working_precision(bundle)
    exact = bundle.forward(rows.x.to(bundle.w_in.dtype))[0]
    error = relative_error(rows.y, exact)
    epsilon = torch.finfo(rows.y.dtype).eps
    if rows.y.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        # TF32 or bfloat16 products under a float32 name.
        epsilon = torch.finfo(torch.bfloat16).eps
    limit = min(_SELF_TEST_ULPS * epsilon, _SELF_TEST_SHARE)
    if not error <= limit:
        raise InputError(
            f"{site.path}: this FFN does not compute what the {architecture.model_types[0]!r} architecture says "
            f"(relative difference {error:.1e}): its code or its activation is not the standard one"
        )


def _row(site: FFNSite, original: NeuronBundle, ffn: ReducedFFN, parameterization: str, sampled: Activations) -> FFNRow:
    fused = ffn.reduction.bundle.parameterized(parameterization)
    original = working_precision(original)
    errors = ffn_errors(original, fused, sampled.x.to(original.w_in.dtype))
    counts = ffn.reduction.counts
    return FFNRow(
        layer=site.index,
        path=site.path,
        neurons_before=original.width,
        neurons_after=fused.width,
        output_error=errors.output,
        ntk_error=errors.ntk,
        largest_cluster=None if counts is None else int(counts.max()),
        singletons=None if counts is None else int((counts == 1).sum()),
        empty_clusters=None if counts is None else int((counts == 0).sum()),
        status=ffn.reduction.status[0],
        seconds=ffn.seconds,
        correction_seconds=ffn.correction_seconds,
        ridge=ffn.ridge,
        held_out_error=ffn.held_out_error,
        largest_scale=None if fused.scale is None else float(fused.scale.max()),
        cluster_sizes=None if counts is None else _histogram(counts),
        ntk_spectrum=errors.spectrum,
    )


def _histogram(counts: Tensor) -> list[list[int]]:
    """Cluster sizes as pairs of a size and the number of clusters that have it, by rising size."""
    pairs: list[list[int]] = torch.stack(counts.unique(return_counts=True), dim=1).tolist()
    return pairs
