"""Sentences to run a model on: read, tokenised, and compared by their embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from mlp_fusion.errors import InputError
from mlp_fusion.measure.report import EmbeddingSimilarity
from mlp_fusion.running.activations import Batch, evaluating, not_finite, run_base
from mlp_fusion.running.rows import read_texts
from mlp_fusion.store.source import is_hub_name

#: One of these is there when a checkpoint has a tokenizer.
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json",
)  # fmt: skip
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


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer in a folder or of a model on the hub, from the cache where there is no network.

    Raises:
        InputError: it cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise InputError(f"{name}: its tokenizer cannot be loaded ({' '.join(str(error).split())[:200]})") from error


def tokenizer_of(model: Any) -> Any | None:
    """The tokenizer of a model in memory, by the folder or hub name that it was loaded from; None without one.

    Raises:
        InputError: it cannot be loaded.
    """
    name = str(getattr(model, "name_or_path", "") or "")
    if not name:
        return None
    if Path(name).is_dir():
        return load_tokenizer(name) if _has_tokenizer(Path(name)) else None
    return load_tokenizer(name) if is_hub_name(name) else None


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def tokenize(folder: Path, texts: Sequence[str], max_positions: int | None) -> list[Batch] | None:
    """Batches of the texts by the tokenizer in `folder`, as :func:`encode`, or None when there is none.

    Raises:
        InputError: there is one that cannot be loaded, or makes no token of the texts.
    """
    return encode(load_tokenizer(folder), texts, max_positions) if _has_tokenizer(folder) else None


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


@torch.no_grad()
def embed(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """Mean of the last hidden states over each sentence's tokens: `(sentences, hidden)`, float32, on the CPU.

    Raises:
        InputError: the model cannot run on a batch, or its hidden states are not finite.
    """
    pooled = []
    with evaluating(model):
        for batch in batches:
            states = run_base(model, batch, "the text").last_hidden_state
            mask = batch["attention_mask"].to(states.device).unsqueeze(-1).float()
            pooled.append(((states.float() * mask).sum(1) / mask.sum(1).clamp(min=1)).cpu())
            if not bool(pooled[-1].isfinite().all()):
                raise not_finite("on the text, the model's hidden states", states.dtype)
    return torch.cat(pooled)


def compare_embeddings(embeddings: Tensor, originals: Tensor) -> EmbeddingSimilarity:
    """Cosines of two models' `(sentences, hidden)` embeddings of the same sentences."""
    cosines = torch.nn.functional.cosine_similarity(embeddings, originals, dim=-1)
    return EmbeddingSimilarity(float(cosines.mean()), float(cosines.min()), len(cosines))
