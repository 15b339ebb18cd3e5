"""The tokenizer that lies beside a checkpoint, and texts as batches by it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from mlp_fusion.errors import InputError, one_line
from mlp_fusion.running.batches import Batch
from mlp_fusion.running.sentences import encode
from mlp_fusion.store.source import is_hub_name

#: One of these is there when a checkpoint has a tokenizer.
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json",
)  # fmt: skip


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer in a folder or of a model on the hub, from the cache where there is no network.

    Raises:
        InputError: it cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise InputError(f"{name}: its tokenizer cannot be loaded ({one_line(error)})") from error


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
