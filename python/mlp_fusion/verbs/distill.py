"""`distill`: teach a small student with one shared layer what a larger encoder does, layer by layer."""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

from mlp_fusion.distilling import DistillSettings
from mlp_fusion.errors import InputError
from mlp_fusion.finetuning.data import Data, read_rows
from mlp_fusion.finetuning.distillation import Distillation, Lesson
from mlp_fusion.finetuning.loading import Model
from mlp_fusion.finetuning.result import DISTILL_FILE, DistillReport, Progress
from mlp_fusion.finetuning.session import check_folder, digest, is_main
from mlp_fusion.running.runner import resolve_device
from mlp_fusion.settings import make, takes
from mlp_fusion.store.output import output_path, taken


@takes(DistillSettings)
def distill(
    teacher: Model,
    out: str | Path,
    text: Data,
    evaluation: Data | None = None,
    *,
    columns: Sequence[str] | None = None,
    tokenizer: Any = None,
    progress: Progress | None = None,
    **options: Any,
) -> DistillReport:
    """Distil an encoder into a MiniALBERT, a small model that goes through one layer several times.

    The student learns the teacher's attention maps and hidden states behind the layers that its recursions are mapped
    to, the teacher's predictions for masked tokens, and the tokens themselves (Nouriborji et al., arXiv 2210.06425).
    No attention map is kept: a step takes the memory of the two models and of one block of heads. The same seed gives
    the same weights on one machine. On CUDA it trains under bfloat16 autocast where the GPU can, and under `torchrun`
    on several.

    Args:
        teacher: a folder or hub name of an encoder with a head for masked tokens, or a model in memory, of which a copy
            teaches.
        out: folder to make. It holds the checkpoints of the unfinished run, and in the end the student, the tokenizer
            and `distill.json`, the report.
        text, evaluation: files, datasets or rows: see :func:`mlp_fusion.running.rows.read_rows`. Texts are put end to
            end and cut into blocks of `max_length` tokens, or of what the teacher has positions for. The masks of what
            is evaluated are always the same.
        columns: the text's column, where it has an unusual name.
        tokenizer: None for the one beside the teacher's weights.
        progress: called as `progress(stage, done, total, loss)` after each step; the stage is `train`.
        options: the fields of :class:`mlp_fusion.distilling.DistillSettings`.

    Returns:
        A `DistillReport`, which is also in `distill.json`.

    Raises:
        InputError: an option, the text, or the teacher cannot be used, or `out` is not empty; nothing has been written.
        FloatingPointError: the loss is NaN or infinite. Checkpoints stay.

    Examples:
        >>> small = {"recursions": 2, "embedding_size": 8, "max_length": 16}
        >>> report = mlp_fusion.distill("roberta-base", "student", "sentences.txt", "dev.tsv", **small)
        >>> report.layers, report.parameters < report.teacher_parameters, sorted(report.final)[:3]
        ([6, 12], True, ['attention', 'epoch', 'hidden'])
        >>> from transformers import AutoModelForMaskedLM
        >>> model = AutoModelForMaskedLM.from_pretrained("student")
    """
    started = time.perf_counter()
    settings = make(DistillSettings, options, "distill")
    settings.check()
    if importlib.util.find_spec("accelerate") is None:
        raise InputError("distilling needs accelerate: pip install 'mlp-fusion[train]'")
    out = output_path(out)
    check_folder(out, settings.resume, DISTILL_FILE)
    resolve_device(settings.device)
    rows = read_rows(text, labelled=False, columns=columns)
    held_out = None if evaluation is None else read_rows(evaluation, labelled=False, columns=columns)
    # Under torchrun, the first of several processes holds the folder for all.
    with taken(out) if is_main() else contextlib.nullcontext():
        check_folder(out, settings.resume, DISTILL_FILE)
        transformers.set_seed(settings.seed)  # before the student is drawn
        lesson = Lesson.prepare(settings, teacher, tokenizer)
        known, wanted = lesson.text(rows, "text"), lesson.text(held_out, "evaluation")
        assert known is not None
        run = Distillation(lesson, known, wanted, out, progress)
        run.open({"teacher": lesson.name}, text=digest(rows), **{"evaluation data": digest(held_out)})
        run.train()
        return run.finish(time.perf_counter() - started)
