"""Round trips of small models: neurons made equal, merged by `fuse`, saved, loaded plain, restored, trained.

Neurons that are equal merge without an error, so that every output must stay, to rounding. A wrong layout, axis, role,
bias or scale cannot pass: `controls` shows it.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from guessing import Inputs, Probe, find_probes, tensors
from shrinking import Small, Steps, only_candidate, small_configs, steps_of
from torch import Tensor, nn
from transformers import PreTrainedModel
from tying import difference, instances, kept, merged, neurons, real_model, tie, wrong

import mlp_fusion
from mlp_fusion.errors import InputError
from mlp_fusion.families import building
from mlp_fusion.families import describe as discovery
from mlp_fusion.families.discovered import discovered
from mlp_fusion.families.sites import Description

__all__ = ["DifferentError", "Trip", "controls", "prepare", "round_trip", "steps_of"]

#: Relative differences of outputs and of parameters that are rounding.
SAME = 1e-5
#: Those that show a mistake.
OTHER = 1e-3
UNNOTICED = "unnoticed"
#: Types whose backward pass asserts that they are in training mode. Others stay in evaluation mode: no dropout.
_ONLY_IN_TRAINING = {"reformer"}
#: Candidates that are tried, if none runs whole.
_CANDIDATES, _SECONDS = 10, 10.0
_STEPS, _RATE = 3, 1e-3


class DifferentError(Exception):
    """Something is not what it was, or not what it should be."""


@dataclass
class Trip:
    """What a round trip starts from.

    Attributes:
        small: the config, and how it was made.
        description: of its FFNs that can be narrowed.
        unproved: what is like an FFN and is left as it is.
        model: with tied neurons.
        probes: what it is run on.
        problems: what guesses at inputs met.
        wide: outputs before anything is merged.
        figures: what was measured; filled as the trip goes on.
        done: stages that passed.
    """

    small: Small
    description: Description
    unproved: tuple[str, ...]
    model: Any
    probes: list[Probe]
    problems: list[str]
    wide: dict[str, Tensor] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)

    @property
    def paths(self) -> set[str]:
        """Paths of all FFNs' modules."""
        return {path for _, path in instances(self.description)}

    @property
    def reached(self) -> set[str]:
        """Those that run on the probes."""
        return {path for probe in self.probes for path in probe.reached}

    @property
    def whole(self) -> bool:
        """Whether one run of the whole model reaches all of them."""
        return len(self.probes) == 1 and not self.probes[0].path and self.paths <= self.reached

    @property
    def even(self) -> bool:
        """Whether every width has a half that is served, so that FFNs that one ratio moves can be halved together."""
        sites = self.description.sites
        return all(site.width % 16 == 0 or (site.width % 8 and site.width % 2 == 0) for site in sites)

    @property
    def sample(self) -> Inputs | None:
        """What the whole model runs on."""
        whole = [probe.inputs for probe in self.probes if not probe.path]
        return whole[0] if whole else None


def prepare(model_type: str, known: Steps | None = None) -> Trip:
    """A small model of a type with tied neurons, and inputs on which it runs.

    Args:
        model_type: of transformers.
        known: steps that have made a good config before.

    Raises:
        InputError: no small config has everything that the default config's model has, or none builds.
    """
    candidates = small_configs(model_type) if known is None else iter([only_candidate(model_type, known)])
    best: Trip | None = None
    until = time.perf_counter() + _SECONDS
    for number, small in enumerate(candidates):
        trip = _built(small)
        if best is None or _rank(trip) > _rank(best):
            best = trip
        full = best.whole and best.even
        if full or number + 1 == _CANDIDATES or time.perf_counter() > until:
            break
    if best is None:
        raise InputError(f"{model_type}: no small config has every kind of parameter of the default config's model")
    tie(best.model, best.description)
    best.wide = outputs(best.model, best.probes)
    return best


def _rank(trip: Trip) -> tuple[float, bool, bool]:
    return len(trip.reached) / max(len(trip.paths), 1), trip.whole, trip.even


def _built(small: Small) -> Trip:
    description, unproved = _narrowed(small)
    probes, problems = find_probes(real_model(small.config), {path for _, path in instances(description)})
    # A model of its own for the trip: guesses leave traces in some, such as the size of a window.
    return Trip(small, description, unproved, real_model(small.config), probes, problems)


def _narrowed(small: Small) -> tuple[Description, tuple[str, ...]]:
    """The FFNs that the product narrows, and what it leaves as it is."""
    description, architecture = discovery.describe(small.config), discovered(small.config)
    kinds = [(kind.path, kind.projections, kind.width) for kind in architecture.kinds]
    sites = tuple(
        site
        for site in description.sites
        if (site.path.removeprefix(f"{architecture.base}."), site.projections, site.width) in kinds
    )
    return dataclasses.replace(description, sites=sites), architecture.unproved


# --- stages ----------------------------------------------------------------------------------------------------------


