"""`distill`: a student with one shared layer, its teacher, and the run that teaches it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from mlp_fusion.distilling import DistillSettings
from mlp_fusion.errors import InputError
from mlp_fusion.finetuning.data import Rows
from mlp_fusion.finetuning.layer_to_layer import LayerToLayer, mapped_layers
from mlp_fusion.finetuning.loading import Model, check_tokens, load_masked, name_of, positions
from mlp_fusion.finetuning.masking import MaskedText, masked_blocks
from mlp_fusion.finetuning.result import DISTILL_FILE, DistillReport, Progress
from mlp_fusion.finetuning.session import Session, learning_curve, with_named_outputs
from mlp_fusion.finetuning.students import start_from
from mlp_fusion.minialbert.configuration import MiniAlbertConfig
from mlp_fusion.minialbert.modeling import MiniAlbertForMaskedLM
from mlp_fusion.reducing.chosen import find_ffns
from mlp_fusion.store.tokenizers import load_tokenizer, tokenizer_of

#: Parts of the text that a teacher is tried on before anything is written.
_TRIED = 2


@dataclass(frozen=True, eq=False)
class Lesson:
    """Who learns from whom.

    Attributes:
        settings: with what the teacher decides filled in.
        student: a MiniALBERT with a head for masked tokens.
        teacher: the model it learns from.
        tokenizer: of both.
        name: of the teacher.
    """

    settings: DistillSettings
    student: Any
    teacher: Any
    tokenizer: Any
    name: str

    @staticmethod
    def prepare(settings: DistillSettings, teacher: Model, tokenizer: Any) -> Lesson:
        """Load the teacher and make a student that suits it.

        Raises:
            InputError: it cannot be loaded, lacks what is compared, or there can be no such student.
        """
        loaded = load_masked(teacher, headless=not settings.output_weight)
        settings = _completed(settings, loaded)
        known = _tokenizer(teacher, tokenizer)
        return Lesson(settings, _student(settings, loaded), loaded, known, str(name_of(teacher)))

    def __iter__(self) -> Iterator[Any]:
        return iter((self.student, self.teacher))

    def text(self, rows: Rows | None, name: str) -> MaskedText | None:
        """Masked blocks, no longer than both models have positions for.

        Raises:
            InputError: the tokenizer does not suit the models, or there is no token.
        """
        if rows is None:
            return None
        s = self.settings
        length = min(s.max_length, *(positions(model) or s.max_length for model in self))
        # A copy: padding and truncation that are set on it would be saved with the tokenizer.
        ids, own = masked_blocks(rows, copy.deepcopy(self.tokenizer), length)
        # Masked tokens may become any of the tokenizer's.
        check_tokens(rows, max(int(ids.max()), len(self.tokenizer) - 1), self.teacher)
        return MaskedText(ids, own, self.tokenizer, s.mask_share, s.seed, name)


def _completed(settings: DistillSettings, teacher: Any) -> DistillSettings:
    config = teacher.config
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
        if not isinstance(getattr(config, key, None), int):
            raise InputError(f"teacher {type(teacher).__name__}: its config has no {key}: take one of the kind of BERT")
    recursions = settings.recursions or -(-config.num_hidden_layers // 2)
    mapped_layers(recursions, config.num_hidden_layers)
    width = settings.intermediate_size
    if width is None:
        width = max(site.neurons for site in find_ffns(teacher)[1])
    adapter = config.hidden_size // 16 if settings.adapter_size is None else settings.adapter_size
    return dataclasses.replace(settings, recursions=recursions, intermediate_size=width, adapter_size=adapter)


def _student(settings: DistillSettings, teacher: Any) -> Any:
    config = teacher.config
    same = (
        "vocab_size", "hidden_size", "num_attention_heads", "pad_token_id", "bos_token_id", "eos_token_id",
        "hidden_dropout_prob", "attention_probs_dropout_prob", "layer_norm_eps",
    )  # fmt: skip
    known = {name: getattr(config, name) for name in same if getattr(config, name, None) is not None}
    act = next((getattr(config, name) for name in ("hidden_act", "activation") if getattr(config, name, None)), "gelu")
    student = MiniAlbertForMaskedLM(
        MiniAlbertConfig(
            **known,
            hidden_act=act,
            type_vocab_size=getattr(config, "type_vocab_size", None) or 1,
            max_position_embeddings=positions(teacher) or settings.max_length,
            num_hidden_layers=settings.recursions,
            embedding_size=settings.embedding_size,
            intermediate_size=settings.intermediate_size,
            adapter_size=settings.adapter_size,
        )
    )
    if settings.start == "teacher":
        start_from(student, teacher, seed=settings.seed)
    return student


def _tokenizer(teacher: Model, tokenizer: Any) -> Any:
    if tokenizer is not None:
        return tokenizer
    found = load_tokenizer(teacher) if isinstance(teacher, (str, Path)) else tokenizer_of(teacher)
    if found is None:
        raise InputError("the teacher was not loaded from a folder with a tokenizer: pass tokenizer")
    return found


class Distillation(Session):
    """One distillation."""

    settings: DistillSettings

    def __init__(
        self, lesson: Lesson, train: MaskedText, evaluation: MaskedText | None, out: Path, progress: Progress | None
    ) -> None:
        super().__init__(lesson.settings, train, evaluation, out, progress)
        self.lesson = lesson
        self.pairs = LayerToLayer(lesson.student, lesson.teacher, lesson.settings.weights())
        with with_named_outputs(lesson):
            self.pairs.check(train.batch(range(min(_TRIED, len(train)))))
        self.curve: list[dict[str, float]] = []
        self.measured: list[dict[str, float]] = []

    def train(self) -> None:
        """Evaluate and train."""
        # Here, because this import needs accelerate.
        from mlp_fusion.finetuning.trainers import DistillTrainer

        s = self.settings
        with with_named_outputs(self.lesson):
            trainer = DistillTrainer(
                model=self.lesson.student,
                args=self.arguments("train", s.learning_rate, s.epochs, evaluate=True, predicts=True),
                train_dataset=self.examples,
                eval_dataset=self.held_out,
                data_collator=transformers.default_data_collator,
                stage="train",
                progress=self.progress,
                pairs=self.pairs,
            )

            def measure(metrics: dict[str, float]) -> dict[str, float]:
                return {name: metrics[f"eval_{name}"] for name in ("loss", *trainer.said)}

            if self.state["initial"] is None and self.held_out is not None:
                self.note(initial=measure(trainer.evaluate()))
            self.go(trainer, self.checkpoint("train"))
            self.measured = self.evaluations(trainer, self.state["initial"], measure)
        self.curve = learning_curve(trainer)

    def finish(self, seconds: float) -> DistillReport:
        """Write the student, its tokenizer and, last, the report; the checkpoints of the run go."""
        student, teacher = (sum(p.numel() for p in model.base_model.parameters()) for model in self.lesson)
        report = DistillReport(
            settings=self.settings.recorded(),
            teacher=self.lesson.name,
            layers=self.pairs.layers,
            parameters=student,
            teacher_parameters=teacher,
            examples=len(self.examples),
            initial=self.state["initial"],
            final=self.measured[-1] if self.measured else None,
            train=self.curve,
            evaluations=self.measured,
            seconds=seconds,
        )
        self.write(self.lesson.student, self.lesson.tokenizer, report, DISTILL_FILE)
        return report
