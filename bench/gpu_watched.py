"""Calls for tools that watch a process, and the tools: what the sanitizer and Nsight Compute of bench/gpu.py share.

    python bench/gpu_watched.py small-kmeans

makes the call of that name, and nothing else. Small ones launch every kernel of an operator once or twice; the others
are those that are timed.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import gpu_timing
import torch
from gpu_running import environment

from fusion_kernels.proof.cases import Case


def tool(name: str) -> str | None:
    """A tool of the CUDA toolkit: on the PATH, or beside nvcc."""
    found = shutil.which(name)
    if found is not None:
        return found
    nvcc = shutil.which("nvcc", path=os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin") or shutil.which("nvcc")
    places = [Path("/usr/local/cuda/bin")] if nvcc is None else [Path(nvcc).resolve().parent, Path(nvcc).parent]
    return next((str(place / name) for place in places if (place / name).is_file()), None)


def watch(
    command: Sequence[str], call: str, seconds: float, changes: Mapping[str, str] | None = None
) -> tuple[int | None, str]:
    """Let a tool watch a call; returns its status, None where it did not end in time, and all that was said."""
    whole = [*command, sys.executable, str(Path(__file__)), call]
    with tempfile.TemporaryFile() as said:
        # A session of its own: what the tool has started ends with it.
        process = subprocess.Popen(
            whole,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            env=environment() | dict(changes or {}),
        )
        try:
            status: int | None = process.wait(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = None
        said.seek(0)
        return status, said.read().decode(errors="replace")


def last(said: str, lines: int = 8) -> str:
    """The end of what was said, in one line."""
    return " | ".join(said.strip().splitlines()[-lines:])[-1500:]


# --- the calls -------------------------------------------------------------------------------------------------------


def _small(proof: str, kind: Callable[[str], str] | None = None, beginning: str = "") -> None:
    """A case of each kind that a proof has, of those whose names begin so."""
    import gpu_proofs

    cases = [case for name, case in gpu_proofs.cases() if name == proof and case.name.startswith(beginning)]
    for case in one_of_each(cases, kind or _kind):
        case.run()


def one_of_each(cases: Sequence[Case], kind: Callable[[str], str]) -> list[Case]:
    """The first case of each kind whose sizes are beyond 1, as a tile has neighbours only there; else the first."""
    found: dict[str, Case] = {}
    for case in cases:
        before = found.setdefault(kind(case.name), case)
        if _single(before.name) and not _single(case.name):
            found[kind(case.name)] = case
    return [*found.values()]


def _single(name: str) -> bool:
    return "1" in name.replace(",", "").split()


def _kind(name: str) -> str:
    """A case's name without numbers and dtypes of tensors."""
    words = name.replace(",", "").split()
    return " ".join(word for word in words if not word.isdigit() and not word.startswith("torch."))


def _sized(name: str) -> str:
    """A case's name without dtypes of tensors: sizes decide which kernels run."""
    return " ".join(word for word in name.split() if not word.startswith("torch."))


def _small_resident() -> None:
    from fusion_kernels.mlp import triton_resident

    g = torch.Generator(gpu_timing.DEVICE).manual_seed(0)
    x, w, out = (
        torch.randn(*size, generator=g, device=gpu_timing.DEVICE).to(gpu_timing.DTYPE)
        for size in ((100, 128), (64, 128), (128, 64))
    )
    triton_resident.mlp_resident(x, w, None, out, None, "gelu")
    triton_resident.glu_resident(x, w, w, None, None, out, None, "silu")


def _small_ntk(backend: str) -> None:
    from support import make_bundle

    from fusion_kernels import ntk_gram

    block = make_bundle(33, 70, 5).to(torch.float32).map(lambda t: t.to(gpu_timing.DEVICE))
    x = torch.randn(150, 33, device=gpu_timing.DEVICE)
    for precision in ("highest", "tf32x3", "bf16x3", "bf16"):
        ntk_gram(block, x, backend=backend, precision=precision)  # type: ignore[arg-type]


def _kmeans() -> None:
    import gpu_profile

    gpu_profile.kmeans_call()()


def _mlp() -> None:
    import gpu_mlp

    for block in (gpu_mlp.BLOCKS[0], next(block for block in gpu_mlp.BLOCKS if block.gated)):
        for calls, chosen, _ in gpu_mlp.tile_kernels(block):
            calls[gpu_mlp.tile_name(chosen)]()


CALLS: dict[str, Callable[[], None]] = {
    "small-kmeans": functools.partial(_small, "kmeans triton"),
    "small-mlp": functools.partial(_small, "mlp triton"),
    "small-experts": functools.partial(_small, "experts triton"),
    "small-sparse": functools.partial(_small, "sparse triton"),
    "small-hadamard": functools.partial(_small, "hadamard triton", _sized),
    "small-resident": _small_resident,
    "small-ntk": functools.partial(_small_ntk, "triton"),
    "small-ntk-sums": functools.partial(_small, "ntk triton", _sized, "sums in torch.float32"),
    "small-ntk-cuda": functools.partial(_small_ntk, "cuda"),
    "kmeans": _kmeans,
    "mlp": _mlp,
}


def main() -> None:
    """Make the call that the command line names."""
    CALLS[sys.argv[1]]()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
