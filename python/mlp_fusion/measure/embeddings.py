"""Sentence embeddings of two models, compared."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mlp_fusion.measure.report import EmbeddingSimilarity
from mlp_fusion.running.batches import Batch
from mlp_fusion.running.runner import Runner, not_finite


@torch.no_grad()
def embed(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """Mean of the last hidden states over each sentence's tokens: `(sentences, hidden)`, float32, on the CPU.

    Raises:
        InputError: the model cannot run on a batch, or its hidden states are not finite.
    """
    pooled = []
    with Runner(model, "the text") as runner:
        for batch in batches:
            states = runner.hidden_states(batch)
            mask = batch["attention_mask"].to(states.device).unsqueeze(-1).float()
            pooled.append(((states.float() * mask).sum(1) / mask.sum(1).clamp(min=1)).cpu())
            if not bool(pooled[-1].isfinite().all()):
                raise not_finite("on the text, the model's hidden states", states.dtype)
    return torch.cat(pooled)


def compare_embeddings(embeddings: Tensor, originals: Tensor) -> EmbeddingSimilarity:
    """Cosines of two models' `(sentences, hidden)` embeddings of the same sentences."""
    cosines = torch.nn.functional.cosine_similarity(embeddings, originals, dim=-1)
    return EmbeddingSimilarity(float(cosines.mean()), float(cosines.min()), len(cosines))
