"""`distill`: what it teaches, that it resumes as if never interrupted, and what it refuses."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForMaskedLM, AutoTokenizer

import checkpoints as ck
import mlp_fusion
from commands import Run, run_twice_at_once
from families import tiny_model
from mlp_fusion import InputError, distill
from mlp_fusion.finetuning import session
from mlp_fusion.finetuning.layer_to_layer import LayerToLayer
from mlp_fusion.finetuning.masking import MaskedText, masked_blocks
from mlp_fusion.finetuning.trainers import EpochOrder
from mlp_fusion.running.rows import read_rows

SMALL: dict[str, Any] = {
    "embedding_size": 8, "batch_size": 8, "max_length": 16, "learning_rate": 5e-3, "seed": 3, "mask_share": 0.3,
}  # fmt: skip


def sentences(count: int, seed: int = 0) -> list[dict[str, str]]:
    """The same four words over and over, from somewhere on."""
    words = ("the", "cat", "sat", "a")
    first = torch.randint(4, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [{"text": " ".join(words[(n + i) % 4] for i in range(7))} for n in first]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "bert"
    return ck.add_masking_tokenizer(ck.save_tiny(folder, task="MaskedLM"))


def test_a_student_learns_and_stands_in_the_folder(source: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    report = distill(
        source, tmp_path / "out", sentences(80), sentences(20, 1), epochs=3.0, **SMALL,
        progress=lambda stage, done, total, loss: seen.append((stage, done, total)),
    )  # fmt: skip
    assert report.layers == [2, 3]
    assert report.examples == 80 * 8 // 14
    assert seen == [("train", n, 18) for n in range(1, 19)]
    assert [e["step"] for e in report.evaluations] == [0, 6, 12, 18]
    assert report.initial is not None
    assert report.final is not None
    assert set(report.initial) == {"loss", "mlm", "attention", "hidden", "output"}
    assert report.final["loss"] < 0.7 * report.initial["loss"]
    assert report.final["hidden"] < 0.5 * report.initial["hidden"]
    assert report.train[-1]["loss"] < report.train[0]["loss"]
    weighted = report.final["mlm"] + 3 * (report.final["attention"] + report.final["hidden"])
    assert report.final["loss"] == pytest.approx(weighted + 5 * report.final["output"], rel=1e-5)
    assert {name: report.settings[name] for name in ("recursions", "intermediate_size", "adapter_size")} == {
        "recursions": 2, "intermediate_size": 64, "adapter_size": 1,
    }  # fmt: skip
    assert json.loads((tmp_path / "out/distill.json").read_text()) == report.to_dict()
    assert not (tmp_path / "out/checkpoints").exists()
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert isinstance(model, mlp_fusion.MiniAlbertForMaskedLM)
    assert sum(p.numel() for p in model.albert.parameters()) == report.parameters
    assert AutoTokenizer.from_pretrained(tmp_path / "out").mask_token == "<mask>"
    assert model.config.max_position_embeddings == 40
    lines = report.table().splitlines()
    assert lines[0].startswith("2 recursions learn from layers 2, 3 of ")
    assert lines[2].startswith("step 0: loss ")


def test_evaluation_is_that_of_the_same_masks_and_its_own_batches(source: Path, tmp_path: Path) -> None:
    """What is measured at the end is what the written model gives, over all blocks at once."""
    held_out = sentences(16, 1)
    report = distill(source, tmp_path / "out", sentences(16), held_out, **{**SMALL, "batch_size": 3})
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids, own = masked_blocks(read_rows(held_out, labelled=False), tokenizer, 16)
    text = MaskedText(ids, own, tokenizer, 0.3, 3, "evaluation")
    student, teacher = (AutoModelForMaskedLM.from_pretrained(f).eval() for f in (tmp_path / "out", source))
    pairs = LayerToLayer(student, teacher, dict.fromkeys(("mlm", "attention", "hidden", "output"), 1.0))
    assert len(text) == 9
    with torch.no_grad():
        thirds = [pairs.parts(student, text.batch(range(n, n + 3))) for n in (0, 3, 6)]
    assert report.final is not None
    for name in thirds[0]:
        mean = sum(float(found[name]) for found in thirds) / 3
        assert report.final[name] == pytest.approx(mean, rel=1e-4), name


def test_every_epoch_has_masks_of_its_own_and_what_weighs_nothing_is_still_measured(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []
    plain = MaskedText.__getitem__

    def watched(text: MaskedText, number: int) -> dict[str, torch.Tensor]:
        asked.append((text.name, number))
        return plain(text, number)

    monkeypatch.setattr(MaskedText, "__getitem__", watched)
    options = {**SMALL, "mlm_weight": 0.0, "batch_size": 2}
    report = distill(source, tmp_path / "out", sentences(14), sentences(4, 1), epochs=2.0, **options)
    assert report.examples == 8
    trained = [number for name, number in asked if name == "text"]
    assert trained[:2] == [0, 1], "the trial of the teacher"
    assert sorted(trained[2:]) == list(range(16))
    assert {number for name, number in asked if name == "evaluation"} == {0, 1}
    assert report.final is not None
    assert report.final["mlm"] > 1.0
    rest = 3 * (report.final["attention"] + report.final["hidden"]) + 5 * report.final["output"]
    assert report.final["loss"] == pytest.approx(rest, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["roberta", "distilbert", "electra"])
def test_other_teachers_teach(family: str, tmp_path: Path) -> None:
    if family == "electra":
        config = transformers.ElectraConfig(
            vocab_size=97, hidden_size=24, embedding_size=12, num_hidden_layers=3, num_attention_heads=4,
            intermediate_size=64, max_position_embeddings=40, pad_token_id=1,
        )  # fmt: skip
        torch.manual_seed(0)
        AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "teacher")
    else:
        ck.save_tiny(tmp_path / "teacher", family, task="MaskedLM")
    ck.add_masking_tokenizer(tmp_path / "teacher")
    report = distill(tmp_path / "teacher", tmp_path / "out", sentences(40), sentences(8, 1), epochs=2.0, **SMALL)
    assert report.initial is not None
    assert report.final is not None
    assert report.final["loss"] < report.initial["loss"]
    assert report.settings["intermediate_size"] == 64


class _StoppedError(Exception):
    pass


@pytest.fixture(scope="module")
def uninterrupted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Its folder and report, of a run with some checkpoint_steps that nothing stops."""

    @functools.cache
    def run(checkpoint_steps: int | None) -> tuple[Path, Any]:
        out = tmp_path_factory.mktemp("uninterrupted") / "whole"
        data = sentences(40), sentences(8, 1)
        return out, distill(source, out, *data, epochs=2.0, checkpoint_steps=checkpoint_steps, **SMALL)

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("checkpoint_steps", "last", "first"), [(None, 5, 4), (2, 4, 3)])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    source: Path, uninterrupted: Callable[..., Any], tmp_path: Path, checkpoint_steps: int | None, last: int, first: int
) -> None:
    options = {**SMALL, "epochs": 2.0, "checkpoint_steps": checkpoint_steps}
    data, out = (sentences(40), sentences(8, 1)), tmp_path / "cut"

    def stop(_stage: str, done: int, _total: int, _loss: float | None) -> None:
        if done == last:
            raise _StoppedError

    with pytest.raises(_StoppedError):
        distill(source, out, *data, progress=stop, **options)
    with pytest.raises(InputError, match="unfinished run"):
        distill(source, out, *data, **options)
    with pytest.raises(InputError, match=r"had hidden_weight 3\.0, now it is 1\.0"):
        distill(source, out, *data, resume=True, hidden_weight=1.0, **options)
    with pytest.raises(InputError, match="had text "):
        distill(source, out, sentences(40, 7), data[1], resume=True, **options)
    seen: list[int] = []
    resumed = distill(source, out, *data, resume=True, progress=lambda _, done, *__: seen.append(done), **options)
    assert seen[0] == first
    folder, whole = uninterrupted(checkpoint_steps)
    one, other = ck.tensors(out), ck.tensors(folder)
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert {**resumed.to_dict(), "seconds": 0.0} == {**whole.to_dict(), "seconds": 0.0}
    with pytest.raises(InputError, match="finished run"):
        distill(source, out, *data, resume=True, **options)


