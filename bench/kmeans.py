"""k-means on the CPU beside scikit-learn and faiss: seconds, inertia, memory and growth, in one run.

    python bench/kmeans.py [--shapes NAME ...] [--large] [--quick] [--threads N] [--out bench/results/kmeans-cpu.json]

Needs the packages of the extra `bench`. Every peer runs with all threads on the same points: with k-means++ of its
own, from the same given centroids, and from the same random points. Seconds are the least of a few runs, of a single
run where one takes longer than two seconds, as elapsed and as used by all threads; nothing is extrapolated. On a busy
machine only the processor seconds of `--threads 1` are comparable. `--large` adds (14336, 3584, 12288), for which only
this library is timed. The run fails if a result is worse than a peer's from the same seeds.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import sklearn
import torch
from measuring import peak_bytes
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from sklearn.cluster import KMeans
from support import model_folder, neuron_like
from threadpoolctl import threadpool_limits
from torch import Tensor
from transformers import AutoModel

from fusion_kernels import backends, kmeans, kmeans_assign
from fusion_kernels.kmeans.seeding import random_seeds
from mlp_fusion.neurons import NeuronBundle
from mlp_fusion.reducing.chosen import find_ffns

#: Shapes N, K, D, and how often scikit-learn runs with ten seedings: once where that takes a minute or less.
SHAPES: dict[str, tuple[int, int, int, bool]] = {
    "minilm": (1536, 384, 769, True),
    "bert": (3072, 768, 1537, True),
    "gpt2-medium": (4096, 1024, 2049, False),
    "moe-wide": (2048, 512, 21504, False),
}
LARGE = (14336, 3584, 12288)
BATCH = (768, 384, 6144)
SEED = 0
#: How much worse than a peer's an inertia from the same seeds may be: near-ties decided differently in float32.
TOLERANCE = 1e-3


def timed(work: Callable[[], Any], repeats: int = 5) -> tuple[dict[str, float], Any]:
    """The least elapsed and processor seconds of a few runs, or of one of more than two seconds; the last result."""
    elapsed = processor = float("inf")
    result = None
    for _ in range(repeats):
        started, used = time.perf_counter(), time.process_time()
        result = work()
        elapsed = min(elapsed, time.perf_counter() - started)
        processor = min(processor, time.process_time() - used)
        if elapsed > 2:
            break
    return {"seconds": elapsed, "processor seconds": processor}, result


def minilm_rows() -> Tensor:
    """(1536, 769): the neurons of the first layer of all-MiniLM-L6-v2."""
    model = AutoModel.from_pretrained(model_folder()).eval()
    architecture, sites = find_ffns(model)
    return NeuronBundle.stack([architecture.read(sites[0])]).vectors()[0].detach().float().contiguous()


def product_rate() -> float:
    """Multiply-adds per second of a large float32 product with all threads."""
    a, b = torch.randn(3072, 3072), torch.randn(3072, 3072)
    best, _ = timed(lambda: a @ b, 10)
    return 3072.0**3 / best["seconds"]


def inertia(x: Tensor, centroids: Tensor) -> float:
    """Sum of squared distances to the nearest centroids, in float64."""
    labels = kmeans_assign(x, centroids)
    return float((x.double() - centroids.double()[labels]).square().sum())


def compare(x: Tensor, K: int, ten: bool, rate: float) -> dict[str, Any]:
    """One shape: this library, scikit-learn and faiss, each with its own seeds and with the same ones."""
    n, d = x.shape
    rows = x.numpy()
    found: dict[str, Any] = {"N": n, "K": K, "D": d}

    def ours(**options: Any) -> dict[str, Any]:
        taken, result = timed(lambda: kmeans(x, K, backend="cpu", seed=SEED, **options))
        return {**taken, "inertia": float(result.inertia), "n_iter": int(result.n_iter)}

    def scikit(**options: Any) -> dict[str, Any]:
        model = KMeans(K, random_state=SEED, algorithm="lloyd", **options)
        taken, _ = timed(lambda: model.fit(rows), 3)
        return {**taken, "inertia": inertia(x, _tensor(model.cluster_centers_)), "n_iter": model.n_iter_}

    found["ours"] = {
        "lloyd": ours(algorithm="lloyd"),
        "lloyd n_init=10": ours(algorithm="lloyd", n_init=10),
        "hartigan": ours(algorithm="hartigan"),
    }
    found["sklearn"] = {"lloyd": scikit(n_init=1)}
    if ten:
        found["sklearn"]["lloyd n_init=10"] = scikit(n_init=10)

    def faiss_lloyd(start: Any, n_iter: int, **options: Any) -> dict[str, Any]:
        index = faiss.Kmeans(d, K, niter=max(1, n_iter), min_points_per_centroid=1, seed=SEED, **options)
        taken, _ = timed(lambda: index.train(rows, init_centroids=start), 3)
        return {**taken, "inertia": inertia(x, _tensor(index.centroids)), "n_iter": index.cp.niter}

    # faiss does as many iterations as it is told: as many as this library needed.
    plus_plus = {"init_method": faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS}
    found["faiss"] = {"lloyd": faiss_lloyd(None, found["ours"]["lloyd"]["n_iter"], **plus_plus)}
    found["ward"] = ward_start(x, K, found["ours"]["hartigan"]["inertia"])

    # Given centroids: distinct points, so that no cluster is empty and all libraries iterate alike.
    start = kmeans(x, K, algorithm="lloyd", max_iter=0, seed=SEED).centroids
    own = ours(algorithm="lloyd", init=start)
    found["same seeds"] = {
        "ours": own,
        "sklearn": scikit(init=start.numpy(), n_init=1, tol=0.0, max_iter=100),
        "faiss": faiss_lloyd(start.numpy(), own["n_iter"]),
    }
    for name, peer in found["same seeds"].items():
        if own["inertia"] > peer["inertia"] * (1 + TOLERANCE):
            sys.exit(f"({n}, {K}, {d}): inertia {own['inertia']} is worse than {peer['inertia']} of {name}")

    # Random points, which are rows of the Gram matrix for us: `random_seeds` are what init="random" starts from.
    drawn = rows[random_seeds(torch.ones(n, dtype=torch.float64), K, torch.Generator().manual_seed(SEED))]
    own = ours(algorithm="lloyd", init="random")
    found["random points"] = {"ours": own, "faiss": faiss_lloyd(drawn, own["n_iter"])}

    found["floor seconds"] = n * n * d / 2 / rate
    found["peak bytes"] = {
        "ours": peak_bytes(lambda: kmeans(x, K, algorithm="lloyd", backend="cpu")),
        "faiss": peak_bytes(lambda: faiss_lloyd(drawn, 1)),
        "sklearn": peak_bytes(lambda: KMeans(K, init=drawn, n_init=1, max_iter=1).fit(rows)),
    }
    return found


def ward_start(x: Tensor, K: int, hartigan: float) -> dict[str, float]:
    """Ward's tree cut at K clusters, and Hartigan moves from there: does an agglomerative start earn its time?

    The tree is scipy's nearest-neighbour chain on the distances of the Gram matrix. `inertia / hartigan` below 1 means
    that the start ended lower than k-means++ did.
    """
    started = time.perf_counter()
    centred = x - x.mean(0)
    gram = centred @ centred.T
    squares = gram.diagonal()
    distances = (squares[:, None] + squares[None, :] - 2 * gram).clamp_(min=0).sqrt_().fill_diagonal_(0)
    tree = linkage(squareform(distances.numpy(), checks=False), "ward")
    labels = torch.from_numpy(fcluster(tree, K, "maxclust")).long() - 1
    seconds = time.perf_counter() - started
    taken, result = timed(lambda: kmeans(x, K, init=labels, backend="cpu"))
    return {
        "tree seconds": seconds,
        "seconds from its labels": taken["seconds"],
        "inertia": float(result.inertia),
        "inertia / hartigan": float(result.inertia) / hartigan,
    }


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(array).float()


def ratios(found: dict[str, Any]) -> dict[str, float]:
    """How many times faster this library is, and its inertia relative to scikit-learn's."""
    ours, scikit, same = found["ours"], found["sklearn"], found["same seeds"]
    pairs = {
        "sklearn / lloyd": (scikit["lloyd"], ours["lloyd"]),
        "sklearn / hartigan": (scikit["lloyd"], ours["hartigan"]),
        "faiss k-means++ / lloyd": (found["faiss"]["lloyd"], ours["lloyd"]),
        "same seeds sklearn": (same["sklearn"], same["ours"]),
        "same seeds faiss": (same["faiss"], same["ours"]),
        "random points faiss": (found["random points"]["faiss"], found["random points"]["ours"]),
    }
    result = {}
    if "lloyd n_init=10" in scikit:
        pairs["sklearn / lloyd n_init=10"] = (scikit["lloyd n_init=10"], ours["lloyd n_init=10"])
        best = scikit["lloyd n_init=10"]["inertia"]
        result["hartigan inertia / sklearn best of 10"] = ours["hartigan"]["inertia"] / best
    for name, (peer, own) in pairs.items():
        result[name] = peer["seconds"] / own["seconds"]
        result[f"{name}, processor"] = peer["processor seconds"] / own["processor seconds"]
    result["time / floor"] = ours["lloyd"]["seconds"] / found["floor seconds"]
    result["ward inertia / hartigan"] = found["ward"]["inertia / hartigan"]
    result["hartigan inertia / sklearn"] = ours["hartigan"]["inertia"] / scikit["lloyd"]["inertia"]
    return result


