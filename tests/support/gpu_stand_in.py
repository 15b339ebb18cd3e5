"""Stands in for a GPU where bench/gpu.py runs: kernels interpreted on the CPU, tiny shapes, clocks of the host.

    PYTHONPATH=bench:tests/support:python:. python tests/support/gpu_stand_in.py gpu_kmeans gpu_mlp

does the lines of these stages in this process, and prints one line of JSON for each: what it found, or why it failed.

`install()` changes this process for good: it is for processes that run a stage. Nothing that is timed so means
anything; what counts is that every line of every stage is run, with the calls and arguments that it has on a device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import triton_interpreter  # noqa: F401 - before any kernel is defined

import torch  # isort: skip

from fusion_kernels import gpu, library, native
from fusion_kernels.experts import gpu_cases as of_experts
from fusion_kernels.hadamard import gpu_cases as of_hadamard
from fusion_kernels.kmeans import gpu_cases as of_kmeans
from fusion_kernels.mlp import gpu_cases as of_blocks
from fusion_kernels.mlp.operators import MLP
from fusion_kernels.ntk import gpu_cases as of_kernels
from fusion_kernels.sparse import gpu_cases as of_sparse


class Event:
    """Of the host's clock."""

    def __init__(self, **_: Any) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at) + 1e-6


class Stream:
    """Work is over when it is asked for."""

    def wait_stream(self, _: Stream) -> None:
        pass

    def synchronize(self) -> None:
        pass


class Graph:
    """What is recorded has been run already."""

    def replay(self) -> None:
        pass


@contextlib.contextmanager
def nothing(*_: Any, **__: Any) -> Iterator[None]:
    yield


def install() -> None:
    """Let backends for GPUs run on the CPU, and the benchmark take that for a device."""
    _torch()
    _registry()
    _proofs()
    _benchmark()


def _torch() -> None:
    properties = SimpleNamespace(name="none", total_memory=1 << 30)
    fakes: dict[str, Any] = {
        "Event": Event, "Stream": Stream, "CUDAGraph": Graph, "graph": nothing, "stream": nothing,
        "current_stream": Stream, "synchronize": lambda *_: None, "_sleep": lambda *_: None,
        "reset_peak_memory_stats": lambda *_: None, "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0, "mem_get_info": lambda *_: (1 << 30, 1 << 30),
        "memory_reserved": lambda *_: 0, "device_count": lambda: 1, "current_device": lambda: 0,
        "get_device_properties": lambda *_: properties,
    }  # fmt: skip
    for name, fake in fakes.items():
        setattr(torch.cuda, name, fake)


def _registry() -> None:
    gpu.no_gpu = gpu.why_not = lambda *_: None
    native.cuda_unavailable = lambda: None
    native.cuda_operators = mock.MagicMock
    for op in library._OPERATORS.values():
        by_name = {backend.name: backend for backend in op.backends}
        for place, backend in enumerate(op.backends):
            if backend.device_types != ("cuda",):
                continue
            # There are no compiled tangent kernels for the host: the reference answers for them.
            compiled = op.name.startswith("ntk") and backend.name == "cuda"
            function = _in_float32(by_name["reference"].function) if compiled else backend.function
            op.backends[place] = dataclasses.replace(
                backend, device_types=("cpu", "cuda"), why_not=lambda _: None, function=function
            )
        # What runs there anyway answers first.
        op.backends.sort(key=lambda backend: backend.device_types != ("cpu",))
    MLP.choice.clock = lambda works, _: dict.fromkeys(works, 1.0)


