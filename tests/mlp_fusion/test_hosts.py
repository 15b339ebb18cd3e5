"""Fused models among the habits of real training code: whatever is saved, shared, replicated or restored is right."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertModel,
    BertPreTrainedModel,
    PreTrainedConfig,
    PreTrainedModel,
)

import checkpoints as ck
from families import FAMILIES, tiny_model, token_batch
from mlp_fusion import FusedMLP, InputError, fuse, restore
from mlp_fusion.modules import FusedFFN, Scaled
from mlp_fusion.store.record import REFERENCE_FILE, REPORT_FILE

BATCH = token_batch()


def hidden(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        found: Tensor = model.base_model(**BATCH).last_hidden_state
    return found


def check_saved(model: Any, folder: Path) -> None:
    """What lies in `folder` is plain, and computes what `model` does."""
    assert not any("scale" in name for name in load_file(folder / "model.safetensors"))
    torch.testing.assert_close(hidden(AutoModel.from_pretrained(folder)), hidden(model), rtol=1e-5, atol=1e-5)


class Wrapper(nn.Module):
    """A user's own module around a model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = model
        self.config = model.config

    def forward(self, **batch: Tensor) -> Any:
        return self.inner(**batch)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_every_way_to_save_folds(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    fuse(model, 16, sample=BATCH)
    model.base_model.save_pretrained(tmp_path / "inner")
    check_saved(model, tmp_path / "inner")

    outer = tiny_model(family)
    fuse(outer.base_model, 16, sample=BATCH)
    outer.save_pretrained(tmp_path / "outer")
    check_saved(outer, tmp_path / "outer")

    compiled = tiny_model(family)
    fuse(torch.compile(compiled, backend="eager"), 16, sample=BATCH)
    compiled.save_pretrained(tmp_path / "compiled")
    check_saved(compiled, tmp_path / "compiled")

    wrapped = Wrapper(tiny_model(family))
    fuse(wrapped, 16, sample=BATCH)
    assert not hasattr(wrapped, "save_pretrained")
    wrapped.inner.save_pretrained(tmp_path / "wrapped")
    check_saved(wrapped.inner, tmp_path / "wrapped")
    # The key states the width, whatever stands around the model.
    assert [ck.read_config(folder)["intermediate_size"] for folder in sorted(tmp_path.iterdir())] == [16] * 4


def test_a_model_class_of_the_users_own_is_described_by_its_base(tmp_path: Path) -> None:
    class Own(BertPreTrainedModel):
        def __init__(self, config: Any, answers: int) -> None:
            super().__init__(config)
            self.bert, self.last = BertModel(config), nn.Linear(24, answers)
            self.post_init()

        def forward(self, **batch: Tensor) -> Any:
            return self.last(self.bert(**batch).last_hidden_state)

    model = Own(tiny_model("bert").config, 3).eval()
    fuse(model, 16, sample=BATCH)
    model.save_pretrained(tmp_path)
    assert ck.read_config(tmp_path)["intermediate_size"] == 16
    assert "widths" not in ck.read_config(tmp_path)["mlp_fusion"]
    loaded = Own.from_pretrained(tmp_path, answers=3).eval()
    torch.testing.assert_close(loaded(**BATCH), model(**BATCH), rtol=1e-5, atol=1e-5)


def test_unfused_models_are_saved_as_ever(tmp_path: Path) -> None:
    model = tiny_model("bert")
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[k], v) for k, v in model.state_dict().items() if k in saved)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert "save_directory" in (PreTrainedModel.save_pretrained.__doc__ or "")


def test_adapters_anywhere_are_refused() -> None:
    for family, target in {"bert": "query", "llama": "q_proj"}.items():
        with pytest.raises(InputError, match="merge adapters"):
            fuse(get_peft_model(tiny_model(family), LoraConfig(r=2, target_modules=[target])), 16)


