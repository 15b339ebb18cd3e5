"""Every compression method: what it computes, its determinism, and what it needs."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bundles import random_bundle, statistics_of, tie
from families import tiny_model, token_batch
from fusion_kernels import kmeans
from mlp_fusion import InputError, fuse, methods
from mlp_fusion.calibration import FFNStatistics, refit
from mlp_fusion.choices import KEEP_WIDTH, METHODS, NEED_TEXT
from mlp_fusion.measure import relative_error
from mlp_fusion.methods import get_method
from mlp_fusion.methods.fusion import balanced_rows, neuron_weights
from mlp_fusion.methods.select import greedy
from mlp_fusion.methods.svd import rank_for
from mlp_fusion.neurons import NeuronBundle
from mlp_fusion.reducing.widths import Choice, choose


def rows(count: int, d: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(count, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.7 + 0.3


def known_of(bundle: NeuronBundle, x: Tensor) -> list[FFNStatistics]:
    return [statistics_of(bundle.select(n), x) for n in range(bundle.batch)]


def test_the_table_says_what_methods_need() -> None:
    assert list(METHODS) == sorted(METHODS)
    assert [METHODS[n].text for n in ("published", "prune", "fusion", "select")] == [
        "unused",
        "helps",
        "helps",
        "needed",
    ]
    assert "select" in NEED_TEXT
    assert "svd" in KEEP_WIDTH
    with pytest.raises(InputError, match="method 'select' needs calibration text"):
        get_method("select")(random_bundle(), 3, seed=0)
    with pytest.raises(InputError, match="unknown method 'x': use one of cluster, fasp"):
        get_method("x")


def test_every_file_of_a_method_stands_in_the_table() -> None:
    files = {file.stem for file in Path(methods.__file__).parent.glob("*.py")} - {"__init__"}
    assert {entry.file for entry in METHODS.values()} == files


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_a_documented_function_of_its_name(name: str) -> None:
    method = get_method(name)
    assert method.name == name
    assert method.entry.does
    function: Any = method.reduce
    assert inspect.isfunction(function)
    assert function.__name__ == name
    assert inspect.getdoc(function)
    assert list(inspect.signature(function).parameters) == ["bundle", "width", "seed", "statistics"]


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_methods_reduce_every_problem_as_alone_and_to_the_same_bits(
    name: str, gated: bool, bias: bool, dtype: torch.dtype
) -> None:
    bundle = random_bundle(batch=3, width=30, gated=gated, bias=bias, dtype=dtype)
    x = rows(60).to(dtype)
    known = known_of(bundle, x)
    method = get_method(name)
    found = method(bundle, 8, seed=1, statistics=known)
    again = method(bundle, 8, seed=1, statistics=known)
    assert found.bundle.width == (8 if method.narrows else 30)
    assert found.bundle.batch == 3
    assert (found.bundle.scale is not None) is METHODS[name].scales
    assert found.bundle.w_in.dtype == dtype
    assert found.status == ("ok",) * 3
    for part in ("w_in", "w_out", "w_gate", "b_in", "b_gate", "b_out", "scale"):
        one, other = getattr(found.bundle, part), getattr(again.bundle, part)
        assert (one is None) == (other is None)
        if one is not None:
            assert bool(one.isfinite().all())
            assert torch.equal(one, other)
    alone = method(bundle.select(1), 8, seed=1, statistics=known[1:2])
    torch.testing.assert_close(alone.bundle.forward(x)[0], found.bundle.forward(x)[1])
    # Whatever is fitted to the outputs afterwards can only be nearer to them.
    for n in range(3):
        fitted = refit(found.bundle.select(n), known[n]).bundle
        errors = [relative_error(b.forward(x)[0], known[n].y) for b in (fitted, found.bundle.select(n))]
        assert errors[0] <= errors[1] * (1 + 1e-6)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in KEEP_WIDTH])
def test_fuse_takes_every_method_that_narrows(name: str) -> None:
    model = tiny_model("bert", num_hidden_layers=1)
    report = fuse(model, 16, method=name, calibration=[token_batch()])
    assert report.method == name
    assert [row.neurons_after for row in report.rows] == [16]
    assert bool(model(**token_batch()).logits.isfinite().all())


@pytest.mark.parametrize("name", ["fusion", "published", "cluster"])
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_tied_neurons_are_fused_without_loss(name: str, calibrated: bool, gated: bool) -> None:
    sizes = torch.tensor([3, 1, 2, 5, 4, 1])
    tied = tie(random_bundle(gated=gated), sizes)
    x = rows(40)
    found = get_method(name)(tied, 6, seed=0, statistics=known_of(tied, x) if calibrated else None)
    torch.testing.assert_close(found.bundle.forward(x), tied.forward(x))
    assert found.counts is not None
    assert sorted(found.counts[0].tolist()) == sorted(sizes.tolist())
    assert (found.bundle.scale is None) == (name == "cluster")


def test_published_is_lloyds_clustering_of_raw_rows() -> None:
    bundle = random_bundle(batch=2, width=40)
    found = get_method("published")(bundle, 9, seed=5)
    labels = kmeans(bundle.vectors(), 9, algorithm="lloyd", seed=5).labels
    expected = bundle.reduce(labels, n_clusters=9)
    torch.testing.assert_close(found.bundle.w_in, expected.w_in)
    torch.testing.assert_close(found.bundle.scale, expected.scale)


def test_the_metric_is_the_mean_squared_difference_of_pre_activations() -> None:
    bundle = random_bundle(width=12)
    x = rows(500)
    found = balanced_rows(bundle, known_of(bundle, x))[0]
    assert bundle.b_in is not None
    z = x @ bundle.w_in[0].T + bundle.b_in[0]
    expected = torch.cdist(z.T, z.T).square()
    inputs = torch.cdist(found[:, :6], found[:, :6]).square()
    torch.testing.assert_close(inputs / inputs.max(), expected / expected.max(), rtol=1e-2, atol=1e-3)
    for block in (found[:, :6], found[:, 6:], balanced_rows(bundle, None)[0][:, :6]):
        assert float((block - block.mean(0)).square().sum()) == pytest.approx(1.0)


def test_weights_are_importance_with_calibration_and_output_norms_without() -> None:
    bundle = random_bundle(width=12, scale=True)
    plain = bundle.parameterized("folded")
    norms = plain.w_out[0].norm(dim=1)
    torch.testing.assert_close(neuron_weights(bundle, None)[0], norms / norms.mean())
    x = rows(50)
    known = known_of(plain, x)
    variance = plain.hidden(x)[0].var(0, correction=0)
    expected = variance * norms.square()
    found = neuron_weights(plain, known)[0]
    torch.testing.assert_close(found, expected / expected.mean(), rtol=1e-5, atol=1e-6)
    dead = dataclasses.replace(bundle, w_out=torch.zeros_like(bundle.w_out))
    assert neuron_weights(dead, None).tolist() == [[1.0] * 12]


@pytest.mark.parametrize("calibrated", [False, True])
def test_prune_keeps_whole_neurons_and_the_mean_output(calibrated: bool) -> None:
    bundle = random_bundle(width=25)
    x = rows(70)
    known = known_of(bundle, x) if calibrated else None
    found = get_method("prune")(bundle, 10, seed=0, statistics=known).bundle
    original, kept = bundle.vectors()[0], found.vectors()[0]
    positions = [(original == row).all(1).nonzero().item() for row in kept]
    scores = (
        bundle.hidden(x)[0].var(0, correction=0) * bundle.w_out[0].square().sum(1)
        if calibrated
        else bundle.w_in[0].norm(dim=1) * bundle.w_out[0].norm(dim=1)
    )
    assert set(positions) == set(scores.topk(10).indices.tolist())
    assert found.scale is None
    means = found.forward(x)[0].mean(0), bundle.forward(x)[0].mean(0)
    assert torch.allclose(*means) == calibrated


def test_greedy_selection_is_the_best_neuron_at_every_step() -> None:
    """Against least squares over every candidate, afresh."""
    bundle = random_bundle(width=15, d_out=3)
    x = rows(80)
    found = greedy(bundle, x, 6).tolist()
    hidden = bundle.hidden(x)[0]
    hidden = hidden - hidden.mean(0)
    target = hidden @ bundle.w_out[0]
    chosen: list[int] = []
    for _ in range(6):
        losses = {}
        for candidate in set(range(15)) - set(chosen):
            design = hidden[:, [*chosen, candidate]]
            losses[candidate] = float((target - design @ torch.linalg.lstsq(design, target).solution).norm())
        chosen.append(min(losses, key=lambda c: losses[c]))
    assert found == chosen


def test_greedy_selection_passes_over_copies() -> None:
    sizes = torch.tensor([4, 4, 4])
    tied = tie(random_bundle(width=3), sizes)
    x = rows(50)
    kept = greedy(tied, x, 3)
    assert sorted((kept // 4).tolist()) == [0, 1, 2]
    assert len(set(greedy(tied, x, 7).tolist())) == 7
    found = get_method("select")(tied, 3, seed=0, statistics=known_of(tied, x)).bundle
    assert relative_error(found.forward(x), tied.forward(x)) < 1e-5


def test_sketch_mixes_all_neurons_with_one_matrix() -> None:
    bundle = dataclasses.replace(random_bundle(batch=2, width=50), activation="relu")
    found = get_method("sketch")(bundle, 7, seed=3).bundle
    mixing = torch.randn(7, 50, generator=torch.Generator().manual_seed(3), dtype=torch.float64) / 7**0.5
    for number in range(2):
        torch.testing.assert_close(found.vectors()[number], mixing @ bundle.vectors()[number], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.b_out, bundle.b_out)
    many = torch.cat([get_method("sketch")(bundle, 7, seed=s).bundle.vectors() for s in range(400)], dim=1)
    # E[S S^T] = 1: inner products between columns are kept on average.
    gram, expected = many[0].T @ many[0] / 400, bundle.vectors()[0].T @ bundle.vectors()[0]
    assert relative_error(gram, expected) < 0.1


def test_mmd_lowers_the_discrepancy_and_stands_for_all_neurons() -> None:
    bundle = random_bundle(batch=2, width=60)
    found = get_method("mmd")(bundle, 12, seed=0)
    assert found.bundle.scale is not None
    assert torch.equal(found.bundle.scale, torch.full((2, 12), 5.0, dtype=torch.float64))
    torch.testing.assert_close(found.bundle.b_out, bundle.b_out)
    start = bundle.vectors()[0][torch.randperm(60, generator=torch.Generator().manual_seed(0))[:12]]
    width = torch.cdist(start, start).flatten().median().square()

    def discrepancy(points: Tensor) -> float:
        def kernel(a: Tensor, b: Tensor) -> Tensor:
            return torch.exp(-torch.cdist(a, b).square() / (2 * width)).mean()

        return float(kernel(points, points) - 2 * kernel(points, bundle.vectors()[0]))

    assert found.inertia is not None
    assert float(found.inertia[0]) == pytest.approx(discrepancy(found.bundle.vectors()[0]))
    assert float(found.inertia[0]) < discrepancy(start)


def test_random_keeps_distinct_neurons_of_every_problem_whole() -> None:
    bundle = random_bundle(batch=2, width=12, scale=True)
    found = get_method("random")(bundle, 5, seed=4).bundle
    drawn = sorted(torch.randperm(12, generator=torch.Generator().manual_seed(4))[:5].tolist())
    assert len(set(drawn)) == 5
    assert torch.equal(found.vectors(), bundle.vectors()[:, drawn])
    assert bundle.scale is not None
    assert torch.equal(found.scale, bundle.scale[:, drawn])  # type: ignore[arg-type]
    assert get_method("random")(random_bundle(), 3, seed=0).bundle.scale is None
    everything = get_method("random")(bundle, 12, seed=4).bundle
    assert torch.equal(everything.forward(rows(7)), bundle.forward(rows(7)))


def test_random_draws_every_neuron_as_often_as_any_other() -> None:
    bundle = dataclasses.replace(random_bundle(width=8), w_in=torch.arange(8.0).double().expand(5, -1).T[None])
    kept = [get_method("random")(bundle, 2, seed=seed).bundle.w_in[0, :, 0].long() for seed in range(800)]
    counts = torch.bincount(torch.cat(kept), minlength=8)
    # 200 each on average, with a deviation of 12; the seeds are fixed.
    assert 150 < int(counts.min()) <= int(counts.max()) < 250


def test_svd_has_the_rank_that_the_parameters_allow() -> None:
    bundle = random_bundle(width=40, d=12, d_out=9, gated=True)
    found = get_method("svd")(bundle, 20, seed=0).bundle
    for part in ("w_in", "w_gate", "w_out"):
        before, after = getattr(bundle, part)[0], getattr(found, part)[0]
        rank = rank_for(20, 40, before.shape[1])
        assert rank * (40 + before.shape[1]) <= 20 * before.shape[1] < (rank + 1) * (40 + before.shape[1])
        values = torch.linalg.svdvals(before)
        assert int(torch.linalg.matrix_rank(after)) == rank
        torch.testing.assert_close((before - after).norm(), values[rank:].norm())
    assert found.width == 40


def _curve(*losses: float, step: int = 10) -> list[Choice]:
    return [Choice(step * (n + 1), step * (n + 1), loss) for n, loss in enumerate(losses)]


def test_widths_go_where_the_loss_falls_most() -> None:
    curves = [_curve(1.0, 0.9, 0.8, 0.0), _curve(1.0, 0.4, 0.3, 0.0), _curve(0.01, 0.005, 0.001, 0.0)]
    # 30 parameters are the least; the steps: 10 for .6, then 30 for 1.0 (through a flat start).
    assert [c.width for c in choose(curves, 40)] == [10, 20, 10]
    assert [c.width for c in choose(curves, 70)] == [40, 20, 10]
    assert [c.width for c in choose(curves, 10_000)] == [40, 40, 40]
    with pytest.raises(InputError, match=r"narrowest widths take 0\.250"):
        choose(curves, 29)


@pytest.mark.parametrize("options", [{"calibrated": True}, {"calibrated": False}])
def test_the_default_fusion_groups_by_function(options: dict[str, Any]) -> None:
    """Neurons of equal function but unequal norm of an output column are told apart by what they do, not by scale."""
    bundle = random_bundle(width=40)
    loud = dataclasses.replace(bundle, w_out=bundle.w_out * 100.0)
    known = known_of(loud, rows(80)) if options["calibrated"] else None
    quiet_known = known_of(bundle, rows(80)) if options["calibrated"] else None
    found = get_method("fusion")(loud, 8, seed=0, statistics=known)
    quiet = get_method("fusion")(bundle, 8, seed=0, statistics=quiet_known)
    assert torch.equal(found.counts, quiet.counts)  # type: ignore[arg-type]
    torch.testing.assert_close(found.bundle.w_in, quiet.bundle.w_in)
