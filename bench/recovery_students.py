"""What `recovery.py` trains: text, originals, narrower models of equal size, and the forms that each can stand in.

The forms of one narrowed model compute the same function and train differently (docs/guide/parameterization.md):
`folded`, the plain checkpoint; `sized`, every neuron with the number of neurons that it stands for, where the optimiser
wants it; and `matched`, with the scale that brings the tangent kernel of that optimiser closest to the original's, as
`match="auto"` of `fuse` does it. A model is narrowed once, kept as a checkpoint, and put into its forms from there, so
that nothing but the form differs between them.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from filelock import FileLock
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import mlp_fusion
from fusion_kernels import ntk_gram
from mlp_fusion.calibration.matching import MATCHING_ROWS, match_ntk
from mlp_fusion.choices import OPTIMIZER_KERNELS
from mlp_fusion.families.exchange import install
from mlp_fusion.measure.errors import relative_error
from mlp_fusion.neurons import NeuronBundle
from mlp_fusion.running.taps import capture_activations
from mlp_fusion.selection import parameterization_for
from mlp_fusion.store.record import architecture_of

Form = Literal["folded", "sized", "matched"]
Batch = dict[str, Tensor]

#: Vocabulary of the small model, whose tokens are bytes.
VOCABULARY = 256


@dataclass(frozen=True)
class Model:
    """An original, and the text that goes with it.

    Attributes:
        length, batch: tokens of a block, and blocks of a training step.
        evaluation: blocks to validate on, and as many to measure on.
        calibration, calibration_length: blocks that narrowing learns from, and their tokens.
        bfloat16: whether forward and backward passes of the training run under autocast.
    """

    length: int
    batch: int
    evaluation: int
    calibration: int
    calibration_length: int
    bfloat16: bool


MODELS = {
    "small": Model(64, 8, 64, 128, 64, bfloat16=False),
    "smollm2": Model(128, 2, 8, 16, 512, bfloat16=True),
}
#: Shape and training of the small model.
SHAPE = {"hidden_size": 128, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
TRAINING = {"steps": 1500, "batch": 4, "length": 128, "learning_rate": 2e-3}


@dataclass(frozen=True)
class Base:
    """How FFNs are narrowed: method and options of `fuse`, with text or without."""

    method: str
    calibrated: bool = True
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


BASES = {
    "auto": Base("auto"),
    "fusion": Base("fusion", options={"sequential": True}),
    "prune": Base("prune", options={"sequential": True}),
    "fusion, no text": Base("fusion", calibrated=False),
    "prune, no text": Base("prune", calibrated=False),
}


@dataclass(frozen=True)
class Student:
    """A narrowed model in one of its forms."""

    base: str
    form: Form


#: Those whose form is `sized` have cluster sizes; kept neurons stand for one each, so that `folded` is the same.
STUDENTS: dict[str, Student] = {
    "auto": Student("auto", "folded"),
    "auto, matched": Student("auto", "matched"),
    "fusion, folded": Student("fusion", "folded"),
    "fusion": Student("fusion", "sized"),
    "fusion, matched": Student("fusion", "matched"),
    "prune": Student("prune", "folded"),
    "prune, matched": Student("prune", "matched"),
    "fusion, no text, folded": Student("fusion, no text", "folded"),
    "fusion, no text": Student("fusion, no text", "sized"),
    "prune, no text": Student("prune, no text", "folded"),
}


class Text:
    """Tiny Shakespeare in tokens: eight tenths to learn from, one to choose by, one to measure on."""

    def __init__(self, model: Model, tokenize: Callable[[str], list[int]], text: str) -> None:
        cuts = [len(text) * tenths // 10 for tenths in (8, 9)]
        parts = text[: cuts[0]], text[cuts[0] : cuts[1]], text[cuts[1] :]
        self.model = model
        self.train, validation, held_out = (torch.tensor(tokenize(part)) for part in parts)
        self.validation, self.held_out = (self._fixed(tokens) for tokens in (validation, held_out))

    def _fixed(self, tokens: Tensor) -> Tensor:
        """The first blocks, `(evaluation, length)`."""
        count, length = self.model.evaluation, self.model.length
        if len(tokens) < count * length:
            raise ValueError(f"{count * length} tokens are wanted to measure on, the text has {len(tokens)}")
        return tokens[: count * length].view(count, length)

    def calibration(self, seed: int) -> list[Batch]:
        """Blocks drawn from the training text by `seed`."""
        generator = torch.Generator().manual_seed(seed)
        blocks = self.drawn(generator, self.model.calibration, self.model.calibration_length)
        return [{"input_ids": part} for part in blocks.split(4)]

    def drawn(self, generator: torch.Generator, count: int, length: int | None = None) -> Tensor:
        """`(count, length)`: blocks that start anywhere in the training text, as long as the model's or of `length`."""
        length = length or self.model.length
        starts = torch.randint(len(self.train) - length, (count, 1), generator=generator)
        return self.train[starts + torch.arange(length)]


@torch.no_grad()
def loss_on(model: Any, blocks: Tensor) -> float:
    """Mean cross-entropy of the next tokens, in nats, in float32."""
    model.eval()
    parts = blocks.split(16)
    found = [model(input_ids=part, labels=part).loss.item() * len(part) for part in parts]
    return sum(found) / len(blocks)


