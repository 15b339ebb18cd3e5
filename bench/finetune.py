"""Fine-tuning after compression: every method at the same width, data and recipe.

    python bench/finetune.py --data FOLDER [--task sst2] [--modes full published] [--seeds 3]
    python bench/finetune.py --summary

Tasks: `sst2`, classification with all-MiniLM-L6-v2 (`FOLDER/sst2_train.tsv`, measured on `FOLDER/sst2_dev.tsv`), all
six FFNs reduced; `gpt2` and `llama`, language models of those shapes that the script first trains itself on nine tenths
of `FOLDER/tiny_shakespeare.txt`, then compresses, fine-tunes for a short while, and measures on the last tenth.

Calibrated modes learn from the first 512 training sentences (128 blocks, for language models). Every run adds its
results to `--out`, which is all that tables and plots read; its learning curves stay under `--work`. What is in `--out`
already is not run again, and what was interrupted goes on from its last epoch, so that the script can be stopped at any
time, and run several times side by side. Teachers are the full models of the same seed, which stay under `--work`.
`--summary` prints all results, means over seeds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock, Timeout
from support import model_folder
from tokenizers import ByteLevelBPETokenizer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import mlp_fusion
from mlp_fusion.finetuning.data import language_examples, read_rows
from mlp_fusion.finetuning.result import RESULT_FILE
from mlp_fusion.finetuning.session import is_unfinished
from mlp_fusion.methods import get_method
from mlp_fusion.store.record import architecture_of

CALIBRATION = 512
#: One recipe for all modes of a task; METHOD's for SST-2.
RECIPES: dict[str, dict[str, Any]] = {
    "sst2": {"task": "classification", "learning_rate": 5e-5, "epochs": 3.0, "batch_size": 32, "max_length": 128},
    "gpt2": {"task": "lm", "learning_rate": 3e-4, "epochs": 0.5, "batch_size": 16, "max_length": 128},
    "llama": {"task": "lm", "learning_rate": 3e-4, "epochs": 0.5, "batch_size": 16, "max_length": 128},
}
#: Local tuning on more text than a few hundred sentences: on all rows of it.
LONG: dict[str, Any] = {"tune_steps": 2500, "calibration_sentences": 10_000, "calibration_rows": 500_000}
PRETRAINING: dict[str, Any] = {"learning_rate": 1e-3, "epochs": 4.0, "batch_size": 16, "max_length": 128}


@dataclass(frozen=True)
class Mode:
    """How the model is reduced, and what its fine-tuning has besides the labels.

    Attributes:
        method: None for the full model.
        calibrated: whether the method and its corrections have calibration text.
        options: of `fuse`.
        layerwise: fit hidden states to the original's for an epoch first.
        logits: learn from the full model's logits as well.
        share: of the width.
        late: reduce the full model that was trained on the task, rather than the pretrained one. Only for `sst2`: the
            language models were trained on their task before they are reduced.
        all_text: calibrate on all of the training text, rather than on the first of it.
    """

    method: str | None
    calibrated: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    layerwise: bool = False
    logits: bool = False
    share: float = 0.25
    late: bool = False
    all_text: bool = False


MODES: dict[str, Mode] = {
    "full": Mode(None),
    "published": Mode("published", False),
    "published, folded": Mode("published", False, {"optimizer": None}),
    "auto": Mode("auto"),
    "fusion": Mode("fusion"),
    "fusion, layerwise": Mode("fusion", layerwise=True),
    "fusion, layerwise, logits": Mode("fusion", layerwise=True, logits=True),
    "fusion, late, layerwise, logits": Mode("fusion", layerwise=True, logits=True, late=True),
    "prune": Mode("prune"),
    "prune, layerwise, logits": Mode("prune", layerwise=True, logits=True),
    "prune, late, layerwise, logits": Mode("prune", layerwise=True, logits=True, late=True),
    "fusion, sequential": Mode("fusion", options={"sequential": True}),
    "select, sequential": Mode("select", options={"sequential": True}),
    "select, layerwise, logits": Mode("select", options={"sequential": True}, layerwise=True, logits=True),
    "fusion, tuned": Mode("fusion", options={"tune_steps": 300}),
    "fusion, tuned on all": Mode("fusion", options={**LONG, "sequential": True}, all_text=True),
    "fusion, folded": Mode("fusion", options={"optimizer": None}),
    "fusion, matched": Mode("fusion", options={"match": "auto"}),
    "fusion, split": Mode("fusion", options={"optimizer": "sgd"}),
    "fusion, no data": Mode("fusion", False),
    "prune, unfitted": Mode("prune", options={"refit": False}),
    "cluster": Mode("cluster", False),
    "mmd": Mode("mmd", False),
    "sketch": Mode("sketch", False),
    "svd": Mode("svd", False),
    "published, half": Mode("published", False, share=0.5),
    "fusion, half": Mode("fusion", share=0.5),
    "prune, half": Mode("prune", share=0.5),
}


class Task:
    """Data and model of a task."""

    def __init__(self, name: str, data: Path, work: Path, out: Path) -> None:
        self.name, self.work, self.out, self.recipe = name, work / name, out, RECIPES[name]
        self.labelled = name == "sst2"
        if self.labelled:
            self.folder = model_folder()
            self.train: Any = data / "sst2_train.tsv"
            self.evaluation: Any = data / "sst2_dev.tsv"
            self.calibration: Any = data / "sst2_train.tsv"
            self.all_text = self.calibration
            return
        text = (data / "tiny_shakespeare.txt").read_text(encoding="utf-8")
        cut = len(text) * 9 // 10
        self.train, self.evaluation = [{"text": text[:cut]}], [{"text": text[cut:]}]
        self.folder = self.work / "pretrained"
        self._pretrain(text[:cut])
        rows = read_rows(self.train, labelled=False)
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        blocks = language_examples(rows, tokenizer, self.recipe["max_length"])
        whole = [block for block in blocks if len(block["input_ids"]) == self.recipe["max_length"]]
        self.all_text = [
            {key: torch.stack([b[key] for b in whole[i : i + 8]]) for key in ("input_ids", "attention_mask")}
            for i in range(0, len(whole), 8)
        ]
        self.calibration = self.all_text[: CALIBRATION // 4 // 8]

    def _pretrain(self, text: str) -> None:
        if (self.folder / "finetune.json").is_file():
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator([text], vocab_size=2048, special_tokens=["<|endoftext|>"], show_progress=False)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>"
        )
        transformers.set_seed(0)
        shape: dict[str, Any] = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0}
        model: Any
        if self.name == "gpt2":
            model = GPT2LMHeadModel(GPT2Config(n_embd=256, n_layer=4, n_head=4, n_positions=256, **shape))
        else:
            layers = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4}
            model = LlamaForCausalLM(LlamaConfig(**layers, max_position_embeddings=256, **shape))
        report = mlp_fusion.finetune(
            model, self.folder, self.train, self.evaluation, task="lm", tokenizer=tokenizer, **PRETRAINING
        )
        print(f"{self.name} trained from nothing\n{report.table()}", flush=True)

    def model(self, folder: Path, seed: int) -> Any:
        transformers.set_seed(seed)
        if self.labelled:
            return AutoModelForSequenceClassification.from_pretrained(
                folder, id2label={0: "0", 1: "1"}, label2id={"0": 0, "1": 1}
            )
        return AutoModelForCausalLM.from_pretrained(folder)

    def run(self, name: str, seed: int) -> None:
        """Reduce, fine-tune, and record the result; nothing if that has been done or is being done."""
        out = self.work / f"{name.replace(', ', '+').replace(' ', '_')}-{seed}"
        out.mkdir(parents=True, exist_ok=True)
        try:
            # Of the process: a run that was killed holds none, and is gone on with.
            with FileLock(out / ".lock", blocking=False):
                # The full models are teachers of others, so that one without its weights is trained again.
                known = {(run["task"], run["mode"], run["seed"]) for run in recorded(self.out)}
                teaches = name == "full" and self.labelled
                if (self.name, name, seed) in known and (not teaches or (out / "run" / RESULT_FILE).is_file()):
                    return
                record(self.out, self._run(name, MODES[name], seed, out))
        except Timeout:
            print(f"{self.name:6} {name:30} seed {seed}: another process is at it", flush=True)

    def _run(self, name: str, mode: Mode, seed: int, out: Path) -> dict[str, Any]:
        # The language models were trained on the task already: they are their own full models.
        teacher = self.work / f"full-{seed}" / "run" if self.labelled else self.folder
        source = teacher if mode.late else self.folder
        model = self.model(source, seed)
        started = time.perf_counter()
        reduced: dict[str, Any] = {}
        if mode.method == "svd":
            low_rank(model, mode.share)
        elif mode.method is not None:
            options: dict[str, Any] = {"optimizer": "adamw", "seed": seed, **mode.options}
            text = self.all_text if mode.all_text else self.calibration
            known = text if mode.calibrated else None
            report = mlp_fusion.fuse(model, mode.share, method=mode.method, calibration=known, **options)
            reduced = {"output_error": [row.output_error for row in report.rows]}
        reduced["seconds"] = time.perf_counter() - started
        teaching: dict[str, Any] = {}
        if mode.layerwise:
            teaching["original"] = source
        if mode.logits:
            teaching["teacher"] = teacher
        goes_on = is_unfinished(out / "run")
        if not goes_on:
            shutil.rmtree(out / "run", ignore_errors=True)
        parameters = sum(p.numel() for p in model.parameters())
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        report = mlp_fusion.finetune(
            model, out / "run", self.train, self.evaluation, seed=seed, tokenizer=tokenizer,
            resume=goes_on, **self.recipe, **teaching,
        )  # fmt: skip
        if name != "full":
            for file in (out / "run").glob("*.safetensors"):
                file.unlink()  # gigabytes, over all runs
        described = {"task": self.name, "mode": name, "seed": seed, "width": mode.share if mode.method else 1.0}
        described |= {"parameters": parameters, "reduction": reduced}
        assert report.initial is not None
        assert report.final is not None
        before, after = report.initial[report.metric], report.final[report.metric]
        print(f"{self.name:6} {name:30} seed {seed}: {before:.4f} -> {after:.4f} in {report.seconds:.0f} s", flush=True)
        return summarised(described, report.to_dict())


def summarised(described: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """One run as `--out` keeps it: what tables and plots need, an evaluation per epoch, and no step of a curve.

    Args:
        described: task, mode, seed, width, parameters and reduction.
        report: of `finetune`, in plain JSON types.
    """
    kept = (
        "method", "parameterization", "optimizer", "learning_rate", "batch_size", "epochs", "examples", "metric",
        "initial", "final", "evaluations", "seconds",
    )  # fmt: skip
    report = {**report["settings"], **report}
    taught = report["distillation"] or {}
    learnt = {"layerwise": taught.get("layerwise") is not None, "logits": taught.get("logits") is not None}
    return {**described, **learnt, **{key: report[key] for key in kept}}


def record(file: Path, run: dict[str, Any]) -> None:
    """Add a run to `file`, in the place of an earlier one of its task, mode and seed; other processes may do the same.

    A run is a line of the file, so that its history says which ones a commit has changed.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")):
        runs = {(r["task"], r["mode"], r["seed"]): r for r in [*recorded(file), run]}
        order = list(MODES)
        lines = [json.dumps(runs[key]) for key in sorted(runs, key=lambda key: (key[0], order.index(key[1]), key[2]))]
        partial = file.with_suffix(".partial")
        partial.write_text('{"runs": [\n' + ",\n".join(lines) + "\n]}\n", encoding="utf-8")
        partial.replace(file)


