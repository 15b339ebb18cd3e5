"""Which module of an FFN is its activation, found by watching it run; and a proof that it works when narrowed in place.

FFNs without a module of their own, and those that hold gate and up in one projection, keep their forward pass: their
projections become narrower, and the activation gets the scale.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mlp_fusion.errors import InputError
from mlp_fusion.families import building
from mlp_fusion.families.base import FFNSite
from mlp_fusion.families.calls import AS_CALLED, Way, ways_to_call
from mlp_fusion.families.discovered import DiscoveredArchitecture
from mlp_fusion.families.recording import record_arguments
from mlp_fusion.families.sites import Site
from mlp_fusion.modules.layouts import take_half
from mlp_fusion.neurons import NeuronBundle

#: Neurons of the module that is watched, and relative error of outputs that are those wanted.
_WIDTH, _LIMIT = 24, 1e-4
#: What a call of a module got and returned.
_Passed = tuple[Tensor, Tensor]


@torch.no_grad()
def find_activation(config: Any, site: Site, entry: DiscoveredArchitecture) -> str:
    """Path of the activation's module, below the module at the site's path.

    One module of the kind is built, small and with random weights, and run. The activation is the one submodule without
    weights that gets exactly what the (gate) projection puts out. The module is then narrowed in place, with a scale,
    and has to compute what the narrower FFN is.

    Args:
        config: of the model.
        site: the kind of FFN.
        entry: for it, without `activation_path`, its paths relative to the module at the site's path.

    Raises:
        InputError: there is no such submodule, more than one, or the narrower FFN computes something else. The message
            is the end of a sentence about FFNs.
    """
    with building.undisturbed():
        module, way = _small(config, site)
        found = _getting_the_preactivation(module, way, entry)
        if not found:
            raise InputError("have no module that is their activation")
        if len(found) > 1:
            raise InputError(f"have {len(found)} modules that may be their activation ({', '.join(found)})")
        entry = dataclasses.replace(entry, activation_path=found[0])
        error = _error_when_narrow(module, way, entry)
        if not error <= _LIMIT:
            raise InputError(f"compute something else once they are narrower (relative difference {error:.1e})")
    return found[0]


def _small(config: Any, site: Site) -> tuple[nn.Module, Way]:
    """A real module of the kind, with few neurons, and the way in which it was called when it was proved."""
    narrow = copy.deepcopy(config)
    setattr(narrow, site.width_keys[0].path, min(site.width, _WIDTH))
    model = building.build(building.model_class(config), narrow)
    path = site.instances[0][0]
    module = building.materialise(model.get_submodule(path), {p.parameter for p in site.projections})
    recorded = record_arguments(model, {path}).get(path) if site.proof.call == AS_CALLED else None
    for way in ways_to_call(module, False, recorded):
        if way.how == site.proof.call:
            return module, way
    raise InputError("cannot be called again as they were when they were proved")


def _watched(modules: dict[str, nn.Module], call: Callable[[], Any]) -> dict[str, list[_Passed]]:
    """What passes through `modules` in a call, by their names; what is no single tensor is left out."""
    passed: dict[str, list[_Passed]] = {name: [] for name in modules}

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                passed[name].append((args[0].clone(), output.clone()))

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in modules.items()]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return passed


def _getting_the_preactivation(module: nn.Module, way: Way, entry: DiscoveredArchitecture) -> list[str]:
    """Submodules without weights and parts that get, in each call, what the (gate) projection has put out."""
    role = "w_gate" if entry.gated else "w_in"
    # The same module under two names counts twice: only one of them would be exchanged.
    small = {
        name: part
        for name, part in module.named_modules(remove_duplicate=False)
        if name and not part.state_dict() and not list(part.children())
    }
    projection = entry.projections[role]
    passed = _watched({**small, projection: module.get_submodule(projection)}, way.call)
    wanted = [take_half(y, entry.parts[role], -1) for _, y in passed.pop(projection)]
    return [name for name, calls in passed.items() if wanted and _same([x for x, _ in calls], wanted)]


def _same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return len(found) == len(wanted) and all(
        x.numel() == z.numel() and torch.equal(x.reshape(z.shape), z) for x, z in zip(found, wanted, strict=True)
    )


def _error_when_narrow(module: nn.Module, way: Way, entry: DiscoveredArchitecture) -> float:
    """Narrow the FFN in place, and compare its outputs with those of the narrower bundle: the largest error."""
    site = FFNSite(0, "", module)
    bundle = entry.read(site, None)
    # The last neuron stands for more than the others: a scale that lies elsewhere, or nowhere, is seen.
    labels = torch.arange(bundle.width).clamp(max=max(1, bundle.width // 2) - 1)
    narrow = bundle.reduce(labels[None])
    entry.install(site, narrow, "scaled")
    ends = {role: module.get_submodule(entry.projections[role]) for role in ("w_in", "w_out")}
    try:
        passed = _watched(ends, way.call)
    except Exception as error:
        raise InputError(f"do not run with fewer neurons ({type(error).__name__})") from error
    calls = list(zip(passed["w_in"], passed["w_out"], strict=True))
    return max((_error(narrow, x, y) for (x, _), (_, y) in calls), default=float("inf"))


def _error(bundle: NeuronBundle, x: Tensor, y: Tensor) -> float:
    wanted = bundle.forward(x.reshape(-1, x.shape[-1]))[0].reshape(y.shape)
    return float((y - wanted).norm() / wanted.norm())
