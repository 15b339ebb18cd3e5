"""Safetensors files that are written in any order: their headers and sizes stand before the first tensor does.

So several tasks write to one file, a task that was killed is done once more and writes the same bytes to the same
place, and no more than what a task holds has to be in memory.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mlp_fusion.errors import InputError
from mlp_fusion.store.tensors import DTYPES, Span

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
#: Safetensors files start with the length of their header; what follows it is aligned to this.
_ALIGNED = 8


@dataclass(frozen=True)
class Shard:
    """A file to write.

    Attributes:
        name: of the file.
        tensors: name -> dtype and shape, in the order in which they lie.
        metadata: of the header.
    """

    name: str
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    metadata: Mapping[str, str] | None = None

    @property
    def header(self) -> bytes:
        """What stands before the tensors."""
        content: dict[str, object] = {} if self.metadata is None else {"__metadata__": dict(self.metadata)}
        place = 0
        for name, (dtype, shape) in self.tensors.items():
            end = place + math.prod(shape) * dtype.itemsize
            content[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [place, end]}
            place = end
        text = json.dumps(content, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNED)
        return len(text).to_bytes(8, "little") + text

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in self.tensors.values())


class Shards:
    """Files in a folder, to write tensors to.

    Args:
        folder: of the files.
        shards: what they hold.
    """

    def __init__(self, folder: Path, shards: Iterable[Shard]) -> None:
        self.folder = folder
        self.shards = list(shards)
        self._spans: dict[str, Span] = {}
        for shard in self.shards:
            place = len(shard.header)
            for name, (dtype, shape) in shard.tensors.items():
                self._spans[name] = Span(folder / shard.name, place, _NAMES[dtype], shape)
                place += self._spans[name].nbytes

    def __getitem__(self, name: str) -> Span:
        return self._spans[name]

    def create(self) -> None:
        """Make the files, of their full size.

        Raises:
            InputError: there is no room.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        needed = sum(len(shard.header) + shard.nbytes for shard in self.shards)
        stats = os.statvfs(self.folder)
        free = stats.f_bavail * stats.f_frsize
        if needed > free:
            raise InputError(
                f"{self.folder.parent}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free: make room, "
                "or choose another disk"
            )
        for shard in self.shards:
            unfinished = self.folder / f"{shard.name}.new"
            unfinished.parent.mkdir(parents=True, exist_ok=True)
            with unfinished.open("wb") as handle:
                handle.write(shard.header)
                handle.truncate(len(shard.header) + shard.nbytes)
            unfinished.rename(self.folder / shard.name)
        # Their names too: a journal must not outlive what it speaks of.
        flush([(self.folder / shard.name).parent for shard in self.shards])

    def check(self) -> None:
        """Raise InputError unless the files are there, as they were made."""
        for shard in self.shards:
            file, header = self.folder / shard.name, shard.header
            whole = file.is_file() and file.stat().st_size == len(header) + shard.nbytes
            if whole:
                with file.open("rb") as handle:
                    whole = handle.read(len(header)) == header
            if not whole:
                raise InputError(f"{file}, of the unfinished run, is missing or damaged: start again with --force")

    def write(self, name: str, tensor: Tensor, first: int = 0) -> Path:
        """Write a tensor, or entries of its first axis from `first` on, to its place.

        Returns:
            The file, which has not been flushed to the disk.
        """
        span = self._spans[name]
        dtype = DTYPES[span.dtype]
        data = tensor.detach().to("cpu", dtype).contiguous()
        row = math.prod(span.shape[1:]) * dtype.itemsize
        assert data.nbytes == span.nbytes or data.shape[1:] == span.shape[1:], f"{name} is {tuple(data.shape)}"
        self.put(name, data.reshape(-1).view(torch.uint8).numpy().data, first * row)
        return span.file

    def put(self, name: str, data: memoryview, start: int = 0) -> None:
        """Write bytes of a tensor, from its byte `start` on."""
        span = self._spans[name]
        assert start + len(data) <= span.nbytes, f"{name} has no room for them"
        handle = os.open(span.file, os.O_WRONLY)
        try:
            done = 0
            while done < len(data):
                done += os.pwrite(handle, data[done:], span.start + start + done)
        finally:
            os.close(handle)


def flush(files: Iterable[Path]) -> None:
    """Have what was written to files, or entries of folders, on the disk."""
    for file in sorted(set(files)):
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
