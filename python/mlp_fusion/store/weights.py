"""Which files hold a checkpoint's weights: the rule by which transformers chooses, for everyone who reads them.

`model.safetensors` where there is one, or else the shards that `model.safetensors.index.json` names; of shards, every
tensor that is in them, whatever the index says. What other programs would read otherwise (an index beside another
single file, one tensor in two shards, an adapter) is refused: nobody could say which weights were meant.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mlp_fusion.errors import InputError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
#: Weight files that hold Python pickles: loading one runs whatever code it contains.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
#: A folder with this holds an adapter, which transformers puts into the model where peft is installed.
_ADAPTER_FILE = "adapter_config.json"
#: Key in config.json by which transformers takes other files.
_NAMING_KEY = "transformers_weights"
#: Safetensors files start with the length of their header, in so many bytes; what is longer than that is none.
LENGTH, _LARGEST_HEADER = 8, 100 * 2**20
#: The longest name that file systems take, in bytes.
_NAME_BYTES = 255

_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
#: The dtypes that models compute in, by their names in safetensors.
COMPUTING: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's header: shape, safetensors dtype name, and the file that holds it ("" in memory)."""

    shape: tuple[int, ...]
    dtype: str
    file: str = ""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * _BYTES.get(self.dtype, 1)

    @property
    def floating(self) -> bool:
        """Whether models compute in its dtype; FP8 is stored only."""
        return self.dtype in COMPUTING

    @property
    def parameter(self) -> bool:
        """Whether it is no buffer: those that are saved hold integers."""
        return self.dtype.startswith(("F", "BF"))


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors files of a checkpoint, shards in order of their names, and the index where there is one."""

    files: list[Path]
    index: Path | None


def find_weights(folder: Path) -> WeightFiles:
    """The files that transformers loads from a local folder.

    Raises:
        InputError: there are none, a shard is missing or lies elsewhere, or it is not clear which files are meant.
    """
    if (folder / _ADAPTER_FILE).exists():
        raise InputError(
            f"{folder / _ADAPTER_FILE}: the folder holds an adapter: merge it into the weights first "
            "(merge_and_unload), and save the model without it"
        )
    index, single = folder / INDEX_FILE, folder / WEIGHTS_FILE
    _check_naming(folder)
    if not index.is_file() and not single.is_file():
        raise InputError(_without_weights(folder))
    if not index.is_file():
        return WeightFiles([single], None)
    shards = _shards(index)
    if shards == [single]:
        # transformers takes the file for itself; other readers follow the index to the same place.
        return WeightFiles(shards, index)
    if single.is_file():
        _check_equal(single, index, shards)
        return WeightFiles([single], None)
    if not isinstance(_read_index(index).get("metadata"), dict):
        raise InputError(f"{index}: not a safetensors index (it has no metadata, which transformers wants): add {{}}")
    return WeightFiles(shards, index)


def read_tensors(folder: Path) -> dict[str, TensorInfo]:
    """The header of every tensor of a local checkpoint.

    Raises:
        InputError: as :func:`find_weights`; or a file is damaged, or the index and the shards do not fit.
    """
    found = find_weights(folder)
    tensors: dict[str, TensorInfo] = {}
    for file in found.files:
        for name, info in _headers(file).items():
            if name in tensors:
                raise InputError(
                    f"{file}: tensor {name} is in {tensors[name].file} as well, and only one of them would be loaded: "
                    "remove one, or save the model again"
                )
            tensors[name] = info
    if found.index is not None:
        absent = sorted(set(_weight_map(found.index)) - set(tensors))
        if absent:
            raise InputError(f"{found.index}: tensor {absent[0]} is in no shard ({len(absent)} such): fetch it again")
    return tensors


def check_naming(name: object, config: Mapping[str, Any]) -> None:
    """Raise InputError where the config of the model `name` has transformers take other files than the usual ones."""
    named = config.get(_NAMING_KEY)
    if named not in (None, WEIGHTS_FILE, INDEX_FILE):
        raise InputError(
            f"{name}: config.json names its weights in {_NAMING_KEY} ({named!r}), which other programs do not heed: "
            f"rename the file to {WEIGHTS_FILE} and remove the entry"
        )


def check_shard_name(index: object, name: str) -> None:
    """Raise InputError unless the shard `name`, in what is called `index`, is a safetensors file beside the index."""
    # Folders in names would be lost in a copy, or lead out of it; another suffix has transformers load a pickle.
    plain = Path(name).name == name and not set(name) & set("/\\\0") and len(name.encode()) <= _NAME_BYTES
    if not plain or not name.endswith(".safetensors"):
        raise InputError(
            f"{index}: shard {name[:100]!r} is no safetensors file beside the index: put all shards there and name "
            "them so"
        )


def widest_dtype(tensors: Mapping[str, TensorInfo]) -> torch.dtype:
    """The least dtype that holds every floating-point tensor as it is; float32 where there is none."""
    present = {info.dtype for info in tensors.values() if info.floating}
    widest: torch.dtype | None = None
    for name in sorted(present):
        dtype = COMPUTING[name]
        widest = dtype if widest is None else torch.promote_types(widest, dtype)
    return torch.float32 if widest is None else widest


def safetensors_name(dtype: torch.dtype) -> str:
    """What safetensors calls a dtype that models compute in."""
    return next(name for name, known in COMPUTING.items() if known == dtype)


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file to read.

    Raises:
        InputError: it is damaged.
    """
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except SafetensorError as error:
        raise InputError(f"{file}: damaged or cut short ({error}): fetch it again") from error


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """What stands before the tensors of a safetensors file, and its length in bytes.

    Raises:
        InputError: it cannot be read, or names a tensor twice, of which every reader would choose one by itself.
    """
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(LENGTH), "little")
        content = handle.read(length) if 0 < length <= min(size, _LARGEST_HEADER) else b""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise InputError(
                f"{file}: {next(n for n in names if names.count(n) > 1)} is in its header twice: save the model again"
            )
        return found

    try:
        header = json.loads(content, object_pairs_hook=once) if content else None
        if not isinstance(header, dict):
            raise ValueError("it has no header")
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{file}: damaged or cut short ({error}): fetch it again") from error
    return header, length


