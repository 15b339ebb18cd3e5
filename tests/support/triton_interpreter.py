"""Imported before any Triton kernel is defined: lets Triton interpret kernels with numpy, on CPU tensors."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from typing import Any

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise ImportError("triton is already imported: its own functions would not be interpreted")
os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_original = interpreter._patch_lang_tensor
_dtype_of = interpreter._get_np_dtype


def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
    """Scalars are arrays of one element there, which numpy >= 2.4 refuses to take for loop bounds."""
    _original(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


@functools.cache
def _names_of_builtins(holder: Any) -> list[str]:
    """Names that a module or class of the language has for builtins, before they are replaced for the first time."""
    return [name for name, member in inspect.getmembers(holder) if tl.core.is_builtin(member)]


def _patch_builtin(holder: Any, *how: Any) -> None:
    """As Triton's own, which looks through all that there is in the language whenever a device function is called."""
    for name in _names_of_builtins(holder):
        member = getattr(holder, name)
        if tl.core.is_builtin(member):
            interpreter._patch_attr(holder, name, member, *how)


_dtypes: dict[str, Any] = {}


def _get_np_dtype(of: Any) -> Any:
    """As Triton's own, which writes down its table anew every time."""
    if of.name not in _dtypes:
        _dtypes[of.name] = _dtype_of(of)
    return _dtypes[of.name]


_reduced = interpreter.ReduceOps.apply_impl


def _apply_impl(self: Any, inputs: Any) -> Any:
    """As Triton's own, which takes sums without carry entry by entry, in Python."""
    if self.combine_fn != tl.standard._xor_combine or self.axis is None:
        return _reduced(self, inputs)
    data = np.bitwise_xor.reduce(inputs[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
    return self.to_tensor(data, inputs[0].dtype)


_multiplied = interpreter.InterpreterBuilder.create_dot


def as_float32(handle: Any) -> Any:
    """The handle, or of bfloat16 numbers, of which the interpreter has the bits as integers, one of their values."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
    """As Triton's own, which multiplies the bits of bfloat16 numbers."""
    return _multiplied(self, as_float32(a), as_float32(b), *others)


interpreter.InterpreterBuilder.create_dot = _create_dot
interpreter.ReduceOps.apply_impl = _apply_impl
interpreter._patch_lang_tensor = _patch_lang_tensor
interpreter._patch_builtin = _patch_builtin
interpreter._get_np_dtype = _get_np_dtype
