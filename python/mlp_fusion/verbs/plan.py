"""`plan`: what compressing a model would do, from its config and tensor headers alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from torch import nn

from mlp_fusion.families import FFNSite
from mlp_fusion.families.groups import resolve_widths
from mlp_fusion.measure.report import format_bytes, render
from mlp_fusion.reducing.chosen import choose_sites, find_ffns
from mlp_fusion.reducing.widths import check_budget
from mlp_fusion.selection import Layers, Width
from mlp_fusion.settings import PlanSettings, make, takes
from mlp_fusion.store.coverage import claimed_tensors, dropped_layers, meta_model, parameters, plain_shapes
from mlp_fusion.store.disk import DiskFFN
from mlp_fusion.store.quantised import quantisation
from mlp_fusion.store.record import FUSION_KEY, check_config, fused_config
from mlp_fusion.store.source import Headers, model_headers, read_headers
from mlp_fusion.store.weights import TensorInfo
from mlp_fusion.store.widths import narrowed_shapes
from mlp_fusion.streaming import estimate


@dataclass(frozen=True)
class PlannedFFN:
    """One FFN of the plan; parameters and bytes are those of the FFN alone.

    Experts are `routed`. Layers for multi-token prediction are not `loaded` by transformers: engines build them by the
    config of the others.
    """

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
    loaded: bool = True
    routed: bool = False


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
        operations: floating-point operations of clustering.
        seconds, peak_bytes: of a streamed run without text on this machine, estimated.

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
    operations: int = 0
    seconds: float = field(default=0.0, compare=False)
    peak_bytes: int = field(default=0, compare=False)

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
            f"streamed: about {_duration(self.seconds)} and {format_bytes(self.peak_bytes)} of memory here (estimated)",
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
    dropped: list[DiskFFN] = []
    if isinstance(model_or_path, nn.Module):
        architecture, sites = find_ffns(model_or_path)
        model: Any = model_or_path
        held = {name: [info] for name, info in headers.tensors.items()}
        count = sum(t.numel for t in headers.tensors.values() if t.parameter)
    else:
        architecture = check_config(headers.config, stored=True)
        model = meta_model(headers.config)
        sites = architecture.sites(model)
        dropped = dropped_layers(headers, model, architecture, sites)
        held, count = claimed_tensors(headers, model, architecture, sites), parameters(headers, model)
    chosen = choose_sites(architecture, sites, layers, settings.only)
    after = dict(
        zip((site.index for site in chosen), _widths_after(width, budget, chosen, settings.multiple), strict=True)
    )
    widths = [after.get(site.index, site.kind.width) for site in sites]
    ffns = [_planned(site, site.index in after, width, held) for site, width in zip(sites, widths, strict=True)]
    lie: list[FFNSite | DiskFFN] = [*sites, *dropped]
    experts = {ffn.path: max(ffn.kind.experts, 1) for ffn in lie}
    ffns += [_dropped(ffn, ffn.index in after, widths, sites, headers) for ffn in dropped]
    changed = fused_config(model, architecture, sites, widths, method="", parameterization="folded")
    plain = budget is None and "widths" not in getattr(changed, FUSION_KEY)
    saved_parameters = sum(f.parameters_before - f.parameters_after for f in ffns)
    saved_bytes = sum(f.bytes_before - f.bytes_after for f in ffns)
    size = sum(t.nbytes for t in headers.tensors.values())
    return FusionPlan(
        name=headers.name,
        model_type=headers.config.model_type,
        ffns=ffns,
        parameters_before=count,
        parameters_after=count - saved_parameters,
        bytes_before=size,
        bytes_after=size - saved_bytes,
        uniform=plain,
        loads_in=_loads_in(plain, headers.config.model_type),
        warnings=[
            *_warnings(ffns, automatic=budget is not None),
            *_quantised(headers.config),
            *(f"left as it is: {reason}" for reason in architecture.unproved),
        ],
        **_cost(ffns, experts, 2 * size - saved_bytes),
    )


def _cost(ffns: Sequence[PlannedFFN], experts: Mapping[str, int], moved: int) -> dict[str, Any]:
    """Operations, seconds and memory of a streamed run that moves so many bytes."""
    reduced = [(f, experts[f.path]) for f in ffns if f.neurons_after < f.neurons_before]
    work = estimate.operations((f.neurons_before, f.parameters_before) for f, _ in reduced)
    largest = max((4 * f.parameters_before // n for f, n in reduced), default=0)
    return {
        "operations": work, "seconds": estimate.seconds(work, moved), "peak_bytes": estimate.peak_bytes(largest)
    }  # fmt: skip


def _duration(seconds: float) -> str:
    """Seconds, minutes or hours, in two digits."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{max(1, round(seconds))} s"


