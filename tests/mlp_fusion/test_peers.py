"""Other people's methods: each against a naive computation in float64, and on neurons that are dead or equal."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor

from bundles import random_bundle, statistics_of, tie
from mlp_fusion import InputError
from mlp_fusion.calibration import FFNStatistics
from mlp_fusion.methods import get_method
from mlp_fusion.methods.fasp import _RIDGE
from mlp_fusion.methods.obs import DAMPING, eliminate, least_squares
from mlp_fusion.methods.osscar import _pivot, _tableau, exchange
from mlp_fusion.methods.prune import keep_neurons
from mlp_fusion.methods.twossp import activity
from mlp_fusion.methods.wanda import column_scores
from mlp_fusion.neurons import NeuronBundle

FITTED = ("fasp", "obs", "osscar")
CHOOSING = ("magnitude", "wanda", "twossp", *FITTED)
#: Gate and biases.
KINDS = list(itertools.product([False, True], [False, True]))


def rows(count: int = 61, d: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(count, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.7 + 0.3


def case(
    gated: bool, bias: bool, width: int = 13, count: int = 61, *, other_targets: bool = False
) -> tuple[NeuronBundle, FFNStatistics]:
    """A bundle and its statistics, whose targets are another function's where sequential calibration is meant."""
    bundle = random_bundle(width=width, gated=gated, bias=bias, seed=width)
    known = statistics_of(bundle, rows(count), sequences=7)
    if other_targets:
        known = dataclasses.replace(known, y=known.y + 0.5 * torch.tanh(known.x @ rows(5, 4, seed=9)))
    return bundle, known


def reduced(name: str, bundle: NeuronBundle, known: FFNStatistics, width: int) -> NeuronBundle:
    return get_method(name)(bundle, width, seed=0, statistics=[known]).bundle


def kept_by(original: NeuronBundle, found: NeuronBundle) -> list[int]:
    """Which neurons of `original` are those of `found`, by their input weights."""
    assert torch.equal(found.w_in[0], found.w_in[0].unique_consecutive(dim=0))
    return [(original.w_in[0] == row).all(1).nonzero().item() for row in found.w_in[0]]  # type: ignore[misc]


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gated", "bias"), KINDS)
def test_wanda_sums_activity_times_weight_over_the_outputs(gated: bool, bias: bool) -> None:
    bundle, known = case(gated, bias)
    hidden, weights = bundle.hidden(known.x)[0], bundle.w_out[0]
    scores = [
        sum(abs(float(w)) * math.sqrt(float((hidden[:, k] ** 2).mean())) for w in weights[k])
        for k in range(bundle.width)
    ]
    torch.testing.assert_close(column_scores(bundle, [known])[0], torch.tensor(scores, dtype=torch.float64))
    found = reduced("wanda", bundle, known, 5)
    expected = sorted(sorted(range(bundle.width), key=lambda k: -scores[k])[:5])
    assert kept_by(bundle, found) == expected
    assert torch.equal(found.w_out[0], weights[expected])


@pytest.mark.parametrize(("gated", "bias"), KINDS)
def test_two_stage_pruning_takes_the_mean_norm_over_sequences(gated: bool, bias: bool) -> None:
    bundle, known = case(gated, bias)
    lengths = [1, 2, 30, 5, 23]  # unlike sequences tell the mean of norms from the norm over all rows
    known = dataclasses.replace(known, sequence=torch.arange(5).repeat_interleave(torch.tensor(lengths)))
    norms = [bundle.hidden(x)[0].norm(dim=0) for x in known.x.split(lengths)]
    expected = sum(norms) / 5
    torch.testing.assert_close(activity(bundle, known), expected)
    assert kept_by(bundle, reduced("twossp", bundle, known, 5)) == sorted(expected.topk(5).indices.tolist())  # type: ignore[union-attr]


def test_magnitude_never_looks_at_the_text() -> None:
    bundle, known = case(True, True)
    blind = dataclasses.replace(known, x=known.x * math.nan, hidden_variance=known.hidden_variance * math.nan)
    found = reduced("magnitude", bundle, blind, 4)
    assert bundle.w_gate is not None
    scores = (bundle.w_gate[0].square().sum(1) + bundle.w_in[0].square().sum(1)).sqrt() * bundle.w_out[0].norm(dim=1)
    assert kept_by(bundle, found) == sorted(scores.topk(4).indices.tolist())
    assert torch.equal(found.vectors(), get_method("prune")(bundle, 4, seed=0).bundle.vectors())


