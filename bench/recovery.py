"""Which narrower model recovers fastest: forms of the same function, and methods, in equal steps at their best rates.

    python bench/recovery.py --data FOLDER [--parts full lora]
    python bench/recovery.py --summary

Models of equal size (`recovery_students.py`) train on tiny Shakespeare, with AdamW and with SGD with momentum, as a
whole or through LoRA, on labels alone or on the original's logits too. `small` is a Llama shape of 1.9 million
parameters on bytes, which the script first trains itself, another one for each seed; `smollm2` is
SmolLM2-135M-Instruct, a checkpoint (`--model`) that bench/smollm2.py makes.

A cell is a student, an optimiser and a way to train. Its learning rate is found first: from a start, up and down in
powers of about 3, until two more do not lower the loss on validation text, which is cut from the training side, after a
short run of the first seed. With that rate it is trained with each seed, and the loss on held-out text is noted on the
way. All cells of a seed see the same batches. The rate rises over ten steps and is constant from there on; weights do
not decay, and gradients are not clipped, which would see the scale.

A run is a line of `--out`. What is there is not run again, so that the script may be stopped at any time, and run
several times side by side.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import platform
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock, Timeout
from peft import LoraConfig, get_peft_model
from recovery_students import MODELS, STUDENTS, TRAINING, House, loss_on
from torch import Tensor

from mlp_fusion.finetuning.trainers import logit_divergence

#: Steps after which losses are noted.
HORIZONS = (0, 10, 20, 50, 100, 200, 500, 1000)
OPTIMIZERS = ("adamw", "sgd")
#: Steps over which the learning rate rises.
WARM_UP = 10
#: Of SGD.
MOMENTUM = 0.9
#: Weight of the original's logits and their temperature, the defaults of `finetune`.
WEIGHT, TEMPERATURE = 0.5, 2.0
#: Rank and alpha of LoRA, on all projections of attention and FFNs.
RANK, ALPHA = 8, 16
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
#: Model -> steps of the runs that find the learning rate.
SEARCH = {"small": 50, "smollm2": 50}
#: Where the search begins, as a rung of `rate`: by model, optimiser, and whether through LoRA.
START = {
    ("small", "adamw", False): -7,
    ("small", "sgd", False): -4,
    ("small", "adamw", True): -5,
    ("small", "sgd", True): -2,
    ("smollm2", "adamw", False): -8,
    ("smollm2", "sgd", False): -4,
    ("smollm2", "adamw", True): -5,
    ("smollm2", "sgd", True): -2,
}

#: Share of the small model's neurons, most of which a short training leaves alike: at an eighth, little is lost.
NARROW = 1 / 32
CALIBRATED = ("auto", "auto, matched", "fusion, folded", "fusion", "fusion, matched", "prune")
CHOSEN = ("auto", "fusion, folded", "fusion, matched", "prune")
BLIND = ("fusion, no text, folded", "fusion, no text", "prune, no text")


@dataclass(frozen=True)
class Cell:
    """A student and how it is trained.

    Attributes:
        model: of `recovery_students.MODELS`.
        share: of the neurons.
        student: of `recovery_students.STUDENTS`.
        optimizer: `adamw` or `sgd`.
        lora: adapters train, and nothing else.
        taught: on the original's logits as well as on labels.
    """

    model: str
    share: float
    student: str
    optimizer: str
    lora: bool = False
    taught: bool = False


@dataclass(frozen=True)
class Part:
    """Cells that belong together, and how long each is trained, with how many seeds."""

    model: str
    share: float
    students: Sequence[str]
    lora: bool = False
    taught: bool = False
    steps: int = 200
    seeds: int = 3

    def cells(self, optimizers: Sequence[str] = OPTIMIZERS) -> Iterator[Cell]:
        """Of these optimisers."""
        for optimizer in optimizers:
            for student in self.students:
                yield Cell(self.model, self.share, student, optimizer, self.lora, self.taught)


PARTS = {
    "full": Part("small", NARROW, CALIBRATED),
    "no text": Part("small", NARROW, BLIND),
    "prune": Part("small", NARROW, ("prune, matched",)),
    "lora": Part("small", NARROW, CHOSEN, lora=True),
    "taught": Part("small", NARROW, CHOSEN, taught=True),
    "long": Part("small", NARROW, CHOSEN, steps=1000),
    "eighth": Part("small", 0.125, CHOSEN),
    "smollm2": Part("smollm2", 0.5, CHOSEN, seeds=1),
    "smollm2 lora": Part("smollm2", 0.5, CHOSEN, lora=True, seeds=1),
    "smollm2 taught": Part("smollm2", 0.5, CHOSEN, taught=True, seeds=1),
}


def rate(rung: int) -> float:
    """Learning rates in powers of about 3: ..., 1e-3, 3e-3, 1e-2, ...; rung 0 is 1."""
    return float(f"{(1, 3)[rung % 2]}e{rung // 2}")


def best_rung(start: int, loss: Callable[[int], float]) -> int:
    """From `start` up and down in rungs for as long as the loss falls; two rungs on either side of it are no better.

    Where training swings, a rate that is too high may end below the next lower one, and far above the one below that.
    Where nothing is learnt, the loss is infinite: then the search begins at the first rung below where something is.
    """
    best = start
    while math.isinf(loss(best)):
        best -= 1
    for direction in (1, -1):
        while better := [step for step in (1, 2) if loss(best + direction * step) < loss(best)]:
            best += direction * better[0]
    return best


def train(
    model: Any, house: House, cell: Cell, *, learning_rate: float, seed: int, steps: int, blocks: Tensor, teacher: Any
) -> dict[str, float]:
    """Train `model`, and note its loss on `blocks` at the horizons up to `steps`; none from where it is not finite."""
    trained = [p for p in model.parameters() if p.requires_grad]
    options: dict[str, Any] = {"weight_decay": 0.0} if cell.optimizer == "adamw" else {"momentum": MOMENTUM}
    kind = torch.optim.AdamW if cell.optimizer == "adamw" else torch.optim.SGD
    optimizer = kind(trained, lr=learning_rate, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP))
    generator, losses = torch.Generator().manual_seed(1000 + seed), {}
    for step in range(steps + 1):
        if step in HORIZONS or step == steps:
            found = loss_on(model, blocks)
            if not math.isfinite(found):
                break
            losses[str(step)] = round(found, 5)
            model.train()
        if step < steps:
            objective(model, house, house.text.drawn(generator, house.model.batch), teacher).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    return losses


def objective(model: Any, house: House, ids: Tensor, teacher: Any) -> Tensor:
    """Cross-entropy and, with a teacher, its logits, weighed as `finetune` does."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=house.model.bfloat16):
        outputs = model(input_ids=ids, labels=ids)
        if teacher is None:
            return outputs.loss  # type: ignore[no-any-return]
        with torch.no_grad():
            wanted = teacher(input_ids=ids).logits
    divergence = logit_divergence(outputs.logits.float(), wanted.float(), TEMPERATURE)
    return (1.0 - WEIGHT) * outputs.loss + WEIGHT * divergence


