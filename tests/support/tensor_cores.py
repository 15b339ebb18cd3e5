"""Interpreted Triton kernels with the accumulation of tensor cores, which truncate where an interpreter rounds.

Products of 16-bit numbers are exact; after every 16 of them, of TF32 after every 8, the sum, of these and of what was
accumulated before, is cut off towards zero to float32 (arXiv 2512.07004 has the units of V100 to B200). Errors of long
sums then have one sign and grow with the number of steps, and that decides how a kernel must accumulate: the real
kernels run here, with the steps that they take. Real units also cut off each product, to a few bits more than float32
has; that is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton_interpreter
from torch import Tensor
from triton._C.libtriton import ir
from triton.runtime import interpreter

#: Products between two cuts, of 16-bit numbers and of TF32.
STEP, TF32_STEP = 16, 8


def towards_zero(exact: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """float64 numbers cut off to float32."""
    near = exact.astype(np.float32)
    return np.where(np.abs(near.astype(np.float64)) > np.abs(exact), np.nextafter(near, np.float32(0)), near)


def product(
    a: np.ndarray[Any, Any], b: np.ndarray[Any, Any], total: np.ndarray[Any, Any], step: int = STEP
) -> np.ndarray[Any, Any]:
    """total (M, N) float32 + a (M, K) b (K, N), in steps that are cut off."""
    left, right = a.astype(np.float64), b.astype(np.float64)
    for k in range(0, left.shape[-1], step):
        total = towards_zero(total.astype(np.float64) + left[..., k : k + step] @ right[..., k : k + step, :])
    return total


def _step(a: Any, d: Any, precision: Any) -> int | None:
    """How many products of these operands are summed before a cut; None where no tensor core multiplies."""
    if d.data.dtype != np.float32:
        return None
    if a.dtype.scalar.name in ("fp16", "bf16"):
        return STEP
    return TF32_STEP if a.data.dtype == np.float32 and precision == ir.INPUT_PRECISION.TF32 else None


@contextmanager
def truncating() -> Iterator[list[int]]:
    """Interpreted products accumulate as tensor cores do; yields a list that gets the length of each."""
    original = interpreter.InterpreterBuilder.create_dot
    lengths: list[int] = []

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        step = _step(a, d, options[0])
        if step is None:
            return original(self, a, b, d, *options)
        lengths.append(a.data.shape[-1])
        left, right = (triton_interpreter.as_float32(t).data for t in (a, b))
        return interpreter.TensorHandle(product(left, right, d.data, step), d.dtype.scalar)

    with mock.patch.object(interpreter.InterpreterBuilder, "create_dot", create_dot):
        yield lengths


def multiply_add(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) b (N, K)ᵀ float32 by one multiply-add after the other, each rounded: what has no tensor cores does."""
    left, right = a.numpy().astype(np.float64), b.numpy().astype(np.float64)
    total = np.zeros((len(a), len(b)), np.float32)
    for k in range(left.shape[1]):
        # A product of float32 numbers is exact here; the sum is rounded once more than a multiply-add would be.
        total = (total.astype(np.float64) + np.outer(left[:, k], right[:, k])).astype(np.float32)
    return torch.from_numpy(total)