def test_state_that_cannot_be_folded_is_refused(tmp_path: Path) -> None:
    model = tiny_model("bert")
    fuse(model, 16, sample=BATCH)
    prefixed = {f"module.{k}": v for k, v in model.state_dict().items()}
    with pytest.raises(InputError, match="scale is not in the state dict"):
        model.save_pretrained(tmp_path / "a", state_dict=prefixed)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["output.dense"]))
    with pytest.raises(InputError, match=r"dense\.weight is not in the state dict: merge adapters"):
        adapted.base_model.model.save_pretrained(tmp_path / "b")
    with pytest.raises(InputError, match=r"use model\.push_to_hub"):
        model.save_pretrained(tmp_path / "c", push_to_hub=True)
    assert list(tmp_path.iterdir()) == []


def test_a_second_save_leaves_nothing_of_the_first(tmp_path: Path) -> None:
    first = tiny_model("bert")
    fuse(first, 16, layers=[0, 1], sample=BATCH)
    first.save_pretrained(tmp_path)
    for name in (REFERENCE_FILE, REPORT_FILE):
        (tmp_path / name).write_text("of something else")
    second = tiny_model("bert")
    fuse(second, 16, optimizer=None, sample=BATCH)
    second.save_pretrained(tmp_path)
    assert not any((tmp_path / name).exists() for name in (ck.SCALE, REFERENCE_FILE, REPORT_FILE))
    with pytest.raises(InputError, match="nothing to restore"):
        restore(AutoModelForSequenceClassification.from_pretrained(tmp_path), tmp_path)


