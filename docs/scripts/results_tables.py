"""Tables of the documentation, made from `bench/results`: no figure is typed by hand."""

from __future__ import annotations

import functools
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "bench" / "results"

#: What the modes of bench/finetune.py are called in tables.
MODES = {
    "full": "the full model",
    "published": "`published`, without data",
    "published, folded": "`published`, without data, scale folded",
    "auto": "the default: `merge`, sequential, locally trained for 80 steps",
    "fusion": "`fusion`, calibrated and refitted",
    "fusion, sequential": "`fusion`, sequential",
    "fusion, tuned": "`fusion`, locally trained for 300 steps",
    "fusion, tuned on all": "`fusion`, sequential, locally trained for 2,500 steps on all of the text",
    "prune": "`prune`, calibrated and refitted",
    "prune, unfitted": "`prune`, calibrated, not refitted",
    "select, sequential": "`select`, sequential",
    "fusion, no data": "`fusion`, without data",
    "cluster": "`cluster`, without data: the function of `published`, scale folded",
    "svd": "`svd`, same number of parameters",
    "mmd": "`mmd`, without data",
    "sketch": "`sketch`, without data",
    "fusion, folded": "`fusion`, calibrated, scale folded (`optimizer=None`)",
    "fusion, matched": '`fusion`, calibrated, kernel matched (`match="auto"`)',
    "fusion, layerwise, logits": "`fusion`, fitted to the original layer by layer, then trained on labels and logits",
    "fusion, late, layerwise, logits": "that, reduced from the full model after its training",
    "prune, late, layerwise, logits": "the same with `prune`",
    "published, half": "`published`, without data",
    "fusion, half": "`fusion`, calibrated and refitted",
    "prune, half": "`prune`, calibrated and refitted",
}
#: What the methods of bench/moe_quality.py are called.
EXPERTS = {
    "whole": "nothing: the whole model",
    "fusion, no data": "`fusion`, without text",
    "synthetic": "the default with synthetic text",
    "auto": "**the default with text**",
    "fusion": "`fusion`, calibrated",
    "fusion, sequential": "`fusion`, sequential",
    "prune": "`prune`, calibrated",
    "prune, sequential": "`prune`, sequential",
    "reap": "experts dropped by REAP's score",
    "mone": "experts replaced by constants, as MoNE does",
    "random": "random experts dropped",
}


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in markdown; the first column is text, the others are figures."""
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@functools.cache
def results(name: str) -> Any:
    """The content of one file of results."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def fine_tunes(task: str) -> dict[str, list[dict[str, Any]]]:
    """Runs of a task by mode, as they stand in the file: modes in the benchmark's order, seeds ascending."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in results("finetune-cpu")["runs"]:
        if run["task"] == task:
            found.setdefault(run["mode"], []).append(run)
    return found


def _percent(values: Sequence[float]) -> str:
    return ", ".join(f"{100 * value:.1f}" for value in values)


def sst2() -> str:
    """Accuracy after fine-tuning on SST-2."""
    rows = []
    found = fine_tunes("sst2")
    for width, named in ((1.0, "whole"), (0.25, "a quarter"), (0.5, "a half")):
        for mode in (mode for mode in MODES if mode in found and found[mode][0]["width"] == width):
            runs = found[mode]
            after = [run["final"]["accuracy"] for run in runs]
            mean = f"**{_percent([statistics.mean(after)])} %**" if len(after) > 1 else ""
            rows.append((MODES[mode], named, mean, _percent(after)))
    return table(("reduced by", "width", "mean of three seeds", "by seed"), rows)


def language_models() -> str:
    """Perplexity before and after half an epoch, for the two small language models."""
    shapes = {"GPT-2 shape": fine_tunes("gpt2"), "Llama shape": fine_tunes("llama")}
    modes = [mode for mode in MODES if any(mode in runs for runs in shapes.values())]

    def both(run: dict[str, Any] | None) -> str:
        return "" if run is None else f"{_digits(_perplexity(run, 'initial'))} → {_digits(_perplexity(run, 'final'))}"

    firsts = {shape: {mode: found[0] for mode, found in runs.items()} for shape, runs in shapes.items()}
    rows = [(MODES[mode], *(both(first.get(mode)) for first in firsts.values())) for mode in modes]
    return table(("reduced by", *shapes), rows)


def _perplexity(run: dict[str, Any], when: str) -> float:
    return float(run[when]["perplexity"])


def _digits(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def fidelity() -> str:
    """Errors of every method on held-out sentences, as it is and after the refit."""
    rows = []
    for row in results("fidelity-cpu")["methods"]:
        kernel = row.get("kernel", {}).get("split", {}).get("matched")
        rows.append(
            (
                f"`{row['method']}`, {'calibrated' if row['calibrated'] else 'without data'}",
                _layers(row["output_error"]),
                _layers(row["output_error_refitted"]),
                _layers(kernel) if kernel else "",
                f"{row['cosine']['mean']:.3f}",
                f"{row['cosine_refitted']['mean']:.3f}",
            )
        )
    titles = ("method", "output error", "refitted", "SGD kernel, matched", "cosine", "refitted")
    return table(titles, rows)


def _layers(values: Sequence[float]) -> str:
    """The second and the fifth layer: one that is easy and one that is hard."""
    return f"{values[1]:.3f} / {values[4]:.3f}"


def whole_models() -> str:
    """`fuse` from end to end with its corrections: cosines and seconds."""
    rows = []
    for row in results("fidelity-cpu")["fuse"]:
        options = {"method": "fusion", **row["options"]}
        words = [f"`{options['method']}`"]
        words += ["sequential"] if options.get("sequential") else []
        words += [f"{options['tune_steps']:,} steps"] if options.get("tune_steps") else []
        words += ["a width for each FFN"] if options["width"] == "auto" else []
        words += ["random tokens"] if options.get("synthetic") else [] if row["calibration_tokens"] else ["no text"]
        cosine, seconds = row["cosine"], row["seconds"]
        figures = f"{cosine['mean']:.3f}", f"{cosine['smallest']:.3f}", f"{seconds:,.0f} s"
        rows.append((", ".join(words), f"{row['calibration_tokens']:,}", *figures))
    return table(("method and corrections", "tokens", "cosine, mean", "smallest", "one core"), rows)


def kernel_errors() -> str:
    """Errors of the tangent kernels in the parameterization that suits each, calibrated, before and after matching."""
    rows = []
    for row in results("fidelity-cpu")["methods"]:
        if "kernel" not in row:
            continue
        cells = [f"`{row['method']}`, {'calibrated' if row['calibrated'] else 'without data'}"]
        for form in ("scaled", "split"):
            cells += [_layers(row["kernel"][form]["refitted"]), _layers(row["kernel"][form]["matched"])]
        rows.append(cells)
    titles = ("method, refitted", "Adam, `scaled`", "matched", "SGD, `split`", "matched")
    return table(titles, rows)


def published_errors() -> str:
    """The published method over seeds, without data."""
    rows = []
    for row in results("main_job-cpu")["published_fusion_over_seeds"]:
        rows.append(
            (
                str(row["layer"]),
                _spread(row["output_error"]),
                _spread(row["ntk_error_scaled"]["sign"]),
                _spread(row["ntk_error_split"]["gd"]),
            )
        )
    return table(("layer", "output error", "Adam kernel, `scaled`", "SGD kernel, `split`"), rows)


def _spread(found: dict[str, float]) -> str:
    return f"{found['median']:.3f} ({found['min']:.3f}–{found['max']:.3f})"


def kmeans() -> str:
    """Seconds of k-means beside its peers."""
    rows = []
    shapes = {**results("kmeans-cpu")["shapes"], "large": None}
    for name, found in shapes.items():
        if found is None:
            found = results("kmeans-cpu")[name]
            ours, ratios = {key: found[key] for key in ("lloyd", "hartigan")}, {}
        else:
            ours, ratios = found["ours"], found["ratios"]
        ten = ours.get("lloyd n_init=10")
        rows.append(
            (
                f"{found['N']}, {found['K']}, {found['D']}",
                _seconds(ours["lloyd"]["seconds"]),
                _times(ratios.get("sklearn / lloyd")),
                _times(ratios.get("faiss k-means++ / lloyd")),
                "" if ten is None else _seconds(ten["seconds"]),
                _times(ratios.get("sklearn / lloyd n_init=10")),
                _seconds(ours["hartigan"]["seconds"]),
            )
        )
    titles = ("N, K, D", "k-means++, Lloyd", "scikit-learn", "faiss", "ten seedings", "scikit-learn", "default")
    return table(titles, rows)


def _seconds(value: float) -> str:
    return f"{value:.3f} s" if value < 1 else f"{value:.1f} s"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.1f}×" if ratio < 10 else f"{ratio:.0f}×"


def fused_mlp() -> str:
    """Ratios of time and memory of the fused blocks to ordinary layers, over all shapes and token counts."""
    rows = []
    machines = {"": "AVX-512", "-two-threads": "AVX-512, two", "-avx2": "AVX2", "-avx2-two-threads": "AVX2, two"}
    for name, machine in machines.items():
        shapes = results(f"fused_mlp-cpu{name}")["shapes"]
        for kind, what in (("forward", "forward pass"), ("both", "training step")):
            ratios = [shape[kind]["ratios to layers"]["ours"] for shape in shapes]
            first, nearly = (sum(ratio <= bar for ratio in ratios) for bar in (1, 1.05))
            rows.append(
                (
                    f"{machine}, {what}",
                    f"{statistics.median(ratios):.2f}",
                    f"{min(ratios):.2f}–{max(ratios):.2f}",
                    f"{first} of {len(ratios)}",
                    f"{nearly} of {len(ratios)}",
                )
            )
    return table(("one core, or two", "median ratio of time", "range", "at most 1", "at most 1.05"), rows)


def ntk() -> str:
    """Seconds and memory of the trace kernel beside torch expressions of the same closed form."""
    rows = []
    for name, machine in (("ntk-cpu", "AVX-512"), ("ntk-cpu-avx2", "AVX2")):
        for row in results(name)["trace kernel, float32"]:
            rows.append(
                (
                    f"{machine}, {row['N']:,} inputs",
                    f"{1000 * row['ours']['seconds']:.1f} ms",
                    _times(row["times"]["torch expression"]),
                    _times(row["times"]["torch in place"]),
                    f"{row['peak bytes beyond out'] / 2**20:.1f} MiB",
                )
            )
    titles = ("two cores", "`ntk_gram`", "one torch expression", "in place by hand", "memory beyond the result")
    return table(titles, rows)


def training() -> str:
    """Tokens per second of training MiniLM, whole and fused."""
    found = results("train-cpu")["tokens_per_second"]
    named = {"original": "the original", "fused": "fused, the scale explicit", "plain": "its plain checkpoint"}
    rows = [(named[key], f"{value:,.0f}", _times(value / found["original"])) for key, value in found.items()]
    return table(("two cores, AVX2", "tokens per second", "of the original"), rows)


def startup() -> str:
    """Processor seconds until things answer."""
    rows = [(f"`{name}`", f"{value:.2f} s") for name, value in results("startup-cpu")["processor seconds"].items()]
    return table(("what is started", "processor seconds"), rows)


def families() -> str:
    """How many model types have FFNs that are found, proved and keyed."""
    found = results("families-cpu")["counts"]
    kinds, seconds = found["kinds"], found["seconds"]
    undone = found["status"].get("too long", 0) + found["status"].get("failed", 0)
    rows = [
        ("model types tried", f"{found['types']:,}"),
        ("a model builds", f"{found['status'].get('built', 0):,}"),
        ("no model class of their own: parts of others", f"{found['status'].get('no class', 0):,}"),
        ("no model builds from the default config here", f"{found['status'].get('not built', 0):,}"),
        ("not done in the time limit, or failed", f"{undone:,}"),
        ("FFNs found and proved", f"{found['with FFNs']:,}"),
        ("... every one, and nothing else is moved", f"{found['complete']:,}"),
        ("... and each can be saved narrower", f"{found['complete and keyed']:,}"),
        ("something is refused", f"{found['refused']:,}"),
        ("kinds of FFNs: dense, experts, shared experts", ", ".join(
            f"{kinds.get(kind, 0):,}" for kind in ("dense", "experts", "shared"))),
        ("layers", f"{found['layers']:,}"),
        ("kinds whose function has no name", f"{found['unnamed kinds']:,}"),
        ("seconds: median, 90 %, most", f"{seconds['median']:.1f}, {seconds['90 %']:.1f}, {seconds['most']:.0f}"),
    ]  # fmt: skip
    return table(("transformers " + results("families-cpu")["transformers"], "number"), rows)


def large() -> str:
    """Synthetic checkpoints of large Mixture-of-Experts models, from disk to disk."""
    largest: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, one in results("moe-cpu")["checkpoints"].items():
        known = largest.get(one["model type"])
        if known is None or one["experts"] > known[1]["experts"]:
            largest[one["model type"]] = name, one
    rows = []
    for name, one in largest.values():
        rows.append([
            f"{name}, {one['layers']} layers",
            f"{one['bytes'] / 1e9:.1f} GB",
            f"{one['tasks']['seconds']:.0f} s",
            f"{one['ratio to reading and writing']:.1f}",
            f"{one['source GB/s']:.2f}",
            f"{one['process']['peak bytes'] / 1e9:.2f} GB",
            f"{one['peak over largest group']:.2f}",
            f"{one['minutes of all published layers, extrapolated']:.0f} min",
        ])  # fmt: skip
    titles = ("checkpoint", "size", "tasks", "times reading and writing alone", "source GB/s", "peak memory",
              "of its largest layer", "all published layers, extrapolated")  # fmt: skip
    return table(titles, rows)


def language_model(share: float, file: str = "llm-cpu", *, text: bool = True) -> str:
    """SmolLM2-135M-Instruct with that share of its FFNs: perplexity of every row there is, the best first.

    Of several seeds the median, and in brackets the smallest and the largest. Rows that learn from no `text` stand by
    themselves, beside the default.
    """
    beside = {"full"} if text else {"full", f"{share:g} auto refit sequential"}
    rows = [
        row
        for row in results(file)["rows"]
        if row["form"] in beside or (row["share"] == share and row["recipe"].get("text", True) == text)
    ]
    kinds = list(rows[0]["perplexity"])

    def mean(form: str) -> float:
        return statistics.mean(math.log(v) for row in rows if row["form"] == form for v in row["perplexity"].values())

    lines = []
    for form in sorted({row["form"] for row in rows}, key=mean):
        own = [row for row in rows if row["form"] == form]
        cells = [_over_seeds([row["perplexity"][kind] for row in own]) for kind in kinds]
        spent = (
            [f"{statistics.median(row['seconds']['processor'] for row in own):.0f}"] if "seconds" in own[0] else [""]
        )
        most = [f"{max(row['peak_bytes'] for row in own) / 2**30:.1f}"] if "peak_bytes" in own[0] else [""]
        name = form.removeprefix(f"{share:g} ")
        lines.append([f"**{name}**" if name.startswith("auto") else name, *cells, *spent, *most, str(len(own))])
    return table(["", *kinds, "processor seconds", "GiB at most", "seeds"], lines)


def _over_seeds(values: Sequence[float]) -> str:
    def shown(value: float) -> str:
        return f"{value:.1f}" if value < 1e4 else f"{value:,.0f}"

    middle = shown(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({shown(min(values))} to {shown(max(values))})"


def completions() -> str:
    """What models with half of their FFNs go on with."""
    data = results("llm-cpu")
    chosen = {"full": "full", "0.5 auto refit sequential": "auto", "0.5 prune refit sequential": "prune, sequential"}
    rows = [row for row in data["rows"] if row["form"] in chosen and row["seed"] == 0]
    lines = []
    for number, prompt in enumerate(data["prompts"]):
        for row in rows:
            cells = (prompt, chosen[row["form"]], row["completions"][number])
            lines.append([" ".join(cell.split()).replace("|", "/").replace("<", "&lt;") for cell in cells])
    return table(["prompt", "model", "greedy completion"], lines)


def families_roundtrip() -> str:
    """How many model types come through a round trip of a small real model, and how far others come."""
    found = results("families-roundtrip-cpu")["counts"]
    status, done, errors = found["status"], found["done"], found["largest difference"]
    rows = [
        ("model types with FFNs", f"{found['with FFNs']:,}"),
        ("... tried", f"{found['types']:,}"),
        ("a small model has every kind of its parameters", f"{found['small models']:,}"),
        ("... and runs", f"{found['run']:,}"),
        ("... and every FFN in it runs", f"{found['every FFN run']:,}"),
        ("**come through all stages**", f"**{status.get('done', 0):,}**"),
        ("... though something is not proved, and left as it is", f"{found['done but for what is not proved']:,}"),
        ("... with dense FFNs, experts, shared experts", ", ".join(
            f"{done[kind]:,}" for kind in ("dense", "experts", "shared"))),
        ("fused in memory, not saved", f"{status.get('in memory only', 0):,}"),
        ("refused", f"{status.get('refused', 0):,}"),
        ("no inputs on which it runs, or no small config",
         f"{status.get('not run', 0) + status.get('no small config', 0):,}"),
        ("something differs or fails, or the time is up", f"{status.get('failed', 0) + status.get('too long', 0):,}"),
        ("largest difference of outputs: fused, loaded, restored", ", ".join(
            f"{errors[name]:.0e}" for name in ("in memory", "loaded", "restored"))),
        ("largest difference of parameters", f"{errors['parameters']:.0e}"),
    ]  # fmt: skip
    return table(("there and back", "number"), rows)


def families_calibrated() -> str:
    """On how many model types the default with text works, and what it goes without."""
    found = results("families-calibrated-cpu")["counts"]
    status, without = found["status"], found["without"]
    rows = [
        ("model types of which a small model runs whole", f"{found['types']:,}"),
        ("... here, without timm and torchvision", f"{found['types'] - status.get('no small model', 0):,}"),
        ("**are halved by the default with text**", f"**{status.get('done', 0):,}**"),
        ("... without gradients, with a warning", f"{without.get('gradients', 0):,}"),
        ("... all FFNs at once, with a warning", f"{without.get('sequence', 0):,}"),
        ("refused", f"{status.get('refused', 0):,}"),
        ("fail, or the time is up", f"{status.get('failed', 0) + status.get('too long', 0):,}"),
    ]
    return table(("with text", "number"), rows)


def families_left() -> str:
    """Model types that do not come through, by reason."""
    return _types_by(
        "not through", lambda line: [line["kind"]] if line["status"] != "done" else [], "families-roundtrip-cpu"
    )


def families_refused() -> str:
    """Model types in which something is refused, by what was seen."""
    return _types_by("refused", lambda line: line["refused"].values() if line["status"] == "built" else ())


def families_unsaved() -> str:
    """Model types with an FFN whose width no config key states, by reason."""
    return _types_by("stated by no key", lambda line: line["unsaved"] if line["status"] == "built" else ())


def _types_by(title: str, reasons: Callable[[Any], Iterable[str]], name: str = "families-cpu") -> str:
    """Reasons, without what differs from model to model, with the types that have them; the most frequent first."""
    found: dict[str, dict[str, None]] = {}
    for line in results(name)["types"]:
        for reason in reasons(line):
            kind = re.sub(r"\d[\d,.e+-]*", "N", reason).split(": ")[0]
            found.setdefault(kind, {})[line["type"]] = None
    rows = [(reason, ", ".join(types), str(len(types))) for reason, types in found.items()]
    rows.sort(key=lambda row: (-int(row[2]), row[0]))
    return table((title, "model types", "number"), rows).replace("| ---: | ---: |", "| --- | ---: |", 1)


def experts(shape: str) -> str:
    """Perplexity of one trained Mixture-of-Experts model, by method and by the share of the experts that is left."""
    found = {
        (row["method"], row["share"]): row for row in results("moe-quality-cpu")["medians"] if row["shape"] == shape
    }
    whole = found.pop(("whole", 1.0))
    shares = sorted({share for _, share in found}, reverse=True)

    def tuned(row: dict[str, Any] | None) -> str:
        return f"{row['tuned_ratio']:.2f}×" if row and "tuned_ratio" in row else ""

    rows = [[EXPERTS["whole"], *[_digits(whole["perplexity"])] * len(shares), tuned(whole)]]
    for method in (method for method in EXPERTS if (method, 0.5) in found):
        of_method = [found.get((method, share)) for share in shares]
        cells = [f"{_digits(row['perplexity'])} ({row['ratio']:.2f}×)" if row else "" for row in of_method]
        rows.append([EXPERTS[method], *cells, tuned(found[method, 0.5])])
    return table(("reduced by", *(f"{share:.0%}" for share in shares), "50%, trained 100 steps more"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "sst2": sst2,
    "language-models": language_models,
    "fidelity": fidelity,
    "whole-models": whole_models,
    "kernel-errors": kernel_errors,
    "published-errors": published_errors,
    "kmeans": kmeans,
    "fused-mlp": fused_mlp,
    "ntk": ntk,
    "training": training,
    "startup": startup,
    "large": large,
    "language-model-half": lambda: language_model(0.5),
    "language-model-wider": lambda: language_model(0.625),
    "language-model-three-quarters": lambda: language_model(0.75),
    "language-model-final": lambda: language_model(0.5, "llm-final-cpu"),
    "language-model-final-three-quarters": lambda: language_model(0.75, "llm-final-cpu"),
    "language-model-without-text": lambda: language_model(0.5, text=False),
    "language-model-without-text-final": lambda: language_model(0.5, "llm-final-cpu", text=False),
    "language-model-completions": completions,
    "families": families,
    "families-calibrated": families_calibrated,
    "families-left": families_left,
    "families-refused": families_refused,
    "families-roundtrip": families_roundtrip,
    "families-unsaved": families_unsaved,
    **{
        f"experts-{shape}": functools.partial(experts, shape)
        for shape in ("mixtral", "qwen3", "switch", "mixtral-wide")
    },
}
