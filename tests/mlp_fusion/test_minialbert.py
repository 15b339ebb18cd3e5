"""MiniALBERT as an ordinary model of transformers: its counts, its formula, its round trips, its adapters."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import checkpoints as ck
import mlp_fusion
from mlp_fusion import InputError, MiniAlbertConfig, MiniAlbertForMaskedLM, MiniAlbertModel

SHAPE: dict[str, Any] = {
    "vocab_size": 67, "embedding_size": 16, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 20, "num_hidden_layers": 3,
}  # fmt: skip
AUTO = (AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoModelForTokenClassification)
IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def config(**more: Any) -> MiniAlbertConfig:
    return MiniAlbertConfig(**{**SHAPE, "adapter_size": 4, **more})


def drawn(model: nn.Module) -> Any:
    """All parameters away from their starting values, norms and biases too."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.mark.parametrize(
    ("embedding", "adapter", "count"),
    [
        (128, 48, 12_072_768), (312, 48, 17_925_072), (768, 48, 31_838_016),
        (128, 0, 11_159_808), (312, 0, 17_012_112), (768, 0, 30_925_056),
    ],
)  # fmt: skip
def test_parameters_are_as_many_as_in_the_paper(embedding: int, adapter: int, count: int) -> None:
    with torch.device("meta"):
        model = MiniAlbertModel(MiniAlbertConfig(embedding_size=embedding, adapter_size=adapter))
    assert model.num_parameters() == count


def test_passes_without_adapters_are_those_of_albert() -> None:
    ours = drawn(MiniAlbertModel(config(adapter_size=0)))
    theirs = AlbertModel(AlbertConfig(**SHAPE, hidden_act="gelu"), add_pooling_layer=False).eval()
    layer = theirs.encoder.albert_layer_groups[0].albert_layers[0]
    for target, source in (
        (theirs.embeddings, ours.embeddings),
        (theirs.encoder.embedding_hidden_mapping_in, ours.encoder.projection),
        (layer, ours.encoder.layers[0]),
    ):
        target.load_state_dict(source.state_dict())
    wanted = theirs(IDS, MASK, output_hidden_states=True)
    found = ours(IDS, MASK, output_hidden_states=True)
    assert torch.equal(found.last_hidden_state, wanted.last_hidden_state)
    assert len(found.hidden_states) == len(wanted.hidden_states) == 4
    assert all(torch.equal(a, b) for a, b in zip(found.hidden_states, wanted.hidden_states, strict=True))


def test_passes_are_stacked_layers_of_tied_weights() -> None:
    """ALBERT with a layer for each pass, all with the same numbers."""
    ours = drawn(MiniAlbertModel(config(adapter_size=0)))
    apart = AlbertConfig(**SHAPE, num_hidden_groups=3, hidden_act="gelu")
    theirs = AlbertModel(apart, add_pooling_layer=False).eval()
    theirs.embeddings.load_state_dict(ours.embeddings.state_dict())
    theirs.encoder.embedding_hidden_mapping_in.load_state_dict(ours.encoder.projection.state_dict())
    groups = theirs.encoder.albert_layer_groups
    assert len(groups) == 3
    for group in groups:
        group.albert_layers[0].load_state_dict(ours.encoder.layers[0].state_dict())
    assert torch.equal(ours(IDS, MASK).last_hidden_state, theirs(IDS, MASK).last_hidden_state)


def test_gradients_are_numeric() -> None:
    """Of what runs several times, and of an adapter that runs once."""
    model = drawn(MiniAlbertModel(config(num_hidden_layers=2))).double()
    layer = model.encoder.layers[0]
    parameters = [layer.ffn.bias, layer.attention.key.weight[:3, :4], layer.adapters[1].ffn.up.weight[:4]]
    names = ["ffn.bias", "attention.key.weight", "adapters.1.ffn.up.weight"]
    starts = [parameter.detach().clone().requires_grad_() for parameter in parameters]

    def outputs(*values: torch.Tensor) -> torch.Tensor:
        whole = {}
        for name, value in zip(names, values, strict=True):
            known = layer.get_parameter(name).detach()
            whole[f"encoder.layers.0.{name}"] = known.index_put(
                torch.meshgrid(*(torch.arange(n) for n in value.shape), indexing="ij"), value
            )
        return torch.func.functional_call(model, whole, (IDS, MASK)).last_hidden_state[:, :2]

    assert torch.autograd.gradcheck(outputs, starts)


