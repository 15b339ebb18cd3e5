"""A companion, or LoRA, by its name and options as words: what `finetune` puts beside a model."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import typing
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from peft import get_peft_model, mapping
from peft.utils.peft_types import TaskType
from torch import nn

from mlp_fusion.errors import InputError, one_line
from mlp_fusion.minialbert.configuration import MiniAlbertConfig

#: What peft calls the tasks of `finetune`.
_TASKS = {"classification": TaskType.SEQ_CLS, "lm": TaskType.CAUSAL_LM}
#: Fields of a config that are not for users to say: what it is, and what is filled in.
_OWN = {
    "peft_type", "task_type", "inference_mode", "auto_mapping", "peft_version", "revision", "base_model_name_or_path",
    "chains", "counts", "shapes", "base", "merged", "entries", "runtime_config",
}  # fmt: skip


#: What LoRA adapts where peft has no choice of its own: for every encoder that it knows, queries and values.
_LORA_TARGETS = {MiniAlbertConfig.model_type: ("query", "value")}


def make_config(method: str, options: Mapping[str, Any]) -> Any:
    """The config of a method of peft.

    Args:
        method: its name in small letters.
        options: fields of the config; values may be words, as the command line has them.

    Raises:
        InputError: there is no such method, field, or value.
    """
    table = mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    if method.upper() not in table:
        raise InputError(f"peft {method!r}: this installation has no such method")
    cls: Any = table[method.upper()]  # type: ignore[index]
    hints = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls) if field.init and field.name not in _OWN]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            meant = f"did you mean {near[0]}?" if near else f"it knows {', '.join(known)}"
            raise InputError(f"{method} has no option {name!r}: {meant}")
    values = {name: _value(name, value, hints[name]) for name, value in options.items()}
    try:
        return cls(**values)
    except InputError:
        raise
    except (ValueError, TypeError) as error:
        raise InputError(f"{method}: {one_line(error)}") from error


def attach(model: nn.Module, method: str, options: Mapping[str, Any], task: str, heads: Sequence[str]) -> Any:
    """A `PeftModel` around `model`, in place: with the method's parameters, and `heads`, which train whole.

    Raises:
        InputError: as :func:`make_config`, or the method does not suit the model.
    """
    config = make_config(method, options)
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if method == "lora" and config.target_modules is None and kind in _LORA_TARGETS:
        config.target_modules = set(_LORA_TARGETS[kind])
    config.task_type = _TASKS[task]
    config.modules_to_save = [*(config.modules_to_save or []), *heads] or None
    try:
        with warnings.catch_warnings():
            # peft asks by a name that newer releases of transformers deprecate: nothing a user could change.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            return get_peft_model(model, config)  # type: ignore[arg-type]
    except InputError:
        raise
    except (ValueError, TypeError) as error:
        raise InputError(f"{method} cannot be put into {type(model).__name__}: {one_line(error)}") from error


def _value(name: str, value: Any, hint: Any) -> Any:
    """A value of one of the types that a field takes, out of a word; anything else is left for the config to check."""
    if not isinstance(value, str):
        return value
    whole = typing.get_origin(hint) in (list, dict, typing.Literal) or not typing.get_args(hint)
    kinds = {typing.get_origin(kind) or kind for kind in ({hint} if whole else typing.get_args(hint))}
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError:
        parsed = value
    if type(parsed) in kinds - {str}:
        return parsed
    if type(parsed) is int and float in kinds:
        return float(parsed)
    # Anything but names is a pattern, or a word of peft's such as all-linear, where one is allowed.
    if list in kinds and (str not in kinds or re.fullmatch(r"[\w.,]+", value)):
        return value.split(",")
    if kinds & {str, typing.Literal}:
        return value
    words = {bool: "true or false", int: "an integer", float: "a number"}
    wanted = " or ".join(words[kind] for kind in words if kind in kinds)
    raise InputError(f"{name} {value!r}: give {wanted or 'another value'}")
