"""Entries that nobody wrote: an `Architecture` made from what discovery has found and proved in a config.

So far of text models with one stack of layers, each with one FFN. One that is a module of its own, with projections of
their own, is replaced. One that lies in the layer, or that holds gate and up in one projection, is narrowed in place.
Other shapes are found as well, and refused here with the reason.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from fusion_kernels.activations import ACTIVATIONS, get_activation
from mlp_fusion.errors import InputError
from mlp_fusion.families.base import Architecture, FFNSite, adopt
from mlp_fusion.families.sites import Description, Site
from mlp_fusion.modules import ScaledActivation, ScaleHolder
from mlp_fusion.modules.layouts import make_projection, read_bundle
from mlp_fusion.neurons import NeuronBundle

#: What an entry is kept as in a checkpoint's record: texts, and tables from roles to texts.
_KEPT = ("base", "layers", "module", "width_key", "function", "activation_path")
_TABLES = ("projections", "parts")


@dataclass(frozen=True)
class DiscoveredArchitecture(Architecture):
    """An entry for one model type, made from a description or from a checkpoint's record.

    Attributes:
        function: the activation's name in `fusion_kernels.activations`, as proved; the config is not asked.
        found_width: neurons that were found, where the config leaves the width out.
        parts: role -> which part of its projection's outputs it is: `whole`, `first` or `second` half.
        activation_path: the module that is the FFN's activation, of one that is narrowed in place; else empty. The
            projections are then exchanged under their names, and the activation is wrapped in a `ScaledActivation`.
    """

    function: str = ""
    found_width: int = 0
    parts: Mapping[str, str] = field(default_factory=dict)
    activation_path: str = ""

    @property
    def holder(self) -> str:
        return self.activation_path or self.module

    def width(self, config: Any) -> int:
        stated = getattr(config, self.width_key, None)
        return self.found_width if stated is None else int(stated)

    def activation(self, config: Any) -> str:
        return self.function

    def read(self, site: FFNSite, config: Any) -> NeuronBundle:
        fused = self.fused(site)
        if not self.activation_path:
            bundle = super().read(site, config)
            if fused is None:
                _refuse_dropout(site.path, site.layer.get_submodule(self.module), bundle.w_in)
            return bundle
        scale, exponent = (None, 0.0) if fused is None else (fused.scale, fused.scale_exponent)
        try:
            projections = {role: self.projection(site, role) for role in self.projections}
            bundle = read_bundle(projections, self.function, scale, exponent, self.parts)
        except InputError as error:
            raise InputError(f"{site.path}: {error}") from error
        if fused is None:
            self._check_activation(site, bundle.w_in)
        return bundle

    def install(self, site: FFNSite, bundle: NeuronBundle, parameterization: str) -> ScaleHolder:
        if not self.activation_path:
            return super().install(site, bundle, parameterization)
        b = bundle.parameterized(parameterization)
        activation: Any = site.layer.get_submodule(self.activation_path)
        training = activation.training
        if isinstance(activation, ScaledActivation):
            activation = activation.activation
        scale = None if b.scale is None else b.scale[0].clone()
        scaled = ScaledActivation(activation, scale, parameterization, gated=self.gated)
        exchanged = {}
        for path in self.owners.values():
            old = site.layer.get_submodule(path)
            exchanged[path] = make_projection(*self._joined(b, path), type(old)), old
        adopt(scaled, exchanged)
        for path, (new, _) in exchanged.items():
            site.layer.set_submodule(path, new)
        site.layer.set_submodule(self.activation_path, scaled.train(training))
        return scaled

    def _joined(self, bundle: NeuronBundle, path: str) -> tuple[Tensor, Tensor | None]:
        """The `(out, in)` weight and the bias of the projection at `path`, of the roles that it holds."""
        roles = sorted((role for role, p in self.projections.items() if p == path), key=lambda role: self.parts[role])
        weights = [getattr(bundle, role)[0] for role in roles]
        biases = [b[0] for role in roles if (b := getattr(bundle, role.replace("w_", "b_"))) is not None]
        weight = weights[0].t() if roles == ["w_out"] else torch.cat(weights)
        return weight, torch.cat(biases) if biases else None

    @torch.no_grad()
    def _check_activation(self, site: FFNSite, like: Tensor) -> None:
        """Raise InputError unless what is to be wrapped computes the function, in the model at hand."""
        module = site.layer.get_submodule(self.activation_path)
        z = torch.linspace(-8.0, 8.0, 65, device=like.device)
        try:
            fits = not module.state_dict() and torch.allclose(
                module(z), get_activation(self.function).function(z), rtol=1e-4, atol=1e-5
            )
        except Exception as error:  # whatever a module of another kind makes of numbers
            raise self._no_activation(site, module) from error
        if not fits:
            raise self._no_activation(site, module)

    def _no_activation(self, site: FFNSite, module: nn.Module) -> InputError:
        return InputError(
            f"{site.path}.{self.activation_path}, a {type(module).__name__}, does not compute {self.function}, which "
            f"the FFN's activation does: its code is not that of {self.model_types[0]!r} models"
        )

    def below(self, activation: str) -> DiscoveredArchitecture:
        """The entry with paths relative to the layer, of one whose paths are relative to the FFN's module.

        Args:
            activation: path of the activation's module, where the FFN is narrowed in place; else empty.
        """
        inside = f"{self.module}." if self.module else ""
        projections = {role: f"{inside}{path}" for role, path in self.projections.items()}
        path = f"{inside}{activation}" if activation else ""
        return dataclasses.replace(self, projections=projections, activation_path=path)

    def kept(self) -> dict[str, Any]:
        """The entry in plain JSON types, for a checkpoint's record."""
        return {name: getattr(self, name) for name in _KEPT} | {name: dict(getattr(self, name)) for name in _TABLES}

    @staticmethod
    def of_record(model_type: str, kept: Any) -> DiscoveredArchitecture:
        """The inverse of :meth:`kept`.

        Raises:
            InputError: `kept` is something else.
        """
        if not _is_sound(kept):
            raise InputError(
                "the record of the fusion in config.json does not say where the FFNs are: fuse the original again"
            )
        fields: dict[str, Any] = {name: kept[name] for name in _KEPT} | {name: dict(kept[name]) for name in _TABLES}
        return DiscoveredArchitecture((model_type,), layer_class="", **fields)


