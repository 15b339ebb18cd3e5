"""What is in a compressed checkpoint: the source's own files with the fused FFNs' tensors exchanged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from mlp_fusion.families import Architecture
from mlp_fusion.store.source import companion_files
from mlp_fusion.store.weights import find_weights, opened


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
                matched = architecture.locate(name)
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
