"""The model to train, its tokenizer, and its teachers, from folders, hub names or memory."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from mlp_fusion.errors import InputError, one_line
from mlp_fusion.minialbert.modeling import MiniAlbertPreTrainedModel
from mlp_fusion.modules import Scaled
from mlp_fusion.running.rows import Rows
from mlp_fusion.running.runner import Runner
from mlp_fusion.selection import parameterization_for
from mlp_fusion.store.record import adopt_fused_config, architecture_of, fusion_record
from mlp_fusion.store.restoring import restore
from mlp_fusion.store.source import local_folder, read_config
from mlp_fusion.store.tokenizers import load_tokenizer, tokenizer_of
from mlp_fusion.store.weights import read_tensors

Model: TypeAlias = str | Path | PreTrainedModel

#: task -> the class that loads a model for it, and how checkpoints with its head call themselves.
_CLASSES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "classification": (AutoModelForSequenceClassification, ("ForSequenceClassification",)),
    "lm": (AutoModelForCausalLM, ("ForCausalLM", "LMHeadModel")),
    "mlm": (AutoModelForMaskedLM, ("ForMaskedLM",)),
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
        fresh: names of its parameters that the checkpoint did not have.
    """

    name: str
    model: Any
    tokenizer: Any
    classes: dict[str, int]
    fresh: tuple[str, ...] = ()


def load_student(model: Model, task: str, names: Sequence[str], optimizer: str, tokenizer: Any = None) -> Student:
    """Load (or take) the model to train.

    Args:
        model: a folder or hub name, fused or not, or a model in memory.
        task: `classification` or `lm`.
        names: the classes in the data.
        optimizer: what it will be trained with; the scale of a fused model from disk is taken out accordingly.
        tokenizer: to use; None for the one beside the weights.

    Raises:
        InputError: it cannot be loaded or trained, has no head for `lm` or one for other classes, holds adapters, or
            was fused in memory for another optimiser.
    """
    if isinstance(model, (str, Path)):
        folder = local_folder(model)
        config = read_config(folder)
        options: dict[str, Any] = {}
        if task == "classification" and not has_head(config, task):
            options["id2label"] = dict(enumerate(names))
            options["label2id"] = {name: i for i, name in enumerate(names)}
        if task == "lm" and not has_head(config, task) and not getattr(config, "tie_word_embeddings", False):
            raise InputError(f"{model}: it was saved without its language modelling head: start from the whole model")
        loaded, fresh = _load_with_fresh(_CLASSES[task][0], folder, **options)
        record = fusion_record(loaded.config)
        if record is not None and record["parameterization"] != "folded":
            restore(loaded, folder, optimizer)
        name = str(model)
    else:
        loaded, name, fresh = model, type(model).__name__, ()
        _check_in_memory(loaded, name, optimizer)
    if tokenizer is None:
        tokenizer = tokenizer_of(loaded) if loaded is model else load_tokenizer(folder)
        if tokenizer is None:
            raise InputError("the model was not loaded from a folder with a tokenizer: pass tokenizer")
    else:
        tokenizer = copy.deepcopy(tokenizer)  # the token to pad with is set on it
    if tokenizer.pad_token is None:
        _choose_padding(tokenizer, getattr(loaded.config, "pad_token_id", None), name)
    _pad_alike(loaded, tokenizer)
    if task == "lm":
        _check_causal(loaded, name)
    classes = _classes(loaded, task, names, name)
    if classes and set(loaded.config.label2id or ()) != set(classes):
        loaded.config.label2id, loaded.config.id2label = classes, {index: label for label, index in classes.items()}
    return Student(name, loaded, tokenizer, classes, fresh)


def load_for(task: str, folder: Path) -> Any:
    """The model in `folder` with its head for the task, as it is."""
    return _load(_CLASSES[task][0], folder)


