"""Companions in peft's registry, so that `get_peft_model`, `PeftModel` and `AutoPeftModel` know them as their own.

peft's `register_peft_method` takes only names of its enum `PeftType`, which nobody else can extend. What peft,
transformers and accelerate do with a method's type is look it up in three tables, compare it with `PeftType`'s members,
and read its `value`. A string enum of our own can do all of that, and needs nothing of peft that is private.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

from peft import mapping


class CompanionType(str, Enum):
    """Types of peft methods that this project adds; equal to their names, as members of `PeftType` are to theirs."""

    PAFI = "PAFI"
    HIWI = "HIWI"
    SAID = "SAID"


def register(config: Any, model: Any) -> None:
    """Enter a method into peft's tables; doing it again changes nothing.

    Args:
        config: a `CompanionConfig`, whose `kind` is the method's type.
        model: a `CompanionModel`; names of what it stores begin with its `prefix`.
    """
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[config.kind] = config
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[config.kind] = model
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[config.kind] = model.prefix
