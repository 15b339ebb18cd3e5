"""Streamed runs on several devices of one machine, which two names of the CPU stand in for."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from streams import files

import mlp_fusion
from mlp_fusion import InputError
from mlp_fusion.store.tensors import Tensors
from mlp_fusion.streaming import engines, tasks
from mlp_fusion.streaming.work import Work

pytestmark = pytest.mark.slow

_SMALL: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 97,
    "intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 1,
}  # fmt: skip
_TWO = [torch.device("cpu"), torch.device("cpu", 0)]


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tasks, "TASK_BYTES", 60_000)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.MixtralConfig(**_SMALL))
    model.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def test_every_device_takes_its_turn_and_the_bytes_are_those_of_one(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlp_fusion.compress(source, tmp_path / "one", 0.5, stream=True)
    reduce, read = Work.reduce, Tensors.__init__
    used: list[str] = []
    parsed: list[Any] = []

    def watched(self: Work, task: Any, found: Any) -> Any:
        used.extend([str(self.device)] * len(task.parts))
        return reduce(self, task, found)

    def counted(self: Tensors, *args: Any) -> None:
        parsed.append(args)
        read(self, *args)

    monkeypatch.setattr(engines, "devices_of", lambda _device: _TWO)
    monkeypatch.setattr(Work, "reduce", watched)
    monkeypatch.setattr(Tensors, "__init__", counted)
    mlp_fusion.compress(source, tmp_path / "two", 0.5, stream=True)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    # Twelve experts by themselves; a device that is free waits behind the other one.
    assert set(used) == {"cpu", "cpu:0"}
    assert len(used) == 12
    assert len(parsed) == 2  # to prepare, and by all that work


def test_a_device_that_fails_ends_the_run(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reduce = Work.reduce

    def fails(self: Work, *args: Any) -> Any:
        if self.device.index == 0:
            raise InputError("one of two")
        return reduce(self, *args)

    monkeypatch.setattr(engines, "devices_of", lambda _device: _TWO)
    monkeypatch.setattr(Work, "reduce", fails)
    with pytest.raises(InputError, match="one of two"):
        mlp_fusion.compress(source, tmp_path / "out", 0.5, stream=True)
    monkeypatch.setattr(Work, "reduce", reduce)
    mlp_fusion.compress(source, tmp_path / "out", 0.5, stream=True, resume=True)
    assert mlp_fusion.verify(tmp_path / "out", source).passed


def test_which_gpus_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["H200", "H200", "T4", "H200"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda number: SimpleNamespace(name=names[number], major=9, minor=0, multi_processor_count=132),
    )
    with pytest.warns(UserWarning, match=r"^GPUs 2 are unlike GPU 0 \(H200\) and are not used: name one") as caught:
        assert engines.devices_of(torch.device("cuda")) == [torch.device("cuda", n) for n in (0, 1, 3)]
    assert "\n" not in str(caught[0].message)
    names[2] = "H200"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert engines.devices_of(torch.device("cuda")) == [torch.device("cuda", n) for n in range(4)]
        assert engines.devices_of(torch.device("cuda", 2)) == [torch.device("cuda", 2)]
        assert engines.devices_of(torch.device("cpu")) == [torch.device("cpu")]
