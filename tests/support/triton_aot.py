"""Compile Triton kernels for GPUs that are not here, and read what they use.

As a script (`python triton_aot.py 80,90 N,K,D ...`, in a process without TRITON_INTERPRET) it compiles every kernel
that `fusion_kernels.kmeans.triton_backend` launches for problems of these shapes, as it launches them on GPUs of these
compute capabilities, and writes JSON.

Compiling all of them takes minutes, and gives the same for the same source: what each one uses is kept in
`tests/data/triton_resources.json` under a hash of its source, all that it calls, its arguments, the target and the
version of Triton. A kernel that is not there is compiled; `TRITON_AOT=record` compiles what is missing and keeps it,
`TRITON_AOT=compile` compiles everything and compares it with what is kept, `TRITON_AOT=compile:NAME` one kernel.
`make resources` does the first, from nothing, with the oldest and the newest Triton. With another one, of which nothing
is kept, one launch of each kernel stands for all.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fusion_kernels import gpu

_INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mma.sync": r"\bmma\.sync",
    "cp.async": r"cp\.async",
    "ordered atomics": r"\b(atom|red)\.\S*\bacq_rel",
    "float atomics": r"\b(atom|red)\.\S*\.(f|bf)\d",
}
_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
}


RECORD = Path(__file__).parents[1] / "data" / "triton_resources.json"


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: its arguments by name, and `num_warps`, `num_stages`, `maxnreg`."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel uses.

    Attributes:
        registers: per thread.
        spilled: bytes of a thread's registers that went to memory, stack and local.
        shared: bytes of shared memory.
        tensor: columns of tensor memory, of 512 that a multiprocessor of compute capability 10.x has.
        programs: how many run on a multiprocessor at once.
        instructions: how many of each kind are in the PTX.
    """

    kernel: str
    constants: dict[str, Any]
    registers: int
    spilled: int
    shared: int
    tensor: int
    programs: int
    instructions: dict[str, int]


def compile_launch(launch: Launch, capability: int) -> Resources:
    """Compile for compute capability `capability` (80, 90, ...), specialised on the arguments as a launch would be."""
    names = launch.kernel.arg_names
    constant_names = {p.name for p in launch.kernel.params if p.is_constexpr}
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for i, name in enumerate(names):
        value = launch.arguments[name]
        if name in constant_names or value is None or (isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            constants[(i,)] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    described = f"{source.hash()} {sorted(launch.options.items())}"
    key = f"{triton.__version__} {capability} {hashlib.sha256(described.encode()).hexdigest()[:20]}"
    mode, kept = os.environ.get("TRITON_AOT", ""), _kept().get(key)
    if kept is None or mode in ("compile", f"compile:{launch.kernel.__name__}"):
        found = _compiled(source, launch, capability)
        assert kept is None or found == kept, f"{launch.kernel.__name__}: compiled {found}, kept {kept}"
        if mode == "record":
            _kept()[key] = found
        kept = found
    chosen = {name: value for name, value in launch.arguments.items() if name in constant_names} | launch.options
    return Resources(constants=chosen, **kept)


def _compiled(source: ASTSource, launch: Launch, capability: int) -> dict[str, Any]:
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options=launch.options | dict(gpu.OPTIONS)
    )
    usage, ptx = _usage(compiled.asm["cubin"]), compiled.asm["ptx"]
    registers, shared, tensor = usage["REG"], compiled.metadata.shared, getattr(compiled.metadata, "tmem_size", 0)
    programs = gpu.programs_at_once(registers, shared, launch.options["num_warps"], gpu.MULTIPROCESSORS[capability])
    counts = {name: len(re.findall(pattern, ptx)) for name, pattern in _INSTRUCTIONS.items()}
    return {
        "kernel": launch.kernel.__name__,
        "registers": registers,
        "spilled": usage["STACK"] + usage["LOCAL"],
        "shared": shared,
        "tensor": tensor,
        "programs": min(programs, 512 // tensor) if tensor else programs,
        "instructions": {name: count for name, count in counts.items() if count},
    }


@functools.cache
def _kept() -> dict[str, dict[str, Any]]:
    kept: dict[str, dict[str, Any]] = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}
    return kept


