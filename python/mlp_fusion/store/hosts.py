"""What importing `mlp_fusion` changes in other libraries, each as its module is imported; nothing else is touched.

- The constructors of the supported families' layers: transformers stores widths that differ by layer in its standard
  `per_layer_config`, but its layer classes read the global config and raise. Wrapped, a layer of such a model is built
  from its own config, through plain `AutoModel*.from_pretrained`. Models with equal layers are built as ever.
- `PreTrainedModel.save_pretrained`: a model that contains fused FFNs is saved folded, whichever of its modules the call
  is made on; one with fused experts that hold a scale is refused. Other models are saved as ever.
- `PreTrainedModel.from_pretrained` and `load_state_dict` of its models: a state in which a fused FFN has a scale, or
  lacks one, without the model being able to tell what it means, is refused (see `store.states`).
- `Trainer`, `load_sharded_checkpoint` and accelerate's `load_checkpoint_in_model` say of the folder that they read
  whether its weights are plain; the last is refused where it would set tensors one by one. torch's
  `set_model_state_dict`, which fills up a state from the model's own before it loads it, asks the same questions first.
- The feed-forward method of families that split their FFN over sibling modules: it hands a fused FFN the projection
  that lies in the sibling.
- transformers' registry of implementations of experts gets one more, `mlp_fusion`.

Methods are wrapped rather than classes replaced through `transformers.monkey_patching`: there, any registered class
makes every later `from_pretrained` list all of transformers' modules, which takes a third of a second and, up to
transformers 5.17 at least, fails where torchvision is not installed.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from mlp_fusion.errors import InputError

_Method = Callable[..., Any]
_MARK = "_wrapped_by_mlp_fusion"


def adapt(module: ModuleType) -> None:
    """Wrap what `module` of transformers defines; doing it again changes nothing."""
    name = module.__name__
    if name == "transformers.modeling_utils":
        cls = module.PreTrainedModel
        _wrap(cls, "save_pretrained", _saving)
        _wrap(cls, "_load_from_state_dict", _loading)
        _wrap(cls, "from_pretrained", _from_pretrained)
        importlib.import_module("mlp_fusion.modules.experts")  # it registers its implementation
    elif name == "transformers.trainer_utils":
        _wrap(module, "load_sharded_checkpoint", _reading_folder)
    elif name == "transformers.trainer":
        _wrap(module.Trainer, "_load_from_checkpoint", _resuming)
        _wrap(module.Trainer, "_load_best_model", _loading_best)
    elif name == "torch.distributed.checkpoint.state_dict":
        _wrap(module, "set_model_state_dict", _setting)
    elif name == "accelerate.utils.modeling":
        _wrap(module, "load_checkpoint_in_model", _setting_one_by_one)
    else:
        _adapt_layers(module)


def _adapt_layers(module: ModuleType) -> None:
    from mlp_fusion.families import ARCHITECTURES
    from mlp_fusion.families.bert import SplitArchitecture

    for entry in ARCHITECTURES.values():
        place, _, cls_name = entry.layer_class.partition(":")
        if place == module.__name__:
            cls = getattr(module, cls_name)
            _wrap(cls, "__init__", _list_init if entry.layer_class_builds_list else _layer_init)
            if isinstance(entry, SplitArchitecture):
                _wrap(cls, "feed_forward_chunk", _spanning)


def _wrap(owner: Any, name: str, wrapper: Callable[[_Method], _Method]) -> None:
    method = getattr(owner, name)
    if hasattr(method, _MARK):
        return
    of_class = isinstance(vars(owner).get(name), classmethod)
    wrapped = functools.wraps(method)(wrapper(method.__func__ if of_class else method))
    setattr(wrapped, _MARK, True)
    setattr(owner, name, classmethod(wrapped) if of_class else wrapped)


def _saving(save: _Method) -> _Method:
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> None:
        from mlp_fusion.modules import FusedExperts, ScaleHolder
        from mlp_fusion.store.folding import save_folded

        if any(isinstance(module, FusedExperts) and module.scale is not None for module in self.modules()):
            raise InputError(
                "the model holds fused experts with a scale, which no plain checkpoint has: "
                "call merge_scale() on every FusedExperts before saving"
            )
        if any(isinstance(module, ScaleHolder) for module in self.modules()):
            save_folded(self, save, *args, **kwargs)
        else:
            save(self, *args, **kwargs)

    return save_pretrained


def _loading(load: _Method) -> _Method:
    def load_from_state_dict(self: Any, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        from mlp_fusion.store import states

        states.check_forms(self, state_dict, prefix)
        load(self, state_dict, prefix, *args, **kwargs)

    return load_from_state_dict


def _from_pretrained(load: _Method) -> _Method:
    def from_pretrained(cls: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        from mlp_fusion.store import states

        given = kwargs.get("state_dict") is not None
        model, info = load(cls, *args, output_loading_info=True, **kwargs)
        states.check_unexpected(model.config, info["unexpected_keys"])
        if given:
            states.check_given_state(model.config)
        return (model, info) if output_loading_info else model

    return from_pretrained


def _reading_folder(load: _Method) -> _Method:
    def load_sharded_checkpoint(model: Any, folder: Any, *args: Any, **kwargs: Any) -> Any:
        from mlp_fusion.store import states

        with states.form_of_folder(folder):
            return load(model, folder, *args, **kwargs)

    return load_sharded_checkpoint


def _resuming(load: _Method) -> _Method:
    def load_from_checkpoint(self: Any, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> Any:
        from mlp_fusion.store import states

        with states.form_of_folder(resume_from_checkpoint):
            return load(self, resume_from_checkpoint, *args, **kwargs)

    return load_from_checkpoint


def _loading_best(load: _Method) -> _Method:
    def load_best_model(self: Any) -> Any:
        from mlp_fusion.store import states

        with states.form_of_folder(self.state.best_model_checkpoint):
            return load(self)

    return load_best_model


def _setting(load: _Method) -> _Method:
    def set_model_state_dict(model: nn.Module, model_state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        from mlp_fusion.store import states

        own = states.as_own(model, model_state_dict)
        with states.state_form("own"):
            return load(model, own, *args, **kwargs)

    return set_model_state_dict


def _setting_one_by_one(load: _Method) -> _Method:
    def load_checkpoint_in_model(model: nn.Module, checkpoint: Any, device_map: Any = None, **kwargs: Any) -> Any:
        from mlp_fusion.store import states

        if device_map is not None and states.has_forms(model):
            raise InputError(
                "the model holds fused FFNs, whose tensors cannot be set one by one: load the checkpoint with "
                "from_pretrained(..., device_map=...), then restore it"
            )
        with states.form_of_folder(checkpoint):
            return load(model, checkpoint, device_map, **kwargs)

    return load_checkpoint_in_model


def _spanning(feed_forward: _Method) -> _Method:
    def feed_forward_chunk(self: Any, attention_output: Tensor) -> Any:
        from mlp_fusion.modules import FusedFFN

        if not isinstance(self.intermediate, FusedFFN):
            return feed_forward(self, attention_output)
        # The sibling's projection is looked up on every call: replicas and wrappers have another one than the model
        # that was fused.
        return self.output(self.intermediate(attention_output, lambda: self.output.dense), attention_output)

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
