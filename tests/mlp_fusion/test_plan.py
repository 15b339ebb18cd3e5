"""`plan`: its numbers are what fusing and saving really yields, it reads no weight, and it refuses what it must."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import checkpoints as ck
import mlp_fusion
from families import FAMILIES, WIDTH, tiny_model
from mlp_fusion.store import weights as weights_module

#: family -> parameters of one FFN with 64 and with 16 neurons, counted by hand from hidden size and biases.
FFN_PARAMETERS = {
    "bert": (2 * 24 * 64 + 64 + 24, 2 * 24 * 16 + 16 + 24),
    "gpt2": (2 * 16 * 64 + 64 + 16, 2 * 16 * 16 + 16 + 16),
    "llama": (3 * 24 * 64 + 2 * 64 + 24, 3 * 24 * 16 + 2 * 16 + 24),
    "qwen2": (3 * 24 * 64, 3 * 24 * 16),
}

Damage = Callable[[Path], object]


def fuse_and_save(family: str, folder: Path, width: float, layers: str | None) -> dict[str, torch.Tensor]:
    model = tiny_model(family)
    mlp_fusion.fuse(model, width, layers)
    model.save_pretrained(folder)
    return ck.tensors(folder)


# --- the numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_are_those_of_fuse_and_save(family: str, saved: Path, tmp_path: Path) -> None:
    planned = mlp_fusion.plan(saved / family, 0.25)
    before, after = ck.tensors(saved / family), fuse_and_save(family, tmp_path / "fused", 0.25, None)

    assert planned.model_type == family
    assert planned.parameters_before == sum(t.numel() for t in before.values())
    assert planned.parameters_after == sum(t.numel() for t in after.values())
    assert planned.bytes_before == sum(t.nbytes for t in before.values())
    assert planned.bytes_after == sum(t.nbytes for t in after.values())
    assert [f.layer for f in planned.ffns] == [0, 1, 2]
    assert {(f.neurons_before, f.neurons_after) for f in planned.ffns} == {(WIDTH, 16)}
    for ffn in planned.ffns:
        narrower = [n for n in after if n.startswith(f"{ffn.path}.") and after[n].shape != before[n].shape]
        assert narrower
        shrunk = sum(before[n].numel() - after[n].numel() for n in narrower)
        assert ffn.parameters_before - ffn.parameters_after == shrunk
        assert ffn.bytes_before - ffn.bytes_after == 4 * shrunk


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "llama"])
def test_chosen_layers_only(family: str, saved: Path, tmp_path: Path) -> None:
    planned = mlp_fusion.plan(saved / family, 24, "0,2")
    after = fuse_and_save(family, tmp_path / "fused", 24, "0,2")

    assert [f.chosen for f in planned.ffns] == [True, False, True]
    assert [f.neurons_after for f in planned.ffns] == [24, WIDTH, 24]
    assert planned.ffns[1].parameters_after == planned.ffns[1].parameters_before
    assert planned.parameters_after == sum(t.numel() for t in after.values())
    assert planned.bytes_after == sum(t.nbytes for t in after.values())


@pytest.mark.parametrize("family", FFN_PARAMETERS)
def test_parameters_of_one_ffn(family: str, saved: Path) -> None:
    planned = mlp_fusion.plan(saved / family, 16)
    assert {(f.parameters_before, f.parameters_after) for f in planned.ffns} == {FFN_PARAMETERS[family]}


@pytest.mark.parametrize("family", FAMILIES)
def test_model_in_memory(family: str, saved: Path) -> None:
    model = tiny_model(family)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    in_memory, on_disk = mlp_fusion.plan(model, 0.25, "1-2"), mlp_fusion.plan(saved / family, 0.25, "1-2")

    assert in_memory.ffns == on_disk.ffns
    assert in_memory.parameters_before == sum(p.numel() for p in model.parameters())
    assert (in_memory.parameters_before, in_memory.parameters_after, in_memory.bytes_after) == (
        on_disk.parameters_before,
        on_disk.parameters_after,
        on_disk.bytes_after,
    )
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_bytes_follow_the_dtype(tmp_path: Path) -> None:
    folder = ck.save_tiny(tmp_path / "half", dtype=torch.bfloat16)
    planned = mlp_fusion.plan(folder, 16)
    assert planned.bytes_before == 2 * planned.parameters_before
    assert planned.bytes_after == 2 * planned.parameters_after
    assert planned.ffns[0].bytes_after == 2 * FFN_PARAMETERS["bert"][1]


def test_integer_buffers_are_bytes_but_no_parameters(saved: Path, bert: Path) -> None:
    ck.edit_tensors(bert, lambda state: {**state, "bert.embeddings.position_ids": torch.arange(40).unsqueeze(0)})
    before, after = mlp_fusion.plan(saved / "bert", 16), mlp_fusion.plan(bert, 16)
    assert (after.parameters_before, after.parameters_after) == (before.parameters_before, before.parameters_after)
    assert (after.bytes_before, after.bytes_after) == (before.bytes_before + 320, before.bytes_after + 320)


def test_more_than_nine_layers_stay_in_order() -> None:
    planned = mlp_fusion.plan(tiny_model("bert", num_hidden_layers=12), 16, "last:2")
    assert [f.layer for f in planned.ffns] == list(range(12))
    assert [f.path for f in planned.ffns if f.chosen] == ["bert.encoder.layer.10", "bert.encoder.layer.11"]


# --- the verdicts ----------------------------------------------------------------------------------------------------


def test_uniform_or_per_layer(saved: Path) -> None:
    everywhere, some = mlp_fusion.plan(saved / "llama", 16), mlp_fusion.plan(saved / "llama", 16, "last:1")
    assert everywhere.uniform
    assert everywhere.loads_in.startswith("every program that loads llama checkpoints")
    assert not some.uniform
    assert "import mlp_fusion" in some.loads_in


@pytest.mark.parametrize(
    ("full", "width", "kept", "by_128", "by_256"),
    [
        (1024, 0.25, 256, True, True),
        (1536, 0.25, 384, True, False),
        (2048, 0.2, 384, True, False),  # 409.6 is nearest to 3 x 128
        (2048, 0.01, 128, True, False),  # never less than one tile
        (2048, 520, 520, False, False),
        (1000, 0.33, 328, False, False),  # 330 is nearest to 41 x 8
        (63, 0.5, 32, False, False),
        (63, 17, 17, False, False),
    ],
)
def test_widths_and_what_divides_them(full: int, width: float, kept: int, by_128: bool, by_256: bool) -> None:
    planned = mlp_fusion.plan(tiny_model("bert", intermediate_size=full, num_hidden_layers=1), width)
    (ffn,) = planned.ffns
    assert (ffn.neurons_before, ffn.neurons_after) == (full, kept)
    assert (ffn.divisible_by_128, ffn.divisible_by_256) == (by_128, by_256)
    if by_128:
        assert planned.warnings == []
    else:
        assert len(planned.warnings) == 1
        assert f"width {kept} is not a multiple of 128" in planned.warnings[0]


def test_warnings_are_about_chosen_ffns_only() -> None:
    model = tiny_model("bert", intermediate_size=1000)
    assert "width 328 is" in mlp_fusion.plan(model, 0.33, "0").warnings[0]
    assert mlp_fusion.plan(model, 128, "0").warnings == []


def test_plan_as_json_and_as_text(saved: Path) -> None:
    planned = mlp_fusion.plan(saved / "gpt2", 16, [1])
    data = json.loads(json.dumps(planned.to_dict(), allow_nan=False))
    assert data["name"] == str(saved / "gpt2")
    assert data["parameters_after"] == planned.parameters_after
    assert [row["neurons_after"] for row in data["ffns"]] == [WIDTH, 16, WIDTH]
    assert data["uniform"] is False

    lines = planned.table().splitlines()
    (fused_row,) = [line for line in lines if "transformer.h.1" in line]
    assert f"{WIDTH} → 16" in fused_row
    assert "2,128 → 544" in fused_row
    assert "(kept)" not in fused_row
    assert sum("(kept)" in line for line in lines) == 2
    assert any(line.startswith("warning: width 16") for line in lines)
    assert any(line.startswith("loads in: transformers") for line in lines)
    assert f"{planned.parameters_before:,} → {planned.parameters_after:,}" in planned.table()


# --- headers only ----------------------------------------------------------------------------------------------------


class _HeadersOnly:
    """A safetensors handle that gives names, shapes and dtypes, and nothing else."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._open = safe_open(*args, **kwargs)

    def __enter__(self) -> _HeadersOnly:
        self._handle = self._open.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def keys(self) -> Iterator[str]:
        return iter(self._handle.keys())

    def get_slice(self, name: str) -> _Header:
        piece = self._handle.get_slice(name)
        return _Header(piece.get_shape(), piece.get_dtype())


class _Header:
    def __init__(self, shape: list[int], dtype: str) -> None:
        self.get_shape = lambda: shape
        self.get_dtype = lambda: dtype


safe_open = weights_module.safe_open


def test_no_weight_is_read(saved: Path, bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = mlp_fusion.plan(saved / "bert", 16).to_dict()
    ck.edit_tensors(bert, lambda state: {k: torch.full_like(v, float("nan")) for k, v in state.items()})
    monkeypatch.setattr(weights_module, "safe_open", _HeadersOnly)
    monkeypatch.setattr(torch, "load", None)
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", None)
    assert mlp_fusion.plan(bert, 16).to_dict() == {**expected, "name": str(bert)}


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_shards(family: str, saved: Path, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path / "shards", max_shard_size="15KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    whole, shards = mlp_fusion.plan(saved / family, 0.5), mlp_fusion.plan(tmp_path / "shards", 0.5)
    assert shards.to_dict() == {**whole.to_dict(), "name": str(tmp_path / "shards")}


def test_plan_prints_and_warns_nothing(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mlp_fusion.plan(saved / "bert", 16)
    assert capfd.readouterr() == ("", "")
