"""`finetune`: train a model, fused or not, on a task."""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

from mlp_fusion.errors import InputError
from mlp_fusion.finetuning.data import Data, read_rows
from mlp_fusion.finetuning.loading import Model
from mlp_fusion.finetuning.result import FinetuneReport, Progress
from mlp_fusion.finetuning.run import Models, Run
from mlp_fusion.finetuning.session import check_folder, digest, is_main
from mlp_fusion.running.runner import resolve_device
from mlp_fusion.settings import make, takes
from mlp_fusion.store.output import output_path, taken
from mlp_fusion.tuning import FinetuneSettings


@takes(FinetuneSettings)
def finetune(
    model: Model,
    out: str | Path,
    train: Data,
    evaluation: Data | None = None,
    *,
    teacher: Model | None = None,
    original: Model | None = None,
    columns: Sequence[str] | None = None,
    tokenizer: Any = None,
    progress: Progress | None = None,
    **options: Any,
) -> FinetuneReport:
    """Train a model on a task through `transformers.Trainer` and write it to `out`.

    Fused models train in the parameterization that suits `optimizer` (see :func:`mlp_fusion.restore`) and are written
    as `save_pretrained` writes them: a plain checkpoint, and the scale in a subfolder. The weights are those of the
    last step. The same seed gives the same weights on one machine. On CUDA it trains under bfloat16 autocast where the
    GPU can, and under `torchrun` on several.

    Args:
        model: a folder or hub name, fused or not, which trains in float32; or a model in memory, which is then trained
            itself.
        out: folder to make. It holds the checkpoints of the unfinished run, and in the end the model, its tokenizer
            and `finetune.json`, the report.
        train, evaluation: files, datasets or rows: see :func:`mlp_fusion.running.rows.read_rows`. Texts of `lm` are
            put end to end and cut into blocks of `max_length` tokens, or of what all the models have positions for.
        teacher: a model trained on the task, for its logits.
        original: the unfused model; before training, hidden states behind the fused layers are fitted to its own.
        columns: the text's column or columns, where they have unusual names.
        tokenizer: None for the one beside the model's weights.
        progress: called as `progress(stage, done, total, loss)` after each step; stages are `layerwise` and `train`.
        options: the fields of :class:`mlp_fusion.tuning.FinetuneSettings`.

    Returns:
        A `FinetuneReport`, which is also in `finetune.json`.

    Raises:
        InputError: an option, the data, or a model cannot be used, or `out` is not empty; nothing has been written.
        FloatingPointError: the loss is NaN or infinite. Checkpoints stay.

    Examples:
        >>> files = {"train": "train.tsv", "evaluation": "dev.tsv"}
        >>> report = mlp_fusion.finetune("roberta-base", "trained", **files, task="classification", epochs=1)
        >>> report.metric, 0 <= report.final["accuracy"] <= 1
        ('accuracy', True)
        >>> from transformers import AutoModelForSequenceClassification
        >>> model = AutoModelForSequenceClassification.from_pretrained("trained")
    """
    started = time.perf_counter()
    settings = make(FinetuneSettings, options, "finetune")
    settings.check()
    if importlib.util.find_spec("accelerate") is None:
        raise InputError("fine-tuning needs accelerate: pip install 'mlp-fusion[train]'")
    out = output_path(out)
    check_folder(out, settings.resume)
    resolve_device(settings.device)
    labelled = settings.task == "classification"
    rows = read_rows(train, labelled=labelled, columns=columns)
    held_out = None if evaluation is None else read_rows(evaluation, labelled=labelled, columns=columns)
    # Under torchrun, the first of several processes holds the folder for all.
    with taken(out) if is_main() else contextlib.nullcontext():
        check_folder(out, settings.resume)
        transformers.set_seed(settings.seed)  # before a head is drawn
        models = Models.load(settings, rows, model, teacher, original, tokenizer)
        known, wanted = (models.examples(r, settings.max_length) for r in (rows, held_out))
        run = Run(settings, models, known, wanted, out, progress)
        run.open(models.names, **{"training data": digest(rows), "evaluation data": digest(held_out)})
        run.train()
        return run.finish(time.perf_counter() - started)
