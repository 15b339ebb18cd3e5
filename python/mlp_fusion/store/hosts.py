"""What importing `mlp_fusion` changes in other libraries, each as its module is imported; nothing else is touched.

- `PreTrainedModel.post_init`, with which constructors end: a model whose config holds the record of a fusion, with
  widths that no key of the config states, gets them, before its weights are loaded. Other models are built as ever.
- `PreTrainedModel.save_pretrained`: a model that contains fused FFNs is saved folded, whichever of its modules the call
  is made on. Other models are saved as ever.
- `PreTrainedModel.from_pretrained` and `load_state_dict` of its models: a state in which a fused FFN has a scale, or
  lacks one, without the model being able to tell what it means, is refused (see `store.states`).
- `Trainer`, `load_sharded_checkpoint` and accelerate's `load_checkpoint_in_model` say of the folder that they read
  whether its weights are plain; the last is refused where it would set tensors one by one. torch's
  `set_model_state_dict`, which fills up a state from the model's own before it loads it, asks the same questions first.
- transformers' registry of implementations of experts gets one more, `mlp_fusion`.
- `AutoConfig.from_pretrained` and `for_model` know the model type `minialbert`, whose models are imported with the
  first such config.

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

from torch import nn

from mlp_fusion.errors import InputError

_Method = Callable[..., Any]
_MARK = "_wrapped_by_mlp_fusion"


def adapt(module: ModuleType) -> None:
    """Wrap what `module` of transformers defines; doing it again changes nothing."""
    name = module.__name__
    if name == "transformers.modeling_utils":
        cls = module.PreTrainedModel
        _wrap(cls, "save_pretrained", _saving)
        _wrap(cls, "post_init", _building)
        _wrap(cls, "_load_from_state_dict", _loading)
        _wrap(cls, "from_pretrained", _from_pretrained)
        importlib.import_module("mlp_fusion.modules.experts")  # it registers its implementation
    elif name == "transformers.models.auto.configuration_auto":
        _wrap(module.AutoConfig, "from_pretrained", _choosing)
        _wrap(module.AutoConfig, "for_model", _choosing)
    elif name == "transformers.trainer_utils":
        _wrap(module, "load_sharded_checkpoint", _reading_folder)
    elif name == "transformers.trainer":
        _wrap(module.Trainer, "_load_from_checkpoint", _resuming)
        _wrap(module.Trainer, "_load_best_model", _loading_best)
    elif name == "torch.distributed.checkpoint.state_dict":
        _wrap(module, "set_model_state_dict", _setting)
    elif name == "accelerate.utils.modeling":
        _wrap(module, "load_checkpoint_in_model", _setting_one_by_one)


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
        from mlp_fusion.modules import Scaled
        from mlp_fusion.store.folding import save_folded
        from mlp_fusion.store.record import follow_layers

        if not getattr(self, "_hf_peft_config_loaded", False):
            follow_layers(self)
        if any(isinstance(module, Scaled) for module in self.modules()):
            save_folded(self, save, *args, **kwargs)
        else:
            save(self, *args, **kwargs)

    return save_pretrained


def _building(finish: _Method) -> _Method:
    def post_init(self: Any) -> None:
        from mlp_fusion.store.record import FUSION_KEY, fusion_record, known_architecture
        from mlp_fusion.store.widths import build_narrow

        if getattr(self.config, FUSION_KEY, None) is not None:
            record, architecture = fusion_record(self.config), known_architecture(self.config)
            if record is not None and architecture is not None and record.get("widths"):
                build_narrow(self, architecture, record["widths"])
        finish(self)

    return post_init


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
        states.check_unexpected(model, info["unexpected_keys"])
        if given:
            states.check_given_state(model.config)
        return (model, info) if output_loading_info else model

    return from_pretrained


def _choosing(choose: _Method) -> _Method:
    def chosen(cls: Any, *args: Any, **kwargs: Any) -> Any:
        # Not when transformers is imported: its modules import each other halfway, and ours would be in between.
        importlib.import_module("mlp_fusion.minialbert.configuration")
        return choose(cls, *args, **kwargs)

    return chosen


def _reading_folder(load: _Method) -> _Method:
    def load_sharded_checkpoint(model: Any, folder: Any, *args: Any, **kwargs: Any) -> Any:
        from mlp_fusion.store import states

        with states.form_of_folder(folder):
            return load(model, folder, *args, **kwargs)

    return load_sharded_checkpoint


def _resuming(load: _Method) -> _Method:
    def load_from_checkpoint(self: Any, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> Any:
        from mlp_fusion.store import states

        states.check_resumed(self.model, resume_from_checkpoint)
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
