"""Intrinsic dimension (Aghajanyan, Zettlemoyer and Gupta, arXiv 2012.13255): a few numbers move a whole model.

Every tensor of the model is `W + P theta` (DID) or `W + lambda P theta` (SAID), with one short vector theta for all
tensors, a random projection P for each, and a number lambda for each. theta starts at zero, and so does what is added.
How short theta may be is how many dimensions a task needs: `bench/intrinsic.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_adapters_to_merge,
    check_target_module_exists,
)
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from fusion_kernels import transforms
from mlp_fusion.companions import projected
from mlp_fusion.companions.frame import CompanionConfig, CompanionLayer, CompanionModel, refuse_quantised
from mlp_fusion.companions.ranking import modules_of
from mlp_fusion.companions.registry import CompanionType, register
from mlp_fusion.errors import InputError
from mlp_fusion.modules import Scaled
from mlp_fusion.modules.layouts import obstacle


@dataclass
class SaidConfig(CompanionConfig):
    """Options of intrinsic dimension, for `peft.get_peft_model`.

    Attributes:
        d: numbers that are trained, in all: theta, and the lambdas where there are some.
        structure_aware: a lambda for each tensor (SAID), which starts at 1; else theta alone (DID).
        seed: of the projections. Each tensor has its own, by its name.
        published_gradient: divide the gradient of theta by L in each tensor, the least power of two that is not below
            its size, as the authors' code does. Small tensors then decide where theta goes. By default it is the
            gradient of the loss.
        entries: filled in, in the model's copy: entries of all tensors. Another model is refused.

    Where `target_modules` is None, all tensors are moved but those of modules in `modules_to_save`, which train whole
    and are not counted. A tensor that several modules share is one.

    Source: arXiv 2012.13255; the projections are those of arXiv 1804.08838, by `fusion_kernels.fastfood`.

    Examples:
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForSequenceClassification
        >>> model = AutoModelForSequenceClassification.from_pretrained("roberta-base")
        >>> tuned = get_peft_model(model, mlp_fusion.SaidConfig(d=200, modules_to_save=["classifier"]))
        >>> sum(p.numel() for name, p in tuned.named_parameters() if "said_" in name and p.requires_grad)
        200
    """

    kind: ClassVar[CompanionType] = CompanionType.SAID

    d: int = field(default=10_000, metadata={"help": "numbers to train, in all"})
    structure_aware: bool = field(default=True, metadata={"help": "a factor for each tensor (SAID), or none (DID)"})
    seed: int = field(default=0, metadata={"help": "of the random projections"})
    published_gradient: bool = field(
        default=False, metadata={"help": "weigh the gradients of tensors as the authors' code does"}
    )
    entries: int | None = field(default=None, metadata={"help": "filled in: entries of all tensors"})

    def check(self) -> None:
        if isinstance(self.d, bool) or not isinstance(self.d, int) or self.d < 1:
            raise InputError(f"d is {self.d!r}: give a count of 1 or more")


@dataclass(eq=False)
class Projection:
    """How one adapter moves one parameter.

    Attributes:
        seed: of P.
        holder: the layer that holds theta.
        owner: the layer that holds lambda, and merges; another one than the parameter's where layers share it.
        place: of lambda among the owner's; None where there is none.
        damping: what the gradient of theta is multiplied by.
    """

    seed: int
    holder: SaidLayer
    owner: SaidLayer
    place: int | None
    damping: float


class SaidLayer(CompanionLayer):
    """A module whose parameters are moved."""

    # theta is in one layer of a model.
    adapter_layer_names = ("said_theta", "said_lambda")
    other_param_names = ("projections",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.said_theta, self.said_lambda = nn.ParameterDict(), nn.ParameterDict()
        #: By adapter, by the parameter's name in the base layer.
        self.projections: dict[str, dict[str, Projection]] = {}

    def _get_available_adapters(self) -> set[str]:
        return set(self.projections)

    def terms(self, adapters: list[str], name: str) -> list[projected.Term]:
        """What adapters add to the parameter `name`."""
        parameter, found = getattr(self.base_layer, name), []
        for adapter in adapters:
            p = self.projections[adapter][name]
            theta = p.holder.said_theta[adapter].to(parameter.device)
            scale = None if p.place is None else p.owner.said_lambda[adapter][p.place].to(parameter.device)
            found.append(projected.Term(theta, scale, p.seed, p.damping))
        return found

    def moved(self, adapters: list[str]) -> dict[str, projected.Moved]:
        """By name, the parameters and what adapters add to them."""
        names = dict.fromkeys(name for adapter in adapters for name in self.projections[adapter])
        held = {name: [a for a in adapters if name in self.projections[a]] for name in names}
        return {name: (getattr(self.base_layer, name), self.terms(held[name], name)) for name in names}

    def deltas(self, adapter: str) -> dict[str, Tensor]:
        of = self.moved([adapter])
        return {name: projected.delta(parameter.shape, term) for name, (parameter, [term]) in of.items()}

    def changed(self, adapters: list[str]) -> dict[str, Tensor]:
        """Parameters with what is added; of those that layers share, in their owner alone: this is what is merged."""
        return {name: projected.changed(*of) for name, of in self.moved(adapters).items() if self._owns(name)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapters = self.working()
        if not adapters:
            return self.base_layer(*args, **kwargs)
        moved = self.moved(adapters)
        if transforms.active() or torch.compiler.is_compiling():
            made = {name: p + sum(projected.delta(p.shape, t) for t in terms) for name, (p, terms) in moved.items()}
            made = {name: value.to(moved[name][0].dtype) for name, value in made.items()}
            return functional_call(self.base_layer, made, args, kwargs, tie_weights=False)
        base = self.base_layer
        if "weight" in moved and len(args) == 1 and not kwargs and obstacle(base) is None:
            bias = projected.changed(*moved["bias"]) if "bias" in moved else base.bias
            return projected.linear(args[0], moved["weight"], bias, type(base) is Conv1D)  # type: ignore[arg-type]
        return projected.call(base, moved, args, kwargs)

    def _read(self, name: str) -> Any:
        """A parameter as others read it who do not call the module: with what is added."""
        adapters = [a for a in self.working() if name in self.projections[a]]
        if not adapters:
            return getattr(self.base_layer, name)
        return projected.changed(getattr(self.base_layer, name), self.terms(adapters, name))

    @property
    def weight(self) -> Any:
        return self._read("weight")

    @property
    def bias(self) -> Any:
        return self._read("bias")

    def unmerge(self) -> None:
        """Undo every merge, of shared parameters as well."""
        owners = {p.owner for of in self.projections.values() for p in of.values()}
        super().unmerge()
        for owner in owners - {self}:
            CompanionLayer.unmerge(owner)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module within, moved or as it was, and all modules in it; peft calls this."""
        for name, module in self.base_layer.named_children():
            _unload(module, merge, safe_merge, adapter_names, self.base_layer, name)
        if merge:
            self._leave(check_adapters_to_merge(self, adapter_names) or [], safe_merge)
        else:
            self.unmerge()
        return self.base_layer

    @torch.no_grad()
    def _leave(self, adapters: list[str], safe: bool) -> None:
        """Merge, and keep nothing of what was there: the model is in memory once."""
        adapters = [adapter for adapter in adapters if adapter in self.projections]
        for adapter in adapters if safe else []:
            of = self.projections[adapter].values()
            held = [h[adapter] for p in of for h in (p.holder.said_theta, p.owner.said_lambda) if adapter in h]
            if not all(bool(torch.isfinite(tensor).all()) for tensor in held):
                raise InputError(f"merging {adapter} would make weights infinite or NaN: the adapter is broken")
        for name, (parameter, terms) in self.moved(adapters).items():
            if self._owns(name):
                parameter.data = projected.changed(parameter, terms)

    def _owns(self, name: str) -> bool:
        """Whether the parameter is merged here, or by another layer that shares it."""
        return any(of[name].owner is self for of in self.projections.values() if name in of)


