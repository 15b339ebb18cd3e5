"""A checkpoint on disk compared with what its config says, and with its source, without a model in memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlp_fusion.errors import InputError
from mlp_fusion.families import Architecture
from mlp_fusion.measure.errors import relative_error
from mlp_fusion.modules.stored import bundle_of
from mlp_fusion.neurons import UNNAMED, NeuronBundle, all_finite
from mlp_fusion.store.coverage import dropped_layers, gap, meta_model
from mlp_fusion.store.disk import DiskFFN, Piece, disk_ffns
from mlp_fusion.store.naming import Conversion
from mlp_fusion.store.record import architecture_of
from mlp_fusion.store.scale import SCALE_FILE, is_sound, read_scale_file
from mlp_fusion.store.source import read_headers
from mlp_fusion.store.tensors import Span, Tensors, read_into

#: FFNs, or experts, that outputs are compared of; and the random inputs that they get.
_SAMPLED, _ROWS = 8, 64
#: Bytes that are compared at once.
_COMPARED = 16 * 2**20


class Checkpoint:
    """A checkpoint on disk, and where its FFNs lie.

    Args:
        folder: of it.

    Raises:
        InputError: it cannot be read, or lies in a way that is not known.
    """

    def __init__(self, folder: Path) -> None:
        headers = read_headers(folder)
        self.config: Any = headers.config
        self.model = meta_model(self.config)
        self.architecture: Architecture = architecture_of(self.config)
        sites = self.architecture.sites(self.model)
        self.tensors = Tensors(folder, self.config)
        self.ffns: list[DiskFFN] = disk_ffns(self.model, self.architecture, sites, self.tensors.shapes)
        self.ffns += dropped_layers(headers, self.model, self.architecture, sites)


def loading(found: Checkpoint) -> tuple[bool, str]:
    """Whether every parameter of the model is on disk, in its shape; and what was seen."""
    made = Conversion(found.model).made(found.tensors.shapes)
    lost = gap(found.model, made)
    if lost is not None:
        return False, f"{lost} is missing"
    for name, parameter in found.model.named_parameters():
        if name in made and made[name] != parameter.shape:
            return False, f"{name} is {made[name]}, config.json makes it {tuple(parameter.shape)}"
    return True, "every weight has its place; the model was not loaded"


def scales(found: Checkpoint, folder: Path, fused: Sequence[int]) -> tuple[bool, str]:
    """Whether there is a sound scale for each of the `fused` FFNs, by their numbers; and what was seen."""
    file = folder / SCALE_FILE
    if not file.is_file():
        return False, f"{SCALE_FILE} is missing, which fused checkpoints have"
    try:
        held = read_scale_file(file)
    except InputError as error:
        return False, str(error)
    wanted = {
        f"{ffn.path}.{ffn.kind.scale}": (ffn.kind.experts, width) if ffn.kind.experts else (width,)
        for ffn in found.ffns
        if ffn.loaded and ffn.index in fused and (width := _width(found, ffn))
    }
    for name in sorted(wanted.keys() | held.keys()):
        if name not in held or name not in wanted:
            return False, f"{name} is {'missing' if name in wanted else 'of no fused FFN'}"
        if tuple(held[name].shape) != wanted[name] or not is_sound(held[name]) or not bool(held[name].any()):
            return False, f"{name} is of shape {tuple(held[name].shape)}, all zero, or holds numbers that are none"
    return True, f"of {len(held)} FFNs"


def _width(found: Checkpoint, ffn: DiskFFN) -> int:
    """Neurons of an FFN as it stands on disk."""
    return _bundle(found, ffn, ffn.pieces[0], meta=True).width


def unchanged(found: Checkpoint, source: Checkpoint) -> tuple[bool, str]:
    """Whether all tensors but those of narrower FFNs are the source's, bit for bit; and what was seen."""
    if found.tensors.keys() != source.tensors.keys():
        differing = sorted(found.tensors.keys() ^ source.tensors.keys())
        return False, f"{differing[0]} is in one of them only"
    narrow = {
        name
        for ffn in found.ffns
        if any(found.tensors[name].shape != source.tensors[name].shape for name in ffn.names)
        for name in ffn.names
    }
    count = 0
    for name in found.tensors:
        if name in narrow:
            continue
        count += 1
        ours, theirs = found.tensors[name], source.tensors[name]
        if theirs.copied:
            same = ours.shape == theirs.shape and ours.dtype == theirs.dtype and _same(ours.values, theirs.values)
        else:
            same = torch.equal(found.tensors.read(name), source.tensors.read(name))
        if not same:
            return False, f"{name}, which is no fused FFN's, is not the source's"
    return True, f"{count} tensors are the source's, bit for bit"


def _same(a: Span, b: Span) -> bool:
    """Whether two tensors have the same bytes."""
    one, other = (bytearray(min(_COMPARED, a.nbytes)) for _ in range(2))
    for start in range(0, a.nbytes, _COMPARED):
        size = min(_COMPARED, a.nbytes - start)
        for span, buffer in ((a, one), (b, other)):
            read_into(span.file, span.start + start, memoryview(buffer)[:size])
        if one[:size] != other[:size]:
            return False
    return True


def outputs(found: Checkpoint, source: Checkpoint, seed: int = 0) -> tuple[bool, str]:
    """Whether some fused FFNs put out numbers, and not nothing, on random inputs; and how far off they are.

    How much is no test: real inputs are not random, and what is fitted to them may do anything elsewhere.
    """
    errors = []
    for (ffn, piece), (_, original) in _sampled(found, source):
        if ffn.kind.name == UNNAMED:
            continue
        ours = _bundle(found, ffn, piece).to(dtype=torch.float32)
        theirs = _bundle(source, ffn, original).to(dtype=torch.float32)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(_ROWS, theirs.w_in.shape[2], generator=generator, dtype=torch.float32)
        exact, values = theirs.forward(x), ours.forward(x)
        if not all_finite(values) or (bool(exact.any()) and not bool(values.any())):
            return False, f"{ffn.path} puts out nothing, or no numbers, on random inputs"
        errors.append((relative_error(exact, values), ffn.path))
    if not errors:
        return True, "no fused FFN whose function has a name"
    worst, path = max(errors)
    seen = f"relative difference on random inputs up to {worst:.2f} ({path}; {len(errors)} sampled)"
    return True, f"{seen}, which is not judged"


def _sampled(found: Checkpoint, source: Checkpoint) -> Iterator[tuple[tuple[DiskFFN, Piece], tuple[DiskFFN, Piece]]]:
    """Pieces of fused FFNs with the source's, evenly over all."""
    pairs = [
        ((ffn, piece), (origin, before))
        for ffn, origin in zip(found.ffns, source.ffns, strict=True)
        for piece, before in zip(ffn.pieces, origin.pieces, strict=True)
        if found.tensors[piece.names[0]].shape != source.tensors[before.names[0]].shape
    ]
    step = max(1, len(pairs) // _SAMPLED)
    yield from itertools.islice(pairs, 0, None, step)


def _bundle(own: Checkpoint, ffn: DiskFFN, piece: Piece, *, meta: bool = False) -> NeuronBundle:
    tensors: Mapping[str, Tensor] = {
        name: torch.empty(own.tensors[name].shape, device="meta") if meta else own.tensors.read(name)
        for name in piece.names
    }
    whole = bundle_of(tensors, piece.projections, ffn.kind.name, gating=ffn.kind.gating, experts=piece.experts)
    return whole.select(0)
