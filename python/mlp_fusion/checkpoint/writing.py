"""Writing a compressed checkpoint: the source's own files with the fused FFNs' tensors exchanged, all or nothing."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from mlp_fusion.architectures import Architecture
from mlp_fusion.checkpoint.source import companion_files
from mlp_fusion.checkpoint.weights import find_weights, opened
from mlp_fusion.errors import InputError


def check_output(out: Path) -> None:
    """Raise InputError unless `out` can be made, or is an empty folder."""
    if out == Path.cwd():
        raise InputError(f"{out} is the working folder, which cannot be exchanged: name a new one")
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out} exists and is not empty: choose another folder or empty it")
    for path in (out, *out.parents):
        if path.exists() and not path.is_dir():
            raise InputError(f"{path} is a file: choose another folder")
    parent = next(path for path in out.parents if path.is_dir())
    if not os.access(parent, os.W_OK):
        raise InputError(f"{parent} cannot be written to: choose another folder")


@contextmanager
def appears_when_complete(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into; it becomes `out` at the end, or vanishes on any error or interrupt."""
    made = [parent for parent in out.parents if not parent.exists()]
    staging = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.partial"
    staging.mkdir(parents=True)
    try:
        yield staging
        # A rename replaces an empty folder in one step, and fails if the folder has been filled in the meantime.
        staging.rename(out)
    except BaseException:
        shutil.rmtree(staging)
        for parent in made:
            if not any(parent.iterdir()):
                parent.rmdir()
        raise


def write_weights(
    source: Path, target: Path, architecture: Architecture, fused: Mapping[tuple[int, str], Tensor]
) -> None:
    """Copy the source's tensors, shard by shard, with those of fused FFNs exchanged.

    Everything else is copied bit for bit and never passes through a model: nothing is renamed, tied, rounded, made up
    for a head that the checkpoint lacks, or dropped because the model's class has no place for it.

    Args:
        source, target: checkpoint folders.
        fused: (layer, path below the layer) -> tensor, in any floating dtype; written in the source's.
    """
    written: set[tuple[int, str]] = set()
    weights = find_weights(source)
    places: dict[str, str] = {}
    total = 0
    for file in weights.files:
        tensors: dict[str, Tensor] = {}
        with opened(file) as handle:
            metadata = handle.metadata()
            for name in handle.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
                tensor = handle.get_tensor(name)
                matched = architecture.match(name)
                if matched is not None and matched[1:] in fused:
                    written.add(matched[1:])
                    tensor = fused[matched[1:]].to("cpu", tensor.dtype).contiguous()
                tensors[name] = tensor
                places[name] = file.name
                total += tensor.nbytes
        save_file(tensors, target / file.name, metadata=metadata)
    assert written == set(fused), "a fused tensor has no place in the source"
    if weights.index is not None:
        content = json.loads(weights.index.read_text(encoding="utf-8"))
        content["metadata"] = {**(content.get("metadata") or {}), "total_size": total}
        content["metadata"].pop("total_parameters", None)
        # Where each tensor is, rather than where the source's index says: transformers does not look, others do.
        content["weight_map"] = places
        (target / weights.index.name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def copy_companions(source: Path, target: Path) -> None:
    """Copy the tokenizer and the other small files that do not depend on the width."""
    for file in companion_files(source):
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / file, target / file)
