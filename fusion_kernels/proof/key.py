"""What decides whether a verdict still holds: the device, what drives it, what compiles for it, and the kernels."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from fusion_kernels import gpu

PACKAGE = Path(__file__).parents[1]
#: The files whose bytes make the kernels, how they are launched, and what they are held to.
KERNELS = ("**/*triton*.py", "**/*heuristics.py", "**/*gpu*.py", "proof/*.py", "**/*_cases.py")
#: The compiled kernels: a fact of their own, as they come to be there after whoever asks for the others.
LIBRARY = ("_cuda*",)


@functools.cache
def facts(device: torch.device) -> dict[str, str]:
    """By name, of one device; with an index if there are several."""
    about = {
        "project": _version("mlp-fusion"),
        "kernels": digest(PACKAGE, KERNELS),
        "cuda library": digest(PACKAGE, LIBRARY),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "TRITON_DEFAULT_FP_FUSION": os.environ.get("TRITON_DEFAULT_FP_FUSION", ""),
        "ptxas": _ptxas(),
    }
    if device.type == "cuda":
        properties: Any = torch.cuda.get_device_properties(device)
        about |= {
            "device": str(properties.name),
            "capability": ".".join(map(str, gpu.capability(device))),
            "multiprocessors": str(properties.multi_processor_count),
            "driver": _driver(),
            "cuda": str(torch.version.cuda),
        }
    else:
        about |= {"device": f"{device.type}, {platform.machine()}"}
    return about


def key_of(about: dict[str, str]) -> str:
    """One name for all of it."""
    return hashlib.sha256(repr(sorted(about.items())).encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # as in a checkout


def _driver() -> str:
    """Of NVIDIA: its release where the kernel of the system says it, and the CUDA that it serves."""
    said = Path("/proc/driver/nvidia/version")
    release = said.read_text(encoding="utf-8").splitlines()[0] if said.is_file() else ""
    known: Any = torch._C
    return f"{release} {known._cuda_getDriverVersion()}".strip()


def _ptxas() -> str:
    if importlib.util.find_spec("triton") is None:
        return ""
    from triton import knobs

    tool = knobs.nvidia.ptxas
    return f"{tool.path} {tool.version}"


def digest(folder: Path, patterns: Iterable[str]) -> str:
    """One name for the names and the bytes of the files below the folder that fit one of the patterns."""
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file() and path.suffix != ".pyc"}
    whole = hashlib.sha256()
    for path in sorted(found):
        content = path.read_bytes()
        whole.update(f"{path.relative_to(folder)} {len(content)}\n".encode())
        whole.update(content)
    return whole.hexdigest()