class House:
    """Where originals and narrowed models are kept: each is made once, by whichever process wants it first.

    Args:
        name: of `MODELS`.
        data: folder with tiny_shakespeare.txt.
        work: folder for checkpoints.
        source: checkpoint of the original; None for `small`, which is trained here, an original for each seed.
    """

    def __init__(self, name: str, data: Path, work: Path, source: Path | None) -> None:
        self.name, self.model, self.work, self.source = name, MODELS[name], work / name, source
        text = (data / "tiny_shakespeare.txt").read_text(encoding="utf-8")
        self.work.mkdir(parents=True, exist_ok=True)
        if source is None:
            self.text = Text(self.model, lambda part: list(part.encode()), text)
        else:
            tokenizer = AutoTokenizer.from_pretrained(source)
            self.text = Text(
                self.model, lambda part: tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"], text
            )

    def original(self, seed: int) -> Any:
        """The model before it is narrowed."""
        return AutoModelForCausalLM.from_pretrained(self.source or self._kept(f"original-{seed}", self._train, seed))

    def _train(self, seed: int) -> Any:
        transformers.set_seed(seed)
        config = LlamaConfig(
            vocab_size=VOCABULARY, max_position_embeddings=256, bos_token_id=0, eos_token_id=0, **SHAPE
        )  # fmt: skip
        model, generator, steps = LlamaForCausalLM(config), torch.Generator().manual_seed(seed), TRAINING["steps"]
        optimizer = torch.optim.AdamW(model.parameters(), lr=TRAINING["learning_rate"], weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        )
        for _ in range(int(steps)):
            blocks = self.text.drawn(generator, int(TRAINING["batch"]), int(TRAINING["length"]))
            model(input_ids=blocks, labels=blocks).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        return model

    def base(self, name: str, share: float, seed: int) -> Path:
        """The folder of a narrowed model: a plain checkpoint, with its scale beside it where it has one."""
        return self._kept(
            f"{name.replace(', ', '+').replace(' ', '_')}-{share:g}-{seed}", self._narrow, name, share, seed
        )

    def _narrow(self, name: str, share: float, seed: int) -> Any:
        model, base = self.original(seed), BASES[name]
        mlp_fusion.fuse(
            model, round(share * model.config.intermediate_size), method=base.method, seed=seed,
            calibration=self.text.calibration(seed) if base.calibrated else None, **base.options,
        )  # fmt: skip
        return model

    def _kept(self, name: str, make: Callable[..., Any], *arguments: Any) -> Path:
        folder = self.work / name
        partial = self.work / f"{name}.partial"
        with FileLock(self.work / f"{name}.lock"):
            if not (folder / "config.json").is_file():
                make(*arguments).save_pretrained(partial)
                partial.rename(folder)
        return folder

    def student(self, name: str, share: float, seed: int, optimizer: str) -> tuple[Any, dict[str, float]]:
        """A student in the form that the optimiser wants, and what is known of its FFNs.

        Returns:
            The model; `kernel_error`, of the tangent kernel that the optimiser sees, on calibration text, the median
            over FFNs; and `largest_scale`.
        """
        model, known = self._formed(name, share, seed, optimizer)
        return copy.deepcopy(model), known

    @functools.lru_cache(maxsize=1)  # noqa: B019 - a house lives as long as the process, and a cell is many runs
    def _formed(self, name: str, share: float, seed: int, optimizer: str) -> tuple[Any, dict[str, float]]:
        asked, shape = STUDENTS[name], parameterization_for(optimizer)
        kernel: Any = OPTIMIZER_KERNELS[shape]
        folder = self.base(asked.base, share, seed)
        model = AutoModelForCausalLM.from_pretrained(folder)
        architecture, text = architecture_of(model.config), self.text.calibration(seed)
        sites = architecture.sites(model)
        seen = capture_activations(model, architecture, sites, text, rows=MATCHING_ROWS, seed=seed)
        whole = [architecture.read(site) for site in architecture.sites(self.original(seed))]
        if asked.form == "sized":
            mlp_fusion.restore(model, folder, optimizer)
        elif asked.form == "matched":
            for site, original, rows in zip(sites, whole, seen, strict=True):
                bundle = architecture.read(site)
                install(site, match_ntk(original, bundle, rows.x, kernel=kernel, parameterization=shape), shape)
        errors, largest = [], 1.0
        for site, original, rows in zip(architecture.sites(model), whole, seen, strict=True):
            bundle = architecture.read(site)
            if bundle.scale is not None:
                largest = max(largest, float(bundle.scale.max()))
            errors.append(_kernel_error(original, bundle, rows.x, kernel))
        return model, {"kernel_error": statistics.median(errors), "largest_scale": largest}


def _kernel_error(original: NeuronBundle, narrow: NeuronBundle, x: Tensor, kernel: Any) -> float:
    parts = ("w_gate", "w_in", "w_out")
    return relative_error(*(ntk_gram(b, x, params=parts, kernel=kernel) for b in (narrow, original)))
