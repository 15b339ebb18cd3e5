"""Width allocation: spend a budget of parameters on the FFNs whose error falls most for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from mlp_fusion.calibration.statistics import FFNStatistics
from mlp_fusion.errors import InputError
from mlp_fusion.measure.errors import relative_error
from mlp_fusion.methods.pipeline import Progress, Recipe, ReducedFFN, reduce_ffns
from mlp_fusion.neurons import NeuronBundle
from mlp_fusion.selection import resolve_width

#: Shares of an FFN's width whose error is measured, besides the whole.
SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75)


@dataclass(frozen=True)
class Choice:
    """One point of an FFN's curve: neurons, the parameters that they take, and the squared relative output error."""

    width: int
    parameters: int
    loss: float


def allocate_widths(
    recipe: Recipe,
    bundles: Sequence[NeuronBundle],
    statistics: Sequence[FFNStatistics],
    budget: float,
    progress: Progress | None = None,
) -> list[int]:
    """A width for every FFN, so that together they keep at most the share `budget` of their parameters.

    Every FFN is reduced to a few widths, by the recipe without its matching (which leaves outputs alone); the errors
    are those of its outputs on held-out calibration rows.

    Raises:
        InputError: the budget is smaller than what the narrowest widths take.
    """
    curves: list[list[Choice]] = [[] for _ in bundles]
    plain = dataclasses.replace(recipe, match=None)
    for done, share in enumerate(SHARES):
        widths = [resolve_width(share, bundle.width) for bundle in bundles]
        reduced = reduce_ffns(plain, bundles, widths, statistics)
        for curve, bundle, width, ffn, known in zip(curves, bundles, widths, reduced, statistics, strict=True):
            if not curve or width > curve[-1].width:
                curve.append(Choice(width, _parameters(bundle, width), _held_out_error(ffn, known) ** 2))
        if progress is not None:
            progress(done + 1, len(SHARES))
    for curve, bundle in zip(curves, bundles, strict=True):
        curve.append(Choice(bundle.width, _parameters(bundle, bundle.width), 0.0))
    allowed = int(budget * sum(curve[-1].parameters for curve in curves))
    return [choice.width for choice in choose(curves, allowed)]


def choose(curves: Sequence[Sequence[Choice]], allowed: int) -> list[Choice]:
    """One choice per curve, of small total loss, with at most `allowed` parameters in all.

    Greedy: from the narrowest choices, the step (to any wider choice) that lowers the loss most per parameter, as long
    as it fits; ties to the first curve and the narrower choice. For convex curves that is optimal up to the last step.

    Args:
        curves: choices in order of width, at least one each.

    Raises:
        InputError: the narrowest choices do not fit.
    """
    chosen = [0] * len(curves)
    spent = sum(curve[0].parameters for curve in curves)
    if spent > allowed:
        total = sum(curve[-1].parameters for curve in curves)
        raise InputError(f"budget is too small: the narrowest widths take {spent / total:.3f} of the parameters")
    while True:
        best: tuple[float, int, int] | None = None
        for number, curve in enumerate(curves):
            now = curve[chosen[number]]
            for position in range(chosen[number] + 1, len(curve)):
                cost = curve[position].parameters - now.parameters
                gain = (now.loss - curve[position].loss) / cost
                if gain > 0.0 and spent + cost <= allowed and (best is None or gain > best[0]):
                    best = gain, number, position
        if best is None:
            return [curve[position] for curve, position in zip(curves, chosen, strict=True)]
        _, number, position = best
        spent += curves[number][position].parameters - curves[number][chosen[number]].parameters
        chosen[number] = position


def _parameters(bundle: NeuronBundle, width: int) -> int:
    per_neuron = bundle.vectors().shape[-1]
    return width * per_neuron + (0 if bundle.b_out is None else bundle.b_out.shape[-1])


def _held_out_error(ffn: ReducedFFN, statistics: FFNStatistics) -> float:
    if ffn.held_out_error is not None:
        return ffn.held_out_error
    rows = statistics.held_out if bool(statistics.held_out.any()) else ~statistics.held_out
    reduced = ffn.reduction.bundle
    return relative_error(reduced.forward(statistics.x[rows].to(reduced.w_in.dtype))[0], statistics.y[rows])
