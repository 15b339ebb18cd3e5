"""`describe`: the FFNs of the model that a config describes, found by what they compute and proved."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from mlp_fusion.errors import InputError, named
from mlp_fusion.families import building
from mlp_fusion.families.calls import matrices
from mlp_fusion.families.claims import claims, described
from mlp_fusion.families.keys import Keys, Move
from mlp_fusion.families.probe import Found, Log, probe_module, projections
from mlp_fusion.families.recording import record_arguments
from mlp_fusion.families.sites import Description
from mlp_fusion.modules.stored import Projection

#: A module with more matrices than this is no layer; its parts were probed before it.
_MANY = 48
#: Width keys with a value of at least this are made small.
_WIDE = 96


def describe(config: Any) -> Description:
    """Find and prove the FFNs of the model that `config` describes.

    The model is built on the meta device; one module of each kind is made real, with a small width and random weights.
    Everything is deterministic. `config`, random number generators and torch's settings are left as they were. Nothing
    is fetched, and no code from the hub is run.

    Args:
        config: a `transformers` config; the user's own, since defaults hide FFNs, clamps and widths.

    Returns:
        The sites, what is refused, and what is set apart, with reasons.

    Raises:
        InputError: transformers has no class for the config, or builds no model from it.

    Examples:
        >>> from transformers import AutoConfig
        >>> found = describe(AutoConfig.from_pretrained("roberta-base"))
        >>> [(site.path, len(site.instances), site.function.activation) for site in found.sites]
        [('roberta.encoder.layer.#', 12, 'gelu')]
        >>> found.complete, found.sites[0].width_keys[0].path
        (True, 'intermediate_size')
    """
    with building.undisturbed():
        return _Discovery(copy.deepcopy(config)).run()


@dataclass(frozen=True)
class Unit:
    """One FFN of one module of the small model.

    Attributes:
        path: of the module.
        module: its class.
        found: what the probe found; shared by all modules of the kind.
        projections: where it lies.
    """

    path: str
    module: str
    found: Found
    projections: tuple[Projection, ...]


class _Discovery:
    """One run of `describe`: what it has built and found so far."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.cls: type[PreTrainedModel] = building.model_class(config)
        self.model = self._build(config)
        self.keys = Keys(self.cls, config, building.shapes(self.model))
        self.logs: list[tuple[str, Log]] = []
        self.units: list[Unit] = []
        #: Parameters of FFNs, and those of everything that was found.
        self.claimed: set[str] = set()
        self.taken: set[str] = set()

    def _build(self, config: Any) -> PreTrainedModel:
        try:
            return building.build(self.cls, config)
        except Exception as error:
            raise InputError(
                f"{config.model_type}: transformers builds no {self.cls.__name__} from this config: {named(error)}"
            ) from error

    def run(self) -> Description:
        moves = [move for path in self.keys.likely if (move := self.keys.move(path)) is not None]
        suspects = {name for move in moves if move.pure for name in move.axes}
        small = self._small(moves)
        with building.eager_experts(small):
            self._probe(small, suspects)
        found = claims(self.units, small, self.model, self._experts_of_flat_stacks(moves), moves)
        return described(self.config.model_type, self.cls.__name__, found, self.keys, moves, self.logs)

    def _small(self, moves: list[Move]) -> PreTrainedModel:
        """The model with small widths and few experts, whose modules have the names of the user's."""
        widths = [(move.path, move.value) for move in moves if move.same_names and _is_wide(move.value)]
        for width, experts in building.NARROW:
            try:
                config = building.narrow_config(self.config, widths, width, experts)
                model = building.build(self.cls, config)
            except Exception:  # noqa: BLE001  (a config with numbers that do not fit together)
                continue
            known = building.shapes(self.model)
            if building.shapes(model).keys() <= known.keys():
                return model
        return self._build(self.config)

    def _experts_of_flat_stacks(self, moves: list[Move]) -> dict[str, int]:
        """Parameter pattern -> number of experts, for stacks in which experts lie one after another on one axis.

        The number is seen where the width alone is changed.
        """
        flat = {
            building.pattern(f"{unit.path}.{projection.parameter}"): (unit.found.output.n_in, projection.neuron_axis)
            for unit in self.units
            for projection in unit.projections
            if projection.expert_axis == projection.neuron_axis
        }
        if not flat:
            return {}
        widths = [(move.path, move.value) for move in moves if move.same_names and _is_wide(move.value)]
        width = next(n for n, _ in flat.values())
        alone = building.shapes(building.build(self.cls, building.narrow_config(self.config, widths, width, None)))
        return {
            building.pattern(name): shape[flat[building.pattern(name)][1]] // width
            for name, shape in alone.items()
            if building.pattern(name) in flat
        }

    def _probe(self, model: nn.Module, suspects: set[str]) -> None:
        """Probe one module of each kind, from the inside out; then what cannot be called alone."""
        known: dict[Any, tuple[list[Found], list[tuple[Projection, ...]]]] = {}
        uncalled: dict[Any, list[str]] = {}
        for path, module in _inside_out(model, self.taken):
            names = {f"{path}.{name}" for name, _ in matrices(module)}
            left = names - self.taken
            if len(left) < 2 or (not left & suspects and (names & self.claimed or len(names) > _MANY)):
                continue
            kind = _kind(path, module, names & self.taken)
            if kind not in known:
                log = Log()
                self.logs.append((path, log))
                known[kind] = self._try(path, module, suspects, log)
                if not known[kind][0] and left & suspects:
                    uncalled.setdefault(kind, [])
            if kind in uncalled:
                uncalled[kind].append(path)
            self._claim(path, module, *known[kind])
        self._probe_as_called(model, uncalled, suspects)

    def _try(
        self, path: str, module: nn.Module, suspects: set[str], log: Log, recorded: Any = None
    ) -> tuple[list[Found], list[tuple[Projection, ...]]]:
        inside = {name for name, _ in module.named_parameters()}
        taken = {name for name in inside if f"{path}.{name}" in self.taken}
        moved = {name for name in inside if f"{path}.{name}" in suspects}
        try:
            real = building.materialise(module, moved)
        except Exception as error:  # noqa: BLE001  (too large, or with tensors that are no parameters)
            log.problem = str(error) if isinstance(error, InputError) else named(error)
            log.mixed |= _alike_shapes(module, taken)
            return [], []
        wanted = {name for name, _ in matrices(module)} & moved
        found = probe_module(real, taken, log, wanted, recorded)
        parameters = dict(real.named_parameters())
        return found, [projections(parameters, one) if one.error is not None else () for one in found]

    def _claim(self, path: str, module: nn.Module, found: list[Found], where: list[tuple[Projection, ...]]) -> None:
        for one, lies in zip(found, where, strict=True):
            self.units.append(Unit(path, type(module).__name__, one, lies))
            names = {f"{path}.{name}" for name in one.names}
            self.taken |= names
            if one.proved and one.identified.function.activation != "identity":
                self.claimed |= names

    def _probe_as_called(self, model: nn.Module, uncalled: dict[Any, list[str]], suspects: set[str]) -> None:
        """Probe the innermost modules that hold what is left, with the arguments that the model calls them with."""
        modules = dict(model.named_modules())
        waiting = {
            kind: [p for p in paths if len(_left(p, modules[p], self.taken) & suspects) > 1]
            for kind, paths in uncalled.items()
        }
        waiting = {kind: paths for kind, paths in waiting.items() if paths}
        if not waiting:
            return
        recorded = record_arguments(model, {paths[0] for paths in waiting.values()})
        for paths in waiting.values():
            first = paths[0]
            if first not in recorded or not len(_left(first, modules[first], self.taken) & suspects) > 1:
                continue
            log = Log()
            self.logs.append((first, log))
            found, where = self._try(first, modules[first], suspects, log, recorded[first])
            for path in paths:
                self._claim(path, modules[path], found, where)


