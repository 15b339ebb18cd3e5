"""The tensors of a checkpoint, read one by one or in parts, quantised ones as plain ones.

Files are read by position rather than mapped: what was read and let go does not stay in the process.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlp_fusion.errors import InputError
from mlp_fusion.neurons import all_finite
from mlp_fusion.store.quantised import plain_names, quantisation, unpacked
from mlp_fusion.store.weights import COMPUTING, LENGTH, find_weights, read_header

#: Every dtype that safetensors files are read and written in here.
DTYPES: dict[str, torch.dtype] = {
    **COMPUTING, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool,
}  # fmt: skip
_FP8 = ("F8_E4M3", "F8_E5M2")
#: Values of the 4-bit floats of MXFP4, by their bits.
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclass(frozen=True)
class Span:
    """Where a tensor lies: its file, the first byte in it, its dtype and shape."""

    file: Path
    start: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def spans(file: Path) -> tuple[dict[str, Span], dict[str, str] | None]:
    """Where the tensors of a safetensors file lie, in the order of their places; and the file's metadata.

    Raises:
        InputError: it is damaged or cut short, or holds a dtype that torch has not.
    """
    size = file.stat().st_size
    header, length = read_header(file)
    try:
        metadata = header.pop("__metadata__", None)
        begin = LENGTH + length
        found = {
            name: Span(file, begin + int(entry["data_offsets"][0]), entry["dtype"], tuple(map(int, entry["shape"])))
            for name, entry in sorted(header.items(), key=lambda pair: pair[1]["data_offsets"])
        }
        for name, span in found.items():
            if span.dtype not in DTYPES:
                raise InputError(f"{file}: {name} is stored as {span.dtype}, which torch has not")
            begin_of, end = header[name]["data_offsets"]
            if end - begin_of != span.nbytes or begin + end > size:
                raise ValueError(f"{name} does not lie in it")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise InputError(f"{file}: damaged or cut short ({error}): fetch it again") from error
    return found, metadata


@dataclass(frozen=True)
class Plain:
    """A tensor as it is when nothing is quantised.

    Attributes:
        shape, dtype: of it.
        values: where it lies, or its quantised values do.
        factors: where what those are multiplied with lies, or None.
        block: rows and columns that share a factor.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    values: Span
    factors: Span | None = None
    block: tuple[int, ...] = ()

    @property
    def copied(self) -> bool:
        """Whether it is stored as it is."""
        return self.factors is None


