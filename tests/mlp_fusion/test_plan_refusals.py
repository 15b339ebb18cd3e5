"""What `plan` refuses, each in one line that says why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import checkpoints as ck
import mlp_fusion
from families import WIDTH, tiny_model
from mlp_fusion import InputError
from mlp_fusion.store import source as source_module
from mlp_fusion.store.coverage import looks_like_ffn

Damage = Callable[[Path], object]


@pytest.mark.parametrize("prefix", ["module", "_orig_mod", "module._orig_mod", "_fsdp_wrapped_module", "left.over"])
@pytest.mark.parametrize("inner", [True, False])
def test_names_of_a_wrapped_model(prefix: str, inner: bool, bert: Path) -> None:
    ck.rename_tensors(bert, lambda name: f"{prefix}.{name if inner else name.removeprefix('bert.')}")
    message = refused(bert)
    assert f"tensors are named {prefix}.{'bert.' if inner else ''}encoder.layer.0..., as a wrapped model" in message
    assert message.endswith("save the one inside")


def test_all_of_a_config_error_is_shown(bert: Path) -> None:
    ck.edit_config(bert, hidden_size="wide")
    message = refused(bert)
    assert "hidden_size" in message
    assert "wide" in message
    ck.edit_config(bert, hidden_size=24, dtype="float99")
    assert "float99" in refused(bert)


def refused(model: Any, width: Any = 16, layers: Any = None) -> str:
    """The message of the refusal, which must be one line."""
    with pytest.raises(InputError) as caught:
        mlp_fusion.plan(model, width, layers)
    message = str(caught.value)
    assert "\n" not in message
    assert message
    return message


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c", "../x", "a-file"])
def test_no_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a-file").write_text("no folder")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(source_module, "read_config", None)  # where the hub would be asked
    assert refused(name) == f"{name}: no such folder"


def test_no_checkpoint_in_the_folder(tmp_path: Path) -> None:
    assert refused(tmp_path) == f"{tmp_path / 'config.json'} is missing: not a Hugging Face checkpoint"


@pytest.mark.parametrize("content", [b"{", b"[]", b"", b"\xff\xfe\xfa", b'{"hidden_size": 3}', b'"bert"'])
def test_config_that_is_none(content: bytes, bert: Path) -> None:
    (bert / "config.json").write_bytes(content)
    assert refused(bert).startswith(f"{bert}: config.json cannot be used (")


def test_model_type_of_another_model(bert: Path) -> None:
    ck.edit_config(bert, model_type="albert")
    message = refused(bert)
    assert message.startswith(f"{bert}: bert.encoder.layer.0.intermediate.dense.weight looks like part of an FFN")
    assert "but the 'albert' model of config.json has no place for it (3 such tensors)" in message


def test_model_without_ffns(bert: Path) -> None:
    ck.edit_config(bert, num_hidden_layers=0)
    message = refused(bert)
    assert message.startswith("bert: no FFN was found in it, which is not supported")
    assert "`mlp-fusion families bert`" in message


def test_model_type_that_nobody_knows(bert: Path) -> None:
    ck.edit_config(bert, model_type="nobody-knows-it")
    message = refused(bert)
    assert message.startswith(f"{bert}: config.json cannot be used (")
    assert "nobody-knows-it" in message


def test_code_in_the_checkpoint_is_not_run(bert: Path) -> None:
    ck.edit_config(bert, model_type="mine", auto_map={"AutoConfig": "code.Mine"})
    (bert / "code.py").write_text("raise SystemExit('ran')")
    assert refused(bert).startswith(f"{bert}: config.json cannot be used (")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "x.ckpt"])
def test_pickles(name: str, bert: Path) -> None:
    (bert / ck.WEIGHTS).rename(bert / name)
    message = refused(bert)
    assert message.startswith(f"{bert / name}: a pickle can run any code when it is loaded")
    assert "convert the checkpoint to safetensors" in message


def test_pickle_beside_safetensors_is_ignored(bert: Path) -> None:
    (bert / "pytorch_model.bin").write_bytes(b"not a pickle")
    assert len(mlp_fusion.plan(bert, 16).ffns) == 3


def test_no_weights(bert: Path) -> None:
    (bert / ck.WEIGHTS).unlink()
    assert refused(bert) == f"{bert}: no model.safetensors and no model.safetensors.index.json"


@pytest.mark.parametrize("length", [0, 4, 10, 300, -1])
def test_file_cut_short(length: int, bert: Path) -> None:
    content = (bert / ck.WEIGHTS).read_bytes()
    (bert / ck.WEIGHTS).write_bytes(content[:length])
    assert refused(bert).startswith(f"{bert / ck.WEIGHTS}: damaged or cut short (")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    tiny_model("bert").save_pretrained(tmp_path / "shards", max_shard_size="15KB")
    return tmp_path / "shards"


def edit_index(folder: Path, weight_map: Any) -> Path:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    return index


def test_missing_shard(shards: Path) -> None:
    gone = sorted(shards.glob("*.safetensors"))[1]
    gone.unlink()
    assert refused(shards).startswith(f"{gone} is missing, though model.safetensors.index.json names it")


def test_shard_cut_short(shards: Path) -> None:
    file = sorted(shards.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-4])
    assert refused(shards).startswith(f"{file}: damaged or cut short (")


def test_index_names_a_tensor_that_no_shard_has(shards: Path) -> None:
    index = json.loads((shards / "model.safetensors.index.json").read_text())["weight_map"]
    file = edit_index(shards, {**index, "bert.absent.weight": next(iter(index.values()))})
    message = refused(shards)
    assert message.startswith(f"{file}: tensor bert.absent.weight is in no shard (1 such)")


@pytest.mark.parametrize("weight_map", [3, "x", [1, 2]])
def test_index_that_is_none(weight_map: Any, shards: Path) -> None:
    file = edit_index(shards, weight_map)
    assert refused(shards).startswith(f"{file}: not a safetensors index (")


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes"])
def test_quantised(method: str, bert: Path) -> None:
    ck.edit_config(bert, quantization_config={"quant_method": method, "bits": 4})
    words = f"the weights are quantised ({method}): start from the unquantised checkpoint, or one in fp8 or mxfp4"
    assert refused(bert) == words


def test_quantised_in_memory() -> None:
    model = tiny_model("bert")
    model.config.quantization_config = {"quant_method": "awq"}
    assert "quantised (awq)" in refused(model)


def test_fused_already(tmp_path: Path) -> None:
    model = tiny_model("bert")
    mlp_fusion.fuse(model, 32)
    assert refused(model).startswith("the model is fused already")
    model.save_pretrained(tmp_path / "fused")
    assert refused(tmp_path / "fused").startswith("the model is fused already")


def test_a_config_of_layers_that_differ_in_a_family_that_builds_equal_ones(bert: Path) -> None:
    ck.edit_config(bert, per_layer_config={"1": {"intermediate_size": 32}})
    assert "transformers builds no BertForSequenceClassification from this config" in refused(bert)


@pytest.mark.parametrize(
    ("width", "words"),
    [
        (0, "must be positive"),
        (-8, "must be positive"),
        (WIDTH, f"not smaller than the FFN's {WIDTH}"),
        (4096, f"not smaller than the FFN's {WIDTH}"),
        (12, "not a multiple of 8, as engines need it: use 16"),
        (1, "not a multiple of 8, as engines need it: use 8"),
        (0.0, "strictly between 0 and 1"),
        (1.0, "strictly between 0 and 1"),
        (-0.25, "strictly between 0 and 1"),
        (16.0, "strictly between 0 and 1"),
        (float("nan"), "strictly between 0 and 1"),
        (float("inf"), "strictly between 0 and 1"),
        (0.99, f"gives {WIDTH} neurons: not smaller"),
        (True, "give a count such as 768 or a share such as 0.25"),
        (False, "give a count such as 768 or a share such as 0.25"),
        ("16", "give a number, a count such as 768 or a share such as 0.25, or auto"),
        (None, "give a count such as 768 or a share such as 0.25"),
    ],
)
def test_widths_refused(width: Any, words: str, saved: Path) -> None:
    message = refused(saved / "bert", width)
    assert words in message
    assert str(width) in message


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ("3", "layers 3 out of range: the model has FFNs in layers 0-2"),
        ("1-7", "layers 3, 4, 5, 6, 7 out of range"),
        ([0, 5], "layers 5 out of range"),
        ("0-99999999999", "layers 3, 4, 5, 6, 7, 8, 9, 10, ... out of range"),
        ("0,50-99999999999", "layers 50, 51, 52, 53, 54, 55, 56, 57, ... out of range"),
        (range(10**12), "layers 3 out of range"),
        ("9" * 5000, "cannot be read"),
        ([-1], "layers -1 out of range"),
        ("", "layers '' cannot be read"),
        ("some", "layers 'some' cannot be read"),
        ("0,,1", "layers '' cannot be read"),
        ("1.5", "layers '1.5': no FFN lies there; the first is bert.encoder.layer.0"),
        ("decoder.*", "layers 'decoder.*': no FFN lies there; the first is bert.encoder.layer.0"),
        ("-1", "layers '-1' cannot be read"),
        ("0-", "layers '0-' cannot be read"),
        ("2-1", "layers '2-1': the range runs backwards"),
        ("last:0", "layers 'last:0': the model has 3 FFNs"),
        ("first:4", "layers 'first:4': the model has 3 FFNs"),
        ([], "no layer chosen"),
        (range(0), "no layer chosen"),
        ([True], "layers holds True"),
        ([0.0], "layers holds 0.0"),
        (["0"], "layers holds '0'"),
    ],
)
def test_layers_refused(layers: Any, words: str, saved: Path) -> None:
    assert words in refused(saved / "bert", 16, layers)


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        (None, [0, 1, 2]),
        ("all", [0, 1, 2]),
        ("1", [1]),
        ("0-1", [0, 1]),
        ("first:2", [0, 1]),
        ("last:2", [1, 2]),
        ("2, 0", [0, 2]),
        ("0,first:1,0-0", [0]),
        (range(1, 3), [1, 2]),
        ((2, 2), [2]),
        (iter([1]), [1]),
        ("encoder.*", [0, 1, 2]),
        ("*.1", [1]),
        ("encoder.layer.2,0", [0, 2]),
    ],
)
def test_layers_accepted(layers: Any, chosen: list[int], saved: Path) -> None:
    assert [f.layer for f in mlp_fusion.plan(saved / "bert", 16, layers).ffns if f.chosen] == chosen


@pytest.mark.parametrize(
    "name",
    [
        "bert.encoder.layer.0.ffn_extra.mlp.weight",
        "bert.encoder.layer.0.mlp.experts.3.weight",
        "bert.encoder.layer.1.intermediate.extra.weight",
        "decoder.layers.0.fc1.weight",
        "bert.encoder.layer.0.feed_forward.w1.weight",
    ],
)
def test_a_tensor_that_looks_like_an_ffn_and_belongs_to_none(name: str, bert: Path) -> None:
    ck.edit_tensors(bert, lambda state: {**state, name: torch.ones(8, 24)})
    message = refused(bert)
    assert message.startswith(
        f"{bert}: {name} looks like part of an FFN, but the 'bert' model of config.json has no place"
    )


def test_other_unknown_tensors_are_no_ffn(bert: Path) -> None:
    extra = {
        "bert.encoder.layer.0.attention.mlp.weight": torch.ones(8, 24),  # a part of attention
        "bert.encoder.layer.0.mlp.scale": torch.ones(24),  # one number per channel: no projection
        "adapter.table": torch.ones(3, 3),
    }
    before = mlp_fusion.plan(bert, 16)
    ck.edit_tensors(bert, lambda state: {**state, **extra})
    after = mlp_fusion.plan(bert, 16)
    assert after.ffns == before.ffns
    assert after.parameters_after == before.parameters_after + 8 * 24 + 24 + 9


def test_names_of_ffns() -> None:
    for name in ("a.mlp.up_proj.weight", "block.0.layer.1.DenseReluDense.wi_0.weight", "h.0.mlp.dense_h_to_4h.weight",
                 "layers.3.block_sparse_moe.experts.7.w2.weight", "layers.0.mlp.shared_expert.up_proj.weight",
                 "x.feedforward.weight", "encoder.0.ff.weight"):  # fmt: skip
        assert looks_like_ffn(name), name
    for name in ("model.layers.0.self_attn.o_proj.weight", "embeddings.word_embeddings.weight", "lm_head.weight",
                 "encoder.layer.0.attention.output.dense.weight", "classifier.out_proj.weight"):  # fmt: skip
        assert not looks_like_ffn(name), name


@pytest.mark.parametrize("below", ["intermediate.dense", "output.dense"])
def test_incomplete_ffn(below: str, bert: Path) -> None:
    ck.drop_tensor(bert, f"bert.encoder.layer.1.{below}.weight")
    assert refused(bert) == (
        f"{bert}: bert.encoder.layer.1.{below}.weight is missing: the checkpoint is incomplete"
    )  # fmt: skip


@pytest.mark.parametrize("role", ["gate_proj", "up_proj", "down_proj"])
def test_incomplete_gated_ffn(role: str, saved: Path, tmp_path: Path) -> None:
    folder = ck.drop_tensor(ck.copy(saved / "qwen3", tmp_path / "x"), f"layers.2.mlp.{role}.weight")
    assert refused(folder) == f"{folder}: model.layers.2.mlp.{role}.weight is missing: the checkpoint is incomplete"


def test_checkpoint_without_any_ffn(bert: Path) -> None:
    ck.drop_tensor(bert, "encoder.")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert refused(bert) == f"{bert}: {name} is missing: the checkpoint is incomplete"


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [(torch.int8, "I8"), (torch.uint8, "U8"), (torch.bool, "BOOL"), (torch.float8_e4m3fn, "F8_E4M3")],
)
def test_ffn_weights_that_are_no_floating_point(dtype: torch.dtype, stored: str, bert: Path) -> None:
    name = "bert.encoder.layer.1.output.dense.weight"
    ck.replace_tensor(bert, name, lambda weight: weight.to(dtype))
    assert refused(bert) == f"{bert}: {name} is stored as {stored}: start from the unquantised checkpoint"


def test_activations_that_the_kernels_do_not_know_are_no_obstacle(saved: Path, bert: Path) -> None:
    ck.edit_config(bert, hidden_act="tanh")
    assert mlp_fusion.plan(bert, 16).ffns == mlp_fusion.plan(saved / "bert", 16).ffns


@pytest.mark.parametrize("module", [nn.Linear(2, 2), nn.Sequential()])
def test_modules_that_are_no_hugging_face_model(module: nn.Module) -> None:
    assert "give a Hugging Face model" in refused(module)


def _other_width(folder: Path) -> None:
    ck.edit_config(folder, intermediate_size=48)


def _layer_gone(folder: Path) -> None:
    ck.drop_tensor(folder, "encoder.layer.1.")


def _uneven(folder: Path) -> None:
    ck.replace_tensor(folder, "bert.encoder.layer.1.output.dense.weight", lambda weight: weight[:, :40])


def _flat(folder: Path) -> None:
    ck.replace_tensor(folder, "bert.encoder.layer.1.intermediate.dense.weight", torch.flatten)


@pytest.mark.parametrize("damage", [_other_width, _layer_gone, _uneven, _flat])
def test_tensors_that_disagree_with_the_config(damage: Damage, bert: Path) -> None:
    damage(bert)
    refused(bert)


def test_a_dtype_that_no_model_can_have(tmp_path: Path) -> None:
    folder = ck.edit_config(ck.save_tiny(tmp_path / "bert"), dtype="int8")
    with pytest.raises(InputError, match=r"config\.json says dtype int8, in which no model can be loaded"):
        mlp_fusion.plan(folder, 16)
