"""State dicts of two forms under the same names: known, said, or refused before a weight is loaded."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint.state_dict as distributed
from accelerate import Accelerator
from accelerate.utils import modeling as accelerated
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.utils.data import Dataset
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments
from transformers.trainer_utils import load_sharded_checkpoint

import checkpoints as ck
from families import tiny_model, token_batch
from mlp_fusion import FusedMLP, InputError, fuse, restore, state_form
from mlp_fusion.modules import Scaled
from mlp_fusion.store.record import FORMAT_VERSION

pytestmark = pytest.mark.slow

BATCH = token_batch()
#: Optimisers of the two forms with an explicit scale.
FORMS = ["adamw", "sgd"]


def logits(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        found: Tensor = model(**BATCH).logits
    return found


def fused(family: str, optimizer: str, shift: float = 0.0) -> Any:
    """A tiny fused model; with a `shift`, all its parameters are moved a little, as training would."""
    model = tiny_model(family)
    fuse(model, 16, optimizer=optimizer, sample=BATCH)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0 + shift)
    return model


def same(model: Any, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(logits(model), expected, rtol=tolerance, atol=tolerance)


def partial_states(model: Any) -> dict[str, dict[str, Tensor]]:
    """Parts of the model's own state in which an FFN has no scale."""
    parameters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainable = {name: tensor for name, tensor in parameters.items() if "embed" not in name}
    averaged = {name: tensor * 0.5 + tensor * 0.5 for name, tensor in parameters.items()}
    outputs = {n: t for n, t in parameters.items() if "output.dense" in n or "c_proj" in n or "down_proj" in n}
    return {"parameters": parameters, "trainable": trainable, "averaged": averaged, "outputs": outputs}


@pytest.mark.parametrize("optimizer", FORMS)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_part_of_a_models_own_state_is_asked_about(family: str, optimizer: str) -> None:
    source = fused(family, optimizer, shift=0.05)
    expected = logits(source)
    for name, state in partial_states(source).items():
        target = copy.deepcopy(source)
        with torch.no_grad():
            for key, parameter in target.named_parameters():
                parameter.mul_(0.9 if key in state else 1.0)
        before = logits(target)
        for strict in (False, True):
            with pytest.raises(InputError, match=r"comes without .*scale.*state_form"):
                target.load_state_dict(state, strict=strict)
            torch.testing.assert_close(logits(target), before, rtol=0, atol=0, msg=f"{name}: half loaded")
        with state_form("own"):
            target.load_state_dict(state, strict=False)
        torch.testing.assert_close(logits(target), expected, rtol=0, atol=0)


def test_parts_that_are_alike_in_both_forms_need_no_answer() -> None:
    """Explicit scale: the input projections carry none of it; attention and embeddings never do."""
    source, target = fused("bert", "adamw", shift=0.05), fused("bert", "adamw")
    part = {n: p.detach() for n, p in source.named_parameters() if not n.endswith("output.dense.weight")}
    part |= {n: p.detach() for n, p in source.named_parameters() if "attention" in n}
    target.load_state_dict(part, strict=False)
    same(target, logits(source), 0.2)
    split = fused("bert", "sgd")
    with pytest.raises(InputError, match=r"intermediate\.dense\.weight comes without"):
        split.load_state_dict(part, strict=False)
    folded = tiny_model("bert")
    fuse(folded, 16, optimizer=None, sample=BATCH)
    folded.load_state_dict({n: p * 1.01 for n, p in folded.named_parameters()}, strict=False)


@pytest.mark.parametrize("optimizer", FORMS)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_plain_tensors_are_rescaled_one_by_one(family: str, optimizer: str, tmp_path: Path) -> None:
    source = fused(family, optimizer, shift=0.05)
    source.save_pretrained(tmp_path)
    target = fused(family, optimizer)
    with state_form("plain"):
        for name, tensor in load_file(tmp_path / "model.safetensors").items():
            target.load_state_dict({name: tensor}, strict=False)
    same(target, logits(source))


@pytest.mark.parametrize("optimizer", FORMS)
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_sharded_checkpoints_say_what_they_are(family: str, optimizer: str, tmp_path: Path) -> None:
    source = fused(family, optimizer, shift=0.05)
    source.save_pretrained(tmp_path, max_shard_size="8KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 3
    target = fused(family, optimizer)
    load_sharded_checkpoint(target, tmp_path, strict=False)
    same(target, logits(source))
    by_hand = fused(family, optimizer)
    refused = 0
    for shard in shards:
        try:
            by_hand.load_state_dict(load_file(shard), strict=False)
        except InputError:
            refused += 1
    assert refused >= 2
    # A folder that says nothing of a fusion says nothing of its weights.
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "mlp_fusion"}))
    with pytest.raises(InputError, match="comes without"):
        load_sharded_checkpoint(fused(family, optimizer), tmp_path, strict=False)


