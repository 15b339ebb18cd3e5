"""In which form a narrower FFN of a kind stands in its model, found by watching one small module run, and proved there.

An FFN that is a module of its own, and whose function is one of the kernels', is replaced. Others keep their forward
pass: their projections become narrower, and the scale goes into the activation, if that is a module, or into weights.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mlp_fusion.errors import InputError
from mlp_fusion.families import building
from mlp_fusion.families.base import Architecture, FFNSite, Kind
from mlp_fusion.families.calls import AS_CALLED, Way, ways_to_call
from mlp_fusion.families.exchange import install, put_parameters
from mlp_fusion.families.recording import record_arguments
from mlp_fusion.families.sites import Site
from mlp_fusion.modules.stored import Projection, take_half, tensors_of
from mlp_fusion.neurons import UNNAMED

#: Neurons of the module that is watched, and relative error of outputs that are those wanted.
_WIDTH, _LIMIT = 24, 1e-4
#: Names by which torch's and transformers' layers keep the number of their channels.
_CHANNELS = ("in_features", "out_features", "in_channels", "out_channels", "nf", "nx")
#: What a call of a module got and returned.
_Passed = tuple[Tensor, Tensor]


@torch.no_grad()
def with_form(config: Any, site: Site, kind: Kind, counts: dict[str, int]) -> Kind:
    """The kind with the form in which narrower ones stand.

    Args:
        config: of the model.
        site: its description.
        kind: without a form.
        counts: what is known of :attr:`Kind.counts`.

    Raises:
        InputError: there is no form in which a narrower one computes what it should. The message is the end of a
            sentence about FFNs.
    """
    kind = dataclasses.replace(kind, counts=counts)
    if kind.experts:
        return dataclasses.replace(kind, form="experts" if _is_stack(site, kind) else "weights")
    with building.undisturbed():
        module, way = _small(config, site)
        if not kind.counts:
            kind = dataclasses.replace(kind, counts=_channels(module, kind))
        error = InputError("have no form")
        for tried in _candidates(site, kind, module, way):
            if tried.form == "module":
                return tried
            # The probe leaves the module as it was told to: each attempt has its own.
            try:
                difference = _error_when_narrow(*_small(config, site), tried)
            except InputError as found:
                error = found
                continue
            if difference <= _LIMIT:
                return tried
            error = InputError(f"compute something else once they are narrower (relative difference {difference:.1e})")
    raise error


def _candidates(site: Site, kind: Kind, module: nn.Module, way: Way) -> Iterator[Kind]:
    """Forms that may do, the fastest first."""
    dropout = _dropout_behind(module, way, kind) if _is_plain(site, kind, module) else None
    if dropout is not None:
        yield dataclasses.replace(kind, form="module", dropout=dropout)
    for path in _getting_the_preactivation(module, way, kind):
        yield dataclasses.replace(kind, form="activation", activation=path)
    yield dataclasses.replace(kind, form="projection")


def _is_plain(site: Site, kind: Kind, module: nn.Module) -> bool:
    """Whether a module is an FFN and nothing else, with projections of its own and a function of the kernels'."""
    owners = [p.parameter.removesuffix(".weight") for p in kind.projections]
    return (
        site.own_module
        and not site.shared
        and kind.name != UNNAMED
        and all(p.part == "whole" for p in kind.projections)
        and all(name in module._modules and type(module._modules[name]) in (nn.Linear, Conv1D) for name in owners)
        and {name for name, _ in module.named_parameters()} == set(kind.parameters)
    )


def _is_stack(site: Site, kind: Kind) -> bool:
    """Whether a module is a stack of experts that lie as in `FusedExperts`, with a function of the kernels'."""
    first = {"w_gate": "first", "w_in": "second"} if kind.gated else {"w_in": "whole"}
    name = "gate_up_proj" if kind.gated else "up_proj"
    wanted = [Projection(name, role, part, 1, 0) for role, part in first.items()]
    lies = [dataclasses.replace(p, bias=None) for p in kind.projections]
    biases = {p.parameter: p.bias for p in kind.projections if p.bias is not None}
    return (
        bool(site.proof.experts)
        and kind.name != UNNAMED
        and lies == [*wanted, Projection("down_proj", "w_out", "whole", 2, 0)]
        and biases in ({}, {name: f"{name}_bias", "down_proj": "down_proj_bias"})
    )


def _small(config: Any, site: Site) -> tuple[nn.Module, Way]:
    """A real module of the kind, with few neurons, and the way in which it was called when it was proved."""
    model = building.build(building.model_class(config), _narrow_config(config, site))
    path = site.instances[0][0]
    # Before the module is copied: running a model may change how it runs (a sparse attention becomes a full one).
    recorded = record_arguments(model, {path}).get(path) if site.proof.call == AS_CALLED else None
    module = building.materialise(model.get_submodule(path), {p.parameter for p in site.projections})
    error: Exception | None = None
    for way in ways_to_call(module, False, recorded):
        if way.how == site.proof.call:
            try:
                way.call()
            except Exception as found:  # noqa: BLE001  (one of several ways that are called the same)
                error = found
                continue
            return module, way
    raise InputError("cannot be called again as they were when they were proved") from error


def _narrow_config(config: Any, site: Site) -> Any:
    key = site.width_keys[0] if site.width_keys else None
    if key is None or key.also_moves or site.width <= _WIDTH or any(type(n) is float for n in key.numbers):
        return copy.deepcopy(config)
    small: Any = [_WIDTH] * len(key.value) if isinstance(key.value, list) else _WIDTH
    if isinstance(key.value, int) and key.value != site.width:  # a multiplier
        return copy.deepcopy(config)
    return type(config).from_dict(building.put(config.to_dict(), tuple(key.path.split(".")), small))


