"""What importing `mlp_fusion` changes in transformers: three methods are wrapped, and nothing else.

- The constructors of the supported families' layers: transformers stores widths that differ by layer in its standard
  `per_layer_config`, but its layer classes read the global config and raise. Wrapped, a layer of such a model is built
  from its own config, through plain `AutoModel*.from_pretrained`. Models with equal layers are built as ever.
- `PreTrainedModel.save_pretrained`: a model that contains fused FFNs is saved folded, whichever of its modules the call
  is made on; one with fused experts that hold a scale is refused. Other models are saved as ever.
- The feed-forward method of families that split their FFN over sibling modules: it hands a fused FFN the projection
  that lies in the sibling.

Methods are wrapped rather than classes replaced through `transformers.monkey_patching`: there, any registered class
makes every later `from_pretrained` list all of transformers' modules, which takes a third of a second and, up to
transformers 5.17 at least, fails where torchvision is not installed.
"""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from mlp_fusion.architectures import ARCHITECTURES
from mlp_fusion.architectures.bert import SplitArchitecture
from mlp_fusion.checkpoint.folding import save_folded
from mlp_fusion.errors import InputError
from mlp_fusion.modules import FusedExperts, FusedFFN

_Method = Callable[..., Any]
_MARK = "_wrapped_by_mlp_fusion"


def register() -> None:
    """Wrap the methods; calling it again does nothing."""
    _wrap(PreTrainedModel, "save_pretrained", _saving)
    for entry in ARCHITECTURES.values():
        cls = pkgutil.resolve_name(entry.layer_class)
        _wrap(cls, "__init__", _list_init if entry.layer_class_builds_list else _layer_init)
        if isinstance(entry, SplitArchitecture):
            _wrap(cls, "feed_forward_chunk", _spanning)


def _wrap(cls: type, name: str, wrapper: Callable[[_Method], _Method]) -> None:
    method = getattr(cls, name)
    if not hasattr(method, _MARK):
        wrapped = functools.wraps(method)(wrapper(method))
        setattr(wrapped, _MARK, True)
        setattr(cls, name, wrapped)


def _saving(save: _Method) -> _Method:
    def save_pretrained(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        if any(isinstance(module, FusedExperts) and module.scale is not None for module in self.modules()):
            raise InputError(
                "the model holds fused experts with a scale, which no plain checkpoint has: "
                "call merge_scale() on every FusedExperts before saving"
            )
        if any(isinstance(module, FusedFFN) for module in self.modules()):
            save_folded(self, save, *args, **kwargs)
        else:
            save(self, *args, **kwargs)

    return save_pretrained


def _spanning(feed_forward: _Method) -> _Method:
    def feed_forward_chunk(self: Any, attention_output: Tensor) -> Any:
        if not isinstance(self.intermediate, FusedFFN):
            return feed_forward(self, attention_output)
        # The sibling's projection is looked up on every call: replicas and wrappers have another one than the model
        # that was fused.
        return self.output(self.intermediate(attention_output, self.output.dense), attention_output)

    return feed_forward_chunk


def _layer_init(init: _Method) -> _Method:
    """The constructor of one layer, which gets its index as `layer_idx`."""

    def wrapper(self: nn.Module, config: Any, *args: Any, **kwargs: Any) -> None:
        if not config.is_heterogeneous:
            init(self, config, *args, **kwargs)
            return
        index = kwargs["layer_idx"] if "layer_idx" in kwargs else args[0]
        init(self, config.per_layer_config[index], *args, **kwargs)
        _share_config(self, config)

    return wrapper


def _list_init(init: _Method) -> _Method:
    """The constructor of a module that builds the list `layer` itself, without telling layers their index."""

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
