"""From units that were proved to a description: sites, their keys, and who moves what nobody owns."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from mlp_fusion.families.building import first_names, pattern, shapes, traits
from mlp_fusion.families.catalogue import KNOWN_REFUSALS
from mlp_fusion.families.keys import Keys, Move
from mlp_fusion.families.probe import Log
from mlp_fusion.families.sites import Description, Proof, Refusal, SetApart, Site, WidthKey, in_groups

if TYPE_CHECKING:
    from mlp_fusion.families.describe import Unit

_NO_ACTIVATION = "no activation lies between: a low-rank pair, such as an adapter's or a factorised projection's"
_CONVOLUTION = "a convolution: a neuron sees several positions"
_BLOCK = "pointwise convolutions of a convolutional block, with a function between them that has no name"
_BOTTLENECK = "a bottleneck beside a wider FFN of the same layer, such as an adapter's or a gate's"
_SQUEEZE = "convolutions to fewer channels, as in squeeze and excitation"
_HEAD = "a projector or a head: it stands in no list of layers, or its outputs are not as many as its inputs"
_NO_KEY = "its width is hard-coded: no config key moves it"
#: How many names of parameters a key that moves too much is recorded with.
_MOST_NAMES = 4


@dataclass(frozen=True)
class Claim:
    """Units that are one kind of FFN in the user's model.

    Attributes:
        unit: one of them.
        paths: all of them, each parameter once.
        shared: paths of further modules with the same parameters.
        width: neurons of one expert.
        d_in, d_out, experts: as in `Site`.
        reason: why it is no FFN, or None.
    """

    unit: Unit
    paths: tuple[str, ...]
    shared: tuple[str, ...]
    width: int
    d_in: int
    d_out: int
    experts: int
    reason: str | None

    @property
    def names(self) -> set[str]:
        """Names of all of its parameters."""
        inside = {n for p in self.unit.projections for n in (p.parameter, p.bias) if n is not None}
        return {f"{path}.{name}" for path in self.paths for name in inside | set(self.unit.found.names)}

    @property
    def axes(self) -> dict[str, int]:
        """Parameter -> neuron axis, of all projections."""
        return {f"{path}.{p.parameter}": p.neuron_axis for path in self.paths for p in self.unit.projections}


def claims(
    units: Sequence[Unit], small: nn.Module, model: nn.Module, experts: dict[str, int], moves: Sequence[Move]
) -> list[Claim]:
    """Gather units of one kind, with the widths that they have in the user's model.

    Args:
        units: of the small model.
        small, model: the small model and the user's, on the meta device.
        experts: parameter pattern -> number of experts of a stack on one axis.
        moves: of likely width keys.
    """
    sizes, first = shapes(model), first_names(model)
    others = [name for name in first if first[name] != name]
    kinds: dict[Any, list[Unit]] = {}
    for unit in units:
        kinds.setdefault(_alike(unit, sizes, first), []).append(unit)
    made = []
    for alike in kinds.values():
        unit = alike[0]
        paths = _everywhere(alike, kinds, small, model, first)
        name = unit.found.output.parameter
        own = [path for path in paths if first.get(f"{path}.{name}") == f"{path}.{name}"]
        size = sizes[first[f"{paths[0]}.{name}"]]
        stack = _stack(unit, size, experts.get(pattern(f"{paths[0]}.{name}"), 1))
        d_in, d_out = unit.found.inputs[0].n_in, unit.found.output.n_out
        shared = [path for path in paths if path not in own]
        # In a module of another kind, perhaps: a decoder that is tied to an encoder.
        shared += [other.removesuffix(f".{name}") for other in others if first[other].removesuffix(f".{name}") in own]
        made.append(Claim(unit, tuple(own), tuple(dict.fromkeys(shared)), stack[0], d_in, d_out, stack[1], None))
    made = [claim for claim in made if claim.paths]
    widest = _widest(made, sizes, moves)
    moved = {name for move in moves if move.pure for name in move.axes}
    return [dataclasses.replace(claim, reason=_no_ffn(claim, widest, moved)) for claim in made]


def _widest(made: list[Claim], sizes: dict[str, tuple[int, ...]], moves: Sequence[Move]) -> dict[str, int]:
    """Path of a layer -> the largest width in it: of what was found, and of what likely width keys move."""
    widest: dict[str, int] = {}
    found = [(path, claim.width) for claim in made for path in claim.paths if claim.d_in == claim.d_out]
    for move in moves:
        if move.pure:
            found += [(name, sizes[name][axes[0]]) for name, axes in move.axes.items() if axes and len(sizes[name]) > 1]
    for path, width in found:
        widest[_layer(path)] = max(widest.get(_layer(path), 0), width)
    return widest


def _alike(unit: Unit, sizes: dict[str, tuple[int, ...]], first: dict[str, str]) -> tuple[Any, ...]:
    found = unit.found
    shape = sizes.get(first[f"{unit.path}.{found.output.parameter}"])
    return (pattern(unit.path), unit.module, unit.projections, found.identified.function, tuple(found.names), shape)


def _everywhere(
    alike: list[Unit], kinds: dict[Any, list[Unit]], small: nn.Module, model: nn.Module, first: dict[str, str]
) -> list[str]:
    """Paths of all modules of a kind in the user's model.

    They are those of the small model, further names of the same parameters, and the experts of a list that are missing
    in the small model, provided that nothing else was found at their like.
    """
    unit = alike[0]
    paths = {one.path: None for one in alike}
    own = {f"{path}.{name}" for path in paths for name in unit.found.names}
    rivals = {key[:4] for key in kinds if key[:2] == (pattern(unit.path), unit.module)}
    probed = dict(small.named_modules())
    same = traits(probed[unit.path], numbers=False)
    for path, module in model.named_modules(remove_duplicate=False):
        if path in paths or pattern(path) != pattern(unit.path) or type(module).__name__ != unit.module:
            continue
        names = [f"{path}.{name}" for name in unit.found.names]
        if not all(name in first for name in names):
            continue
        shared = all(first[name] in own and first[name] != name for name in names)
        further = path not in probed and len(rivals) == 1 and traits(module, numbers=False) == same
        if shared or further:
            paths[path] = None
    return list(paths)


def _stack(unit: Unit, size: tuple[int, ...], flat: int) -> tuple[int, int]:
    """Neurons of one expert in the user's model, and experts.

    Args:
        unit: an FFN or a stack of experts.
        size: of its output projection's parameter there.
        flat: experts of a stack on one axis.
    """
    if not unit.projections:
        return unit.found.output.n_in, 0
    last = unit.projections[-1]
    if last.expert_axis is None:
        return size[last.neuron_axis], 0
    if last.expert_axis == last.neuron_axis:
        return size[last.neuron_axis] // flat, flat
    return size[last.neuron_axis], size[last.expert_axis]


def _layer(path: str) -> str:
    """The path up to its last number: the layer that a module stands in."""
    found = re.match(r".*(?:^|\.)\d+(?=\.|$)", path)
    return found[0] if found else path


def _layers(path: str) -> list[str]:
    """The paths up to each of its numbers: the layers that a module stands in, one inside the other."""
    return [path[: found.end()] for found in re.finditer(r"(?:^|(?<=\.))\d+(?=\.|$)", path)]


def _no_ffn(claim: Claim, widest: dict[str, int], moved: set[str]) -> str | None:
    """The rule by which two projections with a function between them are no FFN, or None.

    Args:
        claim: they.
        widest: the largest width in each layer.
        moved: what likely width keys move: no adapters and gates.
    """
    found = claim.unit.found
    if not all(product.pointwise for product in (*found.inputs, found.output)):
        return _CONVOLUTION
    if found.output.operation == "conv" and found.identified.act is None and not claim.names & moved:
        return _BLOCK
    if found.identified.function.activation == "identity" and found.identified.function.form == "plain":
        return _NO_ACTIVATION
    if _experts(claim):
        return None
    path = claim.paths[0]
    if not re.search(r"(^|\.)\d+(\.|$)", path) or claim.d_in != claim.d_out:
        return _HEAD
    if found.output.operation == "conv" and claim.width < claim.d_in:
        return _SQUEEZE
    beside = max((widest.get(layer, 0) for layer in _layers(path)), default=0)
    narrow = 2 * claim.width < claim.d_in and 2 * claim.width <= beside
    if narrow and not claim.names & moved:
        return _BOTTLENECK
    return None


def _experts(claim: Claim) -> bool:
    stacked = any(p.expert_axis is not None for p in claim.unit.projections)
    return stacked or re.search(r"(?<!shared_)experts?(\.|$|_\d)", claim.paths[0]) is not None


def _kind(claim: Claim) -> str:
    last = f"{claim.paths[0].rpartition('.')[2]}.{claim.unit.found.output.parameter}"
    if "shared" in last:
        return "shared"
    return "experts" if _experts(claim) else "dense"


# --- keys and coverage ----------------------------------------------------------------------------------------------


def described(
    model_type: str, model_class: str, found: list[Claim], keys: Keys, moves: list[Move], logs: list[tuple[str, Log]]
) -> Description:
    """The description: sites with their keys and groups; refusals for what keys move and nobody owns.

    Args:
        model_type, model_class: of the model.
        found: every claim.
        keys: experiments with the config.
        moves: those with likely widths.
        logs: path of a module -> what was seen there and was no FFN.
    """
    proved = [claim for claim in found if claim.reason is None and claim.unit.found.proved]
    owned = {name for claim in proved for name in claim.names}
    chosen = [_keys_of(claim, keys, moves, owned) for claim in proved]
    heads = _moved_along(found, chosen, keys)
    if heads:
        proved += heads
        owned |= {name for claim in heads for name in claim.names}
        chosen = [_keys_of(claim, keys, moves, owned) for claim in proved]
    apart = [claim for claim in found if claim.reason is not None and claim not in heads]
    primary = [best[0].path if best else None for best in chosen]
    groups = in_groups(primary)
    sites = [_site(*three) for three in zip(proved, chosen, groups, strict=True)]
    refused = _refusals(found, apart, owned, keys, moves, primary, logs)
    return Description(
        model_type,
        model_class,
        tuple(sorted(sites, key=lambda site: site.instances[0])),
        refused,
        tuple(
            SetApart(pattern(claim.paths[0]), tuple(claim.unit.found.names), claim.reason or "")
            for claim in apart
        ),
    )  # fmt: skip


def _refusals(
    found: list[Claim],
    apart: list[Claim],
    owned: set[str],
    keys: Keys,
    moves: list[Move],
    primary: list[str | None],
    logs: list[tuple[str, Log]],
) -> tuple[Refusal, ...]:
    """What width keys move and nobody owns, and what has the shapes of an FFN but mixes its neurons."""
    known = {name for claim in apart for name in claim.names} | owned
    refused: dict[str, Refusal] = {}
    errors = {n: c.unit.found.error for c in found if c.reason is None and not c.unit.found.proved for n in c.names}
    chosen = [move for path in keys.leaves_of(primary) if (move := keys.move(path)) is not None]
    seen: set[str] = set()

    def refuse(name: str, key: str | None) -> None:
        if name in seen:
            return
        seen.add(name)
        old = refused.get(pattern(name)) or Refusal(pattern(name), 0, key, _reason(name, errors, apart, logs))
        refused[pattern(name)] = dataclasses.replace(old, count=old.count + 1)

    for move in (*moves, *chosen):
        # What one of the FFNs' own keys moves must all be owned; of other keys, matrices that are nothing else.
        strict = move.key in primary
        for name in move.axes:
            if name not in owned and (strict or not (name in known or len(keys.base[name]) < 2 or not move.pure)):
                refuse(name, move.key)
    for path, log in logs:
        mixed = {pattern(f"{path}.{name}") for pair in log.mixed for name in pair}
        for name in keys.base if mixed else ():
            if pattern(name) in mixed and name not in known:
                refuse(name, None)
    return tuple(sorted(refused.values(), key=lambda refusal: refusal.parameter))


def _moved_along(found: list[Claim], chosen: list[list[WidthKey]], keys: Keys) -> list[Claim]:
    """Proved heads whose neurons a key of an FFN moves: they shrink together, and are FFNs in all but their place."""
    moves = [keys.move(path) for path in keys.leaves_of(best[0].path for best in chosen if best)]
    return [
        claim
        for claim in found
        if claim.reason == _HEAD and claim.unit.found.proved
        and any(move is not None and _as_key(claim, move, set()) is not None for move in moves)
    ]  # fmt: skip


def _keys_of(claim: Claim, keys: Keys, moves: list[Move], owned: set[str]) -> list[WidthKey]:
    """Keys that move all neuron axes of a claim, the best first; unlikely ones are tried where likely ones fail."""
    clean = [key for move in moves if (key := _as_key(claim, move, owned)) is not None and not key.also_moves]
    if clean:
        return sorted(clean, key=lambda key: _rank(key, claim))
    found = []
    for path in keys.explaining(claim.width, claim.d_in):
        move = keys.move(path)
        key = None if move is None else _as_key(claim, move, owned)
        if key is not None:
            found.append(key)
            if not key.also_moves:
                break
    best = [key for key in found if not key.also_moves]
    return best or sorted(found, key=lambda key: len(key.also_moves))[:1]


def _rank(key: WidthKey, claim: Claim) -> tuple[bool, bool]:
    numbers = key.value if isinstance(key.value, list) else [key.value]
    return (claim.width not in numbers, key.kind != "int")


def _as_key(claim: Claim, move: Move, owned: set[str]) -> WidthKey | None:
    """The key, if it moves the neuron axes of all of a claim's projections and no other axis of them."""
    if any(move.axes.get(name) != (axis,) for name, axis in claim.axes.items()):
        return None
    others = sorted({pattern(name) for name in move.axes if name not in owned})
    others += [] if move.same_names else ["(parameters that come or go)"]
    return WidthKey(move.key, move.kind, move.value, tuple(others))


