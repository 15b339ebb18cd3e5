"""Calibration text as batches, whatever form it comes in: batches, a text file, or a `datasets` dataset."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mlp_fusion.choices import CALIBRATION_SENTENCES
from mlp_fusion.errors import InputError
from mlp_fusion.running.batches import Batch
from mlp_fusion.running.rows import TEXT_COLUMNS, read_texts
from mlp_fusion.running.sentences import encode
from mlp_fusion.store.tokenizers import tokenizer_of

Calibration = Batch | Iterable[Batch] | Sequence[str] | str | Path


def calibration_batches(
    calibration: Any, model: nn.Module, *, sentences: int = CALIBRATION_SENTENCES
) -> Batch | Iterable[Batch]:
    """Batches for :func:`mlp_fusion.calibration.collect`.

    Args:
        calibration: a batch or an iterable of batches, as a tokenizer returns them; the path of a text file or table
            (see :func:`mlp_fusion.running.rows.read_texts`); a list of sentences; or rows, a list of mappings or a
            dataset of the `datasets` library, with a column `input_ids`, or `text`, `sentence` or `content`.
        model: whose tokenizer reads text: it is looked up under the name that the model was loaded from.
        sentences: how many are read of files, lists and datasets.

    Raises:
        InputError: the file or the dataset cannot be used, or the model has no tokenizer to read text with.
    """
    if isinstance(calibration, (str, Path)):
        return _tokenized(read_texts(calibration, limit=sentences), model, str(calibration))
    listed = isinstance(calibration, (list, tuple))
    if listed and calibration and isinstance(calibration[0], str):
        texts = [text for text in calibration if isinstance(text, str) and text.strip()]
        if len(texts) < len(calibration):
            raise InputError("calibration is a list of sentences of which some are blank or no text")
        return _tokenized(texts[:sentences], model, "calibration")
    if not hasattr(calibration, "column_names"):
        if listed and calibration and isinstance(calibration[0], Mapping) and "input_ids" not in calibration[0]:
            return _tokenized(read_texts(calibration, limit=sentences), model, "calibration")
        return calibration  # type: ignore[no-any-return]
    names = calibration.column_names
    if isinstance(names, Mapping):
        raise InputError(f"calibration is a dictionary of datasets: choose one of its splits ({', '.join(names)})")
    rows = list(islice(calibration, sentences))
    if not rows:
        raise InputError("calibration is a dataset without rows")
    if "input_ids" in rows[0]:
        return [_single(row) for row in rows]
    if not {name.casefold() for name in rows[0]} & set(TEXT_COLUMNS):
        raise InputError(
            f"calibration is a dataset with the columns {', '.join(rows[0])}: it needs input_ids or one of "
            f"{', '.join(TEXT_COLUMNS)}"
        )
    return _tokenized(read_texts(rows, limit=sentences), model, "calibration")


def _tokenized(sentences: list[str], model: Any, source: str) -> list[Batch]:
    tokenizer = tokenizer_of(model)
    if tokenizer is None:
        raise InputError(
            f"{source}: the model was not loaded from a folder with a tokenizer: pass tokenised batches as calibration"
        )
    return encode(tokenizer, sentences, getattr(model.config, "max_position_embeddings", None))


def _single(row: Mapping[str, Any]) -> dict[str, Tensor]:
    """A dataset's row as a batch of one: rows differ in length, and padding would be the tokenizer's business."""
    wanted = ("input_ids", "attention_mask", "token_type_ids")
    return {key: torch.as_tensor(row[key]).reshape(1, -1) for key in wanted if key in row}
