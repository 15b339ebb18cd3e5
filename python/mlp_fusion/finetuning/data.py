"""Training data: the classes in it, and its texts as tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mlp_fusion.errors import InputError
from mlp_fusion.running.rows import Data, Rows, read_rows

__all__ = ["Data", "Rows", "blocks", "class_names", "labelled_examples", "language_examples", "read_rows"]


def class_names(rows: Rows) -> list[str]:
    """The classes, as the dataset numbers them; or those that occur, in numeric order where all are numbers.

    Raises:
        InputError: there are fewer than two, or they are numbers with fractions.
    """
    if rows.classes is not None and len(rows.classes) > 1:
        return list(rows.classes)
    names = set(rows.labels or ())
    if len(names) < 2:
        raise InputError(f"{rows.source}: only one class ({', '.join(names)}): there is nothing to learn")
    fraction = next((name for name in sorted(names) if re.fullmatch(r"-?\d*\.\d*[1-9]\d*", name)), None)
    if fraction is not None:
        raise InputError(f"{rows.source}: label {fraction} is a fraction: this is classification, not regression")
    numeric = all(re.fullmatch(r"-?\d+", name) for name in names)
    # `1` and `01` are two names of one number: their order must not be that of a set.
    return sorted(names, key=lambda name: (int(name), name)) if numeric else sorted(names)


def labelled_examples(
    rows: Rows, tokenizer: Any, classes: Mapping[str, int], max_length: int
) -> list[dict[str, list[int] | int]]:
    """Tokenised rows with their class, unpadded.

    Raises:
        InputError: a label is none of `classes`, or there is no token in a text.
    """
    assert rows.labels is not None
    for number, label in enumerate(rows.labels, 1):
        if label not in classes:
            raise InputError(
                f"{rows.source}, row {number}: label {label!r} is none of {', '.join(classes)}: name it as they are "
                "named, or leave the row out"
            )
    encoded = tokenizer(rows.texts, rows.pairs, truncation=True, max_length=max_length)
    for number, ids in enumerate(encoded["input_ids"], 1):
        if not ids:
            raise InputError(f"{rows.source}, row {number}: there is no token in its text")
    names = list(encoded)
    return [
        {**{name: encoded[name][i] for name in names}, "labels": classes[label]} for i, label in enumerate(rows.labels)
    ]


def language_examples(rows: Rows, tokenizer: Any, block: int) -> list[dict[str, Tensor]]:
    """Texts end to end, the tokenizer's end-of-text between them, cut into blocks of `block` tokens.

    What does not fill a block at the end is left out; text shorter than one block is one shorter block.

    Raises:
        InputError: there are fewer than two tokens.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    # Long documents are meant here: the tokenizer's warning about its model's length would mislead.
    encoded = tokenizer(rows.texts, add_special_tokens=False, verbose=False)["input_ids"]
    stream = [token for ids in encoded for token in [*ids, *end]]
    if len(stream) < 2:
        raise InputError(f"{rows.source}: fewer than two tokens: there is nothing to predict")
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in blocks(stream, block)]


def blocks(stream: Sequence[int], block: int) -> Tensor:
    """Tokens in rows of `block`, or in one shorter row; what does not fill a row is left out."""
    block = min(block, len(stream))
    return torch.tensor(stream[: len(stream) // block * block]).view(-1, block)
