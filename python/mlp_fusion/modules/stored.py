"""How the neurons of an FFN lie in a model's parameters, and the way there and back.

Every layout comes down to a few numbers: which axis counts neurons, which counts experts, and which part of an axis
holds the gate. `torch.nn.Linear`, GPT-2's `Conv1D`, pointwise convolutions, gate and up in one projection, and stacks
of experts in all their orders are read and written by the same few lines.

Notation: E experts (1 of a dense FFN), N neurons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusion_kernels.gates import PLAIN, Gate
from mlp_fusion.neurons import NeuronBundle

_HALVES = {"first": 0, "second": 1, "even": 0, "odd": 1}


@dataclass(frozen=True)
class Projection:
    """One projection of an FFN, as it lies in a parameter.

    Attributes:
        parameter: name below the site's path.
        role: `w_gate`, `w_in` (of a gated FFN, the up projection) or `w_out`.
        part: `whole`, or which half of the neuron axis: `first`, `second`, `even`, `odd`.
        neuron_axis: the axis that counts neurons.
        expert_axis: the axis that counts experts, or None. Where it equals `neuron_axis`, the experts lie one after
            another on one axis.
        bias: name of the bias (its last axis counts neurons, or outputs for `w_out`; halves as in `part`), or None.
    """

    parameter: str
    role: str
    part: str
    neuron_axis: int
    expert_axis: int | None = None
    bias: str | None = None

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of its parameters."""
        return (self.parameter,) if self.bias is None else (self.parameter, self.bias)


def parameters_of(projections: Sequence[Projection]) -> list[str]:
    """Names of all parameters of an FFN, each once, biases too."""
    return list(dict.fromkeys(name for p in projections for name in p.tensors))