def of_launches(launches: Iterable[Launch], capability: int) -> list[dict[str, Any]]:
    """What they use, as JSON has it; of a Triton of which nothing is kept only the first launch of each kernel."""
    if os.environ.get("TRITON_AOT") is None and not any(key.split()[0] == triton.__version__ for key in _kept()):
        launches = {launch.kernel.__name__: launch for launch in reversed([*launches])}.values()
    return [asdict(compile_launch(launch, capability)) for launch in launches]


def keep() -> None:
    """Write what `TRITON_AOT=record` has found, a kernel a line."""
    if os.environ.get("TRITON_AOT") == "record":
        lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(_kept().items()))
        RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        out = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", out)}


def recorder(launches: dict[str, Launch]) -> Callable[..., None]:
    """A stand-in for `fusion_kernels.gpu.launch` that enters every distinct launch into `launches` and runs nothing."""

    def record(kernel: Any, programs: int, shared: Mapping[str, Any] = MappingProxyType({}), **own: Any) -> None:
        named = gpu.named(kernel, shared, own)
        options = {"num_warps": 4, "num_stages": 3, "maxnreg": None}
        launch = Launch(kernel, named, {name: named.pop(name, usual) for name, usual in options.items()})
        key = [kernel.__name__, *launch.options.values()]
        for value in named.values():
            if isinstance(value, torch.Tensor):
                key.append(str(value.dtype))
            else:
                key.append(str(value))
        launches.setdefault(" ".join(map(str, key)), launch)

    return record


def kmeans_launches(N: int, K: int, D: int, capability: int) -> dict[str, Launch]:
    """Every distinct launch of the backend for problems of N points, in all modes; nothing is run."""
    from fusion_kernels.kmeans import triton_assign, triton_backend, triton_points, triton_run
    from fusion_kernels.kmeans.types import Options

    launches: dict[str, Launch] = {}

    with kmeans_host(capability), ExitStack() as patches:
        for module in (triton_assign, triton_backend, triton_points, triton_run):
            patches.enter_context(mock.patch.object(module, "launch", recorder(launches)))
        for dtype in (torch.float32, torch.float64):
            x = torch.zeros(1, N, D, dtype=dtype)
            weight = torch.ones(1, N, dtype=dtype)
            for init in (None, x[:, :K], torch.zeros(1, N, dtype=torch.int64)):
                for precision in triton_backend.PRECISIONS:
                    options = Options(K, max_iter=1, tol=0.1)
                    triton_backend.kmeans(x, weight, init, options, precision=precision)
        triton_assign.assign(torch.zeros(1, N, D), torch.zeros(1, K, D))
    return launches


@contextmanager
def kmeans_host(capability: int) -> Iterator[None]:
    """What the host does around the kernels of k-means, for a GPU that is not here, where no kernel runs."""
    from fusion_kernels.kmeans import triton_assign, triton_backend, triton_points, triton_run

    with ExitStack() as patches:
        for module in (triton_assign, triton_points):
            patches.enter_context(mock.patch.object(module, "shared_memory", return_value=shared_memory(capability)))
            patches.enter_context(mock.patch.object(module, "capability", return_value=divmod(capability, 10)))
        patches.enter_context(mock.patch.object(triton_run._Poll, "all_done", return_value=False))
        # What follows the kernels is computed by torch, at full size and of nothing that a kernel has written.
        patches.enter_context(mock.patch.object(triton_backend, "settle_problem"))
        patches.enter_context(
            mock.patch.object(triton_backend, "resolved_problems", side_effect=lambda x, *_: x.new_ones(len(x)).bool())
        )
        patches.enter_context(
            mock.patch.object(triton_assign, "nearest", side_effect=lambda x, _: x.new_zeros(len(x)).long())
        )
        yield


def shared_memory(capability: int) -> int:
    """Bytes that a program may use; as little as consumer GPUs have, where a GPU is not of the data centre of today."""
    return gpu.LARGE_SHARED_MEMORY if 90 <= capability < 110 else gpu.SMALL_SHARED_MEMORY


def main() -> None:
    """Write lists of :class:`Resources` by capability, for the capabilities and shapes of the command line."""
    found: dict[int, list[dict[str, Any]]] = {}
    for capability in map(int, sys.argv[1].split(",")):
        launches: dict[str, Launch] = {}
        for shape in sys.argv[2:]:
            N, K, D = map(int, shape.split(","))
            launches |= kmeans_launches(N, K, D, capability)
        found[capability] = of_launches(launches.values(), capability)
    keep()
    sys.stdout.write(json.dumps(found, default=str))


if __name__ == "__main__":
    main()