def _channels(module: nn.Module, kind: Kind) -> dict[str, int]:
    """Numbers of channels that the projections' layers keep, of a kind without a key."""
    found: dict[str, int] = {}
    for p in kind.projections:
        path, _, _ = p.parameter.rpartition(".")
        size = module.get_parameter(p.parameter).shape[p.neuron_axis]
        times = size // kind.width if size % kind.width == 0 else 1
        for attribute in _CHANNELS:
            if vars(module.get_submodule(path)).get(attribute) == size:
                found[f"{path}.{attribute}"] = times
    return found


def _watched(modules: dict[str, nn.Module], call: Callable[[], Any]) -> dict[str, list[_Passed]]:
    """What passes through `modules` in a call, by their names; what is no single tensor is left out."""
    passed: dict[str, list[_Passed]] = {name: [] for name in modules}

    def note(name: str, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            passed[name].append((args[0].clone(), output.clone()))

    handles = [module.register_forward_hook(functools.partial(note, name)) for name, module in modules.items()]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return passed


def _without_weights(module: nn.Module) -> dict[str, nn.Module]:
    """Submodules without weights and parts, by name."""
    # The same module under two names counts twice: only one of them would be exchanged.
    return {
        name: part
        for name, part in module.named_modules(remove_duplicate=False)
        if name and not part.state_dict() and not list(part.children())
    }


def _getting_the_preactivation(module: nn.Module, way: Way, kind: Kind) -> list[str]:
    """The submodule that gets, in each call, what the (gate) projection has put out; none if there are several."""
    projection = kind.projection("w_gate" if kind.gated else "w_in")
    owner = projection.parameter.rpartition(".")[0]
    passed = _watched({**_without_weights(module), owner: module.get_submodule(owner)}, way.call)
    axis = 1 if isinstance(module.get_submodule(owner), (nn.Conv1d, nn.Conv2d)) else -1
    wanted = [take_half(y, projection.part, axis) for _, y in passed.pop(owner)]
    found = [name for name, calls in passed.items() if wanted and _same([x for x, _ in calls], wanted)]
    # Dropouts pass on what they get: what follows one is the activation.
    acting = [name for name in found if not isinstance(module.get_submodule(name), (nn.Dropout, nn.Identity))]
    return acting if len(acting) == 1 else []


def _same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return len(found) == len(wanted) and all(
        x.numel() == z.numel() and torch.equal(x.reshape(z.shape), z) for x, z in zip(found, wanted, strict=True)
    )


def _dropout_behind(module: nn.Module, way: Way, kind: Kind) -> str | None:
    """Path of the one dropout of an FFN, behind its output projection; empty without any, None if one lies elsewhere.

    Whatever the dropouts are written as, outputs in training mode tell.
    """
    quiet = way.call()
    with _training(module):
        torch.manual_seed(0)
        if torch.equal(way.call(), quiet):
            return ""
        dropouts = {n: part for n, part in _without_weights(module).items() if isinstance(part, nn.Dropout)}
        last = kind.projection("w_out").parameter.removesuffix(".weight")
        ends: dict[str, list[_Passed]] = _watched({**dropouts, last: module.get_submodule(last)}, way.call)
        behind = [name for name in dropouts if _same([x for x, _ in ends[name]], [y for _, y in ends[last]])]
        if len(behind) != 1:
            return None
        part: Any = dropouts[behind[0]]
        part.training = False
        alone = torch.equal(way.call(), quiet)
    return behind[0] if alone else None


@contextmanager
def _training(module: nn.Module) -> Iterator[None]:
    module.train()
    try:
        yield
    finally:
        module.eval()


def _error_when_narrow(module: nn.Module, way: Way, kind: Kind) -> float:
    """Tie neurons, narrow the FFN in place, and compare the module's outputs before and after: the relative error.

    No function enters: what holds for it holds for one that nobody has named.
    """
    holder = nn.ModuleDict({"_": module})
    site = FFNSite(0, "_", holder, dataclasses.replace(kind, path="_"))
    bundle = Architecture("", "", (site.kind,)).read(site)
    # The last neuron stands for more than the others: a scale that lies elsewhere, or nowhere, is seen.
    labels = torch.arange(bundle.width).clamp(max=max(1, bundle.width // 2) - 1)
    tied = bundle.with_vectors(bundle.vectors()[:, labels], None)
    old = {name: module.get_parameter(name) for name in kind.parameters}
    put_parameters(site, tensors_of(tied, kind.projections, old), bundle.width)
    wanted = _tensors(way.call())
    install(site, tied.reduce(labels[None]), "scaled")
    try:
        found = _tensors(way.call())
    except Exception as error:  # whatever code of somebody else's makes of fewer neurons
        raise InputError(f"do not run with fewer neurons ({type(error).__name__})") from error
    return max((_relative(a, b) for a, b in zip(found, wanted, strict=True)), default=float("inf"))


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    values = output.values() if hasattr(output, "values") else output if isinstance(output, (tuple, list)) else ()
    return [tensor for value in values for tensor in _tensors(value)]


def _relative(found: Tensor, wanted: Tensor) -> float:
    error = float((found - wanted).norm() / wanted.norm().clamp(min=1e-12))
    return error if error == error else float("inf")
