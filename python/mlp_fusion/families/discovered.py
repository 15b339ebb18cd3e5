"""Entries that nobody wrote: an `Architecture` made from what discovery has found and proved in a config.

So far of one shape: text models with one stack of layers, in which every FFN is a module of its own, with projections
of their own. Other shapes are found as well, and refused here with the reason.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from fusion_kernels.activations import ACTIVATIONS
from mlp_fusion.errors import InputError
from mlp_fusion.families.base import Architecture, FFNSite
from mlp_fusion.families.sites import Description, Site
from mlp_fusion.neurons import NeuronBundle

#: What an entry is kept as in a checkpoint's record; all texts, and `projections` a table of texts.
_KEPT = ("base", "layers", "module", "width_key", "function")


@dataclass(frozen=True)
class DiscoveredArchitecture(Architecture):
    """An entry for one model type, made from a description or from a checkpoint's record.

    Attributes:
        function: the activation's name in `fusion_kernels.activations`, as proved; the config is not asked.
        found_width: neurons that were found, where the config leaves the width out.
    """

    function: str = ""
    found_width: int = 0

    def width(self, config: Any) -> int:
        stated = getattr(config, self.width_key, None)
        return self.found_width if stated is None else int(stated)

    def activation(self, config: Any) -> str:
        return self.function

    def read(self, site: FFNSite, config: Any) -> NeuronBundle:
        bundle = super().read(site, config)
        if self.fused(site) is None:
            _refuse_dropout(site.path, site.layer.get_submodule(self.module), bundle.w_in)
        return bundle

    def kept(self) -> dict[str, Any]:
        """The entry in plain JSON types, for a checkpoint's record."""
        return {**{name: getattr(self, name) for name in _KEPT}, "projections": dict(self.projections)}

    @staticmethod
    def of_record(model_type: str, kept: Any) -> DiscoveredArchitecture:
        """The inverse of :meth:`kept`.

        Raises:
            InputError: `kept` is something else.
        """
        texts = isinstance(kept, Mapping) and all(isinstance(kept.get(name), str) for name in _KEPT)
        projections = kept.get("projections") if texts else None
        roles = ({"w_in", "w_out"}, {"w_in", "w_out", "w_gate"})
        if (
            not isinstance(projections, Mapping)
            or set(projections) not in roles
            or not all(isinstance(path, str) for path in projections.values())
            or kept["function"] not in ACTIVATIONS
        ):
            raise InputError(
                "the record of the fusion in config.json does not say where the FFNs are: fuse the original again"
            )
        return DiscoveredArchitecture(
            (model_type,), **{name: kept[name] for name in _KEPT}, projections=dict(projections), layer_class=""
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

    config = config_class.from_dict(json.loads(content))
    description = describe(config)
    site = _only(config, description)
    for reason in _unserved(config, site):
        raise _unsupported(config, f"the FFNs at {site.path} {reason}")
    layers, module = site.path.split(".#.")
    prefix = f"{_prefix(description)}."
    return DiscoveredArchitecture(
        model_types=(config.model_type,),
        base=prefix[:-1],
        layers=layers.removeprefix(prefix),
        module=module,
        projections={p.role: f"{module}.{p.parameter.removesuffix('.weight')}" for p in site.projections},
        layer_class="",
        width_key=site.width_keys[0].path,
        function=str(site.function.activation),
        found_width=site.width,
    )


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
        "lie in a layer, without a module of their own": not site.own_module,
        "do not lie in one stack of layers": site.path.count(".#.") != 1 or site.path.count("#") != 1,
        "are not one in each layer": [index for _, index in site.instances] != list(range(layers or 0)),
        "hold gate and up in one projection": any(p.part != "whole" for p in site.projections),
        "have projections of another kind": not all(p.parameter.endswith(".weight") for p in site.projections),
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