class Runs:
    """What has been run, and what is to be."""

    def __init__(self, file: Path, house: Callable[[str], House]) -> None:
        self.file, self.house = file, house

    def cell(self, cell: Cell, steps: int, seeds: int) -> None:
        """Find a cell's learning rate, and train it with each seed; nothing if another process is at it."""
        name = "-".join(str(value).replace(", ", "+").replace(" ", "_") for value in asdict(cell).values())
        lock = self.house(cell.model).work / f"cell-{name}.lock"
        with contextlib.suppress(Timeout), FileLock(lock, blocking=False):
            rung = best_rung(START[cell.model, cell.optimizer, cell.lora], functools.partial(self._searched, cell))
            for seed in range(seeds):
                found = self._run(cell, rate(rung), seed, steps, search=False)
                print(f"{name} {rate(rung):g} seed {seed}: {found['losses']}", flush=True)

    def _searched(self, cell: Cell, rung: int) -> float:
        """The loss on validation text after the search's steps; infinite where it is no lower than before them."""
        steps = SEARCH[cell.model]
        losses = self._run(cell, rate(rung), 0, steps, search=True)["losses"]
        found = float(losses.get(str(steps), math.inf))
        return found if found < losses["0"] else math.inf

    def _run(self, cell: Cell, learning_rate: float, seed: int, steps: int, *, search: bool) -> dict[str, Any]:
        described = {**asdict(cell), "seed": seed, "learning_rate": learning_rate, "search": search}
        for run in recorded(self.file)["runs"]:
            if run["steps"] >= steps and all(run[key] == value for key, value in described.items()):
                return run
        house = self.house(cell.model)
        model, known = house.student(cell.student, cell.share, seed, cell.optimizer)
        teacher = house.original(seed).eval() if cell.taught else None
        if cell.lora:
            transformers.set_seed(seed)
            model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(ADAPTED)))
        losses = train(
            model, house, cell, learning_rate=learning_rate, seed=seed, steps=steps, teacher=teacher,
            blocks=house.text.validation if search else house.text.held_out,
        )  # fmt: skip
        known = {key: round(value, 4) for key, value in known.items()}
        run = {**described, "steps": steps, **known, "losses": losses}
        record(self.file, "runs", run)
        return run

    def original(self, model: str, seed: int) -> None:
        """Note the loss of an original on held-out text."""
        described = {"model": model, "seed": seed}
        known = [{key: line[key] for key in described} for line in recorded(self.file)["originals"]]
        if described not in known:
            house = self.house(model)
            whole = house.original(seed)
            loss, count = loss_on(whole, house.text.held_out), sum(p.numel() for p in whole.parameters())
            record(self.file, "originals", {**described, "parameters": count, "loss": round(loss, 5)})


