"""Models built from a config on the meta device, small real copies of their modules, and nothing else changed."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import inspect
import logging
import math
import random
import re
import warnings
from collections.abc import Iterator
from typing import Any

import huggingface_hub.constants
import numpy as np
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from mlp_fusion.errors import InputError

#: Real modules have at most this many entries; larger parameters that no width moves are one number each.
_LARGEST = 250_000_000
#: Widths and numbers of experts that are tried for the small model, best first; None leaves them as they are.
NARROW = ((24, 8), (24, 16), (24, None), (64, 16), (64, None), (None, None))
#: Keys that are likely widths. They tell where to look first and what to make small; nothing is believed because of a
#: name.
WIDTHS = re.compile(
    r".*(intermediate|ffn|feed_?forward|d_ff|inner|mlp_dim|mlp_ratio|expert_dim|mlp_hidden|hidden_dim|dim_ff|fc_dim).*"
)
#: Attributes of modules that differ from layer to layer without making another kind of FFN.
_PLACE = re.compile(r".*(idx|index|layer|block|depth|drop|stage).*")
_EXPERTS = re.compile(r"num_experts|n_routed_experts|num_local_experts|moe_num_experts|num_routed_experts")
#: What draws or fills weights, in a tensor that it gets first and returns.
_INITIALISERS = tuple(name for name in vars(nn.init) if name.endswith("_") and not name.startswith("_"))
_IMPLEMENTATIONS = ("_experts_implementation", "_experts_implementation_internal")


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Leaves random number generators, the default dtype, logging and the use of the network as they were.

    Within, nothing is fetched and libraries are silent.
    """
    constants: Any = huggingface_hub.constants
    logger = logging.getLogger("transformers")
    states = random.getstate(), np.random.get_state()
    before = torch.get_default_dtype(), logger.level, constants.HF_HUB_OFFLINE
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL)
        constants.HF_HUB_OFFLINE = True
        try:
            yield
        finally:
            torch.set_default_dtype(before[0])
            logger.setLevel(before[1])
            constants.HF_HUB_OFFLINE = before[2]
            random.setstate(states[0])
            np.random.set_state(states[1])


def model_class(config: Any) -> type[PreTrainedModel]:
    """The class that a config is for: the one it names, else by the auto classes, else by the class's config.

    Raises:
        InputError: transformers has none.
    """
    for name in getattr(config, "architectures", None) or ():
        named: Any = getattr(transformers, str(name), None)
        if inspect.isclass(named) and issubclass(named, PreTrainedModel):
            cls: Any = named
            if cls.config_class is not None and isinstance(config, cls.config_class):
                return named
    for mapping in _auto_mappings():
        with contextlib.suppress(Exception):  # a class whose libraries are missing
            found = mapping[type(config)]
            return found[0] if isinstance(found, (tuple, list)) else found
    found = _part_class(type(config))
    if found is None:
        raise InputError(
            f"{config.model_type}: transformers has no model class for this config; code from the hub is not run"
        )
    return found


@functools.cache
def _auto_mappings() -> list[Any]:
    names = sorted(n for n in dir(modeling_auto) if n.startswith("MODEL_FOR") and n.endswith("_MAPPING"))
    return [getattr(modeling_auto, name) for name in ["MODEL_MAPPING", *names]]


def _part_class(config_class: type) -> type[PreTrainedModel] | None:
    """The model class of a part of a composite model, in the modeling file beside its config's."""
    try:
        module = importlib.import_module(config_class.__module__.replace(".configuration_", ".modeling_"))
    except ImportError:
        return None
    found = [
        member
        for _, member in inspect.getmembers(module, inspect.isclass)
        if issubclass(member, PreTrainedModel)
        and member.__module__ == module.__name__
        and getattr(member, "config_class", None) is config_class
        and not member.__name__.endswith("PreTrainedModel")
    ]
    found.sort(key=lambda c: ("For" in c.__name__, len(c.__name__)))
    return found[0] if found else None