def fuse(trip: Trip) -> None:
    """Halve every FFN; outputs stay."""
    _fuse(trip.model, trip)
    error = largest_difference(outputs(trip.model, trip.probes), trip.wide)
    trip.figures["in memory"] = error
    _check_outputs("outputs in memory", error, trip)


def _fuse(model: Any, trip: Trip) -> None:
    # What the whole model runs on may be past guessing; then its parts are what is compared.
    unmeasured = not any(not probe.path and trip.paths <= set(probe.reached) for probe in trip.probes)
    layers = "*" if trip.unproved else None
    mlp_fusion.fuse(
        model, width=0.5, layers=layers, optimizer="adamw", seed=0, sample=trip.sample, unmeasured=unmeasured
    )


def save_and_load(trip: Trip, folder: str) -> Any:
    """Save, load with the model's own class, and compare every parameter and the outputs.

    Returns:
        The model that was loaded.
    """
    original = real_model(trip.small.config)
    tie(original, trip.description)
    trip.model.save_pretrained(folder)
    loaded, info = _loaded(type(trip.model), folder)
    wrong_names = {key: sorted(map(str, names))[:3] for key, names in info.items() if names}
    if wrong_names:
        raise DifferentError(f"loading says {wrong_names}")
    ours = [path for path, module in loaded.named_modules() if type(module).__module__.startswith("mlp_fusion")]
    if ours:
        raise DifferentError(f"{ours[0]} of the loaded model is no module of transformers")
    error = parameters_difference(loaded.eval(), original, trip.description)
    trip.figures["parameters"] = error
    _check("parameters after loading", error)
    error = largest_difference(outputs(loaded, trip.probes), outputs(trip.model, trip.probes))
    trip.figures["loaded"] = error
    _check_outputs("outputs after loading", error, trip)
    return loaded


def _loaded(cls: Any, folder: str) -> tuple[Any, dict[str, Any]]:
    """The model in a folder, and what loading says of its names."""
    plain: Any = PreTrainedModel.from_pretrained
    loaded, info = plain.__func__(cls, folder, output_loading_info=True)
    if cls.from_pretrained.__func__ is not plain.__func__:
        loaded = cls.from_pretrained(folder)  # its own way may have no information to give
    return loaded, info


def restore(trip: Trip, loaded: Any, folder: str) -> None:
    """Restore what was loaded; outputs stay."""
    mlp_fusion.restore(loaded, folder)
    error = largest_difference(outputs(loaded, trip.probes), trip.wide)
    trip.figures["restored"] = error
    _check_outputs("outputs after restoring", error, trip)


def train(trip: Trip) -> None:
    """A few steps of AdamW on the fused model: finite, and every FFN changes that has a gradient in the wide model."""
    before = {name: p.detach().clone() for name, p in trip.model.named_parameters()}
    optimizer = torch.optim.AdamW(trip.model.parameters(), lr=_RATE, weight_decay=0.0)
    for _ in range(_STEPS):
        optimizer.zero_grad()
        loss = _loss(trip.model, trip)
        loss.backward()
        optimizer.step()
        if not bool(loss.isfinite()):
            raise DifferentError(f"the loss is {float(loss)} in training")
    changed = {name for name, p in trip.model.named_parameters() if not torch.equal(p, before[name])}
    expected = _with_gradient(trip)
    if not expected:
        raise DifferentError("no FFN has a gradient: no output depends on one")
    for path in expected:
        if not any(name.startswith(f"{path}.") for name in changed):
            raise DifferentError(f"nothing in {path} is trained")
    if not all(bool(p.isfinite().all()) for p in trip.model.parameters()):
        raise DifferentError("a parameter is not finite after training")
    trip.figures["trained"] = len(expected)


def _with_gradient(trip: Trip) -> list[str]:
    """Paths of FFNs that have a gradient in the wide model: not every output of every layer is used."""
    model = real_model(trip.small.config)
    tie(model, trip.description)
    _loss(model, trip).backward()
    found = []
    for site, path in instances(trip.description):
        gradient = model.get_parameter(f"{path}.{site.projections[-1].parameter}".strip(".")).grad
        if gradient is not None and bool(gradient.any()):
            found.append(path)
    return found


def _loss(model: Any, trip: Trip) -> Tensor:
    model.train(trip.small.config.model_type in _ONLY_IN_TRAINING)
    terms = []
    for probe in trip.probes:
        torch.manual_seed(0)
        found = tensors(_part(model, probe)(**copy.deepcopy(probe.inputs)))
        terms += [t.square().mean() for t in found.values() if t.requires_grad]
    if not terms:
        raise DifferentError("no output of the model has a gradient")
    return torch.stack(terms).sum()


