"""How large the tensors are that a computation makes."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """The bytes of the largest tensor that an operation returned, parts of `beside` not counted."""

    def __init__(self, beside: Tensor | None = None) -> None:
        super().__init__()
        self.bytes = 0
        self.beside = 0 if beside is None else beside.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() != self.beside:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return result
