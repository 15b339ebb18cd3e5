"""Layer-to-layer distillation into a student with fewer layers: what is compared, and how it is had of both models.

The losses of MiniALBERT (Nouriborji et al., arXiv 2210.06425): attention maps and hidden states behind mapped layers,
predictions at masked positions, and the masked tokens themselves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mlp_fusion.errors import InputError
from mlp_fusion.finetuning.attention import record, recorded
from mlp_fusion.finetuning.attention_divergence import Scores, attention_divergence
from mlp_fusion.running.runner import Runner, evaluating

#: Parts of the loss, each with a weight; in the order of sums and reports.
PARTS = ("mlm", "attention", "hidden", "output")


def mapped_layers(recursions: int, layers: int) -> list[int]:
    """The teacher's layer, from 1, that each of the student's learns from: `ceil(i * layers / recursions)`.

    Raises:
        InputError: the student has more than the teacher.
    """
    if recursions > layers:
        raise InputError(f"{recursions} recursions learn from a teacher of {layers} layers: give {layers} or fewer")
    return [-(-number * layers // recursions) for number in range(1, recursions + 1)]


def hidden_distance(hidden: Tensor, wanted: Tensor, mask: Tensor) -> Tensor:
    """Mean of `1 - cos(hidden, wanted)` over unmasked positions of `(batch, tokens, d)` states; float32 at least."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    distance = 1.0 - functional.cosine_similarity(hidden.to(dtype), wanted.to(dtype), dim=-1)
    return (distance * mask).sum() / mask.sum().clamp(min=1)