def _alike_shapes(module: nn.Module, taken: set[str]) -> set[tuple[str, str]]:
    """Pairs of matrices of which one leads into more channels than it has, and the other back."""
    shapes = [(name, tuple(p.shape[-2:])) for name, p in matrices(module) if name not in taken]
    return {(a, b) for a, first in shapes for b, second in shapes if first == second[::-1] and first[0] > first[1]}


def _is_wide(value: Any) -> bool:
    """Whether a key's value is worth making small; one that is unset stands for a multiple of something."""
    if value is None:
        return True
    return any(isinstance(n, int) and n >= _WIDE for n in (value if isinstance(value, list) else [value]))


def _left(path: str, module: nn.Module, claimed: set[str]) -> set[str]:
    return {f"{path}.{name}" for name, _ in matrices(module)} - claimed


def _inside_out(model: nn.Module, taken: set[str]) -> Iterator[tuple[str, nn.Module]]:
    """Modules that may hold an FFN, the innermost first; no whole stacks of layers.

    Args:
        taken: parameters that have been found so far; a stack of what was found, such as adapters, is none of layers.
    """
    modules = [(path, module) for path, module in model.named_modules() if path]
    for path, module in sorted(modules, key=lambda named: -named[0].count(".")):
        if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Linear, nn.Embedding)):
            continue
        lists = [
            (f"{path}.{name}", part) for name, part in module.named_modules()
            if isinstance(part, (nn.ModuleList, nn.Sequential)) and len(part) > 3
        ]  # fmt: skip
        if not any(len(_left(name.rstrip("."), part, taken)) > 12 for name, part in lists):
            yield path, module


def _kind(path: str, module: nn.Module, claimed: set[str]) -> tuple[Any, ...]:
    """What two modules have in common whose FFNs are alike: classes, shapes, and numbers such as limits."""
    inside = tuple(sorted(building.pattern(name[len(path) :]) for name in claimed))
    return (building.traits(module), tuple((name, tuple(p.shape)) for name, p in matrices(module)), inside)
