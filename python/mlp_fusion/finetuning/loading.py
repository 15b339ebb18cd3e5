"""The model to train, its tokenizer, and its teachers, from folders, hub names or memory."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from mlp_fusion.architectures import get_architecture
from mlp_fusion.checkpoint.folding import restore
from mlp_fusion.checkpoint.metadata import fusion_record
from mlp_fusion.checkpoint.source import local_folder
from mlp_fusion.errors import InputError

Model: TypeAlias = str | Path | PreTrainedModel

#: task -> the class that loads a model for it, and how checkpoints with its head call themselves.
_CLASSES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "classification": (AutoModelForSequenceClassification, ("ForSequenceClassification",)),
    "lm": (AutoModelForCausalLM, ("ForCausalLM", "LMHeadModel")),
}
_LOADING: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": False, "use_safetensors": True}


@dataclass(frozen=True)
class Student:
    """What is trained.

    Attributes:
        name: folder, hub name, or class of a model in memory.
        model: ready to train: a fused one has its scale, in the parameterization of the optimiser.
        tokenizer: its own.
        classes: label -> class index; empty for language modelling.
    """

    name: str
    model: Any
    tokenizer: Any
    classes: dict[str, int]


def load_student(model: Model, task: str, names: Sequence[str], optimizer: str, tokenizer: Any = None) -> Student:
    """Load (or take) the model to train.

    Args:
        model: a folder or hub name, fused or not, or a model in memory.
        task: `classification` or `lm`.
        names: the classes in the data.
        optimizer: what it will be trained with; the scale of a fused model from disk is taken out accordingly.
        tokenizer: to use; None for the one beside the weights.

    Raises:
        InputError: it cannot be loaded, or its head is for other classes.
    """
    if isinstance(model, (str, Path)):
        folder = local_folder(model)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        options = dict(_LOADING)
        if task == "classification" and not has_head(config, task):
            options["id2label"] = dict(enumerate(names))
            options["label2id"] = {name: i for i, name in enumerate(names)}
        loaded = _CLASSES[task][0].from_pretrained(folder, **options)
        record = fusion_record(loaded.config)
        if record is not None and record["parameterization"] != "folded":
            restore(loaded, folder, optimizer)
        name = str(model)
    else:
        loaded, name = model, type(model).__name__
        folder = Path(model.name_or_path or "nowhere")
    if tokenizer is None:
        tokenizer = load_tokenizer(folder)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise InputError(f"{name}: its tokenizer has neither padding nor end-of-text token: set one")
        tokenizer.pad_token = tokenizer.eos_token
    if loaded.config.pad_token_id is None:
        loaded.config.pad_token_id = tokenizer.pad_token_id
    return Student(name, loaded, tokenizer, _classes(loaded, task, names, name))


def has_head(config: Any, task: str) -> bool:
    """Whether the checkpoint says that it was saved with the task's head."""
    suffixes = _CLASSES[task][1]
    return any(name.endswith(suffixes) for name in config.architectures or [])


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`.

    Raises:
        InputError: there is none, or it cannot be loaded.
    """
    if not folder.is_dir():
        raise InputError("the model was not loaded from a folder with a tokenizer: pass tokenizer")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise InputError(f"{folder}: its tokenizer cannot be loaded ({' '.join(str(error).split())[:200]})") from error


def _classes(model: Any, task: str, names: Sequence[str], name: str) -> dict[str, int]:
    if task != "classification":
        return {}
    config = model.config
    if config.num_labels != len(names):
        raise InputError(
            f"{name} has a head for {config.num_labels} classes, the data has {len(names)} ({', '.join(names)})"
        )
    known = {str(label): index for label, index in (config.label2id or {}).items()}
    if set(known) == set(names):
        return known
    if all(label.startswith("LABEL_") for label in known):
        return {label: index for index, label in enumerate(names)}
    raise InputError(f"{name} has a head for the classes {', '.join(known)}, the data has {', '.join(names)}")


def load_teacher(teacher: Model, task: str, student: Student) -> nn.Module:
    """The model whose logits are learnt from; it needs the task's head, and the student's vocabulary and classes.

    Raises:
        InputError: it cannot be loaded or does not fit.
    """
    if isinstance(teacher, (str, Path)):
        folder = local_folder(teacher)
        if not has_head(AutoConfig.from_pretrained(folder, trust_remote_code=False), task):
            raise InputError(f"teacher {teacher}: it has no trained {task} head: fine-tune it first")
        loaded = _CLASSES[task][0].from_pretrained(folder, **_LOADING)
    else:
        loaded = _another(teacher, student)
    _check_vocabulary("teacher", loaded, student)
    if task == "classification":
        classes = _classes(loaded, task, list(student.classes), "the teacher")
        if classes != student.classes:
            raise InputError("the teacher numbers the classes otherwise than the model: fine-tune it on the same data")
    return loaded  # type: ignore[no-any-return]


def load_original(original: Model, student: Student) -> tuple[nn.Module, list[int]]:
    """The unfused model whose hidden states are learnt from, and the layers to learn them in.

    Raises:
        InputError: it cannot be loaded, does not fit, or the student is not fused.
    """
    record = fusion_record(student.model.config)
    if record is None:
        raise InputError("layer-wise distillation is for fused models, and the model to train is none")
    if isinstance(original, (str, Path)):
        loaded = AutoModel.from_pretrained(local_folder(original), **_LOADING)
    else:
        loaded = _another(original, student).base_model
    _check_vocabulary("original", loaded, student)
    for key in ("hidden_size", "num_hidden_layers"):
        if getattr(loaded.config, key) != getattr(student.model.config, key):
            raise InputError(
                f"the original has {key} {getattr(loaded.config, key)}, the model {getattr(student.model.config, key)}"
            )
    return loaded, list(record["fused_layers"])


def _another(teacher: Any, student: Student) -> Any:
    # A teacher is frozen and put into evaluation mode: the caller's own model must not be.
    if teacher is student.model:
        raise InputError("a model cannot teach itself: pass a copy of it from before the fusion")
    return copy.deepcopy(teacher)


def _check_vocabulary(role: str, model: Any, student: Student) -> None:
    ours, theirs = student.model.config.vocab_size, model.config.vocab_size
    if ours != theirs:
        raise InputError(f"the {role} has a vocabulary of {theirs}, the model one of {ours}: they must share it")


def fused_parameters(model: Any, layers: Sequence[int]) -> list[nn.Parameter]:
    """Weights and biases of the FFNs in `layers`, their scale excepted."""
    architecture = get_architecture(model.config.model_type)
    found = []
    for site in architecture.sites(model):
        if site.index in layers:
            for path in architecture.projections.values():
                found += list(site.layer.get_submodule(path).parameters())
    return found
