"""Tables of docs/results/recovery.md: losses on the way, and differences between students that saw the same batches."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from results_tables import results, table

#: Steps after which losses are shown.
STEPS = (0, 10, 20, 50, 100, 200, 500, 1000)
#: What the students of bench/recovery_students.py are called.
STUDENTS = {
    "auto": "`auto`",
    "auto, matched": "`auto`, matched",
    "fusion, folded": "`fusion`, folded",
    "fusion": "`fusion`, cluster sizes",
    "fusion, matched": "`fusion`, matched",
    "prune": "`prune`",
    "prune, matched": "`prune`, matched",
    "fusion, no text, folded": "`fusion` without text, folded",
    "fusion, no text": "`fusion` without text, cluster sizes",
    "prune, no text": "`prune` without text",
}
#: What is compared: the first less the second. First forms of one function, then methods.
PAIRS = (
    ("fusion", "fusion, folded"),
    ("fusion, matched", "fusion, folded"),
    ("auto, matched", "auto"),
    ("prune, matched", "prune"),
    ("fusion, no text", "fusion, no text, folded"),
    ("fusion, matched", "prune"),
    ("fusion, no text", "prune, no text"),
    ("auto", "prune"),
    ("auto, matched", "fusion, matched"),
    ("auto", "fusion, matched"),
)
OPTIMIZERS = {"adamw": "AdamW", "sgd": "SGD"}

#: file in bench/results, model, share of the neurons, through LoRA, taught by the original's logits.
Group = tuple[str, str, float, bool, bool]
GROUPS: dict[str, Group] = {
    "full": ("recovery-cpu", "small", 1 / 32, False, False),
    "long": ("recovery-long-cpu", "small", 1 / 32, False, False),
    "lora": ("recovery-long-cpu", "small", 1 / 32, True, False),
    "taught": ("recovery-long-cpu", "small", 1 / 32, False, True),
    "smollm2": ("recovery-cpu", "smollm2", 0.5, False, False),
    "smollm2-lora": ("recovery-cpu", "smollm2", 0.5, True, False),
    "smollm2-taught": ("recovery-cpu", "smollm2", 0.5, False, True),
}
#: Tables that would have one row, which the page says in words.
OF_ONE_ROW = {("differences", "smollm2-taught")}


def students(group: Group, optimizer: str) -> dict[str, list[dict[str, Any]]]:
    """Student -> its runs on held-out text, by seed; in the order of `STUDENTS`."""
    file, model, share, lora, taught = group
    wanted = {
        "model": model, "share": share, "lora": lora, "taught": taught, "optimizer": optimizer, "search": False,
    }  # fmt: skip
    runs = [run for run in results(file)["runs"] if all(run[k] == v for k, v in wanted.items())]
    found = {name: [run for run in runs if run["student"] == name] for name in STUDENTS}
    return {name: own for name, own in found.items() if own}


def losses(group: Group) -> str:
    """Held-out losses on the way, means over seeds."""
    steps = _steps(group)
    rows = []
    for optimizer, shown in OPTIMIZERS.items():
        for name, runs in students(group, optimizer).items():
            means = [_mean(runs, step) for step in steps]
            known = f"{runs[0]['learning_rate']:g}", f"{statistics.mean(run['kernel_error'] for run in runs):.2f}"
            rows.append((f"{shown}, {STUDENTS[name]}", *known, *means, str(len(runs))))
    return table(("", "rate", "kernel error", *(f"{step:,}" for step in steps), "seeds"), rows)


def _mean(runs: Sequence[dict[str, Any]], step: int) -> str:
    found = [run["losses"].get(str(step)) for run in runs]
    return "" if None in found else f"{statistics.mean(found):.3f}"


def differences(group: Group) -> str:
    """Losses of one student less those of another, paired by seed: the mean, and from the smallest to the largest."""
    steps, rows = _steps(group), []
    for optimizer, shown in OPTIMIZERS.items():
        for first, second in PAIRS:
            cells = [_spread(differing(group, optimizer, first, second, step)) for step in steps]
            if any(cells):
                rows.append((f"{shown}, {STUDENTS[first]} − {STUDENTS[second]}", *cells))
    return table(("", *(f"{step:,}" for step in steps)), rows)


def differing(group: Group, optimizer: str, first: str, second: str, step: int) -> list[float]:
    """By seed: how much larger the loss of `first` is than that of `second` after `step` steps."""
    found = students(group, optimizer)
    by_seed = [{run["seed"]: run["losses"].get(str(step)) for run in found.get(name, [])} for name in (first, second)]
    both = [(by_seed[0][seed], by_seed[1].get(seed)) for seed in by_seed[0]]
    return [a - b for a, b in both if a is not None and b is not None]


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    middle = f"{statistics.mean(values):+.3f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):+.3f} to {max(values):+.3f})"


def _steps(group: Group) -> list[int]:
    """Those of `STEPS` that a run of the group has come to."""
    runs = [run for optimizer in OPTIMIZERS for own in students(group, optimizer).values() for run in own]
    return [step for step in STEPS if any(str(step) in run["losses"] for run in runs)]


TABLES: dict[str, Callable[[], str]] = {
    f"recovery-{kind}-{name}": functools.partial(make, group)
    for name, group in GROUPS.items()
    for kind, make in (("losses", losses), ("differences", differences))
    if (kind, name) not in OF_ONE_ROW
}