def recorded(file: Path) -> list[dict[str, Any]]:
    """The runs in `file`; none if there is no such file yet."""
    if not file.is_file():
        return []
    runs: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["runs"]
    return runs


def low_rank(model: Any, share: float) -> None:
    """Every projection of the FFNs as a product of two, of the rank whose parameters match the narrower width."""
    architecture = architecture_of(model.config)
    for site in architecture.sites(model):
        bundle = architecture.read(site)
        reduced = get_method("svd")(bundle, int(bundle.width * share), seed=0, statistics=None).bundle
        for projection in site.kind.projections:
            path = projection.parameter.removesuffix(".weight")
            linear = site.below(path)
            if not isinstance(linear, nn.Linear) or projection.part != "whole":
                sys.exit("svd is measured on models whose projections are nn.Linear")
            weight = getattr(reduced, projection.role)[0]
            if projection.role == "w_out":
                weight = weight.T
            u, s, v = torch.linalg.svd(weight.float(), full_matrices=False)
            rank = int((s > s[0] * 1e-5).sum())
            first = nn.Linear(weight.shape[1], rank, bias=False)
            second = nn.Linear(rank, weight.shape[0], bias=linear.bias is not None)
            with torch.no_grad():
                root = s[:rank].sqrt()
                first.weight.copy_(root.unsqueeze(1) * v[:rank])
                second.weight.copy_(u[:, :rank] * root)
                if linear.bias is not None:
                    second.bias.copy_(linear.bias)
            site.module.set_submodule(path, nn.Sequential(first, second))