def test_a_pass_with_adapters_is_the_formula() -> None:
    model = drawn(MiniAlbertModel(config(layer_norm_eps=1e-6))).double()
    states = model(IDS[:1], output_hidden_states=True).hidden_states
    layer = model.encoder.layers[0]

    def norm(x: torch.Tensor, by: nn.LayerNorm) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * by.weight + by.bias

    def gelu(x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x * (1 + torch.erf(x / 2**0.5))

    def adapted(x: torch.Tensor, by: Any) -> torch.Tensor:
        return norm(x + gelu(x @ by.down.weight.T + by.down.bias) @ by.up.weight.T + by.up.bias, by.LayerNorm)

    for number, adapters in enumerate(layer.adapters):
        x = adapted(states[number][0], adapters.attention)
        attention = layer.attention
        q, k, v = (
            (x @ p.weight.T + p.bias).view(5, 2, 16).transpose(0, 1)
            for p in (attention.query, attention.key, attention.value)
        )
        mixed = (torch.softmax(q @ k.transpose(1, 2) / 4, -1) @ v).transpose(0, 1).reshape(5, 32)
        x = norm(x + mixed @ attention.dense.weight.T + attention.dense.bias, attention.LayerNorm)
        x = adapted(x, adapters.ffn)
        inner = gelu(x @ layer.ffn.weight.T + layer.ffn.bias)
        x = norm(x + inner @ layer.ffn_output.weight.T + layer.ffn_output.bias, layer.full_layer_layer_norm)
        torch.testing.assert_close(states[number + 1][0], x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("auto", AUTO)
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_saved_is_loaded(auto: Any, tied: bool, tmp_path: Path) -> None:
    model = drawn(auto.from_config(config(tie_word_embeddings=tied, num_labels=3)))
    assert type(model).__name__.startswith("MiniAlbert")
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path)
    assert again.config.adapter_size == 4
    assert all(torch.equal(a, b) for a, b in zip(model(IDS, MASK)[0], again(IDS, MASK)[0], strict=True))
    if auto is AutoModelForMaskedLM:
        shared = again.predictions.decoder.weight is again.albert.embeddings.word_embeddings.weight
        assert shared == tied


def test_a_text_is_classified_by_its_first_token() -> None:
    model = drawn(AutoModelForSequenceClassification.from_config(config(num_labels=3)))
    wanted = model.classifier(model.albert(IDS, MASK).last_hidden_state[:, 0])
    assert torch.equal(model(IDS, MASK).logits, wanted)


@pytest.mark.parametrize("auto", AUTO)
@pytest.mark.parametrize("tied", [False, True])
def test_the_vocabulary_grows(auto: Any, tied: bool, tmp_path: Path) -> None:
    model = drawn(auto.from_config(config(tie_word_embeddings=tied)))
    before = model(IDS, MASK)[0]
    model.resize_token_embeddings(70, mean_resizing=False)
    after = model(IDS, MASK)[0]
    assert model.config.vocab_size == len(model.get_input_embeddings().weight) == 70
    assert after.shape[-1] == (70 if auto is AutoModelForMaskedLM else before.shape[-1])
    torch.testing.assert_close(after[..., : before.shape[-1]], before)
    model.save_pretrained(tmp_path)
    assert torch.equal(auto.from_pretrained(tmp_path)(IDS, MASK)[0], after)


@pytest.mark.parametrize("auto", AUTO)
def test_checkpointing_changes_no_gradient(auto: Any) -> None:
    dropless = config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout_prob=0.0)
    model = drawn(auto.from_config(dropless)).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(IDS, MASK)[0].square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert model.base_model.encoder.layers[0].gradient_checkpointing
    assert len(gradients[0]) == len(gradients[1]) > 20
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("auto", AUTO)
def test_it_is_compiled_in_one_graph(auto: Any) -> None:
    model = drawn(auto.from_config(config()))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDS, MASK)[0], model(IDS, MASK)[0])


