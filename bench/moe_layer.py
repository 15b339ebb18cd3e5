"""What one layer of experts costs to shrink without data, beside what the disk and the processor allow.

    python bench/synthetic.py qwen3-30b-a3b --layers 1 --vocab 4096 --out build/qwen3
    python bench/moe_layer.py build/qwen3 [--layer 0] [--workers 2] [--repeats 3] [--out build/moe_layer.json]

Four measurements, of which the medians of a few runs count:

- products in float32 and bfloat16, all threads and one;
- processor seconds of the steps of `reduce_ffns`, expert by expert, on one thread, for the whole layer;
- reading the experts, with nothing of the files in memory, and writing to the disk what the reduced ones weigh;
- reading, reducing and writing, by workers with one thread each, so that disk and processors work at the same time.

Experts must lie in tensors of their own, named gate_proj, up_proj and down_proj. On a machine with other work only the
processor seconds compare.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from measuring import forget, steps_timed
from torch import Tensor

import mlp_fusion.methods.fusion as fusing
from fusion_kernels import backends
from mlp_fusion.neurons import NeuronBundle
from mlp_fusion.reducing import pipeline
from mlp_fusion.settings import FuseSettings
from mlp_fusion.store.tensors import Span, read_into, spans

_STEPS = ("moments", "add_products", "gram", "centre", "prepare", "cluster", "inertia", "means", "finish", "decide")
_PARTS = ("gate_proj", "up_proj", "down_proj")


def places(folder: Path, layer: int) -> list[dict[str, Span]]:
    """The projections of every expert of a layer."""
    found: dict[int, dict[str, Span]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, span in spans(file)[0].items():
            match = re.search(rf"layers\.{layer}\..*experts\.(\d+)\.(\w+)\.weight$", name)
            if match is None or match[2] not in _PARTS:
                continue
            if span.dtype != "BF16":
                raise SystemExit(f"error: {name} is {span.dtype}: pass a checkpoint in bfloat16")
            found.setdefault(int(match[1]), {})[match[2]] = span
    if not found:
        raise SystemExit(f"error: {folder} has no {', '.join(_PARTS)} of experts in layer {layer}")
    return [found[n] for n in sorted(found)]


def read(span: Span) -> Tensor:
    """The tensor, read past every mapping."""
    values = torch.empty(span.shape, dtype=torch.bfloat16)
    read_into(span.file, span.start, memoryview(values.view(torch.uint8).flatten().numpy()))
    return values


def bundle_of(expert: dict[str, Span]) -> NeuronBundle:
    gate, up, down = (read(expert[part]) for part in _PARTS)
    return NeuronBundle(w_in=up[None], w_out=down.T.contiguous()[None], activation="silu", w_gate=gate[None])


class Layer:
    """The experts of a layer, and where the reduced ones are written."""

    def __init__(self, experts: list[dict[str, Span]], out: Path, workers: int) -> None:
        self.experts, self.out, self.workers = experts, out, workers
        self.width = experts[0]["gate_proj"].shape[0]
        self.nbytes = sum(place.nbytes for expert in experts for place in expert.values())
        settings = FuseSettings(width=0.5, optimizer=None).resolved([0], calibrated=False)
        self.recipe = pipeline.Recipe.of(settings)

    def reduced(self, bundle: NeuronBundle) -> NeuronBundle:
        return pipeline.reduce_ffns(self.recipe, [bundle], [self.width // 2], None)[0].bundle.parameterized("folded")

    def passed(self, work: Callable[[dict[str, Span]], list[Tensor]]) -> tuple[float, float]:
        """Seconds until the tensors that `work` makes of every expert are on the disk, elapsed and of processors."""
        forget({place.file for expert in self.experts for place in expert.values()})
        each = self.nbytes // len(self.experts) // 2

        def one(number: int) -> None:
            if torch.get_num_threads() != 1:
                torch.set_num_threads(1)
            at = number * each
            for tensor in work(self.experts[number]):
                at += os.pwrite(descriptor, memoryview(tensor.contiguous().view(torch.uint8).flatten().numpy()), at)

        started, used = time.perf_counter(), time.process_time()
        descriptor = os.open(self.out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        with ThreadPoolExecutor(self.workers) as pool:
            list(pool.map(one, range(len(self.experts))))
        os.fsync(descriptor)
        os.close(descriptor)
        seconds = time.perf_counter() - started
        self.out.unlink()
        return seconds, time.process_time() - used

    def io(self) -> tuple[float, float]:
        return self.passed(lambda expert: [read(place).flatten()[: place.nbytes // 4] for place in expert.values()])

    def whole(self) -> tuple[float, float]:
        def work(expert: dict[str, Span]) -> list[Tensor]:
            found = self.reduced(bundle_of(expert))
            assert found.w_gate is not None
            return [t.to(torch.bfloat16) for t in (found.w_gate[0], found.w_in[0], found.w_out[0].T)]

        return self.passed(work)


def split(layer: Layer) -> dict[str, float]:
    """Processor seconds of one thread, by step, and of all."""
    seconds: dict[str, float] = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.thread_time()
            result = function(*args, **kwargs)
            seconds[name] = seconds.get(name, 0.0) + time.thread_time() - started
            return result

        return run

    kept = (pipeline.working_precision, NeuronBundle.reduce)
    bundles = [bundle_of(expert) for expert in layer.experts]
    pipeline.working_precision = timed("to float32", pipeline.working_precision)
    NeuronBundle.reduce = timed("building", NeuronBundle.reduce)  # type: ignore[method-assign]
    fusing.neuron_weights = timed("weights", fusing.neuron_weights)
    try:
        with steps_timed(_STEPS, time.thread_time) as inside:
            started = time.thread_time()
            for bundle in bundles:
                layer.reduced(bundle)
            whole = time.thread_time() - started
    finally:
        pipeline.working_precision, NeuronBundle.reduce = kept  # type: ignore[method-assign]
    # Moments are taken for the weights too, and means inside of building: each second counts once.
    seconds["building"] -= inside.pop("means", 0.0)
    seconds |= inside
    return {**seconds, "everything else": whole - sum(seconds.values()), "all": whole}


def product_rates() -> dict[str, float]:
    """GFLOP/s of a product as large as a Gram matrix of an expert."""
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(768, 6144).to(dtype)
        taken = min(_seconds(lambda x=x: x @ x.T) for _ in range(10))
        rates[str(dtype)] = 2 * 768 * 768 * 6144 / taken / 1e9
    return rates


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def middle(runs: list[tuple[float, float]]) -> dict[str, float]:
    """Medians of elapsed and of processor seconds."""
    elapsed, used = zip(*runs, strict=True)
    return {"seconds": statistics.median(elapsed), "processor seconds": statistics.median(used)}


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--layer", type=int, default=0)
    parser.add_argument("--workers", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("build/moe_layer.json"))
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    layer = Layer(places(options.checkpoint, options.layer), options.out.with_suffix(".bin"), options.workers)
    rates = product_rates()
    io = [layer.io() for _ in range(options.repeats)]
    whole = [layer.whole() for _ in range(options.repeats)]
    torch.set_num_threads(1)
    result = {
        "torch": torch.__version__,
        "kmeans": backends()["kmeans"]["cpu"],
        "experts": len(layer.experts),
        "bytes": layer.nbytes,
        "workers": options.workers,
        "load": os.getloadavg()[0],
        "GFLOP/s, all threads": rates,
        "GFLOP/s, one thread": product_rates(),
        "io": middle(io),
        "whole": middle(whole),
        "whole / io": middle(whole)["seconds"] / middle(io)["seconds"],
        "runs": {"io": io, "whole": whole},
        "processor seconds by step": {name: round(value, 3) for name, value in split(layer).items()},
    }
    print(json.dumps(result, indent=2))
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
