"""Large Mixture-of-Experts checkpoints from disk to disk: seconds, bytes per second, memory, beside the disk alone.

    python bench/synthetic.py qwen3-30b-a3b --layers 8 --vocab 4096 --out build/qwen3
    python bench/moe.py build/qwen3 [build/mixtral ...] [--repeats 3] [--experts 4] [--out bench/results/moe-cpu.json]

Of each checkpoint:

- `compress --stream` in a process of its own, files not in memory before: seconds from start to end, of processors, and
  the largest resident memory;
- the same tasks with and without reducing, in this process: seconds, how long workers were at each step, and of it
  how long at Gram matrices and at clustering;
- what the published number of layers comes to, by the seconds of a layer;
- scikit-learn's k-means, one expert after the other, timed on a few, where they are not large.

What is in `--out` of other checkpoints stays there.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from measuring import forget, steps_timed
from torch import Tensor

from mlp_fusion.modules.stored import bundle_of
from mlp_fusion.settings import FuseSettings
from mlp_fusion.store.shards import flush
from mlp_fusion.streaming import run as streaming
from mlp_fusion.streaming.engines import run_locally
from mlp_fusion.streaming.tasks import Task
from mlp_fusion.streaming.work import Outcome, Work
from mlp_fusion.verbs.plan import plan

WIDTH = 0.5
#: Neurons of an expert for which scikit-learn is waited for.
_MOST_NEURONS = 1024
#: Operators that make Gram matrices, and those that find clusters in them.
_GRAM, _CLUSTERING = ("moments", "add_products", "centre", "gram", "prepare"), ("cluster", "inertia")
#: Layers of the published models.
PUBLISHED = {"qwen3_moe": 48, "mixtral": 32, "deepseek_v3": 61, "gpt_oss": 24}
_SCRIPT = """
import json, resource, sys, time
started = time.time()
import mlp_fusion
report = mlp_fusion.compress(sys.argv[1], sys.argv[2], float(sys.argv[3]), stream=True)
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"seconds": time.time() - started, "processor seconds": used.ru_utime + used.ru_stime,
                  "peak bytes": used.ru_maxrss * 1024}))
"""


class Timed(Work):
    """Notes how long workers are at each step."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        object.__setattr__(self, "spent", {"reading": 0.0, "reducing": 0.0, "writing": 0.0})
        object.__setattr__(self, "lock", threading.Lock())

    def read(self, task: Task) -> list[dict[str, Tensor]]:
        with self.at("reading"):
            return super().read(task)

    def reduce(self, task: Task, read: Sequence[Mapping[str, Tensor]]) -> Outcome:
        with self.at("reducing"):
            return super().reduce(task, read)

    def write(self, task: Task, outcome: Outcome) -> list[Path]:
        with self.at("writing"):
            files = super().write(task, outcome)
            flush(files)
            return files

    @contextlib.contextmanager
    def at(self, step: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        with self.lock:  # type: ignore[attr-defined]
            self.spent[step] += time.perf_counter() - started  # type: ignore[attr-defined]


class Copied(Timed):
    """Writes the first neurons of each FFN instead of fused ones: what reading and writing alone take."""

    def reduce(self, task: Task, read: Sequence[Mapping[str, Tensor]]) -> Outcome:
        outcome = Outcome([], [], [])
        for part, tensors in zip(task.parts, read, strict=True):
            for name, tensor in tensors.items():
                shape, first = self.weights_out[name].shape, part.rows(self.weights_out[name].shape)
                wanted = (tensor.shape[0] * shape[0] // self._tensors[name].shape[0], *shape[1:])
                corner = tensor[tuple(slice(0, size) for size in wanted)]
                outcome.weights.append((name, corner, first[0]))
        return outcome


def in_a_process(source: Path, out: Path) -> dict[str, float]:
    """`compress --stream`, from the start of Python to its end."""
    forget(source.glob("*.safetensors"))
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(source), str(out), str(WIDTH)], check=True, capture_output=True, text=True
    )
    shutil.rmtree(out)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def in_here(kind: type[Timed], work: Work, tasks: Sequence[Task], out: Path) -> dict[str, float]:
    """The tasks of a run, by threads of this process."""
    values = {field.name: getattr(work, field.name) for field in dataclasses.fields(work)}
    timed = kind(**{**values, "target": out})
    forget(work.source.glob("*.safetensors"))
    timed.weights_out.create()
    timed.scales_out.create()
    with steps_timed([*_GRAM, *_CLUSTERING], time.perf_counter) as steps:
        started, used = time.perf_counter(), time.process_time()
        run_locally(timed, tasks, lambda _task, _rows: None)
        found = {"seconds": time.perf_counter() - started, "processor seconds": time.process_time() - used}
    shutil.rmtree(out)
    inside = {"Gram matrices": _GRAM, "clustering": _CLUSTERING} if steps else {}
    of_reducing = {name: sum(steps.get(step, 0.0) for step in parts) for name, parts in inside.items()}
    return {**found, **timed.spent, **of_reducing}  # type: ignore[attr-defined]