class _Examples(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {"input_ids": torch.randint(3, 97, (9,), generator=generator), "labels": torch.tensor(index % 2)}


@pytest.mark.parametrize("optimizer", FORMS)
@pytest.mark.parametrize("size", ["50GB", "24KB"], ids=["whole", "sharded"])
def test_trainer_resumes_and_takes_the_best(
    size: str, optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no", learning_rate=1e-3,
    )  # fmt: skip
    source = fused("bert", optimizer, shift=0.05)
    source.save_pretrained(tmp_path / "checkpoint-1", max_shard_size=size)
    trainer = Trainer(model=fused("bert", optimizer), args=arguments, train_dataset=_Examples())
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    same(trainer.model, logits(source))
    best = Trainer(model=fused("bert", optimizer), args=arguments, train_dataset=_Examples())
    best.state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
    best._load_best_model()
    same(best.model, logits(source))


@pytest.mark.parametrize("optimizer", FORMS)
def test_other_ways_in_ask_the_same_questions(optimizer: str, tmp_path: Path) -> None:
    source = fused("bert", optimizer, shift=0.05)
    source.save_pretrained(tmp_path)
    plain = load_file(tmp_path / "model.safetensors")
    target = fused("bert", optimizer)
    before = logits(target)
    options = StateDictOptions(full_state_dict=True, strict=False)
    with pytest.raises(InputError, match="comes without"):
        distributed.set_model_state_dict(target, plain, options=options)
    with pytest.raises(InputError, match="cannot be set one by one"):
        accelerated.load_checkpoint_in_model(target, tmp_path, device_map={"": "cpu"})
    torch.testing.assert_close(logits(target), before, rtol=0, atol=0)
    with state_form("plain"):
        distributed.set_model_state_dict(target, plain, options=options)
    same(target, logits(source))
    other = fused("bert", optimizer)
    accelerated.load_checkpoint_in_model(other, tmp_path)
    same(other, logits(source))
    unfused = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    accelerated.load_checkpoint_in_model(unfused, tmp_path, device_map={"": "cpu"})
    same(unfused, logits(source))


def test_what_is_said_must_fit_what_there_is() -> None:
    model = fused("bert", "adamw")
    own = model.state_dict()
    with state_form("plain"), pytest.raises(InputError, match="said to be plain, but holds"):
        model.load_state_dict(own)
    with pytest.raises(InputError, match="state_form 'folded': use plain"), state_form("folded"):  # type: ignore[arg-type]
        pass
    wider = tiny_model("bert")
    fuse(wider, 32, sample=BATCH)
    with state_form("plain"), pytest.raises(InputError, match=r"shape \(24, 32\), the model's FFN has 16 neurons"):
        model.load_state_dict(dict(wider.named_parameters()), strict=False)


def test_a_scale_is_never_dropped(tmp_path: Path) -> None:
    source = fused("bert", "adamw", shift=0.05)
    source.save_pretrained(tmp_path / "plain")
    own = source.state_dict()
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain")
    with pytest.raises(InputError, match="the model has no place for it"):
        plain.load_state_dict(own, strict=False)
    same(plain, logits(source))
    Accelerator(cpu=True).save_model(source, str(tmp_path / "own"), safe_serialization=True)
    source.config.save_pretrained(tmp_path / "own")
    with pytest.raises(InputError, match="the model has no place for it"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "own")
    with pytest.raises(InputError, match="the model has no place for it"):
        type(source).from_pretrained(None, config=source.config, state_dict=own)
    parameters = {name: parameter.detach() for name, parameter in source.named_parameters()}
    with pytest.raises(InputError, match="may be plain or the model's own"):
        type(source).from_pretrained(None, config=source.config, state_dict=parameters)
    with state_form("plain"):
        state = load_file(tmp_path / "plain" / "model.safetensors")
        loaded = type(source).from_pretrained(None, config=source.config, state_dict=state)
    same(loaded, logits(source))
    merged = fused("gpt2", "adamw")
    own = copy.deepcopy(merged.state_dict())
    for module in merged.modules():
        if isinstance(module, FusedMLP):
            module.merge_scale()
    with pytest.raises(InputError, match="the model has no place for it"):
        merged.load_state_dict(own, strict=False)
    alone = FusedMLP.from_mlp(nn.Linear(4, 8), nn.Linear(8, 4), scale=torch.full((8,), 2.0), parameterization="scaled")
    bare = FusedMLP.from_mlp(nn.Linear(4, 8), nn.Linear(8, 4))
    with pytest.raises(ValueError, match="this module has no scale"):
        bare.load_state_dict(alone.state_dict(), strict=False)


@pytest.mark.parametrize("optimizer", FORMS)
def test_a_trained_scale_of_any_sign_is_saved(optimizer: str, tmp_path: Path) -> None:
    model = fused("bert", optimizer)
    layer = model.base_model.encoder.layer[1].get_submodule(ck.HOLDER)
    with torch.no_grad():
        layer.scale[3:5] *= -0.7 if optimizer == "adamw" else 0.7
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    same(loaded, expected)
    restore(loaded, tmp_path)
    same(loaded, expected)
    torch.testing.assert_close(loaded.base_model.encoder.layer[1].get_submodule(ck.HOLDER).scale, layer.scale)


def test_the_side_file_is_looked_at(tmp_path: Path) -> None:
    fused("bert", "adamw").save_pretrained(tmp_path)
    good = ck.scales(tmp_path)
    name = f"bert.encoder.layer.1.{ck.HOLDER}.scale"
    damage = {
        "NaN or Inf": good[name].index_fill(0, torch.tensor([2]), torch.nan),
        "holds NaN": good[name].index_fill(0, torch.tensor([2]), torch.inf),
        "is 0 for neurons that have an output": good[name].index_fill(0, torch.tensor([2]), 0.0),
        "layer 1 has 15 entries, the layer 16 neurons": good[name][:-1],
    }
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    for reason, scale in damage.items():
        ck.put_scales(tmp_path, {**good, name: scale})
        with pytest.raises(InputError, match=reason):
            restore(model, tmp_path)
    ck.put_scales(tmp_path, {**good, name: -good[name]})
    with pytest.raises(InputError, match="negative in places"):
        restore(model, tmp_path, optimizer="sgd")
    assert not any(isinstance(module, Scaled) for module in model.modules())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, f"format 99, this version knows {FORMAT_VERSION}: update mlp-fusion"),
        ({"format": "1"}, "its format is '1'"),
        ({"parameterization": "sqrt"}, "parameterization is 'sqrt'"),
        ({"parameterization": None}, "parameterization is None"),
        ({"fused_layers": "all"}, "fused_layers are 'all'"),
        ({"fused_layers": [0.5]}, r"fused_layers are \[0.5\]"),
        ({"method": None}, "does not say the method"),
        ({"kinds": None}, "does not say where the FFNs are"),
        ({"kinds": [{}]}, "does not say where the FFNs are"),
    ],
)
def test_a_record_that_cannot_be_read_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    fused("bert", "adamw").save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    whole = model.config.mlp_fusion
    model.config.mlp_fusion = {**whole, **change}
    with pytest.raises(InputError, match=message):
        restore(model, tmp_path)
    model.config.mlp_fusion = {k: v for k, v in whole.items() if k not in change}
    with pytest.raises(InputError, match="is damaged"):
        restore(model, tmp_path)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_trained_scale_comes_back_with_its_checkpoint(sign: float, tmp_path: Path) -> None:
    """In the model that was saved, and in one that starts from the scale of the fusion."""
    source = fused("bert", "adamw", shift=0.05)
    with torch.no_grad():
        for module in source.modules():
            if isinstance(module, Scaled) and module.scale is not None:
                module.scale[::3] *= 1.3 * sign
    own = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    source.save_pretrained(tmp_path, max_shard_size="24KB")
    for target in (copy.deepcopy(source), fused("bert", "adamw")):
        load_sharded_checkpoint(target, tmp_path, strict=False)
        for name, tensor in target.state_dict().items():
            torch.testing.assert_close(tensor, own[name], rtol=1e-6, atol=1e-7, msg=name)
    with state_form("plain"):
        for shard in tmp_path.glob("model-*.safetensors"):
            source.load_state_dict(load_file(shard), strict=False)
    for name, tensor in source.state_dict().items():
        torch.testing.assert_close(tensor, own[name], rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("optimizer", FORMS)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "distilbert"])
