"""Small real models whose FFNs have equal neurons, and what is left of those when equal ones are merged.

Neurons are read and written in the raw parameters, by the axes and parts that a description states, and by nothing of
the product's own reading code: what the product makes of such a model can be checked against this.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mlp_fusion.families import building
from mlp_fusion.families.groups import resolve_widths
from mlp_fusion.families.sites import Description, Projection, Site, WidthKey

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def real_model(config: Any, seed: int = 0) -> PreTrainedModel:
    """The model that `config` describes: float32, on the CPU, in evaluation mode.

    Weights are random and keep hidden states near 1. Biases and norms are random too: fresh ones hide mistakes.
    """
    torch.manual_seed(seed)
    cls: Any = building.model_class(config)
    model: PreTrainedModel = cls._from_config(copy.deepcopy(config), dtype=torch.float32)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        convolved = {id(m.weight) for m in model.modules() if isinstance(m, _CONVOLUTIONS)}
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                parameter.copy_(_values(name, parameter, id(parameter) in convolved, g))
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0  # as some classes make it when they load
    return model.eval()


def _values(name: str, like: Tensor, convolved: bool, g: torch.Generator) -> Tensor:
    noise = torch.randn(like.shape, generator=g)
    if like.dim() < 2:
        return 0.1 * noise if name.endswith("bias") else 1 + 0.1 * noise
    # What has three axes and is no convolution is a stack of matrices.
    fan_in = like[0].numel() if convolved or like.dim() > 3 else like.shape[-1]
    return noise / math.sqrt(max(fan_in, 1))


def instances(description: Description) -> Iterator[tuple[Site, str]]:
    """Every FFN with the path of its module."""
    for site in description.sites:
        for path, _ in site.instances:
            yield site, path


def kept(site: Site, sites: Sequence[Site]) -> int:
    """Neurons that stay at half the width, about: a width that is served, as all `sites` of its group share it."""
    group = [other for other in sites if other.group == site.group]
    kinds: list[Any] = [
        SimpleNamespace(kind=SimpleNamespace(path=other.path, width=other.width, group=other.group, key=_key(other)))
        for other in group
    ]
    return resolve_widths(0.5, kinds)[group.index(site)]


def _key(site: Site) -> WidthKey | None:
    return site.width_keys[0] if site.width_keys and not site.width_keys[0].also_moves else None


@torch.no_grad()
def tie(model: nn.Module, description: Description) -> None:
    """Make every FFN's neurons from :func:`kept` on equal to the first ones, in every projection and bias, in place."""
    for site, path in instances(description):
        first = torch.arange(site.width) % kept(site, description.sites)
        for projection in site.projections:
            for tensor, axis in _tensors(model, path, projection):
                for block in _blocks(tensor.shape[axis], site.width, projection):
                    values = tensor.data.index_select(axis, block[first])
                    tensor.data.index_copy_(axis, block, values)


def _tensors(model: nn.Module, path: str, projection: Projection) -> Iterator[tuple[Tensor, int]]:
    """Parameters of a projection that have an entry for each neuron, with the axis that counts them."""
    yield _parameter(model, path, projection.parameter), projection.neuron_axis
    if projection.bias is not None and projection.role != "w_out":
        bias = _parameter(model, path, projection.bias)
        yield bias, bias.dim() - 1


def _parameter(model: nn.Module, path: str, name: str) -> Tensor:
    return model.get_parameter(f"{path}.{name}" if path else name)


