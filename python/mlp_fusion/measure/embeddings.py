"""Sentence embeddings of two models, compared."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mlp_fusion.errors import InputError
from mlp_fusion.measure.report import EmbeddingSimilarity
from mlp_fusion.running.batches import Batch
from mlp_fusion.running.runner import Runner, not_finite


@torch.no_grad()
def embed(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """Mean of the last hidden states over each sentence's tokens: `(sentences, hidden)`, float32, on the CPU.

    Over all positions of an image or a sound. The means of towers side by side (CLIP) stand one behind the other.

    Raises:
        InputError: the model cannot run on a batch, or its hidden states are not finite.
    """
    pooled = []
    with Runner(model, "the text") as runner:
        for batch in batches:
            means = []
            for found, counted in runner.counted_states(batch):
                states, mask = found.flatten(1, -2), counted.flatten(1).to(found.device).unsqueeze(-1).float()
                means.append(((states.float() * mask).sum(1) / mask.sum(1).clamp(min=1)).cpu())
                if not bool(means[-1].isfinite().all()):
                    raise not_finite("on the text, the model's hidden states", states.dtype)
            if len({len(mean) for mean in means}) > 1:
                raise InputError(
                    f"a batch has {' and '.join(str(len(m)) for m in means)} samples: give as many of each"
                )
            pooled.append(torch.cat(means, dim=1))
    return torch.cat(pooled)


def compare_embeddings(embeddings: Tensor, originals: Tensor) -> EmbeddingSimilarity:
    """Cosines of two models' `(sentences, hidden)` embeddings of the same sentences."""
    cosines = torch.nn.functional.cosine_similarity(embeddings, originals, dim=-1)
    return EmbeddingSimilarity(float(cosines.mean()), float(cosines.min()), len(cosines))
