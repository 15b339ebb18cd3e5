"""What to calibrate on where there is no text: what the model itself writes, or, if it writes nothing, random inputs.

A language model's own text is close to what it was trained on, which is what calibration wants to see (Williams,
Chrysostomou, Aletras, "Self-calibration for Language Model Quantization and Pruning", arXiv 2410.17170; LLM-QAT, arXiv
2305.17888, trains on such text).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from mlp_fusion.errors import InputError, named
from mlp_fusion.running.batches import positions, takes_text
from mlp_fusion.running.drawing import plain_ids, random_batch, text_length
from mlp_fusion.running.runner import UNFIT, evaluating, naming_outputs, placeholders, seeded

#: Tokens of a text that is written, and how many are written side by side, and run side by side afterwards. Many short
#: texts cover more than few long ones, and take less time and memory.
_LENGTH, _TOGETHER, _BATCH = 128, 64, 16
#: The same of random ids: short sequences say more, as nothing in a long one hangs together.
_RANDOM_LENGTH, _RANDOM_BATCH = 32, 16

_REMEDY = "pass calibration (--calibration FILE)"


#: What stands in for text, in words.
WRITTEN, RANDOM_TOKENS, RANDOM_INPUTS = "tokens that the model wrote", "random tokens", "positions of random inputs"


def synthetic_kind(model: Any, refusal: str | None) -> str:
    """What stands in for text for some FFNs of a model.

    Args:
        model: it.
        refusal: of the FFNs, by :func:`mlp_fusion.running.drawing.text_refusal`.

    Returns:
        :data:`WRITTEN` for a model with a language model's head and no encoder that waits for input, if text alone runs
        the FFNs; else :data:`RANDOM_TOKENS` if it takes nothing but text, or :data:`RANDOM_INPUTS`.
    """
    able = getattr(model, "can_generate", None)
    writer = able is not None and able() and not model.config.is_encoder_decoder
    if writer and refusal is None:
        return WRITTEN
    return RANDOM_TOKENS if takes_text(model) else RANDOM_INPUTS


def synthetic_batches(model: nn.Module, kind: str, tokens: int, *, seed: int) -> list[dict[str, Tensor]]:
    """Batches with at least `tokens` positions, made without any data.

    A model that writes text samples it, at temperature 1 from all of its vocabulary, in sequences of 128 tokens (or as
    many as it has positions for) that begin with its token for the beginning, or a random one; what ends a text is a
    token like others. Else there are random ids, in sequences of 32, or random images or sounds.

    Memory: of the keys and values of 64 sequences.

    Args:
        model: a Hugging Face model; it is not changed.
        kind: see :func:`synthetic_kind`.
        tokens: how many at least.
        seed: of all that is drawn. torch's own generators are left as they were.

    Returns:
        `input_ids` and `attention_mask` `(1 to 16, length)` int64 on the CPU of text; else what
        :func:`mlp_fusion.running.drawing.random_batch` draws.

    Raises:
        InputError: the model cannot write, or takes nothing that can be drawn.
    """
    if kind != WRITTEN:
        return _drawn(model, tokens, seed)
    text = torch.cat(list(_written(model, tokens, seed)))
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in text.split(_BATCH)]


def _drawn(model: nn.Module, tokens: int, seed: int) -> list[dict[str, Tensor]]:
    batches: list[dict[str, Tensor]] = []
    seen = 0
    while seen < tokens:
        try:
            drawn = random_batch(model, seed=seed + len(batches), batch=_RANDOM_BATCH, length=_RANDOM_LENGTH)
        except InputError as error:
            raise InputError(f"{type(model).__name__} takes nothing that can be drawn: {_REMEDY}") from error
        batches.append(drawn)
        seen += positions(drawn)
    return batches


def _written(model: Any, tokens: int, seed: int) -> Iterator[Tensor]:
    """Sequences of at least `tokens` tokens in all, `(some, length)` at a time."""
    length = min(tokens, text_length(model.config.get_text_config(), _LENGTH))
    count = -(-tokens // length)
    with evaluating(model), naming_outputs(model), _plainly_configured(model), seeded(seed):
        for first in range(0, count, _TOGETHER):
            begin = _beginnings(model, min(_TOGETHER, count - first))
            yield begin if length == 1 else _continued(model, begin, length)


def _continued(model: Any, begin: Tensor, length: int) -> Tensor:
    """`(sequences, length)`: what the model makes of beginnings."""
    begin = begin.to(model.device)
    try:
        text = model.generate(
            begin, attention_mask=torch.ones_like(begin), max_length=length, do_sample=True, top_k=0, use_cache=True
        )
    except UNFIT as error:
        raise InputError(f"{type(model).__name__} writes no text ({named(error)}): {_REMEDY}") from error
    if text.shape != (len(begin), length):
        raise InputError(f"{type(model).__name__} writes no text: {_REMEDY}")
    return text.cpu()  # type: ignore[no-any-return]


def _beginnings(model: Any, count: int) -> Tensor:
    """The first token of `count` texts, `(count, 1)`."""
    config = model.config.get_text_config()
    first = getattr(config, "bos_token_id", None)
    if type(first) is int and 0 <= first < config.vocab_size:
        return torch.full((count, 1), first)
    return plain_ids(torch.randint(0, config.vocab_size, (count, 1)), model.config)


@contextmanager
def _plainly_configured(model: Any) -> Iterator[None]:
    """Inside, `generate` samples what the model says, without penalties and cuts, and never stops early."""
    own = model.generation_config
    apart = placeholders(model.config)
    model.generation_config = GenerationConfig(pad_token_id=0, suppress_tokens=apart or None)
    try:
        yield
    finally:
        model.generation_config = own