def _blocks(length: int, width: int, projection: Projection) -> list[Tensor]:
    """Where neurons `0..width-1` lie on an axis: one tensor of indices, or one for each expert on that axis."""
    j = torch.arange(width)
    if projection.expert_axis == projection.neuron_axis:
        return [expert * width + j for expert in range(length // width)]
    return [{"whole": j, "first": j, "second": width + j, "even": 2 * j, "odd": 2 * j + 1}[projection.part]]


@dataclasses.dataclass(frozen=True)
class Neurons:
    """The neurons of an FFN, or of every expert of one.

    Attributes:
        ins: `(experts, neurons, values)`, what leads into each; biases too.
        outs: `(experts, neurons, values)`, what each leads to.
    """

    ins: Tensor
    outs: Tensor


@torch.no_grad()
def neurons(model: nn.Module, site: Site, path: str, width: int) -> Neurons:
    """The neurons of the FFN at `path`, of which there are `width`."""
    ins: list[Tensor] = []
    outs: list[Tensor] = []
    for projection in site.projections:
        found = outs if projection.role == "w_out" else ins
        found += [
            _by_expert(tensor, axis, width, projection) for tensor, axis in _tensors(model, path, projection)
        ]  # fmt: skip
    # Where experts are fewer in one stack than in another, those without a counterpart compute nothing.
    least = min(t.shape[0] for t in [*ins, *outs])
    return Neurons(torch.cat([t[:least] for t in ins], -1), torch.cat([t[:least] for t in outs], -1))


def _by_expert(tensor: Tensor, axis: int, width: int, projection: Projection) -> Tensor:
    blocks = [tensor.index_select(axis, block) for block in _blocks(tensor.shape[axis], width, projection)]
    if projection.expert_axis is None or len(blocks) > 1:
        return torch.stack(
            [block.movedim(axis, 0).flatten(1) if block.dim() > 1 else block[:, None] for block in blocks]
        )
    block = blocks[0]
    experts = projection.expert_axis if block.dim() > 2 else 0
    return block.movedim((experts, axis), (0, 1)).flatten(2) if block.dim() > 2 else block[..., None]


def merged(wide: Neurons, left: int) -> Neurons:
    """The `left` neurons of a tied FFN whose equal ones are merged: their outputs are added."""
    counts = torch.bincount(torch.arange(wide.ins.shape[1]) % left, minlength=left)
    return Neurons(wide.ins[:, :left], wide.outs[:, :left] * counts[:, None])


def difference(found: Neurons, wanted: Neurons) -> float:
    """Largest relative difference of two sets of neurons, whose order does not matter."""
    if found.ins.shape != wanted.ins.shape or found.outs.shape != wanted.outs.shape:
        return math.inf
    worst = 0.0
    for a, b, c, d in zip(found.ins, wanted.ins, found.outs, wanted.outs, strict=True):
        order = torch.cdist(b.double(), a.double()).argmin(dim=1)
        if len(order.unique()) < len(order):
            return math.inf
        worst = max(worst, float((a[order] - b).norm() / b.norm()), float((c[order] - d).norm() / d.norm()))
    return worst


# --- descriptions that are wrong --------------------------------------------------------------------------------------


def wrong(description: Description) -> Iterator[tuple[str, Description]]:
    """The description with one mistake in its first site that may have it, with the mistake's name."""
    for name, change in (("gate and up", _swapped), ("halves", _other_halves), ("axis", _transposed)):
        for number, site in enumerate(description.sites):
            changed = change(site)
            if changed is not None:
                sites = (*description.sites[:number], changed, *description.sites[number + 1 :])
                yield name, dataclasses.replace(description, sites=sites)
                break


def _with(site: Site, changed: list[Projection]) -> Site:
    return dataclasses.replace(site, projections=tuple(changed))


def _swapped(site: Site) -> Site | None:
    """Gate and up exchanged."""
    if site.function.form != "gated":
        return None
    gate, up, *rest = site.projections
    return _with(site, [
        dataclasses.replace(up, role=gate.role), dataclasses.replace(gate, role=up.role), *rest
    ])  # fmt: skip


def _other_halves(site: Site) -> Site | None:
    """Halves of one matrix taken for turns, and turns for halves."""
    other = {"first": "even", "second": "odd", "even": "first", "odd": "second"}
    if all(p.part == "whole" for p in site.projections):
        return None
    return _with(site, [dataclasses.replace(p, part=other.get(p.part, p.part)) for p in site.projections])


def _transposed(site: Site) -> Site | None:
    """The other axis of the output projection."""
    *rest, out = site.projections
    axes = {0, 1} if out.expert_axis is None else {0, 1, 2} - {out.expert_axis}
    if out.expert_axis == out.neuron_axis:
        return None
    other = next(iter(axes - {out.neuron_axis}))
    return _with(site, [*rest, dataclasses.replace(out, neuron_axis=other)])