def recorded(file: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines in `file`; none if there is no such file yet."""
    if not file.is_file():
        return {"originals": [], "runs": []}
    found = json.loads(file.read_text(encoding="utf-8"))
    return {key: found[key] for key in ("originals", "runs")}


def record(file: Path, kind: str, line: dict[str, Any]) -> None:
    """Add a line to `file`, in the place of a shorter run; it is whole at any time: other processes may add to it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")):
        known = recorded(file)
        known[kind] = [*(other for other in known[kind] if _key(other) != _key(line)), line]
        known["originals"].sort(key=lambda o: (o["model"], o["seed"]))
        known["runs"].sort(key=_order)
        head = {
            "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "gpu": None},
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "models": {name: asdict(model) for name, model in MODELS.items()},
            "training": {"small": TRAINING, "warm_up": WARM_UP, "momentum": MOMENTUM, "search_steps": SEARCH},
        }
        text = [f'"{key}": {json.dumps(value)}' for key, value in head.items()]
        text += [f'"{k}": [\n' + ",\n".join(json.dumps(entry) for entry in known[k]) + "\n]" for k in known]
        partial = file.with_suffix(".partial")
        partial.write_text("{\n" + ",\n".join(text) + "\n}\n", encoding="utf-8")
        partial.replace(file)


def _key(line: dict[str, Any]) -> list[Any]:
    """What a line is of, however long it was trained and whatever came of it."""
    return [line.get(key) for key in (*(field.name for field in fields(Cell)), "seed", "learning_rate", "search")]


def _order(run: dict[str, Any]) -> tuple[Any, ...]:
    keys = ("model", "share", "lora", "taught", "optimizer")
    return (
        *(run[key] for key in keys), list(STUDENTS).index(run["student"]), not run["search"], run["seed"],
        run["learning_rate"],
    )  # fmt: skip


def groups(runs: Iterable[dict[str, Any]]) -> dict[tuple[Any, ...], dict[str, list[dict[str, Any]]]]:
    """Runs with held-out losses: (model, share, lora, taught, optimizer) -> student -> one for each seed."""
    found: dict[tuple[Any, ...], dict[str, list[dict[str, Any]]]] = {}
    for run in runs:
        if not run["search"]:
            key = tuple(run[k] for k in ("model", "share", "lora", "taught", "optimizer"))
            found.setdefault(key, {}).setdefault(run["student"], []).append(run)
    return found


def summary(file: Path) -> None:
    """Print held-out losses: means over seeds, and how far the seeds are apart."""
    for key, students in groups(recorded(file)["runs"]).items():
        model, share, lora, taught, optimizer = key
        print(f"\n{model} {share:g} {optimizer}{' LoRA' if lora else ''}{', taught' if taught else ''}")
        for student, runs in students.items():
            cells = []
            for step in (h for h in HORIZONS if all(str(h) in run["losses"] for run in runs)):
                values = [run["losses"][str(step)] for run in runs]
                cells.append(f"{step}: {statistics.mean(values):.3f} ±{(max(values) - min(values)) / 2:.3f}")
            first = runs[0]
            print(
                f"  {student:26} {first['learning_rate']:<8g} kernel {first['kernel_error']:7.2f}  {'  '.join(cells)}"
            )


def main() -> None:
    """Run the parts that are asked for, or print what was run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with tiny_shakespeare.txt")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS), metavar="NAME")
    parser.add_argument("--model", type=Path, default=Path("build/smollm2"), help="checkpoint of SmolLM2-135M-Instruct")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("build/recovery"))
    parser.add_argument("--out", type=Path, default=Path("bench/results/recovery-cpu.json"))
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

    @functools.cache
    def house(name: str) -> House:
        return House(name, options.data, options.work, options.model if name == "smollm2" else None)

    runs = Runs(options.out, house)
    for part in (PARTS[name] for name in options.parts):
        for cell in part.cells(options.optimizers):
            runs.cell(cell, part.steps, part.seeds)
        for seed in range(part.seeds):
            runs.original(part.model, seed)
    summary(options.out)


if __name__ == "__main__":
    main()
