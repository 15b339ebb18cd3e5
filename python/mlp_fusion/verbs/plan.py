"""`plan`: what compressing a model would do, from its config and tensor headers alone."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from torch import nn

from mlp_fusion.errors import InputError
from mlp_fusion.families import Architecture
from mlp_fusion.measure.report import format_bytes, render
from mlp_fusion.selection import Layers, Width, resolve_layers, resolve_width
from mlp_fusion.settings import PlanSettings, make, takes
from mlp_fusion.store.record import check_config, check_widths
from mlp_fusion.store.reference import base_prefix
from mlp_fusion.store.source import Headers, model_headers, read_headers
from mlp_fusion.store.weights import TensorInfo

#: Parts of a tensor's name that speak of a feed-forward layer, in the families that transformers knows.
_FFN_WORDS = re.compile(
    r"mlp|ffn|ffw|ff|feed_?forward|intermediate|experts?|shared_expert|fc_?\d?|c_fc|lin\d|w[123]|w[io](_\d)?"
    r"|(gate|up|down|gate_up)_proj|dense_h_to_4h|dense_4h_to_h|wide|ff_?out"
)
_ATTENTION_WORDS = re.compile(r"attn|attention|self_attn|self_attention|crossattention")


@dataclass(frozen=True)
class PlannedFFN:
    """One FFN of the plan; parameters and bytes are those of the FFN alone."""

    layer: int
    path: str
    chosen: bool
    neurons_before: int
    neurons_after: int
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    divisible_by_128: bool
    divisible_by_256: bool


@dataclass(frozen=True)
class FusionPlan:
    """What `compress` would do.

    Attributes:
        name, model_type: of the model.
        ffns: every FFN, chosen or not.
        parameters_before, parameters_after, bytes_before, bytes_after: of the whole checkpoint.
        uniform: all FFNs end up with one width.
        loads_in: who can load the result.
        warnings: what to know beforehand.

    Examples:
        >>> plan = mlp_fusion.plan("roberta-base", width=0.25)
        >>> plan.model_type, len(plan.ffns), plan.uniform
        ('roberta', 12, True)
        >>> plan.parameters_after < plan.parameters_before
        True
    """

    name: str
    model_type: str
    ffns: list[PlannedFFN]
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    uniform: bool
    loads_in: str
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dataclasses.asdict(self)

    def table(self) -> str:
        """The plan as text."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("FFN")
        for title in ("neurons", "parameters", "bytes", "÷128", "÷256"):
            table.add_column(title, justify="right")
        for ffn in self.ffns:
            kept = "" if ffn.chosen else " (kept)"
            table.add_row(
                ffn.path + kept,
                f"{ffn.neurons_before} → {ffn.neurons_after}",
                f"{ffn.parameters_before:,} → {ffn.parameters_after:,}",
                f"{format_bytes(ffn.bytes_before)} → {format_bytes(ffn.bytes_after)}",
                "yes" if ffn.divisible_by_128 else "no",
                "yes" if ffn.divisible_by_256 else "no",
            )
        share = self.parameters_after / self.parameters_before
        lines = [
            f"{self.name} ({self.model_type})",
            render(table),
            f"parameters: {self.parameters_before:,} → {self.parameters_after:,} ({share:.1%})",
            f"bytes: {format_bytes(self.bytes_before)} → {format_bytes(self.bytes_after)}",
            f"loads in: {self.loads_in}",
            *(f"warning: {warning}" for warning in self.warnings),
        ]
        return "\n".join(lines)


