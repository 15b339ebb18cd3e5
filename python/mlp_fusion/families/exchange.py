"""Narrower FFNs put in the place of a model's own, in the form that each kind calls for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mlp_fusion.errors import InputError
from mlp_fusion.families.base import FFNSite
from mlp_fusion.modules import Scaled, ScaledActivation, ScaledWeights
from mlp_fusion.modules.ffn import FusedFFN, FusedGLU, FusedMLP
from mlp_fusion.modules.stored import tensors_of
from mlp_fusion.neurons import NeuronBundle


@torch.no_grad()
def install(site: FFNSite, bundle: NeuronBundle, parameterization: str) -> Scaled:
    """Put `bundle` in place of the FFN at `site`; device, dtype, training mode and `requires_grad` are kept.

    Args:
        site: a dense FFN, or a whole stack of experts.
        bundle: what it is to compute, with B = 1 or the number of experts.
        parameterization: `scaled`, `split` or `folded`.

    Raises:
        InputError: the form in which this kind can hold a scale is not that of the parameterization.
    """
    forms: dict[str, Callable[[FFNSite, NeuronBundle, str], Scaled]] = {
        "module": _module, "experts": _experts, "activation": _activation, "projection": _projection,
        "weights": _weights,
    }  # fmt: skip
    b = bundle.parameterized(parameterization)
    if b.scale is not None:
        check_form(site, parameterization)
    return forms[site.kind.form](site, b, parameterization)


def check_form(site: FFNSite, parameterization: str) -> None:
    """Raise InputError where the form in which the FFN at `site` can hold a scale is not that of `parameterization`."""
    if parameterization != "split":
        return
    kind = site.kind
    limited = kind.gated and (kind.function.activation is None or not kind.gating.plain)
    if kind.form == "activation" and limited:
        raise InputError(
            f"{site.path}: this FFN limits or shifts its up projection: it has no form for SGD-like optimisers: "
            "use optimizer='adamw' or none"
        )
    if kind.form == "projection":
        raise InputError(
            f"{site.path}: this FFN's activation is a function that no module holds, so that it has no form for "
            "SGD-like optimisers: use optimizer='adamw' or none"
        )


def _module(site: FFNSite, bundle: NeuronBundle, parameterization: str) -> FusedFFN:
    """A module of this package instead of the model's own."""
    kind = site.kind
    names = {p.role: p.parameter.removesuffix(".weight") for p in kind.projections}
    old = {role: site.below(name) for role, name in names.items()}
    probability = float(site.below(kind.dropout).p) if kind.dropout else 0.0  # type: ignore[arg-type]
    cls = FusedGLU if kind.gated else FusedMLP
    fused = cls.from_bundle(bundle, parameterization, names=names, kind=type(old["w_in"]), dropout=probability)
    for role, module in old.items():
        new = fused.projection(role)
        weight = module.get_parameter("weight")
        new.to(device=weight.device, dtype=weight.dtype).train(module.training)
        for name, parameter in new.named_parameters():
            parameter.requires_grad_(module.get_parameter(name).requires_grad)
    _move_scale(fused, old["w_in"].weight)  # type: ignore[arg-type]
    fused.train(site.module.training)
    site.root.set_submodule(site.path, fused)
    return fused


def _experts(site: FFNSite, bundle: NeuronBundle, parameterization: str) -> Scaled:
    """The module of this package for stacks of experts instead of the model's own."""
    from mlp_fusion.modules import FusedExperts  # imports transformers' experts, which plans do without

    old = site.module
    like = old.get_parameter(site.kind.projection("w_in").parameter)
    fused = FusedExperts(bundle, parameterization).to(device=like.device, dtype=like.dtype)
    for name in site.kind.parameters:
        fused.get_parameter(name).requires_grad_(old.get_parameter(name).requires_grad)
    _move_scale(fused, like)
    site.root.set_submodule(site.path, fused.train(old.training))
    return fused


