"""Method `merge` against a naive elimination in float64, and mixtures of calibration rows."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from bundles import random_bundle, statistics_of, tie
from mlp_fusion import InputError
from mlp_fusion.calibration import FFNStatistics, mixtures, refit
from mlp_fusion.calibration.mixtures import Mixtures
from mlp_fusion.methods import get_method, merge
from mlp_fusion.methods.obs import eliminate, least_squares
from mlp_fusion.neurons import NeuronBundle

KINDS = list(itertools.product([False, True], [False, True]))


def rows(count: int = 90, d: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(count, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.7 + 0.3


def case(
    gated: bool = False, bias: bool = True, width: int = 17, count: int = 90
) -> tuple[NeuronBundle, FFNStatistics]:
    """A bundle, and statistics with a sensitivity and with targets that are not quite its outputs."""
    bundle = random_bundle(width=width, gated=gated, bias=bias, seed=width)
    known = statistics_of(bundle, rows(count), sequences=10)
    metric = torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).tril()
    y = known.y + 0.3 * torch.tanh(known.x @ rows(5, 4, seed=9))
    y[3] *= 50.0
    return bundle, dataclasses.replace(known, y=y, sensitivity=metric)


def merged(bundle: NeuronBundle, known: FFNStatistics, width: int) -> NeuronBundle:
    return get_method("merge")(bundle, width, seed=0, statistics=[known]).bundle


def loss(bundle: NeuronBundle, known: FFNStatistics, kept: list[int], metric: Tensor) -> float:
    """The damped weighed error with the best output weights of the neurons `kept`: the obvious way."""
    used = ~known.held_out
    by = known.row_weights()[used].unsqueeze(1)
    h, y = bundle.hidden(known.x[used])[0] * by, known.y[used] * by
    size = (h.square().sum(dim=0) / by.square().sum()).sqrt()
    columns = torch.cat([h, by], dim=1) if bundle.b_out is not None else h
    if bundle.b_out is not None:
        mean = (h * by).sum(dim=0) / by.square().sum()
        size = ((h - by * mean).square().sum(dim=0) / by.square().sum()).sqrt()
    scale = by.square().sum().sqrt()
    anchors = torch.diag((merge._DAMPING**0.5 * size * scale)[kept])
    chosen = [*kept, *range(bundle.width, columns.shape[1])]
    padded = torch.cat([anchors, anchors.new_zeros(len(kept), len(chosen) - len(kept))], dim=1)
    design = torch.cat([columns[:, chosen], padded])
    target = torch.cat([y, anchors @ bundle.w_out[0, kept]])
    found = torch.linalg.lstsq(design, target).solution
    # What anchors of neurons that are gone cost, too: their weights have become 0.
    gone = [k for k in range(bundle.width) if k not in kept]
    lost = (merge._DAMPING**0.5 * size * scale)[gone].unsqueeze(1) * bundle.w_out[0, gone] @ metric
    return float((((target - design @ found) @ metric).square().sum() + lost.square().sum()) / scale**2)


@pytest.mark.parametrize(("gated", "bias"), KINDS)
def test_the_cheapest_neuron_goes_and_the_others_take_over(
    gated: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "BLOCK", 1)
    bundle, known = case(gated, bias)
    assert known.sensitivity is not None
    kept = list(range(bundle.width))
    while len(kept) > 6:
        kept.remove(min(kept, key=lambda k: loss(bundle, known, [n for n in kept if n != k], known.sensitivity)))
    found = merged(bundle, known, 6)
    assert torch.equal(found.w_in[0], bundle.w_in[0, kept])
    assert torch.equal(found.w_out[0], bundle.w_out[0, kept]), "the refit's are the output weights"


@pytest.mark.parametrize("width", [1, 17, 122])
def test_blocks_lose_little(width: int) -> None:
    bundle, known = case(width=123, count=400)
    assert known.sensitivity is not None
    problem = least_squares(bundle, known, damping=merge._DAMPING).seen_through(known.sensitivity)

    def error(kept: Tensor) -> float:
        return problem.square - float((problem.target[kept] * problem.solution(kept)).sum())

    blocks = eliminate(problem, width, most=merge.BLOCK)
    assert torch.equal(blocks, blocks.unique()), "every neuron once, in order"
    assert len(blocks) == width
    alone = eliminate(problem, width)
    silent = error(torch.arange(0))
    assert error(blocks) - error(alone) < 0.01 * (silent - error(alone))


def test_what_the_model_does_not_see_goes_first() -> None:
    bundle, known = case(width=12)
    w_out = bundle.w_out.clone()
    w_out[0, ::2, 1:] = 0.0
    w_out[0, 1::2, 0] = 0.0
    w_out[0, 1::2] *= 10.0
    bundle = dataclasses.replace(bundle, w_out=w_out)
    metric = torch.diag(torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64))
    known = dataclasses.replace(known, y=bundle.forward(known.x)[0], sensitivity=metric)
    assert torch.equal(merged(bundle, known, 6).w_in, bundle.w_in[:, ::2])
    plain = merged(bundle, dataclasses.replace(known, sensitivity=None), 6)
    large = [bool((bundle.w_in[0, 1::2] == row).all(dim=1).any()) for row in plain.w_in[0]]
    assert sum(large) >= 5


def test_held_out_rows_are_not_looked_at() -> None:
    bundle, known = case()
    other = dataclasses.replace(known, y=torch.where(known.held_out.unsqueeze(1), known.y.flip(0), known.y))
    assert torch.equal(known.row_weights()[~known.held_out], other.row_weights()[~known.held_out])
    for one, two in zip(
        merged(bundle, known, 6).named().values(), merged(bundle, other, 6).named().values(), strict=True
    ):
        assert torch.equal(one, two)


def test_a_massive_row_counts_as_others() -> None:
    _, known = case()
    size = known.y.norm(dim=1)
    weights = known.row_weights()
    assert int(size.argmax()) == 3
    torch.testing.assert_close(size * weights, size.clamp(max=3.0 * float(size[~known.held_out].median())))
    nothing = dataclasses.replace(known, y=torch.zeros_like(known.y))
    assert torch.equal(nothing.row_weights(), torch.ones(len(known.y), dtype=torch.float64))


def test_degenerate_neurons_and_rows() -> None:
    bundle, known = case()
    # Neurons that never fire are free, equal ones are one.
    dead = dataclasses.replace(bundle, w_in=bundle.w_in.clone().index_fill_(1, torch.tensor([0, 5]), 0.0))
    assert dead.b_in is not None
    dead = dataclasses.replace(dead, b_in=dead.b_in.clone().index_fill_(1, torch.tensor([0, 5]), 0.0))
    found = merged(dead, statistics_of(dead, known.x), 15)
    assert torch.equal(found.w_in[0], dead.w_in[0, [n for n in range(17) if n not in (0, 5)]])
    small = random_bundle(width=5)
    tied = tie(small, torch.tensor([3, 3, 3, 3, 3]))
    known_tied = statistics_of(tied, rows(300))
    found = refit(merged(tied, known_tied, 5), known_tied).bundle
    error = found.forward(rows(50, seed=4)) - tied.forward(rows(50, seed=4))
    assert error.norm() < 0.1 * tied.forward(rows(50, seed=4)).norm()
    # Fewer rows than neurons; one row.
    for count in (1, 3):
        found = merged(bundle, statistics_of(bundle, rows(count)), 4)
        assert all(bool(t.isfinite().all()) for t in found.named().values())
    with pytest.raises(InputError, match="too large"):
        merged(bundle, dataclasses.replace(known, y=known.y * 1e200), 4)


# --- mixtures --------------------------------------------------------------------------------------------------------


def test_mixtures_have_the_mean_and_the_covariance_of_the_rows() -> None:
    bundle, known = case()
    x, _, most = Mixtures(bundle, [known]).draw(40_000, torch.Generator().manual_seed(0))
    own = known.x
    torch.testing.assert_close(x[0].mean(dim=0), own.mean(dim=0), rtol=0.0, atol=0.02)
    torch.testing.assert_close(torch.cov(x[0].T, correction=0), torch.cov(own.T, correction=0), rtol=0.0, atol=0.03)
    assert set(most.tolist()) == set(range(len(own)))
    near = (x[0] - known.x[most]).norm(dim=1).mean()
    assert 0.05 < float(near / own.std(dim=0).norm()) < mixtures.LARGEST_SHARE


@pytest.mark.parametrize(("gated", "bias"), KINDS)
def test_mixtures_get_what_the_original_makes_of_them(gated: bool, bias: bool) -> None:
    """Targets beyond the original's outputs are affine here, so that their mixtures are known."""
    bundles = [random_bundle(width=7, gated=gated, bias=bias, seed=n) for n in range(2)]
    slope, offset = rows(5, 4, seed=9), rows(1, 4, seed=8)
    each = [statistics_of(bundle, rows()) for bundle in bundles]
    more = each[1].x @ slope + offset
    each[1] = dataclasses.replace(each[1], y=each[1].y + more, beyond=more)
    both = NeuronBundle.stack(bundles)
    x, y, _ = Mixtures(both, each).draw(30, torch.Generator().manual_seed(0))
    torch.testing.assert_close(y[0], both.forward(x)[0])
    torch.testing.assert_close(y[1], both.forward(x)[1] + x[1] @ slope + offset)
    assert torch.equal(x[0], x[1]), "mixtures of the same tokens"
