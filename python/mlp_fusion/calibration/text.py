"""What is calibrated on as batches, whatever form it comes in: batches, a text file, or a `datasets` dataset."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mlp_fusion.choices import CALIBRATION_SENTENCES
from mlp_fusion.errors import InputError
from mlp_fusion.families.inputs import OTHER_INPUTS
from mlp_fusion.running.batches import Batch, main_input
from mlp_fusion.running.rows import TEXT_COLUMNS, read_texts
from mlp_fusion.running.sentences import encode, most_positions
from mlp_fusion.store.tokenizers import tokenizer_of

#: Columns of tokens.
_TEXT = ("input_ids", "attention_mask", "token_type_ids")

Calibration = Batch | Iterable[Batch] | Sequence[str] | str | Path


def calibration_batches(
    calibration: Any, model: nn.Module, *, sentences: int = CALIBRATION_SENTENCES
) -> Batch | Iterable[Batch]:
    """Batches for :func:`mlp_fusion.calibration.collect`.

    Args:
        calibration: a batch or an iterable of batches, as a tokenizer or the model's processor returns them; the path
            of a text file or table (see :func:`mlp_fusion.running.rows.read_texts`); a list of sentences; or rows, a
            list of mappings or a dataset of the `datasets` library, with a column of the model's main input
            (`input_ids`, `pixel_values`), or `text`, `sentence` or `content`.
        model: whose tokenizer reads text: it is looked up under the name that the model was loaded from. Images and
            sounds come as batches or columns only.
        sentences: how many are read of files, lists and datasets.

    Raises:
        InputError: the file or the dataset cannot be used, or the model has no tokenizer to read text with.
    """
    if isinstance(calibration, (str, Path)):
        return _tokenized(read_texts(calibration, limit=sentences), model, str(calibration))
    main, listed = main_input(model), isinstance(calibration, (list, tuple))
    if listed and calibration and isinstance(calibration[0], str):
        texts = [text for text in calibration if isinstance(text, str) and text.strip()]
        if len(texts) < len(calibration):
            raise InputError("calibration is a list of sentences of which some are blank or no text")
        return _tokenized(texts[:sentences], model, "calibration")
    if not hasattr(calibration, "column_names"):
        first = calibration[0] if listed and calibration and isinstance(calibration[0], Mapping) else None
        batch = first is not None and any(isinstance(value, Tensor) and value.ndim > 1 for value in first.values())
        if first is not None and not batch and main not in first:
            return _tokenized(read_texts(calibration, limit=sentences), model, "calibration")
        return calibration  # type: ignore[no-any-return]
    names = calibration.column_names
    if isinstance(names, Mapping):
        raise InputError(f"calibration is a dictionary of datasets: choose one of its splits ({', '.join(names)})")
    rows = list(islice(calibration, sentences))
    if not rows:
        raise InputError("calibration is a dataset without rows")
    if main in rows[0]:
        return [_single(row, model) for row in rows]
    if not {name.casefold() for name in rows[0]} & set(TEXT_COLUMNS):
        raise InputError(
            f"calibration is a dataset with the columns {', '.join(rows[0])}: it needs {main} or one of "
            f"{', '.join(TEXT_COLUMNS)}"
        )
    return _tokenized(read_texts(rows, limit=sentences), model, "calibration")


def _tokenized(sentences: list[str], model: Any, source: str) -> list[Batch]:
    tokenizer, main = tokenizer_of(model), main_input(model)
    if main != "input_ids":
        raise InputError(f"{source}: the model reads no text: pass batches of {main}, as its processor returns them")
    if tokenizer is None:
        raise InputError(
            f"{source}: the model was not loaded from a folder with a tokenizer: pass tokenised batches as calibration"
        )
    return encode(tokenizer, sentences, most_positions(model.config))


def _single(row: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A dataset's row as a batch of one: rows differ in length, and padding would be the tokenizer's business."""
    text = {key: torch.as_tensor(row[key]).reshape(1, -1) for key in _TEXT if key in row}
    names = inspect.signature(model.forward).parameters
    others = (key for key in row if key in names and key not in _TEXT and "label" not in key)
    # Of text alone, other columns are nobody's.
    if main_input(model) == "input_ids" and not set(OTHER_INPUTS) & set(row):
        return text
    return {**text, **{key: torch.as_tensor(row[key]).unsqueeze(0) for key in others}}
