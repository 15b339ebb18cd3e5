"""The Triton k-means against the reference, interpreted on the CPU: kernels one by one, then the whole backend.

float64 problems must match the reference label by label: what differs there is logic, not rounding.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton_interpreter  # noqa: F401, I001 - before any kernel is defined
import torch
from torch import Tensor

from fusion_kernels import BackendUnavailableError, gpu, kmeans_assign
from fusion_kernels import kmeans as public_kmeans
from fusion_kernels.kmeans import (
    Status,
    triton_assign,
    triton_backend,
    triton_points,
    triton_heuristics,
)
from fusion_kernels.kmeans.types import Options, Seeding
from fusion_kernels.kmeans.reference import assign as assign_reference
from fusion_kernels.kmeans.reference import kmeans as reference
from points import nearest_gap

pytestmark = pytest.mark.slow

FIELDS = ("labels", "centroids", "inertia", "counts", "n_iter", "status")


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that share a work list only cost time here; one test below has many."""
    monkeypatch.setattr(triton_heuristics, "_PROGRAMS", 1)


def blobs(B: int, n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, n, d): overlapping groups of points of different sizes, away from the origin."""
    g = torch.Generator().manual_seed(seed)
    middle = 3 * torch.randn(B, 7, d, generator=g, dtype=torch.float64)
    at = torch.randint(7, (B, n, 1), generator=g).expand(-1, -1, d)
    x = middle.gather(1, at) + torch.randn(B, n, d, generator=g, dtype=torch.float64)
    return (x * (0.1 + 3 * torch.rand(B, n, 1, generator=g, dtype=torch.float64)) + 5).to(dtype)


def weights(B: int, n: int, dtype: torch.dtype = torch.float32, idle: float = 0.2) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return (0.1 + 3 * torch.rand(B, n, generator=g)).mul(torch.rand(B, n, generator=g) >= idle).to(dtype)


def run(
    x: Tensor,
    n_clusters: int,
    sample_weight: Tensor | None = None,
    init: str | Tensor = "k-means++",
    n_init: int = 1,
    algorithm: str = "hartigan",
    max_iter: int = 100,
    tol: float = 0.0,
    seed: int = 0,
    function: Any = triton_backend.kmeans,
    **options: Any,
) -> dict[str, Tensor]:
    start, seeding = (None, init) if isinstance(init, str) else (init, "k-means++")
    bound = options.pop("workspace_bytes", None)
    how = Options(n_clusters, seeding, n_init, algorithm, max_iter, tol, seed, bound)
    found = function(x, sample_weight, start, how, **options)
    return dict(zip(FIELDS, found, strict=True))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], eps: float) -> None:
    for name in ("labels", "n_iter", "status", "counts"):
        assert torch.equal(found[name], expected[name]), name
    torch.testing.assert_close(found["centroids"], expected["centroids"], rtol=8 * eps, atol=8 * eps, equal_nan=True)
    torch.testing.assert_close(found["inertia"], expected["inertia"], rtol=64 * eps, atol=64 * eps, equal_nan=True)


# --- Gram ------------------------------------------------------------------------------------------------------------


def centred(x: Tensor, mean: Tensor) -> Tensor:
    return x.double() - mean[:, None].double()


def relative_errors(gram: Tensor, rows: Tensor) -> Tensor:
    """(B, N, N) errors of a Gram matrix, scaled by an unknown power of two, relative to the norms of its rows."""
    exact = rows @ rows.mT
    scale = torch.exp2(torch.log2(gram.double().abs().amax((1, 2)) / exact.abs().amax((1, 2))).round())
    norms = rows.norm(dim=2)
    return (gram.double() / scale[:, None, None] - exact) / (norms[:, :, None] * norms[:, None, :])


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("n", "d"), [(123, 1), (123, 65), (17, 1537), (65, 129)])
def test_gram_errs_as_rounding_does(n: int, d: int, exact: bool) -> None:
    x = blobs(2, n, d, seed=n)
    # Rows of very different sizes: every one has a scale of its own.
    x[1] = (x[1] - 5) * torch.logspace(-12, 12, n)[:, None]
    points = triton_points.prepare(x, None, None, 1, exact)
    rows = centred(x, points.mean)
    found = relative_errors(points.gram[:, :, :n], rows)
    # What torch has to work with: centred float32 rows, or for the fast form the same rounded to 11 bits.
    given = rows.float()
    if not exact:
        exponent = torch.frexp(given.abs().amax(2, keepdim=True))[1]
        given = torch.ldexp(torch.ldexp(given, 15 - exponent).half().float(), exponent - 15)
    torchs = relative_errors(given @ given.mT, rows)
    # Two numbers of 11 bits per entry, without the product of the second ones, or one; then d products are summed in
    # float32. All of it is relative to the absolute products, which the norms of the rows bound.
    of_factors = 3 * 2.0**-22 if exact else 2 * 2.0**-11 + 2.0**-22
    assert float(found.abs().max()) <= of_factors + 1.01 * (d + 4) * 2.0**-24
    # 22 bits are two fewer than float32 has, which no sum hides where there is a single column.
    factor = 4 if d == 1 else 2
    assert float(found.square().mean()) <= factor**2 * float(torchs.square().mean())
    assert torch.equal(points.gram[:, :, :n], points.gram[:, :, :n].mT)
    assert bool(points.finite.all())


def test_gram_of_large_and_tiny_numbers() -> None:
    x = blobs(1, 17, 5).repeat(3, 1, 1)
    x[1] *= 2.0**120
    x[2] *= 2.0**-120
    gram = triton_points.prepare(x, None, None, 1, True).gram[:, :, :17]
    assert torch.equal(gram[0], gram[1])
    assert torch.equal(gram[0], gram[2])


def test_products_with_given_centroids() -> None:
    x, start = blobs(2, 65, 17), blobs(2, 5, 17, seed=3)
    start[0, 1] *= 1e30
    points = triton_points.prepare(x, None, start, 5, True)
    rows, origin = centred(x, points.mean), centred(start, points.mean)
    scale = (points.gram[:, 0, 0].double() / rows[:, 0].square().sum(1))[:, None]
    near = torch.tensor([[True, False, True, True, True], [True] * 5])
    expected = origin @ rows.mT * scale[:, :, None]
    torch.testing.assert_close(points.products[:, :, :65].double()[near], expected[near], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(points.norms.double()[near], (origin.square().sum(2) * scale)[near], rtol=1e-5, atol=0.0)
    assert float(points.norms[0, 1]) > 1e20
    assert bool(points.norms.isfinite().all())


# --- the whole backend -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "d", "k", "options"),
    [
        (17, 1, 5, {"algorithm": "lloyd"}),
        (17, 17, 1, {}),
        (65, 17, 16, {"init": "random", "n_init": 2}),
        (65, 1, 16, {"init": "random", "algorithm": "lloyd", "n_init": 2}),
        (123, 65, 16, {"max_iter": 3}),
        (65, 17, 5, {"algorithm": "lloyd", "max_iter": 1}),
        (65, 17, 5, {"algorithm": "lloyd", "max_iter": 0}),
        (65, 17, 5, {"max_iter": 0}),
        (123, 5, 16, {"algorithm": "lloyd", "tol": 0.3}),
    ],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_float64_is_the_reference(n: int, d: int, k: int, options: dict[str, Any], weighted: bool) -> None:
    x = blobs(1, n, d, dtype=torch.float64)
    options = {**options, "sample_weight": weights(1, n, torch.float64) if weighted else None, "seed": 3}
    expected = run(x, k, function=reference, **options)
    assert_same(run(x, k, **options), expected, torch.finfo(torch.float64).eps)
    if "tol" in options:
        plain = run(x, k, function=reference, **{**options, "tol": 0.0})
        assert bool((plain["n_iter"] > expected["n_iter"]).any()), "tol must have stopped it"


@pytest.mark.parametrize("algorithm", ["lloyd", "hartigan"])
@pytest.mark.parametrize("kind", ["centroids", "empty", "labels", "skipping"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_given_starts(kind: str, algorithm: str, dtype: torch.dtype) -> None:
    x = blobs(1, 40, 3, dtype=dtype)
    init: Tensor
    if kind == "centroids":
        init = x[:, :5] + 0.25
    elif kind == "empty":
        # Far centroids lose all their points and are given others.
        init = torch.cat([x[:, :3], 900 + x[:, :2]], 1)
    else:
        init = torch.randint(5 if kind == "labels" else 2, (1, 40), generator=torch.Generator().manual_seed(2))
    options: dict[str, Any] = {"init": init, "algorithm": algorithm, "sample_weight": weights(1, 40, dtype)}
    expected = run(x, 5, function=reference, **options)
    assert_same(run(x, 5, **options), expected, torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_go_to_the_lowest_cluster_and_the_current_one_wins(dtype: torch.dtype) -> None:
    # Twice the same centroids, in different blocks of clusters.
    x = blobs(1, 30, 3, dtype=dtype)
    found = run(x, 20, init=x[:, :10].repeat(1, 2, 1), algorithm="lloyd", max_iter=0)
    assert int(found["labels"].max()) == 9
    # 0 is as far from the mean -1 of its neighbours' cluster as from that of its own.
    x = torch.tensor([[[-3.0], [-1.0], [0.0], [4.0]]], dtype=dtype)
    labels = torch.tensor([[0, 0, 1, 1]])
    assert torch.equal(run(x, 2, init=labels, algorithm="lloyd")["labels"], labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_relocation_takes_the_dearest_point_of_a_cluster_with_others(dtype: torch.dtype) -> None:
    x = torch.tensor([[[0.0], [1.0], [2.5], [100.0]], [[0.0], [1.0], [4.0], [100.0]]], dtype=dtype)
    init = torch.tensor([[[1.0], [60.0], [1e6]]], dtype=dtype).repeat(2, 1, 1)
    # The farthest point is alone in its cluster and stays there; weight counts like distance.
    w = torch.tensor([[1.0, 1.0, 1.0, 1.0], [100.0, 1.0, 1.0, 1.0]], dtype=dtype)
    found = run(x, 3, w, init, algorithm="lloyd", max_iter=1)
    assert found["labels"].tolist() == [[0, 0, 2, 1], [2, 2, 0, 1]]


def test_a_cluster_that_lloyd_left_empty_is_refilled_even_if_it_was_stopped() -> None:
    x = torch.tensor([3.0, 4.001, 9.002, 9.003, 1.004, 10.005, 4.006, 3.007], dtype=torch.float64).view(1, 8, 1)
    init = torch.tensor([3.0, 4.401, 1e6], dtype=torch.float64).view(1, 3, 1)
    stopped = run(x, 3, None, init, algorithm="lloyd", max_iter=1)
    assert int(stopped["status"]) == Status.MAX_ITER
    assert int(stopped["counts"].min()) > 0
    moved = run(x, 3, None, init, max_iter=1)
    assert int(moved["counts"].min()) > 0
    for found, algorithm in ((stopped, "lloyd"), (moved, "hartigan")):
        assert_same(found, run(x, 3, None, init, algorithm=algorithm, max_iter=1, function=reference), 1e-15)


@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_float32_labels_are_nearest_and_means_are_means(init: str) -> None:
    x, w = blobs(1, 123, 17), weights(1, 123)
    found = run(x, 16, w, init, algorithm="lloyd")
    assert int(found["status"]) == Status.OK
    distances = torch.cdist(x.double(), found["centroids"].double())[0].square()
    gap = distances.gather(1, found["labels"][0, :, None])[:, 0] - distances.min(1).values
    assert float((gap / (x[0] - x[0].mean(0)).double().square().sum(1)).max()) <= 1e-5
    inertia = (w[0].double() * distances.gather(1, found["labels"][0, :, None])[:, 0]).sum()
    torch.testing.assert_close(found["inertia"][0].double(), inertia, rtol=1e-6, atol=0.0)
    for c in range(16):
        inside = found["labels"][0] == c
        mean = (w[0, inside, None] * x[0, inside]).double().sum(0) / w[0, inside].double().sum()
        torch.testing.assert_close(found["centroids"][0, c].double(), mean, rtol=1e-6, atol=1e-6)
    # Near-ties aside, that is where the reference ends too.
    expected = run(x, 16, w, init, function=reference, algorithm="lloyd")
    torch.testing.assert_close(found["inertia"], expected["inertia"], rtol=1e-5, atol=0.0)


def test_labels_are_the_nearest_of_the_rounded_centroids() -> None:
    # Every second point lies halfway between two centroids, but for what products of float32 cannot tell.
    g = torch.Generator().manual_seed(3)
    centres = 3 * torch.randn(6, 5, generator=g, dtype=torch.float64)
    pairs, share = torch.randint(6, (2, 40), generator=g), 0.5 + 1e-7 * torch.randn(40, 1, generator=g).double()
    share[::2] = 0.0
    x = (share * centres[pairs[0]] + (1 - share) * centres[pairs[1]]).float()[None]
    found = run(x, 6, None, centres.float()[None], algorithm="lloyd", max_iter=20)
    distances = (x[0, :, None].double() - found["centroids"][0].double()).square().sum(2)
    for labels in (found["labels"], triton_assign.assign(x, found["centroids"])):
        own = distances.gather(1, labels[0, :, None])[:, 0]
        assert float(((own - distances.amin(1)) / own.clamp(min=1e-300)).max()) <= 1e-13


def test_groups_far_apart_keep_their_clusters() -> None:
    x = torch.tensor([0.0, 0.1, 1.0, 1.1, 4096.0, 4096.1, 4097.0, 4097.1])[None, :, None]
    found = run(x, 4, None, x[:, ::2].clone(), algorithm="lloyd", max_iter=5)
    assert found["counts"].tolist() == [[2] * 4]
    assert found["status"].tolist() == [Status.OK]


def test_fast_clusters_nearly_as_well() -> None:
    x = blobs(1, 65, 17)
    found, expected = run(x, 16, precision="fast"), run(x, 16, function=reference)
    torch.testing.assert_close(found["inertia"], expected["inertia"], rtol=0.05, atol=0.0)
    with pytest.raises(ValueError, match="unknown precision 'bf16': use one of exact, fast"):
        run(x, 16, precision="bf16")


def test_a_problem_has_the_same_bits_alone_in_a_batch_and_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = blobs(4, 17, 17), weights(4, 17)
    # The neighbours: not finite, without weight, with fewer points of weight than clusters.
    x[1, 7, 3] = math.nan
    x[1, 8, 3] = -math.inf
    w[2] = 0
    w[3] = 0
    w[3, [2, 5, 16]] = 1
    options: dict[str, Any] = {"n_init": 2, "max_iter": 2}
    together = run(x, 4, w, **options)
    monkeypatch.setattr(triton_heuristics, "_PROGRAMS", 3)
    for b in (0, 1, 3):
        alone = run(x[b : b + 1], 4, w[b : b + 1], **options)
        for name in FIELDS:
            torch.testing.assert_close(alone[name][0], together[name][b], rtol=0.0, atol=0.0, equal_nan=True)
    assert together["status"].tolist()[1:4] == [Status.NON_FINITE, Status.ZERO_WEIGHT, Status.EMPTY_CLUSTERS]
    in_parts = run(x, 4, w, workspace_bytes=2 * triton_heuristics.problem_bytes(17, 4, 17, 4, True), **options)
    for name in FIELDS:
        torch.testing.assert_close(in_parts[name], together[name], rtol=0.0, atol=0.0, equal_nan=True)
    assert_same(together, run(x, 4, w, function=reference, **options), torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("init", ["k-means++", "random", "centroids"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fewer_distinct_points_than_clusters(init: str, dtype: torch.dtype) -> None:
    x = blobs(1, 5, 17, dtype=dtype).repeat(1, 6, 1)
    start: str | Tensor = x[:, :9] if init == "centroids" else init
    found, expected = run(x, 9, None, start), run(x, 9, None, start, function=reference)
    for name in ("labels", "counts", "status"):
        assert torch.equal(found[name], expected[name]), name
    torch.testing.assert_close(found["centroids"], expected["centroids"])
    assert float(found["inertia"]) <= 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k_means_plus_plus_repeats_its_first_seed_when_points_run_out(dtype: torch.dtype) -> None:
    x = blobs(2, 7, 65, dtype=dtype).repeat(1, 5, 1)
    # So near that only rounding errors tell them apart once they have been multiplied.
    g = torch.Generator().manual_seed(0)
    x = x + (1e-5 if dtype == torch.float32 else 1e-10) * torch.randn(x.shape, generator=g, dtype=dtype)
    start = run(x, 12, algorithm="lloyd", max_iter=0)["centroids"]
    for seeds in start:
        assert float(torch.pdist(seeds[:7]).min()) > 1
        assert torch.equal(seeds[7:], seeds[:1].expand(5, -1))


@pytest.mark.parametrize(("n", "k"), [(0, 3), (1, 1), (1, 5), (17, 17), (17, 20)])
def test_as_many_clusters_as_points(n: int, k: int) -> None:
    x, w = blobs(4, n, 3) if n else torch.zeros(4, 0, 3), torch.ones(4, n)
    if n:
        x[1, 0, 0], w[2] = math.inf, 0
    start = torch.zeros(4, k, 3)
    start[3, 0, 0] = math.nan
    for init in ("random", start):
        assert_same(run(x, k, w, init), run(x, k, w, init, function=reference), 0.0)


def test_no_problems_and_given_centroids_that_are_not_finite() -> None:
    found = run(torch.zeros(0, 9, 3), 4)
    assert [tuple(f.shape) for f in found.values()] == [(0, 9), (0, 4, 3), (0,), (0, 4), (0,), (0,)]
    x, start = blobs(2, 17, 3), torch.zeros(2, 4, 3)
    start[1, 2, 2] = math.nan
    assert_same(run(x, 4, None, start), run(x, 4, None, start, function=reference), 1e-6)


# --- nearest centroids -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d", "k"), [(1, 1, 1), (17, 1, 5), (70, 17, 40), (70, 65, 1), (17, 1537, 17)])
def test_assign_finds_the_nearest(n: int, d: int, k: int) -> None:
    x, centroids = blobs(2, n, d, seed=n), blobs(2, k, d, seed=k + 1)
    labels = triton_assign.assign(x, centroids)
    for b in range(2):
        assert nearest_gap(x[b], centroids[b], labels[b]) <= 32 * torch.finfo(torch.float32).eps
        assert torch.equal(triton_assign.assign(x[b : b + 1], centroids[b : b + 1])[0], labels[b])
    assert torch.equal(
        triton_assign.assign(x.double(), centroids.double()), assign_reference(x.double(), centroids.double())
    )


def test_assign_does_not_depend_on_how_many_points_are_split_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    x, centroids = blobs(1, 40, 17), blobs(1, 9, 17, seed=1)
    whole = triton_assign.assign(x, centroids)
    monkeypatch.setattr(triton_assign, "POINTS_BYTES", 64 * 4 * 15)
    assert torch.equal(triton_assign.assign(x, centroids), whole)


def test_assign_at_the_edges() -> None:
    x = torch.tensor([[[0.0], [1.0], [2.0], [3.0], [7.0], [math.nan]]])
    centroids = torch.tensor([[[3.0], [1.0], [3.0]]])
    assert triton_assign.assign(x, centroids).tolist() == [[1, 1, 0, 0, 0, 0]]
    # Ties across the steps over the centroids, too, go to the lowest id.
    assert triton_assign.assign(x[:, :5], centroids.repeat(1, 30, 1)).tolist() == [[1, 1, 0, 0, 0]]
    assert triton_assign.assign(x[:, :5] + 2.0**20, centroids + 2.0**20).tolist() == [[1, 1, 0, 0, 0]]
    assert triton_assign.assign(x[:, :5] * 2.0**90, centroids).tolist() == [[1, 0, 0, 0, 0]]
    assert triton_assign.assign(x, centroids * math.inf).tolist() == [[0] * 6]
    assert triton_assign.assign(x[:, :0], centroids).shape == (1, 0)
    assert triton_assign.assign(torch.zeros(0, 4, 2), torch.zeros(0, 3, 2)).shape == (0, 4)


# --- around it -------------------------------------------------------------------------------------------------------


def test_large_problems_are_refused_with_a_remedy() -> None:
    size = triton_heuristics.problem_bytes(100_000, 10, 3, 4, True)
    with pytest.raises(ValueError, match=r"100000 points need 37 GiB .* use backend='reference', or cluster a sample"):
        triton_backend._check_memory(size, 100_000, size - 1)
    triton_backend._check_memory(size, 100_000, size)


def test_configurations_depend_on_the_problem_alone() -> None:
    small, large = gpu.SMALL_SHARED_MEMORY, gpu.LARGE_SHARED_MEMORY
    assert triton_heuristics.gram_config(3072, True, small) != triton_heuristics.gram_config(3072, True, large)
    for n, k in [(2, 1), (17, 5), (65, 64), (3072, 768), (14336, 3584)]:
        config = triton_heuristics.sweep_config(n, k, False)
        assert all(v & (v - 1) == 0 and v > 0 for v in vars(config).values())
        for B in (1, 3, 200, 10**6):
            assert 1 <= triton_heuristics.list_programs(B, k) <= k


@pytest.mark.skipif(gpu.why_not() is None, reason="there is a GPU that it runs on")
def test_a_new_seeding_is_drawn_as_no_other() -> None:
    new = object.__new__(Seeding)
    new._name_, new._value_ = "NEW", "new"
    with pytest.raises(ValueError, match=r"no Seeding 'new' here: use one of 'k-means\+\+', 'random'"):
        triton_backend.kmeans(blobs(1, 9, 2), None, None, Options(2, seeding=new))


def test_asking_for_it_without_a_gpu_says_why() -> None:
    with pytest.raises(BackendUnavailableError, match=f"kmeans_assign: backend 'triton': {gpu.why_not()}"):
        kmeans_assign(torch.zeros(5, 2), torch.zeros(1, 2), backend="triton")
    for name in ("triton", "triton-fast"):
        with pytest.raises(BackendUnavailableError, match=f"backend '{name}': {gpu.why_not()}"):
            public_kmeans(torch.zeros(5, 2), 2, backend=name)