def build(cls: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    """The model that `config` describes, on the meta device; `config` itself is not touched."""
    with torch.device("meta"), _nothing_drawn():
        model: PreTrainedModel = cls._from_config(copy.deepcopy(config), dtype=torch.float32)  # type: ignore[attr-defined]
    return model


@contextlib.contextmanager
def _nothing_drawn() -> Iterator[None]:
    """Inside, nothing is drawn for tensors on the meta device: that took a third of the time to build a model there."""

    def skipping(own: Any) -> Any:
        return lambda tensor, *how, **options: tensor if tensor.is_meta else own(tensor, *how, **options)

    before = {name: getattr(nn.init, name) for name in _INITIALISERS}
    for name, own in before.items():
        setattr(nn.init, name, skipping(own))
    try:
        yield
    finally:
        for name, own in before.items():
            setattr(nn.init, name, own)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter, shared ones once, and of every buffer that is saved."""
    found = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found[f"{path}.{name}" if path else name] = tuple(buffer.shape)
    return found


def first_names(model: nn.Module) -> dict[str, str]:
    """Every name of every parameter -> the first of its names; they differ where parameters are shared."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def pattern(name: str) -> str:
    """A dotted name with its numbers replaced by `#`."""
    return re.sub(r"(^|\.|expert_)\d+(?=\.|$)", r"\1#", name)


def traits(module: nn.Module, *, numbers: bool = True) -> tuple[Any, ...]:
    """What a module computes with besides parameters: classes, flags, names, limits; with `numbers`, integers too."""
    kinds = (bool, float, int, str) if numbers else (bool, float, str)
    return tuple(
        (name, type(part).__name__, tuple(
            (key, value)
            for key, value in sorted(vars(part).items())
            if type(value) in kinds and not key.startswith("_") and not _PLACE.fullmatch(key)
        ))
        for name, part in module.named_modules()
    )  # fmt: skip


def put(values: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A copy of a config's dict in which the key at `path` says `value`."""
    changed = copy.deepcopy(values)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return changed


def narrow_config(
    config: Any, widths: list[tuple[tuple[str, ...], Any]], width: int | None, experts: int | None
) -> Any:
    """The config with likely widths and numbers of experts made small, so that real modules are.

    Args:
        config: the user's.
        widths: path and value of each key to make small.
        width, experts: what they become; None leaves them.
    """
    values = config.to_dict()
    if width is not None:
        for path, value in widths:
            small = [width] * len(value) if isinstance(value, list) else width
            values = put(values, path, small)
    if experts is not None:
        _fewer_experts(values, experts)
    return type(config).from_dict(values)


def _fewer_experts(values: dict[str, Any], most: int) -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            _fewer_experts(value, most)
        elif _EXPERTS.fullmatch(str(key)):
            if type(value) is int:
                values[key] = min(value, most)
            elif isinstance(value, list):
                values[key] = [min(entry, most) for entry in value]


@contextlib.contextmanager
def eager_experts(model: nn.Module) -> Iterator[None]:
    """Inside, experts run their own forward, whose products are seen one by one, whatever the config asks for."""
    configs = {id(c): c for part in model.modules() if (c := vars(part).get("config")) is not None}
    before = [(config, key, getattr(config, key, None)) for config in configs.values() for key in _IMPLEMENTATIONS]
    for config, key, _ in before:
        with contextlib.suppress(Exception):  # a config that checks what it is told
            setattr(config, key, "eager")
    try:
        yield
    finally:
        for config, key, value in before:
            with contextlib.suppress(Exception):
                setattr(config, key, value)


def materialise(meta: nn.Module, moved: set[str], *, large: bool | None = None) -> nn.Module:
    """A real copy of a module on the meta device, in float32 and evaluation mode.

    Its weights are random and keep hidden states near 1, biases and norms included. Where it is large, matrices that
    are not among `moved` are zeros without memory of their own.

    Args:
        meta: the module.
        moved: names of the parameters that matter.
        large: whether to take it for large; None: by its size.

    Raises:
        InputError: it is too large even so, or nothing in it matters.
    """
    count = sum(p.numel() for p in meta.parameters())
    if large is None:
        large = count > _LARGEST
        if large and not moved:  # nothing but zeros would be left
            raise InputError(f"{type(meta).__name__} has {count:,} entries, too many to make real")
    needed = sum(p.numel() for n, p in meta.named_parameters() if not large or n in moved or p.dim() < 2)
    if needed > _LARGEST:
        raise InputError(f"{type(meta).__name__} has {needed:,} entries, too many to make real")
    module = copy.deepcopy(meta).eval()
    g = torch.Generator().manual_seed(0)
    for path, part in module.named_modules():
        for name, parameter in part._parameters.items():
            if parameter is None:
                continue
            full = f"{path}.{name}" if path else name
            if large and full not in moved and parameter.dim() >= 2:
                value = torch.zeros(1).expand(parameter.shape)
            else:
                value = _random(full, parameter, g)
            part._parameters[name] = nn.Parameter(value, requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                kind = torch.float32 if buffer.is_floating_point() else buffer.dtype
                part._buffers[name] = torch.full(buffer.shape, 1 if buffer.is_floating_point() else 0, dtype=kind)
    return module


def _random(name: str, parameter: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    if not parameter.is_floating_point():
        return torch.zeros(parameter.shape, dtype=parameter.dtype)
    noise = torch.randn(parameter.shape, generator=g)
    if parameter.dim() < 2:
        return 0.1 * noise if name.endswith("bias") else 1 + 0.1 * noise
    fan_in = parameter.shape[-1] if parameter.dim() <= 3 else parameter[0].numel()
    return noise / math.sqrt(max(fan_in, 1))
