"""How FFNs lie in the tensors of a checkpoint on disk: found by an experiment with transformers' own conversions.

Many checkpoints store FFNs otherwise than the model has them in memory: an expert's projections apart, gate and up
joined, axes exchanged. transformers converts them when it loads. Instead of a table of those conversions, tensors of
the same structure but of few entries, each of which says where it stands, are sent through them. Where every entry
arrives says how each tensor on disk holds neurons: as a :class:`mlp_fusion.modules.stored.Projection` does in memory.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlp_fusion.errors import InputError
from mlp_fusion.families import Architecture, FFNSite, Kind
from mlp_fusion.families.building import pattern
from mlp_fusion.modules.stored import Projection, bundle_of, parameters_of
from mlp_fusion.neurons import NeuronBundle
from mlp_fusion.store.naming import Conversion

#: Numbers that entries of one tensor may have; float64 holds so many tensors' exactly.
_ENTRIES = 2**32
#: The least number of neurons and channels at which halves and axes can be told apart.
_LEAST = 3


@dataclass(frozen=True)
class Piece:
    """Experts that share tensors on disk: one of them, all of a stack, or a dense FFN.

    Attributes:
        first: number of the first expert.
        experts: how many there are; 1 of a dense FFN.
        projections: where they lie, by the full names of the unquantised tensors.
    """

    first: int
    experts: int
    projections: tuple[Projection, ...]

    @property
    def names(self) -> list[str]:
        """The tensors, each once, biases too."""
        return parameters_of(self.projections)


@dataclass(frozen=True)
class DiskFFN:
    """An FFN, or a stack of experts, on disk.

    Attributes:
        index, path, kind: of its site; of layers that transformers does not load, the path on disk.
        pieces: its experts, in order.
        loaded: whether transformers loads it; layers for multi-token prediction are left out.
    """

    index: int
    path: str
    kind: Kind
    pieces: tuple[Piece, ...]
    loaded: bool = True

    @property
    def names(self) -> list[str]:
        """Its tensors on disk, by the names of the unquantised ones."""
        return [name for piece in self.pieces for name in piece.names]

    def narrowed(self, shapes: Mapping[str, tuple[int, ...]], width: int) -> dict[str, tuple[int, ...]]:
        """The shapes of its tensors when it has `width` neurons.

        Args:
            shapes: of them, or of all.
            width: of one expert.
        """
        found = {name: shapes[name] for name in self.names}
        for p in (projection for piece in self.pieces for projection in piece.projections):
            axes = {p.parameter: p.neuron_axis}
            if p.bias is not None and p.role != "w_out":
                axes[p.bias] = len(shapes[p.bias]) - 1
            for name, axis in axes.items():
                size = shapes[name][axis] // self.kind.width * width
                found[name] = (*shapes[name][:axis], size, *shapes[name][axis + 1 :])
        return found


def disk_ffns(
    model: Any, architecture: Architecture, sites: Sequence[FFNSite], shapes: Mapping[str, tuple[int, ...]]
) -> list[DiskFFN]:
    """Where the FFNs of a checkpoint lie on disk.

    Args:
        model: on the meta device.
        architecture: its.
        sites: its FFNs.
        shapes: of the unquantised tensors on disk, by name.

    Raises:
        InputError: an FFN lies in a way that cannot be read and written tensor by tensor.
    """
    conversion = Conversion(model)
    held: dict[str, list[str]] = {}
    for name in shapes:
        for parameter in conversion.parameters(name):
            held.setdefault(parameter, []).append(name)
    known: dict[tuple[object, ...], tuple[tuple[Piece, ...], list[str]]] = {}
    found: list[DiskFFN] = []
    offered: set[str] = set()
    for site in sites:
        names = sorted({n for below in site.kind.parameters for n in held.get(_join(site.path, below), ())}, key=_order)
        alike = (id(site.kind), tuple((pattern(name), shapes[name]) for name in names))
        if alike not in known:
            known[alike] = _learnt(conversion, site, names, shapes), names
        pieces, first = known[alike]
        renamed = dict(zip(first, names, strict=True))
        found.append(DiskFFN(site.index, site.path, site.kind, tuple(_renamed(piece, renamed) for piece in pieces)))
        offered.update(names)
    # Experts of two kinds may lie in one list on disk: each has one owner.
    owners = Counter(name for ffn in found for name in ffn.names)
    for name in sorted(offered):
        if owners[name] != 1:
            raise InputError(
                f"{name} is a part of {owners[name]} FFNs: load the model, fuse it, and save it, as only whole FFNs of "
                "their own can be streamed"
            )
    return found


def _join(path: str, below: str) -> str:
    return f"{path}.{below}" if path else below


def _order(name: str) -> tuple[tuple[int, str], ...]:
    """Names in the order of their numbers."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in name.split("."))


