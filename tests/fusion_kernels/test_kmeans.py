"""k-means against a plain-loop float64 oracle, its invariants by brute force, its edge cases; on every CPU backend."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from kmeans_oracle import (
    assert_consistent,
    assert_means,
    assert_nearest,
    best_single_move,
    oracle_lloyd,
    squared_distances,
)
from torch import Tensor

from fusion_kernels import kmeans as public_kmeans
from fusion_kernels import native
from fusion_kernels.kmeans import KMeansResult, Status

INITS = ("k-means++", "random")
BACKENDS = ("reference",) if native.UNAVAILABLE else ("reference", "cpu")
#: Options that `kmeans` below adds to every call: the backend under test.
COMMON: dict[str, Any] = {}


@pytest.fixture(autouse=True, params=BACKENDS)
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMON, "backend", request.param)


def kmeans(x: Tensor, n_clusters: int, **options: Any) -> KMeansResult:
    return public_kmeans(x, n_clusters, **COMMON, **options)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def blobs(n: int, d: int, seed: int = 0, centres: int = 7, dtype: torch.dtype = torch.float32) -> Tensor:
    """Overlapping groups of points, away from the origin."""
    g = torch.Generator().manual_seed(seed)
    middle = 3 * torch.randn(centres, d, generator=g, dtype=torch.float64)
    x = middle[torch.randint(centres, (n,), generator=g)] + torch.randn(n, d, generator=g, dtype=torch.float64) + 5
    return x.to(dtype)


def random_weights(n: int, seed: int = 1) -> Tensor:
    return 0.1 + 3 * torch.rand(n, generator=torch.Generator().manual_seed(seed))


# --- Lloyd -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("n", "d", "k"), [(17, 1, 1), (17, 1, 5), (17, 17, 5), (123, 1, 5), (123, 17, 5), (123, 17, 60), (1537, 17, 5)]
)
def test_lloyd_matches_the_oracle(n: int, d: int, k: int, dtype: torch.dtype, weighted: bool) -> None:
    x = blobs(n, d, seed=n + d, dtype=dtype)
    w = random_weights(n) if weighted else torch.ones(n)
    init = x[:k].clone()
    max_iter = 100 if n < 1000 else 15
    labels, centroids, inertia, n_iter = oracle_lloyd(x, w, init, max_iter)
    result = kmeans(x, k, sample_weight=w if weighted else None, init=init, algorithm="lloyd", max_iter=max_iter)

    gap = squared_distances(x, torch.from_numpy(centroids))
    found, expected = (gap.gather(1, y[:, None]).squeeze(1) for y in (result.labels, torch.from_numpy(labels)))
    assert float((found - expected).abs().max()) <= 1e-9
    torch.testing.assert_close(result.centroids.double(), torch.from_numpy(centroids), rtol=1e-6, atol=1e-6)
    assert float(result.inertia) == pytest.approx(inertia, rel=1e-6)
    assert int(result.n_iter) == n_iter
    assert_consistent(x, w, result)
    assert_nearest(x, result)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("init", INITS)
def test_lloyd_ends_at_a_fixed_point(init: str, weighted: bool) -> None:
    x, w = blobs(300, 9), random_weights(300) if weighted else torch.ones(300)
    result = kmeans(x, 20, sample_weight=w, init=init, algorithm="lloyd", seed=3)
    assert int(result.status) == Status.OK
    assert_nearest(x, result)
    assert_means(x, w, result)
    assert_consistent(x, w, result)


@pytest.mark.parametrize("max_iter", [0, 1, 2])
def test_lloyd_stopped_early_returns_nearest_centroids(max_iter: int) -> None:
    x, w = blobs(300, 9), random_weights(300)
    init = x[:20].clone()
    result = kmeans(x, 20, sample_weight=w, init=init, algorithm="lloyd", max_iter=max_iter)
    assert int(result.status) == Status.MAX_ITER
    assert int(result.n_iter) == max_iter
    assert_nearest(x, result)
    assert_consistent(x, w, result)
    if max_iter == 0:
        torch.testing.assert_close(result.centroids, init, rtol=1e-6, atol=1e-6)


def test_tol_stops_lloyd_by_weighted_variance() -> None:
    x, w = blobs(400, 9), random_weights(400)
    mean = (w[:, None] * x).sum(0) / w.sum()
    variance = float(((w[:, None] * (x - mean) ** 2).sum(0) / w.sum()).mean())
    options: dict[str, Any] = {"sample_weight": w, "init": x[:20].clone(), "algorithm": "lloyd"}
    path = [kmeans(x, 20, **options, max_iter=i).centroids for i in range(8)]
    shifts = [float((b - a).double().square().sum()) for a, b in itertools.pairwise(path)]
    step = next(i for i in range(1, 7) if shifts[i] < min(shifts[:i]))
    between = math.sqrt(shifts[step] * min(shifts[:step])) / variance
    result = kmeans(x, 20, **options, tol=between)
    assert int(result.n_iter) == step + 1
    assert int(result.status) == Status.OK
    torch.testing.assert_close(result.centroids, path[step + 1])
    assert_nearest(x, result)
    scaled = kmeans(x, 20, **{**options, "sample_weight": 1000 * w}, tol=between)
    assert torch.equal(scaled.n_iter, result.n_iter)


def test_ties_go_to_the_lowest_cluster() -> None:
    x = torch.tensor([[0.0], [1.0], [2.0], [3.0], [7.0]])
    init = torch.tensor([[3.0], [1.0], [3.0]])
    result = kmeans(x, 3, init=init, algorithm="lloyd", max_iter=0)
    assert result.labels.tolist() == [1, 1, 0, 0, 0]


def test_a_tie_keeps_the_current_cluster() -> None:
    x = torch.tensor([[-3.0], [-1.0], [0.0], [4.0]])
    labels = torch.tensor([0, 0, 1, 1])
    assert torch.equal(kmeans(x, 2, init=labels, algorithm="lloyd").labels, labels)


def test_the_mean_of_a_single_point_is_that_point() -> None:
    x, w = blobs(60, 5, dtype=torch.float64), random_weights(60)
    result = kmeans(x, 50, sample_weight=w, algorithm="lloyd")
    single = result.counts[result.labels] == 1
    assert int(single.sum()) >= 30
    assert torch.equal(result.centroids[result.labels][single], x[single])


def test_a_point_between_two_centroids_does_not_cycle() -> None:
    # Mirrored halves with points on the mirror: float32 rounding alone would decide where those go.
    half = torch.randn(200, 64, generator=torch.Generator().manual_seed(0)) + 2
    middle = torch.zeros(40, 64)
    x = torch.cat([half, -half, middle])
    result = kmeans(x, 2, init=torch.stack([half.mean(0), -half.mean(0)]), algorithm="lloyd")
    assert int(result.status) == Status.OK
    assert int(result.n_iter) <= 5


# --- Hartigan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "d", "k"), [(17, 1, 5), (40, 17, 11), (60, 5, 30)])
def test_hartigan_ends_where_no_single_move_helps(n: int, d: int, k: int, dtype: torch.dtype, weighted: bool) -> None:
    x, w = blobs(n, d, dtype=dtype), random_weights(n) if weighted else torch.ones(n)
    result = kmeans(x, k, sample_weight=w, seed=2)
    assert int(result.status) == Status.OK
    assert best_single_move(x, w, result.labels, k) <= 1e-9 * float(result.inertia)
    assert int(result.counts.min()) > 0
    assert_nearest(x, result)
    assert_means(x, w, result)
    assert_consistent(x, w, result)


@pytest.mark.parametrize("weighted", [False, True])
def test_hartigan_never_raises_the_inertia(weighted: bool) -> None:
    x, w = torch.randn(400, 50, generator=torch.Generator().manual_seed(0)), random_weights(400)
    options: dict[str, Any] = {"sample_weight": w if weighted else None, "init": "random", "seed": 5}
    lloyd = kmeans(x, 100, algorithm="lloyd", **options)
    path = [kmeans(x, 100, max_iter=i, **options) for i in (*range(8, 16), 100)]
    inertias = [float(lloyd.inertia), *(float(r.inertia) for r in path)]
    assert int(lloyd.n_iter) < 8, "the rounds compared must all start from Lloyd's fixed point"
    assert inertias == sorted(inertias, reverse=True)
    assert inertias[-1] < 0.99 * inertias[0]
    assert all(int(r.counts.min()) > 0 for r in path)
    assert int(path[0].status) == Status.MAX_ITER
    assert int(path[-1].status) == Status.OK


def test_a_round_of_moves_is_disjoint_and_takes_the_largest_first() -> None:
    # Lloyd is stuck. -5 and 5 both want to leave cluster 0, and 5 gains more; 1005 wants to leave cluster 3.
    x = torch.tensor([[-5.0], [5.0], [10.2], [-10.4], [1000.0], [1005.0], [1009.0]])
    labels = torch.tensor([0, 0, 1, 2, 3, 3, 4])
    assert kmeans(x, 5, init=labels, algorithm="lloyd").labels.tolist() == labels.tolist()
    assert kmeans(x, 5, init=labels, max_iter=1).labels.tolist() == [0, 1, 1, 2, 3, 4, 4]


def test_equal_moves_go_to_the_lowest_point() -> None:
    x = torch.tensor([[-5.0], [5.0], [10.25], [-10.25]])
    assert kmeans(x, 3, init=torch.tensor([0, 0, 1, 2]), max_iter=1).labels.tolist() == [2, 0, 1, 2]


def test_the_decrease_of_a_move_counts_the_weight() -> None:
    # Equal but for the pair's mean, which is nearer to the heavier point: that one gains less distance, more inertia.
    x = torch.tensor([[-6.0], [2.0], [6.5], [-12.5]])
    w = torch.tensor([1.0, 3.0, 1.0, 1.0])
    gains = [1.0 * (4 / 3 * 36 - 0.5 * 6.5**2), 3.0 * (4 / 1 * 4 - 0.25 * 4.5**2)]
    assert gains[1] > gains[0] > 0
    assert gains[1] / 3 < gains[0]
    result = kmeans(x, 3, sample_weight=w, init=torch.tensor([0, 0, 1, 2]), max_iter=1)
    assert result.labels.tolist() == [0, 1, 1, 2]


def test_hartigan_leaves_the_fixed_point_of_lloyd() -> None:
    # {0, 5} and {9}: 5 is nearer to the mean 2.5 of its own pair than to 9 + small, yet {0}, {5, 9} is cheaper.
    x = torch.tensor([[0.0], [5.0], [9.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1])
    lloyd = kmeans(x, 2, init=labels, algorithm="lloyd")
    hartigan = kmeans(x, 2, init=labels)
    assert lloyd.labels.tolist() == [0, 0, 1]
    assert float(lloyd.inertia) == pytest.approx(12.5)
    assert hartigan.labels.tolist() == [0, 1, 1]
    assert float(hartigan.inertia) == pytest.approx(8.0)


def test_a_heavy_point_keeps_its_cluster() -> None:
    x = torch.tensor([[0.0], [1.0], [10.0], [11.0], [12.0]])
    w = torch.tensor([1e30, 1e-30, 1.0, 1.0, 1.0])
    result = kmeans(x, 2, sample_weight=w, init=x[[0, 3]].clone())
    assert result.labels.tolist() == [0, 0, 1, 1, 1]
    assert bool(result.centroids.isfinite().all())


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["lloyd", "hartigan"])
def test_integer_weights_are_repeated_points(algorithm: str) -> None:
    x = blobs(150, 6)
    w = torch.randint(0, 5, (150,), generator=torch.Generator().manual_seed(1))
    init = x[w > 0][:12].clone()
    weighted = kmeans(x, 12, sample_weight=w, init=init, algorithm="lloyd")
    repeated = kmeans(x.repeat_interleave(w, dim=0), 12, init=init, algorithm="lloyd")
    assert torch.equal(weighted.labels.repeat_interleave(w), repeated.labels)
    torch.testing.assert_close(weighted.centroids, repeated.centroids)
    torch.testing.assert_close(weighted.inertia, repeated.inertia)
    if algorithm == "hartigan":
        # Copies of a point move one by one, a weighted point moves as a whole: compare with any such move.
        moved = kmeans(x, 12, sample_weight=w, init=init)
        assert float(moved.inertia) <= float(repeated.inertia)
        assert best_single_move(x[w > 0], w[w > 0], moved.labels[w > 0], 12) <= 1e-9 * float(moved.inertia)


def test_zero_weights_shape_nothing_and_are_labelled() -> None:
    x, w = blobs(200, 6), random_weights(200)
    idle = torch.arange(200) % 3 == 0
    w[idle] = 0
    for algorithm in ("lloyd", "hartigan"):
        for init in ("k-means++", "random"):
            result = kmeans(x, 11, sample_weight=w, init=init, algorithm=algorithm)
            alone = kmeans(x[~idle], 11, sample_weight=w[~idle], init=init, algorithm=algorithm)
            assert torch.equal(result.centroids, alone.centroids)
            assert torch.equal(result.inertia, alone.inertia)
            assert torch.equal(result.labels[~idle], alone.labels)
            assert_nearest(x, result)
            assert int(result.counts.sum()) == 200


def test_zero_weight_points_ignore_clusters_without_points() -> None:
    x = torch.tensor([[0.0], [0.0], [1.0], [1.0], [50.0]])
    w = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    result = kmeans(x, 3, sample_weight=w, init=torch.tensor([[0.0], [1.0], [50.0]]))
    assert result.labels.tolist() == [0, 0, 1, 1, 1]
    assert result.counts.tolist() == [2, 3, 0]
    assert int(result.status) == Status.EMPTY_CLUSTERS


def test_fewer_weighted_points_than_clusters() -> None:
    x, w = blobs(9, 3), torch.zeros(9)
    w[[2, 5, 8]] = torch.tensor([1.0, 2.0, 3.0])
    result = kmeans(x, 4, sample_weight=w)
    assert result.labels[[2, 5, 8]].tolist() == [0, 1, 2]
    assert torch.equal(result.centroids, x[[2, 5, 8, 8]])
    assert float(result.inertia) == 0
    assert int(result.status) == Status.EMPTY_CLUSTERS
    assert_nearest(x, result)


# --- seeding ---------------------------------------------------------------------------------------------------------


def seeds(x: Tensor, k: int, w: Tensor | None, init: str, seed: int) -> list[int]:
    """Indices of the initial centroids."""
    start = kmeans(x, k, sample_weight=w, init=init, algorithm="lloyd", max_iter=0, seed=seed).centroids
    distances = squared_distances(x, start)
    assert float(distances.min(0).values.max()) < 1e-9
    return distances.argmin(0).tolist()


@pytest.mark.parametrize("init", INITS)
def test_seeds_are_distinct_points_of_positive_weight(init: str) -> None:
    x, w = blobs(40, 3), random_weights(40)
    w[::2] = 0
    for seed in range(30):
        chosen = seeds(x, 12, w, init, seed)
        assert len(set(chosen)) == 12
        assert all(j % 2 for j in chosen)


def test_k_means_plus_plus_reaches_far_points() -> None:
    # 3 far groups of a single point each among 60 points: random seeding almost never finds all of them.
    near = 0.1 * torch.randn(57, 2, generator=torch.Generator().manual_seed(0))
    x = torch.cat([near, torch.tensor([[50.0, 0.0], [0.0, 50.0], [-50.0, 0.0]])])
    found = {init: [len({57, 58, 59} & set(seeds(x, 4, None, init, s))) for s in range(40)] for init in INITS}
    assert all(n == 3 for n in found["k-means++"])
    assert sum(found["random"]) < 30


def test_seeding_follows_the_weights() -> None:
    # First draws of both seedings: 4 points on a line, weights 1:1:2:4.
    x, w = torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.tensor([1.0, 1.0, 2.0, 4.0])
    trials = 400
    for init in INITS:
        first = [seeds(x, 1, w, init, s)[0] for s in range(trials)]
        share = np.bincount(first, minlength=4) / trials
        np.testing.assert_allclose(share, [0.125, 0.125, 0.25, 0.5], atol=4 * math.sqrt(0.25 / trials))


def test_k_means_plus_plus_draws_by_weight_times_squared_distance() -> None:
    # The heavy point is the first seed. Points 1 and 2 have masses 9 * 3² and 1 * 6²; seeding either leaves the mass of
    # the other, so that the lighter one is the second seed only if both trials draw it.
    x, w = torch.tensor([[0.0], [3.0], [-6.0]]), torch.tensor([1e9, 9.0, 1.0])
    trials = 600
    share = np.bincount([seeds(x, 2, w, "k-means++", s)[1] for s in range(trials)], minlength=3) / trials
    lighter = (36 / (81 + 36)) ** 2
    np.testing.assert_allclose(share, [0, 1 - lighter, lighter], atol=3 * math.sqrt(lighter / trials))


def test_greedy_k_means_plus_plus_beats_random_seeding() -> None:
    x = blobs(300, 8, centres=30)
    start = {
        init: np.mean(
            [float(kmeans(x, 30, init=init, algorithm="lloyd", max_iter=0, seed=s).inertia) for s in range(8)]
        )
        for init in INITS
    }
    assert start["k-means++"] < 0.9 * start["random"]


def test_n_init_keeps_the_best() -> None:
    x = blobs(200, 4, centres=25)
    inertias = [float(kmeans(x, 25, init="random", seed=3, n_init=n, algorithm="lloyd").inertia) for n in (1, 2, 5, 20)]
    assert inertias == sorted(inertias, reverse=True)
    assert inertias[-1] < inertias[0]


# --- empty clusters --------------------------------------------------------------------------------------------------


def test_an_empty_cluster_gets_the_point_of_largest_weighted_distance() -> None:
    x = torch.tensor([[0.0], [1.0], [4.0], [20.0], [21.0]])
    init = torch.tensor([[1.0], [20.5], [900.0]])
    plain = kmeans(x, 3, init=init, algorithm="lloyd")
    assert plain.labels.tolist() == [0, 0, 2, 1, 1]
    weighted = kmeans(x, 3, init=init, algorithm="lloyd", sample_weight=torch.tensor([100.0, 1.0, 1.0, 1.0, 1.0]))
    assert weighted.labels.tolist() == [2, 2, 0, 1, 1]
    assert int(plain.status) == int(weighted.status) == Status.OK


def test_relocation_takes_from_clusters_with_other_members() -> None:
    # The farthest point is alone in its cluster and stays there.
    x = torch.tensor([[0.0], [1.0], [2.5], [100.0]])
    init = torch.tensor([[1.0], [60.0], [1e6]])
    result = kmeans(x, 3, init=init, algorithm="lloyd")
    assert result.labels.tolist() == [0, 0, 2, 1]


def test_labels_that_skip_clusters_are_refilled() -> None:
    x = blobs(80, 3)
    for algorithm in ("lloyd", "hartigan"):
        result = kmeans(x, 6, init=torch.full((80,), 4), algorithm=algorithm)
        assert int(result.counts.min()) > 0
        assert int(result.status) == Status.OK


def test_given_labels_are_refilled_before_the_first_pass() -> None:
    x = torch.tensor([[-30.0], [-10.0], [-5.0], [9.0], [10.0], [12.0], [14.0]])
    result = kmeans(x, 3, init=torch.tensor([0, 0, 0, 1, 1, 1, 1]), algorithm="lloyd")
    assert result.labels.tolist() == [2, 0, 0, 1, 1, 1, 1]


def test_k_means_plus_plus_repeats_its_first_seed_when_points_run_out() -> None:
    x = blobs(7, 65).repeat(9, 1)
    start = kmeans(x, 20, algorithm="lloyd", max_iter=0).centroids
    assert len({tuple(seed) for seed in start[:7].tolist()}) == 7
    assert torch.equal(start[7:], start[:1].expand(13, -1))


@pytest.mark.parametrize("algorithm", ["lloyd", "hartigan"])
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("weighted", [False, True])
def test_fewer_distinct_points_than_clusters(algorithm: str, init: str, weighted: bool) -> None:
    x = blobs(7, 65).repeat(9, 1)
    w = random_weights(63) if weighted else None
    result = kmeans(x, 20, init=init, algorithm=algorithm, sample_weight=w)
    assert int(result.status) == Status.EMPTY_CLUSTERS
    assert int((result.counts > 0).sum()) == 7
    assert float(result.inertia) <= 1e-20
    assert bool(result.centroids.isfinite().all())
    torch.testing.assert_close(result.centroids[result.labels], x)


def test_identical_points() -> None:
    result = kmeans(torch.full((30, 5), 0.1), 4)
    assert result.labels.tolist() == [0] * 30
    assert int(result.status) == Status.EMPTY_CLUSTERS
    torch.testing.assert_close(result.centroids, torch.full((4, 5), 0.1))


@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 5), (1, 4), (17, 17), (17, 20), (123, 123), (123, 126), (1537, 1540)])
@pytest.mark.parametrize("d", [1, 17])
def test_as_many_clusters_as_points(n: int, k: int, d: int) -> None:
    x = blobs(n, d)
    for init in ("random", torch.zeros(k, d), torch.zeros(n, dtype=torch.int32)):
        result = kmeans(x, k, init=init)
        assert torch.equal(result.labels, torch.arange(n))
        assert torch.equal(result.centroids, x[torch.arange(k).clamp(max=n - 1)])
        assert result.counts.tolist() == [1] * n + [0] * (k - n)
        assert float(result.inertia) == 0
        assert int(result.status) == (Status.OK if n == k else Status.EMPTY_CLUSTERS)


def test_no_points_and_no_problems() -> None:
    result = kmeans(torch.zeros(2, 0, 3), 4)
    assert [tuple(f.shape) for f in result] == [(2, 0), (2, 4, 3), (2,), (2, 4), (2,), (2,)]
    assert result.status.tolist() == [Status.EMPTY_CLUSTERS] * 2
    assert not bool(result.centroids.any())
    result = kmeans(torch.zeros(0, 9, 3), 4, sample_weight=torch.zeros(0, 9))
    assert [tuple(f.shape) for f in result] == [(0, 9), (0, 4, 3), (0,), (0, 4), (0,), (0,)]
