"""What k-means promises of its last step: labels are those of the centroids that are returned, on every backend.

Distances are checked by differences in float64, so that nothing here hangs on the rounding of products.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fusion_kernels import kmeans, kmeans_assign, native
from fusion_kernels.kmeans import OPERATOR, KMeansResult, Status, cpu_backend, settling
from fusion_kernels.kmeans import reference as reference
from fusion_kernels.kmeans.reference import Options

COMPILED = native.UNAVAILABLE is None
BACKENDS = ("reference", "cpu") if COMPILED else ("reference",)
#: Backends, and for the compiled one the workspace in which it works without a Gram matrix.
FORMS = [("reference", None), *([("cpu", None), ("cpu", "direct")] if COMPILED else [])]

needs_compiled = pytest.mark.skipif(not COMPILED, reason=str(native.UNAVAILABLE))


def normal(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def run(form: tuple[str, str | None], x: Tensor, k: int, **options: Any) -> KMeansResult:
    backend, direct = form
    workspace = {} if direct is None else {"workspace_bytes": x.shape[-2] * k * 8}
    return kmeans(x, k, backend=backend, **workspace, **options)


def gaps(x: Tensor, found: KMeansResult) -> Tensor:
    """How much farther than the nearest every point's centroid is, relative to its own distance."""
    distances = torch.stack([(x.double() - c).square().sum(1) for c in found.centroids.double()], dim=1)
    own = distances.gather(1, found.labels[:, None]).squeeze(1)
    return (own - distances.amin(1)) / own.clamp(min=1e-300)


