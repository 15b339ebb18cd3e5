"""A report's rows: what became of each FFN, the experts of a stack together."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from mlp_fusion.families import FFNSite
from mlp_fusion.measure import FFNRow, ffn_errors
from mlp_fusion.measure.errors import KERNELS, FFNErrors
from mlp_fusion.neurons import UNNAMED, NeuronBundle
from mlp_fusion.reducing.chosen import ChosenFFNs
from mlp_fusion.reducing.pipeline import ReducedFFN, working_precision
from mlp_fusion.running.taps import Activations

Number = TypeVar("Number", int, float)

#: Rows on which the errors of an expert are measured: there are many experts.
_EXPERT_ROWS = 64


def fused_rows(
    ffns: ChosenFFNs, reduced: Sequence[ReducedFFN], activations: Sequence[Activations], parameterization: str
) -> list[FFNRow]:
    """One row per FFN that was chosen.

    Errors of a stack of experts are the root mean squares of its experts', by the rows that were routed to each on the
    sample. FFNs without a named function, and experts to which nothing was routed, have errors that nobody knows (NaN).
    """
    members: dict[int, list[tuple[FFNSite, FFNRow, int]]] = {}
    for site, original, ffn, rows in zip(ffns.sites, ffns.originals, reduced, activations, strict=True):
        row = fused_row(site, original, ffn, parameterization, rows)
        members.setdefault(site.index, []).append((site, row, len(rows.x)))
    found = []
    for group in members.values():
        each, seen = [row for _, row, _ in group], [count for _, _, count in group]
        found.append(each[0] if group[0][0].expert is None else together(each, seen))
    return found


def fused_row(
    site: FFNSite, original: NeuronBundle, ffn: ReducedFFN, parameterization: str, sampled: Activations
) -> FFNRow:
    fused = ffn.reduction.bundle.parameterized(parameterization)
    x = sampled.x if site.expert is None else sampled.x[:_EXPERT_ROWS]
    if original.activation == UNNAMED or not len(x):
        errors = _unknown()
    else:
        wide = working_precision(original)
        errors = ffn_errors(wide, fused, x.to(wide.w_in.dtype))
    counts = ffn.reduction.counts
    return FFNRow(
        layer=site.index,
        path=site.path,
        neurons_before=original.width,
        neurons_after=fused.width,
        output_error=errors.output,
        ntk_error=errors.ntk,
        largest_cluster=None if counts is None else int(counts.max()),
        singletons=None if counts is None else int((counts == 1).sum()),
        empty_clusters=None if counts is None else int((counts == 0).sum()),
        status=ffn.reduction.status[0],
        seconds=ffn.seconds,
        correction_seconds=ffn.correction_seconds,
        ridge=ffn.ridge,
        held_out_error=ffn.held_out_error,
        trained=ffn.trained,
        largest_scale=None if fused.scale is None else float(fused.scale.max()),
        cluster_sizes=None if counts is None else _histogram(counts),
        ntk_spectrum=errors.spectrum,
        clustered_by=ffn.reduction.clustered_by,
        by_weights=None if ffn.by_weights is None or not site.is_expert else _numbers(site)[-1:] * ffn.by_weights,
    )


def _numbers(site: FFNSite) -> list[int]:
    """The numbers in a site's path, with that of its expert last, which may be a module of its own."""
    found = [int(number) for number in re.findall(r"\d+", site.path)]
    return found if site.expert is None else [*found, site.expert]


def _unknown() -> FFNErrors:
    return FFNErrors(math.nan, {kernel: {"total": math.nan} for kernel in KERNELS}, {})


def together(rows: Sequence[FFNRow], seen: Sequence[int]) -> FFNRow:
    """One row of a stack of experts.

    Args:
        rows: of each expert.
        seen: how many rows its errors were measured on.
    """
    known = [
        (row, count) for row, count in zip(rows, seen, strict=True) if count and not math.isnan(row.output_error)
    ]  # fmt: skip

    def mean(values: Sequence[float], counts: Sequence[int]) -> float:
        total = sum(counts)
        return math.sqrt(sum(v * v * n for v, n in zip(values, counts, strict=True)) / total) if total else math.nan

    counts = [count for _, count in known]
    parts = {kernel: list(known[0][0].ntk_error[kernel]) if known else ["total"] for kernel in KERNELS}
    errors: dict[str, dict[str, float]] = {
        kernel: {part: mean([row.ntk_error[kernel][part] for row, _ in known], counts) for part in names}
        for kernel, names in parts.items()
    }
    sizes: dict[int, int] = {}
    for row in rows:
        for size, number in row.cluster_sizes or ():
            sizes[size] = sizes.get(size, 0) + number
    held = [row.held_out_error for row in rows if row.held_out_error is not None]
    first = rows[0]
    return FFNRow(
        layer=first.layer,
        path=first.path,
        neurons_before=first.neurons_before,
        neurons_after=first.neurons_after,
        output_error=mean([row.output_error for row, _ in known], counts),
        ntk_error=errors,
        largest_cluster=_largest(row.largest_cluster for row in rows),
        singletons=_total(row.singletons for row in rows),
        empty_clusters=_total(row.empty_clusters for row in rows),
        status=next((row.status for row in rows if row.status != "ok"), "ok"),
        seconds=sum(row.seconds for row in rows),
        correction_seconds=sum(row.correction_seconds for row in rows),
        ridge=None,
        held_out_error=mean(held, [1] * len(held)) if held else None,
        trained=None if all(row.trained is None for row in rows) else any(row.trained for row in rows),
        largest_scale=_largest(row.largest_scale for row in rows),
        cluster_sizes=[[size, sizes[size]] for size in sorted(sizes)] or None,
        ntk_spectrum={},
        clustered_by=", ".join(sorted({row.clustered_by for row in rows if row.clustered_by})) or None,
        by_weights=None if first.by_weights is None else [expert for row in rows for expert in row.by_weights or ()],
    )


def _largest(values: Iterable[Number | None]) -> Number | None:
    known = [value for value in values if value is not None]
    return max(known) if known else None


def _total(values: Iterable[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _histogram(counts: Tensor) -> list[list[int]]:
    """Cluster sizes as pairs of a size and the number of clusters that have it, by rising size."""
    pairs: list[list[int]] = torch.stack(counts.unique(return_counts=True), dim=1).tolist()
    return pairs
