"""Width allocation: spend a budget of parameters on the FFNs where the model loses least for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mlp_fusion.errors import InputError
from mlp_fusion.families import FFNSite
from mlp_fusion.selection import resolve_width
from mlp_fusion.store.widths import narrowed_shapes

#: The least share of its neurons that an FFN can be given.
LEAST = 0.125


@dataclass(frozen=True)
class Choice:
    """One point of an FFN's curve: neurons, the parameters that they take, and the loss that they leave."""

    width: int
    parameters: int
    loss: float


def check_budget(budget: float, sites: Sequence[FFNSite]) -> None:
    """Raise InputError for a budget that the narrowest widths of FFNs (stacks of experts as one) do not keep."""
    curves = [[_without_loss(site, w) for w in sorted({_narrowest(site), site.kind.width})] for site in sites]
    allocate_widths(curves, [[number] for number in range(len(sites))], budget)


def _narrowest(site: FFNSite) -> int:
    try:
        return resolve_width(LEAST, site.kind.width)
    except InputError:  # it has too few neurons to lose any
        return site.kind.width


def _without_loss(site: FFNSite, width: int) -> Choice:
    return Choice(width, sum(math.prod(shape) for _, shape in narrowed_shapes(site, width)), 0.0)


def allocate_widths(curves: Sequence[Sequence[Choice]], stacks: Sequence[Sequence[int]], budget: float) -> list[int]:
    """A width for every FFN, one for the experts of a stack, within a budget.

    Args:
        curves: per stack, its choices in order of width, the last one the whole.
        stacks: numbers of FFNs that get one width; one each, of dense ones.
        budget: the share of the neurons' parameters, in (0, 1), that all keep together at most.

    Raises:
        InputError: the budget is smaller than what the narrowest widths take.
    """
    allowed = int(budget * sum(curve[-1].parameters for curve in curves))
    found = [0] * sum(len(stack) for stack in stacks)
    for stack, choice in zip(stacks, choose(curves, allowed), strict=True):
        for n in stack:
            found[n] = choice.width
    return found


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
