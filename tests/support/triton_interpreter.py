"""Imported before any Triton kernel is defined: lets Triton interpret kernels with numpy, on CPU tensors."""

from __future__ import annotations

import os
import sys
from typing import Any

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise ImportError("triton is already imported: its own functions would not be interpreted")
os.environ["TRITON_INTERPRET"] = "1"

from triton.runtime import interpreter

_original = interpreter._patch_lang_tensor


def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
    """Scalars are arrays of one element there, which numpy >= 2.4 refuses to take for loop bounds."""
    _original(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_lang_tensor