def test_attention_maps_are_given_for_every_pass() -> None:
    model = drawn(MiniAlbertModel(config(attn_implementation="eager")))
    maps = model(IDS, MASK, output_attentions=True).attentions
    assert len(maps) == 3
    torch.testing.assert_close(maps[2].sum(-1), torch.ones(2, 2, 5))
    assert maps[2][1, :, :, 3:].max() == 0


def test_adapters_alone_train() -> None:
    model = AutoModelForSequenceClassification.from_config(config())
    model.freeze_all_but_adapters()
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(IDS, MASK, labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, kept[name])}
    assert {name.split(".")[0] for name in moved} == {"albert", "classifier"}
    assert all("adapters" in name or name.startswith("classifier") for name in moved)
    assert {name.split(".")[5] for name in moved if "adapters" in name} == {"0", "1", "2"}


def test_a_model_without_adapters_gets_them(tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_config(config(adapter_size=0, num_labels=3)).to(torch.float64)
    with pytest.raises(InputError, match="no adapters: call insert_adapters"):
        model.freeze_all_but_adapters()
    torch.manual_seed(3)
    model.insert_adapters()
    adapters = model.albert.encoder.layers[0].adapters
    assert len(adapters) == 3
    assert adapters[0].ffn.down.weight.shape == (2, 32)
    assert adapters[0].ffn.down.weight.dtype == torch.float64
    assert 0 < adapters[2].attention.up.weight.std() < 0.1
    with pytest.raises(InputError, match="has adapters of width 2 already"):
        model.insert_adapters()
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert torch.equal(again(IDS, MASK).logits, model.eval()(IDS, MASK).logits)


def test_the_shared_ffn_is_found_and_shrinks(tmp_path: Path) -> None:
    model = drawn(MiniAlbertForMaskedLM(config(num_hidden_layers=6)))
    report = mlp_fusion.fuse(model, 24, method="fusion")
    assert [(row.path, row.neurons_before, row.neurons_after) for row in report.rows] == [
        ("albert.encoder.layers.0", 48, 24)
    ]
    model.save_pretrained(tmp_path)
    again = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert again.config.intermediate_size == 24
    torch.testing.assert_close(again(IDS, MASK).logits, model(IDS, MASK).logits)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_hidden_groups": 2}, "one layer"),
        ({"inner_group_num": 2}, "one layer"),
        ({"adapter_size": -1}, "adapter_size -1: give a width, or 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0: the layer is passed through 1 time or more"),
        ({"num_attention_heads": 5}, "hidden_size 32 is no multiple of num_attention_heads 5"),
    ],
)
def test_wrong_configs_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**wrong)


def test_no_adapters_of_no_width() -> None:
    with pytest.raises(InputError, match="adapters of width 0: give 1 or more"):
        MiniAlbertModel(config(adapter_size=0)).insert_adapters(0)