def controls(trip: Trip, most: int | None = None) -> None:
    """Fuse with descriptions that have a mistake, `most` of them, and note who reports it, and how."""
    found: dict[str, str] = {}
    for name, description in itertools.islice(wrong(trip.description), most):
        model = real_model(trip.small.config)
        tie(model, trip.description)
        try:
            with described_as(description) as asked:
                _fuse(model, trip)
            if not asked:
                found[name] = "not asked: the entry of this type is written by hand"
                continue
            error = largest_difference(outputs(model, trip.probes), trip.wide)
        except Exception as reported:  # noqa: BLE001  (whoever reports it)
            found[name] = f"{type(reported).__name__}: {' '.join(str(reported).split())[:160]}"
            continue
        found[name] = f"outputs differ by {error:.1e}" if error > OTHER else f"{UNNOTICED}: they differ by {error:.1e}"
    trip.figures["controls"] = found


@contextlib.contextmanager
def described_as(description: Description) -> Iterator[list[Any]]:
    """Discovery finds `description`, whatever there is; what is yielded grows when it is asked."""
    asked: list[Any] = []

    def run(found: Any) -> Description:
        asked.append(found)
        return description

    _forget()
    try:
        with mock.patch.object(discovery._Discovery, "run", run):
            yield asked
    finally:
        _forget()


def _forget() -> None:
    """Empty the product's caches of what was found."""
    for name, module in list(sys.modules.items()):
        if name.startswith("mlp_fusion."):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


def round_trip(trip: Trip, mistakes: int | None = None) -> None:
    """All stages, in order; `trip.done` says how far it came. Without probes, the first one only.

    Args:
        trip: prepared.
        mistakes: how many wrong descriptions are tried; None: all.

    Raises:
        InputError: the product refuses the model.
        DifferentError: a comparison fails.
    """
    with tempfile.TemporaryDirectory(prefix="trip_") as folder:
        fuse(trip)
        trip.done.append("fused")
        if not trip.probes:
            return
        loaded = save_and_load(trip, folder)
        trip.done.append("loaded")
        restore(trip, loaded, folder)
        trip.done.append("restored")
    train(trip)
    trip.done.append("trained")
    controls(trip, mistakes)
    trip.done.append("controlled")


# --- comparing -------------------------------------------------------------------------------------------------------


def _part(model: nn.Module, probe: Probe) -> nn.Module:
    return model.get_submodule(probe.path) if probe.path else model


@torch.no_grad()
def outputs(model: nn.Module, probes: list[Probe]) -> dict[str, Tensor]:
    """Everything that a model and its parts put out on the probes, by name."""
    found: dict[str, Tensor] = {}
    for probe in probes:
        torch.manual_seed(0)
        for name, value in tensors(_part(model, probe)(**copy.deepcopy(probe.inputs))).items():
            found[f"{probe.path}:{name}"] = value.clone()
    return found


def largest_difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Largest relative difference of outputs; infinite where one is missing or of another shape."""
    if found.keys() != wanted.keys() or any(found[name].shape != wanted[name].shape for name in wanted):
        return math.inf
    errors = [_difference(found[name], wanted[name]) for name in wanted]
    return max(errors, default=0.0)


def _difference(a: Tensor, b: Tensor) -> float:
    error = float((a - b).double().norm() / b.double().norm().clamp(min=1e-6))
    return error if math.isfinite(error) else math.inf


def parameters_difference(loaded: nn.Module, original: nn.Module, description: Description) -> float:
    """Largest relative difference of a loaded model's parameters from what a tied model's must become.

    Neurons may come in any order. Everything else must be the same in every bit.

    Raises:
        DifferentError: a parameter has come, gone or changed that belongs to no FFN.
    """
    inside = set()
    worst = 0.0
    first = building.first_names(original)
    for site, path in instances(description):
        names = [n for p in site.projections for n in (p.parameter, p.bias if p.role != "w_out" else None) if n]
        inside |= {first[f"{path}.{name}" if path else name] for name in names}
        left = kept(site, description.sites)
        wanted = merged(neurons(original, site, path, site.width), left)
        worst = max(worst, difference(neurons(loaded, site, path, left), wanted))
    before, after = dict(original.named_parameters()), dict(loaded.named_parameters())
    if before.keys() != after.keys():
        raise DifferentError(f"parameters came or went: {sorted(before.keys() ^ after.keys())[:3]}")
    for name, parameter in before.items():
        if name not in inside and not torch.equal(parameter, after[name]):
            raise DifferentError(f"{name}, which belongs to no FFN, is not what it was")
    return worst


def _check(what: str, error: float, limit: float = SAME) -> None:
    if not error <= limit:
        raise DifferentError(f"{what} differ by {error:.1e}")


def _check_outputs(what: str, error: float, trip: Trip) -> None:
    """As above; a few models multiply rounding, which is measured where it matters."""
    if error <= SAME:
        return
    if "rounding" not in trip.figures:
        trip.figures["rounding"] = _rounding(trip)
    _check(what, error, max(SAME, trip.figures["rounding"]))


def _rounding(trip: Trip) -> float:
    """How much outputs of the wide model change when every weight is off by about a unit in the last place."""
    model = real_model(trip.small.config)
    tie(model, trip.description)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.mul_(1 + torch.finfo(torch.float32).eps * torch.randn(parameter.shape, generator=g))
    return largest_difference(outputs(model, trip.probes), trip.wide)
