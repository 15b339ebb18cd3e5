"""Streamed runs on Ray: a real cluster of this machine, one of whose workers is killed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import checkpoints as ck
import mlp_fusion
from mlp_fusion import InputError
from mlp_fusion.streaming import tasks

pytestmark = pytest.mark.slow
ray = pytest.importorskip("ray")

_SIZES: dict[str, Any] = {
    "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 97,
    "intermediate_size": 512, "num_local_experts": 8, "num_experts_per_tok": 2, "pad_token_id": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def cluster() -> Any:
    """Two workers, and room for what they share."""
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("ray") / "source"
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(transformers.MixtralConfig(**_SIZES)).save_pretrained(folder)
    return folder


def workers() -> list[int]:
    """Processes of this test's own cluster that do a task; others may run beside it."""
    parents, names = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                names[int(folder.name)] = (folder / "cmdline").read_bytes()
            except OSError:
                continue  # it has ended

    def is_ours(process: int) -> bool:
        while process in parents and process != os.getpid():
            process = parents[process]
        return process == os.getpid()

    return [process for process, name in names.items() if name.startswith(b"ray::do") and is_ours(process)]


def test_a_worker_that_is_killed_changes_nothing(
    cluster: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "TASK_BYTES", 3_000_000)
    killed: list[int] = []

    def kill(_done: int, _total: int) -> None:
        # All tasks are waiting by now: one is met while it works.
        until = time.monotonic() + 5
        while not killed and time.monotonic() < until:
            for process in workers()[:1]:
                os.kill(process, signal.SIGKILL)
                killed.append(process)

    mlp_fusion.compress(source, tmp_path / "local", 0.5, stream=True)
    mlp_fusion.compress(source, tmp_path / "ray", 0.5, stream=True, engine="ray", progress=kill)
    assert killed
    names = sorted(str(path.relative_to(tmp_path / "local")) for path in (tmp_path / "local").rglob("*.safetensors"))
    assert names == ["mlp_fusion/scale.safetensors", "model.safetensors"]
    assert all((tmp_path / "local" / name).read_bytes() == (tmp_path / "ray" / name).read_bytes() for name in names)


def test_what_fails_in_a_worker_is_said_here(cluster: Any, source: Path, tmp_path: Path) -> None:
    broken = ck.copy(source, tmp_path / "broken")
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    ck.replace_tensor(broken, name, lambda tensor: tensor.fill_(torch.nan))
    with pytest.raises(InputError, match=f"{name} holds NaN or Inf"):
        mlp_fusion.compress(broken, tmp_path / "out", 0.5, stream=True, engine="ray")
