"""Queries and keys of a model's attention, taken where transformers hands them to its attention functions."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mlp_fusion.errors import InputError
from mlp_fusion.finetuning.attention_divergence import Scores

#: What the attention function is called in transformers.
NAME = "mlp_fusion_recorded"


class Recording:
    """What the calls of a model's attentions were, in their order.

    Attributes:
        calls: how many there were.
        scores: of those that were wanted, by number from 0.
    """

    def __init__(self, wanted: Collection[int]) -> None:
        self.wanted, self.calls = wanted, 0
        self.scores: dict[int, Scores] = {}

    def take(self, query: Tensor, key: Tensor, scaling: float | None, mask: Tensor | None) -> None:
        """Count a call, and keep it if it was wanted."""
        if self.calls in self.wanted:
            self.scores[self.calls] = Scores(query, key, query.shape[-1] ** -0.5 if scaling is None else scaling, mask)
        self.calls += 1


_RECORDING: ContextVar[Recording | None] = ContextVar("recording", default=None)


@contextlib.contextmanager
def recorded(wanted: Collection[int]) -> Iterator[Recording]:
    """What models that were made to :func:`record` attend to within it; `wanted` are numbers of calls."""
    recording = Recording(wanted)
    token = _RECORDING.set(recording)
    try:
        yield recording
    finally:
        _RECORDING.reset(token)


def record(model: Any) -> None:
    """Let a model's attentions go through here. What they compute stays that of `sdpa`."""
    model.set_attn_implementation(NAME)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, **more: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    recording = _RECORDING.get()
    if recording is not None:
        causal = more.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        others = [name for name in ("position_bias", "softcap") if more.get(name) is not None]
        others += ["is_causal"] if causal and attention_mask is None and query.shape[2] > 1 else []
        if others or query.shape[1] != key.shape[1]:
            what = " and ".join(others) or "fewer keys than queries"
            raise InputError(f"{type(module).__name__} attends with {what}: give attention_weight=0")
        recording.take(query, key, scaling, attention_mask)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
