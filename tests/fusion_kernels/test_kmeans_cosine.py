"""Spherical k-means against a plain-loop float64 oracle, its invariants by brute force, and its degenerate inputs."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from fusion_kernels import backends, kmeans_assign, native
from fusion_kernels import kmeans as public_kmeans
from fusion_kernels.kmeans import OPERATOR, KMeansResult, Status
from fusion_kernels.kmeans import reference as reference
from fusion_kernels.kmeans.types import Metric, Options
from fusion_kernels.library import BackendUnavailableError

Array = npt.NDArray[Any]

BACKENDS = ("reference",) if native.UNAVAILABLE else ("reference", "cpu")
ALGORITHMS = ("lloyd", "hartigan")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def kmeans(x: Tensor, n_clusters: int, **options: Any) -> KMeansResult:
    return public_kmeans(x, n_clusters, metric="cosine", **options)


def rays(n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Overlapping bundles of rays of very different lengths."""
    g = torch.Generator().manual_seed(seed)
    middle = torch.randn(7, d, generator=g, dtype=torch.float64)
    x = middle[torch.randint(7, (n,), generator=g)] + 0.7 * torch.randn(n, d, generator=g, dtype=torch.float64)
    return (x * torch.randn(n, 1, generator=g, dtype=torch.float64).mul(2).exp()).to(dtype)


def random_weights(n: int, seed: int = 1) -> Tensor:
    return 0.1 + 3 * torch.rand(n, generator=torch.Generator().manual_seed(seed))


# --- the oracle, which knows nothing of squared distances ------------------------------------------------------------


def unit(x: Tensor) -> Tensor:
    rows = x.double()
    return rows / rows.norm(dim=-1, keepdim=True)


def cosines(x: Tensor, centroids: Tensor) -> Tensor:
    return torch.stack([(unit(x) * c).sum(1) for c in unit(centroids)], dim=1)


def oracle_lloyd(x: Tensor, w: Tensor, init: Tensor, max_iter: int) -> tuple[Array, Array, list[float]]:
    """Labels, centroids, and the inertia of every pass, point by point, from given centroids; clusters stay filled."""
    points, weights, centroids = unit(x).numpy(), w.double().numpy(), unit(init).numpy().copy()
    labels: Array = np.full(len(points), -1)
    inertias: list[float] = []
    for _ in range(max_iter):
        new = np.array([int(np.argmax([p @ c for c in centroids])) for p in points])
        assert len(set(new.tolist())) == len(centroids), "choose data that keep every cluster filled"
        if (new == labels).all():
            break
        labels = new
        for k in range(len(centroids)):
            total = sum(weights[j] * points[j] for j in range(len(points)) if labels[j] == k)
            centroids[k] = total / math.sqrt(total @ total)
        inertias.append(sum(weights[j] * (1 - points[j] @ centroids[labels[j]]) for j in range(len(points))))
    return labels, centroids, inertias


def inertia_of(x: Tensor, w: Tensor, labels: Tensor, K: int) -> float:
    """Sum of weights less that of the norms of all clusters' sums: what the best centroids leave."""
    rows, weights = unit(x), w.double()
    sums = torch.stack([(weights[labels == k, None] * rows[labels == k]).sum(0) for k in range(K)])
    return float(weights.sum() - sums.norm(dim=1).sum())


def assert_valid(x: Tensor, w: Tensor, found: KMeansResult, *, at_means: bool = True) -> None:
    """All that is promised of one problem without points of zeros."""
    eps, K = torch.finfo(found.centroids.dtype).eps, len(found.centroids)
    norms = found.centroids.double().norm(dim=1)
    assert float((norms - 1).abs().max()) <= 4 * eps
    all_cosines = cosines(x, found.centroids)
    own = all_cosines.gather(1, found.labels[:, None]).squeeze(1)
    assert float((all_cosines.amax(1) - own).max()) <= 16 * eps, "labels are nearest by gap"
    assert torch.equal(found.counts, torch.bincount(found.labels, minlength=K))
    assert float(found.inertia) == pytest.approx(float((w.double() * (1 - own)).sum()), rel=1e-5, abs=1e-6)
    if at_means:
        for k in range(K):
            total = (w.double()[:, None] * unit(x))[found.labels == k].sum(0)
            if float(total.norm()) > 1e-3:
                error = float((total / total.norm() - found.centroids[k].double()).abs().max())
                assert error <= 8 * eps / float(total.norm() / w[found.labels == k].sum())