@pytest.mark.parametrize("gated", [False, True])
def test_prune_without_a_refit_is_flap(gated: bool) -> None:
    bundle, known = case(gated, True)
    hidden, weights = bundle.hidden(known.x)[0], bundle.w_out[0]
    fluctuation = (hidden - hidden.mean(0)).square().mean(0) * weights.square().sum(1)
    kept = sorted(fluctuation.topk(5).indices.tolist())
    gone = sorted(set(range(13)) - set(kept))
    found = reduced("prune", bundle, known, 5)
    assert kept_by(bundle, found) == kept
    assert bundle.b_out is not None
    assert found.b_out is not None
    torch.testing.assert_close(found.b_out[0], bundle.b_out[0] + hidden[:, gone].mean(0) @ weights[gone])


# --- least squares ---------------------------------------------------------------------------------------------------


class Naive:
    """The error of subsets of neurons by ordinary least squares on rows that stand for the damping."""

    def __init__(self, bundle: NeuronBundle, known: FFNStatistics, damping: float, *, anchored: bool = True) -> None:
        self.hidden, self.y, self.T = bundle.hidden(known.x)[0], known.y, len(known.x)
        self.means = self.hidden.mean(0), self.y.mean(0)
        if bundle.b_out is not None:
            self.hidden, self.y = self.hidden - self.means[0], self.y - self.means[1]
        self.pull = (damping * self.hidden.square().mean(0)).sqrt()
        self.anchor = bundle.w_out[0] if anchored else torch.zeros_like(bundle.w_out[0])

    def fit(self, kept: list[int]) -> Tensor:
        """`(K, d_out)` output weights of the neurons `kept`."""
        pull = torch.diag(self.pull[kept])
        design = torch.cat([self.hidden[:, kept] / self.T**0.5, pull])
        wanted = torch.cat([self.y / self.T**0.5, pull @ self.anchor[kept]])
        return torch.linalg.pinv(design) @ wanted

    def error(self, kept: list[int]) -> float:
        """With the weights that fit best."""
        whole = torch.zeros_like(self.anchor)
        whole[kept] = self.fit(kept)
        missed = (self.y - self.hidden @ whole).square().sum() / self.T
        return float(missed + (self.pull.unsqueeze(1) * (whole - self.anchor)).square().sum())

    def eliminated(self, width: int) -> list[int]:
        kept = list(range(len(self.anchor)))
        while len(kept) > width:
            kept.remove(min(kept, key=lambda k: self.error([j for j in kept if j != k])))
        return kept

    def exchanged(self, kept: list[int], swaps: int) -> list[int]:
        for _ in range(swaps):
            others = set(range(len(self.anchor))) - set(kept)
            near = [sorted({*kept, j} - {i}) for i in kept for j in others]
            best = min(near, key=self.error)
            if self.error(best) >= self.error(kept):
                break
            kept = best
        return kept


@pytest.mark.parametrize(("gated", "bias"), KINDS)
@pytest.mark.parametrize(("count", "other_targets"), [(601, False), (61, True), (7, True)])
def test_surgery_drops_what_costs_least_when_all_is_fitted_anew(
    gated: bool, bias: bool, count: int, other_targets: bool
) -> None:
    bundle, known = case(gated, bias, count=count, other_targets=other_targets)
    naive = Naive(bundle, known, DAMPING)
    for width in (6, 1):
        kept = naive.eliminated(width)
        found = reduced("obs", bundle, known, width)
        assert kept_by(bundle, found) == kept
        weights = naive.fit(kept)
        torch.testing.assert_close(found.w_out[0], weights, rtol=1e-6, atol=1e-8)
        if found.b_out is not None:
            expected = naive.means[1] - naive.means[0][kept] @ weights
            torch.testing.assert_close(found.b_out[0], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("gated", "bias"), KINDS)
@pytest.mark.parametrize("count", [61, 7])
def test_swaps_are_the_best_there_are(gated: bool, bias: bool, count: int) -> None:
    bundle, known = case(gated, bias, width=11, count=count, other_targets=True)
    naive, problem = Naive(bundle, known, DAMPING), least_squares(bundle, known)
    start = [0, 1, 2, 3]
    assert naive.exchanged(start, 1) != start
    for swaps in (1, 2, 50):
        found = exchange(problem, torch.tensor(start), swaps, least=0.0).tolist()
        assert found == naive.exchanged(start, swaps)
    # A search that ends by itself has found a subset that no swap makes better.
    assert naive.exchanged(found, 1) == found


