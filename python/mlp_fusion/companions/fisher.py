"""The empirical Fisher information of a model's values on a text: the mean square of their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mlp_fusion.calibration.text import calibration_batches
from mlp_fusion.companions.ranking import Candidate
from mlp_fusion.errors import InputError
from mlp_fusion.running.batches import Batch
from mlp_fusion.running.runner import Runner

#: Texts that are read; each is a forward and a backward pass of its own.
TEXTS = 256
_CAUSAL = ("ForCausalLM", "LMHeadModel")


def fisher_scores(model: nn.Module, found: Sequence[Candidate], text: str) -> dict[str, Tensor]:
    """Name of a candidate -> the mean of its squared gradients over the sequences of a text, float32 of its shape.

    Gradients are those of the loss of a causal language model on the text. Of any other model, whose training a text
    alone does not tell, they are those of `<u, h>`, with h the last hidden states and u drawn from a normal
    distribution: what a change of a value does to all of them.

    Raises:
        InputError: the text or the model's tokenizer cannot be read, or the model cannot run on it.
    """
    batches = calibration_batches(text, model, sentences=TEXTS)
    batches = [batches] if hasattr(batches, "keys") else list(batches)  # type: ignore[list-item, arg-type]
    tensors, asking = [c.tensor for c in found], [c.tensor.requires_grad for c in found]
    sums = [torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in tensors]
    generator, count = torch.Generator().manual_seed(0), 0
    try:
        for tensor in tensors:
            tensor.requires_grad_()
        with Runner(model, text) as runner, torch.enable_grad():
            for batch in batches:
                for row in range(len(batch["input_ids"])):
                    one = {name: value[row : row + 1] for name, value in batch.items()}
                    loss = _loss(runner, one, generator)
                    gradients = torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)
                    for total, gradient in zip(sums, gradients, strict=True):
                        total += gradient.float().square()
                    count += 1
    finally:
        for tensor, before in zip(tensors, asking, strict=True):
            tensor.requires_grad_(before)
    if not all(bool(total.isfinite().all()) for total in sums):
        raise InputError(f"{text}: gradients through the model are not finite: load it in float32")
    return {c.name: total / count for c, total in zip(found, sums, strict=True)}


def _loss(runner: Runner, batch: Batch, generator: torch.Generator) -> Any:
    """What is differentiated, for one sequence."""
    if type(runner.model).__name__.endswith(_CAUSAL):
        logits, ids = runner.whole(batch).logits[0, :-1].float(), batch["input_ids"][0, 1:]
        counts = batch["attention_mask"][0, 1:].bool() if "attention_mask" in batch else torch.ones_like(ids).bool()
        wanted = torch.where(counts, ids, -100).to(logits.device)
        return torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
    parts = []
    for states, mask in runner.counted_states(batch):
        hidden = states[mask.to(states.device)]
        parts.append((hidden * torch.randn(hidden.shape, generator=generator, dtype=torch.float32).to(hidden)).sum())
    return torch.stack(parts).sum()