def near_ties(n: int, d: int, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points around centroids far from the origin, half of them nearly halfway between two."""
    g = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(k, d, generator=g, dtype=torch.float64)
    pairs = torch.randint(k, (2, n), generator=g)
    share = 0.5 + 1e-7 * torch.randn(n, 1, generator=g, dtype=torch.float64)
    share[::2] = 0.0
    return (share * centres[pairs[0]] + (1 - share) * centres[pairs[1]]).float(), centres.float()


# --- labels are those of the centroids -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("algorithm", ["lloyd", "hartigan"])
def test_labels_are_what_assign_says_of_the_centroids(form: tuple[str, str | None], algorithm: str) -> None:
    for seed in range(6):
        x, centres = near_ties(300, 7, 12, seed)
        for max_iter in (0, 1, 100):
            found = run(form, x, 12, init=centres, algorithm=algorithm, max_iter=max_iter)
            assert float(gaps(x, found).max()) <= 1e-13
            for backend in BACKENDS:
                labels = kmeans_assign(x, found.centroids, backend=backend)
                assert float(gaps(x, found._replace(labels=labels)).max()) <= 1e-13
            inertia = settling.distances_of(x, found.centroids, found.labels).sum()
            torch.testing.assert_close(found.inertia.double(), inertia, rtol=1e-6, atol=1e-9)
            assert torch.equal(found.counts, torch.bincount(found.labels, minlength=12))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_float32_ends_at_the_fixed_point_of_float64(form: tuple[str, str | None]) -> None:
    # Ties within rounding of |x|^2 = 1e4, a gap of 1e-3 in distances of 1: float32 products cannot see it.
    x = torch.tensor([[-1.0, 100.0], [1.0, 100.0], [0.0001, 100.0], [3.0, -100.0], [-3.0, -100.0], [0.0002, -100.0]])
    init = torch.tensor([[-1.0, 100.0], [1.0, 100.0], [3.0, -100.0], [-3.0, -100.0]])
    found = run(form, x, 4, init=init, algorithm="lloyd")
    assert found.labels.tolist() == [0, 1, 1, 2, 3, 2]
    assert found.labels.tolist() == kmeans(x.double(), 4, init=init.double(), algorithm="lloyd").labels.tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_assign_decides_by_differences_in_float64(backend: str) -> None:
    # One unit in the last place nearer to one of two centroids, 2^20 from the origin and from each other's mean.
    near = torch.tensor([2.0**20 - 1, 2.0**20 + 1, -(2.0**20)])[:, None]
    x = torch.tensor([2.0**20 - 0.125, 2.0**20 + 0.125, 2.0**20, -(2.0**20)])[:, None]
    assert kmeans_assign(x, near, backend=backend).tolist() == [0, 1, 0, 2]
    assert kmeans_assign(x, near.flip(0), backend=backend).tolist() == [2, 1, 1, 0]
    assert kmeans_assign(x * 2.0**100, near * 2.0**100, backend=backend).tolist() == [0, 1, 0, 2]
    wide = kmeans_assign(x.double() * 2.0**-600, near.double() * 2.0**-600, backend=backend)
    assert wide.tolist() == [0, 1, 0, 2]


@needs_compiled
def test_the_same_bits_with_near_ties_alone_in_a_batch_and_on_more_threads() -> None:
    pairs = [near_ties(300, 7, 12, seed) for seed in range(3)]
    x, init = torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs])
    x[1, :150, 0] += 1e4  # solved in float64
    threads = torch.get_num_threads()
    whole = kmeans(x, 12, init=init, backend="cpu")
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for b in range(3):
                alone = kmeans(x[b].clone(), 12, init=init[b].clone(), backend="cpu")
                for name in KMeansResult._fields:
                    assert torch.equal(getattr(alone, name), getattr(whole, name)[b]), name
    finally:
        torch.set_num_threads(threads)


# --- groups that float32 cannot resolve ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("algorithm", ["lloyd", "hartigan"])
@pytest.mark.parametrize("apart", [1e3, 1e4])
def test_groups_far_apart_keep_their_clusters(form: tuple[str, str | None], algorithm: str, apart: float) -> None:
    # Three corners each, of size 1, in two groups: every corner is a cluster, wherever the groups lie.
    corners = torch.tensor([[0.0, 0.0], [8.0, 0.0], [0.0, 8.0]]).repeat_interleave(10, 0) + normal(30, 2) / 4
    x = torch.cat([corners, corners.flip(0) + torch.tensor([8 * apart, 0.0])])
    expected = kmeans(x.double(), 6, algorithm=algorithm, backend="reference")
    found = run(form, x, 6, algorithm=algorithm)
    assert found.counts.tolist() == [10] * 6
    assert int(found.status) == Status.OK
    assert float(found.inertia) == pytest.approx(float(expected.inertia), rel=1e-5)


# --- numbers of any size ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("algorithm", ["lloyd", "hartigan"])
def test_an_inertia_beyond_float32_is_a_status_of_its_own_problem(form: tuple[str, str | None], algorithm: str) -> None:
    x = torch.stack([normal(40, 3), 1e20 * normal(40, 3), 1e-20 * normal(40, 3)])
    found = run(form, x, 5, algorithm=algorithm)
    assert found.status.tolist() == [Status.OK, Status.LARGE_INERTIA, Status.OK]
    assert found.inertia.isinf().tolist() == [False, True, False]
    assert bool(found.centroids.isfinite().all())
    for b in range(3):
        assert float(gaps(x[b], KMeansResult(*(field[b] for field in found))).max()) <= 1e-13
    wide = run(form, x.double(), 5, algorithm=algorithm)
    assert bool((wide.inertia.isfinite() & (wide.inertia > 0)).all())
    assert wide.status.tolist() == [Status.OK] * 3


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("algorithm", ["lloyd", "hartigan"])
@pytest.mark.parametrize("factor", [2.0**66, 2.0**-66])
def test_weights_of_any_size_weigh_the_same(form: tuple[str, str | None], algorithm: str, factor: float) -> None:
    x, w = normal(60, 3), 0.5 + torch.rand(60, generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"init": x[:7].clone(), "algorithm": algorithm}
    plain, scaled = (run(form, x, 7, sample_weight=f * w, **options) for f in (1.0, factor))
    assert torch.equal(scaled.labels, plain.labels)
    assert torch.equal(scaled.centroids, plain.centroids)
    torch.testing.assert_close(scaled.inertia / factor, plain.inertia)
    mixed = run(form, x, 7, sample_weight=torch.where(torch.arange(60) % 2 == 0, w * 1e20, w * 1e-20), **options)
    assert int(mixed.status) == Status.OK
    assert bool(mixed.centroids.isfinite().all())


# --- empty clusters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_cluster_is_empty_while_there_are_enough_distinct_points(
    form: tuple[str, str | None], dtype: torch.dtype
) -> None:
    # Given centroids far away, stopped after one pass; and points that differ in the last places of float32 only.
    x = normal(40, 3).to(dtype)
    far = torch.cat([x[:3], 900 + x[:5]])
    stopped = run(form, x, 8, init=far, algorithm="lloyd", max_iter=1)
    assert int(stopped.counts.min()) > 0
    assert int(stopped.status) == Status.MAX_ITER
    # Both points of a cluster are nearer to others once their means have moved.
    line = torch.tensor([3.0, 4.001, 9.002, 9.003, 1.004, 10.005, 4.006, 3.007], dtype=dtype)[:, None]
    start = torch.tensor([3.0, 4.401, 1e6], dtype=dtype)[:, None]
    assert int(run(form, line, 3, init=start, algorithm="lloyd", max_iter=1).counts.min()) > 0
    close = (1 + 2.0**-22 * torch.arange(8)).repeat(5)[:, None].to(dtype)
    for algorithm in ("lloyd", "hartigan"):
        found = run(form, close, 8, algorithm=algorithm)
        assert found.counts.tolist() == [5] * 8
        assert float(found.inertia) <= 1e-28


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_copies_of_few_points_stay_together(form: tuple[str, str | None], dtype: torch.dtype) -> None:
    # Means of copies are rounded: that must split no group.
    x = (normal(5, 17).to(dtype) + 1 / 3).repeat(6, 1)
    for algorithm in ("lloyd", "hartigan"):
        found = run(form, x, 9, algorithm=algorithm)
        assert sorted(found.counts.tolist()) == [0] * 4 + [6] * 5
        assert int(found.status) == Status.EMPTY_CLUSTERS
        assert torch.equal(found.labels, found.labels[:5].repeat(6))


@pytest.mark.parametrize("backend", BACKENDS)
def test_points_without_weight_have_the_label_that_assign_gives_them(backend: str) -> None:
    x = torch.tensor([[0.0], [0.0], [1.0], [1.0], [50.0]])
    w = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    found = kmeans(x, 3, sample_weight=w, init=torch.tensor([[0.0], [1.0], [50.0]]), backend=backend)
    assert found.labels.tolist() == [0, 0, 1, 1, 1]
    assert torch.equal(kmeans_assign(x, found.centroids, backend=backend), found.labels)


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [backend.name for backend in OPERATOR.backends])
@pytest.mark.parametrize(
    ("seeding", "algorithm", "message"),
    [
        ("k-means++", "nonsense", "unknown algorithm 'nonsense': use one of hartigan, lloyd"),
        ("kmeans||", "lloyd", r"unknown init 'kmeans\|\|': use one of k-means\+\+, random"),
    ],
)
def test_every_backend_refuses_unknown_names(name: str, seeding: str, algorithm: str, message: str) -> None:
    x = normal(12, 2)[None]
    function = next(backend.function for backend in OPERATOR.backends if backend.name == name)
    with pytest.raises(ValueError, match=message):
        function(x, None, None, 3, seeding, 1, algorithm, 5, 0.0, 0, None)
    with pytest.raises(ValueError, match=message):
        torch.ops.fusion_kernels.kmeans(x, None, None, 3, seeding, 1, algorithm, 5, 0.0, 0, None)
    for backend in (reference, cpu_backend):
        with pytest.raises(ValueError, match=message):
            backend.kmeans(x, None, None, Options(3, seeding, 1, algorithm))
