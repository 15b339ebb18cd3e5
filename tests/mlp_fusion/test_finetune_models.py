"""`finetune`: which models it takes, how they fit their tokenizer and teachers, and several processes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from transformers import AutoTokenizer

import checkpoints as ck
import mlp_fusion
from commands import run_twice_at_once
from families import tiny_model
from mlp_fusion import InputError
from mlp_fusion.finetuning.loading import load_student, load_teacher, positions

pytestmark = pytest.mark.slow

LABELS = {"0": 0, "1": 1}
ROWS = [{"text": ("the cat sat a cat", "a the")[n % 2], "label": n % 2} for n in range(16)]
OPTIONS: dict[str, Any] = {"task": "classification", "epochs": 1.0, "batch_size": 8}


def saved(folder: Path, family: str = "bert", task: str = "Model", eos: str = "</s>", **options: Any) -> Path:
    """A tiny checkpoint whose tokenizer has an end-of-text token, and no padding unless `pad_token` is given."""
    special = {k: options.pop(k) for k in ("pad_token",) if k in options}
    return ck.add_tokenizer(ck.save_tiny(folder, family, task=task, **options), eos_token=eos, **special)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("source") / "bert", pad_token="<pad>")


@pytest.fixture(scope="module")
def tokenizer(source: Path) -> Any:
    return AutoTokenizer.from_pretrained(source)


# --- tokenizer and model ---------------------------------------------------------------------------------------------


def test_the_tokenizer_is_saved_as_it_was(source: Path, tmp_path: Path) -> None:
    """Runtimes that read tokenizer.json themselves would go on cutting texts to the length of this training."""
    mlp_fusion.finetune(source, tmp_path / "out", ROWS, max_length=4, **OPTIONS)
    before, after = (json.loads((folder / "tokenizer.json").read_text()) for folder in (source, tmp_path / "out"))
    assert before["truncation"] is None
    assert after == before


def test_the_callers_tokenizer_is_left_alone(tmp_path: Path) -> None:
    folder = saved(tmp_path / "gpt2", "gpt2", pad_token_id=None)
    own = AutoTokenizer.from_pretrained(folder)
    assert own.pad_token is None
    found = load_student(folder, "classification", ["0", "1"], "adamw", own)
    assert found.tokenizer.pad_token == "</s>"
    assert own.pad_token is None


@pytest.mark.parametrize(("known", "expected"), [(None, 2), (1, 1)])
def test_model_and_teacher_pad_with_the_tokenizers_token(tmp_path: Path, known: int | None, expected: int) -> None:
    """Decoders classify by the last token that is not padding, and refuse batches without knowing what that is."""
    folder = saved(tmp_path / "gpt2", "gpt2", pad_token_id=known)
    student = load_student(folder, "classification", ["0", "1"], "adamw")
    assert (student.tokenizer.pad_token_id, student.model.config.pad_token_id) == (expected, expected)
    teacher: Any = load_teacher(tiny_model("gpt2", pad_token_id=None, label2id=LABELS), "classification", student)
    assert teacher.config.pad_token_id == expected
    other = AutoTokenizer.from_pretrained(folder)
    other.pad_token = "<unk>"
    model = load_student(folder, "classification", ["0", "1"], "adamw", other).model
    assert model.config.pad_token_id == other.pad_token_id == 3


def test_positions_behind_the_padding_are_none(tmp_path: Path) -> None:
    for family, count in (("bert", 40), ("gpt2", 40), ("distilbert", 40), ("llama", 40), ("roberta", 38)):
        model = tiny_model(family)
        assert positions(model) == count
        ids = torch.full((1, count), 5)
        model(input_ids=ids, attention_mask=torch.ones_like(ids))


def test_texts_are_cut_to_the_shortest_models_positions(source: Path, tmp_path: Path) -> None:
    teacher = tiny_model("bert", max_position_embeddings=3, label2id=LABELS)
    mlp_fusion.finetune(source, tmp_path / "out", ROWS, teacher=teacher, **OPTIONS)
    assert (tmp_path / "out/finetune.json").is_file()


def test_a_head_in_memory_learns_the_names_of_its_classes(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{**row, "label": ("dog", "cat")[row["label"]]} for row in ROWS]
    mlp_fusion.finetune(tiny_model("bert"), tmp_path / "out", rows, tokenizer=tokenizer, **OPTIONS)
    config = ck.read_config(tmp_path / "out")
    assert (config["label2id"], config["id2label"]) == ({"cat": 0, "dog": 1}, {"0": "cat", "1": "dog"})


def test_data_may_lack_some_of_the_heads_classes(tokenizer: Any) -> None:
    model = tiny_model("bert", label2id={"c": 0, "a": 1, "b": 2}, id2label={0: "c", 1: "a", 2: "b"})
    assert load_student(model, "classification", ["a", "c"], "adamw", tokenizer).classes == {"c": 0, "a": 1, "b": 2}


def test_a_datasets_classes_keep_their_names_and_order(source: Path, tmp_path: Path) -> None:
    feature = SimpleNamespace(names=["positive", "negative"])
    labelled: Any = type("Labelled", (list,), {"column_names": ["text", "label"], "features": {"label": feature}})
    data = labelled([{"text": "the cat", "label": 1}, {"text": "a cat sat", "label": 0}])
    mlp_fusion.finetune(source, tmp_path / "out", data, task="classification", epochs=1.0, device="cpu")
    config = ck.read_config(tmp_path / "out")
    assert config["id2label"] == {"0": "positive", "1": "negative"}
    assert config["label2id"] == {"positive": 0, "negative": 1}


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (("yes", "no", "maybe"), r"a head for 2 classes, the data has 3 .*: start from the model without this head"),
        (("yes", "no"), r"a head for the classes bad, good, the data has no, yes: name the labels in the data as"),
    ],
)
def test_labels_that_the_head_does_not_know(labels: tuple[str, ...], words: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", task="SequenceClassification", id2label={0: "bad", 1: "good"})
    data = [{"text": "the cat", "label": label} for label in labels]
    with pytest.raises(InputError, match=words):
        mlp_fusion.finetune(folder, tmp_path / "out", data, task="classification", device="cpu")


def test_a_model_whose_encoder_was_fused_is_fused(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model("bert")
    original = copy.deepcopy(model)
    mlp_fusion.fuse(model.bert, 16)
    report = mlp_fusion.finetune(model, tmp_path / "out", ROWS, original=original, tokenizer=tokenizer, **OPTIONS)
    assert report.method == "fusion"
    assert report.distillation["layerwise"]["steps"] == 2


# --- what is refused -------------------------------------------------------------------------------------------------


def test_models_that_cannot_be_trained_are_refused_before_anything_is_written(
    source: Path, tokenizer: Any, tmp_path: Path
) -> None:
    def refused(message: str, model: Any, data: Any = ROWS, **options: Any) -> None:
        with pytest.raises(InputError, match=message):
            mlp_fusion.finetune(model, tmp_path / "out", data, **{**OPTIONS, "tokenizer": tokenizer, **options})
        assert not (tmp_path / "out").exists()

    model = tiny_model("bert")
    mlp_fusion.fuse(model, 16, optimizer="adamw")
    refused("is scaled, sgd needs split", model, optimizer="sgd")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"]))
    refused("merge adapters", adapted)
    refused("merge adapters", model)
    refused("are frozen", tiny_model("bert").requires_grad_(False))
    refused("makes token 7, the model knows 6", tiny_model("bert", vocab_size=6))
    refused("multi_label_classification", tiny_model("bert", problem_type="multi_label_classification"))
    (tmp_path / "empty").mkdir()
    refused(r"config\.json is missing", tmp_path / "empty")
    named = [{**row, "label": ("dog", "cat")[row["label"]]} for row in ROWS]
    refused("teacher does not say which class is cat, dog", source, named, teacher=tiny_model("bert"))


@pytest.mark.parametrize(
    ("family", "task", "message"),
    [
        ("bert", "MaskedLM", "no causal language model"),
        ("distilbert", "Model", "cannot be loaded as ModelForCausalLM"),
        ("llama", "Model", "without its language modelling head"),
    ],
)
def test_language_modelling_needs_a_causal_model_with_its_head(
    tmp_path: Path, family: str, task: str, message: str
) -> None:
    folder = saved(tmp_path / family, family, task, pad_token="<pad>")
    with pytest.raises(InputError, match=message) as raised:
        mlp_fusion.finetune(folder, tmp_path / "out", [{"text": "the cat sat " * 9}], task="lm")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


# --- several processes -----------------------------------------------------------------------------------------------


def test_two_processes_train_one_model_and_speak_with_one_voice(source: Path, tmp_path: Path) -> None:
    fused = tmp_path / "fused"
    mlp_fusion.compress(source, fused, 16)
    (tmp_path / "train.tsv").write_text("\n".join(f"{r['text']}\t{r['label']}" for r in ROWS * 2), encoding="utf-8")
    done = run_twice_at_once(
        tmp_path, "finetune", fused, tmp_path / "out", "--task", "classification",
        "--train", tmp_path / "train.tsv", "--eval", tmp_path / "train.tsv", "--original", source,
        "--epochs", "4", "--batch-size", "4", "--warmup", "0.5", "--device", "cpu", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err[-2000:]
    report = done.json
    assert report == json.loads((tmp_path / "out/finetune.json").read_text(encoding="utf-8"))
    # 32 rows, 4 a step and process.
    assert [e["step"] for e in report["train"]] == list(range(1, 17))
    rates = [e["learning_rate"] for e in report["train"]]
    assert rates.index(max(rates)) == 8
    assert max(rates) == pytest.approx(5e-5)
