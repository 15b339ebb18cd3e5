"""The compiled library `_C*.so`, if this installation has one: found next to the package and loaded once.

Missing compiled code is never fatal: :data:`UNAVAILABLE` says in one line why, and the operators that would use it say
so in `fusion_kernels.backends()`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

#: What the library registers its operators as: `torch.ops.fusion_kernels_native`.
NAMESPACE = "fusion_kernels_native"


def load(folder: Path) -> str | None:
    """Load the compiled library of `folder`; return None, or in one line why it cannot be used."""
    found = sorted(path for suffix in (".so", ".dylib", ".pyd", ".dll") for path in folder.glob(f"_C*{suffix}"))
    if not found:
        return (
            f"the compiled library is not there ({folder}/_C*.so): install with a C++ compiler, torch in the "
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


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Products of float32 in float32, whatever `torch.set_float32_matmul_precision` allows."""
    precision = torch.get_float32_matmul_precision()
    if precision == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