@takes(PlanSettings)
def plan(
    model_or_path: nn.Module | str | Path,
    width: Width | str | Mapping[int, int],
    layers: Layers = None,
    **options: Any,
) -> FusionPlan:
    """Say what compressing would do, without loading a weight.

    The widths that a budget leads to depend on calibration text. The plan then shows the budget's share of every FFN,
    which is what the widths come to in all, and says so.

    Args:
        model_or_path: a loaded model, a checkpoint's folder, or a hub name.
        width, layers: as in :func:`mlp_fusion.fuse`; the widths that `"auto"` has led to, by layer, can be given as
            well.
        options: the other fields of :class:`mlp_fusion.settings.PlanSettings`.

    Returns:
        A `FusionPlan` with a row per FFN.

    Raises:
        InputError: whatever would keep `fuse` or `compress` from doing it, and a tensor that looks like part of an FFN
            but belongs to none that the architecture knows: it would be left behind silently.

    Examples:
        >>> plan = mlp_fusion.plan("roberta-base", width=0.25, layers="last:8")
        >>> [ffn.neurons_after < ffn.neurons_before for ffn in plan.ffns].count(True)
        8
        >>> print(plan.table())
        roberta-base...
    """
    settings = make(PlanSettings, {"width": width, "layers": layers, **options}, "plan")
    settings.check()
    budget = settings.budget
    headers = model_headers(model_or_path) if isinstance(model_or_path, nn.Module) else read_headers(model_or_path)
    architecture = check_config(headers.config)
    found, claimed = _find_ffns(headers, architecture)
    _refuse_strays(headers, architecture, claimed)
    architecture.activation(headers.config)
    if not isinstance(model_or_path, nn.Module):
        _check_prefixes(headers, [path for _, path in found], architecture)
    chosen = set(resolve_layers(layers, [index for index, _ in found]))
    check_widths(architecture, uneven=budget is not None or len(chosen) < len(found))
    ffns = []
    for (index, path), parts in found.items():
        before = _width(architecture, parts)
        after = _width_after(width, budget, index, before) if index in chosen else before
        ffns.append(_planned(index, path, index in chosen, before, after, parts))
    saved_parameters = sum(f.parameters_before - f.parameters_after for f in ffns)
    saved_bytes = sum(f.bytes_before - f.bytes_after for f in ffns)
    # Integer tensors are buffers (position ids): they take bytes, but are no parameters.
    parameters = sum(t.numel for t in headers.tensors.values() if t.parameter)
    size = sum(t.nbytes for t in headers.tensors.values())
    uniform = len({f.neurons_after for f in ffns}) == 1 and budget is None
    return FusionPlan(
        name=headers.name,
        model_type=headers.config.model_type,
        ffns=ffns,
        parameters_before=parameters,
        parameters_after=parameters - saved_parameters,
        bytes_before=size,
        bytes_after=size - saved_bytes,
        uniform=uniform,
        loads_in=_loads_in(uniform, headers.config.model_type),
        warnings=_warnings(ffns, automatic=budget is not None),
    )


def _width_after(width: Width | str | Mapping[int, int], budget: float | None, index: int, before: int) -> int:
    if isinstance(width, Mapping):
        return width[index]
    if isinstance(width, str):
        assert budget is not None
        return resolve_width(float(budget), before)
    return resolve_width(width, before)


def _find_ffns(
    headers: Headers, architecture: Architecture
) -> tuple[dict[tuple[int, str], dict[str, TensorInfo]], set[str]]:
    """Layer (index, path) -> role.kind -> header, for complete FFNs; and the tensor names that they take up."""
    roles = {f"{path}.{kind}": f"{role}.{kind}" for role, path in architecture.owners.items()
             for kind in ("weight", "bias")}  # fmt: skip
    found: dict[tuple[int, str], dict[str, TensorInfo]] = {}
    claimed: set[str] = set()
    for name, info in headers.tensors.items():
        matched = architecture.locate(name)
        if matched is None or matched[2] not in roles:
            continue
        path, index, rest = matched
        if rest.endswith("weight") and not info.floating:
            raise InputError(f"{headers.name}: {name} is stored as {info.dtype}: start from the unquantised checkpoint")
        found.setdefault((index, path), {})[roles[rest]] = info
        claimed.add(name)
    for (_, path), parts in found.items():
        for role, below in architecture.owners.items():
            if f"{role}.weight" not in parts:
                raise InputError(f"{headers.name}: {path}.{below}.weight is missing: the checkpoint is incomplete")
    if not found:
        raise InputError(f"{headers.name}: no FFN found where the {headers.config.model_type!r} architecture has them")
    _compare_with_config(headers, architecture, found)
    return dict(sorted(found.items())), claimed


def _compare_with_config(
    headers: Headers, architecture: Architecture, found: Mapping[tuple[int, str], Mapping[str, TensorInfo]]
) -> None:
    layers, width = headers.config.num_hidden_layers, architecture.width(headers.config)
    if len(found) != layers:
        raise InputError(f"{headers.name}: FFNs of {len(found)} layers, but config.json says {layers}: incomplete")
    for (_, path), parts in found.items():
        inputs = headers.config.hidden_size
        for key, info in parts.items():
            role, kind = key.split(".")
            rows = width * architecture.lengths(role)
            shape: tuple[int, ...] = (inputs, rows) if role == "w_out" else (rows, inputs)
            if kind == "bias":
                shape = shape[:1]
            elif architecture.transposed:
                shape = shape[::-1]
            if info.shape != shape:
                name = f"{path}.{architecture.projections[role]}.{kind}"
                raise InputError(f"{headers.name}: {name} is {info.shape}, but config.json makes it {shape}")


def _refuse_strays(headers: Headers, architecture: Architecture, claimed: set[str]) -> None:
    strays = [n for n, t in headers.tensors.items() if n not in claimed and len(t.shape) >= 2 and looks_like_ffn(n)]
    if strays:
        raise InputError(
            f"{headers.name}: {strays[0]} looks like part of an FFN, but the {architecture.model_types[0]!r} "
            f"architecture has no place for it ({len(strays)} such tensors): this model is not supported"
        )


def _check_prefixes(headers: Headers, paths: Iterable[str], architecture: Architecture) -> None:
    """Raise InputError where transformers would not find a layer for what stands in front of its name."""
    known = {"", architecture.base}
    for path in paths:
        prefix = path[: path.rindex(f"{architecture.layers}.")].rstrip(".")
        if prefix not in known and prefix != base_prefix(headers.config):
            raise InputError(
                f"{headers.name}: tensors are named {prefix}.{architecture.layers}..., as a wrapped model "
                "(DataParallel, torch.compile) saves them, and transformers would not find them: save the one inside"
            )


def looks_like_ffn(tensor_name: str) -> bool:
    """Whether a tensor's name speaks of a feed-forward layer (and not of attention)."""
    parts = tensor_name.split(".")
    if any(_ATTENTION_WORDS.fullmatch(part) for part in parts):
        return False
    return any(_FFN_WORDS.fullmatch(part) for part in parts)


def _width(architecture: Architecture, parts: Mapping[str, TensorInfo]) -> int:
    shape = parts["w_in.weight"].shape
    return (shape[1] if architecture.transposed else shape[0]) // architecture.lengths("w_in")


def _planned(
    index: int, path: str, chosen: bool, before: int, after: int, parts: Mapping[str, TensorInfo]
) -> PlannedFFN:
    def shrunk(key: str, count: int) -> int:
        # Everything has a neuron axis but the output bias.
        return count if key == "w_out.bias" else count // before * after

    return PlannedFFN(
        layer=index,
        path=path,
        chosen=chosen,
        neurons_before=before,
        neurons_after=after,
        parameters_before=sum(t.numel for t in parts.values()),
        parameters_after=sum(shrunk(k, t.numel) for k, t in parts.items()),
        bytes_before=sum(t.nbytes for t in parts.values()),
        bytes_after=sum(shrunk(k, t.nbytes) for k, t in parts.items()),
        divisible_by_128=after % 128 == 0,
        divisible_by_256=after % 256 == 0,
    )


def _loads_in(uniform: bool, model_type: str) -> str:
    if uniform:
        return f"every program that loads {model_type} checkpoints: one width in all layers is an ordinary checkpoint"
    return (
        "transformers' AutoModel*.from_pretrained after `import mlp_fusion`: widths differ by layer, "
        "which other engines do not read"
    )


def _warnings(ffns: list[PlannedFFN], *, automatic: bool) -> list[str]:
    if automatic:
        return ["width auto: shown is the budget spread evenly; the calibration text decides what each FFN gets"]
    odd = sorted({f.neurons_after for f in ffns if f.chosen and not f.divisible_by_128})
    if not odd:
        return []
    listed = ", ".join(map(str, odd))
    return [f"width {listed} is not a multiple of 128: serving engines may refuse tensor parallelism or FP8 blocks"]
