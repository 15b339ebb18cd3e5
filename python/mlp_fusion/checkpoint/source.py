"""A checkpoint to read: config and tensor headers, from a local folder or the hub, without loading a weight."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import get_safetensors_metadata, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    NotASafetensorsRepoError,
    StrictDataclassError,
)
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig

from mlp_fusion.errors import InputError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
#: Weight files that hold Python pickles: loading one runs whatever code it contains.
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
#: What goes along with the weights into a compressed checkpoint (tokenizer, pooling, generation settings).
_COMPANIONS = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".bpe")

_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
#: What a name that is no folder runs into on the hub: no such repository, no network, no valid name.
_UNREACHABLE = (HfHubHTTPError, HFValidationError, OSError)
_FLOATING = {"F64", "F32", "F16", "BF16"}


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
        return self.dtype in _FLOATING


@dataclass(frozen=True)
class Headers:
    """Config and tensor headers of a checkpoint or of a model in memory."""

    name: str
    config: Any
    tensors: Mapping[str, TensorInfo]


def read_headers(name: str | Path) -> Headers:
    """Read config and safetensors headers of a local folder, or of a model on the hub.

    Raises:
        InputError: there is no such checkpoint, its config cannot be read, it has no safetensors (pickled weights are
            refused), or a file is missing or cut short.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return Headers(str(folder), read_config(folder), _local_tensors(folder))
    _check_hub_name(name)
    config = read_config(name)
    try:
        metadata = get_safetensors_metadata(str(name))
    except NotASafetensorsRepoError as error:
        raise InputError(f"{name}: no safetensors on the hub; convert the weights, pickles are refused") from error
    except _UNREACHABLE as error:
        raise InputError(f"{name}: neither a folder here nor reachable on the hub ({_first_line(error)})") from error
    tensors = {
        tensor: TensorInfo(tuple(info.shape), info.dtype, file)
        for file, content in metadata.files_metadata.items()
        for tensor, info in content.tensors.items()
    }
    return Headers(str(name), config, tensors)


def model_headers(model: nn.Module) -> Headers:
    """The same of a model in memory; its buffers are left out, as most are not saved.

    Raises:
        InputError: it is no Hugging Face model.
    """
    if not hasattr(getattr(model, "config", None), "model_type"):
        raise InputError(f"{type(model).__name__} has no config.model_type: give a Hugging Face model")
    names = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8", "uint8": "U8"}
    tensors = {
        name: TensorInfo(tuple(p.shape), names.get(str(p.dtype).removeprefix("torch."), str(p.dtype)))
        for name, p in model.named_parameters()
    }
    return Headers(type(model).__name__, model.config, tensors)


def local_folder(name: str | Path) -> Path:
    """The checkpoint as a local folder; a model on the hub is downloaded (safetensors and small files only).

    Raises:
        InputError: it is neither a folder nor reachable.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    _check_hub_name(name)
    try:
        return Path(snapshot_download(str(name), allow_patterns=["*.safetensors", *(f"*{s}" for s in _COMPANIONS)]))
    except _UNREACHABLE as error:
        raise InputError(f"{name}: neither a folder here nor reachable on the hub ({_first_line(error)})") from error


def companion_files(folder: Path) -> list[Path]:
    """Files beside the weights that belong to the model whatever its width, relative to `folder`.

    Small files of the top folder, and whole module folders of sentence-transformers (pooling and projections, weights
    included), which `modules.json` names. Other subfolders (training checkpoints, other formats) are left out.
    """
    found = [
        path
        for path in folder.iterdir()
        if path.is_file()
        and path.suffix in _COMPANIONS
        and not path.name.endswith(".index.json")
        and path.name != "config.json"
        and not path.name.startswith(".")
    ]
    for module in _module_folders(folder):
        found += [path for path in module.rglob("*") if path.is_file() and path.suffix not in _PICKLES]
    return sorted(path.relative_to(folder) for path in found)


def _module_folders(folder: Path) -> list[Path]:
    file = folder / "modules.json"
    if not file.is_file():
        return []
    try:
        paths = [str(module["path"]) for module in json.loads(file.read_text(encoding="utf-8"))]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: not a list of modules ({_first_line(error)})") from error
    inside = [(folder / path).resolve() for path in paths if path]
    return [folder / path.relative_to(folder.resolve()) for path in inside if folder.resolve() in path.parents]


def read_config(name: str | Path) -> Any:
    """The transformers config of a checkpoint; remote code is never run.

    Raises:
        InputError: it is missing, is no JSON, or names a model type that transformers does not know.
    """
    file = Path(name) / "config.json"
    if Path(name).is_dir() and not file.is_file():
        raise InputError(f"{file} is missing: not a Hugging Face checkpoint")
    try:
        return AutoConfig.from_pretrained(str(name), trust_remote_code=False)
    except (ValueError, KeyError, OSError, TypeError, StrictDataclassError) as error:
        if not Path(name).is_dir():
            raise InputError(f"{name}: no folder here, and not reachable on the hub ({_first_line(error)})") from error
        raise InputError(f"{name}: config.json cannot be used ({_first_line(error)})") from error


def _local_tensors(folder: Path) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
                    piece = handle.get_slice(name)
                    tensors[name] = TensorInfo(tuple(piece.get_shape()), piece.get_dtype(), file.name)
        except SafetensorError as error:
            raise InputError(f"{file}: damaged or cut short ({_first_line(error)}): fetch it again") from error
    index = folder / INDEX_FILE
    if index.is_file():
        absent = sorted(set(_weight_map(index)) - set(tensors))
        if absent:
            raise InputError(f"{index}: tensor {absent[0]} is in no shard ({len(absent)} such): fetch it again")
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a local checkpoint, shards in order.

    Raises:
        InputError: a shard is missing, or there are no safetensors at all.
    """
    index, single = folder / INDEX_FILE, folder / WEIGHTS_FILE
    if index.is_file():
        files = [folder / name for name in sorted(set(_weight_map(index).values()))]
    elif single.is_file():
        files = [single]
    else:
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
        if pickles:
            raise InputError(
                f"{folder / pickles[0]}: a pickle can run any code when it is loaded, so it is refused: "
                "convert the checkpoint to safetensors"
            )
        raise InputError(f"{folder}: no {WEIGHTS_FILE} and no {INDEX_FILE}")
    for file in files:
        if not file.is_file():
            raise InputError(f"{file} is missing, though {INDEX_FILE} names it: fetch it again")
    return files


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return {str(k): str(v) for k, v in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: not a safetensors index ({_first_line(error)})") from error


def _check_hub_name(name: str | Path) -> None:
    text = str(name)
    if text.startswith((".", "/", "~")) or text.endswith("/") or text.count("/") > 1 or Path(name).is_file():
        raise InputError(f"{name}: no such folder")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