def batched(problems: int) -> dict[str, Any]:
    """Many problems in one call, per problem; scikit-learn on the first two of them only."""
    n, K, d = BATCH
    x = torch.stack([neuron_like(n, d, seed=b) for b in range(problems)])
    found: dict[str, Any] = {"N": n, "K": K, "D": d, "B": problems, "sklearn problems": 2}
    for algorithm in ("lloyd", "hartigan"):
        taken, _ = timed(lambda algorithm=algorithm: kmeans(x, K, algorithm=algorithm, backend="cpu"), 2)
        found[f"{algorithm} seconds per problem"] = taken["seconds"] / problems
    started = time.perf_counter()
    for b in range(2):
        KMeans(K, n_init=1, random_state=SEED).fit(x[b].numpy())
    found["sklearn seconds per problem"] = (time.perf_counter() - started) / 2
    found["sklearn / lloyd"] = found["sklearn seconds per problem"] / found["lloyd seconds per problem"]
    found["peak bytes"] = peak_bytes(lambda: kmeans(x, K, algorithm="lloyd", backend="cpu"))
    return found


def growth() -> dict[str, list[dict[str, float]]]:
    """Seconds and peak memory of this library while one size grows and the others stay."""
    tables: dict[str, list[dict[str, float]]] = {}
    base = {"N": 2048, "K": 512, "D": 1024, "B": 1}
    steps = {"N": (512, 1024, 2048, 4096), "K": (64, 256, 512, 1024), "D": (256, 1024, 4096, 16384), "B": (1, 4, 16)}
    for name, values in steps.items():
        tables[name] = []
        for value in values:
            size = {**base, name: value}
            x = torch.stack([neuron_like(size["N"], size["D"], seed=b) for b in range(size["B"])])
            row: dict[str, float] = {name: value}
            for algorithm in ("lloyd", "hartigan"):
                taken, _ = timed(
                    lambda x=x, K=size["K"], algorithm=algorithm: kmeans(x, K, algorithm=algorithm, backend="cpu"), 3
                )
                row[algorithm] = taken["seconds"]
            peak = peak_bytes(lambda x=x, K=size["K"]: kmeans(x, K, backend="cpu"))
            if peak is not None:
                row["peak bytes"] = peak
            tables[name].append(row)
    return tables