class Tensors(Mapping[str, Plain]):
    """The tensors of a local checkpoint, by their names in the unquantised original, file by file.

    Args:
        folder: of the checkpoint.
        config: its config.

    Raises:
        InputError: a file is damaged, or weights are quantised in a way that is not known.
    """

    def __init__(self, folder: Path, config: Any) -> None:
        self.files: dict[Path, list[str]] = {}
        self.metadata: dict[Path, dict[str, str] | None] = {}
        stored: dict[str, Span] = {}
        for file in find_weights(folder).files:
            found, self.metadata[file] = spans(file)
            stored.update(found)
        method, dtype, block = quantisation(config), _dtype_of(config), _block_of(config)
        parts: dict[str, list[str]] = {}
        for name, plain in plain_names(config, stored).items():
            parts.setdefault(plain, []).append(name)
        self._plain: dict[str, Plain] = {}
        for plain, names in parts.items():
            found_plain = _plain(plain, names, stored, method, dtype, block)
            self._plain[plain] = found_plain
            self.files.setdefault(found_plain.values.file, []).append(plain)

    def __getitem__(self, name: str) -> Plain:
        return self._plain[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._plain)

    def __len__(self) -> int:
        return len(self._plain)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors, by name."""
        return {name: plain.shape for name, plain in self._plain.items()}

    def read(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """A tensor, or `count` entries of its first axis from `first` on.

        Raises:
            InputError: its file has become shorter.
        """
        plain = self[name]
        values = _read(plain.values, first, count)
        if plain.factors is None:
            return values
        if plain.values.dtype == "U8":
            return _from_mxfp4(values, _read(plain.factors, first, count), plain.dtype)
        assert count is None, "blocks are read whole"
        return _from_blocks(values, _read(plain.factors), plain.block, plain.dtype)

    def read_finite(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """The same of a weight.

        Raises:
            InputError: as :meth:`read`, or it holds NaN or Inf.
        """
        found = self.read(name, first, count)
        if found.is_floating_point() and not all_finite(found):
            raise InputError(f"{name} holds NaN or Inf: the checkpoint is damaged")
        return found


def _dtype_of(config: Any) -> torch.dtype:
    found = getattr(config, "dtype", None)
    return found if isinstance(found, torch.dtype) and found.is_floating_point else torch.bfloat16


def _block_of(config: Any) -> tuple[int, ...] | None:
    """The blocks that share a factor, as the config says."""
    found = getattr(config, "quantization_config", None)
    said = found if isinstance(found, Mapping) else {} if found is None else found.to_dict()
    size = said.get("weight_block_size")
    return None if size is None else tuple(size)


def _plain(
    name: str,
    names: list[str],
    stored: Mapping[str, Span],
    method: str | None,
    dtype: torch.dtype,
    block: tuple[int, ...] | None,
) -> Plain:
    """A tensor made of the stored ones in `names`."""
    if method == "mxfp4" and len(names) > 1:
        blocks, scales = (next((stored[n] for n in names if n.endswith(end)), None) for end in ("_blocks", "_scales"))
        if blocks is None or scales is None:
            raise InputError(f"{name}: its blocks or its scales are missing: fetch the checkpoint again")
        return Plain(unpacked(blocks.shape), dtype, blocks, scales)
    values = next((stored[n] for n in names if n == name), None)
    if values is None:
        raise InputError(f"{name} is missing, and there is {names[0]}: fetch the checkpoint again")
    factors = next((stored[n] for n in names if n.endswith("_scale_inv")), None)
    if factors is None:
        if method == "fp8" and values.dtype in _FP8:
            raise InputError(f"{name} is stored in FP8, and what it is multiplied with is missing")
        return Plain(values.shape, DTYPES[values.dtype], values)
    if len(factors.shape) != len(values.shape) or len(values.shape) < 2:
        raise InputError(f"{name} is {values.shape} with factors {factors.shape}: it cannot be read")
    sizes = block or tuple(-(-n // m) for n, m in zip(values.shape[-2:], factors.shape[-2:], strict=True))
    if factors.shape[-2:] != tuple(-(-n // size) for n, size in zip(values.shape[-2:], sizes, strict=True)):
        raise InputError(f"{name} is {values.shape}, and its {factors.shape} factors are not those of {sizes} blocks")
    return Plain(values.shape, dtype, values, factors, sizes)


def _read(span: Span, first: int = 0, count: int | None = None) -> Tensor:
    dtype, shape, start = DTYPES[span.dtype], span.shape, span.start
    if count is not None:
        shape = (count, *shape[1:])
        start += first * math.prod(shape[1:]) * dtype.itemsize
    data = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
    read_into(span.file, start, data.numpy().data)
    return data.view(dtype).reshape(shape)


def read_into(file: Path, start: int, buffer: memoryview) -> None:
    """Fill `buffer` with a file's bytes from `start` on, which the system need not remember: they are read once.

    Without that, finding room for them took as much processor time as reading and writing (`bench/moe.py`, 10 GB).

    Raises:
        InputError: there are fewer.
    """
    handle = os.open(file, os.O_RDONLY)
    try:
        done = 0
        while done < len(buffer):
            got = os.preadv(handle, [buffer[done:]], start + done)
            if got == 0:
                raise InputError(f"{file}: has become shorter while it was read: fetch it again")
            done += got
        forget(handle, start, len(buffer))
    finally:
        os.close(handle)


def forget(handle: int, start: int = 0, count: int = 0) -> None:
    """Tell the system that `count` bytes of an open file, or all from `start` on, are not read again soon."""
    if hasattr(os, "posix_fadvise"):  # not everywhere
        os.posix_fadvise(handle, start, count, os.POSIX_FADV_DONTNEED)


def _from_blocks(values: Tensor, factors: Tensor, block: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """FP8 values times a factor for each block; the last blocks may be cut off. Bytes are exponents of two."""
    wide = values.to(torch.float32)
    exponents = factors.dtype == torch.uint8
    scale = (factors.to(torch.float32) - 127.0).exp2() if exponents else factors.to(torch.float32)
    rows, columns = block
    spread = scale.repeat_interleave(columns, -1)[..., : wide.shape[-1]]
    for number in range(scale.shape[-2]):
        wide.narrow(-2, number * rows, min(rows, wide.shape[-2] - number * rows)).mul_(spread[..., number, None, :])
    return wide.to(dtype)


def _from_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`(..., rows, groups, 16)` bytes of two 4-bit floats each, times 2^(scale - 127), as `(..., columns, rows)`."""
    table = torch.tensor(_FP4, dtype=dtype)
    pairs = torch.stack([table[(blocks & 15).long()], table[(blocks >> 4).long()]], -1).flatten(-2)
    whole = torch.ldexp(pairs, (scales.to(torch.int32) - 127).unsqueeze(-1))
    return whole.to(dtype).flatten(-2).transpose(-1, -2).contiguous()
