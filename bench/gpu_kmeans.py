"""The k-means part of bench/gpu.py: whether it is right, then how long it takes beside others.

Right: the Gram matrix against float64; float64 problems label by label against the reference, in every mode; float32
problems by distances, means and inertia; a problem's bits alone, in a batch, in parts, and again; nearest centroids by
distance gap. Times are on points like a network's neurons, all problems of a batch together. Peers: Lloyd's iteration
in bfloat16 with torch (the products by cuBLAS), and flash-kmeans if it is installed; both start from random points and
run a fixed number of iterations. Inertias are computed in float64 from the labels, so that a faster result that is
worse shows. The floors are operations and bytes that cannot be avoided, over the rates of `gpu_timing.ceilings`.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from gpu_timing import DEVICE, milliseconds, require
from support import nearest_gap, neuron_like
from torch import Tensor

from fusion_kernels import kmeans, kmeans_assign
from fusion_kernels.native import exact_products

#: N, K, D and how many problems make a full batch.
SHAPES = {
    "minilm": (1536, 384, 769, 64),
    "bert": (3072, 768, 1537, 32),
    "gpt2-medium": (4096, 1024, 2049, 16),
    "moe-wide": (2048, 512, 21504, 16),
    "experts": (768, 384, 6144, 128),
    "large": (14336, 3584, 12288, 2),
}
#: N, K, D of the search for nearest centroids alone.
ASSIGN = (262_144, 1024, 1024)
ITERATIONS = 15


# --- correctness -----------------------------------------------------------------------------------------------------


def check_gram() -> dict[str, float]:
    """Largest and RMS error of Gram against float64 over those of a float32 product, for odd shapes; at most 2."""
    from fusion_kernels.kmeans import triton_points

    worst = {"max": 0.0, "rms": 0.0}
    for n, d in [(17, 65), (65, 17), (123, 129), (300, 1537), (1537, 3000), (2049, 64)]:
        x = torch.stack([neuron_like(n, d, seed) for seed in range(3)]).to(DEVICE) + 0.5
        points = triton_points.prepare(x, None, None, 1, True)
        gram = points.gram[:, :, :n]
        rows = x.double() - points.mean[:, None].double()
        exact = rows @ rows.mT
        norms = rows.norm(dim=2).clamp(min=1e-300)
        scale = torch.exp2(torch.log2(gram.double().amax((1, 2)) / exact.amax((1, 2))).round())[:, None, None]
        with exact_products():
            plain = rows.float() @ rows.float().mT
        found, peer = (
            (g.double() - exact) / (norms[:, :, None] * norms[:, None, :]) for g in (gram.double() / scale, plain)
        )
        worst["max"] = max(worst["max"], float(found.abs().max() / peer.abs().max()))
        worst["rms"] = max(worst["rms"], float(found.square().mean().sqrt() / peer.square().mean().sqrt()))
        require(torch.equal(gram, gram.mT), f"Gram of {n} x {d} is not symmetric")
    require(max(worst.values()) <= 2, f"Gram errs {worst} times as much as float32")
    return worst


def check_against_reference() -> int:
    """float64 problems have the reference's labels in every mode; returns how many were compared."""
    compared = 0
    for n, d, k in [(17, 1, 5), (65, 17, 16), (123, 65, 16), (300, 33, 1), (1537, 17, 60)]:
        x = torch.stack([neuron_like(n, d, seed, torch.float64) for seed in range(2)])
        x = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype).mul_(0.1)
        w = torch.rand(2, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        w[:, ::7] = 0
        labels = torch.randint(k, (2, n), generator=torch.Generator().manual_seed(2))
        inits: list[str | Tensor] = ["k-means++", "random", x[:, :k] + 0.01, labels]
        for init in inits:
            for options in ({}, {"algorithm": "lloyd"}, {"max_iter": 2}, {"algorithm": "lloyd", "tol": 0.1}):
                for weight in (None, w):
                    arguments: dict[str, Any] = {"sample_weight": weight, "init": init, "seed": 3, **options}
                    expected = kmeans(x, k, backend="reference", **arguments)
                    moved = {a: v.to(DEVICE) if isinstance(v, Tensor) else v for a, v in arguments.items()}
                    found = kmeans(x.to(DEVICE), k, backend="triton", **moved)
                    what = f"{(n, d, k)}, {init if isinstance(init, str) else tuple(init.shape)}, {options}"
                    for name in ("labels", "counts", "n_iter", "status"):
                        same = torch.equal(getattr(found, name).cpu(), getattr(expected, name))
                        require(same, f"{name} differ from the reference: {what}")
                    torch.testing.assert_close(found.centroids.cpu(), expected.centroids, rtol=1e-12, atol=1e-12)
                    torch.testing.assert_close(found.inertia.cpu(), expected.inertia, rtol=1e-12, atol=1e-12)
                    compared += 2
    return compared


def check_float32() -> dict[str, float]:
    """Distances, means and inertia of float32 results, and that a problem's bits do not depend on its neighbours."""
    n, k, d = 1537, 384, 769
    x = torch.stack([neuron_like(n, d, seed) for seed in range(4)]).to(DEVICE)
    x[1, 3, 5] = math.nan
    together = kmeans(x, k, backend="triton")
    again = kmeans(x, k, backend="triton")
    in_parts = kmeans(x, k, backend="triton", workspace_bytes=1)
    for b in range(4):
        alone = kmeans(x[b], k, backend="triton")
        for name, value in together._asdict().items():
            for other in (getattr(alone, name), getattr(again, name)[b], getattr(in_parts, name)[b]):
                same = torch.equal(value[b].nan_to_num(-7.0), other.nan_to_num(-7.0))
                require(same, f"problem {b}: {name} depends on the run or the batch")
    require(together.status.tolist() == [0, 4, 0, 0], f"status is {together.status.tolist()}")
    worst = {"distance_gap": 0.0, "mean": 0.0, "inertia": 0.0, "inertia_over_reference": 0.0}
    for b in (0, 2, 3):
        rows, labels = x[b].double(), together.labels[b]
        distances = torch.cdist(rows, together.centroids[b].double()).square()
        own = distances.gather(1, labels[:, None]).squeeze(1)
        scale = (rows - rows.mean(0)).square().sum(1)
        worst["distance_gap"] = max(worst["distance_gap"], float(((own - distances.amin(1)) / scale.mean()).max()))
        sums = torch.zeros(k, d, dtype=torch.float64, device=DEVICE).index_add_(0, labels, rows)
        means = sums / together.counts[b][:, None]
        worst["mean"] = max(worst["mean"], float((means - together.centroids[b]).abs().max() / rows.abs().max()))
        worst["inertia"] = max(worst["inertia"], abs(float(together.inertia[b] / own.sum()) - 1))
        reference = kmeans(x[b], k, backend="reference")
        worst["inertia_over_reference"] = max(
            worst["inertia_over_reference"], float(together.inertia[b] / reference.inertia) - 1
        )
    require(worst["distance_gap"] <= 1e-5, f"labels are not nearest: {worst}")
    require(worst["mean"] <= 1e-6 and worst["inertia"] <= 1e-6, f"means or inertia are off: {worst}")
    require(worst["inertia_over_reference"] <= 0.01, f"float32 ends higher than the reference: {worst}")
    return worst


def check_assign() -> float:
    """Largest distance gap of the nearest centroids in float32, relative to the squared norms."""
    worst = 0.0
    for n, d, k in [(1, 1, 1), (17, 5, 3), (1537, 123, 70), (5000, 769, 300)]:
        x, centroids = neuron_like(n, d).to(DEVICE), neuron_like(k, d, seed=1).to(DEVICE)
        labels = kmeans_assign(x, centroids, backend="triton")
        worst = max(worst, nearest_gap(x, centroids, labels))
    require(worst <= 32 * torch.finfo(torch.float32).eps, f"labels are not nearest: gap {worst}")
    return worst


def check() -> dict[str, Any]:
    """All checks; the run ends at the first that fails."""
    return {
        "gram_error_over_float32": check_gram(),
        "float64_problems_like_the_reference": check_against_reference(),
        "float32": check_float32(),
        "assign_gap": check_assign(),
    }


# --- time ------------------------------------------------------------------------------------------------------------


def torch_lloyd(x: Tensor, start: Tensor, iterations: int) -> Tensor:
    """Lloyd's iteration as one writes it with torch: bfloat16 products, float32 sums; labels (B, N)."""
    B, N, D = x.shape
    K = start.shape[1]
    low, centroids = x.bfloat16(), start.clone()
    labels = torch.empty(B, N, dtype=torch.int64, device=x.device)
    offset = torch.arange(B, device=x.device)[:, None] * K
    for _ in range(iterations):
        norms = centroids.square().sum(2)
        distances = torch.baddbmm(norms[:, None, :].bfloat16(), low, centroids.bfloat16().mT, alpha=-2)
        labels = distances.argmin(2)
        flat = (labels + offset).flatten()
        sums = torch.zeros(B * K, D, device=x.device).index_add_(0, flat, x.flatten(0, 1))
        counts = torch.bincount(flat, minlength=B * K)[:, None]
        centroids = torch.where(counts > 0, sums / counts.clamp(min=1), centroids.flatten(0, 1)).view(B, K, D)
    return labels


def inertia(x: Tensor, labels: Tensor, K: int) -> float:
    """Mean over problems of the inertia of the labels over that of one cluster, in float64."""
    shares = []
    for rows, at in zip(x, labels.long(), strict=True):
        exact = rows.double()
        sums = torch.zeros(K, rows.shape[1], dtype=torch.float64, device=x.device).index_add_(0, at, exact)
        means = sums / torch.bincount(at, minlength=K).clamp(min=1)[:, None]
        shares.append(float((exact - means[at]).square().sum() / (exact - exact.mean(0)).square().sum()))
    return statistics.mean(shares)


def measure(name: str, rates: dict[str, float]) -> dict[str, Any]:
    """Times of one batch, per problem, with inertias and the share of the floors that Gram and a sweep of it reach."""
    from fusion_kernels.kmeans import triton_points

    N, K, D, problems = SHAPES[name]
    x = torch.stack([neuron_like(N, D, seed) for seed in range(problems)]).to(DEVICE)
    order = torch.stack([torch.randperm(N, generator=torch.Generator().manual_seed(s))[:K] for s in range(problems)])
    start = x.gather(1, order.to(DEVICE)[:, :, None].expand(-1, -1, D))
    result: dict[str, Any] = {"N": N, "K": K, "D": D, "problems": problems, "ms_per_problem": {}, "inertia": {}}

    def record(name: str, work: Callable[[], Tensor]) -> None:
        times = milliseconds(work)
        result["ms_per_problem"][name] = {key: value / problems for key, value in times.items()}
        result["inertia"][name] = inertia(x, work(), K)

    for backend in ("triton", "triton-fast"):
        record(f"{backend}, k-means++, hartigan", lambda b=backend: kmeans(x, K, backend=b).labels)  # type: ignore[misc]
        options: dict[str, Any] = {"backend": backend, "algorithm": "lloyd", "max_iter": ITERATIONS}
        record(f"{backend}, k-means++, lloyd", lambda o=options: kmeans(x, K, **o).labels)  # type: ignore[misc]
        record(
            f"{backend}, given points, lloyd",
            lambda o=options: kmeans(x, K, init=start, **o).labels,  # type: ignore[misc]
        )
    record("triton, given points, hartigan", lambda: kmeans(x, K, init=start, backend="triton").labels)
    record(f"torch bf16, given points, {ITERATIONS} iterations", lambda: torch_lloyd(x, start, ITERATIONS))
    if importlib.util.find_spec("flash_kmeans") is not None:
        from flash_kmeans import batch_kmeans_Euclid

        low = x.bfloat16()
        record(
            f"flash-kmeans bf16, random points, {ITERATIONS} iterations",
            lambda: batch_kmeans_Euclid(low, K, max_iters=ITERATIONS)[0],
        )

    gram = milliseconds(lambda: triton_points.prepare(x, None, None, K, True).gram)["median"] / problems
    floor = 3 * N * N * D / rates["bf16_flops"] * 1e3
    result["gram"] = {"ms_per_problem": gram, "floor_ms": floor, "share_of_floor": floor / gram}
    sweep = 4 * N * N / rates["copy_bytes"] * 1e3
    greedy = K * (2 + int(math.log(K))) * 4 * N / rates["copy_bytes"] * 1e3
    result["floors_ms"] = {"one sweep of Gram": sweep, "k-means++ on Gram": greedy}
    times = {name: value["median"] for name, value in result["ms_per_problem"].items()}
    seeded = times["triton, k-means++, lloyd"] - times["triton, given points, lloyd"]
    result["k-means++ over given points, ms"] = seeded
    return result


def measure_assign(rates: dict[str, float]) -> dict[str, Any]:
    """Nearest centroids of many points, beside a bfloat16 product that is stored and searched by torch."""
    N, K, D = ASSIGN
    x = torch.randn(N, D, device=DEVICE)
    centroids = torch.randn(K, D, device=DEVICE)
    low, norms = x.bfloat16(), centroids.square().sum(1)

    def stored() -> Tensor:
        return torch.addmm(norms.bfloat16(), low, centroids.bfloat16().mT, alpha=-2).argmin(1)

    return {
        "N": N, "K": K, "D": D,
        "triton": milliseconds(lambda: kmeans_assign(x, centroids, backend="triton")),
        "torch bf16": milliseconds(stored),
        "floor_ms": 6 * N * K * D / rates["bf16_flops"] * 1e3,
    }  # fmt: skip


def run(rates: dict[str, float], shapes: list[str]) -> dict[str, Any]:
    """Times of `shapes` and of the search for nearest centroids, printed as they come."""
    results: dict[str, Any] = {}
    for name in shapes:
        result = results[name] = measure(name, rates)
        print(name, "Gram: share of the floor", round(result["gram"]["share_of_floor"], 3))
        for what, times in result["ms_per_problem"].items():
            print(f"  {what:45s} {times['median']:10.3f} ms  inertia {result['inertia'][what]:.5f}")
    results["assign"] = measure_assign(rates)
    print("assign", results["assign"])
    return results
