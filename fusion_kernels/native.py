"""The compiled libraries, if this installation has them: found next to the package and loaded once.

`_C*.so` is the CPU's, `_cuda*.so` the one for NVIDIA GPUs. Missing compiled code is never fatal: :data:`UNAVAILABLE`
and :func:`cuda_unavailable` say in one line why, and the operators that would use it say so in
`fusion_kernels.backends()`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fusion_kernels import gpu

#: What the libraries register their operators as: `torch.ops.fusion_kernels_native`, `torch.ops.fusion_kernels_cuda`.
NAMESPACE = "fusion_kernels_native"
CUDA_NAMESPACE = "fusion_kernels_cuda"


def load(folder: Path, name: str = "_C") -> str | None:
    """Load the compiled library `name` of `folder`; return None, or in one line why it cannot be used."""
    found = sorted(path for suffix in (".so", ".dylib", ".pyd", ".dll") for path in folder.glob(f"{name}*{suffix}"))
    if not found:
        tools = "MLP_FUSION_BUILD=cuda, nvcc, torch with CUDA" if name == "_cuda" else "a C++ compiler, torch"
        return (
            f"the compiled library is not there ({folder}/{name}*.so): install with {tools} in the "
            "environment and `pip install --no-build-isolation`"
        )
    try:
        torch.ops.load_library(str(found[0]))
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        return f"the compiled library {found[0]} does not load with torch {torch.__version__}: {reason}"
    return None


UNAVAILABLE: str | None = load(Path(__file__).parent)


def operators() -> Any:
    """The library's operators. They are there only when :data:`UNAVAILABLE` is None."""
    return getattr(torch.ops, NAMESPACE)


@functools.cache
def cuda_unavailable() -> str | None:
    """In one line why the CUDA library cannot be used here, or None. It is loaded here, where there are GPUs."""
    return gpu.no_gpu() or load(Path(__file__).parent, "_cuda")


def cuda_operators() -> Any:
    """The CUDA library's operators. They are there only when :func:`cuda_unavailable` is None."""
    return getattr(torch.ops, CUDA_NAMESPACE)


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Products of float32 in float32, whatever torch has been told to allow (TF32, bfloat16).

    Through the settings of each backend, which both of torch's interfaces write: the older one refuses to be read once
    the newer has been used.
    """
    known: Any = torch.backends
    settings = (known.cuda.matmul, known.mkldnn.matmul)
    before = [setting.fp32_precision for setting in settings]
    if all(precision in ("none", "ieee") for precision in before):
        yield
        return
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision
