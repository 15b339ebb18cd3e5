"""`transformers.Trainer` with the losses of distillation. Importing this needs accelerate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.trainer_pt_utils import get_length_grouped_indices

from mlp_fusion.finetuning.layer_to_layer import PARTS, LayerToLayer
from mlp_fusion.finetuning.result import Progress
from mlp_fusion.store.weights import WEIGHTS_FILE


class _Reporting(TrainerCallback):
    """Hands the trainer's steps to a `Progress`."""

    def __init__(self, stage: str, progress: Progress) -> None:
        self.stage, self.progress = stage, progress
        self.loss: float | None = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.loss = (logs or {}).get("loss", self.loss)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress(self.stage, state.global_step, state.max_steps, self.loss)


class _Finite(TrainerCallback):
    """Ends a run whose loss is not a number: what follows would be wasted, and its weights worthless."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {state.global_step}: lower the learning rate")


class SimilarLengths(Sampler[int]):
    """Rows in random order, those of similar length side by side: less padding.

    The order is a function of seed and epoch alone. (The trainer's own, `group_by_length`, depends on the random state
    at the moment that an epoch begins, and so differs in a run that is resumed in the middle of one.)
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


class EpochOrder(Sampler[int]):
    """`epoch * rows + row` for all rows in random order, a function of seed and epoch alone, as in `SimilarLengths`.

    What is drawn for a row in an epoch can so be a function of the number that the row is asked for with.
    """

    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self.seed, self.epoch = rows, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter((self.epoch * self.rows + torch.randperm(self.rows, generator=generator)).tolist())


class _QuietTrainer(Trainer):
    """A trainer that prints nothing, whose losses are means over a batch, with a teacher beside the model."""

    def __init__(
        self,
        *args: Any,
        stage: str,
        progress: Progress | None,
        teacher: nn.Module | None,
        by_length: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.by_length = by_length
        self.remove_callback(PrinterCallback)
        self.add_callback(_Finite())
        if progress is not None:
            self.add_callback(_Reporting(stage, progress))
        # Teacher and labels are weighed against each other as means; the trainer then divides by the accumulation.
        self.model_accepts_loss_kwargs = False
        self.teacher = None
        if teacher is not None:
            self.teacher = teacher.requires_grad_(False).eval().to(self.args.device)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        if not self.by_length:
            return super()._get_train_sampler(train_dataset)
        lengths = [len(row["input_ids"]) for row in self.train_dataset]
        return SimilarLengths(lengths, self.args.train_batch_size, self.args.seed)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # `save_pretrained` would fold the scale into the weights, and rounding there and back would make a resumed run
        # another one in the last bits, which training amplifies.
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        unwrapped = self.accelerator.unwrap_model(self.model)
        if hasattr(unwrapped, "peft_config"):
            # What trains; the rest is as it was loaded.
            unwrapped.save_pretrained(folder, save_embedding_layers=False)
            return
        save_model(unwrapped, str(folder / WEIGHTS_FILE))


class TaskTrainer(_QuietTrainer):
    """Trains on labels and, with a teacher, on its logits (Hinton, Vinyals and Dean, arXiv 1503.02531)."""

    def __init__(self, *args: Any, weight: float, temperature: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weight, self.temperature = weight, temperature

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        """`(1 - weight) CE(labels) + weight T^2 KL(teacher || model at temperature T)`; in evaluation CE alone."""
        outputs = model(**inputs)
        loss = outputs.loss
        if self.teacher is not None and model.training:
            with torch.no_grad():
                wanted = self.teacher(**{k: v for k, v in inputs.items() if k != "labels"}).logits
            loss = (1.0 - self.weight) * loss + self.weight * logit_divergence(outputs.logits, wanted, self.temperature)
        return (loss, outputs) if return_outputs else loss


class LayerwiseTrainer(_QuietTrainer):
    """Trains hidden states behind the fused layers towards the original's (the method's optional distillation)."""

    def __init__(self, *args: Any, layers: Sequence[int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.layers = list(layers)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        """Mean over fused layers of the relative squared error of their hidden states."""
        # Without dropout: the teacher has none, and its noise would hide the error that there is to learn from.
        model.eval()
        known = {k: v for k, v in inputs.items() if k != "labels"}
        outputs = model(**known, output_hidden_states=True)
        assert self.teacher is not None
        with torch.no_grad():
            wanted = self.teacher(**known, output_hidden_states=True).hidden_states
        mask = inputs["attention_mask"]
        loss = torch.stack(
            [hidden_state_error(outputs.hidden_states[n + 1], wanted[n + 1], mask) for n in self.layers]
        ).mean()
        return (loss, outputs) if return_outputs else loss


class DistillTrainer(_QuietTrainer):
    """Trains a student on what a `LayerToLayer` compares; evaluation says each part, too."""

    def __init__(self, *args: Any, pairs: LayerToLayer, **kwargs: Any) -> None:
        super().__init__(*args, teacher=pairs.teacher, by_length=False, compute_metrics=self._means, **kwargs)
        self.pairs = pairs
        #: What evaluation says.
        self.said = [name for name in PARTS if name == "mlm" or pairs.weights[name]]

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return EpochOrder(len(self.train_dataset), self.args.seed)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        """The weighted sum of the parts."""
        # Around the teacher as well, which no one has wrapped.
        with self.accelerator.autocast():
            parts = self.pairs.parts(model, inputs, predicts=None if model.training else True)
            loss = self.pairs.total(parts)
        if not return_outputs:
            return loss
        # A row for each of the batch, which is how predictions are gathered.
        means = torch.stack([parts[name] for name in self.said]).expand(len(inputs["input_ids"]), -1)
        return loss, {"loss": loss, "parts": means}

    def _means(self, found: Any) -> dict[str, float]:
        return dict(zip(self.said, map(float, found.predictions.mean(axis=0)), strict=True))


def logit_divergence(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """`T^2 KL(softmax(wanted / T) || softmax(logits / T))`, mean over all but the last dimension; float32."""
    log_p, log_q = (torch.log_softmax(z.float() / temperature, dim=-1) for z in (wanted, logits))
    divergence = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return divergence.mean() * temperature**2


def hidden_state_error(hidden: Tensor, wanted: Tensor, mask: Tensor) -> Tensor:
    """`sum |hidden - wanted|^2 / sum |wanted|^2` over unmasked positions of `(batch, tokens, d)` states; float32."""
    weight = mask.unsqueeze(-1).float()
    wanted = wanted.float() * weight
    difference = (hidden.float() * weight - wanted).square().sum()
    return difference / wanted.square().sum().clamp_min(torch.finfo(torch.float32).tiny)
