"""Widths of FFNs, in a config and in the models that are built from it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mlp_fusion.errors import InputError, named
from mlp_fusion.families import Architecture, FFNSite
from mlp_fusion.families.exchange import put_parameters
from mlp_fusion.families.sites import WidthKey


def described(model: nn.Module) -> tuple[str, Any, Any]:
    """The outermost part of a model that its config describes: the model itself, or what it wraps.

    Returns:
        `(path, part, built)`; `built` is what the config makes of the part's class, on the meta device.

    Raises:
        InputError: there is none.
    """
    from mlp_fusion.families import building

    failed = "there is no Hugging Face model in it"
    with building.undisturbed():
        for path, part in model.named_modules():
            if isinstance(part, PreTrainedModel) and part.config is model.config:
                try:
                    return path, part, building.build(type(part), part.config)
                except Exception as error:  # noqa: BLE001  (a class of somebody else's wants more than a config)
                    failed = named(error, 300)
    raise InputError(f"{type(model).__name__}: no model can be built from its config ({failed})")


def width_keys(model: Any, config: Any, sites: Sequence[FFNSite], widths: Sequence[int]) -> tuple[Any, set[int]]:
    """Change the keys of `config` that lead to the widths, where there are such.

    Every key is tried: the model is built anew, on the meta device, and all of its shapes are compared.

    Args:
        model: unfused.
        config: a copy of its config.
        sites, widths: all of its FFNs, and their neurons after the fusion.

    Returns:
        The changed config, and the groups of kinds whose widths it states.
    """
    prefix, own, _ = described(model)
    groups: dict[int, list[tuple[FFNSite, int]]] = {}
    for site, width in zip(sites, widths, strict=True):
        groups.setdefault(site.kind.group, []).append((site, width))
    told: set[int] = set()
    expected = {name: tuple(p.shape) for name, p in own.named_parameters()}
    for number, members in groups.items():
        shares = {Fraction(width, site.kind.width) for site, width in members}
        if shares == {Fraction(1)}:
            told.add(number)
            continue
        key = members[0][0].kind.key
        if key is None or len(shares) > 1:
            continue
        narrow = {name: shape for site, width in members for name, shape in narrowed_shapes(site, width)}
        shapes = expected | {name.removeprefix(f"{prefix}."): shape for name, shape in narrow.items()}
        for value in _values(key, members[0][0].kind.width, *shares):
            trial = _built(own, config, key, value, shapes)
            if trial is not None:
                config, expected = trial, shapes
                told.add(number)
                break
    return config, told


def _values(key: WidthKey, width: int, share: Fraction) -> Iterator[Any]:
    """What a key may have to say for FFNs of a width to have a share of it."""
    if key.value is None:
        yield int(width * share)
        return
    if isinstance(key.value, (list, tuple)):
        yield [_share(entry, share) for entry in key.value]
        return
    yield _share(key.value, share)


def _share(value: float, share: Fraction) -> float:
    """A share of a number, whole where the number is and the share comes out even."""
    found = Fraction(value) * share
    return int(found) if isinstance(value, int) and found.denominator == 1 else float(found)


def _built(model: Any, config: Any, key: WidthKey, value: Any, shapes: Mapping[str, tuple[int, ...]]) -> Any | None:
    """The config with the key changed, if the model that it describes has the shapes."""
    from mlp_fusion.families import building

    with building.undisturbed():
        try:
            changed = _put(config, key.path.split("."), value)
            built = building.build(type(model), changed)
        except Exception:  # noqa: BLE001  (a config with another number may fail in any way)
            return None
    same = {name: tuple(p.shape) for name, p in built.named_parameters()} == dict(shapes)
    return changed if same else None


def _put(config: Any, path: Sequence[str], value: Any) -> Any:
    """A copy of the config, with all that a dict of it would not hold, in which the key at `path` says `value`."""
    changed = copy.deepcopy(config)
    holder: Any = changed
    for name in path[:-1]:
        holder = holder[name] if isinstance(holder, dict) else getattr(holder, name)
    if isinstance(holder, dict):
        holder[path[-1]] = value
    else:
        setattr(holder, path[-1], value)
    return changed


def narrowed_shapes(site: FFNSite, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of an FFN's parameters that have a neuron axis, at a width."""
    for name, axis in _neuron_axes(site).items():
        shape = list(site.module.get_parameter(name).shape)
        shape[axis] = shape[axis] // site.kind.width * width
        yield f"{site.path}.{name}", tuple(shape)


def _neuron_axes(site: FFNSite) -> dict[str, int]:
    """Parameter -> the axis that counts its neurons, of those that have one."""
    axes: dict[str, int] = {}
    for p in site.kind.projections:
        axes[p.parameter] = p.neuron_axis
        if p.bias is not None and p.role != "w_out":
            axes[p.bias] = site.module.get_parameter(p.bias).ndim - 1
    return axes


@torch.no_grad()
def build_narrow(model: nn.Module, architecture: Architecture, widths: Mapping[str, int]) -> None:
    """Give a newly built model the widths that only its record states; weights are loaded, or drawn, afterwards.

    Args:
        model: of the original widths, or part of one.
        architecture: of its record.
        widths: name of an FFN below the base model -> neurons.

    Raises:
        InputError: a width is not less than the FFN's own.
    """
    for site in architecture.sites(model):
        width = widths.get(architecture.name(site))
        now = site.neurons
        if width is None or width == now:
            continue
        if width > now:
            raise InputError(f"{site.path} has {now} neurons, the record of its fusion says {width}: it is damaged")
        shapes = dict(narrowed_shapes(site, width))
        tensors = {}
        for name in _neuron_axes(site):
            old = site.module.get_parameter(name)
            tensors[name] = old.new_empty(shapes[f"{site.path}.{name}"])
            if not old.is_meta:
                corner = tuple(slice(0, size) for size in tensors[name].shape)
                tensors[name].copy_(old[corner])
        put_parameters(site, tensors, width)
