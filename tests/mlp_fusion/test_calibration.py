"""Streamed statistics, non-negative least squares, refit and NTK matching, against naive ones."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.optimize import nnls as scipy_nnls
from torch import Tensor

from bundles import random_bundle, statistics_of, tie
from families import FAMILIES, tiny_model, token_batch
from fusion_kernels import ntk_gram
from mlp_fusion import InputError
from mlp_fusion.calibration import collect, match_ntk, nnls, refit
from mlp_fusion.calibration.refit import _factor, _moments
from mlp_fusion.measure import ffn_errors, relative_error
from mlp_fusion.neurons import NeuronBundle
from mlp_fusion.running.sampling import RowPlan, RowSample
from mlp_fusion.running.taps import capture_activations
from mlp_fusion.store.record import architecture_of


def rows(count: int, d: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(count, d, generator=g, dtype=torch.float64) * 0.7 + 0.3).to(dtype)


# --- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_statistics_are_those_of_all_tokens(family: str) -> None:
    model = tiny_model(family, dtype=torch.float64)
    model.train()
    architecture = architecture_of(model.config)
    sites = architecture.sites(model)
    batches = [token_batch(seed=n, batch=3, length=5 + n) for n in range(4)]
    found = collect(model, architecture, sites, iter(batches), seed=0)
    assert model.training
    everything = capture_activations(model, architecture, sites, batches, rows=10_000, seed=0)
    for site, s, rows_of in zip(sites, found, everything, strict=True):
        bundle = architecture.read(site)
        naive = statistics_of(bundle, rows_of.x)
        assert s.tokens == len(rows_of.x)
        torch.testing.assert_close(s.input_moment, naive.input_moment)
        torch.testing.assert_close(s.hidden_mean, naive.hidden_mean)
        torch.testing.assert_close(s.hidden_variance, naive.hidden_variance)
        assert torch.equal(s.x, rows_of.x)
        assert torch.equal(s.y, rows_of.y)
        expected = naive.hidden_variance * bundle.w_out[0].square().sum(1)
        torch.testing.assert_close(s.importance(bundle), expected.float())
        assert s.nbytes == 8 * (s.input_moment.numel() + 2 * bundle.width + s.x.numel() + s.y.numel() + len(s.x))
    mask = torch.cat([b["attention_mask"].bool().sum(1) for b in batches])
    assert torch.equal(found[0].sequence, torch.arange(12).repeat_interleave(mask))
    assert torch.equal(found[0].held_out, found[0].sequence % 5 == 4)


def test_large_means_do_not_drown_the_variance() -> None:
    """A naive E[a^2] - E[a]^2 in float32 loses everything here."""
    model = tiny_model("bert", hidden_act="relu")
    with torch.no_grad():
        model.bert.encoder.layer[0].intermediate.dense.bias += 3e4
    architecture = architecture_of(model.config)
    sites = architecture.sites(model)[:1]
    batches = [token_batch(seed=n) for n in range(3)]
    (found,) = collect(model, architecture, sites, batches, seed=0)
    bundle = architecture.read(sites[0])
    hidden = bundle.hidden(found.x)[0].double()
    assert relative_error(found.hidden_variance, hidden.var(0, correction=0)) < 1e-3


def test_sampled_rows_are_uniform_and_the_same_at_every_ffn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlp_fusion.calibration.statistics.CALIBRATION_ROWS", 13)
    model = tiny_model("bert", dtype=torch.float64)
    architecture = architecture_of(model.config)
    sites = architecture.sites(model)
    batches = [token_batch(seed=n) for n in range(4)]
    everything = capture_activations(model, architecture, sites, batches, rows=10_000, seed=0)
    found = collect(model, architecture, sites, batches, seed=3)
    assert found[0].tokens == len(everything[0].x)
    positions = [(everything[2].x == row).all(1).nonzero().item() for row in found[2].x]
    assert len(set(positions)) == 13
    assert positions == sorted(positions)
    for s, rows_of in zip(found, everything, strict=True):
        assert torch.equal(s.x, rows_of.x[positions])
        assert torch.equal(s.y, rows_of.y[positions])
    again = collect(model, architecture, sites, batches, seed=3)
    assert torch.equal(again[2].x, found[2].x)
    assert not torch.equal(collect(model, architecture, sites, batches, seed=4)[2].x, found[2].x)


@pytest.mark.parametrize("sizes", [[3, 0, 4], [1] * 30, [40], [5, 5, 5, 5]])
def test_every_position_is_kept_equally_often(sizes: list[int]) -> None:
    """Batches of sequences of one token, and of none."""
    total, capacity = sum(sizes), 6
    batches = [{"input_ids": torch.ones(size, 1), "attention_mask": torch.ones(size, 1)} for size in sizes]
    kept = torch.zeros(total)
    for seed in range(300):
        sample, row = RowSample(RowPlan(batches, seed), capacity), iter(torch.arange(total).split(sizes))
        for batch in batches:
            sample.add(batch["attention_mask"].bool(), next(row))
        [[present], sequence] = sample.finish()
        assert len(present) == len(present.unique()) == min(capacity, total)
        assert torch.equal(sequence, present)
        kept[present] += 1
    expected = 300 * min(capacity, total) / total
    assert float((kept - expected).abs().max()) <= 5 * expected**0.5


def test_few_sequences_hold_out_their_end() -> None:
    s = statistics_of(random_bundle(), rows(20), sequences=2)
    assert s.held_out.tolist() == [False] * 16 + [True] * 4


def test_bad_calibration() -> None:
    model = tiny_model("bert")
    architecture = architecture_of(model.config)
    with pytest.raises(InputError, match="at least one batch"):
        collect(model, architecture, architecture.sites(model), [], seed=0)
    far = {"input_ids": torch.full((1, 90), 3)}
    with pytest.raises(InputError, match="cannot run"):
        collect(model, architecture, architecture.sites(model), far, seed=0)


# --- non-negative least squares --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n"), [(1, 1), (17, 5), (40, 17), (123, 60), (30, 30)])
@pytest.mark.parametrize("seed", range(4))
def test_nnls_is_scipys(m: int, n: int, seed: int) -> None:
    g = np.random.default_rng(seed)
    a = g.standard_normal((m, n)) * 10.0 ** g.uniform(-2, 2, n)
    b = g.standard_normal(m)
    expected, _ = scipy_nnls(a, b)
    found = nnls(torch.from_numpy(a.T @ a), torch.from_numpy(a.T @ b)).numpy()
    assert (found >= 0).all()
    # Ill-conditioned normal equations: what is minimised is compared, and the coefficients by their columns' size.
    np.testing.assert_allclose(np.linalg.norm(a @ found - b), np.linalg.norm(a @ expected - b), rtol=1e-7, atol=1e-8)
    size = np.linalg.norm(a, axis=0)
    np.testing.assert_allclose(found * size, expected * size, atol=1e-3)


def test_nnls_of_degenerate_problems() -> None:
    assert nnls(torch.zeros(0, 0), torch.zeros(0)).shape == (0,)
    assert nnls(torch.zeros(3, 3), torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]
    twins = nnls(torch.ones(2, 2), torch.tensor([4.0, 4.0]))
    torch.testing.assert_close(twins.sum(), torch.tensor(4.0, dtype=torch.float64))
    assert nnls(torch.eye(3), -torch.ones(3)).tolist() == [0.0, 0.0, 0.0]
    with pytest.raises(RuntimeError, match="no optimum"):
        nnls(torch.eye(4), torch.ones(4), max_iter=1)


@pytest.mark.parametrize("seed", range(3))
def test_nnls_of_columns_that_depend_on_one_another(seed: int) -> None:
    """Kernels of ten distinct rows: a matrix of rank 100 at most, where exchanges in blocks go round in circles."""
    g = np.random.default_rng(seed)
    left = g.standard_normal((10, 5)) @ g.standard_normal((5, 256))
    left = np.maximum(left, 0.0) - 0.1
    a = np.einsum("in,jn->ijn", left, np.sign(left)).reshape(100, 256)
    b = np.abs(a) @ g.random(256)
    _, least = scipy_nnls(a, b, maxiter=10_000)
    gram = torch.from_numpy((left.T @ left) * (np.sign(left).T @ np.sign(left)))
    found = nnls(gram, torch.from_numpy(a.T @ b)).numpy()
    assert (found >= 0).all()
    np.testing.assert_allclose(np.linalg.norm(a @ found - b), least, rtol=1e-6, atol=1e-6 * np.linalg.norm(b))
    # In float32, rounding leaves eigenvalues below 0.
    rough = nnls(gram.float(), torch.from_numpy(a.T @ b).float()).numpy()
    assert np.linalg.norm(a @ rough - b) < 1.01 * least + 0.01 * np.linalg.norm(b)


# --- refit -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("form", ["scaled", "split"])
def test_refit_recovers_the_weights_that_are_there(gated: bool, form: str) -> None:
    """The outputs of an FFN with other output weights are fitted exactly; the scale and the inputs stay."""
    reduced = random_bundle(width=6, gated=gated, scale=True)
    other = random_bundle(width=6, gated=gated, scale=True, seed=9)
    wanted = dataclasses.replace(reduced, w_out=other.w_out, b_out=other.b_out)
    found = refit(reduced.parameterized(form), statistics_of(wanted, rows(200)))
    assert found.ridge == 1e-8
    assert found.held_out_error is not None
    assert found.held_out_error < 1e-5
    assert relative_error(found.bundle.w_out, wanted.w_out) < 1e-4
    assert found.bundle.b_out is not None
    assert wanted.b_out is not None
    assert relative_error(found.bundle.b_out, wanted.b_out) < 1e-4
    assert torch.equal(found.bundle.scale, reduced.scale)  # type: ignore[arg-type]
    torch.testing.assert_close(found.bundle.w_in, reduced.w_in)
    assert found.bundle.scale_exponent == 0.0


@pytest.mark.parametrize("bias", [False, True])
def test_refit_is_the_ridge_solution(bias: bool) -> None:
    original = random_bundle(width=40, bias=bias)
    reduced = original.reduce(torch.arange(40).unsqueeze(0) % 7)
    s = statistics_of(original, rows(150))
    found = refit(reduced, s)
    assert found.ridge is not None
    hidden = reduced.hidden(s.x)[0]
    design = torch.cat([hidden, torch.ones(150, 1)], 1) if bias else hidden
    deviation = hidden.std(0, correction=0) if bias else hidden.square().mean(0).sqrt()
    penalty = torch.diag(torch.cat([deviation, torch.zeros(1)]) if bias else deviation) * (found.ridge * 150) ** 0.5
    residual = s.y - reduced.forward(s.x)[0]
    stacked = torch.cat([design, penalty]), torch.cat([residual, torch.zeros(len(penalty), 4)])
    change = torch.linalg.lstsq(*stacked).solution
    torch.testing.assert_close(found.bundle.w_out[0], reduced.w_out[0] + change[:7])
    if bias:
        torch.testing.assert_close(found.bundle.b_out, reduced.b_out + change[7:])  # type: ignore[operator]
    else:
        assert found.bundle.b_out is None
    held_out = s.held_out
    before = relative_error(reduced.forward(s.x[held_out])[0], s.y[held_out])
    assert found.held_out_error is not None
    assert found.held_out_error < before


def test_noise_calls_for_a_larger_ridge() -> None:
    original = random_bundle(width=30)
    reduced = original.reduce(torch.arange(30).unsqueeze(0) % 15)
    s = statistics_of(original, rows(40))
    noisy = dataclasses.replace(s, y=reduced.forward(s.x)[0] + torch.randn_like(s.y))
    ridge = refit(reduced, noisy).ridge
    assert ridge is not None
    assert ridge >= 1e-1


def test_refit_leaves_silent_neurons_and_survives_twins() -> None:
    bundle = random_bundle(width=8, scale=True)
    scale = bundle.scale.clone()  # type: ignore[union-attr]
    scale[0, 3] = 0.0
    twin = bundle.w_in.clone()
    twin[0, 5] = twin[0, 6]
    bundle = dataclasses.replace(bundle, scale=scale, w_in=twin)
    found = refit(bundle, statistics_of(random_bundle(width=20, seed=4), rows(100)))
    torch.testing.assert_close(found.bundle.w_out[0, 3], bundle.w_out[0, 3])
    assert bool(found.bundle.w_out.isfinite().all())


def test_what_rounding_has_made_indefinite_gets_a_larger_ridge() -> None:
    # Correlations of two neurons beyond one, as products in float32 may give them.
    rounded = torch.tensor([[1.0, 1.003], [1.003, 1.0]], dtype=torch.float64)
    one = torch.eye(2, dtype=torch.float64)
    factor = _factor(rounded + 1e-4 * one, 1e-4)
    torch.testing.assert_close(factor @ factor.T, rounded + 1e-2 * one)
    # A sound one keeps its own.
    factor = _factor(one + 1e-4 * one, 1e-4)
    torch.testing.assert_close(factor @ factor.T, one + 1e-4 * one)
    with pytest.raises(torch.linalg.LinAlgError):
        _factor(torch.full((2, 2), math.nan, dtype=torch.float64), 1e-4)


def test_refit_in_low_precision_is_near_that_of_float64() -> None:
    original = random_bundle(width=123, d=17, d_out=9)
    reduced = original.reduce(torch.arange(123).unsqueeze(0) % 17)
    s = statistics_of(original, rows(400, 17))
    exact = refit(reduced, s).bundle
    low = {"x": s.x.float(), "y": s.y.float()}
    found = refit(reduced.to(dtype=torch.float32), dataclasses.replace(s, **low)).bundle
    errors = [relative_error(b.to(dtype=torch.float64).forward(s.x), s.y) for b in (found, exact)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def test_an_original_that_is_silent_has_no_scale_to_measure_errors_on() -> None:
    """The relative error of outputs that are 0 is 0 where they are met, and infinite where they are not."""
    reduced = random_bundle(width=6, scale=True)
    s = statistics_of(random_bundle(width=9, seed=2), rows(80))
    silent = dataclasses.replace(s, y=torch.zeros_like(s.y))
    assert refit(reduced, silent).held_out_error == math.inf
    mute = dataclasses.replace(
        reduced, w_out=torch.zeros_like(reduced.w_out), b_out=torch.zeros(1, reduced.w_out.shape[2]).to(reduced.w_out)
    )
    found = refit(mute, silent)
    assert found.held_out_error == 0.0
    assert not bool(found.bundle.w_out.any())


@pytest.mark.parametrize("bias", [True, False])
def test_sums_over_some_rows_and_the_others_are_those_over_all(bias: bool) -> None:
    reduced = random_bundle(width=6, scale=True)
    reduced = reduced if bias else dataclasses.replace(reduced, b_out=None)
    s = statistics_of(random_bundle(width=9, seed=2), rows(5000))
    shift = torch.linspace(-1, 1, 6, dtype=torch.float64)
    first, second, whole = (
        _moments(reduced, s.x[part], s.y[part], shift) for part in (slice(0, 1900), slice(1900, None), slice(None))
    )
    first.add(second)
    for name, total in vars(first).items():
        torch.testing.assert_close(torch.as_tensor(total), torch.as_tensor(vars(whole)[name]), msg=name)
    hidden = reduced.hidden(s.x)[0]
    design = torch.cat([hidden - shift, torch.ones(5000, 1, dtype=torch.float64)], dim=1)
    left = s.y - reduced.forward(s.x)[0]
    torch.testing.assert_close(whole.gram, design.T @ design)
    torch.testing.assert_close(whole.cross, design.T @ left)
    torch.testing.assert_close(whole.residual, left.square().sum())
    torch.testing.assert_close(whole.target, s.y.square().sum())


def test_one_row_is_met_by_the_bias() -> None:
    """It has no variance to fit weights to."""
    reduced = random_bundle(width=6)
    s = statistics_of(random_bundle(width=9, seed=2), rows(1), sequences=1)
    found = refit(reduced, s).bundle
    torch.testing.assert_close(found.w_out, reduced.w_out)
    torch.testing.assert_close(found.forward(s.x)[0], s.y)


def test_too_few_rows_to_choose_a_ridge_on() -> None:
    reduced = random_bundle(width=6)
    found = refit(reduced, statistics_of(random_bundle(width=9, seed=2), rows(3), sequences=1))
    assert (found.ridge, found.held_out_error) == (None, None)
    assert bool(found.bundle.w_out.isfinite().all())
    with pytest.raises(ValueError, match="select one"):
        refit(random_bundle(batch=2), statistics_of(random_bundle(), rows(9)))


# --- NTK matching ----------------------------------------------------------------------------------------------------


def _parts(bundle: NeuronBundle) -> tuple[str, ...]:
    return tuple(p for p in ("w_in", "w_gate", "b_in", "b_gate", "w_out") if getattr(bundle, p) is not None)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("form", "kernel"), [(f, k) for f in ("scaled", "split") for k in ("gd", "sign")])
def test_matching_lowers_the_kernel_error_and_keeps_the_function(
    gated: bool, bias: bool, form: str, kernel: str
) -> None:
    original = random_bundle(width=60, gated=gated, bias=bias)
    reduced = original.reduce(torch.arange(60).unsqueeze(0) % 12)
    x = rows(40)
    found = match_ntk(original, reduced, x, kernel=kernel, parameterization=form)  # type: ignore[arg-type]
    torch.testing.assert_close(found.forward(x), reduced.forward(x))
    scale = found.scale
    assert scale is not None
    assert float(scale.min()) >= 1e-2
    before, after = (
        ffn_errors(original, bundle.parameterized(form), x).ntk[kernel]["total"] for bundle in (reduced, found)
    )
    assert after < before
    again = match_ntk(original, reduced, x, kernel=kernel, parameterization=form)  # type: ignore[arg-type]
    assert torch.equal(again.scale, scale)  # type: ignore[arg-type]
    # No nearby scale does notably better: the objective is the kernel of the module as it will be trained.
    target = ntk_gram(original, x, params=_parts(original), kernel=kernel)  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(0)
    for _ in range(8):
        factor = torch.exp(0.05 * torch.randn(scale.shape, generator=g, dtype=scale.dtype))
        moved = found.parameterized("folded").unfolded((scale * factor).clamp(1e-2, 1e4)).parameterized(form)
        gram = ntk_gram(moved, x, params=_parts(moved), kernel=kernel)  # type: ignore[arg-type]
        assert relative_error(gram, target) > 0.99 * after


@pytest.mark.parametrize(("form", "kernel"), [("scaled", "sign"), ("split", "gd")])
def test_matching_tied_neurons_finds_their_number(form: str, kernel: str) -> None:
    sizes = torch.tensor([3, 1, 2, 5, 4, 1])
    tied = tie(random_bundle(), sizes)
    reduced = tied.reduce(torch.arange(6).repeat_interleave(sizes).unsqueeze(0))
    wrong = reduced.parameterized("folded").unfolded(torch.full((1, 6), 2.5, dtype=torch.float64))
    found = match_ntk(tied, wrong, rows(60), kernel=kernel, parameterization=form)  # type: ignore[arg-type]
    torch.testing.assert_close(found.scale, sizes.double().unsqueeze(0), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("kernel", "gated"), [("gd", False), ("sign", True)])
def test_matching_many_rows_comes_near_the_best_scales(kernel: str, gated: bool) -> None:
    """Of neurons of very different strength, beside a general optimiser with the naive objective."""
    original = random_bundle(width=25, gated=gated)
    strength = torch.logspace(-0.7, 0.7, 25, dtype=torch.float64).reshape(1, -1, 1)
    original = dataclasses.replace(original, w_out=original.w_out * strength)
    reduced = original.reduce(torch.arange(25).unsqueeze(0) // 5)
    x = rows(260)
    x[1::2] *= 3.0  # or any half of the rows would do for all
    target = ntk_gram(original, x, params=_parts(original), kernel=kernel)  # type: ignore[arg-type]

    def error(log_scale: np.ndarray) -> float:
        scale = torch.from_numpy(log_scale).exp().unsqueeze(0)
        moved = reduced.parameterized("folded").unfolded(scale).parameterized("split")
        gram = ntk_gram(moved, x, params=_parts(moved), kernel=kernel)  # type: ignore[arg-type]
        return relative_error(gram, target)

    found = match_ntk(original, reduced, x, kernel=kernel, parameterization="split")  # type: ignore[arg-type]
    assert found.scale is not None
    start, bounds = np.full(5, np.log(5.0)), [(np.log(1e-2), np.log(1e4))] * 5
    best = minimize(error, start, method="L-BFGS-B", bounds=bounds)
    assert error(found.scale[0].log().numpy()) < 1.001 * best.fun < 0.95 * error(start)


@pytest.mark.parametrize("kernel", ["gd", "sign"])
@pytest.mark.parametrize("distinct", [1, 2, 10])
def test_matching_on_few_distinct_rows(kernel: str, distinct: int) -> None:
    original = random_bundle(width=700, dtype=torch.float32)
    reduced = original.reduce(torch.arange(700).unsqueeze(0) % 256)
    x = rows(distinct, dtype=torch.float32)[torch.arange(200) % distinct]
    found = match_ntk(original, reduced, x, kernel=kernel, parameterization="scaled")  # type: ignore[arg-type]
    torch.testing.assert_close(found.forward(x), reduced.forward(x), rtol=1e-4, atol=1e-3)
    before, after = (ffn_errors(original, bundle, x).ntk[kernel]["total"] for bundle in (reduced, found))
    assert after < before


def test_matching_keeps_silent_neurons_silent() -> None:
    original = random_bundle(width=20)
    reduced = original.reduce(torch.arange(20).unsqueeze(0) % 4, n_clusters=5)
    for form in ("scaled", "split"):
        found = match_ntk(original, reduced, rows(30), kernel="gd", parameterization=form)
        assert found.scale is not None
        assert float(found.scale[0, 4]) == 0.0
        assert float(found.scale[0, :4].min()) > 0.0
        torch.testing.assert_close(found.forward(rows(30)), reduced.forward(rows(30)))


def test_matching_refuses_what_has_no_kernel() -> None:
    bundle = random_bundle(scale=True)
    with pytest.raises(ValueError, match="no scale to match"):
        match_ntk(bundle, bundle, rows(9), kernel="gd", parameterization="folded")
    with pytest.raises(ValueError, match="select one"):
        match_ntk(random_bundle(batch=2), bundle, rows(9), kernel="gd", parameterization="split")
