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
from mlp_fusion.measure.activations import Batch, evaluating
from mlp_fusion.measure.report import EmbeddingSimilarity

#: One of these is there when a checkpoint has a tokenizer.
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json",
)  # fmt: skip
_BATCH = 16
_MAX_TOKENS = 128


def read_sentences(file: Path | None, *, limit: int = 256) -> list[str]:
    """The first `limit` non-empty lines of `file`; of the package's own sentences when it is None.

    A line's first tab-separated field counts, so that labelled `.tsv` files can be given as they are.

    Raises:
        InputError: the file cannot be read or has no text.
    """
    if file is None:
        text = (resources.files("mlp_fusion") / "data" / "sentences.txt").read_text(encoding="utf-8")
    else:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file}: cannot be read as UTF-8 text ({error})") from error
    lines = [line.split("\t")[0].strip() for line in text.splitlines()]
    sentences = [line for line in lines if line][:limit]
    if not sentences:
        raise InputError(f"{file}: no text in it")
    return sentences


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`.

    Raises:
        InputError: it cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise InputError(f"{folder}: its tokenizer cannot be loaded ({' '.join(str(error).split())[:200]})") from error


def tokenize(folder: Path, sentences: Sequence[str], max_positions: int | None) -> list[Batch] | None:
    """Padded batches of the sentences by the checkpoint's own tokenizer, or None when it has none.

    Raises:
        InputError: it has one that cannot be loaded.
    """
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    tokenizer = load_tokenizer(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # Without any token to pad with, sentences run one by one.
    padding = tokenizer.pad_token is not None
    size = _BATCH if padding else 1
    # RoBERTa counts positions from its padding id on, so that a few of the table's rows are never reached.
    length = min(_MAX_TOKENS, max(1, (max_positions or _MAX_TOKENS + 2) - 2))
    ordered = sorted(sentences, key=len)
    chunks = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    return [
        dict(tokenizer(chunk, padding=padding, truncation=True, max_length=length, return_tensors="pt"))
        for chunk in chunks
    ]


@torch.no_grad()
def embed(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """Mean of the last hidden states over each sentence's tokens: `(sentences, hidden)`, float32, on the CPU."""
    base: Any = getattr(model, "base_model", model)
    device = next(model.parameters()).device
    pooled = []
    with evaluating(model):
        for batch in batches:
            hidden = base(**{k: v.to(device) for k, v in batch.items()}).last_hidden_state.float()
            mask = batch["attention_mask"].to(device).unsqueeze(-1).float()
            pooled.append(((hidden * mask).sum(1) / mask.sum(1).clamp(min=1)).cpu())
    return torch.cat(pooled)


def compare_embeddings(embeddings: Tensor, originals: Tensor) -> EmbeddingSimilarity:
    """Cosines of two models' `(sentences, hidden)` embeddings of the same sentences."""
    cosines = torch.nn.functional.cosine_similarity(embeddings, originals, dim=-1)
    return EmbeddingSimilarity(float(cosines.mean()), float(cosines.min()), len(cosines))