def scikit_learn(work: Work, task: Task, experts: int) -> list[float]:
    """Seconds of scikit-learn's k-means for each of a few experts."""
    from sklearn.cluster import KMeans

    part, tensors = task.parts[0], work.read(dataclasses.replace(task, parts=task.parts[:experts]))
    taken = []
    for each in tensors:
        kind = work.ffns[part.ffn].kind
        named = dict(zip(part.piece.names, each.values(), strict=True))
        bundle = bundle_of(named, part.piece.projections, kind.name, gating=kind.gating, experts=part.count)
        rows = bundle.select(0).vectors()[0].float().numpy()
        started = time.perf_counter()
        KMeans(work.widths[part.ffn], n_init=1, random_state=0).fit(rows)
        taken.append(time.perf_counter() - started)
    return taken


def middle(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Medians of runs."""
    return {name: round(statistics.median(run[name] for run in runs), 3) for name in runs[0]}


def measured(source: Path, repeats: int, experts: int) -> dict[str, Any]:
    """Everything of one checkpoint."""
    started = time.perf_counter()
    planned = plan(source, WIDTH)
    widths = {ffn.layer: ffn.neurons_after for ffn in planned.ffns if ffn.loaded}
    settings = FuseSettings(width=WIDTH)
    each = [widths[number] for number in range(len(widths))]
    stream = streaming.prepare(source, settings, each, torch.device("cpu"), "auto")
    prepared = time.perf_counter() - started
    layers = stream.work.config.num_hidden_layers
    reduced = [task for task in stream.tasks if task.parts]
    with tempfile.TemporaryDirectory(prefix="moe_", dir=source.parent) as folder:
        out = Path(folder) / "out"
        process = middle([in_a_process(source, out) for _ in range(repeats)])
        whole = middle([in_here(Timed, stream.work, stream.tasks, out) for _ in range(repeats)])
        alone = middle([in_here(Copied, stream.work, stream.tasks, out) for _ in range(repeats)])
    few = max(ffn.kind.width for ffn in stream.work.ffns) <= _MOST_NEURONS
    sums = scikit_learn(stream.work, reduced[0], experts) if experts and few else []
    largest = max(planned.ffns, key=lambda ffn: ffn.bytes_before).bytes_before
    count = sum(part.count for task in reduced for part in task.parts)
    published = PUBLISHED.get(planned.model_type, layers)
    found: dict[str, Any] = {
        "model type": planned.model_type, "layers": layers, "experts": count,
        "experts of a layer": max(ffn.kind.experts or 1 for ffn in stream.work.ffns), "bytes": planned.bytes_before,
        "bytes after": planned.bytes_after, "prepare": round(prepared, 2), "process": process, "tasks": whole,
        "tasks without reducing": alone, "ratio to reading and writing": round(whole["seconds"] / alone["seconds"], 2),
        "source GB/s": round(planned.bytes_before / whole["seconds"] / 1e9, 3),
        "source GB/s of reading and writing": round(planned.bytes_before / alone["seconds"] / 1e9, 3),
        "largest group bytes": largest, "peak over largest group": round(process["peak bytes"] / largest, 2),
        "published layers": published,
        "minutes of all published layers, extrapolated": round(
            (prepared + whole["seconds"] / layers * published) / 60, 1
        ),
    }  # fmt: skip
    if sums:
        one = statistics.median(sums)
        found |= {
            "scikit-learn seconds per expert": round(one, 2), "scikit-learn experts timed": len(sums),
            "times scikit-learn, extrapolated": round(one * count / whole["seconds"], 1),
        }  # fmt: skip
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--experts", type=int, default=4, help="of which scikit-learn is timed; 0 for none")
    parser.add_argument("--out", type=Path, default=Path("bench/results/moe-cpu.json"))
    asked = parser.parse_args()
    found = json.loads(asked.out.read_text(encoding="utf-8"))["checkpoints"] if asked.out.exists() else {}
    for source in asked.checkpoints:
        found[source.name] = measured(source, asked.repeats, asked.experts)
        print(json.dumps({source.name: found[source.name]}, indent=1), flush=True)
        described = {
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
            "threads": torch.get_num_threads(), "width": WIDTH, "checkpoints": found,
        }  # fmt: skip
        asked.out.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
