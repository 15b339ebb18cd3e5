"""Every compression method on the FFNs of all-MiniLM-L6-v2, as it is and after each correction, on held-out sentences.

    python bench/fidelity.py --data FOLDER [--width 384] [--sentences 512] [--tune STEPS] [--long STEPS] [--many 3072]
        [--out FILE]

Calibrated on the first sentences of `FOLDER/sst2_train.tsv`, measured on all of `FOLDER/sst2_dev.tsv`
(`sentence<TAB>label`). Without `--data`: on the two halves of the package's own sentences, which are few.

Per method and layer: relative Frobenius errors of the FFN's outputs (unfitted, after the refit) and of its tangent
kernel (in the parameterization that suits the kernel: before and after matching, both after the refit). Per method:
cosines of the sentence embeddings to the original's with all layers reduced. `fuse` from end to end, also sequentially
and with local tuning (`--tune`), without text and on random tokens, and, with `--long`, the default tuned for that many
steps on `--many` sentences. Seconds of every step: the run over the calibration text beside a bare run of the model,
clustering, refit, matching.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from support import model_folder
from transformers import AutoModel

import mlp_fusion
from fusion_kernels import backends
from fusion_kernels.ntk import Kernel
from mlp_fusion.calibration import FFNStatistics, collect, match_ntk, refit
from mlp_fusion.calibration.matching import MATCHING_ROWS
from mlp_fusion.choices import METHODS
from mlp_fusion.families.exchange import install
from mlp_fusion.measure import ffn_errors, relative_error
from mlp_fusion.measure.embeddings import compare_embeddings, embed
from mlp_fusion.methods import get_method
from mlp_fusion.neurons import NeuronBundle
from mlp_fusion.reducing.chosen import find_ffns
from mlp_fusion.running.batches import Batch, token_mask
from mlp_fusion.running.sentences import read_sentences
from mlp_fusion.running.taps import Activations, capture_activations
from mlp_fusion.store.tokenizers import tokenize

#: Held-out rows for the outputs' error, and for the kernels (whose cost grows with the square).
ROWS, NTK_ROWS = 8192, 512
#: Parameterization -> the kernel that it is for.
FORMS: dict[str, Kernel] = {"scaled": "sign", "split": "gd"}
SEEDS = 3
#: Random tokens, in the row that learns from those.
SYNTHETIC = 16_384


class Bench:
    """The model, its statistics on the calibration text, and what errors are measured on."""

    def __init__(self, calibration: Sequence[Batch], held_out: Sequence[Batch], width: int) -> None:
        self.model: Any = AutoModel.from_pretrained(model_folder()).eval()
        self.width, self.calibration, self.held_out = width, calibration, held_out
        self.architecture, self.sites = find_ffns(self.model)
        started = time.perf_counter()
        self.statistics: list[FFNStatistics] = collect(self.model, self.architecture, self.sites, calibration, seed=0)
        self.calibration_seconds = time.perf_counter() - started
        self.bare_seconds = self._bare_run()
        self.rows: list[Activations] = capture_activations(
            self.model, self.architecture, self.sites, held_out, rows=ROWS, seed=0
        )
        # Batches are sorted by length: any slice would be of sentences of one length.
        chosen = torch.randperm(len(self.rows[0].x), generator=torch.Generator().manual_seed(0))[:NTK_ROWS]
        self.kernel_rows = [rows.x[chosen] for rows in self.rows]
        self.originals = [self.architecture.read(site) for site in self.sites]
        self.bundle = NeuronBundle.stack(self.originals)
        self.embeddings = embed(self.model, held_out)

    @torch.no_grad()
    def _bare_run(self) -> float:
        """Seconds that the model alone takes over the calibration text: no calibration is faster."""
        started = time.perf_counter()
        for batch in self.calibration:
            self.model(**batch)
        return time.perf_counter() - started

    def output_errors(self, bundles: Sequence[NeuronBundle]) -> list[float]:
        return [relative_error(b.forward(r.x)[0], r.y) for b, r in zip(bundles, self.rows, strict=True)]

    def kernel_errors(self, bundles: Sequence[NeuronBundle], form: str) -> list[float]:
        return [
            ffn_errors(original, b.parameterized(form), x).ntk[FORMS[form]]["total"]
            for original, b, x in zip(self.originals, bundles, self.kernel_rows, strict=True)
        ]

    def cosine(self, bundles: Sequence[NeuronBundle]) -> dict[str, float]:
        model = copy.deepcopy(self.model)
        for site, bundle in zip(self.architecture.sites(model), bundles, strict=True):
            install(site, bundle, "folded")
        found = compare_embeddings(embed(model, self.held_out), self.embeddings)
        return {"mean": found.mean, "smallest": found.minimum}

    def method(self, name: str, *, calibrated: bool) -> dict[str, Any]:
        """Everything about one method."""
        method = get_method(name)
        known = self.statistics if calibrated else None
        reduction, seconds = _timed(lambda: method(self.bundle, self.width, seed=0, statistics=known))
        plain = [reduction.bundle.select(n) for n in range(len(self.sites))]
        fits, refit_seconds = _timed(lambda: [refit(b, s) for b, s in zip(plain, self.statistics, strict=True)])
        fitted = [fit.bundle for fit in fits]
        result: dict[str, Any] = {
            "method": name,
            "calibrated": calibrated,
            "output_error": self.output_errors(plain),
            "output_error_refitted": self.output_errors(fitted),
            "cosine": self.cosine(plain),
            "cosine_refitted": self.cosine(fitted),
            "ridges": [fit.ridge for fit in fits],
            "seconds": {"method": seconds, "refit": refit_seconds},
        }
        if reduction.counts is not None:
            result["largest_cluster"] = reduction.counts.max(dim=1).values.tolist()
            result["singletons"] = (reduction.counts == 1).sum(dim=1).tolist()
        if method.narrows:
            result["kernel"] = {form: self.kernel(fitted, plain, form, result["seconds"]) for form in FORMS}
        return result

    def kernel(
        self, fitted: list[NeuronBundle], plain: list[NeuronBundle], form: str, seconds: dict[str, float]
    ) -> dict[str, Any]:
        kernel = FORMS[form]
        rows = [s.rows(MATCHING_ROWS, seed=0) for s in self.statistics]
        triples = list(zip(self.originals, fitted, rows, strict=True))
        matched, seconds[f"match_{kernel}"] = _timed(
            lambda: [match_ntk(o, f, x, kernel=kernel, parameterization=form) for o, f, x in triples]
        )
        return {
            "kernel": kernel,
            "unfitted": self.kernel_errors(plain, form),
            "refitted": self.kernel_errors(fitted, form),
            "matched": self.kernel_errors(matched, form),
            "largest_scale_matched": [float(m.scale.max()) for m in matched if m.scale is not None],
        }

    def whole(self, calibration: Sequence[Batch] | None, **options: Any) -> dict[str, Any]:
        """`fuse` from end to end, on `calibration` if there is any."""
        given = {"sample": self.held_out, "calibration": calibration, **options}
        model = copy.deepcopy(self.model)
        report, seconds = _timed(lambda: mlp_fusion.fuse(model, **given))
        found = compare_embeddings(embed(model, self.held_out), self.embeddings)
        return {
            "options": options,
            "calibration_tokens": 0 if report.calibration is None else report.calibration.tokens,
            "cosine": {"mean": found.mean, "smallest": found.minimum},
            "output_error": [row.output_error for row in report.rows],
            "widths": [row.neurons_after for row in report.rows],
            "held_out_error": [row.held_out_error for row in report.rows],
            "correction_seconds": sum(row.correction_seconds for row in report.rows),
            "seconds": seconds,
        }

    def data_free(self) -> list[dict[str, Any]]:
        """The published choice beside ours, neither with data, over seeds."""
        rows = []
        for name in ("published", "fusion"):
            for seed in range(SEEDS):
                reduction = get_method(name)(self.bundle, self.width, seed=seed)
                bundles = [reduction.bundle.select(n) for n in range(len(self.sites))]
                rows.append({"method": name, "seed": seed, "output_error": self.output_errors(bundles)})
        return rows


def _timed(function: Any) -> tuple[Any, float]:
    started = time.perf_counter()
    result = function()
    return result, time.perf_counter() - started


def _tokens(batches: Sequence[Batch]) -> int:
    return sum(int(token_mask(batch).sum()) for batch in batches)


def _sentences(data: Path | None, count: int) -> tuple[list[str], list[str], str]:
    if data is None:
        own = read_sentences(None)
        return own[::2], own[1::2], "the package's"
    return (
        read_sentences(data / "sst2_train.tsv", limit=count),
        read_sentences(data / "sst2_dev.tsv", limit=871),
        "SST-2",
    )


def main() -> None:
    """Measure, print the figures, and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with sst2_train.tsv and sst2_dev.tsv")
    parser.add_argument("--width", type=int, default=384, help="neurons to keep of 1536")
    parser.add_argument("--sentences", type=int, default=512, help="calibration sentences")
    parser.add_argument("--tune", type=int, default=600, help="steps of local tuning, in the rows that have it")
    parser.add_argument("--long", type=int, default=0, help="steps of local tuning on many sentences; 0: no such row")
    parser.add_argument("--many", type=int, default=3072, help="how many those are")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--out", type=Path, default=Path("build/fidelity.json"), help="JSON to write")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    learnt, tested, source = _sentences(options.data, options.sentences)
    folder = model_folder()
    calibration, held_out = (tokenize(folder, s, 512) for s in (learnt, tested))
    assert calibration is not None
    assert held_out is not None
    bench = Bench(calibration, held_out, options.width)
    print(f"calibration run {bench.calibration_seconds:.2f} s, of which the model alone {bench.bare_seconds:.2f} s")
    runs = [(name, c) for name in METHODS for c in (False, True) if c or not get_method(name).needs_statistics]
    methods = []
    for name, calibrated in runs:
        if calibrated and not get_method(name).uses_statistics:
            continue
        methods.append(bench.method(name, calibrated=calibrated))
        _show(methods[-1])
    whole = []
    sequential, tuned = {"sequential": True}, {"tune_steps": options.tune}
    fusion, select = {"method": "fusion"}, {"method": "select"}
    for extra in (
        fusion, {**fusion, **sequential}, {**fusion, **tuned}, {**fusion, **sequential, **tuned},
        select, {**select, **sequential}, {**select, **sequential, **tuned},
        {**fusion, "width": "auto", "budget": options.width / bench.bundle.width},
        {"method": "auto"}, {"method": "auto", **tuned},
    ):  # fmt: skip
        whole.append(bench.whole(calibration, **{"width": options.width, **extra}))
        _show_whole(whole[-1])
    for extra in ({}, {"synthetic": SYNTHETIC}):
        whole.append(bench.whole(None, width=options.width, method="auto", **extra))
        _show_whole(whole[-1])
    if options.long:
        many = tokenize(folder, _sentences(options.data, options.many)[0], 512) or []
        long = {"method": "auto", "tune_steps": options.long, "calibration_rows": _tokens(many)}
        whole.append(bench.whole(many, width=options.width, **long))
        _show_whole(whole[-1])
    result = {
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "gpu": None},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "backends": backends(),
        "width": options.width,
        "sentences": {"source": source, "calibration": len(learnt), "held_out": len(tested)},
        "calibration": {
            "tokens": bench.statistics[0].tokens,
            "rows": len(bench.statistics[0].x),
            "bytes_per_ffn": bench.statistics[0].nbytes,
            "seconds": bench.calibration_seconds,
            "bare_run_seconds": bench.bare_seconds,
        },
        "methods": methods,
        "fuse": whole,
        "data_free": bench.data_free(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written: {options.out}")


def _show_whole(row: dict[str, Any]) -> None:
    print(
        row["options"],
        f"cosine {row['cosine']['mean']:.4f}, {row['seconds']:.1f} s (corrections "
        f"{row['correction_seconds']:.1f} s), widths {row['widths']}",
        flush=True,
    )


def _show(row: dict[str, Any]) -> None:
    def listed(values: Sequence[float]) -> str:
        return " ".join(f"{v:.3g}" for v in values)

    print(f"{row['method']}{', calibrated' if row['calibrated'] else ''}: {row['seconds']}")
    print(f"  output error {listed(row['output_error'])}, cosine {row['cosine']['mean']:.3f}")
    print(f"  refitted     {listed(row['output_error_refitted'])}, cosine {row['cosine_refitted']['mean']:.3f}")
    for form, kernel in row.get("kernel", {}).items():
        print(
            f"  {form} {kernel['kernel']}: {listed(kernel['refitted'])}, matched {listed(kernel['matched'])}",
            flush=True,
        )


if __name__ == "__main__":
    main()