def _renamed(piece: Piece, names: Mapping[str, str]) -> Piece:
    projections = tuple(
        Projection(names[p.parameter], p.role, p.part, p.neuron_axis, p.expert_axis, p.bias and names[p.bias])
        for p in piece.projections
    )
    return Piece(piece.first, piece.experts, projections)


# --- the experiment ---------------------------------------------------------------------------------------------------


def _learnt(
    conversion: Conversion, site: FFNSite, names: Sequence[str], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Piece, ...]:
    """How an FFN lies in the tensors `names`."""
    kind, experts = site.kind, max(site.kind.experts, 1)
    own = {_join(site.path, below): tuple(site.module.get_parameter(below).shape) for below in kind.parameters}
    shrunk = _shrinking([*(shapes[name] for name in names), *own.values()], kind)
    small = {name: shrunk(shapes[name]) for name in names}
    tags = {name: _tagged(number, shape) for number, (name, shape) in enumerate(small.items())}
    try:
        made = conversion.convert(tags, {name: shrunk(shape) for name, shape in own.items()})
        arrived = {below: made[_join(site.path, below)] for below in kind.parameters}
        whole = _bundle(arrived, kind.projections, kind, experts)
        each = [tuple(_projection(whole, kind, e, p, small) for p in kind.projections) for e in range(experts)]
        pieces = _pieces(each)
        if not _same(whole, pieces, tags):
            raise LookupError
    except (LookupError, ValueError, RuntimeError, StopIteration) as error:
        damage = _damage(kind, names, shapes)
        if damage is not None:
            raise InputError(f"{damage}: the checkpoint is damaged, fetch it again") from error
        raise InputError(
            f"{site.path}: its tensors on disk ({', '.join(list(names)[:3])}...) become its parameters in a way that "
            "cannot be undone tensor by tensor: load the model, fuse it, and save it"
        ) from error
    return pieces


