"""Tables of methods and of the verbs' options, made from the records that the code itself reads."""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING
from typing import Any

import click
from results_tables import table

from mlp_fusion.choices import METHODS
from mlp_fusion.cli import cli
from mlp_fusion.distilling import DistillSettings
from mlp_fusion.settings import CompressSettings, Field, FuseSettings, PlanSettings, Settings, fields
from mlp_fusion.squeezing import SqueezeSettings
from mlp_fusion.tuning import FinetuneSettings

#: Verb -> the record of its options, and the command that has them too.
VERBS: dict[str, tuple[type[Settings], str]] = {
    "fuse": (FuseSettings, "compress"),
    "plan": (PlanSettings, "plan"),
    "compress": (CompressSettings, "compress"),
    "finetune": (FinetuneSettings, "finetune"),
    "squeeze": (SqueezeSettings, "squeeze"),
    "distill": (DistillSettings, "distill"),
}


def methods() -> str:
    """Every compression method."""
    text = {"unused": ("no", "no"), "helps": ("no", "yes"), "needed": ("yes", "yes")}
    rows = [(f"`{name}`", entry.does, *text[entry.text]) for name, entry in METHODS.items()]
    return _left(table(("method", "what it does", "needs text", "text helps"), rows))


def options(verb: str) -> str:
    """The options of a verb: name, type, default, bounds, help, and the flag of the command line."""
    record, name = VERBS[verb]
    hints = typing.get_type_hints(record)
    command = cli.commands[name]  # type: ignore[attr-defined]
    flags = {option.name: option for option in command.params if isinstance(option, click.Option)}
    rows = [
        (
            f"`{field.name}`",
            _type(hints[field.name]),
            _default(field),
            _allowed(field),
            field.option.help,
            f"`{'/'.join([*flags[field.name].opts, *flags[field.name].secondary_opts])}`",
        )
        for field in fields(record)
    ]
    return _left(table(("option", "type", "default", "allowed", "what it says", f"`mlp-fusion {name}`"), rows))


def _left(markdown: str) -> str:
    """A table whose columns are words, not figures."""
    return markdown.replace("---:", "---")


def _type(hint: Any) -> str:
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return " or ".join(f"`{_name(kind)}`" for kind in (typing.get_args(hint) if union else (hint,)))


def _name(kind: Any) -> str:
    if kind is type(None):
        return "None"
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind).rpartition("abc.")[2]


def _default(field: Field) -> str:
    if field.default is MISSING:
        return "must be given"
    return field.option.default_help or f"`{field.default!r}`"


def _allowed(field: Field) -> str:
    """The bounds, in the words of the error that their breach raises."""
    known = field.option
    if not known.choices and all(bound is None for bound in (known.least, known.most, known.above, known.below)):
        return ""
    return known.wanted(field.kind).removeprefix("give ").removeprefix("use ").removesuffix(known.hint)


TABLES: dict[str, Callable[[], str]] = {
    "methods": methods,
    **{f"options-{verb}": functools.partial(options, verb) for verb in VERBS},
}
