"""Models whose layers differ in width, through plain `AutoModel*.from_pretrained`.

transformers stores per-layer widths in its standard `per_layer_config`, but its layer classes read the global config
and raise. Importing `mlp_fusion` wraps the constructors of the supported families' layers: a layer of such a model is
built from its own config. Models with equal layers are built as ever.

The constructor is wrapped rather than the class replaced through `transformers.monkey_patching`: there, any registered
class makes every later `from_pretrained` list all of transformers' modules, which takes a third of a second and, up to
transformers 5.17 at least, fails where torchvision is not installed.
"""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Callable
from typing import Any

from torch import nn

from mlp_fusion.architectures import ARCHITECTURES

_Init = Callable[..., None]


def register() -> None:
    """Wrap the layer constructors of every architecture; calling it again does nothing."""
    for entry in ARCHITECTURES.values():
        cls = pkgutil.resolve_name(entry.layer_class)
        if not hasattr(cls.__init__, "__wrapped__"):
            cls.__init__ = _list_init(cls.__init__) if entry.layer_class_builds_list else _layer_init(cls.__init__)


def _layer_init(init: _Init) -> _Init:
    """The constructor of one layer, which gets its index as `layer_idx`."""

    @functools.wraps(init)
    def wrapper(self: nn.Module, config: Any, *args: Any, **kwargs: Any) -> None:
        if not config.is_heterogeneous:
            init(self, config, *args, **kwargs)
            return
        index = kwargs["layer_idx"] if "layer_idx" in kwargs else args[0]
        init(self, config.per_layer_config[index], *args, **kwargs)
        _share_config(self, config)

    return wrapper


def _list_init(init: _Init) -> _Init:
    """The constructor of a module that builds the list `layer` itself, without telling layers their index."""

    @functools.wraps(init)
    def wrapper(self: nn.Module, config: Any, *args: Any, **kwargs: Any) -> None:
        if not config.is_heterogeneous:
            init(self, config, *args, **kwargs)
            return
        init(self, config.per_layer_config[0], *args, **kwargs)
        layers = self.get_submodule("layer")
        assert isinstance(layers, nn.ModuleList)
        for index in range(1, len(layers)):
            layers[index] = type(layers[index])(config.per_layer_config[index])
        _share_config(self, config)

    return wrapper


def _share_config(module: nn.Module, config: Any) -> None:
    """Point submodules at the model's config again, so that later changes to it (attention kernels) reach them."""
    for child in module.modules():
        if "config" in child.__dict__:
            child.config = config
