"""Saving and loading fused models: plain checkpoints out, plain or fused state in, and training that goes on."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils import parametrizations, prune
from torch.utils.data import Dataset
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)

import checkpoints as ck
from families import FAMILIES, tiny_model, token_batch
from mlp_fusion import InputError, fuse, restore, state_form
from mlp_fusion.modules import Scaled

BATCH = token_batch()
LABELS = torch.tensor([0, 1, 0, 1])


def logits(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        found: Tensor = model(**BATCH).logits
    return found


def train(model: Any, optimizer: str, steps: int = 3) -> None:
    cls: Any = torch.optim.AdamW if optimizer == "adamw" else torch.optim.SGD
    step = cls(model.parameters(), lr=1e-3)
    model.train()
    for _ in range(steps):
        model(**BATCH, labels=LABELS).loss.backward()
        step.step()
        step.zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("layers", ["all", "1-2"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", None])
def test_round_trip_after_training(family: str, layers: str, optimizer: str | None, tmp_path: Path) -> None:
    model = tiny_model(family)
    fuse(model, 16, layers=layers, optimizer=optimizer, sample=BATCH)
    train(model, optimizer or "adamw")
    expected = logits(model)
    model.save_pretrained(tmp_path)

    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    assert not any(isinstance(m, Scaled) for m in loaded.modules())
    hidden = loaded(**BATCH, output_hidden_states=True).hidden_states
    assert len(hidden) == 4

    if optimizer is None:
        assert not (tmp_path / ck.SCALE).exists()
        return
    restore(loaded, tmp_path)
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_training_goes_on_as_if_never_interrupted(optimizer: str, tmp_path: Path) -> None:
    model = tiny_model("roberta", dtype=torch.float64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    fuse(model, 16, optimizer=optimizer, sample=BATCH)
    model.save_pretrained(tmp_path)
    other = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64)
    plain = copy.deepcopy(other)
    restore(other, tmp_path)
    for m in (model, other, plain):
        train(m, optimizer, steps=5)
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(logits(plain), logits(model), rtol=1e-6, atol=1e-6)


def test_restore_for_another_optimizer(tmp_path: Path) -> None:
    model = tiny_model("llama")
    fuse(model, 16, optimizer="adamw", sample=BATCH)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    restore(loaded, tmp_path, optimizer="sgd")
    assert {m.parameterization for m in loaded.modules() if isinstance(m, Scaled)} == {"split"}
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    restore(again, tmp_path / "again")
    assert {m.parameterization for m in again.modules() if isinstance(m, Scaled)} == {"split"}


def test_restore_of_the_bare_encoder_of_a_task_model(tmp_path: Path) -> None:
    model = tiny_model("bert")
    fuse(model, 16, sample=BATCH)
    model.save_pretrained(tmp_path)
    encoder = AutoModel.from_pretrained(tmp_path).eval()
    before = encoder(**BATCH).last_hidden_state
    restore(encoder, tmp_path)
    assert sum(isinstance(m, Scaled) for m in encoder.modules()) == 3
    torch.testing.assert_close(encoder(**BATCH).last_hidden_state, before, rtol=1e-5, atol=1e-5)


def test_restore_refusals(tmp_path: Path) -> None:
    tiny_model("bert").save_pretrained(tmp_path / "plain")
    with pytest.raises(InputError, match="not loaded from a fused checkpoint"):
        restore(AutoModel.from_pretrained(tmp_path / "plain"), tmp_path / "plain")
    model = tiny_model("bert")
    fuse(model, 16)
    model.save_pretrained(tmp_path / "fused")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "fused")
    with pytest.raises(InputError, match=re.escape(f"{ck.SCALE} is missing")):
        restore(loaded, tmp_path / "plain")
    with pytest.raises(InputError, match="nowhere: neither a folder here nor a fused checkpoint on the hub"):
        restore(loaded, tmp_path / "nowhere")
    scales = ck.scales(tmp_path / "fused")
    wrong = {k: v[:-1] for k, v in scales.items()}
    ck.put_scales(tmp_path / "wrong", wrong)
    with pytest.raises(InputError, match="layer 0 has 15 entries, the layer 16 neurons"):
        restore(loaded, tmp_path / "wrong")
    ck.put_scales(tmp_path / "wrong", {f"encoder.layer.9.{ck.HOLDER}.scale": torch.ones(16)})
    with pytest.raises(InputError, match=r"layer\.9.* fits no layer"):
        restore(loaded, tmp_path / "wrong")
    assert not any(isinstance(m, Scaled) for m in loaded.modules())
    restore(loaded, tmp_path / "fused")
    with pytest.raises(InputError, match="has its fused FFNs already"):
        restore(loaded, tmp_path / "fused")


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_load_state_dict_takes_plain_and_own_states(family: str, optimizer: str, tmp_path: Path) -> None:
    source = tiny_model(family)
    fuse(source, 16, optimizer=optimizer, sample=BATCH)
    train(source, optimizer)
    source.save_pretrained(tmp_path)
    target = tiny_model(family)
    fuse(target, 16, optimizer=optimizer, sample=BATCH)
    untrained = logits(target)
    assert not torch.allclose(untrained, logits(source), atol=1e-4)

    plain = load_file(tmp_path / "model.safetensors")
    copies = {k: v.clone() for k, v in plain.items()}
    with pytest.raises(InputError, match="comes without"):
        target.load_state_dict(plain, strict=True)
    torch.testing.assert_close(logits(target), untrained, rtol=0, atol=0)
    with state_form("plain"):
        target.load_state_dict(plain, strict=True)
    torch.testing.assert_close(logits(target), logits(source), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(copies[k], v) for k, v in plain.items())
    target.load_state_dict(source.state_dict(), strict=True)
    torch.testing.assert_close(logits(target), logits(source), rtol=0, atol=0)


def test_saving_does_not_change_the_model_and_can_be_repeated(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    fuse(model, 16, sample=BATCH)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "two", state_dict=model.state_dict())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "two"))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not any("scale" in k for k in one)
    assert one["transformer.h.0.mlp.c_fc.weight"].shape == (16, 16)
    assert one["transformer.h.0.mlp.c_proj.weight"].shape == (16, 16)


def test_sharded_and_secondary_process_saves(tmp_path: Path) -> None:
    model = tiny_model("llama")
    fuse(model, 16, layers=[0], sample=BATCH)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "sharded")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "second", is_main_process=False)
    assert not (tmp_path / "second" / ck.SCALE).exists()


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_copies_and_pickles_still_fold(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    fuse(model, 16, sample=BATCH)
    before = logits(model)
    for n, other in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(1.01)
        torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
        assert not torch.allclose(logits(other), logits(model))
        other.save_pretrained(tmp_path / str(n))
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / str(n))
        torch.testing.assert_close(logits(loaded), logits(other), rtol=1e-5, atol=1e-5)
        with state_form("plain"):
            other.load_state_dict(load_file(tmp_path / str(n) / "model.safetensors"))
        torch.testing.assert_close(logits(loaded), logits(other), rtol=1e-5, atol=1e-5)


class _Examples(Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(index)
        return {"input_ids": torch.randint(3, 97, (9,), generator=g), "labels": torch.tensor(index % 2)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "layers"), [("roberta", "all"), ("gpt2", "0"), ("distilbert", "0"), ("llama", "1-2")]
)
def test_trainer_trains_saves_and_resumes(family: str, layers: str, tmp_path: Path) -> None:
    def trainer(folder: Path, epochs: int, **options: Any) -> Trainer:
        model = tiny_model(family)
        fuse(model, 16, layers=layers, sample=BATCH, **options)
        arguments = TrainingArguments(
            output_dir=str(folder), num_train_epochs=epochs, per_device_train_batch_size=4, save_strategy="epoch",
            learning_rate=1e-3, lr_scheduler_type="constant", report_to=[], use_cpu=True, disable_tqdm=True,
            logging_steps=1000, seed=1,
        )  # fmt: skip
        return Trainer(model=model, args=arguments, train_dataset=_Examples())

    straight = trainer(tmp_path / "straight", 2)
    before = {n: p.detach().clone() for n, p in straight.model.named_parameters()}
    straight.train()
    assert any(not torch.equal(p, before[n]) for n, p in straight.model.named_parameters())

    checkpoint = tmp_path / "straight" / "checkpoint-4"
    loaded = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    resumed = trainer(tmp_path / "resumed", 2)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    torch.testing.assert_close(logits(resumed.model), logits(straight.model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(loaded), logits(straight.model), rtol=1e-4, atol=1e-4)
    assert (checkpoint / ck.SCALE).is_file()

    # The moments beside the weights are of the form with a scale, which a model that is merely loaded does not have.
    plain = Trainer(model=loaded, args=resumed.args, train_dataset=_Examples())
    with pytest.raises(InputError, match=r"was trained in the form scaled, the model is folded: load that"):
        plain.train(resume_from_checkpoint=str(checkpoint))
    restore(loaded, checkpoint)
    plain = Trainer(model=loaded, args=resumed.args, train_dataset=_Examples())
    plain.train(resume_from_checkpoint=str(checkpoint))
    other = trainer(tmp_path / "other", 2, optimizer="sgd")
    with pytest.raises(InputError, match=r"was trained in the form scaled, the model is split"):
        other.train(resume_from_checkpoint=str(checkpoint))
    for moments in checkpoint.glob("optimizer*"):
        moments.unlink()  # weights alone are of no form
    other.train(resume_from_checkpoint=str(checkpoint))
    torch.testing.assert_close(logits(loaded), logits(straight.model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("layers", [[0, 2], "all"])
@pytest.mark.parametrize("method", ["fusion", "merge"])
@pytest.mark.parametrize("kept", [[0, 2], [2, 0], [1], [1, 2]])
def test_layers_may_be_taken_out_of_a_fused_model(
    method: str, kept: list[int], layers: Any, part: bool, tmp_path: Path
) -> None:
    model: Any = tiny_model("llama", task="CausalLM")
    ids = {"input_ids": torch.randint(3, 97, (16, 24), generator=torch.Generator().manual_seed(1))}
    fuse(model.model if part else model, 16, layers=layers, method=method, calibration=[ids])
    model.model.layers = torch.nn.ModuleList([model.model.layers[n] for n in kept])
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = number
    model.config.num_hidden_layers = model.model.config.num_hidden_layers = len(kept)
    model.save_pretrained(tmp_path / "out")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    whole = [] if layers == "all" else [1]
    assert [layer.mlp.up_proj.out_features for layer in loaded.model.layers] == [64 if n in whole else 16 for n in kept]
    fused = [number for number, n in enumerate(kept) if n not in whole]
    for again in (False, method == "fusion" and bool(fused)):
        if again:
            restore(loaded, tmp_path / "out")
        with torch.no_grad():
            torch.testing.assert_close(loaded(**BATCH).logits, model(**BATCH).logits, rtol=1e-5, atol=1e-5)
    assert (loaded.config.mlp_fusion or {"fused_layers": []})["fused_layers"] == fused


@pytest.mark.parametrize("method", ["fusion", "merge"])
@pytest.mark.parametrize("how", ["empty", "flat", "packed", "elsewhere"])
def test_widths_that_parameters_do_not_show_stay_as_they_were_recorded(method: str, how: str, tmp_path: Path) -> None:
    """What ZeRO-3, FSDP and quantisers leave of parameters, with the state that a trainer has gathered."""
    model: Any = tiny_model("llama", task="CausalLM")
    ids = {"input_ids": torch.randint(3, 97, (16, 24), generator=torch.Generator().manual_seed(1))}
    fuse(model, 16, layers=[0, 2], method=method, calibration=[ids])
    with torch.no_grad():
        expected = model(**BATCH).logits
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            projection = getattr(layer.mlp, name)
            weight = projection.weight
            if how == "elsewhere":
                del projection.weight
                projection.qweight = torch.nn.Parameter(weight.detach())
                continue
            shape = {"empty": (0,), "flat": (24,), "packed": (weight.numel() // 2, 1)}[how]
            weight.data = weight.data.new_zeros(shape)
    recorded = model.config.mlp_fusion
    model.save_pretrained(tmp_path / "out", state_dict=state)
    assert model.config.mlp_fusion == recorded
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**BATCH).logits, expected, rtol=1e-5, atol=1e-5)


def test_weights_that_torch_computes_are_to_be_made_permanent_first(tmp_path: Path) -> None:
    for change in (
        lambda last: prune.l1_unstructured(last, "weight", 0.5),
        lambda last: parametrizations.weight_norm(last),
    ):
        model: Any = tiny_model("llama")
        fuse(model, 16, method="fusion", sample=BATCH)
        change(model.model.layers[0].mlp.down_proj)
        with pytest.raises(
            InputError, match=r"down_proj\.weight is not in the state dict: torch\.nn\.utils computes it"
        ):
            model.save_pretrained(tmp_path / "out")