def _unload(module: nn.Module, merge: bool, safe: bool, names: list[str] | None, parent: nn.Module, name: str) -> None:
    """Take off every layer in `module`, which its parent knows as `name`."""
    if isinstance(module, SaidLayer):
        setattr(parent, name, module.unload_and_optionally_merge_module(merge, safe, names))
        return
    for inner, child in module.named_children():
        _unload(child, merge, safe, names, module, inner)


@dataclass(frozen=True)
class _Tensor:
    """A parameter that is moved: its module and name, and those under which it is known where modules share it."""

    module: str
    own: str
    tensor: Tensor
    first: tuple[str, str]


class SaidModel(CompanionModel):
    """A model all of whose tensors are moved by one vector."""

    prefix = "said_"
    tuner_layer_cls = SaidLayer

    def _prepare_model(self, peft_config: SaidConfig, model: nn.Module) -> None:
        refuse_quantised(model)
        _maybe_include_all_linear_layers(peft_config, model)
        found = _tensors(model, peft_config)
        own = [t for t in found if t.first == (t.module, t.own)]
        entries = sum(t.tensor.numel() for t in own)
        if peft_config.entries not in (None, entries):
            raise InputError(
                f"the projections are of tensors with {peft_config.entries:,} entries, these have {entries:,}: load "
                "the base that they were trained on"
            )
        _check_d(peft_config, len(own), entries)
        peft_config.entries = entries
        self._found: dict[str, list[_Tensor]] = {}
        for tensor in found:
            self._found.setdefault(tensor.module, []).append(tensor)
        self._layers: dict[str, SaidLayer] = {}
        self._theta = peft_config.d - (len(own) if peft_config.structure_aware else 0)
        wide = [torch.promote_types(t.tensor.dtype, torch.float32) for t in own]
        self._dtype = torch.float64 if torch.float64 in wide else torch.float32

    def _check_target_module_exists(self, peft_config: SaidConfig, key: str) -> bool:  # type: ignore[override]
        return key in self._found

    def _create_and_replace(
        self, peft_config: Any, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
        current_key: str, parameter_name: str | None = None,
    ) -> None:  # fmt: skip
        if isinstance(parent, BaseTunerLayer):  # a module with parameters and modules of its own
            parent = parent.get_base_layer()
        super()._create_and_replace(peft_config, adapter_name, target, target_name, parent, current_key)

    def add(self, layer: SaidLayer, config: SaidConfig, adapter: str, name: str) -> None:
        self._layers[name] = layer
        tensors = self._found[name]
        device = tensors[0].tensor.device
        if len(self._layers) == 1:
            layer.said_theta[adapter] = nn.Parameter(torch.zeros(self._theta, dtype=self._dtype, device=device))
        holder = next(iter(self._layers.values()))
        layer.projections[adapter] = {}
        own = 0
        for t in tensors:
            first, known = t.first
            shared = t.first != (name, t.own)
            if shared:
                layer.projections[adapter][t.own] = self._layers[first].projections[adapter][known]
                continue
            L = 1 << (t.tensor.numel() - 1).bit_length()
            layer.projections[adapter][t.own] = Projection(
                seed_of(config.seed, f"{name}.{t.own}"),
                holder,
                layer,
                own if config.structure_aware else None,
                1 / L if config.published_gradient else 1.0,
            )
            own += 1
        if config.structure_aware and own:
            layer.said_lambda[adapter] = nn.Parameter(torch.ones(own, dtype=self._dtype, device=device))