def _is_sound(kept: Any) -> bool:
    """Whether `kept` is what :meth:`DiscoveredArchitecture.kept` returns."""
    if not isinstance(kept, Mapping) or not all(isinstance(kept.get(name), str) for name in _KEPT):
        return False
    tables: list[Any] = [kept.get(name) for name in _TABLES]
    for table in tables:
        roles = set(table) if isinstance(table, Mapping) else set()
        if roles not in ({"w_in", "w_out"}, {"w_in", "w_out", "w_gate"}):
            return False
        if not all(isinstance(text, str) for text in table.values()):
            return False
    paths, parts = tables
    if set(paths) != set(parts) or kept["function"] not in ACTIVATIONS:
        return False
    # Where a projection is held by two roles, they are its halves; every other one is one role's own.
    held = {path: sorted(part for role, part in parts.items() if paths[role] == path) for path in paths.values()}
    halved = any(parts[role] != "whole" for role in parts)
    return (
        all(found in (["whole"], ["first", "second"]) for found in held.values())
        and parts["w_out"] == "whole"
        and bool(kept["activation_path"] or (kept["module"] and not halved))
    )


def discovered(config: Any) -> DiscoveredArchitecture:
    """The entry for the model that `config` describes; found and proved once per config.

    Raises:
        InputError: no FFN is found, one is not proved, or they have a shape that is not served yet.
    """
    plain = {name: value for name, value in config.to_dict().items() if name not in ("_name_or_path", "dtype")}
    config_class: Any = type(config)
    return _discovered(config_class, json.dumps(plain, sort_keys=True, default=str))


