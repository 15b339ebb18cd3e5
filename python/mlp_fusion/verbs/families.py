"""`find_ffns`: what is found in a model type or a checkpoint, and what is refused and why."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from mlp_fusion.errors import InputError
from mlp_fusion.families.catalogue import default_config, model_types
from mlp_fusion.families.describe import describe
from mlp_fusion.families.sites import Description, Function, Site
from mlp_fusion.measure.report import render
from mlp_fusion.store.source import is_hub_name, read_config

__all__ = ["FoundFFNs", "ModelTypes", "find_ffns", "list_model_types"]


@dataclass(frozen=True)
class ModelTypes:
    """The model types of transformers."""

    names: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"model_types": list(self.names)}

    def table(self) -> str:
        """The names in columns, and what to do with one."""
        width = max(map(len, self.names)) + 2
        columns = max(1, 120 // width)
        rows = [self.names[i : i + columns] for i in range(0, len(self.names), columns)]
        lines = ["".join(name.ljust(width) for name in row).rstrip() for row in rows]
        hint = "mlp-fusion families NAME says what is found in one of them, or in a checkpoint."
        return "\n".join([*lines, f"{len(self.names)} model types of transformers; {hint}"])


@dataclass(frozen=True)
class FoundFFNs:
    """What was found in one model.

    Attributes:
        name: as it was given.
        description: see :class:`mlp_fusion.families.sites.Description`.
    """

    name: str
    description: Description

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        found = self.description
        return {"name": self.name, **found.to_dict(), "complete": found.complete, "keyed": found.keyed}

    def table(self) -> str:
        """A row per kind of FFN; then what no key states, what is refused, and what is set apart."""
        found = self.description
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for title in ("FFNs", "kind", "layers", "width", "projections", "function", "key", "group", "proof"):
            table.add_column(title, justify="right" if title in ("layers", "width", "group") else "left")
        for site in found.sites:
            key = site.width_keys[0].path if site.width_keys else "-"
            table.add_row(
                site.path, site.kind, str(len(site.instances)), str(site.width), layout(site),
                function_words(site.function), key if site.unsaved is None else f"({key})", str(site.group),
                f"{max([site.proof.error, *site.proof.experts.values()]):.0e}, {site.proof.call}",
            )  # fmt: skip
        lines = [f"{self.name} ({found.model_type}, {found.model_class})"]
        lines += [render(table)] if found.sites else ["no FFN was found"]
        lines += [
            f"loads only after `import mlp_fusion`: {site.path}: {site.unsaved}" for site in found.sites if site.unsaved
        ]
        lines += [
            f"refused: {refusal.parameter} ({refusal.count}, {_mover(refusal.key)}): {refusal.reason}"
            for refusal in found.refused
        ]
        lines += [f"set apart: {pair.path}.{', '.join(pair.parameters)}: {pair.reason}" for pair in found.set_apart]
        return "\n".join(lines)


def _mover(key: str | None) -> str:
    return "no key moves it" if key is None else f"moved by {key}"


def layout(site: Site) -> str:
    """How the projections lie, in a few words."""
    parts = [projection.part for projection in site.projections[:-1]]
    named = {"first": "gate first", "second": "up first", "even": "interleaved", "odd": "interleaved, up first"}
    words = ["one matrix" if len(parts) == 1 else "gate and up" if parts[0] == "whole" else named[parts[0]]]
    if site.projections[-1].expert_axis is not None:
        words.append("stacked")
    if any(projection.bias for projection in site.projections):
        words.append("biased")
    return ", ".join(words)


def function_words(function: Function) -> str:
    """The function between the projections, in a few words."""
    words = [function.activation or function.own or "unnamed"]
    words += ["gated"] if function.form == "gated" else []
    words += [f"clamp {function.clamp.limit:g}"] if function.clamp is not None else []
    words += [f"up + {function.up_offset:g}"] if function.up_offset else []
    words += [f"times {function.factor:g}"] if function.factor != 1 else []
    return ", ".join(words)


def list_model_types() -> ModelTypes:
    """The model types that :func:`find_ffns` takes; what is in them is found when one is asked for."""
    return ModelTypes(tuple(model_types()))


def find_ffns(name: str | Path) -> FoundFFNs:
    """Find and prove the FFNs of a model type, by its default config, or of a checkpoint, by its own.

    A folder counts before a model type, and a model type before a name on the hub. No weight is read.

    Args:
        name: a checkpoint's folder, a model type of transformers, or a name on the hub.

    Raises:
        InputError: there is no such thing, or transformers builds no model from its config.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        config = read_config(folder)
    elif str(name) in model_types():
        config = default_config(str(name))
    elif is_hub_name(name):
        try:
            config = read_config(str(name))
        except InputError as error:
            raise InputError(f"no model type of transformers, which `mlp-fusion families` lists; {error}") from error
    else:
        raise InputError(f"{name}: no such folder, and no model type of transformers")
    return FoundFFNs(str(name), describe(config))
