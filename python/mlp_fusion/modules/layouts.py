"""How a projection lies in memory: `torch.nn.Linear` (out, in) or GPT-2's `Conv1D` (in, out)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from fusion_kernels.gates import PLAIN, Gate
from mlp_fusion.errors import InputError
from mlp_fusion.neurons import NeuronBundle

#: Types of weights that can be read and scaled; 8-bit floats are a quantised layer's.
FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_PLAIN = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d)


def read_projection(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return a projection's weight as `(out, in)` and its `(out,)` bias or None; views, detached from autograd.

    Raises:
        InputError: not a plain floating-point `Linear` or `Conv1D`: an adapter, a quantised layer, a parametrisation.
    """
    kind = type(module)
    if kind not in (nn.Linear, Conv1D):
        raise _no_projection(kind)
    weight, bias = read_parameter(module, "weight"), module.bias
    assert bias is None or isinstance(bias, Tensor)
    return (weight.t() if kind is Conv1D else weight), None if bias is None else bias.detach()


def read_parameter(module: nn.Module, name: str) -> Tensor:
    """A parameter of the module that multiplies by it, detached from autograd.

    Raises:
        InputError: the module may do something else with it, or the parameter is not a plain floating-point one: an
            adapter, a quantised layer, a parametrisation.
    """
    kind = type(module)
    # Layers that transformers derives from torch's are those that discovery has seen to multiply.
    if isinstance(module, _PLAIN) and not kind.__module__.startswith(("torch.nn.modules.", "transformers.")):
        raise _no_projection(kind)
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise _no_projection(kind)
    made_of = [own for own, _ in module.named_parameters(recurse=False) if own not in ("weight", "bias")]
    if made_of and (name not in module._parameters or isinstance(module, _PLAIN)):
        raise InputError(
            f"a projection's weight is computed from {', '.join(made_of)}: remove the weight norm or the pruning "
            "(torch.nn.utils.remove_weight_norm, prune.remove) before fusing"
        )
    if weight.dtype not in FLOATING:
        raise InputError(f"a projection's weight is {weight.dtype}: load the model unquantised before fusing")
    if type(weight) not in (nn.Parameter, Tensor, FakeTensor):
        raise InputError(
            f"a projection's weight is a {type(weight).__module__}.{type(weight).__qualname__}, sharded or quantised: "
            "work on the whole, unquantised model"
        )
    if weight.is_meta:
        raise InputError("a projection's weight is on the meta device (offloaded): load the model into memory first")
    return weight.detach()


def _no_projection(kind: type[nn.Module]) -> InputError:
    return InputError(
        f"a projection is a {kind.__module__}.{kind.__name__}, not a plain torch.nn.Linear or Conv1D: "
        "merge adapters and load the weights unquantised before fusing"
    )


def read_bundle(
    projections: Mapping[str, nn.Module],
    activation: str,
    scale: Tensor | None = None,
    scale_exponent: float = 0.0,
    gating: Gate = PLAIN,
) -> NeuronBundle:
    """The FFN made of `projections` (role -> module; roles `w_in`, `w_out` and, when gated, `w_gate`), with B = 1.

    Args:
        projections: plain `Linear` or `Conv1D` modules.
        activation: a name in `fusion_kernels.activations.ACTIVATIONS`.
        scale: `(N,)` cluster sizes, integer or floating, or None.
        scale_exponent: the a with which the projections carry the scale.
        gating: limits and offset of a gated FFN.

    Raises:
        InputError: see :func:`read_projection`.
        ValueError: shapes disagree or the activation is unknown.
    """
    tensors: dict[str, Any] = {}
    for role, module in projections.items():
        weight, bias = read_projection(module)
        tensors[role] = (weight.t() if role == "w_out" else weight).unsqueeze(0)
        tensors[role.replace("w_", "b_")] = None if bias is None else bias.unsqueeze(0)
    if scale is not None:
        scale = scale.detach().unsqueeze(0)
        scale = scale if scale.is_floating_point() else scale.float()
    exponent = 0.0 if scale is None else scale_exponent
    return NeuronBundle(activation=activation, scale=scale, scale_exponent=exponent, gating=gating, **tensors)


def obstacle(module: nn.Module) -> str | None:
    """Why `module` has to be called, rather than its weight and bias be read and used: what it is, or None.

    Calling is what applies an adapter, a quantised weight, a hook or a parametrisation; reading would pass by them.
    """
    kind = type(module)
    if kind is not nn.Linear and kind is not Conv1D:
        return f"a {kind.__module__}.{kind.__qualname__}"
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
    ):
        return "a projection with hooks"
    if "forward" in module.__dict__:
        return "a projection with a forward method of its own"
    for parameter in _held(module):
        if parameter is not None and type(parameter) not in (nn.Parameter, Tensor, FakeTensor):
            return f"a projection with a {type(parameter).__module__}.{type(parameter).__qualname__} in it"
    return None


def weights_of(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight as `(out, in)` and the bias of a projection that has no :func:`obstacle`, with their gradients."""
    weight, bias = _held(module)
    assert weight is not None
    return (weight.t() if type(module) is Conv1D else weight), bias


def _held(module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """The weight and bias; parameters without the detour that attributes of modules take, replicas' tensors with it."""
    held = module._parameters
    if "weight" in held and "bias" in held:
        return held["weight"], held["bias"]
    return module.weight, module.bias  # type: ignore[return-value]


def make_projection(weight: Tensor, bias: Tensor | None, kind: type[nn.Module] = nn.Linear) -> nn.Module:
    """A new `Linear` or `Conv1D` with copies of the `(out, in)` weight and `(out,)` bias, in their dtype and device."""
    out_features, in_features = weight.shape
    module: nn.Module
    if kind is Conv1D:
        # Conv1D has no device argument, and its initialisation draws random numbers that a meta tensor does not.
        with torch.device("meta"):
            module = Conv1D(out_features, in_features)
        weight = weight.t()
        bias = torch.zeros(out_features, dtype=weight.dtype, device=weight.device) if bias is None else bias
    else:
        module = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    module.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
    if bias is not None:
        module.bias = nn.Parameter(bias.clone())
    return module