def test_parts_of_a_layer_loaded_by_themselves(family: str, optimizer: str, tmp_path: Path) -> None:
    source = fused(family, optimizer, shift=0.05)
    source.save_pretrained(tmp_path)
    plain, expected = load_file(tmp_path / "model.safetensors"), logits(source)
    hooked = [name for name, m in source.named_modules() if m._load_state_dict_pre_hooks and ".1" in name]
    layer = hooked[0][: hooked[0].index(".1") + 2]
    assert len(hooked) >= 3
    for path in {layer, *hooked}:
        part = {name[len(path) + 1 :]: tensor for name, tensor in plain.items() if name.startswith(f"{path}.")}
        target = copy.deepcopy(source)
        module = target.get_submodule(path)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(0.9)
        with state_form("plain"):
            module.load_state_dict(part, strict=False)
        torch.testing.assert_close(logits(target), expected, rtol=1e-5, atol=1e-5, msg=path)
    leaf = source.get_submodule(next(p for p in hooked if p.endswith(("output.dense", "c_proj", "down_proj", "lin2"))))
    with pytest.raises(InputError, match="comes without"):
        leaf.load_state_dict({"weight": leaf.weight.detach().clone()}, strict=False)


@pytest.mark.parametrize("damage", ["float8", "int8", "meta", "narrow"])
def test_nothing_is_loaded_where_one_tensor_does_not_fit(damage: str, tmp_path: Path) -> None:
    model = fused("bert", "adamw")
    model.save_pretrained(tmp_path)
    state = {name: tensor * 2.0 for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    name = "bert.encoder.layer.2.output.dense.weight"
    whole = state[name]
    broken = {"float8": whole.to(torch.float8_e4m3fn), "int8": whole.to(torch.int8), "meta": whole.to("meta")}
    state[name] = broken.get(damage, whole[:, 1:])
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with state_form("plain"), pytest.raises(InputError, match=r"layer\.2\.output\.dense\.weight"):
        model.load_state_dict(state, strict=False)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("change", ["1e60", "1e-60", "1e-44", "float8"])
def test_scales_that_float32_cannot_hold_are_refused(change: str, tmp_path: Path) -> None:
    fused("bert", "adamw").save_pretrained(tmp_path)
    good = ck.scales(tmp_path)
    kind = {"1e-44": torch.float32, "float8": torch.float8_e4m3fn}.get(change, torch.float64)
    factor = 1.0 if change == "float8" else float(change)
    ck.put_scales(tmp_path, {name: (scale.double() * factor).to(kind) for name, scale in good.items()})
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="holds NaN or Inf, or numbers that float32 cannot"):
        restore(model, tmp_path)


