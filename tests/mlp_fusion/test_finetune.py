"""`finetune`: what it trains, what it leaves, that it resumes as if never interrupted, and what it refuses."""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import checkpoints as ck
import mlp_fusion
from families import tiny_model
from mlp_fusion import InputError
from mlp_fusion.finetuning.loading import fused_parameters
from mlp_fusion.finetuning.trainers import SimilarLengths, hidden_state_error, logit_divergence
from mlp_fusion.store.restoring import restore

pytestmark = pytest.mark.slow

WORDS = ("the", "a", "cat", "sat")
SMALL: dict[str, Any] = {"epochs": 2.0, "batch_size": 8, "max_length": 8, "learning_rate": 2e-3, "seed": 3}
#: Of the runs that are stopped and go on.
INTERRUPTED: dict[str, Any] = {**SMALL, "task": "classification", "layerwise_epochs": 2.0}


def sentences(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Sentences whose class is whether they begin with `cat`."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        words = [WORDS[int(i)] for i in torch.randint(len(WORDS), (5,), generator=generator)]
        rows.append({"text": " ".join(words), "label": int(words[0] == "cat")})
    return rows


def with_tokenizer(folder: Path) -> Path:
    return ck.add_tokenizer(folder, pad_token="<pad>", eos_token="</s>")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "bert"
    return with_tokenizer(ck.save_tiny(folder, task="Model"))


@pytest.fixture(scope="module")
def fused(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fused") / "bert"
    mlp_fusion.compress(source, out, 16, [0, 2])
    return out


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "gpt2"
    return with_tokenizer(ck.save_tiny(folder, "gpt2", task="CausalLM"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return ck.tensors(folder)


def test_a_fused_encoder_learns_to_classify(fused: Path, tmp_path: Path) -> None:
    data, held_out = sentences(160), sentences(64, seed=1)
    seen: list[tuple[str, int, int]] = []
    report = mlp_fusion.finetune(
        fused, tmp_path / "out", data, held_out, task="classification", **{**SMALL, "epochs": 4.0},
        progress=lambda stage, done, total, loss: seen.append((stage, done, total)),
    )  # fmt: skip
    assert report.final is not None
    assert report.initial is not None
    assert report.final["accuracy"] > 0.95 > report.initial["accuracy"]
    assert (report.method, report.parameterization, report.metric) == ("fusion", "scaled", "accuracy")
    assert seen == [("train", n, 80) for n in range(1, 81)]
    assert [e["step"] for e in report.evaluations] == [0, 20, 40, 60, 80]
    assert report.evaluations[0]["accuracy"] == report.initial["accuracy"]
    assert report.train[-1]["loss"] < 0.5 * report.train[0]["loss"]
    # The folder is complete: report, model, tokenizer, scale; no checkpoint of the run is left.
    assert json.loads((tmp_path / "out/finetune.json").read_text()) == report.to_dict()
    assert not (tmp_path / "out/checkpoints").exists()
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    encoded = tokenizer([row["text"] for row in held_out], padding=True, return_tensors="pt")
    with torch.no_grad():
        found = model(**encoded).logits.argmax(-1)
    share = (found == torch.tensor([row["label"] for row in held_out])).double().mean()
    assert float(share) == pytest.approx(report.final["accuracy"])
    restore(model, tmp_path / "out")
    assert "accuracy 100.00%" in report.table() or "accuracy 9" in report.table()


def test_the_optimizer_decides_the_parameterization(fused: Path, tmp_path: Path) -> None:
    options = {**SMALL, "epochs": 1.0}
    for optimizer, form in (("adamw", "scaled"), ("sgd", "split")):
        report = mlp_fusion.finetune(
            fused, tmp_path / optimizer, sentences(16), task="classification", optimizer=optimizer, **options
        )
        assert report.parameterization == form
        assert ck.read_config(tmp_path / optimizer)["mlp_fusion"]["parameterization"] == form
        assert (report.initial, report.final, report.evaluations) == (None, None, [])


def test_sgd_has_momentum(source: Path, tmp_path: Path) -> None:
    """Two steps of gradient g on a plain loss move by (1 + 1.9) g: compare with torch's own SGD."""
    data = sentences(8)
    options = {"batch_size": 8, "max_length": 8, "learning_rate": 0.1, "weight_decay": 0.0, "warmup": 0.0}
    model = tiny_model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    plain = copy.deepcopy(model).train()
    tokenizer = AutoTokenizer.from_pretrained(source)
    mlp_fusion.finetune(
        model, tmp_path / "out", data, task="classification", optimizer="sgd", epochs=2.0, tokenizer=tokenizer,
        **options,
    )  # fmt: skip
    batch = tokenizer([row["text"] for row in data], padding=True, return_tensors="pt")
    labels = torch.tensor([row["label"] for row in data])
    optimizer = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9)
    for rate in (0.1, 0.05):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        plain(**batch, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_same_seed_gives_the_same_weights(fused: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        options = {**SMALL, "epochs": 1.0, "seed": seed}
        mlp_fusion.finetune(fused, tmp_path / name, sentences(32), task="classification", **options)
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not all(torch.equal(a[k], c[k]) for k in a)


class _StoppedError(Exception):
    pass


@pytest.fixture(scope="module")
def uninterrupted(source: Path, fused: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Its folder and report, of a run with some checkpoint_steps that nothing stops."""

    @functools.cache
    def run(checkpoint_steps: int | None) -> tuple[Path, Any]:
        out = tmp_path_factory.mktemp("uninterrupted") / "whole"
        options = {**INTERRUPTED, "original": source, "checkpoint_steps": checkpoint_steps}
        return out, mlp_fusion.finetune(fused, out, sentences(40), sentences(16, seed=1), **options)

    return run


@pytest.mark.parametrize(
    ("stage", "checkpoint_steps", "last", "first"),
    [
        ("layerwise", None, 8, 6),
        ("layerwise", 3, 8, 7),
        ("train", None, 8, 6),
        ("train", 3, 8, 7),
        # Before the stage's first checkpoint: what counts is the last one of the stage before.
        ("train", None, 2, 1),
    ],
)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    source: Path, fused: Path, uninterrupted: Callable[..., Any], tmp_path: Path, stage: str,
    checkpoint_steps: int | None, last: int, first: int,
) -> None:  # fmt: skip
    options: dict[str, Any] = {**INTERRUPTED, "original": source, "checkpoint_steps": checkpoint_steps}
    data, held_out = sentences(40), sentences(16, seed=1)

    def stop(now: str, done: int, total: int, loss: float | None) -> None:
        if now == stage and done == last:
            raise _StoppedError

    with pytest.raises(_StoppedError):
        mlp_fusion.finetune(fused, tmp_path / "cut", data, held_out, progress=stop, **options)
    assert not (tmp_path / "cut/finetune.json").exists()
    with pytest.raises(InputError, match="unfinished run"):
        mlp_fusion.finetune(fused, tmp_path / "cut", data, held_out, **options)
    with pytest.raises(InputError, match=r"had learning_rate 0\.002, now it is 0\.1"):
        mlp_fusion.finetune(fused, tmp_path / "cut", data, held_out, resume=True, **{**options, "learning_rate": 0.1})
    with pytest.raises(InputError, match=r"had evaluation data \w+, now it is None"):
        mlp_fusion.finetune(fused, tmp_path / "cut", data, resume=True, **options)
    with pytest.raises(InputError, match="had training data"):
        mlp_fusion.finetune(fused, tmp_path / "cut", sentences(40, seed=9), held_out, resume=True, **options)

    seen: list[tuple[str, int]] = []
    resumed = mlp_fusion.finetune(
        fused, tmp_path / "cut", data, held_out, resume=True, **options,
        progress=lambda stage, done, total, loss: seen.append((stage, done)),
    )  # fmt: skip
    assert seen[0] == (stage, first)
    folder, whole = uninterrupted(checkpoint_steps)
    one, other = weights(tmp_path / "cut"), weights(folder)
    assert all(torch.equal(one[k], other[k]) for k in other)
    left_out = {"seconds": 0.0}
    assert {**resumed.to_dict(), **left_out} == {**whole.to_dict(), **left_out}
    with pytest.raises(InputError, match="finished run"):
        mlp_fusion.finetune(fused, tmp_path / "cut", data, held_out, resume=True, **options)


def test_layerwise_distillation_trains_the_fused_layers_towards_the_original(
    source: Path, fused: Path, tmp_path: Path
) -> None:
    report = mlp_fusion.finetune(
        fused, tmp_path / "out", sentences(64), task="classification", original=source, layerwise_epochs=4.0,
        layerwise_learning_rate=3e-3, **{**SMALL, "learning_rate": 1e-12, "epochs": 1.0, "weight_decay": 0.0},
    )  # fmt: skip
    curve = report.distillation["layerwise"]
    assert curve["steps"] == 32
    assert curve["loss"][-1][1] < 0.7 * curve["loss"][0][1]
    before, after = weights(fused), weights(tmp_path / "out")
    # The second stage has hardly moved anything: what differs was trained in the first.
    moved = {k for k in before if not torch.allclose(before[k], after[f"bert.{k}"], atol=1e-6)}
    expected = {k for k in before if any(f"layer.{n}." in k for n in (0, 2)) and "LayerNorm" not in k}
    expected = {k for k in expected if ".intermediate." in k or ".attention." not in k}
    assert moved == expected
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    restore(model, tmp_path / "out")
    assert all(p.requires_grad for name, p in model.named_parameters() if not name.endswith("scale"))


def test_a_teachers_logits_are_learnt(source: Path, fused: Path, tmp_path: Path) -> None:
    """With the whole weight on the teacher, labels do not matter: a student of wrong labels agrees with the teacher."""
    data, held_out = sentences(160), sentences(64, seed=1)
    options = {**SMALL, "task": "classification", "epochs": 4.0}
    mlp_fusion.finetune(source, tmp_path / "teacher", data, held_out, **options)
    wrong = [{**row, "label": 1 - row["label"]} for row in data]
    report = mlp_fusion.finetune(
        fused, tmp_path / "student", wrong, held_out, teacher=tmp_path / "teacher", distill_weight=1.0, **options
    )
    assert report.final is not None
    assert report.final["accuracy"] > 0.9
    assert report.distillation == {"layerwise": None, "logits": {"weight": 1.0, "temperature": 2.0}}


def test_language_models_train_on_text(language_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("the cat sat a " * 300, encoding="utf-8")
    fused = tmp_path / "fused"
    mlp_fusion.compress(language_model, fused, 16)
    report = mlp_fusion.finetune(
        fused, tmp_path / "out", file, file, task="lm", original=language_model, teacher=language_model,
        distill_weight=0.1, **{**SMALL, "epochs": 4.0, "learning_rate": 1e-2},
    )  # fmt: skip
    assert report.initial is not None
    assert report.final is not None
    assert report.final["perplexity"] == pytest.approx(math.exp(report.final["loss"]))
    assert report.final["perplexity"] < 2.0 < report.initial["perplexity"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("the cat sat a the cat sat a", return_tensors="pt")
    with torch.no_grad():
        loss = model(input_ids=ids["input_ids"], labels=ids["input_ids"]).loss
    assert float(loss) < 1.0


def test_accumulation_takes_the_same_steps(source: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = tiny_model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    other = copy.deepcopy(model)
    for found, parts in ((model, 1), (other, 4)):
        mlp_fusion.finetune(
            found, tmp_path / str(parts), sentences(32), task="classification", tokenizer=tokenizer,
            accumulation=parts, optimizer="sgd", **{**SMALL, "epochs": 1.0, "learning_rate": 0.05},
        )  # fmt: skip
    for one, another in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, another, rtol=1e-4, atol=1e-5)


# --- the losses ------------------------------------------------------------------------------------------------------


def test_logit_divergence_is_the_kullback_leibler_divergence() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, wanted = (torch.randn(3, 5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    p, q = (torch.softmax(z / 1.7, -1) for z in (wanted, logits))
    expected = (p * (p.log() - q.log())).sum(-1).mean() * 1.7**2
    torch.testing.assert_close(logit_divergence(logits, wanted, 1.7), expected.float(), rtol=1e-5, atol=1e-6)
    assert float(logit_divergence(wanted, wanted, 1.0)) == pytest.approx(0.0, abs=1e-6)


def test_hidden_state_error_leaves_out_masked_positions() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, wanted = (torch.randn(2, 3, 5, generator=generator) for _ in range(2))
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    kept = mask.bool()
    expected = (hidden[kept] - wanted[kept]).square().sum() / wanted[kept].square().sum()
    torch.testing.assert_close(hidden_state_error(hidden, wanted, mask), expected)
    hidden[~kept] = 1e9
    torch.testing.assert_close(hidden_state_error(hidden, wanted, mask), expected)
    assert float(hidden_state_error(hidden, wanted * 0, mask * 0)) == 0.0


def test_rows_of_similar_length_come_together_in_an_order_of_seed_and_epoch() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 99, (1537,), generator=generator).tolist()

    def order(seed: int, epoch: int) -> list[int]:
        sampler = SimilarLengths(lengths, 16, seed)
        sampler.set_epoch(epoch)
        assert len(sampler) == 1537
        return list(sampler)

    assert sorted(order(0, 0)) == list(range(1537))
    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    found = [lengths[i] for i in order(0, 0)]
    padded = sum(16 * max(found[i : i + 16]) for i in range(0, 1537, 16))
    assert padded < 1.1 * sum(lengths)


def test_fused_parameters_are_those_of_the_chosen_layers(fused: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(fused)
    restore(model, fused)
    found = {id(p) for p in fused_parameters(model, [2])}
    names = {name for name, p in model.named_parameters() if id(p) in found}
    prefix = "bert.encoder.layer.2"
    assert names == {
        f"{prefix}.{part}.dense.{kind}" for part in ("intermediate", "output") for kind in ("weight", "bias")
    }


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "translation"}, "task 'translation'"),
        ({"optimizer": "lion"}, "optimizer 'lion'"),
        ({"learning_rate": 0.0}, "learning_rate 0.0"),
        ({"epochs": math.nan}, "epochs nan"),
        ({"warmup": 1.5}, "warmup 1.5"),
        ({"distill_weight": -0.1}, "distill_weight -0.1"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"batch_size": 10, "accumulation": 4}, "no multiple"),
        ({"checkpoint_steps": 0}, "checkpoint_steps 0"),
        ({"seed": -1}, "seed -1"),
        ({"device": "tpu"}, "device 'tpu'"),
        ({"device": "cuda:1"}, "CUDA_VISIBLE_DEVICES"),
        ({"resume": True}, "no unfinished run"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(
    fused: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    options = {"task": "classification", **SMALL, **changes}
    with pytest.raises(InputError, match=message):
        mlp_fusion.finetune(fused, tmp_path / "out", sentences(16), **options)
    assert not (tmp_path / "out").exists()


def test_models_that_do_not_fit_are_refused(
    source: Path, fused: Path, language_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(message: str, model: Any = fused, data: Any = None, **options: Any) -> None:
        with pytest.raises(InputError, match=message):
            mlp_fusion.finetune(model, tmp_path / "out", data or sentences(16), task="classification", **options)
        assert not (tmp_path / "out").exists()

    refused("no trained classification head", teacher=source)
    refused("layer-wise distillation is for fused models", source, original=source)
    refused("vocabulary", original=tiny_model("bert", vocab_size=99))
    refused("num_hidden_layers", original=tiny_model("bert", num_hidden_layers=5))
    three = [{"text": "cat", "label": n} for n in range(3)]
    refused(
        "head for 2 classes, the data has 3", tiny_model("bert"), three, tokenizer=AutoTokenizer.from_pretrained(source)
    )
    refused("pass tokenizer", tiny_model("bert"))
    model = tiny_model("bert")
    model.config.label2id = {"0": 0, "1": 1}
    refused("cannot teach itself", model, teacher=model, tokenizer=AutoTokenizer.from_pretrained(source))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(InputError, match="not empty"):
        mlp_fusion.finetune(fused, tmp_path / "full", sentences(16), task="classification")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused("needs accelerate")


def test_a_loss_that_is_no_number_ends_the_run(fused: Path, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        mlp_fusion.finetune(
            fused, tmp_path / "out", sentences(64), task="classification", optimizer="sgd",
            **{**SMALL, "learning_rate": 1e30},
        )  # fmt: skip
    assert not (tmp_path / "out/finetune.json").exists()


def test_a_head_keeps_its_classes(source: Path, tmp_path: Path) -> None:
    options = {**SMALL, "epochs": 1.0, "task": "classification"}
    named = [{**row, "label": ("dog", "cat")[row["label"]]} for row in sentences(16)]
    mlp_fusion.finetune(source, tmp_path / "first", named, **options)
    assert ck.read_config(tmp_path / "first")["label2id"] == {"cat": 0, "dog": 1}
    mlp_fusion.finetune(tmp_path / "first", tmp_path / "second", named, **options)
    with pytest.raises(InputError, match="classes cat, dog, the data has 0, 1"):
        mlp_fusion.finetune(tmp_path / "first", tmp_path / "third", sentences(16), **options)
