"""Which files hold the weights: what transformers loads is what is read, planned, copied and verified, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import checkpoints as ck
import mlp_fusion
from families import tiny_model
from mlp_fusion import InputError
from mlp_fusion.store.weights import TensorInfo, find_weights, read_tensors, widest_dtype

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT in three shards."""
    folder = tmp_path_factory.mktemp("sharded") / "bert"
    tiny_model("bert").save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) == 3
    return folder


@pytest.fixture
def shards(sharded: Path, tmp_path: Path) -> Path:
    return ck.copy(sharded, tmp_path / "shards")


def refused(folder: Path, tmp_path: Path) -> str:
    """The message with which every command refuses the weights in `folder`."""
    messages = []
    for command in (
        lambda: mlp_fusion.plan(folder, 16),
        lambda: mlp_fusion.compress(folder, tmp_path / "out", 16),
        lambda: mlp_fusion.finetune(
            folder, tmp_path / "out", [{"text": "a", "label": n} for n in (0, 1)], task="classification"
        ),
    ):
        with pytest.raises(InputError) as caught:
            command()
        messages.append(str(caught.value))
        assert not (tmp_path / "out").exists()
    assert len(set(messages)) == 1
    assert "\n" not in messages[0]
    return messages[0]


def edit_index(folder: Path, change: Callable[[dict[str, str]], dict[str, str]]) -> None:
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"] = change(content["weight_map"])
    (folder / INDEX).write_text(json.dumps(content))


def save_whole(folder: Path, seed: int) -> None:
    """Put a single file beside what is in `folder`."""
    model = tiny_model("bert", seed=seed)
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, folder / ck.WEIGHTS, metadata={"format": "pt"}
    )


def test_an_index_beside_another_single_file_is_refused(shards: Path, tmp_path: Path) -> None:
    save_whole(shards, seed=1)
    message = refused(shards, tmp_path)
    assert "holds model.safetensors and model.safetensors.index.json, and they differ" in message
    assert message.endswith("remove whichever is out of date")


def test_one_value_is_difference_enough(shards: Path, tmp_path: Path) -> None:
    save_whole(shards, seed=0)
    name = "bert.encoder.layer.2.output.dense.bias"
    state = load_file(shards / ck.WEIGHTS)
    state[name][-1] += 1e-3
    save_file(state, shards / ck.WEIGHTS, metadata={"format": "pt"})
    assert f"they differ (in {name})" in refused(shards, tmp_path)


def test_an_index_whose_shards_are_gone_is_refused_beside_a_single_file(shards: Path, tmp_path: Path) -> None:
    save_whole(shards, seed=0)
    first = sorted(shards.glob("model-*.safetensors"))[0]
    first.unlink()
    assert refused(shards, tmp_path).startswith(f"{first} is missing, though {INDEX} names it")


def test_equal_weights_twice_are_the_single_file(shards: Path, tmp_path: Path) -> None:
    save_whole(shards, seed=0)
    assert find_weights(shards).files == [shards / ck.WEIGHTS]
    mlp_fusion.compress(shards, tmp_path / "out", 16)
    assert [p.name for p in (tmp_path / "out").glob("*.safetensors*")] == [ck.WEIGHTS]
    assert mlp_fusion.verify(tmp_path / "out").passed


def test_an_index_of_the_single_file_goes_along(sharded: Path, tmp_path: Path) -> None:
    folder = ck.save_tiny(tmp_path / "one")
    shutil.copyfile(sharded / INDEX, folder / INDEX)
    edit_index(folder, lambda index: dict.fromkeys(index, ck.WEIGHTS))
    mlp_fusion.compress(folder, tmp_path / "out", 16)
    after = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    assert after == dict.fromkeys(ck.tensors(folder), ck.WEIGHTS)
    assert mlp_fusion.verify(tmp_path / "out").passed


@pytest.mark.parametrize(
    "name",
    ["part1/model.safetensors", "../model.safetensors", "/model.safetensors", "./a.safetensors", "..", "",
     "mlp_fusion/scale.safetensors", "a\\b.safetensors", "a\0.safetensors", "weights.bin", "x" * 300 + ".safetensors"],
)  # fmt: skip
def test_shards_elsewhere_are_refused(name: str, shards: Path, tmp_path: Path) -> None:
    for folder in (shards / "part1", shards / "mlp_fusion"):
        folder.mkdir()
        for file in ("model.safetensors", "scale.safetensors"):
            shutil.copyfile(sorted(shards.glob("*.safetensors"))[0], folder / file)
    moved = sorted(set(json.loads((shards / INDEX).read_text())["weight_map"].values()))[0]
    edit_index(shards, lambda index: {k: name if v == moved else v for k, v in index.items()})
    message = refused(shards, tmp_path)
    assert message.startswith(f"{shards / INDEX}: shard ")
    assert "put all shards there and name them so" in message


