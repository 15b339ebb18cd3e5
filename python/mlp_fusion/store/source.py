"""A checkpoint to read: config and tensor headers, from a local folder or the hub, without loading a weight."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import get_safetensors_metadata, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, NotASafetensorsRepoError
from torch import nn
from transformers import AutoConfig

from mlp_fusion.errors import InputError, one_line
from mlp_fusion.store.weights import PICKLES, TensorInfo, check_naming, check_shard_name, read_tensors

#: What goes along with the weights into a compressed checkpoint (tokenizer, pooling, generation settings, licence).
_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".bpe", ".spm", ".vocab", ".codes")
_PREFIXES = ("tokenizer", "vocab", "merges", "sentencepiece", "spiece", "LICENSE", "LICENCE", "NOTICE", "COPYING",
             "USE_POLICY")  # fmt: skip
#: What `finetune`, `distill` and `squeeze` tell of a run: of that model alone.
_RUNS = ("finetune.json", "distill.json", "squeeze.json")
_TEMPLATES = "additional_chat_templates"
_PATTERNS = [
    "*.safetensors", f"{_TEMPLATES}/*", *(f"*{suffix}" for suffix in _SUFFIXES),
    *(f"{prefix}*" for prefix in _PREFIXES),
]  # fmt: skip
#: Weights, of which `compress` writes its own, in the formats that lie beside one another on the hub.
_WEIGHTS = (*PICKLES, ".safetensors", ".index.json", ".h5", ".msgpack", ".onnx", ".gguf", ".ot")
#: What a name that is no folder runs into on the hub: no such repository, no valid name, no network (errors of whatever
#: library huggingface_hub talks through, which its own derive from).
_UNREACHABLE: tuple[type[Exception], ...] = (
    HFValidationError, OSError, *(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)),
)  # fmt: skip


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
        return Headers(str(folder), read_config(folder), read_tensors(folder))
    _check_hub_name(name)
    config = read_config(name)
    check_naming(name, config.to_dict())
    try:
        metadata = get_safetensors_metadata(str(name))
    except NotASafetensorsRepoError as error:
        raise InputError(f"{name}: no safetensors on the hub; convert the weights, pickles are refused") from error
    except _UNREACHABLE as error:
        # Without a network, or the model gone from the hub: what was downloaded before serves as well.
        return Headers(str(name), config, read_tensors(_cached_folder(name, error)))
    for file in metadata.files_metadata:
        check_shard_name(f"{name}: its index", file)
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
        return Path(snapshot_download(str(name), allow_patterns=_PATTERNS))
    except _UNREACHABLE as error:
        return _cached_folder(name, error)


def _cached_folder(name: str | Path, unreachable: Exception) -> Path:
    """Where a model of the hub lies that was downloaded before.

    Raises:
        InputError: it was not; the hub is `unreachable`.
    """
    try:
        found = try_to_load_from_cache(str(name), "config.json")
    except HFValidationError:
        found = None
    if not isinstance(found, str):
        message = f"{name}: neither a folder here nor reachable on the hub ({one_line(unreachable, 500)})"
        raise InputError(message) from unreachable
    return Path(found).parent


def companion_files(folder: Path) -> list[Path]:
    """Files beside the weights that belong to the model whatever its width, relative to `folder`.

    Small files of the top folder, chat templates, and whole module folders of sentence-transformers (pooling and
    projections, weights included), which `modules.json` names. Other subfolders (training checkpoints, other formats)
    are left out.

    Raises:
        InputError: one of them is a link to nothing, or a module's weights are pickled.
    """
    found = [path for path in folder.iterdir() if _is_companion(path.name)]
    if (folder / _TEMPLATES).is_dir():
        found += (folder / _TEMPLATES).rglob("*")
    for module in _module_folders(folder):
        inside = list(module.rglob("*"))
        pickles = [path for path in inside if path.suffix in PICKLES]
        if pickles and not any(path.suffix == ".safetensors" for path in inside):
            raise InputError(f"{pickles[0]}: a pickle can run any code when it is loaded: convert it to safetensors")
        found += [path for path in inside if path not in pickles]
    for path in found:
        if not path.exists():
            raise InputError(f"{path} is a link to nothing: fetch the checkpoint again, or remove it")
    return sorted({path.relative_to(folder) for path in found if path.is_file()})


def _is_companion(name: str) -> bool:
    if name.startswith(".") or name == "config.json" or name in _RUNS or name.endswith(_WEIGHTS):
        return False
    return name.endswith(_SUFFIXES) or name.startswith(_PREFIXES)


def _module_folders(folder: Path) -> list[Path]:
    file = folder / "modules.json"
    if not file.is_file():
        return []
    try:
        paths = [str(module["path"]) for module in json.loads(file.read_text(encoding="utf-8"))]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: not a list of modules ({one_line(error, 500)})") from error
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
    except Exception as error:  # whatever a config of somebody else's makes of transformers' code
        if not Path(name).is_dir():
            raise InputError(
                f"{name}: no folder here, and not reachable on the hub ({one_line(error, 500)})"
            ) from error
        raise InputError(f"{name}: config.json cannot be used ({one_line(error, 500)})") from error


def is_hub_name(name: str | Path) -> bool:
    """Whether `name`, which is no folder, may be that of a model on the hub."""
    text = str(name)
    outside = text.startswith((".", "/", "~")) or text.endswith("/") or text.count("/") > 1
    return bool(text) and not outside and not Path(name).is_file()


def _check_hub_name(name: str | Path) -> None:
    if not is_hub_name(name):
        raise InputError(f"{name}: no such folder")
