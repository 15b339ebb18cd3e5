"""What the model loses by an FFN, by its width: against the obvious way in float64."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from bundles import random_bundle, statistics_of
from mlp_fusion.calibration import FFNStatistics, OutputSensitivity
from mlp_fusion.methods import merge
from mlp_fusion.methods.obs import DAMPING, eliminate, eliminations, least_squares
from mlp_fusion.neurons import NeuronBundle
from mlp_fusion.reducing.curves import elimination_curve
from mlp_fusion.selection import width_multiple

KINDS = list(itertools.product([False, True], [False, True]))


def rows(count: int, d: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(count, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.7 + 0.3


def case(
    gated: bool = False, bias: bool = True, width: int = 40
) -> tuple[NeuronBundle, FFNStatistics, FFNStatistics, OutputSensitivity]:
    """A bundle, statistics to fit to, others to judge on, and a sensitivity with sizes of those."""
    bundle = random_bundle(width=width, gated=gated, bias=bias, seed=width)
    judged = statistics_of(bundle, rows(70, seed=3))
    generator = torch.Generator().manual_seed(1)
    factor = torch.randn(4, 4, generator=generator, dtype=torch.float64).tril()
    sizes = torch.rand(70, generator=generator, dtype=torch.float64) ** 3 + 1e-3
    return bundle, statistics_of(bundle, rows(200)), judged, OutputSensitivity(factor, sizes)


def loss(
    bundle: NeuronBundle, known: FFNStatistics, judged: FFNStatistics, seen: OutputSensitivity, left: int
) -> float:
    """Of the elimination's neurons, with the output weights that fit: row by row."""
    known = dataclasses.replace(known, sensitivity=seen.factor)
    problem = merge.merging_problem(bundle, known, seed=0, damping=DAMPING)
    kept = eliminate(problem, left, most=merge.BLOCK)
    unseen = dataclasses.replace(known, sensitivity=None)
    plain = merge.merging_problem(bundle, unseen, seed=0, damping=DAMPING)
    v = plain.solution(kept) / plain.size[kept].unsqueeze(1)
    hidden = bundle.hidden(judged.x)[0]
    errors = hidden[:, kept] @ v - hidden @ bundle.w_out[0]
    if bundle.b_out is not None:  # the bias that fits best
        by = seen.sizes.square().unsqueeze(1)
        errors = errors - (errors * by).sum(dim=0) / by.sum()
    total = 0.0
    for error, size in zip(errors, seen.sizes, strict=True):
        total += float((size * error @ seen.factor).square().sum())
    return total / len(errors)


@pytest.mark.parametrize(("gated", "bias"), KINDS)
def test_losses_are_those_of_what_merging_leaves(gated: bool, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "BLOCK", 1)  # stops do not change which neurons go
    bundle, known, judged, seen = case(gated, bias)
    curve = elimination_curve(bundle, known, judged, seen, seed=0)
    assert [choice.width for choice in curve] == [8, 16, 24, 32, 40]
    per_neuron = bundle.vectors().shape[-1]
    assert [choice.parameters for choice in curve] == [per_neuron * choice.width for choice in curve]
    assert curve[-1].loss == 0.0
    for choice in curve[:-1]:
        assert choice.loss == pytest.approx(loss(bundle, known, judged, seen, choice.width), rel=1e-9)
    assert curve[0].loss > 2.0 * curve[-2].loss > 0.0


def test_a_loss_grows_with_the_gradients() -> None:
    bundle, known, judged, seen = case()
    plain = elimination_curve(bundle, known, judged, seen, seed=0)
    larger = dataclasses.replace(seen, sizes=3.0 * seen.sizes)
    for one, other in zip(plain, elimination_curve(bundle, known, judged, larger, seed=0), strict=True):
        assert other.loss == pytest.approx(9.0 * one.loss, rel=1e-9)


def test_what_nobody_reads_costs_nothing() -> None:
    bundle, known, judged, seen = case()
    unread = dataclasses.replace(seen, sizes=torch.zeros_like(seen.sizes))
    curve = elimination_curve(bundle, known, judged, unread, seed=0)
    assert [(choice.width, choice.loss) for choice in curve] == [(width, 0.0) for width in (8, 16, 24, 32, 40)]


def test_neurons_that_never_fire_cost_nothing() -> None:
    bundle, *_ = case(bias=False)
    bundle = dataclasses.replace(bundle, activation="relu", w_in=bundle.w_in.clone())
    bundle.w_in[0, 8:] = -bundle.w_in[0, 8:].abs()
    known, judged = (statistics_of(bundle, rows(count, seed=count).abs()) for count in (200, 70))
    assert not bool(bundle.hidden(known.x)[0, :, 8:].any())
    seen = case()[-1]
    curve = elimination_curve(bundle, known, judged, seen, seed=0)
    assert curve[0].width == 8
    # Those at hand are held by a little damping; the fit does not move them.
    assert curve[0].loss == pytest.approx(0.0, abs=1e-20)


@pytest.mark.parametrize("full", [1, 7, 17, 123, 1024, 1537])
def test_widths_are_multiples_below_the_whole(full: int) -> None:
    bundle = random_bundle(width=full, d=3, d_out=4, seed=full, dtype=torch.float32)
    known, judged = (statistics_of(bundle, rows(count, 3, seed=count).float()) for count in (60, 70))
    seen = case()[-1]
    seen = OutputSensitivity(seen.factor.float(), seen.sizes.float())
    curve = elimination_curve(bundle, known, judged, seen, seed=0)
    widths = [choice.width for choice in curve]
    assert widths == sorted(set(widths))
    assert widths[-1] == full
    assert all(0 < width < full and width % width_multiple(full) == 0 for width in widths[:-1])
    assert all(choice.loss >= 0.0 for choice in curve)
    if full > 16:
        assert len(widths) >= 8
        assert widths[0] <= full // 6


@pytest.mark.parametrize("most", [1, 4])
def test_every_stop_has_the_weights_that_fit_best(most: int) -> None:
    bundle = random_bundle(width=40, seed=2)
    problem = least_squares(bundle, statistics_of(bundle, rows(200)))
    stops = list(eliminations(problem, [33, 20, 20, 5], most=most))
    assert [int(left.sum()) for left, _ in stops] == [33, 20, 20, 5]
    for left, weights in stops:
        kept = left.nonzero().squeeze(1)
        torch.testing.assert_close(weights[kept], problem.solution(kept), rtol=1e-9, atol=1e-12)
        assert not bool(weights[~left].any())
        if most == 1:
            assert torch.equal(kept, eliminate(problem, len(kept)))
