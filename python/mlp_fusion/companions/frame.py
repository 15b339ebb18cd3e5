"""What companions share as methods of peft: a config, a layer around a module, a model.

A companion changes parameters and not the computation: a module runs with `W + delta(theta)` in place of its parameter
W, where theta are the companion's own. Here are the forward pass, merging and its exact reverse for any module that
owns parameters; a method says which modules and parameters it takes, and what delta is.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.func import functional_call

from mlp_fusion.companions.registry import CompanionType
from mlp_fusion.errors import InputError

_TARGETS = "modules to work in, by the ends of their names or a regular expression; by default the method's own choice"


@dataclass
class CompanionConfig(PeftConfig):
    """Options that every companion has; a method adds its own. A model has a copy, in which its own is filled in.

    Attributes:
        target_modules: modules to work in: ends of names, one regular expression, or None for the method's own choice.
        exclude_modules: modules to leave out, likewise.
        modules_to_save: modules that train whole and are stored beside the companion, such as new heads.
    """

    kind: ClassVar[CompanionType]

    target_modules: list[str] | str | None = field(default=None, metadata={"help": _TARGETS})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "modules to leave out, likewise"})
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "modules that train whole and are stored beside the companion, such as new heads"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.kind
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, (list, tuple)) else value)
        self.check()

    def to_dict(self) -> dict[str, Any]:
        """Options as JSON takes them, sets as sorted lists: the same options make the same file."""
        return {name: sorted(v) if isinstance(v, set) else v for name, v in super().to_dict().items()}

    def check(self) -> None:
        """Raise InputError for an option that cannot be; a method checks its own."""


class CompanionLayer(nn.Module, BaseTunerLayer):
    """A module, and what one or more adapters add to its own parameters.

    A method gives `adapter_layer_names` (dictionaries that hold its parameters by adapter, registered as modules), and
    :meth:`deltas`. Attributes that it does not have are those of the module within.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._before_merge: dict[str, Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    @abstractmethod
    def deltas(self, adapter: str) -> dict[str, Tensor]:
        """What `adapter` adds to parameters of the base layer, by their names there, each of the parameter's shape."""

    def working(self) -> list[str]:
        """Adapters that change this pass: active, held by this layer, and not merged."""
        if self.disable_adapters or self.merged:
            return []
        held = self._get_available_adapters()
        return [adapter for adapter in self.active_adapters if adapter in held]

    def changed(self, adapters: list[str]) -> dict[str, Tensor]:
        """Parameters of the base layer with the adapters' deltas added, in the parameters' dtypes."""
        found: dict[str, Tensor] = {}
        for adapter in adapters:
            for name, delta in self.deltas(adapter).items():
                before = found.get(name, self.base_layer.get_parameter(name))
                # In the wider of the two dtypes: a sum in bfloat16 would lose deltas that are small beside the weight.
                found[name] = before + delta
        return {name: value.to(self.base_layer.get_parameter(name).dtype) for name, value in found.items()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapters = self.working()
        if not adapters:
            return self.base_layer(*args, **kwargs)
        return functional_call(self.base_layer, self.changed(adapters), args, kwargs)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the deltas to the parameters; `unmerge` brings back their very bits.

        Raises:
            InputError: with `safe_merge`, a merged parameter would not be finite; nothing is changed.
        """
        adapters = check_adapters_to_merge(self, adapter_names) or []
        held = self._get_available_adapters()
        adapters = [adapter for adapter in adapters if adapter in held]
        merged = self.changed(adapters)
        for name, value in merged.items():
            if safe_merge and not bool(torch.isfinite(value).all()):
                raise InputError(
                    f"merging {', '.join(adapters)} would make {name} infinite or NaN: the adapter is broken"
                )
        for name, value in merged.items():
            parameter = self.base_layer.get_parameter(name)
            self._before_merge.setdefault(name, parameter.data)
            parameter.data = value
        self.merged_adapters.extend(adapters)

    def unmerge(self) -> None:
        """Undo every merge."""
        for name, value in self._before_merge.items():
            self.base_layer.get_parameter(name).data = value
        self._before_merge.clear()
        self.merged_adapters.clear()


class CompanionModel(BaseTuner):
    """A model some of whose modules are in `tuner_layer_cls`.

    A method gives `prefix`, `tuner_layer_cls`, :meth:`targets` and :meth:`add`.
    """

    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def targets(self, model: nn.Module, config: Any) -> list[str]:
        """Names of the modules to work in where the config names none.

        Raises:
            InputError: the method has no choice of its own.
        """
        raise InputError(f"{type(self).__name__} works where it is told to: name modules with target_modules")

    @abstractmethod
    def add(self, layer: Any, config: Any, adapter: str, name: str) -> None:
        """Give `layer`, around the module called `name`, what `adapter` has of its own."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As peft's own; the config is copied: what is filled in is this model's, and the caller may use it again."""
        self.peft_config[adapter_name] = copy.deepcopy(self.peft_config[adapter_name])
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        refuse_quantised(model)
        if peft_config.target_modules is None:
            peft_config.target_modules = set(self.targets(model, peft_config))

    def _create_and_replace(
        self, peft_config: Any, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
        current_key: str, parameter_name: str | None = None,
    ) -> None:  # fmt: skip
        layer = target
        if not isinstance(target, self.tuner_layer_cls):
            if isinstance(target, BaseTunerLayer):
                raise InputError(f"{current_key} holds an adapter of another method: merge or unload that one first")
            layer = self.tuner_layer_cls(target)  # type: ignore[call-arg]
        self.add(layer, peft_config, adapter_name, current_key)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)  # type: ignore[operator]

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put a module in another's place; peft's own expects every module to have a `weight`."""
        setattr(parent, child_name, new_module)


def refuse_quantised(model: nn.Module) -> None:
    """Raise InputError where weights of `model` are not floating-point numbers that a delta can be added to."""
    for name, parameter in _own_parameters(model):
        if not parameter.dtype.is_floating_point or parameter.dtype.itemsize < 2:
            raise InputError(
                f"{name} is quantised ({parameter.dtype}): companions change weights, load them in 16 or 32 bits"
            )


def refuse_another_base(stored: Iterable[str], shapes: Mapping[str, Any] | None, here: Mapping[str, Any]) -> None:
    """Raise InputError where a stored adapter does not fit the model that it is loaded onto.

    Args:
        stored: modules that it works in.
        shapes: of their parameters where it was trained; None where the adapter was stored before these were.
        here: module -> the same of this model.
    """
    for name in stored:
        if name not in here:
            cause = f"the stored adapter works in {name}, which this model does not have"
        elif shapes is not None and shapes.get(name) != here[name]:
            cause = f"the stored adapter's {name} is {shapes.get(name)}, this model's is {here[name]}"
        else:
            continue
        raise InputError(f"{cause}: load the base that it was trained on")


def _own_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and the buffers that quantisers keep weights in."""
    yield from model.named_parameters()
    for name, buffer in model.named_buffers():
        if name.endswith((".qweight", ".weight_packed")):
            yield name, buffer
