"""Width allocation: spend a budget of parameters on the FFNs where the model's error falls most for them.

An FFN's loss at a width is its squared output error there, times what one unit of that does to the model's last hidden
states. An error of a tenth is nothing in an FFN whose outputs are small beside the residual stream, or forgotten later.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mlp_fusion.calibration.statistics import FFNStatistics
from mlp_fusion.errors import InputError
from mlp_fusion.families import Architecture, FFNSite
from mlp_fusion.families.exchange import narrowed
from mlp_fusion.measure.errors import relative_error
from mlp_fusion.neurons import NeuronBundle
from mlp_fusion.reducing.pipeline import Progress, Recipe, ReducedFFN, reduce_ffns
from mlp_fusion.running.batches import Batch
from mlp_fusion.running.runner import Runner
from mlp_fusion.selection import resolve_width

#: Shares of an FFN's width whose error is measured, besides the whole.
SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75)
#: The share at which the effect of an FFN's error on the whole model is measured, and on how many batches.
_PROBED, _PROBES = 0.25, 8


@dataclass(frozen=True)
class Choice:
    """One point of an FFN's curve: neurons, the parameters that they take, and the loss that they leave."""

    width: int
    parameters: int
    loss: float


def allocate_widths(
    recipe: Recipe,
    bundles: Sequence[NeuronBundle],
    statistics: Sequence[FFNStatistics],
    budget: float,
    effects: Callable[[Sequence[NeuronBundle]], list[float]],
    stacks: Sequence[Sequence[int]],
    progress: Progress | None = None,
) -> list[int]:
    """A width for every FFN, one for the experts of a stack, within a budget.

    Together their neurons keep at most the share `budget` of their parameters.

    Every FFN is reduced to a few widths, by the recipe without its tuning and its matching (which leaves outputs
    alone); the errors are those of its outputs on held-out calibration rows.

    Args:
        recipe, bundles, statistics: as in :func:`mlp_fusion.reducing.pipeline.reduce_ffns`.
        budget: in (0, 1).
        effects: for reduced FFNs, what each stack does to the model alone; see :func:`hidden_state_changes`.
        stacks: numbers of FFNs that get one width; one each, of dense ones.
        progress: called with the widths tried.

    Raises:
        InputError: the budget is smaller than what the narrowest widths take.
    """
    curves: list[list[Choice]] = [[] for _ in stacks]
    plain = dataclasses.replace(recipe, tune_steps=0, match=None)
    weights = [1.0] * len(stacks)
    for done, share in enumerate(SHARES):
        widths = [resolve_width(share, bundle.width) for bundle in bundles]
        reduced = reduce_ffns(plain, bundles, widths, statistics)
        each = [_held_out_error(ffn, known) ** 2 for ffn, known in zip(reduced, statistics, strict=True)]
        losses = [sum(each[n] for n in stack) / len(stack) for stack in stacks]
        if share == _PROBED:
            changes = effects([ffn.reduction.bundle for ffn in reduced])
            weights = [c / loss if loss > 0.0 else 0.0 for c, loss in zip(changes, losses, strict=True)]
        for curve, stack, loss in zip(curves, stacks, losses, strict=True):
            width, bundle = widths[stack[0]], bundles[stack[0]]
            if not curve or width > curve[-1].width:
                curve.append(Choice(width, len(stack) * _parameters(bundle, width), loss))
        if progress is not None:
            progress(done + 1, len(SHARES))
    for number, (curve, stack) in enumerate(zip(curves, stacks, strict=True)):
        bundle = bundles[stack[0]]
        curve.append(Choice(bundle.width, len(stack) * _parameters(bundle, bundle.width), 0.0))
        curves[number] = [dataclasses.replace(choice, loss=choice.loss * weights[number]) for choice in curve]
    allowed = int(budget * sum(curve[-1].parameters for curve in curves))
    found = [0] * len(bundles)
    for stack, choice in zip(stacks, choose(curves, allowed), strict=True):
        for n in stack:
            found[n] = choice.width
    return found


@torch.no_grad()
def hidden_state_changes(
    model: nn.Module,
    architecture: Architecture,
    sites: Sequence[FFNSite],
    batches: Sequence[Batch],
    bundles: Sequence[NeuronBundle],
) -> list[float]:
    """Squared relative change of the model's last hidden states when one FFN alone is replaced, for each in `sites`.

    The experts of a stack are replaced together. Measured on up to eight of the batches, spread evenly over them; the
    model runs once per FFN on those.
    """
    probes = batches[:: max(1, len(batches) // _PROBES)][:_PROBES]

    def states(runner: Runner) -> Tensor:
        runs = [pair for batch in probes for pair in runner.counted_states(batch)]
        return torch.cat([run[mask.to(run.device)].flatten() for run, mask in runs])

    changes = []
    with Runner(model, "the calibration text") as runner:
        exact = states(runner)
        for numbers in stacks_of(sites):
            whole = dataclasses.replace(sites[numbers[0]], expert=None)
            with narrowed(whole, NeuronBundle.stack([bundles[n] for n in numbers])):
                changes.append(relative_error(states(runner), exact) ** 2)
    return changes


def stacks_of(sites: Sequence[FFNSite]) -> list[list[int]]:
    """Numbers of the FFNs in `sites`, the experts of one stack together."""
    found: dict[int, list[int]] = {}
    for number, site in enumerate(sites):
        found.setdefault(site.index, []).append(number)
    return list(found.values())


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
    """Of the neurons alone: the output bias is there at every width."""
    return width * bundle.vectors().shape[-1]


def _held_out_error(ffn: ReducedFFN, statistics: FFNStatistics) -> float:
    if ffn.held_out_error is not None:
        return ffn.held_out_error
    rows = statistics.held_out if bool(statistics.held_out.any()) else ~statistics.held_out
    reduced = ffn.reduction.bundle
    return relative_error(reduced.forward(statistics.x[rows].to(reduced.w_in.dtype))[0], statistics.y[rows])
