"""What is in a compressed checkpoint: the source's own files with the fused FFNs' tensors exchanged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mlp_fusion.errors import InputError
from mlp_fusion.store.record import FUSION_KEY
from mlp_fusion.store.shards import Shards
from mlp_fusion.store.source import companion_files
from mlp_fusion.store.weights import find_weights, opened


def write_weights(source: Path, target: Path, fused: Mapping[str, Tensor]) -> None:
    """Copy the source's tensors, shard by shard, with those of fused FFNs exchanged.

    Everything else is copied bit for bit and never passes through a model: nothing is renamed, tied, rounded, made up
    for a head that the checkpoint lacks, or dropped because the model's class has no place for it.

    Args:
        source, target: checkpoint folders.
        fused: name on disk -> tensor, in any floating dtype; written in the source's.
    """
    written: set[str] = set()
    weights = find_weights(source)
    places: dict[str, str] = {}
    total = 0
    for file in weights.files:
        tensors: dict[str, Tensor] = {}
        with opened(file) as handle:
            metadata = handle.metadata()
            for name in handle.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
                tensor = handle.get_tensor(name)
                if name in fused:
                    written.add(name)
                    tensor = fused[name].to("cpu", tensor.dtype).contiguous()
                tensors[name] = tensor
                places[name] = file.name
                total += tensor.nbytes
        save_file(tensors, target / file.name, metadata=metadata)
    assert written == set(fused), "a fused tensor has no place in the source"
    _write_index(weights.index, target, places, total)


def write_index(source: Path, target: Path, shards: Shards) -> None:
    """Write an index of shards where the source has one.

    Args:
        source, target: checkpoint folders.
        shards: that were written.
    """
    places = {name: shard.name for shard in shards.shards for name in shard.tensors}
    _write_index(find_weights(source).index, target, places, sum(shard.nbytes for shard in shards.shards))


def _write_index(index: Path | None, target: Path, places: Mapping[str, str], total: int) -> None:
    """Write the source's index, if there is one, with other bytes in all and other places of tensors."""
    if index is None:
        return
    content = json.loads(index.read_text(encoding="utf-8"))
    content["metadata"] = {**(content.get("metadata") or {}), "total_size": total}
    content["metadata"].pop("total_parameters", None)
    # Where each tensor is, rather than where the source's index says: transformers does not look, others do.
    content["weight_map"] = dict(places)
    (target / index.name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_config(source: Path, target: Path, fused: Any) -> None:
    """Write the source's own config.json with the widths changed: rewriting it would rename keys that others need.

    Args:
        source, target: checkpoint folders.
        fused: the config, changed.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    described = fused.to_dict()
    record = described[FUSION_KEY]
    for key in {kind["key"]["path"] for kind in record["kinds"] if kind["key"] is not None}:
        path = key.split(".")
        inner, said = config, described
        for name in path[:-1]:
            inner, said = inner.setdefault(name, {}), said[name]
        if said.get(path[-1]) is not None:
            inner[path[-1]] = said[path[-1]]
    config[FUSION_KEY] = record
    config.pop("quantization_config", None)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def save_converted(model: Any, plain: Mapping[str, Tensor], target: Path) -> None:
    """Write a model's weights in the layout that it was loaded from, of tensors that are not on disk as in memory.

    transformers knows the way back. What it has written is loaded again and compared, tensor by tensor.

    Args:
        model: as it was loaded, its FFNs fused.
        plain: its state dict with folded weights.
        target: the folder to write to.

    Raises:
        InputError: what is loaded again differs from what was to be written.
    """
    save = type(model).save_pretrained
    own = getattr(save, "__wrapped__", save)
    own(model, target, state_dict=dict(plain))
    again, info = type(model).from_pretrained(
        target, dtype=model.dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
    )
    lost = sorted({*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]}, key=str)
    state = again.state_dict()
    wrong = [name for name, tensor in plain.items() if name in state and not torch.equal(state[name], tensor.cpu())]
    if lost or wrong:
        raise InputError(f"{[*map(str, lost), *wrong][0]} is not the same once it is saved and loaded again")


def copy_companions(source: Path, target: Path) -> None:
    """Copy the tokenizer and the other small files that do not depend on the width."""
    for file in companion_files(source):
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / file, target / file)
