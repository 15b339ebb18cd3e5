"""`Architecture`: where a model family keeps its feed-forward layers, in memory and on disk.

An entry is data: paths below a layer, the config keys, the layer class. What is generic (finding the FFNs, reading
them, putting fused ones back) lives here; a family overrides only what it does in a way of its own. Tensor names in a
checkpoint are the module paths, so one set of paths serves both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mlp_fusion.errors import InputError
from mlp_fusion.modules import ScaleHolder
from mlp_fusion.modules.activations import CONFIG_ACTIVATIONS
from mlp_fusion.modules.ffn import FusedFFN, FusedGLU, FusedMLP
from mlp_fusion.modules.layouts import read_bundle, read_projection
from mlp_fusion.neurons import NeuronBundle


@dataclass(frozen=True)
class FFNSite:
    """One FFN in a loaded model.

    Attributes:
        index: the layer's number.
        path: the layer's dotted path in the model (`encoder.layer.4`).
        layer: the layer's module.
    """

    index: int
    path: str
    layer: nn.Module


@dataclass(frozen=True)
class Architecture:
    """One family's FFNs. All paths are dotted and, but for `layers`, relative to the layer.

    Attributes:
        model_types: `config.model_type` values it answers for.
        base: what stands before the names of the base model's tensors in a model with a head.
        layers: path of the list of layers, without the model's prefix (`encoder.layer`).
        module: the FFN module, which `install` replaces.
        projections: role (`w_in`, `w_out`, `w_gate`) -> path of that projection.
        width_key: config key of the FFN's width.
        activation_key: config key of the activation's name.
        layer_class: `module:Class` of what is built once per layer and gets the layer's index.
        layer_class_builds_list: it is built once instead, and makes the list of layers itself.
        dropout: path of the dropout behind the output projection, if the FFN module owns one.
        transposed: weights are stored `(in, out)` (GPT-2's `Conv1D`).
    """

    model_types: tuple[str, ...]
    base: str
    layers: str
    module: str
    projections: Mapping[str, str]
    layer_class: str
    width_key: str = "intermediate_size"
    activation_key: str = "hidden_act"
    dropout: str | None = None
    transposed: bool = False
    layer_class_builds_list: bool = False
    _pattern: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        pattern = re.compile(rf"(?P<layer>(?:.+\.)?{re.escape(self.layers)}\.(?P<index>\d+))\.(?P<rest>.+)")
        object.__setattr__(self, "_pattern", pattern)

    @property
    def gated(self) -> bool:
        return "w_gate" in self.projections

    @property
    def holder(self) -> str:
        """Path of the module that holds a fused FFN's scale."""
        return self.module

    @property
    def owners(self) -> dict[str, str]:
        """Role -> path, each projection once: one that holds gate and up counts as `w_in`."""
        roles = {path: role for role, path in sorted(self.projections.items())}
        return {role: path for role, path in self.projections.items() if roles[path] == role}

    def lengths(self, role: str) -> int:
        """How many times the width the neuron axis of the projection in `role` is long."""
        return list(self.projections.values()).count(self.projections[role])

    # --- config ------------------------------------------------------------------------------------------------------

    def width(self, config: Any) -> int:
        """The FFN width that `config` states, of one layer or of a model with equal layers."""
        return int(getattr(config, self.width_key))

    def activation(self, config: Any) -> str:
        """The activation's name in `fusion_kernels.activations`.

        Raises:
            InputError: the config names one that has no entry there.
        """
        name = getattr(config, self.activation_key)
        if name not in CONFIG_ACTIVATIONS:
            known = ", ".join(sorted(CONFIG_ACTIVATIONS))
            raise InputError(f"{config.model_type}: activation {name!r} is not supported (supported: {known})")
        return CONFIG_ACTIVATIONS[name]

    # --- names -------------------------------------------------------------------------------------------------------

    def locate(self, tensor_name: str) -> tuple[str, int, str] | None:
        """Split a tensor or module name into (layer path, layer index, path below the layer), or None."""
        found = self._pattern.fullmatch(tensor_name)
        return None if found is None else (found["layer"], int(found["index"]), found["rest"])

    def scale_name(self, layer_path: str) -> str:
        """The state_dict key of a fused FFN's scale."""
        return f"{layer_path}.{self.holder}.scale"

    # --- a loaded model ----------------------------------------------------------------------------------------------

    def sites(self, model: nn.Module) -> list[FFNSite]:
        """The model's FFNs, fused ones too, in order of layers."""
        sites = []
        for name, _ in model.named_modules():
            matched = self.locate(name)
            if matched is not None and matched[2] == self.projections["w_in"]:
                path, index, _ = matched
                sites.append(FFNSite(index, path, model.get_submodule(path)))
        return sorted(sites, key=lambda site: site.index)

    def projection(self, site: FFNSite, role: str) -> nn.Module:
        return site.layer.get_submodule(self.projections[role])

    def neurons(self, site: FFNSite) -> int:
        """The width of the FFN at `site`."""
        return read_projection(self.projection(site, "w_in"))[0].shape[0] // self.lengths("w_in")

    def fused(self, site: FFNSite) -> ScaleHolder | None:
        """The module that holds the scale of the FFN at `site`, or None where the model's own FFN stands."""
        try:
            module = site.layer.get_submodule(self.holder)
        except AttributeError as error:
            raise InputError(f"{site.path} has no {self.holder}, where the FFN is said to be") from error
        return module if isinstance(module, ScaleHolder) else None

    def read(self, site: FFNSite, config: Any) -> NeuronBundle:
        """The FFN at `site` as a bundle with B = 1 (views of the weights).

        Raises:
            InputError: a projection is not a plain floating-point layer; the message names it.
        """
        fused = self.fused(site)
        try:
            if isinstance(fused, FusedFFN):
                return fused.as_bundle()
            projections = {role: self.projection(site, role) for role in self.projections}
            return read_bundle(projections, self.activation(config))
        except InputError as error:
            raise InputError(f"{site.path}: {error}") from error

    def install(self, site: FFNSite, bundle: NeuronBundle, parameterization: str) -> ScaleHolder:
        """Put `bundle` in place of the FFN at `site`; device, dtype, training mode and `requires_grad` are kept."""
        names = {role: path.removeprefix(f"{self.module}.") for role, path in self.projections.items()}
        probability = 0.0 if self.dropout is None else float(site.layer.get_submodule(self.dropout).p)  # type: ignore[arg-type]
        cls = FusedGLU if self.gated else FusedMLP
        like = self.projection(site, "w_in")
        fused = cls.from_bundle(bundle, parameterization, names=names, kind=type(like), dropout=probability)
        adopt(fused, {role: (fused.projection(role), self.projection(site, role)) for role in self.projections})
        site.layer.set_submodule(self.module, fused)
        return fused


def adopt(fused: ScaleHolder, pairs: Mapping[str, tuple[nn.Module, nn.Module]]) -> None:
    """Give new projections the device, dtype and `requires_grad` of the ones they replace, and `fused` their mode."""
    for new, old in pairs.values():
        weight, _ = read_projection(old)
        new.to(device=weight.device, dtype=weight.dtype).train(old.training)
        for name, parameter in new.named_parameters():
            parameter.requires_grad_(old.get_parameter(name).requires_grad)
        fused.train(old.training)
        if fused.scale is not None:
            fused.scale = fused.scale.to(weight.device)