def _headers(file: Path) -> dict[str, TensorInfo]:
    read_header(file)
    headers = {}
    with opened(file) as handle:
        for name in handle.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
            piece = handle.get_slice(name)
            headers[name] = TensorInfo(tuple(piece.get_shape()), piece.get_dtype(), file.name)
    return headers


def _check_naming(folder: Path) -> None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # whoever needs the config says what is wrong with it
    if isinstance(config, dict):
        check_naming(folder, config)


def _without_weights(folder: Path) -> str:
    present = sorted(p.name for p in folder.iterdir())
    pickles = [name for name in present if name.endswith(PICKLES)]
    if pickles:
        return (
            f"{folder / pickles[0]}: a pickle can run any code when it is loaded, so it is refused: "
            "convert the checkpoint to safetensors"
        )
    missing = f"{folder}: no {WEIGHTS_FILE} and no {INDEX_FILE}"
    others = [name for name in present if name.endswith((".safetensors", ".safetensors.index.json"))]
    return f"{missing}, which transformers loads: there is {others[0]}, rename it" if others else missing


def _shards(index: Path) -> list[Path]:
    """The files that an index names: beside it, and there."""
    names = sorted(set(_weight_map(index).values()))
    if not names:
        raise InputError(f"{index}: names no tensor: fetch it again")
    for name in names:
        check_shard_name(index, name)
        if not (index.parent / name).is_file():
            raise InputError(f"{index.parent / name} is missing, though {index.name} names it: fetch it again")
    return [index.parent / name for name in names]


def _read_index(index: Path) -> dict[str, Any]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{index}: not a safetensors index ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{index}: not a safetensors index (no JSON object)")
    return content


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = _read_index(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index}: not a safetensors index (weight_map does not name a file for each tensor)")
    return weight_map


def _check_equal(single: Path, index: Path, shards: list[Path]) -> None:
    """Raise InputError unless the single file holds what the shards hold, value for value."""
    remedy = "remove whichever is out of date"
    places = {name: shard for shard in shards for name in _headers(shard)}
    with opened(single) as whole:
        names = set(whole.keys())
        differing = sorted(names ^ set(places))
        for name in [] if differing else sorted(names):
            with opened(places[name]) as part:
                one, other = whole.get_tensor(name), part.get_tensor(name)
            # As bytes: NaN equals itself there.
            alike = one.dtype == other.dtype and one.shape == other.shape
            if not alike or not torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8)):
                differing = [name]
                break
    if differing:
        raise InputError(
            f"{single.parent} holds {single.name} and {index.name}, and they differ (in {differing[0]}): "
            f"transformers loads the first, others the second: {remedy}"
        )