def test_a_tensor_in_two_shards_is_refused(shards: Path, tmp_path: Path) -> None:
    first, *_, last = sorted(shards.glob("*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(last), name: tensor + 1}, last, metadata={"format": "pt"})
    assert f"{last}: tensor {name} is in {first.name} as well" in refused(shards, tmp_path)


def test_an_index_that_names_the_wrong_shard_is_set_right(shards: Path, tmp_path: Path) -> None:
    before = json.loads((shards / INDEX).read_text())["weight_map"]
    files = sorted(set(before.values()))
    edit_index(shards, lambda index: {k: files[(files.index(v) + 1) % 3] for k, v in index.items()})
    unnamed = next(iter(before))
    edit_index(shards, lambda index: {k: v for k, v in index.items() if k != unnamed})
    mlp_fusion.compress(shards, tmp_path / "out", 16)
    assert json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"] == before
    assert mlp_fusion.verify(tmp_path / "out").passed


@pytest.mark.parametrize("weight_map", [{}, {"a": 3}, {"a": None}])
def test_an_index_that_names_nothing_is_refused(weight_map: dict[str, str], shards: Path) -> None:
    edit_index(shards, lambda _: weight_map)
    with pytest.raises(InputError, match=r"names no tensor|not a safetensors index"):
        read_tensors(shards)


@pytest.mark.parametrize("content", ["{", "[]", '"x"', '{"weight_map": {"a": "model-00001-of-00003.safetensors"}}'])
def test_an_index_that_transformers_could_not_use_is_refused(content: str, shards: Path, tmp_path: Path) -> None:
    (shards / INDEX).write_text(content)
    assert refused(shards, tmp_path).startswith(f"{shards / INDEX}: not a safetensors index (")


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "consolidated.safetensors"])
def test_variants_beside_are_left_alone_and_do_not_stand_in(name: str, tmp_path: Path) -> None:
    folder = ck.save_tiny(tmp_path / "bert")
    (folder / "onnx").mkdir()
    for target in (folder / name, folder / "onnx" / ck.WEIGHTS):
        save_file({"other": torch.zeros(2)}, target)
    (folder / "model.fp16.safetensors.index.json").write_text("{}")
    mlp_fusion.compress(folder, tmp_path / "out", 16)
    files = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.safetensors*")}
    assert files == {ck.WEIGHTS, ck.SCALE, ck.REFERENCE}
    (folder / ck.WEIGHTS).unlink()
    with pytest.raises(InputError, match=f"which transformers loads: there is {min(name, 'model.fp16')}"):
        mlp_fusion.plan(folder, 16)


def test_adapters_are_refused(tmp_path: Path) -> None:
    folder = ck.save_tiny(tmp_path / "bert")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))
    message = refused(folder, tmp_path)
    assert message.startswith(f"{folder / 'adapter_config.json'}: the folder holds an adapter: merge it")


def test_a_config_that_names_other_files_is_refused(tmp_path: Path) -> None:
    folder = ck.save_tiny(tmp_path / "bert")
    shutil.copyfile(folder / ck.WEIGHTS, folder / "other.safetensors")
    ck.edit_config(folder, transformers_weights="other.safetensors")
    assert "rename the file to model.safetensors and remove the entry" in refused(folder, tmp_path)
    ck.edit_config(folder, transformers_weights="model.safetensors")
    assert len(mlp_fusion.plan(folder, 16).ffns) == 3


def test_links_are_followed(sharded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "links"
    folder.mkdir()
    for file in sharded.iterdir():
        (folder / file.name).symlink_to(file)
    mlp_fusion.compress(folder, tmp_path / "out", 16)
    assert not any(p.is_symlink() for p in (tmp_path / "out").rglob("*"))
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert loaded.config.intermediate_size == 16


def test_the_widest_dtype_holds_them_all(sharded: Path) -> None:
    headers = read_tensors(sharded)
    assert widest_dtype(headers) == torch.float32
    assert widest_dtype({"a": TensorInfo((1,), "F16"), "b": TensorInfo((1,), "BF16")}) == torch.float32
    assert widest_dtype({"a": TensorInfo((1,), "F16"), "b": TensorInfo((1,), "I64")}) == torch.float16
    assert widest_dtype({}) == torch.float32
