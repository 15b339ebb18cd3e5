"""The operators behind products with Jacobians and kernels, and behind inner products of per-sample gradients.

One per kind of product, plain and gated blocks alike, on detached tensors in one dtype whose values and shapes the
public functions have checked. Nothing can be differentiated through them. A compiler sees each as one call, whose fake
kernel knows its shape; the check of the values, which looks at them, is where the public functions leave its graph.
Their backends are compositions of torch's products (`torch_backend.py`) and the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusion_kernels import native
from fusion_kernels.ffn import FFN, FUNCTION, SCHEMA, TENSORS
from fusion_kernels.gates import Gate
from fusion_kernels.library import Backend, Operator, operator
from fusion_kernels.ntk import reference as reference
from fusion_kernels.ntk import torch_backend

#: A block in an operator's schema.
FFN_ARGUMENTS = f"{SCHEMA}, float scale_exponent, {FUNCTION}"


def exactly(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run `function` without autograd and autocast, with products of float32 in float32.

    Autocast would run the products in a dtype that a solve on the result cannot bear.
    """

    def wrapped(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False), native.exact_products():
            return function(x, *args, **kwargs)

    return wrapped


def of_ffn(function: Callable[..., Any], before: int) -> Callable[..., Any]:
    """`function` of an `FFN` behind `before` tensors, for an operator: with `FFN_ARGUMENTS` in the block's place."""
    end = before + len(TENSORS)

    def flat(*given: Any) -> Any:
        exponent, activation, limit, clamp, up_offset, *rest = given[end:]
        ffn = FFN.of(given[before:end], activation, exponent, Gate(limit, clamp, up_offset))
        return function(*given[:before], ffn, *rest)

    return flat


def _declare(name: str, arguments: str, returns: str, fake: Callable[..., Any], function: str) -> Operator:
    """An operator of rows x, a block and `arguments`; `fake` takes them as the functions do."""
    op = operator(name, f"(Tensor x, {FFN_ARGUMENTS}, {arguments}) -> {returns}", of_ffn(fake, 1))
    for backend, module in (("torch", torch_backend), ("reference", reference)):
        op.register(Backend(backend, of_ffn(exactly(getattr(module, function)), 1), ("cpu", "cuda")))
    return op


def _fake_jvp(x: Tensor, ffn: FFN, tangents: Sequence[Tensor | None]) -> Tensor:
    return x.new_empty(x.shape[0], ffn.w_out.shape[1])


def _fake_vjp(x: Tensor, ffn: FFN, cotangent: Tensor, params: Sequence[str]) -> list[Tensor]:
    w_in, w_out = ffn.w_in, ffn.w_out
    shapes = {"w_in": w_in.shape, "w_gate": w_in.shape, "w_out": w_out.shape, "b_out": w_out.shape[1:]}
    return [x.new_empty(shapes.get(part, w_in.shape[:1])) for part in params]


def _fake_vp(x: Tensor, ffn: FFN, v: Tensor, *_: object) -> Tensor:
    return v.new_empty(v.shape)


def _fake_gram(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[0])


def _fake_norms(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0])


_GRADIENTS = "Tensor cotangents, str[] params, Tensor? metric, str via"

NTK_JVP = _declare("ntk_jvp", "Tensor?[] tangents", "Tensor", _fake_jvp, "jvp")
NTK_VJP = _declare("ntk_vjp", "Tensor cotangent, str[] params", "Tensor[]", _fake_vjp, "vjp")
NTK_VP = _declare(
    "ntk_vp",
    "Tensor v, str[] params, str kernel, str reduce, Tensor? direction, Tensor? metric",
    "Tensor",
    _fake_vp,
    "ntk_vp",
)
NTK_GRADIENT_GRAM = _declare("ntk_gradient_gram", _GRADIENTS, "Tensor", _fake_gram, "gradient_gram")
NTK_GRADIENT_NORMS = _declare("ntk_gradient_norms", _GRADIENTS, "Tensor", _fake_norms, "gradient_norms")
