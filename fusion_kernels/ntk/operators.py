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
from fusion_kernels.library import Backend, Operator, operator
from fusion_kernels.ntk import torch_backend
from fusion_kernels.reference import ntk as reference
from fusion_kernels.reference.ntk import FFN

_BLOCK = (
    "Tensor x, Tensor w_in, Tensor? w_gate, Tensor? b_in, Tensor? b_gate, Tensor w_out, Tensor? scale, "
    "float scale_exponent, str activation"
)
#: How many arguments the block and its rows are.
_BLOCK_SIZE = 9


def exactly(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run `function` without autograd and autocast, with products of float32 in float32."""

    def wrapped(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False), native.exact_products():
            return function(x, *args, **kwargs)

    return wrapped


def function_named(op: Operator, backend: str, device: torch.device) -> Callable[..., Any]:
    """What a public function calls: the operator for `"auto"`, or the backend of that name.

    Raises:
        ValueError, BackendUnavailableError: as `Operator.select` does.
    """
    chosen = op.select(backend, device)
    return op.overload if backend == "auto" else chosen.function


def _declare(name: str, arguments: str, returns: str, fake: Callable[..., Any], function: str) -> Operator:
    """An operator of a block's rows and `arguments`; `fake` takes the block as a tuple, then those."""

    def fake_of_all(*all_arguments: Any) -> Any:
        return fake(all_arguments[:_BLOCK_SIZE], *all_arguments[_BLOCK_SIZE:])

    def of(module: Any) -> Callable[..., Any]:
        run = exactly(getattr(module, function))
        return lambda x, *rest: run(x, FFN(*rest[: _BLOCK_SIZE - 1]), *rest[_BLOCK_SIZE - 1 :])

    op = operator(name, f"({_BLOCK}, {arguments}) -> {returns}", fake_of_all)
    op.register(Backend("torch", of(torch_backend), ("cpu", "cuda")))
    op.register(Backend("reference", of(reference), ("cpu", "cuda")))
    return op


def _fake_jvp(block: tuple[Any, ...], tangents: Sequence[Tensor | None]) -> Tensor:
    x, w_out = block[0], block[5]
    return x.new_empty(x.shape[0], w_out.shape[1])


def _fake_vjp(block: tuple[Any, ...], cotangent: Tensor, params: Sequence[str]) -> list[Tensor]:
    x, w_in, *_, w_out = block[:6]
    shapes = {"w_in": w_in.shape, "w_gate": w_in.shape, "w_out": w_out.shape, "b_out": w_out.shape[1:]}
    return [x.new_empty(shapes.get(part, w_in.shape[:1])) for part in params]


def _fake_vp(block: tuple[Any, ...], v: Tensor, *_: object) -> Tensor:
    return v.new_empty(v.shape)


def _fake_gram(block: tuple[Any, ...], *_: object) -> Tensor:
    x = block[0]
    return x.new_empty(x.shape[0], x.shape[0])


def _fake_norms(block: tuple[Any, ...], *_: object) -> Tensor:
    x = block[0]
    return x.new_empty(x.shape[0])


_GRADIENTS = "Tensor cotangents, str[] params, Tensor? metric, str form"

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