@functools.lru_cache(maxsize=16)
def _discovered(config_class: type[PreTrainedConfig], content: str) -> DiscoveredArchitecture:
    # Here, because it imports all of transformers' models by name: plans of known families do without.
    from mlp_fusion.families.describe import describe
    from mlp_fusion.families.narrowing import find_activation

    config = config_class.from_dict(json.loads(content))
    description = describe(config)
    site = _only(config, description)
    for reason in _unserved(config, site):
        raise _unsupported(config, f"the FFNs at {site.path} {reason}")
    layers, _, module = site.path.partition(".#")
    prefix = f"{_prefix(description)}."
    entry = DiscoveredArchitecture(
        model_types=(config.model_type,),
        base=prefix[:-1],
        layers=layers.removeprefix(prefix),
        module=module.removeprefix("."),
        projections={p.role: p.parameter.removesuffix(".weight") for p in site.projections},
        layer_class="",
        width_key=site.width_keys[0].path,
        function=str(site.function.activation),
        found_width=site.width,
        parts={p.role: p.part for p in site.projections},
    )
    inside = ""
    if not site.own_module or any(p.part != "whole" for p in site.projections):
        try:
            inside = find_activation(config, site, entry)
        except InputError as error:
            raise _unsupported(config, f"the FFNs at {site.path} {error}") from error
    return entry.below(inside)


def _prefix(description: Description) -> str:
    """What stands before names of the base model in a model with a head."""
    import transformers

    cls: Any = getattr(transformers, description.model_class, None)
    return str(getattr(cls, "base_model_prefix", "") or "model")


def _only(config: Any, description: Description) -> Site:
    """The one kind of FFN of a model that has one kind, with nothing left over."""
    if description.refused:
        first = description.refused[0]
        raise _unsupported(config, f"{first.parameter} belongs to no FFN that could be proved ({first.reason})")
    if not description.sites:
        raise _unsupported(config, "no FFN was found in it")
    if len(description.sites) > 1:
        paths = ", ".join(site.path for site in description.sites)
        raise _unsupported(config, f"its FFNs are of {len(description.sites)} kinds ({paths})")
    return description.sites[0]


def _unserved(config: Any, site: Site) -> list[str]:
    """Why FFNs that were found and proved cannot be fused yet."""
    f, keys = site.function, site.width_keys
    layers = getattr(config, "num_hidden_layers", None)
    said = {
        "have no width that the config can state": site.unsaved is not None or not keys,
        "are experts": site.kind != "dense",
        "share their weights": bool(site.shared),
        "do not lie in one stack of layers": site.path.count("#") != 1 or ".#" not in site.path,
        "are not one in each layer": [index for _, index in site.instances] != list(range(layers or 0)),
        "hold gate and up in one projection, in turns": any(p.part in ("even", "odd") for p in site.projections),
        "have projections of another kind": not all(p.parameter.endswith(".weight") for p in site.projections),
        "have transposed projections": any(p.neuron_axis != int(p.role == "w_out") for p in site.projections),
        "compute a function without a kernel": f.activation not in ACTIVATIONS
        or f.clamp is not None
        or f.up_offset != 0.0
        or f.factor != 1.0,
        "have their width in a nested config or as a ratio": bool(keys)
        and ("." in keys[0].path or keys[0].kind not in ("int", "unset")),
        "belong to a model that reads no tokens": not isinstance(getattr(config, "vocab_size", None), int),
    }
    return [reason for reason, true in said.items() if true]


def _unsupported(config: Any, reason: str) -> InputError:
    return InputError(
        f"{config.model_type}: {reason}, which is not supported: `mlp-fusion families {config.model_type}` shows all"
    )


@torch.no_grad()
def _refuse_dropout(path: str, module: nn.Module, like: torch.Tensor) -> None:
    """Raise InputError where the FFN drops something in training: the module that replaces it would not.

    Whatever the dropout is written as, outputs in training mode tell.
    """
    modes = {part: part.training for part in module.modules()}
    x = torch.randn(16, like.shape[-1], generator=torch.Generator().manual_seed(0)).to(like)
    devices = [like.device] if like.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            outputs = [module.train(training)(x[None]) for training in (False, True)]
    finally:
        for part, training in modes.items():
            part.training = training
    if not torch.allclose(outputs[0], outputs[1], rtol=1e-2, atol=1e-5):
        raise InputError(f"{path}: this FFN has a dropout inside, which is not supported: set its probability to 0")
