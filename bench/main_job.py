"""The published fusion on all-MiniLM-L6-v2: errors per FFN on real sentences, over seeds, and the time of each step.

    python bench/main_job.py [--data FOLDER] [--seeds 5] [--out build/main_job.json]

To compare with: output errors of .323 / .425 for layers 1 / 4 at 384 neurons, measured on SST-2 sentences with
scikit-learn's clustering. With `--data`, that folder's `sst2_dev.tsv` is used; without, the package's sentences.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers
from support import model_folder
from transformers import AutoModel, AutoTokenizer

import mlp_fusion
from fusion_kernels import backends
from mlp_fusion.measure import ffn_errors
from mlp_fusion.methods import get_method
from mlp_fusion.neurons import NeuronBundle
from mlp_fusion.reducing.chosen import find_ffns
from mlp_fusion.running.sentences import read_sentences
from mlp_fusion.running.taps import capture_activations

WIDTH = 384
#: Inputs for the outputs' error, and for the kernels (whose cost grows with the square).
ROWS, NTK_ROWS = 4096, 512


def errors_over_seeds(sentences: list[str], seeds: int) -> list[dict[str, object]]:
    """Per layer: median, smallest and largest error of the published method over seeds, in each parameterization."""
    model = AutoModel.from_pretrained(model_folder()).eval()
    batch = AutoTokenizer.from_pretrained(model_folder())(sentences, padding=True, return_tensors="pt")
    architecture, sites = find_ffns(model)
    inputs = capture_activations(model, architecture, sites, batch, rows=ROWS, seed=0)
    bundle = NeuronBundle.stack([architecture.read(site) for site in sites])
    runs = [get_method("published")(bundle, WIDTH, seed=seed) for seed in range(seeds)]
    rows: list[dict[str, object]] = []
    for n, site in enumerate(sites):
        original, x = bundle.select(n), inputs[n].x
        output = [_output_error(original, run.bundle.select(n), x) for run in runs]
        row: dict[str, object] = {
            "layer": site.index,
            "output_error": _spread(output),
            "largest_cluster": [int(run.counts[n].max()) for run in runs if run.counts is not None],
            "singletons": [int((run.counts[n] == 1).sum()) for run in runs if run.counts is not None],
        }
        for form in ("scaled", "split", "folded"):
            found = [ffn_errors(original, run.bundle.select(n).parameterized(form), x[:NTK_ROWS]).ntk for run in runs]
            row[f"ntk_error_{form}"] = {k: _spread([f[k]["total"] for f in found]) for k in ("gd", "sign")}
        rows.append(row)
    return rows


def _output_error(original: NeuronBundle, fused: NeuronBundle, x: torch.Tensor) -> float:
    return mlp_fusion.measure.relative_error(fused.forward(x)[0], original.forward(x)[0])


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def timed_job() -> dict[str, object]:
    """The demo's three steps with their wall-clock seconds, and the report that it prints."""
    with tempfile.TemporaryDirectory() as folder:
        steps: dict[str, float] = {}
        started = time.perf_counter()
        mlp_fusion.plan(model_folder(), 0.25)
        steps["plan"] = time.perf_counter() - started
        started = time.perf_counter()
        report = mlp_fusion.compress(model_folder(), Path(folder) / "out", 0.25)
        steps["compress"] = time.perf_counter() - started
        started = time.perf_counter()
        verification = mlp_fusion.verify(Path(folder) / "out")
        steps["verify"] = time.perf_counter() - started
    checks = {check.name: check.detail for check in verification.checks}
    return {"seconds": steps, "report": report.to_dict(), "verified": verification.passed, "checks": checks}


def main() -> None:
    """Measure, print the figures, and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with sst2_dev.tsv")
    parser.add_argument("--seeds", type=int, default=5, help="seeds to take medians over")
    parser.add_argument("--out", type=Path, default=Path("build/main_job.json"), help="JSON to write")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    file = None if options.data is None else options.data / "sst2_dev.tsv"
    sentences = read_sentences(file, limit=1000)
    rows = errors_over_seeds(sentences, options.seeds)
    result = {
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "gpu": None},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "backends": backends(),
        "sentences": {"source": "the package's" if file is None else file.name, "count": len(sentences)},
        "seeds": options.seeds,
        "published_fusion_over_seeds": rows,
        "demo": timed_job(),
    }
    for row in rows:
        print(row["layer"], row["output_error"], row["ntk_error_scaled"], row["ntk_error_split"])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
