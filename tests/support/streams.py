"""Streamed runs that are stopped, and what they write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from discovered_models import model_of
from moe_models import MOE_MODELS, moe_model

import checkpoints as ck


def sharded_mixtral(folder: Path, layers: int) -> Path:
    """A small model in bfloat16 with four experts a layer, in several shards, and a tokenizer."""
    config = transformers.MixtralConfig(
        hidden_size=64, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4, vocab_size=97,
        intermediate_size=64, num_local_experts=4, num_experts_per_tok=2, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="100KB")
    ck.add_tokenizer(folder, pad_token="<pad>")
    return folder


def with_tokenizer(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A tiny model by the name of its config, and a tokenizer of a few words."""
    (moe_model if name in MOE_MODELS else model_of)(name).to(dtype).save_pretrained(folder)
    ck.add_tokenizer(folder, pad_token="<pad>")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """What a checkpoint consists of, but for the times that a report holds."""
    timed = ("report.json", "README.md")
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in timed
    }


class StoppedError(Exception):
    """A run was stopped on purpose."""


def stop_after(tasks_done: int, ahead: int = 0) -> Callable[[int, int], None]:
    """A progress that stops the run after so many tasks, once as much is done as comes `ahead` of them."""
    seen = []

    def progress(done: int, _total: int) -> None:
        if done > ahead:
            seen.append(done)
        if len(seen) == tasks_done:
            raise StoppedError

    return progress