@pytest.mark.slow
def test_parts_of_a_batch_take_the_same_steps_where_each_has_as_many_masks(source: Path, tmp_path: Path) -> None:
    """Hidden states alone are means over tokens, of which all parts have as many."""
    options = {**SMALL, "mlm_weight": 0.0, "attention_weight": 0.0, "output_weight": 1e-30}
    teacher = AutoModelForMaskedLM.from_pretrained(source)
    teacher.config.hidden_dropout_prob = teacher.config.attention_probs_dropout_prob = 0.0
    tokenizer = AutoTokenizer.from_pretrained(source)
    for parts in (1, 4):
        out = tmp_path / str(parts)
        distill(teacher, out, sentences(28), tokenizer=tokenizer, accumulation=parts, **options)
    one, other = (ck.tensors(tmp_path / name) for name in "14")
    for name in one:
        if "predictions" not in name:
            torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_under_bfloat16_it_learns_as_in_float32(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: both models run under autocast, the teacher's outputs in 16 bits."""
    seen = []
    plain = LayerToLayer.parts

    def watched(pairs: LayerToLayer, *args: Any, **options: Any) -> Any:
        seen.append(torch.is_autocast_enabled("cpu"))
        return plain(pairs, *args, **options)

    monkeypatch.setattr(LayerToLayer, "parts", watched)
    exact = distill(source, tmp_path / "exact", sentences(40), sentences(8, 1), **SMALL)
    assert not any(seen)
    seen.clear()
    # The one that is imported there: with its models, transformers may replace itself among the modules.
    library: Any = session.transformers
    arguments = library.TrainingArguments
    monkeypatch.setattr(library, "TrainingArguments", lambda **known: arguments(**{**known, "bf16": True}))
    half = distill(source, tmp_path / "half", sentences(40), sentences(8, 1), **SMALL)
    assert not seen[0], "the trial of the teacher"
    assert all(seen[1:])
    assert exact.final is not None
    assert half.final is not None
    assert half.final != exact.final
    for name in ("mlm", "attention", "hidden", "output"):
        assert half.final[name] == pytest.approx(exact.final[name], rel=0.1), name


def test_a_student_starts_where_it_is_told_to(source: Path, tmp_path: Path) -> None:
    still = {**SMALL, "learning_rate": 1e-12, "weight_decay": 0.0}
    theirs = ck.tensors(source)["cls.predictions.transform.dense.weight"]
    for start in ("teacher", "random"):
        distill(source, tmp_path / start, sentences(8), start=start, **still)
        ours = ck.tensors(tmp_path / start)["predictions.dense.weight"]
        assert torch.allclose(ours, theirs, atol=1e-6) == (start == "teacher")


def test_a_teacher_in_memory_stays_as_it_is(source: Path, tmp_path: Path) -> None:
    teacher = tiny_model("bert", task="MaskedLM").train()
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.backend_tokenizer.enable_truncation(9)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    report = distill(teacher, tmp_path / "out", sentences(8), tokenizer=tokenizer, recursions=1, **SMALL)
    assert (report.teacher, report.layers, report.initial, report.final) == ("BertForMaskedLM", [3], None, None)
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 9
    assert json.loads((tmp_path / "out/tokenizer.json").read_text())["truncation"]["max_length"] == 9
    assert teacher.training
    assert teacher.config._attn_implementation == "sdpa"
    assert all(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())


def test_a_teacher_without_a_head_teaches_without_it(tmp_path: Path) -> None:
    headless = ck.add_masking_tokenizer(ck.save_tiny(tmp_path / "headless", task="Model"))
    remedy = "no head for masked tokens: train it on masked tokens first, or give output_weight=0"
    with pytest.raises(InputError, match=remedy):
        distill(headless, tmp_path / "out", sentences(8), **SMALL)
    tokenizer = AutoTokenizer.from_pretrained(headless)
    with pytest.raises(InputError, match=remedy):
        distill(tiny_model("bert", task="Model"), tmp_path / "out", sentences(8), tokenizer=tokenizer, **SMALL)
    assert not (tmp_path / "out").exists()
    report = distill(headless, tmp_path / "out", sentences(8), sentences(8, 1), output_weight=0.0, **SMALL)
    assert report.final is not None
    assert set(report.final) == {"step", "epoch", "loss", "mlm", "attention", "hidden"}
    lacking = ck.drop_tensor(ck.copy(headless, tmp_path / "lacking"), "layer.1.attention.self.query.weight")
    with pytest.raises(InputError, match=r"its checkpoint lacks bert\..*query\.weight: start from the whole model"):
        distill(lacking, tmp_path / "other", sentences(8), output_weight=0.0, **SMALL)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"recursions": 4}, "4 recursions learn from a teacher of 3 layers: give 3 or fewer"),
        ({"mlm_weight": 0.0, "output_weight": 0.0}, "nothing would train the head: give one of them"),
        ({"batch_size": 8, "accumulation": 3}, "no multiple of accumulation 3"),
        ({"mask_share": 0.0}, "mask_share 0.0: give a number strictly between 0 and 1"),
        ({"start": "middle"}, "start 'middle': use teacher or random"),
        ({"max_length": 2}, "special ones alone"),
        ({"attention_weight": -1.0}, "attention_weight -1.0"),
    ],
)
def test_bad_options_are_one_line_and_nothing_is_written(
    source: Path, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        distill(source, tmp_path / "out", sentences(8), **{**SMALL, **options})
    assert not (tmp_path / "out").exists()


def test_bad_teachers_and_texts_are_one_line_and_nothing_is_written(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="its columns are other"):
        distill(source, out, [{"other": "the cat"}], **SMALL)
    plain = ck.add_tokenizer(ck.copy(source, tmp_path / "plain"), pad_token="<pad>")
    with pytest.raises(InputError, match="no mask token"):
        distill(plain, out, sentences(8), **SMALL)
    with pytest.raises(InputError, match="pass tokenizer"):
        distill(tiny_model("bert", task="MaskedLM"), out, sentences(8), **SMALL)
    narrow = tiny_model("bert", task="MaskedLM", vocab_size=8)
    with pytest.raises(InputError, match="makes token 8, the model knows 8"):
        distill(narrow, out, sentences(8), tokenizer=AutoTokenizer.from_pretrained(source), **SMALL)
    with pytest.raises(InputError, match="not a plain model of transformers"):
        distill(torch.nn.Linear(2, 2), out, sentences(8), **SMALL)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="did you mean 'recursions'"):
        distill(source, out, sentences(8), recursion=2, **SMALL)
    decoder = ck.add_masking_tokenizer(ck.save_tiny(tmp_path / "decoder", "gpt2"))
    with pytest.raises(InputError, match="gpt2 has no head for masked tokens: take a BERT or its like"):
        distill(decoder, out, sentences(8), **SMALL)
    assert not out.exists()


