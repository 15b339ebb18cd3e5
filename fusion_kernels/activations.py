"""Pointwise activations of feed-forward layers, by name, each with its exact derivative.

Every backend and every reference reads this table, so that an activation means the same function everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fusion_kernels.library import check_name


@dataclass(frozen=True)
class Activation:
    """An activation `sigma` and its derivative; both map a tensor to one of the same shape and dtype."""

    name: str
    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]


def _gelu_derivative(z: Tensor) -> Tensor:
    cdf = 0.5 * (1.0 + torch.erf(z / math.sqrt(2.0)))
    pdf = torch.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)
    return cdf + z * pdf


def _gelu_tanh_derivative(z: Tensor) -> Tensor:
    c = math.sqrt(2.0 / math.pi)
    t = torch.tanh(c * (z + 0.044715 * z**3))
    return 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * c * (1.0 + 3 * 0.044715 * z * z)


def _relu_derivative(z: Tensor) -> Tensor:
    # 0 at the kink, as torch.autograd has it.
    return (z > 0).to(z.dtype)


def _relu2_derivative(z: Tensor) -> Tensor:
    return 2.0 * torch.relu(z)


def _quick_gelu(z: Tensor) -> Tensor:
    return z * torch.sigmoid(1.702 * z)


def _quick_gelu_derivative(z: Tensor) -> Tensor:
    s, rest = torch.sigmoid(1.702 * z), torch.sigmoid(-1.702 * z)
    return s + z * s * (1.702 * rest)  # whose factors are finite in float16 as well


def _silu_derivative(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1.0 + z * (1.0 - s))


ACTIVATIONS: dict[str, Activation] = {
    a.name: a
    for a in (
        Activation("gelu", F.gelu, _gelu_derivative),
        Activation("gelu_tanh", lambda z: F.gelu(z, approximate="tanh"), _gelu_tanh_derivative),
        Activation("quick_gelu", _quick_gelu, _quick_gelu_derivative),
        Activation("relu", torch.relu, _relu_derivative),
        Activation("relu2", lambda z: torch.relu(z).square(), _relu2_derivative),
        Activation("silu", F.silu, _silu_derivative),
    )
}


def get_activation(name: str) -> Activation:
    """Return the activation called `name`.

    Raises:
        ValueError: `name` is not one of `gelu` (exact, by erf), `gelu_tanh`, `quick_gelu` (z sigmoid(1.702 z)), `relu`,
            `relu2` (squared ReLU), `silu`.
    """
    check_name("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]