def test_a_neuron_that_enters_and_leaves_again_leaves_no_trace() -> None:
    bundle, known = case(True, False, width=11, other_targets=True)
    problem = least_squares(bundle, known)
    table, weights = problem.normal.clone(), problem.target.clone()
    for k in (7, 2, 5, 0):
        _pivot(table, weights, k, entering=True)
    inside = torch.zeros(11, dtype=torch.bool).index_fill(0, torch.tensor([7, 2, 5, 0]), True)
    expected = _tableau(problem, inside)
    torch.testing.assert_close((table, weights), expected)
    torch.testing.assert_close(weights[inside], problem.solution(inside.nonzero().squeeze(1)))
    for k in (2, 0, 7, 5):
        _pivot(table, weights, k, entering=False)
    torch.testing.assert_close((table, weights), (problem.normal, problem.target), rtol=1e-6, atol=1e-9)


def test_swaps_end_where_they_gain_little_and_after_as_many_as_were_asked_for() -> None:
    bundle, known = case(True, False, width=11, other_targets=True)
    problem = least_squares(bundle, known)
    start = torch.tensor([0, 1, 2, 3])
    assert exchange(problem, start, 0).tolist() == [0, 1, 2, 3]
    assert exchange(problem, start, 9, least=1.0).tolist() == [0, 1, 2, 3]
    assert exchange(problem, torch.arange(11), 9).tolist() == list(range(11))


@pytest.mark.parametrize(("gated", "bias"), KINDS)
def test_local_search_is_never_worse_than_what_it_starts_from(gated: bool, bias: bool) -> None:
    bundle, known = case(gated, bias, width=31, other_targets=True)
    naive = Naive(bundle, known, DAMPING)
    errors = [naive.error(kept_by(bundle, reduced(name, bundle, known, 16))) for name in ("osscar", "obs", "wanda")]
    assert errors[0] <= errors[1] < errors[2]


@pytest.mark.parametrize(("gated", "bias"), KINDS)
@pytest.mark.parametrize("count", [61, 4])
def test_restoration_is_a_ridge_regression_on_what_wanda_keeps(gated: bool, bias: bool, count: int) -> None:
    bundle, known = case(gated, bias, count=count, other_targets=True)
    kept = kept_by(bundle, reduced("wanda", bundle, known, 6))
    found = reduced("fasp", bundle, known, 6)
    assert kept_by(bundle, found) == kept
    naive = Naive(keep_neurons(bundle, torch.tensor([kept])), known, _RIDGE, anchored=False)
    torch.testing.assert_close(found.w_out[0], naive.fit(list(range(6))), rtol=1e-6, atol=1e-8)


# --- neurons that are dead, equal, or all of them --------------------------------------------------------------------


@pytest.mark.parametrize("name", CHOOSING)
@pytest.mark.parametrize(("gated", "bias"), KINDS)
@pytest.mark.parametrize("width", [1, 13])
def test_one_neuron_or_all_of_them(name: str, gated: bool, bias: bool, width: int) -> None:
    bundle, known = case(gated, bias)
    found = reduced(name, bundle, known, width)
    assert found.width == width
    assert bool(found.vectors().isfinite().all())
    if width == 13:
        error = (found.forward(known.x) - known.y).norm() / known.y.norm()
        assert float(error) < (1e-3 if name == "fasp" else 1e-9)


@pytest.mark.parametrize("name", ["wanda", "twossp", *FITTED])
def test_neurons_that_never_fire_go_first_and_keep_their_weights(name: str) -> None:
    bundle = dataclasses.replace(random_bundle(width=13, bias=False), activation="relu")
    dead = [0, 4, 5, 12]
    w_in = bundle.w_in.clone()
    w_in[0, dead] = 0.0
    bundle = dataclasses.replace(bundle, w_in=w_in)
    known = statistics_of(bundle, rows())
    alive = sorted(set(range(13)) - set(dead))
    found = reduced(name, bundle, known, 9)
    assert torch.equal(found.w_in[0], bundle.w_in[0, alive])
    assert float((found.forward(known.x) - known.y).norm() / known.y.norm()) < 1e-3
    more = reduced(name, bundle, known, 11)
    silent = more.w_in[0].abs().sum(1) == 0
    assert int(silent.sum()) == 2
    kept = bundle.w_out[0, dead]
    assert all(bool((kept == row).all(1).any()) for row in more.w_out[0, silent])


