"""The options of `finetune` that are plain values, and what they may be; read before anything else is imported."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlp_fusion.choices import TASKS, TRAINERS
from mlp_fusion.errors import InputError


@dataclass(frozen=True)
class Settings:
    """The options of :func:`mlp_fusion.finetune` that are plain values; what they mean stands there."""

    task: str
    optimizer: str
    learning_rate: float
    weight_decay: float
    warmup: float
    epochs: float
    batch_size: int
    accumulation: int
    max_length: int
    distill_weight: float
    temperature: float
    layerwise_epochs: float
    layerwise_learning_rate: float
    checkpoint_steps: int | None
    seed: int

    def check(self) -> None:
        """Raise InputError for a value that makes no sense."""
        if self.task not in TASKS:
            raise InputError(f"task {self.task!r}: use one of {', '.join(TASKS)}")
        if self.optimizer not in TRAINERS:
            raise InputError(f"optimizer {self.optimizer!r}: use one of {', '.join(TRAINERS)}")
        for name in ("learning_rate", "epochs", "temperature", "layerwise_epochs", "layerwise_learning_rate"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} {value}: give a positive number")
        for name in ("batch_size", "accumulation", "max_length"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)}: give a positive number")
        if self.batch_size % self.accumulation:
            raise InputError(f"batch_size {self.batch_size} is no multiple of accumulation {self.accumulation}")
        for name, top in (("warmup", 1.0), ("distill_weight", 1.0), ("weight_decay", math.inf)):
            if not 0.0 <= getattr(self, name) <= top or math.isinf(getattr(self, name)):
                raise InputError(f"{name} {getattr(self, name)}: give a number from 0 to {top:g}")
        if self.checkpoint_steps is not None and self.checkpoint_steps < 1:
            raise InputError(f"checkpoint_steps {self.checkpoint_steps}: give a positive number, or None for epochs")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed {self.seed}: give an integer from 0 to 2**32 - 1")