def test_importing_the_package_is_enough(tmp_path: Path) -> None:
    config().save_pretrained(tmp_path)
    code = f"""
import mlp_fusion
from transformers import BertModel  # its import is where others begin in the middle
from transformers import AutoConfig, AutoModelForMaskedLM
print(type(AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained({str(tmp_path)!r}))).__name__)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.split() == ["MiniAlbertForMaskedLM"], run.stderr


@pytest.mark.slow
def test_a_layer_that_runs_several_times_learns_from_text(tmp_path: Path) -> None:
    source, text = saved(tmp_path / "source", 4), tmp_path / "text.txt"
    text.write_text("the cat sat a cat\n" * 16, encoding="utf-8")
    with pytest.raises(InputError, match=r"give sequential=False \(--no-sequential\)"):
        mlp_fusion.compress(source, tmp_path / "out", 24, calibration=str(text), sequential=True)
    (source / "distill.json").write_text("{}")
    report = mlp_fusion.compress(source, tmp_path / "out", 24, calibration=str(text))
    assert not (tmp_path / "out" / "distill.json").exists(), "that tells of another model"
    assert report.settings.method == "merge"
    assert report.settings.sequential is False
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "out").config.intermediate_size == 24


ROWS = [{"text": ("the cat sat a cat", "a the")[n % 2], "label": n % 2} for n in range(16)]
TUNING: dict[str, Any] = {"task": "classification", "epochs": 2, "batch_size": 8, "adapters": True}


def saved(folder: Path, adapter_size: int) -> Path:
    """A checkpoint with a head for masked tokens, and a tokenizer."""
    torch.manual_seed(0)
    MiniAlbertForMaskedLM(config(adapter_size=adapter_size)).save_pretrained(folder)
    return ck.add_tokenizer(folder, pad_token="<pad>")


@pytest.mark.slow
@pytest.mark.parametrize("adapter_size", [4, 0])
def test_finetune_trains_adapters_and_head(adapter_size: int, tmp_path: Path) -> None:
    source = saved(tmp_path / "source", adapter_size)
    for name in ("one", "other"):
        mlp_fusion.finetune(source, tmp_path / name, ROWS, ROWS, **TUNING)
    before, after, again = (ck.tensors(tmp_path / name) for name in ("source", "one", "other"))
    moved = {name for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])}
    fresh = {name for name in after.keys() - before.keys() if "adapters" in name}
    assert all("adapters" in name for name in moved)
    assert bool(moved) == (adapter_size > 0)
    assert bool(fresh) == (adapter_size == 0)
    assert all(torch.equal(after[name], again[name]) for name in after)
    tuned = AutoModelForSequenceClassification.from_pretrained(tmp_path / "one")
    assert tuned.config.adapter_size == (adapter_size or 2)


@pytest.mark.slow
def test_interrupted_adapter_tuning_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", 0)
    mlp_fusion.finetune(source, tmp_path / "whole", ROWS, **TUNING)

    def stop(stage: str, done: int, total: int, loss: float | None) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mlp_fusion.finetune(source, tmp_path / "parts", ROWS, progress=stop, **TUNING)
    mlp_fusion.finetune(source, tmp_path / "parts", ROWS, resume=True, **TUNING)
    whole, parts = (ck.tensors(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "hiwi"])
def test_methods_of_peft_suit_it(method: str, tmp_path: Path) -> None:
    source = saved(tmp_path / "source", 4)
    options = {"task": "classification", "epochs": 1, "batch_size": 8, "peft": method}
    options["peft_options"] = {"parameters": "weight"} if method == "hiwi" else None
    mlp_fusion.finetune(source, tmp_path / "out", ROWS, **options)
    before, after = ck.tensors(source), ck.tensors(tmp_path / "out")
    moved = {name for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])}
    wanted = ("query", "value") if method == "lora" else ("ffn", "ffn_output")
    assert {name.split(".")[-2] for name in moved} == set(wanted)


def test_adapters_are_of_minialbert_alone(tmp_path: Path) -> None:
    other = ck.add_tokenizer(ck.save_tiny(tmp_path / "bert"), pad_token="<pad>")
    with pytest.raises(InputError, match="is no MiniALBERT, whose adapters could train: use peft"):
        mlp_fusion.finetune(other, tmp_path / "out", ROWS, **TUNING)
    with pytest.raises(InputError, match="peft lora trains its own parameters"):
        mlp_fusion.finetune(other, tmp_path / "out", ROWS, peft="lora", **TUNING)
    assert not (tmp_path / "out").exists()