def _site(claim: Claim, found: list[WidthKey], group: int) -> Site:
    unit, one = claim.unit, claim.unit.found
    assert one.error is not None
    unsaved = None
    if not found:
        unsaved = _NO_KEY
    elif found[0].also_moves:
        others = ", ".join(found[0].also_moves[:_MOST_NAMES])
        count = len(found[0].also_moves)
        unsaved = f"no config key moves its width alone: {found[0].path} also moves {others}" + (
            f" and {count - _MOST_NAMES} more" if count > _MOST_NAMES else ""
        )
    return Site(
        path=pattern(claim.paths[0]),
        instances=tuple((path, _number(path)) for path in claim.paths),
        shared=claim.shared,
        kind=_kind(claim),
        module=unit.module,
        width=claim.width,
        d_in=claim.d_in,
        d_out=claim.d_out,
        projections=unit.projections,
        function=one.identified.function,
        width_keys=tuple(dataclasses.replace(key, also_moves=key.also_moves[:_MOST_NAMES]) for key in found),
        group=group,
        own_module=one.own_module,
        proof=Proof(one.error, one.call, dict(one.experts)),
        unsaved=unsaved,
        experts=claim.experts,
    )


def _number(path: str) -> int:
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
    return int(found[1]) if found else 0


def _reason(name: str, errors: dict[str, float | None], apart: list[Claim], logs: list[tuple[str, Log]]) -> str:
    """Why nobody owns a parameter: what is known to stand there, and what the probe saw."""
    seen = _seen(name, errors, apart, logs)
    known = next((words for where, words in KNOWN_REFUSALS if re.search(where, name)), None)
    return seen if known is None else f"{known}: {seen}"


def _seen(name: str, errors: dict[str, float | None], apart: list[Claim], logs: list[tuple[str, Log]]) -> str:
    """Why nobody owns a parameter, as the probe saw it."""
    if name in errors:
        error = errors[name]
        how = "could not be rebuilt" if error is None else f"differs by {error:.1e} when rebuilt from its parameters"
        return f"the output of its FFN {how}"
    for claim in apart:
        if name in claim.names:
            return claim.reason or ""
    problem = None
    for path, log in logs:
        inside = pattern(name).removeprefix(f"{pattern(path)}.")
        if inside == pattern(name):
            continue
        for parameter, reason in log.reasons.items():
            if pattern(parameter) == inside:
                return reason
        problem = problem or log.problem
    return f"its module could not be run: {problem}" if problem else "no product with it was seen"
