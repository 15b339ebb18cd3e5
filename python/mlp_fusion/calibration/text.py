"""Calibration text in the forms that people have it in: batches, a text file, or a `datasets` dataset."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mlp_fusion.checkpoint.text import read_sentences, tokenize
from mlp_fusion.choices import CALIBRATION_SENTENCES
from mlp_fusion.errors import InputError
from mlp_fusion.measure.activations import Batch

Calibration = Batch | Iterable[Batch] | Sequence[str] | str | Path

TEXT_COLUMNS = ("text", "sentence", "content")


def calibration_batches(
    calibration: Any, model: nn.Module, *, sentences: int = CALIBRATION_SENTENCES
) -> Batch | Iterable[Batch]:
    """Batches for :func:`mlp_fusion.calibration.collect`.

    Args:
        calibration: a batch or an iterable of batches, as a tokenizer returns them; the path of a text file, one
            sentence a line (of a `.tsv`, the first field); a list of sentences; or a dataset of the `datasets` library
            (or anything with `column_names` and rows that are mappings) with a column `input_ids`, or `text`,
            `sentence` or `content`.
        model: whose tokenizer reads text: it is looked up under the name that the model was loaded from.
        sentences: how many are read of files, lists and datasets.

    Raises:
        InputError: the file or the dataset cannot be used, or the model has no tokenizer to read text with.
    """
    if isinstance(calibration, (str, Path)):
        texts = read_sentences(Path(calibration).expanduser(), limit=sentences)
        return _tokenized(texts, model, str(calibration))
    if isinstance(calibration, (list, tuple)) and calibration and isinstance(calibration[0], str):
        texts = [text for text in calibration if isinstance(text, str) and text.strip()]
        if len(texts) < len(calibration):
            raise InputError("calibration is a list of sentences of which some are blank or no text")
        return _tokenized(texts[:sentences], model, "calibration")
    names = getattr(calibration, "column_names", None)
    if names is None:
        return calibration  # type: ignore[no-any-return]
    if isinstance(names, Mapping):
        raise InputError(f"calibration is a dictionary of datasets: choose one of its splits ({', '.join(names)})")
    rows = [row for row, _ in zip(calibration, range(sentences), strict=False)]
    if not rows:
        raise InputError("calibration is a dataset without rows")
    if "input_ids" in names:
        return [_single(row) for row in rows]
    column = next((name for name in TEXT_COLUMNS if name in names), None)
    if column is None:
        raise InputError(
            f"calibration is a dataset with the columns {', '.join(names)}: it needs input_ids or one of "
            f"{', '.join(TEXT_COLUMNS)}"
        )
    return _tokenized([str(row[column]) for row in rows if str(row[column]).strip()], model, "calibration")


def _tokenized(sentences: list[str], model: Any, source: str) -> list[Batch]:
    folder = Path(getattr(model, "name_or_path", "") or "")
    positions = getattr(model.config, "max_position_embeddings", None)
    batches = tokenize(folder, sentences, positions) if folder.is_dir() and str(folder) != "." else None
    if batches is None:
        raise InputError(
            f"{source}: the model was not loaded from a folder with a tokenizer: pass tokenised batches as calibration"
        )
    return batches


def _single(row: Mapping[str, Any]) -> dict[str, Tensor]:
    """A dataset's row as a batch of one: rows differ in length, and padding would be the tokenizer's business."""
    wanted = ("input_ids", "attention_mask", "token_type_ids")
    return {key: torch.as_tensor(row[key]).reshape(1, -1) for key in wanted if key in row}