def output_divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """Mean over rows of `KL(softmax(wanted) || softmax(logits))`, zero without any; `(rows, vocabulary)`."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    found, known = (torch.log_softmax(z.to(dtype), dim=-1) for z in (logits, wanted))
    divergence = functional.kl_div(found, known, reduction="sum", log_target=True)
    return divergence / max(1, logits.shape[0])


def masked_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of `(rows, vocabulary)` logits, zero without any row."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return functional.cross_entropy(logits.to(dtype), labels, reduction="sum") / max(1, logits.shape[0])


@contextlib.contextmanager
def at_positions(model: Any, positions: Tensor) -> Iterator[None]:
    """Within it, the model's head sees `positions` of the flattened `(batch, tokens)` alone, as one row.

    Its logits are `(1, positions, vocabulary)`: of 15 % of the tokens, a seventh of the work and of the memory.
    """

    def narrow(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state.flatten(0, 1)[positions].unsqueeze(0)
        return output

    handle = model.base_model.register_forward_hook(narrow)
    try:
        yield
    finally:
        handle.remove()


class LayerToLayer:
    """What one model learns of another, part by part.

    Args:
        student: a model with a head for masked tokens.
        teacher: likewise; without the head where `output` weighs nothing. It is put into evaluation mode.
        weights: of each of `PARTS`. What weighs nothing is not computed. `attention` makes attentions of both go
            through :mod:`mlp_fusion.finetuning.attention`.

    Raises:
        InputError: the student has more layers than the teacher, another width, or other heads.
    """

    def __init__(self, student: Any, teacher: Any, weights: Mapping[str, float]) -> None:
        self.student, self.teacher, self.weights = student, teacher.eval().requires_grad_(False), dict(weights)
        self.layers = mapped_layers(student.config.num_hidden_layers, teacher.config.num_hidden_layers)
        for key, part in (("hidden_size", "hidden"), ("num_attention_heads", "attention")):
            ours, theirs = getattr(student.config, key, None), getattr(teacher.config, key, None)
            if self.weights[part] and ours != theirs:
                raise InputError(f"{key} is {theirs} in the teacher and {ours} in the student: give {part}_weight=0")
        if self.weights["attention"]:
            record(student)
            record(teacher)

    def parts(self, model: Any, inputs: Mapping[str, Tensor], *, predicts: bool | None = None) -> dict[str, Tensor]:
        """The parts of the loss that weigh anything, each a mean over what it compares, summed over layers.

        Args:
            model: the student, as it is or wrapped.
            inputs: `input_ids` and `attention_mask`, `(batch, tokens)`, and `labels`, -100 where no token is masked.
            predicts: whether `mlm` is wanted; None for where it weighs anything.

        Raises:
            InputError: the teacher does not say what is compared.
        """
        known = {name: value for name, value in inputs.items() if name != "labels"}
        labels, mask = inputs["labels"].flatten(), inputs["attention_mask"].bool()
        masked = (labels != -100).nonzero().squeeze(-1)
        theirs, wanted = self._teach(known, masked)
        with at_positions(self.student, masked):
            ours, attention = self._run(model, self.student, known, range(len(self.layers)))
        logits = ours.logits.squeeze(0)
        found: dict[str, Tensor] = {}
        if self.weights["mlm"] if predicts is None else predicts:
            found["mlm"] = masked_loss(logits, labels[masked])
        if self.weights["attention"]:
            pairs = [(attention[n], wanted[layer - 1]) for n, layer in enumerate(self.layers)]
            found["attention"] = torch.stack([attention_divergence(*pair, mask) for pair in pairs]).sum()
        if self.weights["hidden"]:
            states = [(ours.hidden_states[n], theirs.hidden_states[layer]) for n, layer in enumerate(self.layers, 1)]
            found["hidden"] = torch.stack([hidden_distance(*pair, mask) for pair in states]).sum()
        if self.weights["output"]:
            found["output"] = output_divergence(logits, theirs.logits.squeeze(0))
        return found

    def total(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Their weighted sum."""
        return torch.stack([self.weights[name] * part for name, part in parts.items()]).sum()

    @torch.no_grad()
    def check(self, inputs: Mapping[str, Tensor]) -> None:
        """Raise InputError unless the teacher says all that is compared, on a batch as of :meth:`parts`."""
        known = {name: value for name, value in inputs.items() if name != "labels"}
        masked = (inputs["labels"].flatten() != -100).nonzero().squeeze(-1)
        with Runner(self.teacher, "blocks of text") as runner:
            whole = runner.whole(known) if self.weights["output"] else runner.base(known)
        with evaluating(self.student):
            self.parts(self.student, inputs)
        if self.weights["output"]:
            with at_positions(self.teacher, masked):
                found = self.teacher(**known).logits.squeeze(0)
            wanted = whole.logits.flatten(0, 1)[masked]
            if not torch.allclose(wanted, found, rtol=1e-3, atol=1e-3 * float(whole.logits.abs().max())):
                raise self._refused("what its head predicts for a token depends on other tokens' states", "output")

    @torch.no_grad()
    def _teach(self, known: Mapping[str, Tensor], masked: Tensor) -> tuple[Any, dict[int, Scores]]:
        if self.weights["output"]:
            with at_positions(self.teacher, masked):
                return self._run(self.teacher, self.teacher, known, [layer - 1 for layer in self.layers])
        if self.weights["attention"] or self.weights["hidden"]:
            return self._run(self.teacher.base_model, self.teacher, known, [layer - 1 for layer in self.layers])
        return None, {}

    def _run(
        self, model: Any, owner: Any, known: Mapping[str, Tensor], wanted: Collection[int]
    ) -> tuple[Any, dict[int, Scores]]:
        """The model's output and the wanted scores; `owner` is the model without what is wrapped around it."""
        layers, states = owner.config.num_hidden_layers, bool(self.weights["hidden"])
        with recorded(wanted) as recording:
            output = model(**known, output_hidden_states=states)
        if self.weights["attention"] and recording.calls != layers:
            what = f"{recording.calls} attentions in {layers} layers go through transformers' attention functions"
            raise self._refused(what, "attention")
        if states and len(output.hidden_states or ()) != layers + 1:
            raise self._refused(f"it gives {len(output.hidden_states or ())} states of {layers} layers", "hidden")
        return output, recording.scores

    def _refused(self, what: str, part: str) -> InputError:
        return InputError(f"teacher {type(self.teacher).__name__}: {what}: give {part}_weight=0")
