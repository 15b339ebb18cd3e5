"""The record of `distill`, as `settings.py` has those of the other verbs."""

from __future__ import annotations

from dataclasses import dataclass

from mlp_fusion.errors import InputError
from mlp_fusion.settings import Settings, option


@dataclass(frozen=True, kw_only=True)
class DistillSettings(Settings):
    """What the student is, and what it learns."""

    recursions: int | None = option(
        "Times that the student's one layer is gone through.", None, least=1,
        default_help="half the teacher's layers, rounded up",
    )  # fmt: skip
    embedding_size: int = option("Width of the student's embeddings.", 128, least=1)
    intermediate_size: int | None = option(
        "Neurons of the student's FFN.", None, least=1, default_help="those of the teacher's widest"
    )
    adapter_size: int | None = option(
        "Width of the adapters that each recursion has of its own; 0 for none.", None, least=0,
        default_help="a sixteenth of the hidden size",
    )  # fmt: skip
    start: str = option(
        "What the student starts from: the teacher's embeddings and layers, fused across depth, or random weights.",
        "teacher", choices=("teacher", "random"),
    )  # fmt: skip
    mlm_weight: float = option("Weight of the masked tokens themselves.", 1.0, least=0.0)
    attention_weight: float = option("Weight of the attention maps, summed over mapped layers.", 3.0, least=0.0)
    hidden_weight: float = option("Weight of the hidden states, summed over mapped layers.", 3.0, least=0.0)
    output_weight: float = option("Weight of the teacher's predictions for masked tokens.", 5.0, least=0.0)
    mask_share: float = option("Share of the tokens that is masked.", 0.15, above=0.0, below=1.0)
    epochs: float = option("Passes over the text, with other masks in each.", 1.0, above=0.0)
    learning_rate: float = option("Learning rate at its peak.", 5e-4, above=0.0)
    weight_decay: float = option("Weight decay of all weights that train.", 1e-4, least=0.0)
    warmup: float = option(
        "Share of the steps that the learning rate rises over, before it falls linearly to zero.", 0.06, least=0.0,
        most=1.0,
    )  # fmt: skip
    batch_size: int = option("Blocks per step and device.", 32, least=1)
    accumulation: int = option("Parts that a batch is worked through in.", 1, least=1)
    max_length: int = option("Tokens of a block.", 128, least=1)
    checkpoint_steps: int | None = option(
        "Steps between checkpoints.", None, least=1, default_help="one after each epoch"
    )
    seed: int = option(
        "Seed of what starts at random, the masks, the order of the data and dropout.", 0, least=0, most=2**32 - 1
    )
    device: str = option("auto, cpu or cuda.", "auto", choices=("auto", "cpu", "cuda"), recorded=False,
        hint=", and CUDA_VISIBLE_DEVICES to choose among GPUs",
    )  # fmt: skip
    resume: bool = option("Go on with the unfinished run in OUT, from its last checkpoint.", False, recorded=False)

    def check(self) -> None:
        """Raise InputError for a value that makes no sense."""
        super().check()
        if self.batch_size % self.accumulation:
            raise InputError(f"batch_size {self.batch_size} is no multiple of accumulation {self.accumulation}")
        if not (self.mlm_weight or self.output_weight):
            raise InputError("mlm_weight and output_weight are 0, and nothing would train the head: give one of them")

    def weights(self) -> dict[str, float]:
        """Part of the loss -> its weight."""
        return {
            "mlm": self.mlm_weight,
            "attention": self.attention_weight,
            "hidden": self.hidden_weight,
            "output": self.output_weight,
        }