@pytest.mark.parametrize("searched", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_one_of_equal_neurons_takes_over_from_the_others(searched: bool, gated: bool) -> None:
    sizes = torch.tensor([3, 1, 4, 2])
    tied = tie(random_bundle(width=4, gated=gated, seed=3), sizes)
    known = statistics_of(tied, rows())
    # Hardly damped: holding weights where they are is what moving them to one neuron costs.
    problem = least_squares(tied, known, damping=1e-9)
    kept = eliminate(problem, 4)
    if searched:
        kept = exchange(problem, kept, 9)
    assert torch.arange(4).repeat_interleave(sizes)[kept].tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(problem.reduced(tied, kept).forward(known.x)[0], known.y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FITTED)
def test_activations_too_large_to_square_are_refused(name: str) -> None:
    bundle = random_bundle(dtype=torch.float32, bias=False)
    known = statistics_of(bundle, rows().float())
    large = dataclasses.replace(bundle, w_in=bundle.w_in * 2.0**66)
    with pytest.raises(InputError, match="too large for least squares: use a method that does not fit"):
        get_method(name)(large, 3, seed=0, statistics=[known])


@pytest.mark.parametrize("name", FITTED)
def test_fits_in_float32_are_those_in_float64_up_to_rounding(name: str) -> None:
    bundle, known = case(True, True, width=31, count=300)
    expected = reduced(name, bundle, known, 12)
    narrow = dataclasses.replace(known, x=known.x.float(), y=known.y.float())
    found = reduced(name, bundle.to(dtype=torch.float32), narrow, 12)
    assert found.w_out.dtype == torch.float32
    wide = [each.to(dtype=torch.float64).forward(known.x) for each in (found, expected)]
    errors = [float((y - known.y).norm()) for y in wide]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


# --- directions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gated", "bias"), KINDS)
def test_slicing_projects_onto_principal_components_at_the_cost_of_the_narrower_ffn(gated: bool, bias: bool) -> None:
    bundle, known = case(gated, bias, width=29, count=90)
    bundle = random_bundle(width=29, d=11, d_out=7, gated=gated, bias=bias)
    x = rows(90, 11) @ rows(11, 11, seed=4)
    known = statistics_of(bundle, x)
    found = reduced("slice", bundle, known, 20)
    into, behind = _rank(found.w_in), _rank(found.w_out)
    matrices = 2 if gated else 1
    assert into * (matrices * 29 + 11) <= 20 * matrices * 11 < (into + 1) * (matrices * 29 + 11)
    assert behind * (29 + 7) <= 20 * 7 < (behind + 1) * (29 + 7)
    y = known.y if bundle.b_out is None else known.y - bundle.b_out[0]
    inputs, outputs = (torch.linalg.svd(t).Vh[:r].T for t, r in ((x, into), (y, behind)))
    expected = bundle.forward(x @ inputs @ inputs.T)[0]
    if bundle.b_out is not None:
        expected = (expected - bundle.b_out[0]) @ outputs @ outputs.T + bundle.b_out[0]
    else:
        expected = expected @ outputs @ outputs.T
    torch.testing.assert_close(found.forward(x)[0], expected)
    assert found.width == 29


def _rank(weight: Tensor) -> int:
    return int(torch.linalg.matrix_rank(weight[0]))


def test_slicing_loses_nothing_of_inputs_in_a_subspace() -> None:
    bundle = random_bundle(width=29, d=11, d_out=7, gated=True)
    bundle = dataclasses.replace(bundle, w_out=(rows(29, 3, seed=5) @ rows(3, 7, seed=6)).unsqueeze(0))
    x = rows(90, 3) @ rows(3, 11, seed=4)
    found = reduced("slice", bundle, statistics_of(bundle, x), 27)
    assert _rank(found.w_in) < 11
    torch.testing.assert_close(found.forward(x), bundle.forward(x), rtol=1e-6, atol=1e-6)


def test_elimination_is_in_order_of_number() -> None:
    bundle, known = case(False, False)
    kept = eliminate(least_squares(bundle, known), 7)
    assert kept.dtype == torch.int64
    assert kept.tolist() == sorted(kept.tolist())
    assert eliminate(least_squares(bundle, known), 13).tolist() == list(range(13))
