"""The record of `squeeze`, as `settings.py` has those of the other verbs."""

from __future__ import annotations

from dataclasses import dataclass

from mlp_fusion.choices import PEFT_RATES, TASKS
from mlp_fusion.errors import InputError
from mlp_fusion.settings import Settings, option


@dataclass(frozen=True, kw_only=True)
class SqueezeSettings(Settings):
    """How bonds are cut and tuned."""

    task: str = option("Classify texts or pairs of texts, or predict the next token (lm).", choices=TASKS)
    target_parameters: float | None = option(
        "Parameters to end with: a count, or a share of the model's.", None, above=0.0
    )
    max_loss: float | None = option("Loss on the evaluation data that ends it; the round before is kept.", None)
    width: float | None = option(
        "Fuse the FFNs before anything else, to this share of their width, calibrated on the first training texts.",
        None, above=0.0, below=1.0,
    )  # fmt: skip
    round_share: float = option("Share of the model's parameters that a round takes.", 0.05, above=0.0, below=1.0)
    length: int = option("Tensors of a chain.", 5, least=2)
    embeddings: bool = option("Cut embeddings too.", False)
    epochs: float = option("Passes over the data in each round.", 1.0, above=0.0)
    learning_rate: float = option("Learning rate at its peak, in each round.", PEFT_RATES["mpo"], above=0.0)
    batch_size: int = option("Rows per step.", 32, least=1)
    max_length: int = option("Tokens of a text, beyond which it is cut; for lm, of a block.", 128, least=1)
    seed: int = option("Seed of a new head, the order of the data and dropout.", 0, least=0, most=2**32 - 1)
    device: str = option("auto, cpu or cuda.", "auto", choices=("auto", "cpu", "cuda"), recorded=False)
    resume: bool = option("Go on with the unfinished run in OUT.", False, recorded=False)

    def check(self) -> None:
        """Raise InputError for a value that makes no sense."""
        super().check()
        if self.target_parameters is None and self.max_loss is None:
            raise InputError("nothing ends it: give target_parameters, max_loss, or both")
        if self.target_parameters is not None and self.target_parameters >= 1.0 and self.target_parameters % 1.0:
            raise InputError(f"target_parameters {self.target_parameters}: give a share below 1, or a whole count")
