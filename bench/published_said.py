"""SAID as the authors' code goes about it, from their description: what `hadamard.py` measures ours beside.

B, Pi in 64 bits and G are drawn once and stored, transforms go stage by stage, and a module's parameters are made
before its forward pass and kept until the backward is through.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


def butterflies(x: Tensor) -> Tensor:
    """The Walsh-Hadamard transform over the last axis, a stage at a time."""
    L, half = x.shape[-1], 1
    while half < L:
        pairs = x.unflatten(-1, (-1, 2, half))
        x = torch.stack((pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]), -2).flatten(-3)
        half *= 2
    return x


class _Transform(torch.autograd.Function):
    """H x, whose gradient is H dy over the root of the length, as published."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return butterflies(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return butterflies(dy) / math.sqrt(dy.shape[-1])


class Stored(nn.Module):
    """A projection of theta to `size` entries, with all that it draws."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.L = size, 1 << (size - 1).bit_length()
        self.register_buffer("signs", torch.randint(0, 2, (self.L,)).mul_(2).sub_(1).float())
        self.register_buffer("places", torch.randperm(self.L))
        self.register_buffer("gaussians", torch.randn(self.L))
        self.scale = 1 / math.sqrt(size * float(self.gaussians.square().sum()))

    def forward(self, theta: Tensor) -> Tensor:
        padded = nn.functional.pad(theta, (0, self.L - len(theta)))  # cut short where theta is longer
        mixed = _Transform.apply(padded * self.signs)[self.places] * self.gaussians
        return _Transform.apply(mixed)[: self.size] * self.scale


class Published(nn.Module):
    """A model whose every parameter is moved by one vector of d numbers, lambdas included."""

    def __init__(self, model: nn.Module, d: int) -> None:
        super().__init__()
        self.model, self.frozen, self.projections = model, {}, nn.ModuleList()
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                self._take(module, name, parameter)
        self.theta = nn.Parameter(torch.zeros(d - len(self.projections)))
        self.lambdas = nn.Parameter(torch.ones(len(self.projections)))

    def _take(self, module: nn.Module, name: str, parameter: Tensor) -> None:
        place, value = len(self.projections), parameter.detach()
        self.projections.append(Stored(value.numel()))
        delattr(module, name)
        setattr(module, name, value)

        def make(owner: nn.Module, _: Any) -> None:
            moved = self.lambdas[place] * self.projections[place](self.theta).view(value.shape)
            setattr(owner, name, value + moved)

        module.register_forward_pre_hook(make)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)