def test_a_plain_model_takes_no_state_that_is_said_to_be_a_fused_ones(tmp_path: Path) -> None:
    source = fused("bert", "adamw")
    source.save_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with state_form("own"), pytest.raises(InputError, match="this model is a plain one: restore it first"):
        plain.load_state_dict(dict(source.named_parameters()))
    with state_form("plain"):
        plain.load_state_dict(load_file(tmp_path / "model.safetensors"))
    same(plain, logits(source))


def test_scales_of_more_layers_or_neurons_and_silent_ones(tmp_path: Path) -> None:
    source = fused("bert", "sgd")
    layer = source.base_model.encoder.layer[1]
    with torch.no_grad():
        layer.get_submodule(ck.HOLDER).scale[2] = 0.0
    source.save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    again = copy.deepcopy(model)
    restore(again, tmp_path, optimizer="adamw")  # to another form than it was saved in, with a neuron that is silent
    assert {m.parameterization for m in again.modules() if isinstance(m, Scaled)} == {"scaled"}
    same(again, logits(source))
    good = ck.scales(tmp_path)
    name = f"bert.encoder.layer.1.{ck.HOLDER}.scale"
    ck.put_scales(tmp_path, {**good, name: torch.cat([good[name], good[name][:1]])})
    with pytest.raises(InputError, match="layer 1 has 17 entries, the layer 16 neurons"):
        restore(model, tmp_path)
    ck.put_scales(tmp_path, good)
    model.config.mlp_fusion = {**model.config.mlp_fusion, "fused_layers": [0, 1]}
    with pytest.raises(InputError, match="has a scale for layer 2, which is not fused"):
        restore(model, tmp_path)
    model.config.mlp_fusion = {**model.config.mlp_fusion, "fused_layers": [0, 1, 2]}
    with torch.no_grad():
        model.base_model.encoder.layer[1].output.dense.weight[:, 2] = -0.5
    with pytest.raises(InputError, match="is 0 for neurons that have an output"):
        restore(model, tmp_path)
