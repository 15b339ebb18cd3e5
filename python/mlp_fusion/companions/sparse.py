"""Layers some values of whose weights are trained: passes on the weight itself, gradients of those values alone.

The values stand in the weight while a pass runs on it, so that there is no copy of the weight, in memory or for the
backward; and what the backward computes of the weight's gradient are the entries that are asked for. (Adding the product
of the sparse matrix to the plain one would take a multiplication for each value and token, where writing takes one store
for each value and another to bring back what was there: from two tokens on there is nothing to choose.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from fusion_kernels import sampled_product

#: The rows and columns of the weight that one adapter has chosen, ascending.
Places = tuple[Tensor, Tensor]


class Held(Protocol):
    """What holds a weight, and writes chosen values into it."""

    #: Another one after every change of what is written.
    stamp: int

    def write(self, adapters: list[str]) -> None:
        """Let the weight hold the values of these adapters, and of no others."""

    def get_base_layer(self) -> Any:
        """The module whose `weight` it is."""


class _Linear(torch.autograd.Function):
    """x W^T + b, with gradients of x, b and of the chosen values of W, some for each adapter."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, held: Held, adapters: list[str], places: Sequence[Places],
        *values: Tensor,
    ) -> Tensor:  # fmt: skip
        held.write(adapters)
        ctx.held, ctx.adapters, ctx.places, ctx.has_bias, ctx.stamp = (
            held,
            adapters,
            places,
            bias is not None,
            held.stamp,
        )
        # The values are kept to be asked whether they are those of the forward still.
        ctx.save_for_backward(x, *values)
        return torch.nn.functional.linear(x, _matrix(held).to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *values = ctx.saved_tensors
        dx = db = None
        if ctx.needs_input_grad[0]:
            if ctx.held.stamp != ctx.stamp:  # a pass with other values, or without, has run in the meantime
                ctx.held.write(ctx.adapters)
            dx = dy @ _matrix(ctx.held).to(dy.dtype)
        g, inputs = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        if ctx.has_bias and ctx.needs_input_grad[1]:
            db = g.sum(0)
        left, right = (inputs, g) if isinstance(ctx.held.get_base_layer(), Conv1D) else (g, inputs)
        found = [
            sampled_product(left, right, *at).to(v.dtype) if needed else None
            for at, v, needed in zip(ctx.places, values, ctx.needs_input_grad[5:], strict=True)
        ]
        return dx, db, None, None, None, *found


class _Embedding(torch.autograd.Function):
    """Rows of a table by ids, with gradients of its chosen values, some for each adapter."""

    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, held: Held, adapters: list[str], places: Sequence[Places], *values: Tensor
    ) -> Tensor:
        held.write(adapters)
        ctx.places = places
        ctx.save_for_backward(ids, *values)
        return torch.nn.functional.embedding(ids, held.get_base_layer().weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        ids, *values = ctx.saved_tensors
        used, where = ids.reshape(-1).unique(return_inverse=True)
        wide = dy.reshape(-1, dy.shape[-1]).to(torch.promote_types(dy.dtype, torch.float32))
        sums = wide.new_zeros(len(used), wide.shape[1]).index_add_(0, where, wide)  # of the rows that were looked up
        found = []
        for (rows, columns), v in zip(ctx.places, values, strict=True):
            at = torch.searchsorted(used, rows).clamp(max=len(used) - 1)
            found.append(torch.where(used[at] == rows, sums[at, columns], 0.0).to(v.dtype))
        return None, None, None, None, *found


def linear(
    held: Held, adapters: list[str], x: Tensor, bias: Tensor | None, places: Sequence[Places], values: Sequence[Tensor]
) -> Tensor:
    """What a plain `Linear` or `Conv1D` makes of x, with another bias, and `values` at `places` of its weight.

    Args:
        held: holds the layer.
        adapters: whose values are to stand in the weight.
        x: (..., in).
        bias: (out,) or None.
        places, values: of each adapter, where in the weight as it is stored, and what is trained.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        bias = None if bias is None else bias.to(x.dtype)
        made: Tensor = _Linear.apply(x, bias, held, adapters, places, *values)
        return made


def embedding(
    held: Held, adapters: list[str], ids: Tensor, places: Sequence[Places], values: Sequence[Tensor]
) -> Tensor:
    """Rows of a table by ids, with `values` at `places` of it; arguments as of :func:`linear`."""
    made: Tensor = _Embedding.apply(ids, held, adapters, places, *values)
    return made


def _matrix(held: Held) -> Tensor:
    """The weight as `(out, in)`."""
    base = held.get_base_layer()
    weight: Tensor = base.weight
    return weight.t() if isinstance(base, Conv1D) else weight
