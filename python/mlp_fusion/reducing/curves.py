"""What the model loses by an FFN, by its width: the curves that widths are chosen on.

Of dense FFNs, what the model's predictions lose by what an elimination like that of :mod:`mlp_fusion.methods.merge`
leaves, to second order and each FFN for itself: with e the error of the outputs at a token, M the sensitivity of the
model to it, and s the size of the gradient at that token,

    loss = mean over tokens of  s^2 e^T M e

Gradients tell M and s, once for all FFNs and in one unit; one elimination tells the errors at every width. On
SmolLM2-135M, halved, such losses of two layers differ by a factor of up to 12. Tokens differ, too, and in early layers
outputs err most where the model heeds them most: with s the same for all, layer 1 seems to lose half of what it does.

Experts have a router between their outputs and the model, and no such gradients. An error of theirs is tried: the loss
at a width is the squared relative error there, times what one unit of that does to the model's last hidden states.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mlp_fusion.calibration import FFNStatistics, OutputSensitivity
from mlp_fusion.families import Architecture, FFNSite
from mlp_fusion.families.exchange import narrowed
from mlp_fusion.measure.errors import relative_error
from mlp_fusion.methods.merge import BLOCK, merging_problem
from mlp_fusion.methods.obs import DAMPING, eliminations, least_squares
from mlp_fusion.neurons import NeuronBundle
from mlp_fusion.reducing.pipeline import Progress, Recipe, ReducedFFN, reduce_ffns, working_precision
from mlp_fusion.reducing.widths import LEAST, Choice
from mlp_fusion.running.batches import Batch
from mlp_fusion.running.runner import Runner
from mlp_fusion.selection import resolve_width, width_multiple

#: Sixteenths of an FFN's width whose loss is measured by elimination.
_SIXTEENTHS = range(int(16 * LEAST), 16)
#: Shares that are tried.
_TRIED = (LEAST, 0.25, 0.375, 0.5, 0.625, 0.75)
#: The share at which the effect of an FFN's error on the whole model is measured, and on how many batches.
_PROBED, _PROBES = 0.25, 8


@torch.no_grad()
def elimination_curve(
    original: NeuronBundle, statistics: FFNStatistics, judged: FFNStatistics, sensitivity: OutputSensitivity, seed: int
) -> list[Choice]:
    """The losses of a dense FFN.

    Args:
        original: it, B = 1.
        statistics: of it, that output weights are fitted to.
        judged: of it, the tokens that `sensitivity` has sizes of.
        sensitivity: of the model to its outputs.
        seed: of the rows that are fitted to.

    Memory and time: those of `merge` to an eighth of the width, and `2 N^2 d_out` operations in float64 per width.
    """
    original, widths = working_precision(original), _widths(original.width)
    sizes = sensitivity.sizes.to(judged.x.device)
    whole = Choice(original.width, _parameters(original, original.width), 0.0)
    if not widths or not bool(sizes.any()):  # there is nothing to choose, or nothing reads the outputs
        return [*(Choice(width, _parameters(original, width), 0.0) for width in widths), whole]
    fitted = dataclasses.replace(statistics, sensitivity=sensitivity.factor)
    # Less damping than `merge` has: weights of a neuron that stands for several are to be free to add up.
    problem = merging_problem(original, fitted, seed=seed, damping=DAMPING)
    weighed = least_squares(original, judged, damping=0.0, weights=sizes)
    # Of weights in units of the one problem, in those of the other; what never fires there costs nothing here.
    fires = problem.size > 0
    units = torch.where(fires, weighed.size / problem.size.where(fires, torch.ones_like(weighed.size)), 0.0)
    present = original.w_out[0].double() * problem.size.unsqueeze(1) @ sensitivity.factor.to(problem.target)
    choices = [whole]
    for width, (_, weights) in zip(widths[::-1], eliminations(problem, widths[::-1], most=BLOCK), strict=True):
        change = (weights - present) * units.unsqueeze(1)
        loss = float((change * (weighed.normal @ change)).sum() * sizes.double().square().mean())
        choices.append(Choice(width, _parameters(original, width), loss))
    return choices[::-1]


def _widths(full: int) -> list[int]:
    """Those whose loss is measured, of an FFN of `full` neurons, in order; less than that."""
    step = width_multiple(full)
    return sorted({max(step, round(full * n / 16 / step) * step) for n in _SIXTEENTHS} - {full})


def tried_curves(
    recipe: Recipe,
    bundles: Sequence[NeuronBundle],
    statistics: Sequence[FFNStatistics],
    effects: Callable[[Sequence[NeuronBundle]], list[float]],
    stacks: Sequence[Sequence[int]],
    progress: Progress | None = None,
) -> list[list[Choice]]:
    """The losses of stacks of experts, and of dense FFNs beside them.

    Every FFN is reduced to a few widths, by the recipe without its tuning and its matching (which leaves outputs
    alone); the errors are those of its outputs on held-out calibration rows.

    Args:
        recipe, bundles, statistics: as in :func:`mlp_fusion.reducing.pipeline.reduce_ffns`.
        effects: for reduced FFNs, what each stack does to the model alone; see :func:`hidden_state_changes`.
        stacks: numbers of FFNs that get one width; one each, of dense ones.
        progress: called with the widths tried.
    """
    curves: list[list[Choice]] = [[] for _ in stacks]
    plain = dataclasses.replace(recipe, tune_steps=0, match=None)
    weights = [1.0] * len(stacks)
    for done, share in enumerate(_TRIED):
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
            progress(done + 1, len(_TRIED))
    for number, (curve, stack) in enumerate(zip(curves, stacks, strict=True)):
        bundle = bundles[stack[0]]
        curve.append(Choice(bundle.width, len(stack) * _parameters(bundle, bundle.width), 0.0))
        curves[number] = [dataclasses.replace(choice, loss=choice.loss * weights[number]) for choice in curve]
    return curves


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


def _parameters(bundle: NeuronBundle, width: int) -> int:
    """Of the neurons alone: the output bias is there at every width."""
    return width * bundle.vectors().shape[-1]


def _held_out_error(ffn: ReducedFFN, statistics: FFNStatistics) -> float:
    if ffn.held_out_error is not None:
        return ffn.held_out_error
    rows = statistics.held_out if bool(statistics.held_out.any()) else ~statistics.held_out
    reduced = ffn.reduction.bundle
    return relative_error(reduced.forward(statistics.x[rows].to(reduced.w_in.dtype))[0], statistics.y[rows])
