"""The compiled k-means engine against the reference, scikit-learn and itself: exactness, invariances, the same bits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from points import nearest_gap, neuron_like, squared_distances
from sklearn.cluster import KMeans
from torch import Tensor

from fusion_kernels import native
from fusion_kernels.kmeans import KMeansResult, Status, cpu_backend, heuristics, kmeans, kmeans_assign
from fusion_kernels.kmeans import reference as reference

pytestmark = pytest.mark.skipif(native.UNAVAILABLE is not None, reason=str(native.UNAVAILABLE))

SHAPES = [(17, 1, 3), (17, 17, 5), (123, 1, 40), (123, 17, 60), (123, 1537, 30), (600, 123, 150), (1537, 17, 200)]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def normal(n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(n, d, generator=g, dtype=torch.float64) + 1).to(dtype)


def random_weights(n: int, seed: int = 1) -> Tensor:
    return 0.1 + 3 * torch.rand(n, generator=torch.Generator().manual_seed(seed))


def assert_same(a: KMeansResult, b: KMeansResult) -> None:
    for name in KMeansResult._fields:
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=0, equal_nan=True, msg=name)


def largest_gap(x: Tensor, labels: Tensor, centroids: Tensor) -> float:
    """How much farther than the nearest the labels' centroids are, relative to the points' squared norms."""
    distances = squared_distances(x, centroids)
    gap = distances.gather(1, labels[:, None]).squeeze(1) - distances.min(1).values
    centred = (x.double() - x.double().mean(0)).square().sum(1)
    return float((gap / (centred + centred.mean() * 1e-6)).max())


# --- the reference ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("algorithm", ["lloyd", "hartigan"])
@pytest.mark.parametrize(("n", "d", "k"), SHAPES)
def test_float64_follows_the_reference(n: int, d: int, k: int, algorithm: str, weighted: bool) -> None:
    x = normal(n, d, seed=n + d, dtype=torch.float64)
    options: dict[str, Any] = {"sample_weight": random_weights(n) if weighted else None, "algorithm": algorithm}
    starts: tuple[Any, ...] = ("k-means++", "random", x[:k] + 0.1, torch.arange(n) % k)
    for init in starts:
        found = kmeans(x, k, init=init, backend="cpu", seed=3, **options)
        expected = kmeans(x, k, init=init, backend="reference", seed=3, **options)
        assert torch.equal(found.labels, expected.labels)
        assert torch.equal(found.n_iter, expected.n_iter)
        assert torch.equal(found.status, expected.status)
        torch.testing.assert_close(found.centroids, expected.centroids, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.inertia, expected.inertia, rtol=1e-12, atol=0)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("n", "d", "k"), SHAPES)
def test_float32_follows_the_reference_but_for_near_ties(n: int, d: int, k: int, weighted: bool) -> None:
    x = normal(n, d, seed=n + d)
    w = random_weights(n) if weighted else None
    found = kmeans(x, k, sample_weight=w, backend="cpu", algorithm="lloyd")
    expected = kmeans(x, k, sample_weight=w, backend="reference", algorithm="lloyd")
    assert float(found.inertia) == pytest.approx(float(expected.inertia), rel=1e-6)
    assert float((found.labels != expected.labels).float().mean()) <= 0.01
    assert largest_gap(x, found.labels, found.centroids) <= 32 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_the_same_seeds_as_the_reference(init: str) -> None:
    x, w = neuron_like(400, 60), random_weights(400)
    for n_init in (1, 4):
        options: dict[str, Any] = {"init": init, "n_init": n_init, "algorithm": "lloyd", "max_iter": 0, "seed": 5}
        found = kmeans(x, 90, sample_weight=w, backend="cpu", **options)
        expected = kmeans(x, 90, sample_weight=w, backend="reference", **options)
        torch.testing.assert_close(found.centroids, expected.centroids, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("max_iter", [0, 1, 2, 3])
@pytest.mark.parametrize("tol", [0.0, 1e-2])
def test_stopped_runs_follow_the_reference(max_iter: int, tol: float) -> None:
    x, w = normal(200, 9, dtype=torch.float64), random_weights(200)
    for init in ("k-means++", x[:40] * 1.5, torch.full((200,), 7)):
        for algorithm in ("lloyd", "hartigan"):
            options: dict[str, Any] = {"init": init, "algorithm": algorithm, "max_iter": max_iter, "tol": tol}
            found = kmeans(x, 40, sample_weight=w, backend="cpu", **options)
            expected = kmeans(x, 40, sample_weight=w, backend="reference", **options)
            assert torch.equal(found.labels, expected.labels)
            assert torch.equal(found.n_iter, expected.n_iter)
            assert torch.equal(found.status, expected.status)
            torch.testing.assert_close(found.centroids, expected.centroids, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(found.inertia, expected.inertia, rtol=1e-12, atol=0)


def test_stopped_while_refilling_keeps_old_centroids() -> None:
    # Cluster 0 loses both points to centroids that lie on them, and no point is left to refill it with.
    x = torch.tensor([[0.0], [0.0], [10.0], [10.0]])
    init = torch.tensor([0, 1, 0, 2])
    found, expected = (kmeans(x, 3, init=init, algorithm="lloyd", backend=b) for b in ("cpu", "reference"))
    assert_same(found, expected)
    assert found.centroids.squeeze(1).tolist() == [5.0, 0.0, 10.0]


@settings(max_examples=60)
@given(
    n=st.integers(2, 90), d=st.integers(1, 40), share=st.floats(0.01, 1.0), seed=st.integers(0, 1000),
    weighted=st.booleans(), copies=st.integers(1, 3), algorithm=st.sampled_from(["lloyd", "hartigan"]),
)  # fmt: skip
def test_any_shape(n: int, d: int, share: float, seed: int, weighted: bool, copies: int, algorithm: str) -> None:
    x = normal(n, d, seed=seed, dtype=torch.float64).repeat(copies, 1)
    k = max(1, round(share * len(x)))
    w = random_weights(len(x), seed).round() if weighted else None
    found, expected = (
        kmeans(x, k, sample_weight=w, algorithm=algorithm, seed=seed, backend=b) for b in ("cpu", "reference")
    )
    assert torch.equal(found.status, expected.status)
    assert torch.equal(found.counts.sum(-1), expected.counts.sum(-1))
    torch.testing.assert_close(found.inertia, expected.inertia, rtol=1e-9, atol=1e-12)


# --- scikit-learn ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_scikit_learn_from_the_same_centroids(weighted: bool) -> None:
    x, w = normal(500, 65), random_weights(500) if weighted else torch.ones(500)
    init = x[:80] + 0.1
    model = KMeans(80, init=init.double().numpy(), n_init=1, tol=0.0, algorithm="lloyd", max_iter=300)
    model.fit(x.double().numpy(), sample_weight=w.double().numpy())
    found = kmeans(x.double(), 80, sample_weight=w, init=init.double(), algorithm="lloyd", backend="cpu", max_iter=300)
    assert torch.equal(found.labels, torch.from_numpy(model.labels_).long())
    assert float(found.inertia) == pytest.approx(model.inertia_, rel=1e-9)


# --- properties ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_hartigan_lowers_what_lloyd_finds(weighted: bool) -> None:
    x, w = neuron_like(600, 123), random_weights(600) if weighted else None
    options: dict[str, Any] = {"sample_weight": w, "seed": 2, "max_iter": 300, "backend": "cpu"}
    lloyd, hartigan = kmeans(x, 150, algorithm="lloyd", **options), kmeans(x, 150, **options)
    assert int(lloyd.status) == int(hartigan.status) == Status.OK
    assert float(hartigan.inertia) < 0.99 * float(lloyd.inertia)
    assert int(hartigan.counts.min()) > 0


def test_moves_reach_the_same_end_as_the_reference_on_large_clusters() -> None:
    # Clusters of hundreds of points exercise the sums that are corrected instead of computed afresh.
    x = torch.cat([neuron_like(700, 20, dtype=torch.float64), torch.randn(60, 20, dtype=torch.float64) * 3])
    for w in (None, random_weights(760)):
        for init in ("random", torch.arange(760) % 9):
            found, expected = (kmeans(x, 9, sample_weight=w, init=init, backend=b) for b in ("cpu", "reference"))
            assert torch.equal(found.labels, expected.labels)
            assert torch.equal(found.n_iter, expected.n_iter)


@pytest.mark.parametrize("algorithm", ["lloyd", "hartigan"])
def test_order_and_place_do_not_matter(algorithm: str) -> None:
    x = normal(300, 33, dtype=torch.float64)
    init = x[:70].clone()
    plain = kmeans(x, 70, init=init, algorithm=algorithm, backend="cpu")
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    shuffled = kmeans(x[order], 70, init=init, algorithm=algorithm, backend="cpu")
    assert torch.equal(shuffled.labels, plain.labels[order])
    moved = kmeans(8 * x + 1000, 70, init=8 * init + 1000, algorithm=algorithm, backend="cpu")
    assert torch.equal(moved.labels, plain.labels)
    assert float(moved.inertia) == pytest.approx(64 * float(plain.inertia), rel=1e-9)


@pytest.mark.parametrize("magnitude", [1e-25, 1e-12, 1e18, 1e30])
def test_any_magnitude_of_float32(magnitude: float) -> None:
    x = normal(150, 20)
    unit = kmeans(x, 30, backend="cpu")
    scaled = kmeans(x * magnitude, 30, backend="cpu")
    assert int(scaled.status) == (Status.LARGE_INERTIA if magnitude > 1e17 else Status.OK)
    assert bool(scaled.inertia.isinf()) == (magnitude > 1e17)
    assert torch.equal(scaled.counts.sum(), unit.counts.sum())
    torch.testing.assert_close(scaled.centroids / magnitude, unit.centroids, rtol=1e-4, atol=1e-4)


def test_near_duplicates_do_not_cycle() -> None:
    x = neuron_like(400, 129).repeat(2, 1)
    x += 1e-7 * x.abs() * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    for seed in range(3):
        result = kmeans(x, 200, algorithm="lloyd", backend="cpu", seed=seed, init="random")
        assert int(result.status) == Status.OK
        assert int(result.n_iter) < 60


# --- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("algorithm", ["lloyd", "hartigan"])
def test_threads_do_not_change_a_bit(algorithm: str, dtype: torch.dtype) -> None:
    x = torch.stack([neuron_like(1100, 65, seed=s, dtype=dtype) for s in range(2)])
    w = torch.stack([random_weights(1100, seed=s) for s in range(2)])
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(
            [
                kmeans(x, 200, sample_weight=w, algorithm=algorithm, backend="cpu"),
                kmeans(x[0], 200, algorithm=algorithm, n_init=2, backend="cpu"),
                kmeans(x[1], 200, algorithm=algorithm, init=x[1, :200].clone(), backend="cpu"),
            ]
        )
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("algorithm", ["lloyd", "hartigan"])
def test_the_workspace_does_not_change_a_bit(algorithm: str) -> None:
    x = torch.stack([neuron_like(200, 33, seed=s) for s in range(5)])
    x[3, 7] = math.nan
    whole = kmeans(x, 40, algorithm=algorithm, backend="cpu")
    one = heuristics.gram_bytes(200, 40, 4, 4)
    assert_same(kmeans(x, 40, algorithm=algorithm, backend="cpu", workspace_bytes=one), whole)
    assert_same(kmeans(x, 40, algorithm=algorithm, backend="cpu", workspace_bytes=3 * one), whole)
    for b in range(5):
        alone = kmeans(x[b].clone(), 40, algorithm=algorithm, backend="cpu")
        assert_same(KMeansResult(*(field[b] for field in whole)), alone)


def test_problems_without_weights_beside_others() -> None:
    x = torch.stack([neuron_like(90, 17, seed=s) for s in range(4)])
    w = torch.stack([random_weights(90, seed=s) for s in range(4)])
    w[1, ::3] = 0
    w[2] = 0
    batch = kmeans(x, 20, sample_weight=w, backend="cpu")
    for b in range(4):
        alone = kmeans(x[b].clone(), 20, sample_weight=w[b].clone(), backend="cpu")
        assert_same(KMeansResult(*(field[b] for field in batch)), alone)
    assert batch.status.tolist() == [Status.OK, Status.OK, Status.ZERO_WEIGHT, Status.OK]


def test_inference_mode_and_reduced_precision_change_nothing() -> None:
    x = neuron_like(300, 65)
    expected = kmeans(x, 50, backend="cpu")
    with torch.inference_mode():
        assert_same(kmeans(x.clone(), 50, backend="cpu"), expected)
    torch.set_float32_matmul_precision("medium")
    try:
        assert_same(kmeans(x, 50, backend="cpu"), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


# --- the direct form -------------------------------------------------------------------------------------------------


def test_the_direct_form_finds_the_same() -> None:
    x, w = normal(400, 33, dtype=torch.float64), random_weights(400)
    least = 400 * 30 * 8
    for algorithm in ("lloyd", "hartigan"):
        for init in ("k-means++", "random", x[:30].clone(), torch.arange(400) % 30):
            options: dict[str, Any] = {"sample_weight": w, "init": init, "algorithm": algorithm, "backend": "cpu"}
            gram, direct = kmeans(x, 30, **options), kmeans(x, 30, **options, workspace_bytes=least)
            assert torch.equal(gram.labels, direct.labels)
            assert torch.equal(gram.n_iter, direct.n_iter)
            torch.testing.assert_close(gram.centroids, direct.centroids, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(gram.inertia, direct.inertia, rtol=1e-12, atol=0)


def test_the_direct_form_in_float32() -> None:
    x = normal(500, 33)
    x[3] = math.inf
    spoilt = kmeans(x, 20, workspace_bytes=500 * 20 * 4, backend="cpu")
    assert int(spoilt.status) == Status.NON_FINITE
    x[3] = 0
    for max_iter in (1, 100):
        result = kmeans(x, 20, algorithm="lloyd", max_iter=max_iter, workspace_bytes=500 * 20 * 4, backend="cpu")
        assert largest_gap(x, result.labels, result.centroids) <= 64 * torch.finfo(torch.float32).eps
        distances = squared_distances(x, result.centroids).gather(1, result.labels[:, None])
        assert float(result.inertia) == pytest.approx(float(distances.sum()), rel=1e-6)


def test_hartigan_moves_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"400 points and 30 clusters need more than workspace_bytes=1000: raise it"):
        kmeans(normal(400, 5), 30, workspace_bytes=1000, backend="cpu")
    assert int(kmeans(normal(400, 5), 30, algorithm="lloyd", workspace_bytes=1000, backend="cpu").status) == Status.OK
    with pytest.raises(ValueError, match="workspace_bytes is 0: pass at least 1"):
        kmeans(normal(400, 5), 30, workspace_bytes=0)


def test_the_form_is_chosen_by_cost() -> None:
    def shape(n: int, d: int, k: int, **options: Any) -> heuristics.Shape:
        defaults: dict[str, Any] = {"n_init": 1, "seeding": "k-means++", "hartigan": False, "max_iter": 100}
        return heuristics.Shape(n, d, k, **{**defaults, **options})

    for n, d, k in ((3072, 1537, 768), (4096, 2049, 1024), (2048, 21504, 512), (14336, 12288, 3584)):
        for options in ({}, {"n_init": 10}, {"hartigan": True}, {"seeding": "random"}, {"seeding": "centroids"}):
            assert heuristics.prefers_gram(shape(n, d, k, **options)), (n, d, k, options)
    assert not heuristics.prefers_gram(shape(100_000, 64, 50, seeding="random"))
    assert not heuristics.prefers_gram(shape(100_000, 128, 1000, seeding="centroids"))
    assert heuristics.gram_cost(shape(3072, 1537, 768, n_init=10)) < 10 * heuristics.gram_cost(shape(3072, 1537, 768))
    assert heuristics.gram_cost(shape(900, 70, 90)) < heuristics.gram_cost(shape(900, 70, 90, hartigan=True))
    assert heuristics.trials(1) == 2
    assert heuristics.trials(768) == 8


# --- nearest centroids -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "d", "k"), [(1, 1, 1), (17, 1, 5), (123, 17, 1), (1537, 17, 123), (40, 1537, 700)])
def test_assign(n: int, d: int, k: int, dtype: torch.dtype, backend: str) -> None:
    x = torch.stack([normal(n, d, seed=s, dtype=dtype) for s in range(2)])
    centroids = torch.stack([normal(k, d, seed=9 + s, dtype=dtype) for s in range(2)])
    labels = kmeans_assign(x, centroids, backend=backend)
    assert labels.dtype == torch.int64
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    for b in range(2):
        assert nearest_gap(x[b], centroids[b], labels[b]) <= 32 * eps
        assert torch.equal(kmeans_assign(x[b], centroids[b], backend=backend), labels[b])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_assign_edge_cases(backend: str) -> None:
    x = torch.tensor([[0.0], [1.0], [2.0], [3.0], [7.0], [math.nan]])
    assert kmeans_assign(x, torch.tensor([[3.0], [1.0], [3.0]]), backend=backend).tolist() == [1, 1, 0, 0, 0, 0]
    assert kmeans_assign(x[:0], x[:2], backend=backend).tolist() == []
    assert kmeans_assign(torch.zeros(0, 4, 2), torch.zeros(0, 3, 2), backend=backend).shape == (0, 4)
    far = kmeans_assign(x[:5] + 2.0**20, torch.tensor([[3.0], [1.0], [3.0]]) + 2.0**20, backend=backend)
    assert far.tolist() == [1, 1, 0, 0, 0]


def test_assign_agrees_with_the_labels() -> None:
    x = torch.stack([neuron_like(300, 65, seed=s) for s in range(2)])
    result = kmeans(x, 60, algorithm="lloyd")
    labels = kmeans_assign(x, result.centroids)
    for b in range(2):
        assert largest_gap(x[b], labels[b], result.centroids[b]) <= 32 * torch.finfo(torch.float32).eps


def test_assign_as_an_operator() -> None:
    args = (normal(30, 4)[None], normal(6, 4)[None])
    torch.library.opcheck(torch.ops.fusion_kernels.kmeans_assign.default, args)
    compiled = torch.compile(lambda x, c: kmeans_assign(x, c) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(args[0], args[1]), kmeans_assign(*args) + 1)


ERRORS: list[tuple[type[Exception], str, Any, Any]] = [
    (TypeError, "centroids is list: pass a torch.Tensor", torch.zeros(4, 3), [[0.0]]),
    (TypeError, r"centroids is torch\.int64: convert", torch.zeros(4, 3), torch.zeros(2, 3, dtype=torch.int64)),
    (ValueError, r"centroids has shape \(2, 4\): this x needs \(K, 3\)", torch.zeros(4, 3), torch.zeros(2, 4)),
    (ValueError, r"centroids has shape \(2, 3\): this x needs \(5, K, 3\)", torch.zeros(5, 4, 3), torch.zeros(2, 3)),
    (ValueError, r"centroids has shape \(0, 3\): pass at least one", torch.zeros(4, 3), torch.zeros(0, 3)),
    (ValueError, "centroids is on meta: move it to cpu", torch.zeros(4, 3), torch.zeros(2, 3, device="meta")),
    (ValueError, r"x has shape \(3,\): pass \(N, D\)", torch.zeros(3), torch.zeros(2, 3)),
]


@pytest.mark.parametrize(("kind", "message", "x", "centroids"), ERRORS, ids=[e[1][:40] for e in ERRORS])
def test_assign_errors(kind: type[Exception], message: str, x: Any, centroids: Any) -> None:
    with pytest.raises(kind, match=message):
        kmeans_assign(x, centroids)


# --- the compiled steps ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 17, 255, 256, 257, 700])
def test_gram_matrices(n: int) -> None:
    x = torch.stack([neuron_like(n, 40, seed=s) for s in range(2)])
    points, offset, scale = native.operators().prepare(x, torch.ones(2, n, dtype=torch.float64))
    gram = native.operators().gram(points)
    assert torch.equal(gram[:, :, :n], gram[:, :, :n].transpose(1, 2))
    assert not bool(gram[:, :, n:].any())
    centred = (x.double() - offset[:, None]) * scale[:, None, None]
    expected = centred @ centred.transpose(1, 2)
    torch.testing.assert_close(gram[:, :, :n].double(), expected, rtol=1e-5, atol=1e-6 * float(expected.max()) + 1e-30)
    torch.testing.assert_close(offset, x.double().mean(1), rtol=1e-12, atol=1e-12)


def test_steps_check_what_they_read() -> None:
    ops = native.operators()
    x, w = torch.zeros(1, 8, 3), torch.ones(1, 8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="w: wrong device, dtype, shape or strides"):
        ops.prepare(x, w.float())
    with pytest.raises(RuntimeError, match="float32 or float64 expected"):
        ops.gram(x.half())
    gram = ops.gram(x)
    with pytest.raises(RuntimeError, match="pass one start"):
        ops.cluster(gram, w, None, None, None, None, None, 2, 1, False, 5, 0.0, 3)
    with pytest.raises(RuntimeError, match="labels: wrong device"):
        ops.cluster(gram, w, None, None, torch.zeros(1, 7, dtype=torch.int64), None, None, 2, 1, False, 5, 0.0, 3)


def test_levels_are_the_stream_of_one_draw_after_the_other() -> None:
    first, rest = reference.seeding_levels(20, torch.Generator().manual_seed(4))
    g = torch.Generator().manual_seed(4)
    draws = [torch.rand(1, dtype=torch.float64, generator=g)]
    draws += [torch.rand(heuristics.trials(20), dtype=torch.float64, generator=g) for _ in range(19)]
    assert torch.equal(torch.cat([first, rest.flatten()]), torch.cat(draws))


def test_default_workspace_is_documented() -> None:
    assert cpu_backend.WORKSPACE_BYTES == 2 << 30