# --- Lloyd -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "d", "k"), [(17, 2, 1), (17, 17, 5), (123, 3, 5), (123, 17, 40), (300, 33, 7)])
def test_lloyd_matches_the_oracle(n: int, d: int, k: int, dtype: torch.dtype, weighted: bool, backend: str) -> None:
    x = rays(n, d, seed=n + d, dtype=dtype)
    w = random_weights(n) if weighted else torch.ones(n)
    init = 7 * x[:k] + 0.01
    labels, centroids, inertias = oracle_lloyd(x, w, init, 100)
    found = kmeans(
        x, k, sample_weight=w if weighted else None, init=init, algorithm="lloyd", max_iter=100, backend=backend
    )
    own, expected = (
        cosines(x, torch.from_numpy(centroids)).gather(1, y[:, None]) for y in (found.labels, torch.from_numpy(labels))
    )
    assert float((own - expected).abs().max()) <= 1e-6
    torch.testing.assert_close(found.centroids.double(), torch.from_numpy(centroids), rtol=1e-5, atol=1e-6)
    assert float(found.inertia) == pytest.approx(inertias[-1], rel=1e-5)
    assert int(found.status) == Status.OK
    assert_valid(x, w, found)


def test_the_inertia_never_rises(backend: str) -> None:
    x, w = rays(200, 9, dtype=torch.float64), random_weights(200)
    options: dict[str, Any] = {"sample_weight": w, "init": x[:30].clone(), "backend": backend}
    path = [kmeans(x, 30, algorithm="lloyd", max_iter=i, **options) for i in range(6)]
    path += [kmeans(x, 30, max_iter=i, **options) for i in (30, 31, 32, 100)]
    inertias = [float(found.inertia) for found in path]
    assert inertias == sorted(inertias, reverse=True)
    assert inertias[-1] < 0.995 * float(kmeans(x, 30, algorithm="lloyd", **options).inertia)
    for found in path:
        assert_valid(x, w, found, at_means=False)