def take_half(values: Tensor, half: str, axis: int) -> Tensor:
    """One half of an axis: `first`, `second`, `even` or `odd`; all of it for `whole`."""
    if half == "whole":
        return values
    size = values.shape[axis]
    if half in ("even", "odd"):
        return values.index_select(axis, torch.arange(_HALVES[half], size, 2, device=values.device))
    return values.narrow(axis, _HALVES[half] * (size // 2), size // 2)


def count_neurons(shape: Sequence[int], projection: Projection, experts: int) -> int:
    """N, from the shape of a projection's parameter."""
    count = shape[projection.neuron_axis]
    if projection.expert_axis == projection.neuron_axis:
        count //= experts
    return count if projection.part == "whole" else count // 2


def bundle_of(
    tensors: Mapping[str, Tensor],
    projections: Sequence[Projection],
    activation: str,
    *,
    gating: Gate = PLAIN,
    experts: int = 1,
    scale: Tensor | None = None,
    scale_exponent: float = 0.0,
) -> NeuronBundle:
    """The FFN that lies in `tensors`, with B = E; views of them wherever that is possible.

    Args:
        tensors: by the names that `projections` give them.
        projections: where it lies.
        activation: a name in `fusion_kernels.activations.ACTIVATIONS`.
        gating: limits and offset of a gated FFN.
        experts: E; input projections may have more, of which nothing comes out.
        scale: `(N,)` or `(E, N)` cluster sizes, integer or floating, or None.
        scale_exponent: the a with which the tensors carry the scale.

    Raises:
        ValueError: shapes disagree or the activation is unknown.
    """
    found: dict[str, Any] = {}
    for p in projections:
        found[p.role] = take_half(_by_neuron(tensors[p.parameter], p, experts), p.part, 1)[:experts]
        if p.bias is not None:
            bias = tensors[p.bias].reshape(experts, -1)
            found[p.role.replace("w_", "b_")] = bias if p.role == "w_out" else take_half(bias, p.part, 1)
    if scale is not None:
        scale = scale.detach().reshape(experts, -1)
        scale = scale if scale.is_floating_point() else scale.float()
    exponent = 0.0 if scale is None else scale_exponent
    return NeuronBundle(activation=activation, gating=gating, scale=scale, scale_exponent=exponent, **found)


def tensors_of(
    bundle: NeuronBundle, projections: Sequence[Projection], like: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The inverse of :func:`bundle_of`: new tensors that hold `bundle`, laid out as those in `like`."""
    written: dict[str, Tensor] = {}
    for name in parameters_of(projections):
        held = [p for p in projections if name in p.tensors]
        first = held[0]
        if name == first.parameter:
            rows = _joined({p.part: _with_idle(getattr(bundle, p.role), like[name], p) for p in held})
            written[name] = _as_stored(rows, like[name].shape, first)
        else:
            roles = {p.part: getattr(bundle, p.role.replace("w_", "b_")) for p in held}
            values = roles["whole"] if first.role == "w_out" else _joined(roles)
            written[name] = values.reshape(values.shape if like[name].ndim == 2 else -1).clone()
    return written


def spread(scale: Tensor, projections: Sequence[Projection], name: str, like: Tensor) -> Tensor:
    """A factor per neuron, `(N,)` or `(E, N)`, so that it can be multiplied with the parameter `name`.

    Args:
        scale: the factors.
        projections: of the FFN.
        name: of a parameter with a neuron axis.
        like: that parameter.
    """
    held = [p for p in projections if name in p.tensors]
    scale = scale.reshape(-1, scale.shape[-1])
    if name == held[0].parameter and (idle := _idle(len(scale), like, held[0])):
        scale = torch.cat([scale, scale.new_ones(idle, scale.shape[1])])
    factors = _joined({p.part: scale for p in held})
    if name == held[0].bias:
        return factors.reshape(like.shape)
    return _as_stored(factors.unsqueeze(-1), like.shape, held[0])


def _by_neuron(parameter: Tensor, p: Projection, experts: int) -> Tensor:
    """`(E, N or 2 N, other channels)`: a view."""
    neuron, expert = p.neuron_axis, p.expert_axis
    if expert is None:
        parameter, neuron, expert = parameter.unsqueeze(0), neuron + 1, 0
    elif expert == neuron:
        parameter, neuron = parameter.unflatten(neuron, (experts, -1)), neuron + 1
    return parameter.movedim((expert, neuron), (0, 1)).flatten(2)


def _idle(experts: int, parameter: Tensor, p: Projection) -> int:
    """How many experts a stack has beyond those that have an output."""
    return 0 if p.expert_axis in (None, p.neuron_axis) else parameter.shape[p.expert_axis] - experts


def _with_idle(values: Tensor, like: Tensor, p: Projection) -> Tensor:
    """`(E, N, ...)` values, and behind them the first N neurons of the experts in `like` that have no output."""
    if not _idle(len(values), like, p):
        return values
    behind = take_half(_by_neuron(like, p, len(values)), p.part, 1)[len(values) :, : values.shape[1]]
    return torch.cat([values, behind.to(values.dtype)])


def _joined(parts: Mapping[str, Tensor]) -> Tensor:
    """The halves of axis 1 as they are stored."""
    if "whole" in parts:
        return parts["whole"]
    if "first" in parts:
        return torch.cat([parts["first"], parts["second"]], 1)
    return torch.stack([parts["even"], parts["odd"]], 2).flatten(1, 2)


def _as_stored(rows: Tensor, shape: Sequence[int], p: Projection) -> Tensor:
    """`(E, N or 2 N, other channels)` with the axes of a parameter; a single other channel stands for all."""
    others = [size for axis, size in enumerate(shape) if axis not in (p.neuron_axis, p.expert_axis)]
    if rows.shape[2] == 1:
        others = [1] * len(others)
    rows = rows.reshape(*rows.shape[:2], *others)
    if p.expert_axis is None:
        stored = rows.squeeze(0).movedim(0, p.neuron_axis)
    elif p.expert_axis == p.neuron_axis:
        stored = rows.flatten(0, 1).movedim(0, p.neuron_axis)
    else:
        stored = rows.movedim((0, 1), (p.expert_axis, p.neuron_axis))
    return stored.clone(memory_format=torch.contiguous_format)