def _damage(kind: Kind, names: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Which tensor of an FFN is of another shape than its likes, or which expert has none, where there is one."""
    alike: dict[str, dict[int, str]] = {}
    for name in names:
        # The last number is the expert's, where each has a tensor of its own.
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        alike.setdefault(pattern(name), {})[numbers[-1] if numbers else 0] = name
    several = any(len(likes) > 1 for likes in alike.values())
    for likes in alike.values():
        usual = Counter(shapes[name] for name in likes.values()).most_common(1)[0][0]
        odd = [name for name in likes.values() if shapes[name] != usual]
        # More of them may be of another kind.
        if len(odd) == 1 and len(likes) > 2:
            return f"{odd[0]} is {shapes[odd[0]]}, and its likes are {usual}"
        lost = next((number for number in range(kind.experts) if number not in likes), None)
        if several and lost is not None:
            return f"expert {lost} has no tensor beside {next(iter(likes.values()))}"
    return None


def _shrinking(shapes: Sequence[tuple[int, ...]], kind: Kind) -> Callable[[tuple[int, ...]], tuple[int, ...]]:
    """Makes shapes of few entries, in the same proportions; axes that count experts, or nothing, stay."""

    def stays(shape: Sequence[int], axis: int) -> bool:
        return shape[axis] == 1 or (len(shape) > 1 and axis == 0 and shape[0] == kind.experts)

    sizes = [kind.width, *(n for shape in shapes for axis, n in enumerate(shape) if not stays(shape, axis))]
    divisor = math.gcd(*sizes)
    factor = math.ceil(_LEAST / (min(sizes) // divisor))
    return lambda shape: tuple(n if stays(shape, axis) else n // divisor * factor for axis, n in enumerate(shape))


def _tagged(number: int, shape: tuple[int, ...]) -> Tensor:
    count = math.prod(shape)
    return torch.arange(count, dtype=torch.float64).reshape(shape) + number * _ENTRIES


def _bundle(tensors: Mapping[str, Tensor], projections: Sequence[Projection], kind: Kind, experts: int) -> NeuronBundle:
    return bundle_of(tensors, projections, kind.name, gating=kind.gating, experts=experts)


def _projection(
    whole: NeuronBundle, kind: Kind, expert: int, p: Projection, shapes: Mapping[str, tuple[int, ...]]
) -> Projection:
    """Where a projection of one expert lies on disk."""
    name, axes = _places(getattr(whole, p.role)[expert], shapes)
    moving = [axis for axis, index in enumerate(axes) if bool((index[0] != index[1]).any())]
    (neuron,) = moving
    places = axes[neuron][:, 0]
    # In one tensor with the other experts, perhaps.
    last, _ = _places(getattr(whole, p.role)[kind.experts - 1 if expert == 0 else 0], shapes)
    part, flat = _part(places, shapes[name][neuron], kind.experts if last == name else 1, expert)
    bias = None
    if p.bias is not None:
        values = getattr(whole, p.role.replace("w_", "b_"))[expert]
        bias, _ = _places(values, shapes)
    stacked = len(shapes[name]) > 1 and neuron != 0 and kind.experts > 0 and bool((axes[0] == expert).all())
    stacked = stacked and shapes[name][0] == kind.experts
    axis = neuron if flat else 0 if stacked else None
    return Projection(name, p.role, part, neuron, axis, bias)


def _places(tags: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, tuple[Tensor, ...]]:
    """The tensor that the entries come from, and where in it each has stood."""
    numbers = tags.long() // _ENTRIES
    if bool((numbers != numbers.flatten()[0]).any()):
        raise LookupError
    name = list(shapes)[int(numbers.flatten()[0])]
    return name, torch.unravel_index(tags.long() % _ENTRIES, shapes[name])


def _part(places: Tensor, size: int, experts: int, expert: int) -> tuple[str, bool]:
    """Which half of an axis neurons take; and whether the axis holds experts one after another."""
    count, first = len(places), int(places[0])
    step = int(places[1]) - first
    if step == 2 and size == 2 * count:
        return ("even", "odd")[first], False
    if step != 1:
        raise LookupError
    if experts > 1 and size == experts * count and first == expert * count:
        return "whole", True
    if size == count:
        return "whole", False
    if size != 2 * count:
        raise LookupError
    return ("first" if first == 0 else "second"), False


def _pieces(each: Sequence[tuple[Projection, ...]]) -> tuple[Piece, ...]:
    """Experts that share all of their tensors are one piece."""
    if len(each) > 1 and all(one == each[0] for one in each):
        return (Piece(0, len(each), each[0]),)
    names = [name for one in each for name in parameters_of(one)]
    if len(names) != len(set(names)):
        raise LookupError
    return tuple(Piece(number, 1, one) for number, one in enumerate(each))


def _same(whole: NeuronBundle, pieces: Iterable[Piece], tags: Mapping[str, Tensor]) -> bool:
    """Whether the tensors on disk, read by the pieces, are what arrives in memory."""
    read = [
        bundle_of(tags, piece.projections, whole.activation, gating=whole.gating, experts=piece.experts)
        for piece in pieces
    ]
    again = NeuronBundle.stack(read)
    ours, theirs = again.named(), whole.named()
    return ours.keys() == theirs.keys() and all(
        ours[name].shape == theirs[name].shape and torch.equal(ours[name], theirs[name]) for name in ours
    )


# --- layers that transformers does not load ---------------------------------------------------------------------------


def dropped_ffns(model: Any, ffns: Sequence[DiskFFN], shapes: Mapping[str, tuple[int, ...]]) -> list[DiskFFN]:
    """FFNs on disk that have no place in the model, but the names and shapes of one that has: engines load them.

    Those are layers for multi-token prediction, which engines build by the config of the others.

    Args:
        model: on the meta device.
        ffns: those that have a place.
        shapes: of all unquantised tensors on disk, by name.
    """
    conversion = Conversion(model)
    strays = {name for name in shapes if conversion.place(name) is None}
    found: dict[tuple[str, int], DiskFFN] = {}
    # The last one of each kind stands for it.
    for template in {(id(ffn.kind), len(ffn.names)): ffn for ffn in ffns if ffn.names}.values() if strays else ():
        layer = _layer(template.names)
        below = [name.removeprefix(layer) for name in template.names]
        for stray in strays:
            prefix = stray.removesuffix(below[0])
            renamed = {name: f"{prefix}{end}" for name, end in zip(template.names, below, strict=True)}
            if prefix == stray or any(shapes.get(new) != shapes[old] for old, new in renamed.items()):
                continue
            path = f"{prefix}{_stem(template.names).removeprefix(layer)}"
            pieces = tuple(_renamed(piece, renamed) for piece in template.pieces)
            found[path, len(below)] = DiskFFN(template.index, path, template.kind, pieces, loaded=False)
    return [found[key] for key in sorted(found)]


def unknown_strays(model: Any, ffns: Iterable[DiskFFN], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Tensors on disk without a place in the model that are neither of `ffns` nor like one that has a place."""
    conversion = Conversion(model)
    placed = {name for name in shapes if conversion.place(name) is not None}
    owned = {name for ffn in ffns for name in ffn.names}
    known = {(name.removeprefix(layer), shapes[name]) for name in placed - owned if (layer := _layer([name]))}
    return [
        name
        for name in shapes
        if name not in placed and name not in owned and (name.removeprefix(_layer([name])), shapes[name]) not in known
    ]


def _stem(names: Sequence[str]) -> str:
    """What all names begin with, to a dot."""
    parts = [name.split(".") for name in names]
    same = 0
    while all(len(own) - 1 > same and own[same] == parts[0][same] for own in parts):
        same += 1
    return ".".join(parts[0][:same])


def _layer(names: Sequence[str]) -> str:
    """The layer that names stand in, to the last number that all have in common; empty if there is none."""
    stem = _stem(names).split(".")
    numbers = [place for place, part in enumerate(stem) if part.isdigit()]
    return ".".join(stem[: numbers[-1] + 1]) if numbers else ""
