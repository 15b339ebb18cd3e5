"""Process-wide choices of a backend, for modules and other callers that do not name one themselves."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from fusion_kernels.library import Operator


class Pin:
    """What `backend="auto"` means for an operator in this process.

    The pin holds for all threads, and for the backward of what is called under it, whenever that runs. Compiled
    functions are compiled again where it has changed.

    Examples:
        >>> x, w1, w2 = torch.randn(5, 8), torch.randn(16, 8), torch.randn(4, 16)
        >>> with fusion_kernels.mlp_backend("reference"), fusion_kernels.experts_backend("loop"):
        ...     y = fusion_kernels.fused_mlp(x, w1, None, w2, None)
        >>> torch.equal(y, fusion_kernels.fused_mlp(x, w1, None, w2, None, backend="reference"))
        True
    """

    def __init__(self, operator: Operator) -> None:
        """`FUSION_KERNELS_<OPERATOR>_BACKEND=name` in the environment, read here, pins from the start."""
        self._operator = operator
        self.name = os.environ.get(f"FUSION_KERNELS_{operator.name.upper()}_BACKEND", "auto")

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Let `"auto"` mean the backend `name` (`"auto"` for none in particular) while the context is active.

        Raises:
            ValueError: no backend has that name.
        """
        names = ["auto", *(backend.name for backend in self._operator.backends)]
        if name not in names:
            raise ValueError(f"unknown backend {name!r}: use one of {', '.join(names)}")
        before, self.name = self.name, name
        try:
            yield
        finally:
            self.name = before
