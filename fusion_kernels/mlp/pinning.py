"""The process-wide choice of a backend, for modules and other callers that do not name one themselves."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

#: Read once, when the package is imported.
ENVIRONMENT_VARIABLE = "FUSION_KERNELS_MLP_BACKEND"

_pinned: str = os.environ.get(ENVIRONMENT_VARIABLE, "auto")


def pinned() -> str:
    """The backend that `backend="auto"` stands for in this process."""
    return _pinned


@contextlib.contextmanager
def mlp_backend(name: str) -> Iterator[None]:
    """Let `backend="auto"` of :func:`fused_mlp` and :func:`fused_glu_mlp` mean `name` while the context is active.

    The pin holds for the whole process, all threads included, and for the backward of what is called under it, whenever
    that runs. `FUSION_KERNELS_MLP_BACKEND=name` in the environment pins from the start. Compiled functions are
    compiled again where the pin has changed.

    Args:
        name: a backend of `fusion_kernels::mlp`, or `"auto"` for none.

    Raises:
        ValueError: no backend has that name.
    """
    global _pinned
    from fusion_kernels.mlp.operators import MLP

    names = ["auto", *(backend.name for backend in MLP.backends)]
    if name not in names:
        raise ValueError(f"unknown backend {name!r}: use one of {', '.join(names)}")
    before = _pinned
    _pinned = name
    try:
        yield
    finally:
        _pinned = before