def with_companion(student: Student, method: str, options: Mapping[str, Any], task: str) -> Student:
    """The student with a method of peft put into its model, which alone trains, with the classifier's head.

    Raises:
        InputError: peft is missing, an option cannot be, or the method does not suit the model.
    """
    from mlp_fusion.companions.making import attach

    return dataclasses.replace(student, model=attach(student.model, method, options, task, _heads(student, task)))


def with_adapters(student: Student) -> Student:
    """The student, a MiniALBERT, of which the adapters and the head alone train; one without adapters gets them.

    Raises:
        InputError: it is no MiniALBERT.
    """
    model = student.model
    if not isinstance(model, MiniAlbertPreTrainedModel):
        raise InputError(f"{student.name} is no MiniALBERT, whose adapters could train: use peft")
    if not model.config.adapter_size:
        model.insert_adapters()
    model.freeze_all_but_adapters()
    return student


def _heads(student: Student, task: str) -> list[str]:
    """Modules that train whole: a classifier's head, and whatever else the checkpoint did not have."""
    model = student.model
    heads = {name.rpartition(".")[0] for name in student.fresh}
    if task == "classification":
        base = model.base_model
        others = [(name, child) for name, child in model.named_children() if base not in (child, model)]
        heads |= {name for name, child in others if next(child.parameters(), None) is not None}
    # What is in a head goes with it.
    return sorted(name for name in heads if not any(name.startswith(f"{other}.") for other in heads))


def _load(cls: Any, folder: Path, **options: Any) -> Any:
    return _load_with_fresh(cls, folder, **options)[0]


def _load_with_fresh(cls: Any, folder: Path, **options: Any) -> tuple[Any, tuple[str, ...]]:
    """The model, and the names of its parameters that the checkpoint does not have."""
    read_tensors(folder)  # whatever is wrong with the files is said in our words, and nothing ambiguous is loaded
    try:
        model, info = cls.from_pretrained(folder, output_loading_info=True, **_LOADING, **options)
        return model, tuple(sorted(info["missing_keys"]))
    except Exception as error:  # whatever a config of somebody else's makes of transformers' code
        raise InputError(
            f"{folder}: cannot be loaded as {cls.__name__.removeprefix('Auto')} ({one_line(error)})"
        ) from error


def _check_in_memory(model: Any, name: str, optimizer: str) -> None:
    if not isinstance(model, PreTrainedModel) or any(type(m).__module__.startswith("peft.") for m in model.modules()):
        raise InputError(
            f"{name}: not a plain model of transformers: merge adapters and unwrap it first, or train it with Trainer"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"{name}: all its parameters are frozen: set requires_grad on those to train")
    adopt_fused_config(model)
    wanted = parameterization_for(optimizer)
    for module in model.modules():
        if isinstance(module, Scaled) and module.scale is not None and module.parameterization != wanted:
            raise InputError(
                f"{name} was fused for another optimizer: it is {module.parameterization}, {optimizer} needs {wanted}: "
                f"fuse it with optimizer={optimizer!r}, or save it and pass the folder"
            )


def _choose_padding(tokenizer: Any, known: int | None, name: str) -> None:
    if known is not None and 0 <= known < len(tokenizer):
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(known)
    elif tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    else:
        raise InputError(f"{name}: its tokenizer has neither padding nor end-of-text token: set one")


def _pad_alike(model: Any, tokenizer: Any) -> None:
    # Decoders classify by the last token that is not their config's padding. Where positions are counted from the
    # padding token on, the weights have decided which one that is.
    if getattr(model.config, "pad_token_id", None) is None or first_position(model) == 0:
        model.config.pad_token_id = tokenizer.pad_token_id


def first_position(model: Any) -> int:
    """The first row of the table of positions that is used: RoBERTa counts from behind its padding id."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.padding_idx) + 1
    return 0


def positions(model: Any) -> int | None:
    """How many tokens a sequence may have by the model's config; None where it does not say."""
    count = getattr(model.config, "max_position_embeddings", None)
    return None if count is None else max(1, count - first_position(model))