def _activation(site: FFNSite, bundle: NeuronBundle, parameterization: str) -> ScaledActivation:
    """The activation wrapped, everything else narrowed where it is."""
    narrow(site, bundle)
    activation: Any = site.below(site.kind.activation)
    scale = None if bundle.scale is None else bundle.scale[0].clone()
    scaled = ScaledActivation(activation, scale, parameterization, gated=bundle.gated)
    _move_scale(scaled, site.below(_owner(site)).weight)  # type: ignore[arg-type]
    site.module.set_submodule(site.kind.activation, scaled.train(activation.training))
    return scaled


def _projection(site: FFNSite, bundle: NeuronBundle, parameterization: str) -> ScaledWeights:
    """The output projection wrapped, everything else narrowed where it is."""
    narrow(site, bundle)
    path = site.kind.holder
    last = site.kind.projection("w_out")
    bias = None if last.bias is None else last.bias.rpartition(".")[2]
    own = dataclasses.replace(last, parameter=last.parameter.rpartition(".")[2], bias=bias)
    old = site.below(path)
    scaled = ScaledWeights(
        old, [own], None if bundle.scale is None else bundle.scale[0].clone(), parameterization, gated=bundle.gated
    )
    _move_scale(scaled, scaled.weight)  # type: ignore[arg-type]
    site.module.set_submodule(path, scaled)
    return scaled


def _weights(site: FFNSite, bundle: NeuronBundle, parameterization: str) -> ScaledWeights:
    """The module that holds a stack of experts wrapped."""
    narrow(site, bundle)
    scale = None if bundle.scale is None else bundle.scale.clone()
    scaled = ScaledWeights(site.module, site.kind.projections, scale, parameterization, gated=bundle.gated)
    _move_scale(scaled, scaled.get_parameter(site.kind.projection("w_in").parameter))
    site.root.set_submodule(site.path, scaled)
    return scaled


def _move_scale(fused: Scaled, like: Tensor) -> None:
    """Put the scale where the weights are."""
    if fused.scale is not None:
        fused.scale = fused.scale.to(like.device)


def _owner(site: FFNSite) -> str:
    return site.kind.projection("w_in").parameter.rpartition(".")[0]


@torch.no_grad()
def narrow(site: FFNSite, bundle: NeuronBundle) -> None:
    """Exchange the parameters of the FFN at `site` for those of `bundle`, in the modules that hold them."""
    kind = site.kind
    old = {name: site.module.get_parameter(name) for name in kind.parameters}
    new = tensors_of(bundle, kind.projections, old)
    put_parameters(site, {name: tensor.to(old[name].dtype) for name, tensor in new.items()}, bundle.width)


@contextmanager
def narrowed(site: FFNSite, bundle: NeuronBundle) -> Iterator[None]:
    """Inside, the FFN at `site` has the weights of `bundle`, folded; its own parameters are back afterwards."""
    kind = site.kind
    old = {name: site.module.get_parameter(name) for name in kind.parameters}
    width = site.neurons
    narrow(site, bundle.parameterized("folded"))
    try:
        yield
    finally:
        for name, parameter in old.items():
            path, _, own = name.rpartition(".")
            site.below(path).register_parameter(own, parameter)
        _tell(site, width)


def put_parameters(site: FFNSite, tensors: Mapping[str, Tensor], width: int) -> None:
    """Make `tensors` the parameters of the FFN at `site`, and let its modules know the width."""
    for name, tensor in tensors.items():
        path, _, own = name.rpartition(".")
        module = site.below(path)
        parameter = nn.Parameter(tensor, requires_grad=module.get_parameter(own).requires_grad)
        module.register_parameter(own, parameter)
    _tell(site, width)


def _tell(site: FFNSite, width: int) -> None:
    """Let the modules of an FFN that keep numbers of its width know it."""
    for name, times in site.kind.counts.items():
        path, _, own = name.rpartition(".")
        setattr(site.below(path), own, times * width)
