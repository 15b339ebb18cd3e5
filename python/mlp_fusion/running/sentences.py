"""Sentences to run a model on: read, and made into batches by a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from mlp_fusion.errors import InputError
from mlp_fusion.running.batches import Batch
from mlp_fusion.running.rows import read_texts

_BATCH = 16
_MAX_TOKENS = 128


def read_sentences(file: Path | None, *, limit: int = 256) -> list[str]:
    """The first `limit` texts of `file` that are not blank; of the package's own sentences when it is None.

    Raises:
        InputError: the file cannot be read or has no text; see :func:`mlp_fusion.running.rows.read_texts`.
    """
    if file is not None:
        return read_texts(file, limit=limit)
    own = (resources.files("mlp_fusion") / "data" / "sentences.txt").read_text(encoding="utf-8")
    return own.splitlines()[:limit]


def most_positions(config: Any) -> int | None:
    """How many positions a model has for text, as its config or the one of its part for text says."""
    for part in (config, getattr(config, "text_config", None)):
        known = getattr(part, "max_position_embeddings", None)
        if known is not None:
            return int(known)
    return None


def encode(tokenizer: Any, texts: Sequence[str], max_positions: int | None) -> list[Batch]:
    """Batches of the texts, padded behind them; the tokenizer's own padding is changed.

    A text longer than 128 tokens, or than the model has positions for, becomes several sequences: all of it counts.

    Raises:
        InputError: it makes no token of the texts.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # Behind the text: positions are counted from the first column on.
    tokenizer.padding_side = "right"
    # Without any token to pad with, sequences run one by one.
    size = _BATCH if tokenizer.pad_token is not None else 1
    # RoBERTa counts positions from its padding id on, so that a few of the table's rows are never reached.
    length = min(_MAX_TOKENS, max(1, (max_positions or _MAX_TOKENS + 2) - 2))
    sequences = [s for s in _sequences(tokenizer, sorted(texts, key=len), length) if s["input_ids"]]
    if not sequences:
        raise InputError(f"{tokenizer.name_or_path}: the tokenizer makes no token of the text: give other text")
    chunks = [sequences[i : i + size] for i in range(0, len(sequences), size)]
    return [dict(tokenizer.pad(chunk, padding=size > 1, return_tensors="pt", verbose=False)) for chunk in chunks]


def _sequences(tokenizer: Any, texts: Sequence[str], length: int) -> list[dict[str, list[int]]]:
    """The texts' tokens in pieces of at most `length`, each with the special tokens that a text has."""
    if tokenizer.is_fast:
        encoded = tokenizer(
            list(texts), truncation=True, max_length=length, stride=0, return_overflowing_tokens=True, verbose=False
        )
        names = [name for name in encoded if name != "overflow_to_sample_mapping"]
        return [{name: encoded[name][i] for name in names} for i in range(len(encoded["input_ids"]))]
    room = max(1, length - tokenizer.num_special_tokens_to_add())
    pieces = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        pieces += [ids[i : i + room] for i in range(0, len(ids), room)]
    return [dict(tokenizer.prepare_for_model(piece, verbose=False)) for piece in pieces]