def seed_of(seed: int, name: str) -> int:
    """The seed of a tensor's projection, by its name: it does not depend on which other tensors are moved."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big") >> 1


def _tensors(model: nn.Module, config: SaidConfig) -> list[_Tensor]:
    """What is moved, in the order of the model's modules."""
    # peft's own match needs targets, and knows modules that are excluded or train whole.
    asked = dataclasses.replace(config, target_modules=".*") if config.target_modules is None else config
    found: list[_Tensor] = []
    first: dict[int, tuple[str, str]] = {}
    for name, module in modules_of(model):
        own = list(module.named_parameters(recurse=False))
        if not name:
            if own and config.target_modules is None:
                raise InputError(f"{own[0][0]} belongs to the model itself, not to a module in it: name target_modules")
            continue
        if not own or not check_target_module_exists(asked, name):
            continue
        for called, parameter in own:
            if isinstance(module, Scaled) and called == "scale":
                continue  # it belongs to the fusion, and has a form of its own on disk
            if parameter.is_meta:
                raise InputError(f"{name}.{called} is on the meta device (offloaded): load the model into memory first")
            if parameter.numel():
                at = first.setdefault(id(parameter), (name, called))
                found.append(_Tensor(name, called, parameter, at))
    if not found:
        raise InputError("none of the modules has parameters to move: see target_modules and modules_to_save")
    return found


def _check_d(config: SaidConfig, tensors: int, entries: int) -> None:
    """Raise InputError unless d leaves something to train, and less than there is."""
    if config.structure_aware and config.d <= tensors:
        raise InputError(
            f"d is {config.d:,}, and each of {tensors:,} tensors takes one for its lambda: raise it above that, or use "
            "structure_aware=False"
        )
    if config.d > entries:
        raise InputError(f"d is {config.d:,}, the tensors have {entries:,} entries: lower it, or train them themselves")


register(SaidConfig, SaidModel)