@torch.no_grad()
def _check_causal(model: Any, name: str) -> None:
    ids = torch.tensor([[0, 1], [0, 2]])
    with Runner(model, "token ids alone") as runner:
        one, other = runner.whole({"input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits[:, 0].float()
    if float((one - other).abs().max()) > 1e-3 * float(one.abs().max()):
        raise InputError(f"{name} is no causal language model: what it predicts for a token depends on later ones")


def has_head(config: Any, task: str) -> bool:
    """Whether the checkpoint says that it was saved with the task's head."""
    suffixes = _CLASSES[task][1]
    return any(name.endswith(suffixes) for name in config.architectures or [])


def _classes(model: Any, task: str, names: Sequence[str], name: str) -> dict[str, int]:
    if task != "classification":
        return {}
    config = model.config
    if config.problem_type not in (None, "single_label_classification"):
        raise InputError(f"{name} has a head for {config.problem_type}, the data has one class per row")
    known = {str(label): index for label, index in (config.label2id or {}).items()}
    if all(label.startswith("LABEL_") for label in known):
        # Some configs name their classes in one direction only.
        known = {str(label): int(index) for index, label in (config.id2label or {}).items()}
    if set(names) <= set(known):
        return known
    if config.num_labels != len(names):
        raise InputError(
            f"{name} has a head for {config.num_labels} classes, the data has {len(names)} ({', '.join(names)}): "
            "start from the model without this head, or leave out what it does not know"
        )
    if all(label.startswith("LABEL_") for label in known):
        return {label: index for index, label in enumerate(names)}
    raise InputError(
        f"{name} has a head for the classes {', '.join(known)}, the data has {', '.join(names)}: name the labels in "
        "the data as the model does, or set its label2id"
    )


def load_teacher(teacher: Model, task: str, student: Student) -> nn.Module:
    """The model whose logits are learnt from; it needs the task's head, and the student's vocabulary and classes.

    Raises:
        InputError: it cannot be loaded or does not fit.
    """
    if isinstance(teacher, (str, Path)):
        folder = local_folder(teacher)
        if not has_head(read_config(folder), task):
            raise InputError(f"teacher {teacher}: it has no trained {task} head: fine-tune it first")
        loaded = _load(_CLASSES[task][0], folder)
    else:
        loaded = _another(teacher, student)
    _check_vocabulary("teacher", loaded, student)
    _pad_alike(loaded, student.tokenizer)
    if task == "classification":
        classes = _classes(loaded, task, list(student.classes), "the teacher")
        numbered = list(classes) == [str(index) for index in range(len(classes))]
        if not numbered and set(loaded.config.label2id or ()) != set(classes):
            raise InputError(f"the teacher does not say which class is {', '.join(classes)}: set its label2id")
        if classes != student.classes:
            raise InputError("the teacher numbers the classes otherwise than the model: fine-tune it on the same data")
    return loaded  # type: ignore[no-any-return]


def load_masked(teacher: Model, *, headless: bool) -> Any:
    """The model with a head for masked tokens that a student is distilled from; one in memory is copied.

    Args:
        teacher: a folder or hub name, or a model in memory.
        headless: whether the head may be missing.

    Raises:
        InputError: it cannot be loaded, or lacks weights that are needed.
    """
    auto, needed = _CLASSES["mlm"][0], "train it on masked tokens first, or give output_weight=0"
    if not isinstance(teacher, (str, Path)):
        name = type(teacher).__name__
        if not isinstance(teacher, PreTrainedModel):
            raise InputError(f"teacher {name}: not a plain model of transformers: merge adapters and unwrap it first")
        with_head = auto._model_mapping.get(type(teacher.config), ())
        if not headless and not isinstance(teacher, with_head):
            raise InputError(f"teacher {name}: it has no head for masked tokens: {needed}")
        return copy.deepcopy(teacher)
    folder = local_folder(teacher)
    config = read_config(folder)
    if type(config) not in auto._model_mapping:
        raise InputError(
            f"teacher {teacher}: {config.model_type} has no head for masked tokens: take a BERT or its like"
        )
    loaded, fresh = _load_with_fresh(auto, folder)
    inside = [name for name in fresh if name.startswith(f"{loaded.base_model_prefix}.")]
    if inside:
        raise InputError(f"teacher {teacher}: its checkpoint lacks {inside[0]}: start from the whole model")
    if fresh and not headless:
        raise InputError(f"teacher {teacher}: its checkpoint has no head for masked tokens: {needed}")
    return loaded


def load_original(original: Model, student: Student) -> tuple[nn.Module, list[int]]:
    """The unfused model whose hidden states are learnt from, and the layers to learn them in.

    Raises:
        InputError: it cannot be loaded, does not fit, or the student is not fused.
    """
    record = fusion_record(student.model.config)
    if record is None:
        raise InputError("layer-wise distillation is for fused models, and the model to train is none")
    if isinstance(original, (str, Path)):
        loaded = _load(AutoModel, local_folder(original))
    else:
        loaded = _another(original, student).base_model
    _check_vocabulary("original", loaded, student)
    if getattr(student.model.config, "is_encoder_decoder", False):
        raise InputError(
            "the original's hidden states are fitted layer by layer, and a model with an encoder and a decoder has two "
            "stacks of them: leave out the original"
        )
    for key in ("model_type", "hidden_size", "num_hidden_layers"):
        theirs, ours = (getattr(config, key, None) for config in (loaded.config, student.model.config))
        if theirs != ours:
            raise InputError(f"the original has {key} {theirs}, the model {ours}")
    return loaded, _layers_of(student.model, record["fused_layers"])


def _layers_of(model: Any, numbers: Sequence[int]) -> list[int]:
    """The layers whose FFNs have these numbers among the model's: a layer may have several, or none.

    Raises:
        InputError: the FFNs do not lie in one stack of layers.
    """
    architecture = architecture_of(model.config)
    places = [
        re.fullmatch(r"(.*?)(?:^|\.)(\d+)(?:\..*)?", architecture.relative(site.path))
        for site in architecture.sites(model)
        if site.index in numbers
    ]
    if None in places or len({place[1] for place in places if place}) > 1:
        raise InputError(
            "the original's hidden states are fitted layer by layer, and the model's FFNs lie in several stacks of "
            "layers: leave out the original"
        )
    return sorted({int(place[2]) for place in places if place})


def _another(teacher: Any, student: Student) -> Any:
    # A teacher is frozen and put into evaluation mode: the caller's own model must not be.
    if teacher is student.model:
        raise InputError("a model cannot teach itself: pass a copy of it from before the fusion")
    return copy.deepcopy(teacher)


def check_tokens(rows: Rows, largest: int, model: Any) -> None:
    """Raise InputError if the tokenizer makes token ids of `rows` that the model does not know."""
    size = model.config.vocab_size
    if largest >= size:
        raise InputError(f"{rows.source}: the tokenizer makes token {largest}, the model knows {size}: another's?")


def name_of(model: Model | None) -> str | None:
    """A folder, a hub name, or the class of a model in memory."""
    if model is None:
        return None
    return str(model) if isinstance(model, (str, Path)) else type(model).__name__


def _check_vocabulary(role: str, model: Any, student: Student) -> None:
    ours, theirs = student.model.config.vocab_size, model.config.vocab_size
    if ours != theirs:
        raise InputError(f"the {role} has a vocabulary of {theirs}, the model one of {ours}: they must share it")


def fused_parameters(model: Any, numbers: Sequence[int]) -> list[nn.Parameter]:
    """Weights and biases of the FFNs with these numbers among the model's, their scale excepted."""
    architecture = architecture_of(model.config)
    found = []
    for site in architecture.sites(model):
        if site.index in numbers:
            found += [site.module.get_parameter(name) for name in site.kind.parameters]
    return found
