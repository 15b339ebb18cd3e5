"""`verify` sees any damage to a fused checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import checkpoints as ck
import mlp_fusion
from checkpoints import B_IN, REFERENCE, W_IN, W_OUT
from families import WIDTH, token_batch
from mlp_fusion import InputError, Verification
from mlp_fusion.store.record import FORMAT_VERSION


def load(folder: Path, task: str = "SequenceClassification", **options: Any) -> Any:
    cls = transformers.AutoModel if task == "Model" else getattr(transformers, f"AutoModelFor{task}")
    return cls.from_pretrained(folder, **options)


# --- verify ----------------------------------------------------------------------------------------------------------


def failed(verified: Verification) -> set[str]:
    """The names of the checks that failed; `passed` must say the same."""
    names = {check.name for check in verified.checks if not check.passed}
    assert verified.passed is (not names)
    return names


def detail(verified: Verification, name: str) -> str:
    (found,) = [check.detail for check in verified.checks if check.name == name]
    return found


@pytest.mark.parametrize("which", ["fused", "uneven"])
def test_verify_passes(which: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(which)
    verified = mlp_fusion.verify(folder)
    assert failed(verified) == set()
    assert [check.name for check in verified.checks] == ["shapes", "finite", "loads", "outputs", "scale"]
    assert detail(verified, "shapes") == f"3 FFNs, {3 if which == 'fused' else 1} of them fused"
    assert detail(verified, "finite") == f"{len(ck.tensors(folder))} tensors"
    data = json.loads(json.dumps(verified.to_dict(), allow_nan=False))
    assert data["passed"] is True
    assert data["checkpoint"] == str(folder)
    assert verified.table().count(" ok ") == 5
    assert "FAILED" not in verified.table()


def test_verify_leaves_the_checkpoint_alone(broken: Path) -> None:
    before = {p: p.read_bytes() for p in broken.rglob("*") if p.is_file()}
    mlp_fusion.verify(broken)
    assert {p: p.read_bytes() for p in broken.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    "name",
    [
        f"bert.encoder.layer.2.{W_OUT}",
        f"bert.encoder.layer.0.{W_IN}",
        "bert.encoder.layer.1.attention.self.query.weight",
        "classifier.bias",
    ],
)
def test_a_changed_weight(name: str, broken: Path) -> None:
    ck.replace_tensor(broken, name, lambda tensor: tensor * 1.02)
    verified = mlp_fusion.verify(broken)
    assert failed(verified) == {"outputs"}
    assert float(re.findall(r"difference of logits (\S+) ", detail(verified, "outputs"))[0]) > 1e-4
    assert verified.to_dict()["passed"] is False
    assert verified.table().count("FAILED") == 1


def test_neurons_in_another_order_on_one_side(broken: Path) -> None:
    ck.replace_tensor(broken, f"bert.encoder.layer.1.{W_OUT}", lambda weight: weight.flip(1))
    assert failed(mlp_fusion.verify(broken)) == {"outputs"}


def test_neurons_in_another_order_on_both_sides(broken: Path) -> None:
    for rest, axis in ((W_IN, 0), (B_IN, 0), (W_OUT, 1)):
        ck.replace_tensor(broken, f"bert.encoder.layer.1.{rest}", lambda tensor, axis=axis: tensor.flip(axis))
    assert failed(mlp_fusion.verify(broken)) == set()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite(value: float, broken: Path) -> None:
    # The embedding of a token that the recorded sequence does not hold: only looking at every weight finds it.
    unused = min(set(range(97)) - set(load_file(broken / REFERENCE)["input_ids"].flatten().tolist()))

    def damage(tensor: Tensor) -> Tensor:
        tensor[unused % len(tensor), 0] = value
        return tensor

    name = "bert.embeddings.word_embeddings.weight"
    ck.replace_tensor(broken, name, damage)
    verified = mlp_fusion.verify(broken)
    assert failed(verified) == {"finite"}
    assert detail(verified, "finite") == f"{name} holds NaN or Inf"
    ck.replace_tensor(broken, f"bert.encoder.layer.0.{W_OUT}", damage)
    assert failed(mlp_fusion.verify(broken)) == {"finite", "outputs"}


def test_width_in_the_config_changed(broken: Path) -> None:
    ck.edit_config(broken, intermediate_size=24)
    verified = mlp_fusion.verify(broken)
    assert failed(verified) == {"shapes", "loads", "outputs", "scale"}
    name = f"bert.encoder.layer.0.{B_IN}"
    assert detail(verified, "shapes") == f"{broken}: {name} is (16,), but config.json makes it (24,)"
    assert "has another shape than config.json says" in detail(verified, "loads")


def test_widths_of_the_record_lost(uneven: Path, tmp_path: Path) -> None:
    record = ck.read_config(uneven)["mlp_fusion"]
    del record["widths"]
    folder = ck.edit_config(ck.copy(uneven, tmp_path / "x"), mlp_fusion=record)
    verified = mlp_fusion.verify(folder)
    assert failed(verified) == {"shapes", "loads", "outputs", "scale"}
    name = f"bert.encoder.layer.2.{B_IN}"
    assert detail(verified, "shapes") == f"{folder}: {name} is (16,), but config.json makes it ({WIDTH},)"
    assert "bert.encoder.layer.2." in detail(verified, "loads")


def test_one_ffn_narrower_than_the_config_says(broken: Path) -> None:
    for rest, axis in ((W_IN, 0), (B_IN, 0), (W_OUT, 1)):
        ck.replace_tensor(broken, f"bert.encoder.layer.1.{rest}", lambda tensor, axis=axis: tensor.narrow(axis, 0, 8))
    verified = mlp_fusion.verify(broken)
    assert failed(verified) == {"shapes", "loads", "outputs"}
    name = f"bert.encoder.layer.1.{B_IN}"
    assert detail(verified, "shapes") == f"{broken}: {name} is (8,), but config.json makes it (16,)"


@pytest.mark.parametrize("rest", [W_IN, B_IN, W_OUT, "output.dense.bias"])
def test_a_lost_ffn_tensor(rest: str, broken: Path) -> None:
    name = f"bert.encoder.layer.1.{rest}"
    ck.drop_tensor(broken, name)
    verified = mlp_fusion.verify(broken)
    assert failed(verified) >= {"loads", "outputs"}
    assert detail(verified, "loads") == f"{name} is missing"


def test_another_reference(broken: Path) -> None:
    reference = load_file(broken / REFERENCE)
    save_file({**reference, "logits": reference["logits"] * 1.01}, broken / REFERENCE)
    assert failed(mlp_fusion.verify(broken)) == {"outputs"}
    save_file({**reference, "input_ids": reference["input_ids"].flip(1)}, broken / REFERENCE)
    assert failed(mlp_fusion.verify(broken)) == {"outputs"}


def test_against_the_source_recorded_outputs_count_too(source: Path, fused: Path, broken: Path) -> None:
    names = ["shapes", "finite", "loads", "outputs", "scale", "unchanged"]
    verified = mlp_fusion.verify(fused, source)
    assert (failed(verified), [check.name for check in verified.checks]) == (set(), names)
    name = f"bert.encoder.layer.1.{W_IN}"
    ck.replace_tensor(broken, name, torch.randn_like)
    assert failed(mlp_fusion.verify(broken, source)) == {"outputs"}
    ck.replace_tensor(broken, name, lambda _: ck.tensors(fused)[name])
    ck.replace_tensor(broken, "bert.encoder.layer.1.attention.self.query.weight", lambda weight: weight * (1 + 2e-7))
    assert failed(mlp_fusion.verify(broken, str(source))) == {"unchanged"}
    ck.edit_config(broken, intermediate_size=24)
    assert "shapes" in failed(mlp_fusion.verify(broken, source))


def test_against_the_model_in_memory(source: Path, fused: Path, broken: Path) -> None:
    model = load(source)
    original = load(source)
    mlp_fusion.fuse(model, 16)
    (broken / REFERENCE).unlink()
    assert failed(mlp_fusion.verify(broken, model)) == set()
    assert failed(mlp_fusion.verify(fused, against=original)) == {"outputs"}
    other = load(source)
    mlp_fusion.fuse(other, 16, seed=1)
    assert failed(mlp_fusion.verify(broken, other)) == {"outputs"}


def test_against_a_model_that_was_trained_on_and_saved(source: Path, tmp_path: Path) -> None:
    model = load(source)
    mlp_fusion.fuse(model, 16, "0-1", optimizer="sgd")
    model.save_pretrained(tmp_path / "early")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model(**token_batch(), labels=torch.tensor([0, 1, 1, 0])).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "late")
    assert failed(mlp_fusion.verify(tmp_path / "late", model)) == set()
    assert failed(mlp_fusion.verify(tmp_path / "early", model)) == {"outputs"}


def test_the_scale_file_is_part_of_the_checkpoint(broken: Path, tmp_path: Path) -> None:
    scales = ck.scales(broken)
    assert detail(mlp_fusion.verify(broken), "scale").startswith("of 3 FFNs, the largest ")
    first = min(scales)
    for change, seen in {
        "fewer": ({k: v for k, v in scales.items() if k != first}, "no scale for layer 0"),
        "NaN": ({**scales, first: scales[first] * torch.nan}, "NaN or Inf"),
        "zero": ({**scales, first: scales[first] * 0.0}, "is 0 for neurons that have an output"),
        "short": ({**scales, first: scales[first][1:]}, "has 15 entries, the layer 16 neurons"),
        "unknown": ({**scales, "x.scale": scales[first]}, "x.scale fits no layer"),
    }.values():
        ck.put_scales(broken, change)
        verified = mlp_fusion.verify(broken)
        assert failed(verified) == {"scale"}
        assert seen in detail(verified, "scale")
    (broken / ck.SCALE).unlink()
    verified = mlp_fusion.verify(broken)
    assert failed(verified) == {"scale"}
    assert "is missing, which fused checkpoints have" in detail(verified, "scale")


def test_a_checkpoint_folded_for_good_has_no_scale(source: Path, tmp_path: Path) -> None:
    mlp_fusion.compress(source, tmp_path / "out", 16, optimizer=None, device="cpu")
    verified = mlp_fusion.verify(tmp_path / "out")
    assert failed(verified) == set()
    assert "nothing to restore" in detail(verified, "scale")


def test_a_method_that_gives_no_scale_leaves_none_to_restore(source: Path, tmp_path: Path) -> None:
    mlp_fusion.compress(source, tmp_path / "out", 16, method="prune", device="cpu")
    assert not (tmp_path / "out" / ck.SCALE).exists()
    assert failed(mlp_fusion.verify(tmp_path / "out")) == set()
    with pytest.raises(InputError, match="nothing to restore"):
        mlp_fusion.restore(load(tmp_path / "out"), tmp_path / "out")
    model = load(source)
    mlp_fusion.fuse(model, 16, method="prune")
    assert model.config.mlp_fusion["parameterization"] == "folded"


def test_a_format_of_the_future_is_refused(broken: Path) -> None:
    ck.edit_config(broken, mlp_fusion={**ck.read_config(broken)["mlp_fusion"], "format": 99})
    assert f"format 99, this version knows {FORMAT_VERSION}: update mlp-fusion" in verify_refused(broken)


def test_the_callers_model_keeps_its_modes(source: Path, tmp_path: Path) -> None:
    model = load(source)
    mlp_fusion.fuse(model, 16)
    model.save_pretrained(tmp_path / "out")
    model.train()
    model.bert.encoder.layer[1].eval()
    before = [module.training for module in model.modules()]
    assert len(set(before)) == 2
    mlp_fusion.verify(tmp_path / "out", against=model)
    assert [module.training for module in model.modules()] == before


def verify_refused(folder: Any) -> str:
    with pytest.raises(InputError) as caught:
        mlp_fusion.verify(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_verify_refuses_what_is_not_fused(source: Path, tmp_path: Path) -> None:
    assert verify_refused(source) == f"{source}: not a fused checkpoint: config.json has no 'mlp_fusion' entry"
    assert verify_refused(tmp_path / "nowhere") == f"{tmp_path / 'nowhere'}: no such folder"
    assert verify_refused(source / "config.json") == f"{source / 'config.json'}: no such folder"
    assert "not a Hugging Face checkpoint" in verify_refused(tmp_path)


def test_verify_refuses_what_cannot_be_compared(broken: Path) -> None:
    (broken / REFERENCE).unlink()
    assert verify_refused(broken) == (
        f"{broken / REFERENCE} is missing, only compress writes it: use mlp_fusion.verify(folder, against=model)"
    )


def test_verify_refuses_a_file_cut_short(broken: Path) -> None:
    (broken / ck.WEIGHTS).write_bytes((broken / ck.WEIGHTS).read_bytes()[:-1])
    assert verify_refused(broken).startswith(f"{broken / ck.WEIGHTS}: damaged or cut short")
    (broken / ck.WEIGHTS).unlink()
    assert "no model.safetensors" in verify_refused(broken)


def _reference_cut_short(folder: Path) -> None:
    (folder / REFERENCE).write_bytes((folder / REFERENCE).read_bytes()[:-1])


def _record_empty(folder: Path) -> None:
    ck.edit_config(folder, mlp_fusion={})


@pytest.mark.parametrize("damage", [_reference_cut_short, _record_empty])
def test_verify_refuses_damaged_records(damage: Callable[[Path], None], broken: Path) -> None:
    damage(broken)
    verify_refused(broken)
