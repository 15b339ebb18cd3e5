"""The record of `finetune`, as `settings.py` has those of the other verbs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlp_fusion.choices import ADAPTER_RATE, FULL_RATE, PEFT_METHODS, PEFT_RATES, TASKS, TRAINERS
from mlp_fusion.errors import InputError
from mlp_fusion.settings import Settings, option


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(Settings):
    """How a model is fine-tuned."""

    task: str = option("Classify texts or pairs of texts, or predict the next token (lm).", choices=TASKS)
    layerwise_epochs: float = option(
        "Passes of the fit to the original's hidden states, in which only the fused layers train.", 1.0, above=0.0
    )
    layerwise_learning_rate: float = option("Learning rate of that fit.", 5e-4, above=0.0)
    distill_weight: float = option("Weight of the teacher's logits against the labels.", 0.5, least=0.0, most=1.0)
    temperature: float = option("Temperature of the teacher's logits.", 2.0, above=0.0)
    optimizer: str = option("adamw, or sgd with momentum 0.9.", "adamw", choices=TRAINERS)
    peft: str | None = option(
        "Train a method of peft in place of the weights, which stay: OUT gets the merged model, OUT/adapter what was "
        "trained.",
        None, choices=PEFT_METHODS, default_help="all weights train",
    )  # fmt: skip
    peft_options: dict[str, Any] | None = option(
        "Options of the method, fields of its config: r, budget, parameters, ...", None, metavar="NAME=VALUE",
        default_help="the method's own",
    )  # fmt: skip
    adapters: bool = option("Of a MiniALBERT, train adapters and head alone; where it has none, it gets them.", False)
    learning_rate: float | None = option(
        "Learning rate at its peak.", None, above=0.0,
        default_help=f"{FULL_RATE:g}, with adapters {ADAPTER_RATE:g}, "
        + ", ".join(f"with {name} {rate:g}" for name, rate in PEFT_RATES.items()),
    )  # fmt: skip
    weight_decay: float = option("Weight decay of all weights that train.", 0.01, least=0.0)
    warmup: float = option(
        "Share of the steps that the learning rate rises over, before it falls linearly to zero.", 0.06, least=0.0,
        most=1.0,
    )  # fmt: skip
    epochs: float = option("Passes over the data.", 3.0, above=0.0)
    batch_size: int = option("Rows per step and device.", 32, least=1)
    accumulation: int = option("Parts that a batch is worked through in.", 1, least=1)
    max_length: int = option("Tokens of a text, beyond which it is cut; for lm, of a block.", 128, least=1)
    checkpoint_steps: int | None = option(
        "Steps between checkpoints.", None, least=1, default_help="one after each epoch"
    )
    seed: int = option("Seed of a new head, the order of the data and dropout.", 0, least=0, most=2**32 - 1)
    device: str = option("auto, cpu or cuda.", "auto", choices=("auto", "cpu", "cuda"), recorded=False,
        hint=", and CUDA_VISIBLE_DEVICES to choose among GPUs",
    )  # fmt: skip
    resume: bool = option("Go on with the unfinished run in OUT, from its last checkpoint.", False, recorded=False)

    def check(self) -> None:
        """Raise InputError for a value that makes no sense."""
        super().check()
        if self.peft_options is not None and self.peft is None:
            raise InputError("peft_options are options of a method: choose one with peft")
        if self.adapters and self.peft is not None:
            raise InputError(f"peft {self.peft} trains its own parameters, adapters a MiniALBERT's: leave out one")
        if self.batch_size % self.accumulation:
            raise InputError(f"batch_size {self.batch_size} is no multiple of accumulation {self.accumulation}")

    def rate(self) -> float:
        """The learning rate."""
        if self.learning_rate is not None:
            return self.learning_rate
        if self.adapters:
            return ADAPTER_RATE
        return FULL_RATE if self.peft is None else PEFT_RATES[self.peft]

    def recorded(self) -> dict[str, Any]:
        """As of any record, with the learning rate that is used."""
        return {**super().recorded(), "learning_rate": self.rate()}