def _widths_after(
    width: Width | str | Mapping[int, int], budget: float | None, chosen: Sequence[FFNSite], multiple: int | None
) -> list[int]:
    if isinstance(width, Mapping):
        return [width[site.index] for site in chosen]
    if isinstance(width, str):
        assert budget is not None
        check_budget(budget, chosen)
        return resolve_widths(float(budget), chosen)
    return resolve_widths(width, chosen, multiple)


def _planned(site: FFNSite, chosen: bool, after: int, held: Mapping[str, Sequence[TensorInfo]]) -> PlannedFFN:
    """One row; `held` says which tensors a parameter consists of."""
    narrow = {name: math.prod(shape) for name, shape in narrowed_shapes(site, after)}
    parameters, size = [0, 0], [0, 0]
    for name in site.kind.parameters:
        whole = site.module.get_parameter(name).numel()
        left = narrow.get(f"{site.path}.{name}", whole)
        stored = sum(info.nbytes for info in held[f"{site.path}.{name}"])
        for counts, before, now in ((parameters, whole, left), (size, stored, stored * left // whole)):
            counts[0] += before
            counts[1] += now
    return PlannedFFN(
        layer=site.index,
        path=site.path,
        chosen=chosen,
        neurons_before=site.kind.width,
        neurons_after=after,
        parameters_before=parameters[0],
        parameters_after=parameters[1],
        bytes_before=size[0],
        bytes_after=size[1],
        divisible_by_128=after % 128 == 0,
        divisible_by_256=after % 256 == 0,
        routed=site.is_routed,
    )


def _dropped(
    ffn: DiskFFN, chosen: bool, widths: Sequence[int], sites: Sequence[FFNSite], headers: Headers
) -> PlannedFFN:
    """The row of an FFN that transformers does not load: it has the width of its like."""
    after = next(width for site, width in zip(sites, widths, strict=True) if site.index == ffn.index)
    before = ffn.kind.width
    shapes = plain_shapes(headers)
    counts = [sum(map(math.prod, ffn.narrowed(shapes, width).values())) for width in (before, after)]
    size = sum(headers.tensors[name].nbytes for name in ffn.names)
    return PlannedFFN(
        ffn.index, ffn.path, chosen, before, after, counts[0], counts[1], size, size * counts[1] // counts[0],
        after % 128 == 0, after % 256 == 0, loaded=False, routed=bool(ffn.kind.experts),
    )  # fmt: skip


def _loads_in(uniform: bool, model_type: str) -> str:
    if uniform:
        return f"every program that loads {model_type} checkpoints: one width in all layers is an ordinary checkpoint"
    return (
        "transformers' AutoModel*.from_pretrained after `import mlp_fusion`: widths differ by layer or no key of the "
        "config states them, so that other engines do not read them"
    )


def _quantised(config: Any) -> list[str]:
    method = quantisation(config)
    if method is None:
        return []
    return [f"the weights are quantised ({method}): they are read and written in 16 bits, larger than the bytes above"]


def _warnings(ffns: list[PlannedFFN], *, automatic: bool) -> list[str]:
    if automatic:
        return [
            "width auto: shown is the budget spread evenly, and rounded, be it up; the calibration text decides what "
            "each FFN gets, and all together stay within the budget"
        ]
    odd = sorted({f.neurons_after for f in ffns if f.chosen and not f.divisible_by_128})
    if not odd:
        return []
    listed = ", ".join(map(str, odd))
    return [f"width {listed} is not a multiple of 128: serving engines may refuse tensor parallelism or FP8 blocks"]
