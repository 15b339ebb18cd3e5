"""The FFNs of a model in memory that are to be reduced: found, chosen, read and checked; and put back, reduced."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mlp_fusion.choices import METHODS
from mlp_fusion.errors import InputError
from mlp_fusion.families import Architecture, FFNSite
from mlp_fusion.families.base import unsupported
from mlp_fusion.families.exchange import check_form, install
from mlp_fusion.families.groups import only_some, resolve_widths
from mlp_fusion.measure.errors import relative_error
from mlp_fusion.neurons import UNNAMED, NeuronBundle, all_finite
from mlp_fusion.reducing.pipeline import ReducedFFN, working_precision
from mlp_fusion.reducing.widths import check_budget
from mlp_fusion.running.batches import main_input
from mlp_fusion.running.taps import Activations
from mlp_fusion.selection import Layers, Width, resolve_layers
from mlp_fusion.settings import FuseSettings
from mlp_fusion.store.record import check_config, fused_config, replace_config
from mlp_fusion.store.states import know_forms
from mlp_fusion.store.widths import described

#: An entry's forward pass must agree with the model's own to this many units of rounding, and to this share at most.
_SELF_TEST_ULPS, _SELF_TEST_SHARE = 64, 0.05


@dataclass(frozen=True, eq=False)
class ChosenFFNs:
    """The FFNs of a model that are to be reduced.

    Attributes:
        model, architecture: the model, unfused, and its architecture.
        every: all of its FFNs, in order; a stack of experts is one.
        sites: the chosen ones, every expert by itself.
        originals: what they compute, each with B = 1.
    """

    model: nn.Module
    architecture: Architecture
    every: list[FFNSite]
    sites: list[FFNSite]
    originals: list[NeuronBundle]

    @staticmethod
    def find(model: nn.Module, layers: Layers, only: str | None = None) -> ChosenFFNs:
        """Find, choose and read.

        Raises:
            InputError: not a Hugging Face model, one in which something like an FFN is not proved, or layers that it
                lacks.
        """
        architecture, every = find_ffns(model)
        chosen = choose_sites(architecture, every, layers, only)
        sites = [expert for site in chosen for expert in site.experts()]
        read = {site.index: architecture.read(site) for site in chosen}
        originals = [read[s.index] if s.expert is None else read[s.index].select(s.expert) for s in sites]
        return ChosenFFNs(model, architecture, every, sites, originals)

    @property
    def named(self) -> bool:
        """Whether what they compute has a name."""
        return all(bundle.activation != UNNAMED for bundle in self.originals)

    def widths(self, width: Width, multiple: int | None = None) -> list[int]:
        """The neurons that each is to keep.

        Raises:
            InputError: the width does not suit one of them.
        """
        return resolve_widths(width, self.sites, multiple)

    def check(self, settings: FuseSettings) -> None:
        """Raise InputError where one has no form for the scale that its neurons get, or a budget is too small."""
        if METHODS[settings.method].scales or settings.match is not None:
            for site in self.sites:
                check_form(site, settings.parameterization)
        if settings.budget is not None:
            check_budget(settings.budget, list({site.index: site for site in self.sites}.values()))

    def self_test(self, activations: Sequence[Activations]) -> None:
        """Compare what was read with the model's own FFNs on real inputs: a wrong entry must not pass unnoticed.

        Raises:
            InputError: one computes something else.
        """
        for site, bundle, rows in zip(self.sites, self.originals, activations, strict=True):
            if bundle.activation != UNNAMED and len(rows.x):
                self_test(self.architecture, site, bundle, rows)

    def install(self, reduced: Sequence[ReducedFFN], settings: FuseSettings) -> None:
        """Put reduced FFNs into the model, and its config right. The one step that changes the model."""
        stacks: dict[int, list[NeuronBundle]] = {}
        for site, ffn in zip(self.sites, reduced, strict=True):
            stacks.setdefault(site.index, []).append(ffn.bundle)
        # An FFN that a budget leaves whole stays the model's own, and has no scale to be restored.
        narrowed = {site: stacks[site.index] for site in self.every if site.index in stacks}
        narrowed = {site: stack for site, stack in narrowed.items() if stack[0].width < site.kind.width}
        # Methods that choose neurons give them no scale: there is no form to go on training in, and none to restore.
        scaled = any(bundle.scale is not None for stack in narrowed.values() for bundle in stack)
        widths = [narrowed[site][0].width if site in narrowed else site.neurons for site in self.every]
        changed = fused_config(
            self.model, self.architecture, self.every, widths, method=settings.method,
            parameterization=settings.parameterization if scaled else "folded",
        )  # fmt: skip
        for site, stack in narrowed.items():
            install(site, NeuronBundle.stack(stack), settings.parameterization)
        replace_config(self.model, changed)
        know_forms(self.model, self.architecture)


def inner_model(model: Any) -> Any:
    """The Hugging Face model in a module that is called in a way of its own, as a SentenceTransformer is.

    That is one whose `forward` needs something that the model inside does not know, and whose config is that of the one
    model inside. Anything else comes back as it is.
    """
    if not isinstance(model, nn.Module) or isinstance(model, PreTrainedModel):
        return model
    inside = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if inside is None or getattr(model, "config", None) is not inside.config:
        return model
    others = set(model.modules()) - set(inside.modules())
    alone = not any(isinstance(module, PreTrainedModel) for module in others)
    arguments, known = (inspect.signature(each.forward).parameters for each in (model, inside))
    named = (a for a in arguments.values() if a.kind not in (a.VAR_POSITIONAL, a.VAR_KEYWORD))
    needs_other = any(a.default is a.empty and a.name not in known for a in named)
    return inside if alone and needs_other and main_input(inside) not in arguments else model


def find_ffns(model: nn.Module) -> tuple[Architecture, list[FFNSite]]:
    """The architecture of `model` and its unfused FFNs.

    Raises:
        InputError: not a Hugging Face model, one that `check_config` refuses, or no FFN found.
    """
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if not model_type:
        raise InputError(f"{type(model).__name__} has no config.model_type: give a Hugging Face model")
    if any("base_layer" in name for name, _ in model.named_modules()):
        raise InputError("the model carries adapters: merge adapters into the weights first (merge_and_unload)")
    architecture = check_config(config)
    sites = architecture.sites(model)
    if not sites:
        raise InputError(f"no FFN found in {type(model).__name__} where the {model_type!r} architecture has them")
    # A checkpoint is loaded into what its config describes.
    path, _, built = described(model)
    paths = {site.path.removeprefix(f"{path}.") for site in sites}
    expected = {site.path for site in architecture.sites(built)}
    if paths != expected:
        raise InputError(f"the model has {len(paths)} FFNs, its config describes {len(expected)}: mend the config")
    for site in sites:
        now = site.neurons
        if now != site.kind.width:
            raise InputError(f"{site.path} has {now} neurons, its config says {site.kind.width}: mend the config")
    return architecture, sites


def choose_sites(
    architecture: Architecture, every: Sequence[FFNSite], layers: Layers, only: str | None = None
) -> list[FFNSite]:
    """The FFNs that `layers` means, and of these `only` experts or dense ones.

    Raises:
        InputError: it cannot be read, the model lacks one, or it means all of them and something like an FFN is not
            proved: that would be left behind silently; or there are none of those that are meant only.
    """
    if architecture.unproved and (layers is None or layers == "all"):
        paths = sorted({site.kind.path for site in every})
        raise InputError(
            f"{unsupported(architecture.model_type, architecture.unproved[0])}; to leave it as it is, choose among the "
            f"FFNs that are proved ({', '.join(paths)}) with layers: a pattern of paths, or '*' for all of them"
        )
    paths = [site.path for site in every]
    indices = set(resolve_layers(layers, [site.index for site in every], paths))
    chosen = [site for site in every if site.index in indices]
    if only is None:
        return chosen
    meant = {site.index for site in only_some(only, every)}
    if not meant & indices:
        raise InputError(
            f"only {only}: no FFN of the chosen layers is one, the first is {chosen[0].path}: leave out only, or "
            "choose other layers"
        )
    return [site for site in chosen if site.index in meant]


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Number and bytes of the model's parameters; tied ones count once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters)


def check_finite(model: nn.Module) -> None:
    """Raise InputError where a weight of `model` is NaN or infinite."""
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and parameter.is_floating_point() and not all_finite(parameter):
            raise InputError(f"{name} holds NaN or Inf: the checkpoint is damaged")


def self_test(architecture: Architecture, site: FFNSite, bundle: NeuronBundle, rows: Activations) -> None:
    """Compare the bundle with the model's own FFN on real inputs: a wrong entry must not pass unnoticed."""
    wide = working_precision(bundle)
    exact = wide.forward(rows.x.to(wide.w_in.dtype))[0]
    error = relative_error(rows.y, exact)
    # Of the coarsest: some models keep output projections in float32 beside half precision.
    kinds = {rows.x.dtype, rows.y.dtype, *(t.dtype for t in bundle.named().values())}
    epsilon = max(torch.finfo(kind).eps for kind in kinds)
    if rows.y.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        # TF32 or bfloat16 products under a float32 name.
        epsilon = torch.finfo(torch.bfloat16).eps
    # Functions are known to float32's rounding: some models write them with constants of eight digits.
    epsilon = max(epsilon, torch.finfo(torch.float32).eps)
    limit = min(_SELF_TEST_ULPS * epsilon, _SELF_TEST_SHARE)
    if not error <= limit:
        raise InputError(
            f"{site.label}: this FFN does not compute what the {architecture.model_type!r} architecture says "
            f"(relative difference {error:.1e}): its code or its activation is not the standard one"
        )