def summary(file: Path) -> None:
    """Print, per task and mode, the metric before and after: means over seeds, and their range."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in recorded(file):
        rows.setdefault((run["task"], run["mode"]), []).append(run)
    for (task, mode), runs in rows.items():
        metric = runs[0]["metric"]
        before, after = ([run[when][metric] for run in runs] for when in ("initial", "final"))
        spread = f"{min(after):.4f} to {max(after):.4f}, {len(after)} seeds"
        print(f"{task:6} {mode:30} {statistics.mean(before):.4f} -> {statistics.mean(after):.4f} ({spread})")


def main() -> None:
    """Run what is asked for, or gather what was run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with the sentences and texts")
    parser.add_argument("--task", choices=sorted(RECIPES), default="sst2")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES), metavar="MODE")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("build/finetune"))
    parser.add_argument("--out", type=Path, default=Path("bench/results/finetune-cpu.json"))
    parser.add_argument("--summary", action="store_true", help="print the results there are, and run nothing")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    if options.summary:
        summary(options.out)
        return
    if options.data is None:
        parser.error("--data FOLDER is needed")
    task = Task(options.task, options.data, options.work, options.out)
    for seed in range(options.seeds):
        for name in options.modes:
            if not (name == "svd" and options.task == "gpt2") and not (MODES[name].late and options.task != "sst2"):
                task.run(name, seed)


if __name__ == "__main__":
    main()
