"""Tiny checkpoints on disk, and ways to change or damage them, for the tests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from families import WIDTH, tiny_model

WEIGHTS = "model.safetensors"
SCALE = "mlp_fusion/scale.safetensors"
REFERENCE = "mlp_fusion/reference.safetensors"
#: A BERT layer's FFN, and where a fused one's scale lies.
W_IN, B_IN, W_OUT = "intermediate.dense.weight", "intermediate.dense.bias", "output.dense.weight"
HOLDER = "intermediate.intermediate_act_fn"


def save_tiny(folder: Path, family: str = "bert", **options: Any) -> Path:
    """Save a tiny model of `family` to `folder`; `options` as in `tiny_model`."""
    tiny_model(family, **options).save_pretrained(folder)
    return folder


def copy(source: Path, target: Path) -> Path:
    """A copy of a checkpoint, to damage."""
    return Path(shutil.copytree(source, target))


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whatever its shards."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(file))
    return found


def scales(folder: Path) -> dict[str, Tensor]:
    """The scales that lie beside a checkpoint."""
    return load_file(folder / SCALE)


def put_scales(folder: Path, scales: dict[str, Tensor]) -> None:
    """Write other scales beside a checkpoint."""
    (folder / SCALE).parent.mkdir(parents=True, exist_ok=True)
    save_file({name: scale.clone() for name, scale in scales.items()}, folder / SCALE)


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """Rewrite a single-file checkpoint with `change` applied to its tensors."""
    changed = {name: tensor.contiguous() for name, tensor in change(tensors(folder)).items()}
    save_file(changed, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def drop_tensor(folder: Path, *parts: str) -> Path:
    """Take out the tensors whose names contain one of `parts`."""
    return edit_tensors(folder, lambda state: {k: v for k, v in state.items() if not any(part in k for part in parts)})


def replace_tensor(folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> Path:
    """Rewrite one tensor."""
    return edit_tensors(folder, lambda state: {**state, name: change(state[name])})


def rename_tensors(folder: Path, rename: Callable[[str], str]) -> Path:
    """Rewrite the checkpoint under other tensor names."""
    return edit_tensors(folder, lambda state: {rename(name): tensor for name, tensor in state.items()})


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it is."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def edit_config(folder: Path, **changes: Any) -> Path:
    """Set keys of config.json; None removes one."""
    config = {k: v for k, v in {**read_config(folder), **changes}.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def add_tokenizer(folder: Path, **special: str) -> Path:
    """Give a tiny checkpoint a tokenizer of eight words; `special` names its special tokens."""
    words = ["<s>", "<pad>", "</s>", "<unk>", "the", "a", "cat", "sat"]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )  # fmt: skip
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)
    fast.save_pretrained(folder)
    return folder


def add_masking_tokenizer(folder: Path) -> Path:
    """The same with a token to mask with, and `<s> ... </s>` around texts."""
    add_tokenizer(folder, pad_token="<pad>", cls_token="<s>", sep_token="</s>", mask_token="<mask>")
    fast = PreTrainedTokenizerFast.from_pretrained(folder)
    fast.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    fast.save_pretrained(folder)
    return folder


def bert_with_sst2(root: Path, **sizes: int) -> Any:
    """A tiny BERT in `root/bert` with a tokenizer, and data as benchmarks read it, which its embeddings tell apart.

    Returns the model, which is written once more where it is changed.
    """
    model = tiny_model("bert", task="Model", vocab_size=1200, **sizes)
    model.save_pretrained(root / "bert")
    add_masking_tokenizer(root / "bert")
    for name in ("train", "dev"):
        lines = [f"{('the cat sat', 'a the a')[n % 2]}\t{n % 2}\n" for n in range(40)]
        (root / f"sst2_{name}.tsv").write_text("".join(lines), encoding="utf-8")
    return model


def tie_neurons(model: nn.Module, groups: int, seed: int = 0) -> None:
    """Make every tiny FFN hold only `groups` distinct neurons, each several times over and in mixed order.

    In a tiny model, an axis of length `WIDTH` is an FFN's neuron axis and nothing else. Such an FFN can be fused to
    `groups` neurons without any loss.
    """
    generator = torch.Generator().manual_seed(seed)
    state = model.state_dict()
    layers = {}
    for name, tensor in state.items():
        for axis in (axis for axis, length in enumerate(tensor.shape) if length == WIDTH):
            layer = next(part for part in name.split(".") if part.isdigit())
            order = layers.setdefault(
                layer, (torch.arange(WIDTH) % groups)[torch.randperm(WIDTH, generator=generator)]
            )  # fmt: skip
            state[name] = tensor = tensor.index_select(axis, order)
    model.load_state_dict(state)


def relative_difference(one: Tensor, other: Tensor) -> float:
    """`|one - other|_F / |other|_F` in float64."""
    return float(torch.linalg.vector_norm(one.double() - other.double()) / torch.linalg.vector_norm(other.double()))