def large() -> dict[str, Any]:
    """The largest shape, by this library only."""
    n, K, d = LARGE
    x = neuron_like(n, d)
    found: dict[str, Any] = {"N": n, "K": K, "D": d}
    for algorithm in ("lloyd", "hartigan"):
        taken, result = timed(lambda algorithm=algorithm: kmeans(x, K, algorithm=algorithm, backend="cpu"), 1)
        found[algorithm] = {**taken, "inertia": float(result.inertia), "n_iter": int(result.n_iter)}
    return found


def show(name: str, found: dict[str, Any]) -> None:
    """One shape as a few lines of text."""
    print(f"\n{name} (N {found['N']}, K {found['K']}, D {found['D']}), floor {found['floor seconds'] * 1e3:.1f} ms")
    for library in ("ours", "sklearn", "faiss", "same seeds", "random points"):
        for run, row in found[library].items():
            print(f"  {library:14} {run:18} {row['seconds'] * 1e3:10.1f} ms  inertia {row['inertia']:.6g}", end="")
            print(f"  {row['n_iter']} iterations")
    print("  " + ", ".join(f"{key} {value:.4g}" for key, value in found["ratios"].items()))
    print(f"  Ward start {found['ward']}")
    print(f"  peak memory {found['peak bytes']}")


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--large", action="store_true", help=f"also time {LARGE}")
    parser.add_argument("--quick", action="store_true", help="the shapes only: no batch, no growth tables")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every library")
    parser.add_argument("--problems", type=int, default=128, help="problems of the batch")
    parser.add_argument("--out", type=Path, default=Path("bench/results/kmeans-cpu.json"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=sklearn.exceptions.ConvergenceWarning)
    torch.set_num_threads(options.threads)
    faiss.omp_set_num_threads(options.threads)
    threadpool_limits(options.threads)
    rate = product_rate()
    result: dict[str, Any] = {
        "machine": {"processor": platform.machine(), "threads": options.threads},
        "versions": {"torch": torch.__version__, "scikit-learn": sklearn.__version__, "faiss": faiss.__version__},
        "backends": backends(),
        "product multiply-adds per second": rate,
        "shapes": {},
    }
    for name in options.shapes:
        n, K, d, ten = SHAPES[name]
        found = compare(minilm_rows() if name == "minilm" else neuron_like(n, d), K, ten, rate)
        found["ratios"] = ratios(found)
        result["shapes"][name] = found
        show(name, found)
    if not options.quick:
        result["batch"] = batched(options.problems)
        print(f"\nbatch: {result['batch']}")
        result["growth"] = growth()
        print(f"\ngrowth: {json.dumps(result['growth'], indent=1)}")
    if options.large:
        result["large"] = large()
        print(f"\nlarge: {result['large']}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
