"""`fuse`: shrink the FFNs of a loaded model in place."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, cast

from torch import nn

from mlp_fusion.calibration.statistics import take_calibration
from mlp_fusion.calibration.text import Calibration, calibration_batches
from mlp_fusion.errors import SkippableError
from mlp_fusion.measure import FusionReport
from mlp_fusion.reducing.chosen import ChosenFFNs, check_finite, count_parameters, inner_model
from mlp_fusion.reducing.every import reduce_chosen
from mlp_fusion.reducing.learning import learn
from mlp_fusion.reducing.pipeline import Progress
from mlp_fusion.reducing.rows import fused_rows
from mlp_fusion.reducing.sequential import check_sequence
from mlp_fusion.running.batches import Batch
from mlp_fusion.running.drawing import text_refusal
from mlp_fusion.running.runner import ordinary
from mlp_fusion.running.synthetic import synthetic_batches, synthetic_kind
from mlp_fusion.selection import Layers, Width
from mlp_fusion.settings import FuseSettings, make, takes
from mlp_fusion.store.record import replace_config


@takes(FuseSettings)
@ordinary()
def fuse(
    model: nn.Module,
    width: Width | str,
    layers: Layers = None,
    method: str = FuseSettings.method,
    *,
    sample: Batch | Iterable[Batch] | None = None,
    calibration: Calibration | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> FusionReport:
    """Shrink the FFNs of a loaded Hugging Face model, in place.

    The model then trains like any other, in a bare loop or in `transformers.Trainer`; `save_pretrained` writes a plain
    checkpoint. Build the optimiser after this call: the FFNs' parameters are new.

    Args:
        model: a `PreTrainedModel` in memory, unquantised, without adapters, or a module around one. Its FFNs are found
            by what they compute, and proved; experts of a Mixture-of-Experts model are FFNs, each by itself.
        width: neurons to keep in each FFN: a count (`768`) or a share (`0.25`), the share rounded to a multiple that
            engines can serve; `"auto"` gives each FFN what its errors on the calibration text call for, within
            `budget`.
        layers: which FFNs, by their numbers (where each layer has one, the layer's): None or `"all"`, a range, a list,
            or a text such as `"4-11"` or `"last:8"`; or by their paths, such as `"decoder.*"`. Where something like an
            FFN is not proved, the proved ones have to be chosen so; `"*"` is all of them.
        method: name of the compression method.
        sample: batches that the reported errors are measured on, as a tokenizer or the model's own processor returns
            them (`pixel_values`, `input_features`). None: what was calibrated on, or else random inputs, which run the
            real layers but are not real text or images.
        calibration: what the method and its corrections learn from; a few hundred sentences suffice. Batches, the path
            of a text file, a list of sentences (both need a tokenizer), or a `datasets` dataset: see
            :func:`mlp_fusion.calibration.text.calibration_batches`. An iterable that is no list is read for 262,144
            tokens. The model runs over it once (three times when sequential, as with method auto). Memory: see
            :func:`mlp_fusion.calibration.collect`.
        progress: called as `progress(done, total)` with FFNs done, counting steps where they are tuned.
        options: the fields of :class:`mlp_fusion.settings.FuseSettings`.

    Returns:
        A `FusionReport` with a row per FFN.

    Raises:
        InputError: the model or an option cannot be worked on; the model is then as it was.

    Examples:
        >>> from transformers import AutoModel
        >>> model = AutoModel.from_pretrained("all-MiniLM-L6-v2")
        >>> report = mlp_fusion.fuse(model, width=0.25, calibration="sentences.txt", optimizer="adamw")
        >>> [row.neurons_after / row.neurons_before for row in report.rows[:2]]
        [0.25, 0.25]
        >>> model.save_pretrained("fused")  # a plain checkpoint
        >>> AutoModel.from_pretrained("fused").num_parameters() == report.parameters_after
        True
    """
    started = time.perf_counter()
    whole, model = model, inner_model(model)
    asked = make(
        FuseSettings,
        {"width": width, "layers": layers, "method": method, **options},
        "fuse",
        ("sample", "calibration", "progress"),
    )
    asked.check(calibrated=calibration is not None)
    calibrated = calibration is not None or asked.synthetic is not None
    ffns = ChosenFFNs.find(model, asked.layers, asked.only)
    chosen = sorted({site.index for site in ffns.sites})
    dense = not any(site.is_expert for site in ffns.sites)
    settings = asked.resolved(chosen, calibrated=calibrated, named=ffns.named, dense=dense)
    ffns.check(settings)
    widths = [] if isinstance(asked.width, str) else ffns.widths(cast("Width", asked.width), settings.multiple)
    check_finite(model)
    before = count_parameters(model)
    known, synthetic = _batches(ffns, calibration, settings)
    if known is not None and settings.sequential and asked.sequential is None:
        settings = _in_sequence(ffns, settings, known)
    learnt = learn(ffns, settings, known, sample, synthetic=synthetic, may_skip=asked.may_skip)
    ffns.self_test(learnt.activations)
    reduced = reduce_chosen(ffns, settings, widths, learnt, progress)
    rows = fused_rows(ffns, reduced, learnt.activations, settings.parameterization)
    # Everything that can go wrong has gone right: only now is the model touched.
    ffns.install(reduced, settings)
    if whole is not model:
        replace_config(whole, model.config)
    after = count_parameters(model)
    config: Any = model.config
    return FusionReport(
        model_type=config.model_type,
        settings=settings,
        parameterization=settings.parameterization,
        sample=learnt.sample,
        sample_rows=max(len(rows_of.x) for rows_of in learnt.activations),
        parameters_before=before[0],
        parameters_after=after[0],
        bytes_before=before[1],
        bytes_after=after[1],
        seconds=time.perf_counter() - started,
        rows=rows,
        calibration=learnt.record(),
    )


def _batches(
    ffns: ChosenFFNs, calibration: Calibration | None, settings: FuseSettings
) -> tuple[Sequence[Batch] | None, str | None]:
    """What is calibrated on, or None, and if it is something that stands in for text, what."""
    model = ffns.model
    if settings.synthetic is not None:
        kind = synthetic_kind(model, text_refusal(model, ffns.architecture, ffns.sites))
        return synthetic_batches(model, kind, settings.synthetic, seed=settings.seed), kind
    if calibration is None:
        return None, None
    text = calibration_batches(calibration, model, sentences=settings.calibration_sentences)
    return take_calibration(model, text), None


def _in_sequence(ffns: ChosenFFNs, settings: FuseSettings, batches: Sequence[Batch]) -> FuseSettings:
    """The settings; without the sequence, which nobody has asked for, where the model does not allow one."""
    try:
        check_sequence(ffns.model, ffns.architecture, ffns.sites, batches)
    except SkippableError as error:
        warnings.warn(f"all FFNs are calibrated at once: {error}", stacklevel=4)
        return dataclasses.replace(settings, sequential=False)
    return settings
