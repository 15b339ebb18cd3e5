"""The tasks that a streamed run consists of: each reads, reduces and writes some FFNs or experts, or copies tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from mlp_fusion.store.disk import DiskFFN, Piece
from mlp_fusion.store.shards import Shard
from mlp_fusion.store.tensors import Plain, Tensors

#: float32 bytes of neurons that one task reads. Small: tasks are what is done side by side, and pages that are used
#: again need not be cleared.
TASK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Part:
    """Some experts of a piece; all of a dense FFN.

    Attributes:
        ffn: number of the FFN among those that are reduced.
        piece: it lies in.
        first, count: which of the piece's experts.
    """

    ffn: int
    piece: Piece
    first: int
    count: int

    @property
    def expert(self) -> int:
        """Number of the first one in the whole stack."""
        return self.piece.first + self.first

    def rows(self, shape: Sequence[int]) -> tuple[int, int | None]:
        """Where its part of a tensor's first axis begins, and how long it is; None for all of it."""
        if self.count == self.piece.experts:
            return 0, None
        each = shape[0] // self.piece.experts
        return self.first * each, self.count * each


@dataclass(frozen=True)
class Task:
    """What is done, and noted as done, at once.

    Attributes:
        name: of the task; unique in a run.
        parts: what is reduced, of one shape and one width.
        copies: tensors that are written as they are.
        nbytes: float32 bytes of the neurons in its parts.
    """

    name: str
    parts: tuple[Part, ...] = ()
    copies: tuple[str, ...] = ()
    nbytes: int = 0


def shards_of(tensors: Tensors, ffns: Sequence[DiskFFN], widths: Sequence[int]) -> list[Shard]:
    """The files to write: those of the source, with the FFNs' tensors narrower and nothing quantised.

    Args:
        tensors: of the source.
        ffns: all of its FFNs.
        widths: of each, afterwards.
    """
    before = tensors.shapes
    shapes = dict(before)
    for ffn, width in zip(ffns, widths, strict=True):
        shapes.update(ffn.narrowed(before, width))
    return [
        Shard(file.name, {name: (tensors[name].dtype, shapes[name]) for name in names}, tensors.metadata[file])
        for file, names in tensors.files.items()
    ]


def tasks_of(
    tensors: Tensors, ffns: Sequence[DiskFFN], widths: Sequence[int], elsewhere: Container[int] = ()
) -> list[Task]:
    """Everything that is to be done, in the order of the layers; what is copied, last.

    Args:
        tensors: of the source.
        ffns: all of its FFNs.
        widths: of each, afterwards; those that keep their width are copied.
        elsewhere: numbers of FFNs that are reduced by something else.
    """
    tasks: list[Task] = []
    waiting: list[Part] = []
    reduced: set[str] = set()

    def close() -> None:
        if waiting:
            first, last = waiting[0], waiting[-1]
            ends = (f"{ffns[part.ffn].path}[{number}]" for part, number in (
                (first, first.expert), (last, last.expert + last.count - 1)))  # fmt: skip
            tasks.append(Task(" to ".join(ends), parts=tuple(waiting), nbytes=size))
            waiting.clear()

    alike: object = None
    size = 0
    for number, (ffn, width) in enumerate(zip(ffns, widths, strict=True)):
        if width == ffn.kind.width:
            continue
        reduced.update(ffn.names)
        for piece in () if number in elsewhere else ffn.pieces:
            each = _bytes(piece, tensors) // piece.experts
            kind = _alike(number, ffn, piece, width, tensors)
            for first, count in _chunks(piece.experts, max(1, TASK_BYTES // each), whole=not _sliced(piece)):
                if waiting and (kind != alike or size + count * each > TASK_BYTES):
                    close()
                if not waiting:
                    alike, size = kind, 0
                waiting.append(Part(number, piece, first, count))
                size += count * each
    close()
    for file, names in tensors.files.items():
        kept = tuple(name for name in names if name not in reduced)
        if kept:
            tasks.append(Task(f"the rest of {file.name}", copies=kept))
    return tasks


def _alike(number: int, ffn: DiskFFN, piece: Piece, width: int, tensors: Mapping[str, Plain]) -> object:
    """What pieces have in common that are reduced side by side; the parts of a stack are not mixed with others'."""
    if piece.experts > 1:
        return number
    laid = tuple(dataclasses.replace(p, parameter="", bias=None) for p in piece.projections)
    return width, ffn.kind.function, laid, tuple((tensors[n].shape, tensors[n].dtype) for n in piece.names)


def _sliced(piece: Piece) -> bool:
    """Whether some of a piece's experts can be read without the others."""
    return all(p.expert_axis == 0 for p in piece.projections)


def _chunks(count: int, most: int, *, whole: bool) -> Iterator[tuple[int, int]]:
    step = count if whole else min(most, count)
    for first in range(0, count, step):
        yield first, min(step, count - first)


def _bytes(piece: Piece, tensors: Mapping[str, Plain]) -> int:
    """Of a piece's tensors in float32."""
    return sum(math.prod(tensors[name].shape) * torch.float32.itemsize for name in piece.names)
