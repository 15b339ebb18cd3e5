"""What the Triton kernels of k-means prove themselves with: see `fusion_kernels.proof`.

The Gram matrix and nearest centroids against float64, within what the algorithm grants them; float64 problems label by
label against the reference; float32 problems by what is true of any clustering, and by their bits alone and in a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusion_kernels.kmeans import gpu_backend, reference
from fusion_kernels.kmeans.types import Algorithm, KMeansResult, Options, Seeding
from fusion_kernels.proof.cases import Case, Found, beyond, first_of, same_bits

#: Points and columns: less than a tile each way, whole ones and a rest, and many steps along the columns.
GRAMS = [(17, 65), (300, 1537), (1100, 200)]
#: Points, columns, clusters.
WIDE = [(65, 17, 16), (123, 65, 40)]
NARROW = (520, 129, 130)
#: The same without groups, which takes many rounds of both kinds, so that graphs of them are launched again and again.
LONG = (400, 3, 12)
NEAREST = [(1, 1, 1), (700, 123, 70)]


def triton(device: torch.device) -> list[Case]:
    """The cases of `triton` on a device."""
    modes = [
        Options(0, seed=3),
        Options(0, seed=3, algorithm=Algorithm.LLOYD, tol=0.05),
        Options(0, seed=3, seeding=Seeding.RANDOM, n_init=2),
    ]
    return [
        *(_gram(n, d, device) for n, d in GRAMS),
        *(_nearest(n, d, k, dtype, device) for n, d, k in NEAREST for dtype in (torch.float32, torch.float64)),
        *(_like_the_reference(n, d, k, options, device) for n, d, k in WIDE for options in modes),
        _like_the_reference(*LONG, modes[0], device, draw=scattered),
        _float32(device),
    ]


def points(n: int, d: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(n, d) in loose groups away from the origin, the same on every machine."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(1 + n // 6, d, generator=g, dtype=torch.float64)
    which = torch.randint(len(centres), (n,), generator=g)
    return (centres[which] + 0.4 * torch.randn(n, d, generator=g, dtype=torch.float64) + 0.5).to(dtype)


def scattered(n: int, d: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(n, d) in a cube, the same on every machine."""
    return torch.rand(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _gram(n: int, d: int, device: torch.device) -> Case:
    x = torch.stack([points(n, d, seed) for seed in range(2)])

    def run() -> Found:
        from fusion_kernels.kmeans import triton_points

        prepared = triton_points.prepare(x.to(device), None, None, 1, True)
        return {"gram": prepared.gram[:, :, :n].contiguous(), "mean": prepared.mean}

    def wrong(found: Found) -> str | None:
        from fusion_kernels.kmeans.triton_points import SLACK

        rows = x.double() - found["mean"][:, None].double()
        exact, norms = rows @ rows.mT, rows.norm(dim=2)
        # The matrix is scaled by a power of two, which is found again in its largest entry.
        scale = torch.exp2(torch.log2(found["gram"].double().amax((1, 2)) / exact.amax((1, 2))).round())
        allowed = SLACK[torch.float32] * norms[:, :, None] * norms[:, None, :]
        asymmetric = None if torch.equal(found["gram"], found["gram"].mT) else "the Gram matrix is not symmetric"
        return first_of(
            beyond("the mean", found["mean"], x.double().mean(1), 4e-6),
            asymmetric,
            beyond("the Gram matrix", found["gram"].double() / scale[:, None, None], exact, allowed),
        )

    return Case(f"Gram matrix of {n} x {d}", run, wrong)


def _nearest(n: int, d: int, k: int, dtype: torch.dtype, device: torch.device) -> Case:
    x, centroids = points(n, d, 0, dtype)[None], points(k, d, 1, dtype)[None]

    def run() -> Found:
        return {"labels": gpu_backend.assign(x.to(device), centroids.to(device))}

    def wrong(found: Found) -> str | None:
        return _not_nearest(x[0], centroids[0], found["labels"][0])

    return Case(f"nearest of {k} centroids in {dtype}, {n} x {d}", run, wrong)


def _not_nearest(x: Tensor, centroids: Tensor, labels: Tensor) -> str | None:
    """In one line whether a label is no centroid's, or another centroid is nearer by more than ties are granted."""
    k = len(centroids)
    if not bool(((labels >= 0) & (labels < k)).all()):
        return f"labels are outside [0, {k})"
    distances = (x.double()[:, None] - centroids.double()).square().sum(2)
    own = distances.gather(1, labels[:, None]).squeeze(1)
    return beyond("the distance to the nearest", own, distances.amin(1), 1e-13 * distances.amax(1))


def _like_the_reference(
    n: int, d: int, k: int, options: Options, device: torch.device, *, draw: Callable[..., Tensor] = points
) -> Case:
    x = torch.stack([draw(n, d, seed, torch.float64) for seed in range(2)])
    weight = torch.rand(2, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight[:, ::7] = 0
    told = Options(k, *(value for name, value in vars(options).items() if name != "n_clusters"))

    def run() -> Found:
        return _named(gpu_backend.kmeans(x.to(device), weight.to(device), None, told))

    def wrong(found: Found) -> str | None:
        expected = _named(reference.kmeans(x, weight, None, told))
        exact = ("labels", "counts", "n_iter", "status")
        differ = [name for name in exact if not torch.equal(found[name], expected[name])]
        return first_of(
            f"{', '.join(differ)} are not those of the reference" if differ else None,
            beyond("centroids", found["centroids"], expected["centroids"], 1e-12),
            beyond("inertia", found["inertia"], expected["inertia"], 1e-12 * expected["inertia"]),
        )

    how = f"{told.seeding.value}, {told.algorithm.value}"
    return Case(f"{n} float64 points in {k} clusters, {how}", run, wrong)


def _float32(device: torch.device) -> Case:
    n, d, k = NARROW
    x, options = torch.stack([points(n, d, seed) for seed in range(3)]), Options(k, seed=1)

    def run() -> Found:
        there = x.to(device)
        alone = _named(gpu_backend.kmeans(there[1:2].clone(), None, None, options))
        together = _named(gpu_backend.kmeans(there, None, None, options))
        return together | {f"{name} alone": value for name, value in alone.items()}

    def wrong(found: Found) -> str | None:
        for name in KMeansResult._fields:
            if not same_bits(found[name][1], found[f"{name} alone"][0]):
                return f"{name} of a problem are others in a batch"
        together = {name: found[name] for name in KMeansResult._fields}
        return first_of(*(_no_clustering(x[b], {name: t[b] for name, t in together.items()}) for b in range(len(x))))

    return Case(f"{n} float32 points in {k} clusters", run, wrong)


def _no_clustering(x: Tensor, found: dict[str, Any]) -> str | None:
    """In one line what of a result does not belong together."""
    labels, centroids, wide = found["labels"], found["centroids"], x.double()
    unfit = _not_nearest(x, centroids, labels)
    if unfit is not None:
        return unfit
    counts = torch.bincount(labels, minlength=len(centroids))
    means = torch.zeros_like(centroids, dtype=torch.float64).index_add_(0, labels, wide) / counts[:, None]
    inertia = (wide - centroids[labels].double()).square().sum()
    return first_of(
        None if torch.equal(counts, found["counts"]) else "counts are not those of the labels",
        beyond("centroids", centroids, means, 1e-6 * float(wide.abs().max())),
        beyond("inertia", found["inertia"], inertia, 1e-6 * float(inertia)),
    )


def _named(results: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return dict(zip(KMeansResult._fields, results, strict=True))