@pytest.mark.parametrize("init", ["k-means++", "random"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_seeded_runs_end_at_a_fixed_point(dtype: torch.dtype, algorithm: str, init: str, backend: str) -> None:
    x, w = rays(150, 11, dtype=dtype), random_weights(150)
    found = kmeans(x, 20, sample_weight=w, init=init, algorithm=algorithm, n_init=2, backend=backend, seed=4)
    assert int(found.status) == Status.OK
    assert_valid(x, w, found)


@pytest.mark.parametrize("start", ["k-means++", "random", "centroids", "labels"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.skipif(native.UNAVAILABLE is not None, reason=str(native.UNAVAILABLE))
def test_the_compiled_backend_follows_the_reference(algorithm: str, start: str) -> None:
    x, w = rays(150, 13, dtype=torch.float64), random_weights(150).double()
    init = {"centroids": x[:25] + 0.1, "labels": torch.arange(150) % 25}.get(start, start)
    for max_iter in (0, 1, 2, 100):
        found, expected = (
            kmeans(x, 25, sample_weight=w, init=init, algorithm=algorithm, max_iter=max_iter, seed=3, backend=b)
            for b in ("cpu", "reference")
        )
        for name in ("labels", "counts", "n_iter", "status"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
        torch.testing.assert_close(found.centroids, expected.centroids, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.inertia, expected.inertia, rtol=1e-10, atol=0)


@pytest.mark.skipif(native.UNAVAILABLE is not None, reason=str(native.UNAVAILABLE))
def test_the_best_of_several_seedings_is_that_of_the_reference() -> None:
    x = rays(150, 13, dtype=torch.float64)
    options: dict[str, Any] = {"algorithm": "lloyd", "max_iter": 1, "seed": 2}
    found, expected = (kmeans(x, 25, n_init=4, backend=b, **options) for b in ("cpu", "reference"))
    assert torch.equal(found.labels, expected.labels)
    assert float(expected.inertia) < 0.999 * float(kmeans(x, 25, backend="reference", **options).inertia)


def test_what_is_settled_has_directions_for_means(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second pass of settling, which no rounding here brings about."""
    means: list[Any] = []
    settle = reference.settle
    monkeypatch.setattr(reference, "settle", lambda *given: (means.append(given[5]), settle(*given))[1])
    x = unit(rays(40, 5))
    kmeans(x, 6, backend="reference")
    found = means[0](x, torch.ones(40, dtype=torch.float64), torch.arange(40) % 6, x[:6])
    torch.testing.assert_close(found.norm(dim=1), torch.ones(6, dtype=torch.float64))


def test_tol_is_relative_to_the_mean_square_of_a_column(backend: str) -> None:
    x = rays(300, 9, dtype=torch.float64)
    options: dict[str, Any] = {"init": x[:20].clone(), "algorithm": "lloyd", "backend": backend}
    path = [kmeans(x, 20, **options, max_iter=i).centroids for i in range(6)]
    shifts = [float((b - a).square().sum()) * 9 for a, b in itertools.pairwise(path)]
    step = next(i for i in range(1, 5) if shifts[i] < min(shifts[:i]))
    found = kmeans(x, 20, **options, tol=math.sqrt(shifts[step] * min(shifts[:step])))
    assert int(found.n_iter) == step + 1
    assert int(found.status) == Status.OK


# --- moves -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "d", "k"), [(17, 2, 5), (40, 17, 11), (60, 5, 30)])
def test_hartigan_ends_where_no_single_move_helps(
    n: int, d: int, k: int, dtype: torch.dtype, weighted: bool, backend: str
) -> None:
    x, w = rays(n, d, dtype=dtype), random_weights(n) if weighted else torch.ones(n)
    found = kmeans(x, k, sample_weight=w, seed=2, backend=backend)
    assert int(found.status) == Status.OK
    assert int(found.counts.min()) > 0
    assert_valid(x, w, found)
    reached = inertia_of(x, w, found.labels, k)
    assert float(found.inertia) == pytest.approx(reached, rel=1e-5, abs=1e-6)
    for j in range(n):
        for to in range(k):
            if int(found.counts[found.labels[j]]) > 1:
                moved = found.labels.clone()
                moved[j] = to
                assert inertia_of(x, w, moved, k) >= reached - 1e-6 * float(w.sum())


# --- degenerate inputs -----------------------------------------------------------------------------------------------


def test_lengths_mean_nothing(backend: str) -> None:
    x = rays(90, 6, dtype=torch.float64)
    lengths = torch.randn(90, 1, generator=torch.Generator().manual_seed(5), dtype=torch.float64).mul(30).exp()
    lengths[:2] = torch.tensor([[1e-250], [1e250]], dtype=torch.float64)
    near, far = kmeans(x, 12, backend=backend), kmeans(unit(x) * lengths, 12, backend=backend)
    assert torch.equal(near.labels, far.labels)
    assert float(near.inertia) == pytest.approx(float(far.inertia), rel=1e-9)
    assert int(far.status) == Status.OK


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_points_of_zeros_shape_nothing(algorithm: str, backend: str) -> None:
    x, w = rays(80, 5), random_weights(80)
    zeros = torch.zeros(80, dtype=torch.bool)
    zeros[::7] = True
    x[zeros] = 0
    options: dict[str, Any] = {"algorithm": algorithm, "backend": backend, "seed": 6}
    for weight in (w, None):
        found = kmeans(x, 9, sample_weight=weight, **options)
        some = kmeans(x[~zeros], 9, sample_weight=None if weight is None else weight[~zeros], **options)
        assert torch.equal(found.labels[~zeros], some.labels)
        assert torch.equal(found.centroids, some.centroids)
        assert torch.equal(found.inertia, some.inertia)
        assert found.labels[zeros].tolist() == [0] * int(zeros.sum())
        assert torch.equal(found.counts, torch.bincount(found.labels, minlength=9))


def test_points_of_zeros_go_to_the_first_cluster_that_has_points(backend: str) -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.1], [2.0, 0.0]])
    found = kmeans(x, 2, init=torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), max_iter=0, backend=backend)
    assert found.labels.tolist() == [1, 1, 1, 1]
    assert found.counts.tolist() == [0, 4]


def test_nothing_but_zeros(backend: str) -> None:
    found = kmeans(torch.stack([torch.zeros(6, 3), rays(6, 3)]), 2, backend=backend)
    assert found.status.tolist() == [Status.ZERO_WEIGHT, Status.OK]
    assert not bool(found.labels[0].any())
    assert not bool(found.centroids[0].any())
    assert float(found.inertia[0]) == 0
    assert found.counts[0].tolist() == [6, 0]
    assert_valid(rays(6, 3), torch.ones(6), KMeansResult(*(field[1] for field in found)))


@pytest.mark.parametrize("k", [4, 5, 9])
def test_as_many_clusters_as_points(k: int, backend: str) -> None:
    x = rays(4, 3)
    found = kmeans(x, k, backend=backend)
    assert found.labels.tolist() == [0, 1, 2, 3]
    assert float(found.inertia) == 0
    assert int(found.status) == (Status.OK if k == 4 else Status.EMPTY_CLUSTERS)
    torch.testing.assert_close(found.centroids, unit(x[torch.arange(k).clamp(max=3)]).float(), rtol=1e-6, atol=1e-7)
    x[1] = 0
    found = kmeans(x, k, backend=backend)
    assert found.labels.tolist() == [0, 0, 1, 2]
    assert float((found.centroids.norm(dim=1) - 1).abs().max()) < 1e-6, "no cluster is a point of zeros"


def test_one_point_and_none(backend: str) -> None:
    found = kmeans(torch.tensor([[3.0, 4.0]]), 1, backend=backend)
    torch.testing.assert_close(found.centroids, torch.tensor([[0.6, 0.8]]))
    assert int(found.status) == Status.OK
    none = kmeans(torch.zeros(2, 0, 3), 4, backend=backend)
    assert [tuple(f.shape) for f in none] == [(2, 0), (2, 4, 3), (2,), (2, 4), (2,), (2,)]
    none = kmeans(torch.zeros(0, 9, 3), 4, sample_weight=torch.zeros(0, 9), backend=backend)
    assert [tuple(f.shape) for f in none] == [(0, 9), (0, 4, 3), (0,), (0, 4), (0,), (0,)]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_fewer_directions_than_clusters(algorithm: str, backend: str) -> None:
    """Duplicates, and points that differ in length only."""
    directions = torch.tensor([[1.0, 2.0, 0.0], [0.0, -1.0, 3.0], [2.0, 0.0, 1.0]], dtype=torch.float64)
    x = torch.cat([directions, 2 * directions, directions, 5 * directions])
    found = kmeans(x, 5, algorithm=algorithm, backend=backend)
    assert int(found.status) == Status.EMPTY_CLUSTERS
    assert float(found.inertia) == pytest.approx(0, abs=1e-12)
    assert len(set(found.labels.tolist())) == 3
    assert bool(found.centroids.isfinite().all())
    torch.testing.assert_close(found.centroids.norm(dim=1), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opposite_points_keep_the_centroid_that_was_there(algorithm: str, dtype: torch.dtype, backend: str) -> None:
    x = torch.tensor([[1.0, 2.0], [-1.0, -2.0], [2.0, 4.0], [-0.5, -1.0]], dtype=dtype)
    init = torch.tensor([[3.0, 0.0]], dtype=dtype)
    found = kmeans(x, 1, init=init, algorithm=algorithm, backend=backend)
    assert int(found.status) == Status.OK
    assert found.centroids.tolist() == [[1.0, 0.0]]
    assert float(found.inertia) == pytest.approx(4.0, rel=1e-6), "W - |S|, with any centroid"
    seeded = kmeans(x, 1, algorithm=algorithm, backend=backend)
    assert float((seeded.centroids.norm() - 1).abs()) < 1e-6
    two = kmeans(x, 2, algorithm=algorithm, backend=backend)
    assert float(two.inertia) == pytest.approx(0, abs=1e-6)
    thirds = torch.tensor([[math.cos(a), math.sin(a)] for a in (0.3, 0.3 + 2 * math.pi / 3, 0.3 + 4 * math.pi / 3)])
    found = kmeans(thirds.to(dtype), 1, init=init, algorithm=algorithm, backend=backend)
    assert found.centroids.tolist() == [[1.0, 0.0]]


def test_labels_of_opposite_points_start_from_zeros(backend: str) -> None:
    """Given labels whose clusters have no direction: there was no centroid before, and the first point stands in."""
    x = torch.cat([rays(6, 4), -rays(6, 4), rays(9, 4, seed=3)])
    found = kmeans(x, 7, init=torch.cat([torch.arange(6).repeat(2), torch.full((9,), 6)]), backend=backend)
    assert int(found.status) == Status.OK
    assert_valid(x, torch.ones(21), found)
    x = torch.tensor([[0.0, 2.0], [0.0, -3.0], [0.0, 5.0], [0.0, -7.0]])
    for max_iter in (0, 5):
        found = kmeans(x, 1, init=torch.zeros(4, dtype=torch.int64), max_iter=max_iter, backend=backend)
        assert found.centroids.tolist() == [[0.0, 1.0]]
        assert float(found.inertia) == 4
    found = kmeans(x, 3, init=torch.zeros(4, dtype=torch.int64), max_iter=0, backend=backend)
    assert found.centroids.norm(dim=1).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_spoils_its_own_problem_only(value: float, backend: str) -> None:
    x = torch.stack([rays(50, 4, seed=s) for s in range(3)])
    clean = kmeans(x, 6, backend=backend)
    x[1, 7, 2] = value
    found = kmeans(x, 6, backend=backend)
    assert found.status.tolist() == [Status.OK, Status.NON_FINITE, Status.OK]
    assert bool(found.centroids[1].isnan().all())
    for b in (0, 2):
        assert torch.equal(found.centroids[b], clean.centroids[b])
    x[1, 7] = 0
    init = x[:, :6].clone()
    init[0, 3, 1] = value
    found = kmeans(x, 6, init=init, backend=backend)
    assert found.status.tolist()[0] == Status.NON_FINITE
    assert int(found.status[1]) == int(found.status[2]) == Status.OK


# --- batches, dtypes, determinism ------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_problem_is_the_same_alone_and_in_a_batch(dtype: torch.dtype, algorithm: str, backend: str) -> None:
    x = torch.stack([rays(123, 17, seed=s, dtype=dtype) for s in range(3)])
    w = torch.stack([random_weights(123, seed=s) for s in range(3)])
    w[1, ::5], x[2, ::9] = 0, 0
    before = x.clone(), w.clone()
    for init in ("k-means++", "random", x[:, 1:9].clone(), torch.arange(123).remainder(8).repeat(3, 1)):
        options: dict[str, Any] = {"algorithm": algorithm, "seed": 7, "backend": backend}
        batch = kmeans(x, 8, sample_weight=w, init=init, **options)
        for b in range(3):
            own = init if isinstance(init, str) else init[b].clone()
            alone = kmeans(x[b].clone(), 8, sample_weight=w[b].clone(), init=own, **options)
            for name in KMeansResult._fields:
                assert torch.equal(getattr(batch, name)[b], getattr(alone, name)), name
    assert torch.equal(x, before[0])
    assert torch.equal(w, before[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    x = rays(60, 5).clamp(-100, 100).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    found = kmeans(x, 8)
    assert found.centroids.dtype == found.inertia.dtype == wide
    same = kmeans(x.to(wide), 8)
    for name in KMeansResult._fields:
        assert torch.equal(getattr(found, name), getattr(same, name)), name
    assert not kmeans(x.clone().requires_grad_(), 5).centroids.requires_grad


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("start", ["none", "centroids", "labels"])
def test_opcheck(start: str, weighted: bool) -> None:
    x = torch.stack([rays(23, 3, seed=s) for s in range(2)])
    w = torch.stack([random_weights(23, seed=s) for s in range(2)]) if weighted else None
    init = {"none": None, "centroids": x[:, :4].clone(), "labels": torch.arange(23).remainder(4).repeat(2, 1)}[start]
    args = (x, w, init, 4, "k-means++", 1, "hartigan", 20, 0.0, 3, None, "cosine")
    torch.library.opcheck(torch.ops.fusion_kernels.kmeans.default, args)


def test_compiles_to_one_operator() -> None:
    x = rays(40, 3)
    compiled = torch.compile(lambda x: kmeans(x, 5, seed=1).centroids + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), kmeans(x, 5, seed=1).centroids + 1)


@pytest.mark.skipif(native.UNAVAILABLE is not None, reason=str(native.UNAVAILABLE))
def test_moves_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"400 points and 30 clusters need more than workspace_bytes=1000: raise it"):
        kmeans(rays(400, 5), 30, workspace_bytes=1000, backend="cpu")
    assert int(kmeans(rays(400, 5), 30, algorithm="lloyd", workspace_bytes=1000, backend="cpu").status) == Status.OK


@pytest.mark.skipif(native.UNAVAILABLE is not None, reason=str(native.UNAVAILABLE))
def test_what_float32_cannot_tell_apart_is_found_in_float64() -> None:
    """Pairs a millionth apart: float32 products know nothing of them."""
    g = torch.Generator().manual_seed(0)
    pairs = torch.randn(30, 6, generator=g, dtype=torch.float64)
    x = torch.cat([pairs, pairs + 1e-6 * torch.randn(30, 6, generator=g, dtype=torch.float64)]).float()
    found, expected = (kmeans(x, 30, backend=b, seed=2) for b in ("cpu", "reference"))
    assert torch.equal(found.labels, expected.labels)
    torch.testing.assert_close(found.inertia, expected.inertia, rtol=1e-4, atol=0)


# --- nearest centroids -----------------------------------------------------------------------------------------------


def test_assign_is_by_the_angle(backend: str) -> None:
    x = torch.tensor([[1.0, 0.0], [9.0, 1.0], [0.0, 0.1], [-1.0, -1.0], [0.0, 0.0]])
    centroids = torch.tensor([[-5.0, -5.0], [0.0, 50.0], [0.01, 0.0]])
    assert kmeans_assign(x, centroids, metric="cosine", backend=backend).tolist() == [2, 2, 1, 0, 0]
    many = torch.stack([rays(300, 9, seed=s) for s in range(2)])
    found = kmeans(many, 20)
    labels = kmeans_assign(many, 3 * found.centroids, metric="cosine", backend=backend)
    for b in range(2):
        all_cosines = cosines(many[b], found.centroids[b])
        gap = all_cosines.amax(1) - all_cosines.gather(1, labels[b][:, None]).squeeze(1)
        assert float(gap.max()) <= 16 * torch.finfo(torch.float32).eps
    with pytest.raises(ValueError, match="unknown metric 'angle': use one of euclidean, cosine"):
        kmeans_assign(x, centroids, metric="angle")


# --- errors, and those who decline -----------------------------------------------------------------------------------


def test_an_unknown_metric_is_an_error_everywhere() -> None:
    x, message = torch.zeros(6, 3), "unknown metric 'angle': use one of euclidean, cosine"
    with pytest.raises(ValueError, match=message):
        public_kmeans(x, 2, metric="angle")
    arguments = (x[None], None, None, 2, "k-means++", 1, "lloyd", 5, 0.0, 0, None, "angle")
    with pytest.raises(ValueError, match=message):
        torch.ops.fusion_kernels.kmeans(*arguments)
    for backend in OPERATOR.backends:
        with pytest.raises(ValueError, match=message):
            backend.function(*arguments)


def test_a_centroid_of_zeros_is_refused(backend: str) -> None:
    x, init = rays(9, 3), rays(2, 3)
    init[1] = 0
    with pytest.raises(ValueError, match="init holds a centroid of zeros, which has no direction: pass another"):
        kmeans(x, 2, init=init, backend=backend)
    public_kmeans(x, 2, init=init, backend=backend)


def test_the_triton_backends_decline() -> None:
    """In words that `backends()` repeats; where they would be first, the next one answers."""
    reason = "it has no metric='cosine': use backend='reference'"
    for name in ("triton", "triton-fast"):
        backend = next(b for b in OPERATOR.backends if b.name == name)
        assert backend.takes(Options(3)) is None
        assert backend.takes(Options(3, metric=Metric.COSINE)) == reason
        assert reason in backends()["kmeans"][f"{name} declines"]
        with pytest.raises(BackendUnavailableError, match=f"kmeans: backend '{name}'"):
            kmeans(rays(9, 3), 2, backend=name)
    assert "cpu declines" not in backends()["kmeans"]