def test_the_command_line_distils_and_says_what_came_of_it(source: Path, tmp_path: Path, run: Run) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(row["text"] for row in sentences(16)), encoding="utf-8")
    words = ["--text", text, "--start", "random", "--embedding-size", "8", "--max-length", "16", "--recursions", "1"]
    done = run("distill", source, tmp_path / "out", *words, "--eval", text, "--json")
    assert (done.code, done.err) == (0, "")
    assert done.json["layers"] == [3]
    again = run("distill", source, tmp_path / "out", *words)
    assert again.code == 2
    assert "finished run" in again.error
    bad = run("distill", source, tmp_path / "other", *words, "--mlm-weight", "0", "--output-weight", "0")
    assert bad.code == 2
    assert "nothing would train the head" in bad.error


def test_an_interrupt_on_the_command_line_says_how_to_go_on(
    source: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat a " * 40, encoding="utf-8")

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlp_fusion.finetuning.distillation.Distillation.train", stopped)
    done = run("distill", source, tmp_path / "out", "--text", text, "--start", "random")
    assert done.code == 130
    assert "--resume goes on from the last checkpoint" in done.error


def test_an_order_is_that_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = EpochOrder(9, seed)
        sampler.set_epoch(epoch)
        assert len(sampler) == 9
        return list(sampler)

    assert sorted(order(0, 0)) == list(range(9))
    assert sorted(order(0, 2)) == list(range(18, 27))
    assert order(0, 1) == order(0, 1)
    assert len({tuple(n % 9 for n in order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


# --- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_teach_one_student_what_one_would(source: Path, tmp_path: Path) -> None:
    """Half of every batch each: the same losses before, all but the same on the way, and one report."""
    for name, rows in (("train.jsonl", sentences(80)), ("dev.jsonl", sentences(21, 1))):
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    files, shared = (tmp_path / "train.jsonl", tmp_path / "dev.jsonl"), {**SMALL, "epochs": 3.0}
    alone = distill(source, tmp_path / "alone", *files, **shared)
    halves = distill(source, tmp_path / "halves", *files, **{**shared, "batch_size": 4, "epochs": 1.0})
    options = [f"--{key.replace('_', '-')}={value}" for key, value in {**shared, "batch_size": 4}.items()]
    done = run_twice_at_once(
        tmp_path, "distill", source, tmp_path / "out", "--text", files[0], "--eval", files[1], *options,
        "--device", "cpu", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err[-2000:]
    report = done.json
    assert report == json.loads((tmp_path / "out/distill.json").read_text(encoding="utf-8"))
    # Losses are means over the batches of one process, each a mean over what is masked in it.
    assert report["initial"] == pytest.approx(halves.initial, rel=1e-5)
    assert [e["step"] for e in report["evaluations"]] == [e["step"] for e in alone.evaluations]
    assert alone.final is not None
    assert report["final"]["loss"] == pytest.approx(alone.final["loss"], rel=0.1)
    assert report["final"]["loss"] < 0.7 * report["initial"]["loss"]