def test_merged_scale_is_recorded_as_folded(tmp_path: Path) -> None:
    model = tiny_model("llama")
    fuse(model, 16, sample=BATCH)
    before = hidden(model)
    for module in model.modules():
        if isinstance(module, FusedFFN):
            module.merge_scale()
    torch.testing.assert_close(hidden(model), before, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    check_saved(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["mlp_fusion"]["parameterization"] == "folded"


def test_restore_wants_every_fused_layer_and_a_whole_file(tmp_path: Path) -> None:
    model = tiny_model("bert")
    fuse(model, 16, sample=BATCH)
    model.save_pretrained(tmp_path)
    scales = ck.scales(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    ck.put_scales(tmp_path, {k: v for k, v in scales.items() if ".1." not in k})
    with pytest.raises(InputError, match="no scale for layer 1"):
        restore(loaded, tmp_path)
    (tmp_path / ck.SCALE).write_bytes((tmp_path / ck.SCALE).read_bytes()[:-7])
    with pytest.raises(InputError, match="damaged or cut short"):
        restore(loaded, tmp_path)
    assert not any(isinstance(m, Scaled) for m in loaded.modules())


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_replicas_use_their_own_projections(family: str) -> None:
    """`torch.nn.DataParallel` copies modules shallowly: a replica must not run through the original's weights."""
    model = tiny_model(family)
    fuse(model, 16, sample=BATCH)
    layer = model.base_model.encoder.layer[0]
    replica = layer._replicate_for_data_parallel()
    replica._modules = {name: child._replicate_for_data_parallel() for name, child in layer._modules.items()}
    dense = copy.deepcopy(layer.output.dense)
    with torch.no_grad():
        dense.weight.mul_(2.0)
    replica.output._modules = {**layer.output._modules, "dense": dense}
    replica.intermediate._modules = dict(layer.intermediate._modules)
    x = torch.randn(2, 3, 24)
    expected = copy.deepcopy(layer)
    expected.output.dense = dense
    torch.testing.assert_close(replica.feed_forward_chunk(x), expected.feed_forward_chunk(x))
    assert not torch.allclose(replica.feed_forward_chunk(x), layer.feed_forward_chunk(x))


def test_a_shared_config_is_left_alone(tmp_path: Path) -> None:
    teacher = tiny_model("bert")
    student = type(teacher)(teacher.config).eval()
    assert student.config is teacher.config
    fuse(student, 16, sample=BATCH)
    assert teacher.config.intermediate_size == 64
    assert student.config.intermediate_size == 16
    assert student.bert.config is student.config
    fuse(teacher, 32, sample=BATCH)
    student.save_pretrained(tmp_path)
    check_saved(student, tmp_path)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_configs_of_uneven_widths_can_be_read_by_the_base_class(family: str, tmp_path: Path) -> None:
    """As `Trainer` does when it resumes."""
    model = tiny_model(family)
    fuse(model, 16, layers=[1], sample=BATCH)
    model.save_pretrained(tmp_path)
    read = PreTrainedConfig.from_json_file(tmp_path / "config.json")
    assert list(read.mlp_fusion["widths"].values()) == [16]
    check_saved(model, tmp_path)


def test_models_whose_head_wants_more_than_tokens() -> None:
    """A classifier without a padding token refuses batches; the FFNs below it do not care."""
    for family in ("gpt2", "llama"):
        model = tiny_model(family, pad_token_id=None)
        with pytest.raises(ValueError, match="padding token"):
            model(**BATCH)
        assert len(fuse(model, 16, layers=[0]).rows) == 1
    chunked = tiny_model("bert", chunk_size_feed_forward=3)
    assert fuse(chunked, 16).sample_rows == 8 * 36
    choices = {k: torch.stack([v, v], dim=1) for k, v in BATCH.items()}
    report = fuse(tiny_model("bert", task="MultipleChoice"), 16, sample=choices)
    assert report.sample_rows == 2 * int(BATCH["attention_mask"].sum())


@pytest.mark.slow
def test_endless_samples_end() -> None:
    def endless() -> Any:
        while True:
            yield BATCH

    assert fuse(tiny_model("bert"), 16, sample=endless()).sample_rows == 512


def test_tied_embeddings_and_generation(tmp_path: Path) -> None:
    for family in ("gpt2", "llama"):
        model = tiny_model(family, task="CausalLM", tie_word_embeddings=True)
        fuse(model, 16, layers=[0, 2], sample=BATCH)
        model.save_pretrained(tmp_path / family)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / family).eval()
        prompt = BATCH["input_ids"][1:2, :4]
        settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 1}
        assert torch.equal(loaded.generate(prompt, **settings), model.generate(prompt, **settings))


def test_half_precision_keeps_the_counts() -> None:
    scale = torch.tensor([511, 1, 447])
    module = FusedMLP.from_mlp(nn.Linear(4, 3), nn.Linear(3, 4), scale=scale, parameterization="scaled")
    module = module.to(torch.bfloat16)
    assert module.fc1.weight.dtype == torch.bfloat16
    assert module.scale is not None
    assert module.scale.dtype == torch.float32
    assert module.scale.tolist() == [511, 1, 447]
    module = module.double()
    assert module.scale is not None
    assert module.scale.dtype == torch.float64


def test_a_scale_of_any_sign_is_a_factor() -> None:
    fc1, fc2 = nn.Linear(4, 8), nn.Linear(8, 4)
    scale = torch.linspace(-1, 1, 8)
    scale[3] = 0.0
    x = torch.randn(5, 4)
    expected = fc2(torch.nn.functional.gelu(fc1(x)) * scale)
    for form in ("scaled", "folded"):
        torch.testing.assert_close(FusedMLP.from_mlp(fc1, fc2, scale=scale, parameterization=form)(x), expected)
    with pytest.raises(ValueError, match="negative scale has no 'split' form"):
        FusedMLP.from_mlp(fc1, fc2, scale=scale, parameterization="split")
    trained = FusedMLP.from_mlp(fc1, fc2, scale=nn.Parameter(scale), parameterization="scaled")
    trained(x).sum().backward()
    assert isinstance(trained.scale, nn.Parameter)
    assert trained.scale.grad is not None
    assert float(trained.scale.grad[3]) != 0.0


def test_frozen_projections_stay_frozen() -> None:
    fc1, fc2 = nn.Linear(4, 8).requires_grad_(False), nn.Linear(8, 4)
    module = FusedMLP.from_mlp(fc1, fc2, scale=torch.ones(8), parameterization="scaled")
    assert module.trainable_parts() == ("w_out", "b_out")


def test_a_model_that_disagrees_with_its_config_is_refused() -> None:
    model = tiny_model("llama", num_hidden_layers=4)
    model.config.num_hidden_layers = 3
    with pytest.raises(InputError, match="has 4 FFNs, its config describes 3: mend the config"):
        fuse(model, 16, [3])
    assert not any(isinstance(m, Scaled) for m in model.modules())
