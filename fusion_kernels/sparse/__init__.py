"""Sparse updates of large matrices: `sampled_product`, the entries of a weight's gradient that are asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusion_kernels import gpu, native
from fusion_kernels.library import NAMESPACE, Backend, operator
from fusion_kernels.proof import Proof
from fusion_kernels.sparse import cpu_backend, reference, torch_backend, triton_backend
from fusion_kernels.sparse.heuristics import one_by_one

__all__ = ["sampled_product"]

_INTEGERS = (torch.int32, torch.int64)


def _fake(g: Tensor, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return g.new_empty(rows.shape, dtype=reference.sums_of(g.dtype))


def _choose(g: Tensor, x: Tensor, rows: Tensor, columns: Tensor) -> str:
    (T, N), d, k = g.shape, x.shape[1], len(rows)
    cheaper = one_by_one(T, N, d, k, on_gpu=g.is_cuda, short=g.element_size() == 2)
    return "auto" if cheaper else "torch"


SAMPLED = operator(
    "sampled_product",
    "(Tensor g, Tensor x, Tensor rows, Tensor columns) -> Tensor",
    _fake,
    _choose,
    options=lambda g, x, rows, columns: g.dtype,
    variants=(torch.float64,),
)
_PROOF = Proof("sparse triton", "fusion_kernels.sparse.gpu_cases:sampled")
SAMPLED.register(Backend("cpu", cpu_backend.sampled_product, ("cpu",), lambda _: native.UNAVAILABLE))
SAMPLED.register(
    Backend("triton", triton_backend.sampled_product, ("cuda",), gpu.why_not, triton_backend.takes, proof=_PROOF)
)
SAMPLED.register(Backend("torch", torch_backend.sampled_product, ("cpu", "cuda")))
SAMPLED.register(Backend("reference", reference.sampled_product, ("cpu", "cuda")))


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    g, x, rows, columns = ctx.saved_tensors
    # Who differentiates twice pays for a whole matrix.
    weights = grad.new_zeros(g.shape[1], x.shape[1]).index_put((rows.long(), columns.long()), grad, accumulate=True)
    dg, dx = x.to(grad.dtype) @ weights.T, g.to(grad.dtype) @ weights
    return dg.to(g.dtype), dx.to(x.dtype), None, None


torch.library.register_autograd(f"{NAMESPACE}::{SAMPLED.name}", _differentiate, setup_context=_save)


def sampled_product(g: Tensor, x: Tensor, rows: Tensor, columns: Tensor, *, backend: str = "auto") -> Tensor:
    """Return the entries of gᵀ x at (rows, columns); no other is computed, or no more than a few rows at a time.

    With g the gradient of a linear layer's outputs and x its inputs, these are entries of the gradient of its weight.
    Where it is cheaper, whole blocks of the product are computed and most of their entries dropped; the whole product
    never exists. The result has the same bits every time.

    Args:
        g: (T, N) floating point.
        x: (T, d), dtype and device of g.
        rows: (k,) int32 or int64 in [0, N), not falling: entries of one row are worked on together.
        columns: (k,) in [0, d), dtype of `rows`.
        backend: `"auto"`, `"cpu"` (compiled), `"triton"` (CUDA), `"torch"` (blocks of the product) or `"reference"`.

    Returns:
        (k,) float32, of float64 float64. Differentiable in g and x.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message names them.
        BackendUnavailableError: `backend` cannot run here.

    Examples:
        >>> g, x = torch.randn(50, 8), torch.randn(50, 6)
        >>> rows, columns = torch.tensor([0, 0, 7]), torch.tensor([1, 5, 2])
        >>> found = fusion_kernels.sampled_product(g, x, rows, columns)
        >>> torch.allclose(found, (g.T @ x)[rows, columns], atol=1e-4)
        True
    """
    _check(g, x, rows, columns)
    rows, columns = rows.int(), columns.int()
    found: Tensor = SAMPLED.function(backend, g, x, rows, columns)(g, x, rows, columns)
    return found


def _check(g: Tensor, x: Tensor, rows: Tensor, columns: Tensor) -> None:
    if g.ndim != 2 or x.ndim != 2 or len(g) != len(x) or x.dtype != g.dtype or not g.is_floating_point():
        raise ValueError(
            f"g is {g.dtype} {tuple(g.shape)}, x {x.dtype} {tuple(x.shape)}: pass (T, N) and (T, d) of one dtype"
        )
    if rows.ndim != 1 or rows.shape != columns.shape or rows.dtype not in _INTEGERS or columns.dtype != rows.dtype:
        raise ValueError(
            f"rows are {rows.dtype} {tuple(rows.shape)}, columns {columns.dtype} {tuple(columns.shape)}: "
            "pass two vectors of int32 or int64, one pair for each entry"
        )
    if not g.device == x.device == rows.device == columns.device:
        raise ValueError(f"tensors are on {g.device}, {x.device}, {rows.device} and {columns.device}: move them to one")
