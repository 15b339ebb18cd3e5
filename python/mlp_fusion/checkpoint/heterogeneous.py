"""Models whose layers differ in width, through plain `AutoModel*.from_pretrained`.

transformers stores per-layer widths in its standard `per_layer_config`, but its layer classes read the global config.
Importing `mlp_fusion` registers a stand-in for each layer class (`transformers.monkey_patching`), active while a model
is being built: it hands every layer its own config and returns an instance of the *original* class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from torch import nn
from transformers.monkey_patching import get_patch_mapping, register_patch_mapping

from mlp_fusion.architectures import ARCHITECTURES


def _subclasses(cls: type) -> Iterator[type]:
    children: list[type] = cls.__subclasses__()
    for child in children:
        yield child
        yield from _subclasses(child)


@cache
def _original(name: str, package: str) -> Callable[..., nn.Module]:
    """The layer class `name` of a model package. Found among the living classes: while patches are active, the
    module's own attribute is the stand-in."""
    for cls in _subclasses(nn.Module):
        if cls.__name__ == name and cls.__module__.startswith(f"{package}."):
            return cls
    raise LookupError(f"no class {name} in {package}")


class _PerLayer(type):
    """Metaclass of the stand-ins: calling one builds the original, and instances of the original are its instances.

    The latter keeps transformers' output recorders, which look for layers by class, working for every model.
    """

    def __instancecheck__(cls, instance: object) -> bool:
        return any(base.__name__ == cls.__name__ for base in type(instance).__mro__)

    def __call__(cls, config: Any, *args: Any, **kwargs: Any) -> nn.Module:
        original = _original(cls.__name__, type(config).__module__.rpartition(".")[0])
        if not getattr(config, "is_heterogeneous", False):
            return original(config, *args, **kwargs)
        index = kwargs.get("layer_idx", args[0] if args else None)
        if index is None:
            return _build_list(original, config)
        return _share_config(original(config.per_layer_config[index], *args, **kwargs), config)


def _build_list(original: Callable[..., nn.Module], config: Any) -> nn.Module:
    """A module that builds all its layers itself (DistilBERT's `Transformer`): build it from the first layer's config,
    then exchange the layers that differ."""
    module = original(config.per_layer_config[0])
    layers = module.layer
    assert isinstance(layers, nn.ModuleList)
    for index in range(1, len(layers)):
        layers[index] = type(layers[index])(config.per_layer_config[index])
    return _share_config(module, config)


def _share_config(module: nn.Module, config: Any) -> nn.Module:
    """Point submodules at the model's config again, so that later changes to it (attention kernels) reach them."""
    for child in module.modules():
        if "config" in child.__dict__:
            child.config = config
    return module


def register() -> None:
    """Register the stand-ins of every architecture; calling it again does nothing."""
    registered = get_patch_mapping()
    names = {entry.layer_class for entry in ARCHITECTURES.values()}
    mapping = {f"^{name}$": _PerLayer(name, (nn.Module,), {}) for name in sorted(names)}
    register_patch_mapping({k: v for k, v in mapping.items() if k not in registered})