def _in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of a reference, for whatever precision is asked for."""
    return lambda *given: function(*("highest" if of in ("tf32x3", "bf16x3", "bf16") else of for of in given))


def _proofs() -> None:
    of_kmeans.GRAMS, of_kmeans.WIDE, of_kmeans.NARROW, of_kmeans.LONG, of_kmeans.NEAREST = (
        [(17, 65)],
        [(12, 3, 3)],
        (14, 5, 4),
        (15, 2, 3),
        [(20, 9, 5)],
    )
    of_blocks.SHAPES = {torch.float16: [(33, 40, 24)]}
    of_sparse.SHAPES, of_hadamard.TRANSFORMS, of_hadamard.PROJECTIONS = [(5, 7, 9, 2)], ((2, 5),), ((5, 3),)
    of_kernels.EVERY = [dataclasses.replace(problem, rows=20, others=None) for problem in of_kernels.EVERY]
    of_experts.SHAPES, of_experts.COUNTS = {torch.float16: [(24, 17)]}, (0, 20, 1, 0)


#: By module of bench/: what is small here.
SMALL: dict[str, dict[str, Any]] = {
    "gpu_timing": {
        "DEVICE": "cpu", "DTYPE": torch.float16, "CACHE_BYTES": 64, "PRODUCT": 16, "COPY": 256, "SETTLING": 0.0,
        "WARM_UP": 1, "LEAST_ROUNDS": 1, "ROUNDS": 1,
    },
    "gpu_kmeans": {
        "SHAPES": {"bert": (12, 3, 5, 2)}, "LARGE": "bert", "ASSIGN": (40, 5, 7), "ITERATIONS": 1, "REPEATS": 1,
        "LAYER": (12, 3, 5, 2),
    },
    "gpu_experts": {},
    "gpu_ntk": {
        "SHAPES": {"9 inputs": (9, 8, 4, 8)}, "MANY": 200, "ROWS": 4, "SIZES": [(1, None, 1, 1), (17, 5, 3, 7)],
        "OPTIONS": (9, 5, 3, 7), "COMPARED": [(1, None), (20, 8)],
    },
    "gpu_whole": {
        "LLAMA": {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32, "vocab_size": 64},
        "TOKENS": 20, "BLOCKS": 1, "D": 16, "BEFORE": 32, "AFTER": 8,
    },
}  # fmt: skip


def _benchmark() -> None:
    for name, values in SMALL.items():
        module = importlib.import_module(name)
        for constant, value in values.items():
            assert hasattr(module, constant), f"{name}.{constant}"
            setattr(module, constant, value)
    of_layers = importlib.import_module("gpu_experts")
    of_layers.LAYERS = {"3 experts": of_layers.Layer(3, 10, 2, 16, 16)}
    of_mlp = importlib.import_module("gpu_mlp")
    of_mlp.BLOCKS = (of_mlp.Block(20, 16, 16), of_mlp.Block(17, 16, 16, gated=True))
    of_mlp.LEAST_ROWS = 16
    of_mlp.compiled = lambda run: run  # Inductor would compile C++
    importlib.import_module("gpu_profile").BLOCK = of_mlp.BLOCKS[0]


def calls(_: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """As lines: what is compiled ahead, but for what other tests interpret, and what tools watch."""
    of = importlib.import_module("gpu_compile").calls
    ahead = of()
    some = {stage: [*of(["compile", stage])] for stage in ("experts", "ncu", "compile")}
    yield "ahead", lambda: {"calls": [*ahead], "calls of": some}
    watched = importlib.import_module("gpu_watched").CALLS
    for name, call in {**ahead, **watched}.items():
        if "proof" not in name and "kmeans" not in name:
            yield name, lambda call=call: {"done": call() is None}  # type: ignore[misc]


def main() -> None:
    """Do the lines of the stages that the command line names; `calls` stands for what other processes make."""
    install()
    running = importlib.import_module("gpu_running")
    rates = {"bf16_flops": 1e12, "copy_bytes": 1e12}
    with tempfile.TemporaryDirectory() as scratch:
        os.environ |= {"MLP_FUSION_CACHE": scratch, "FUSION_KERNELS_GPU": "trust"}
        told = running.Told({"scratch": scratch, "models": []}, {"device": {"rates": rates}}, time.monotonic() + 500)
        for stage in sys.argv[1:]:
            lines = calls if stage == "calls" else importlib.import_module(stage).lines
            for name, work in lines(told):
                try:
                    found = {"result": work()}
                except Exception:  # noqa: BLE001 - whatever it is, it is what the line comes to
                    found = {"failure": traceback.format_exc()}
                sys.stdout.write(json.dumps({"stage": stage, "line": name, **found}) + "\n")


if __name__ == "__main__":
    main()
