"""Models as they come: heads of every kind, odd configs, dtypes that disagree, numbers that overflow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import checkpoints as ck
import mlp_fusion
from families import FAMILIES, tiny_model, token_batch
from mlp_fusion import InputError
from mlp_fusion.calibration.sensitivity import output_sensitivities
from mlp_fusion.measure import compare_models
from mlp_fusion.verbs import compress as compress_module
from mlp_fusion.verbs.verify import _check_finite

pytestmark = pytest.mark.slow

TWO = [{"text": "the cat", "label": 0}, {"text": "a cat sat", "label": 1}]
QUICK: dict[str, Any] = {"epochs": 1.0, "batch_size": 2, "max_length": 4, "device": "cpu"}


def save(folder: Path, cls: str, family: str = "bert") -> Path:
    """A tiny checkpoint of any class of transformers."""
    name, arguments = FAMILIES[family]
    torch.manual_seed(0)
    getattr(transformers, cls)(getattr(transformers, name)(**arguments)).save_pretrained(folder)
    return folder


# --- heads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "family", "outputs"),
    [
        ("BertForQuestionAnswering", "bert", {"start_logits", "end_logits"}),
        ("BertForPreTraining", "bert", {"prediction_logits", "seq_relationship_logits"}),
        ("BertForMultipleChoice", "bert", {"logits"}),
        ("BertForNextSentencePrediction", "bert", {"logits"}),
        ("BertForTokenClassification", "bert", {"logits"}),
        ("RobertaForMultipleChoice", "roberta", {"logits"}),
        ("DistilBertForQuestionAnswering", "distilbert", {"start_logits", "end_logits"}),
        ("GPT2DoubleHeadsModel", "gpt2", {"logits", "mc_logits"}),
        ("GPT2ForQuestionAnswering", "gpt2", {"start_logits", "end_logits"}),
        ("LlamaForQuestionAnswering", "llama", {"start_logits", "end_logits"}),
    ],
)
def test_heads_of_every_kind(cls: str, family: str, outputs: set[str], tmp_path: Path) -> None:
    folder = save(tmp_path / "source", cls, family)
    mlp_fusion.compress(folder, tmp_path / "out", 16)
    assert set(load_file(tmp_path / "out" / ck.REFERENCE)) == {"input_ids", *outputs}
    assert mlp_fusion.verify(tmp_path / "out").passed
    # Each of the outputs counts.
    heads = [n for n in ck.tensors(tmp_path / "out") if n.split(".")[0] in ("qa_outputs", "classifier", "cls")]
    for head in heads[-1:]:
        ck.replace_tensor(tmp_path / "out", head, lambda tensor: tensor * 1.5 + 0.5)
        assert [c.name for c in mlp_fusion.verify(tmp_path / "out").checks if not c.passed] == ["outputs"]


def test_a_head_that_cannot_run_is_met_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path / "source", "BertForQuestionAnswering")

    def wants_more(*_: Any, **__: Any) -> None:
        raise ValueError("boxes are\nneeded")

    monkeypatch.setattr(transformers.BertForQuestionAnswering, "forward", wants_more)
    monkeypatch.setattr(compress_module, "fuse", None)
    with pytest.raises(InputError, match=r"cannot run on token ids alone \(ValueError: boxes are needed\)"):
        mlp_fusion.compress(folder, tmp_path / "out", 16)
    assert not (tmp_path / "out").exists()


def test_embeddings_are_not_made_up(tmp_path: Path) -> None:
    folder = ck.drop_tensor(ck.save_tiny(tmp_path / "source"), "word_embeddings")
    with pytest.raises(InputError, match=r"bert.embeddings.word_embeddings.weight is missing: .*incomplete"):
        mlp_fusion.compress(folder, tmp_path / "out", 16)


def test_what_transformers_cannot_load_is_bad_input(tmp_path: Path) -> None:
    folder = ck.edit_config(ck.save_tiny(tmp_path / "source"), num_attention_heads=5)
    why = r"transformers builds no BertForSequence.* from this config: ValueError: .*multiple of"
    with pytest.raises(InputError, match=why):
        mlp_fusion.compress(folder, tmp_path / "out", 16)


@pytest.mark.parametrize("name", ["BertTokenizer", "PreTrainedModel", "LlamaForCausalLM", "Nobody", 3, None])
def test_architectures_that_are_no_class_of_the_family(name: Any, tmp_path: Path) -> None:
    folder = ck.edit_config(ck.save_tiny(tmp_path / "source"), architectures=[name])
    mlp_fusion.compress(folder, tmp_path / "out", 16)
    assert set(load_file(tmp_path / "out" / ck.REFERENCE)) == {"input_ids", "last_hidden_state"}
    assert mlp_fusion.verify(tmp_path / "out").passed


# --- return_dict, token ids ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_a_config_that_asks_for_tuples(family: str, tmp_path: Path) -> None:
    folder = ck.add_tokenizer(ck.save_tiny(tmp_path / "source", family), pad_token="<pad>", eos_token="</s>")
    ck.edit_config(folder, return_dict=False)
    text = tmp_path / "text.txt"
    text.write_text("the cat sat\na cat\nthe cat\n" * 3)
    options: dict[str, Any] = {"calibration": text, "sequential": True, "tune_steps": 2, "text": text}
    mlp_fusion.compress(folder, tmp_path / "out", 16, **options)
    assert mlp_fusion.verify(tmp_path / "out").passed
    mlp_fusion.finetune(
        tmp_path / "out", tmp_path / "tuned", TWO, TWO, task="classification", original=folder, **QUICK
    )  # fmt: skip
    model = transformers.AutoModel.from_pretrained(folder)
    compare_models(model, model, token_batch(), samples=1)


def test_a_language_model_that_asks_for_tuples_and_its_teacher(tmp_path: Path) -> None:
    folder = ck.save_tiny(tmp_path / "source", "gpt2", task="CausalLM")
    ck.edit_config(ck.add_tokenizer(folder, pad_token="<pad>", eos_token="</s>"), return_dict=False)
    mlp_fusion.finetune(folder, tmp_path / "out", TWO, task="lm", teacher=folder, **QUICK)


def test_token_ids_beyond_the_embedding(tmp_path: Path) -> None:
    folder = ck.add_tokenizer(ck.save_tiny(tmp_path / "source", vocab_size=5), pad_token="<pad>", eos_token="</s>")
    text = tmp_path / "text.txt"
    text.write_text("the cat sat\n")
    words = r"holds token \d, the model knows 0 to 4: tokenise it with the model's own tokenizer"
    for options in ({"text": text}, {"calibration": text}):
        with pytest.raises(InputError, match=words):
            mlp_fusion.compress(folder, tmp_path / "out", 16, **options)  # type: ignore[arg-type]
    model = tiny_model("bert", vocab_size=5)
    batch = {"input_ids": torch.tensor([[4, 7]])}
    for option in ("sample", "calibration"):
        with pytest.raises(InputError, match=words):
            mlp_fusion.fuse(model, 16, **{option: batch})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="holds token -1"):
        mlp_fusion.fuse(model, 16, sample={"input_ids": torch.tensor([[4, -1]])})


# --- dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stated", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_tensors_decide_and_not_the_config(stated: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = ck.save_tiny(tmp_path / "source", dtype=dtype)
    mlp_fusion.compress(folder, tmp_path / "expected", 16)
    ck.edit_config(folder, dtype=stated)
    mlp_fusion.compress(folder, tmp_path / "out", 16)
    found, expected = ck.tensors(tmp_path / "out"), ck.tensors(tmp_path / "expected")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    assert mlp_fusion.verify(tmp_path / "out").passed


def test_each_tensor_keeps_its_own_dtype(tmp_path: Path) -> None:
    folder = ck.save_tiny(tmp_path / "source")

    def kind(name: str) -> torch.dtype:
        return torch.bfloat16 if "intermediate" in name or "attention" in name else torch.float32

    ck.edit_tensors(folder, lambda state: {name: tensor.to(kind(name)) for name, tensor in state.items()})
    report = mlp_fusion.compress(folder, tmp_path / "out", 16)
    after = ck.tensors(tmp_path / "out")
    assert all(tensor.dtype == kind(name) for name, tensor in after.items())
    assert report.bytes_after == sum(tensor.nbytes for tensor in after.values())
    assert mlp_fusion.verify(tmp_path / "out").passed
    ck.replace_tensor(tmp_path / "out", "bert.encoder.layer.1.output.dense.weight", lambda weight: weight * 1.5)
    assert not mlp_fusion.verify(tmp_path / "out").passed


def test_vectors_alone_make_no_model_wider(tmp_path: Path) -> None:
    folder = ck.save_tiny(tmp_path / "source", dtype=torch.bfloat16)
    buffer = {"bert.encoder.layer.0.inv_freq": torch.ones(3)}
    ck.edit_tensors(folder, lambda state: {**state, **buffer})
    seen: list[torch.dtype] = []
    compute = compress_module.compute_dtype
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compress_module, "compute_dtype", lambda *a: seen.append(compute(*a)) or seen[-1])
        mlp_fusion.compress(folder, tmp_path / "out", 16)
    assert seen == [torch.bfloat16]


def test_fp8_beside_the_ffns(tmp_path: Path) -> None:
    folder = ck.save_tiny(tmp_path / "source")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    ck.replace_tensor(folder, name, lambda weight: weight.to(torch.float8_e4m3fn))
    assert mlp_fusion.plan(folder, 16).parameters_before == sum(t.numel() for t in ck.tensors(folder).values())
    mlp_fusion.compress(folder, tmp_path / "out", 16)
    assert ck.tensors(tmp_path / "out")[name].dtype == torch.float8_e4m3fn
    assert mlp_fusion.verify(tmp_path / "out").passed
    ck.replace_tensor(tmp_path / "out", name, lambda weight: torch.full_like(weight.float(), float("nan")).to(weight))
    assert not _check_finite(tmp_path / "out").passed


def test_a_wider_dtype_to_run_in(tmp_path: Path) -> None:
    folder = ck.save_tiny(tmp_path / "source", dtype=torch.float16)
    report = mlp_fusion.compress(folder, tmp_path / "out", 16, dtype="float32")
    assert {tensor.dtype for tensor in ck.tensors(tmp_path / "out").values()} == {torch.float16}
    assert report.bytes_after == sum(tensor.nbytes for tensor in ck.tensors(tmp_path / "out").values())
    assert mlp_fusion.verify(tmp_path / "out").passed
    for dtype, words in (
        ("bfloat16", "dtype bfloat16 would round the checkpoint's weights: use float16 or a wider one"),
        ("int8", "dtype 'int8': use auto, bfloat16, float16, float32, float64"),
    ):
        with pytest.raises(InputError, match=words):
            mlp_fusion.compress(folder, tmp_path / "other", 16, dtype=dtype)


# --- overflow --------------------------------------------------------------------------------------------------------


def overflowing(folder: Path, *names: str, by: float) -> Path:
    """A float16 GPT-2 with some weights scaled so far that sums leave the dtype."""
    ck.save_tiny(folder, "gpt2", task="CausalLM", dtype=torch.float16, tie_word_embeddings=False)

    def change(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: t * by if n.endswith(names) else t for n, t in state.items()}

    return ck.edit_tensors(folder, change)


@pytest.mark.parametrize(
    ("names", "by"), [(("lm_head.weight",), 1e5), (("h.1.mlp.c_fc.weight", "h.1.mlp.c_proj.weight"), 3e3)]
)
def test_overflow_is_said_before_the_work_and_float32_helps(
    names: tuple[str, ...], by: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = overflowing(tmp_path / "source", *names, by=by)
    with monkeypatch.context() as patch:
        patch.setattr(compress_module, "fuse", None)
        with pytest.raises(InputError, match="the model's logits hold NaN or Inf in float16: run it in float32"):
            mlp_fusion.compress(folder, tmp_path / "out", 16)
    mlp_fusion.compress(folder, tmp_path / "out", 64 // 2, dtype="float32")
    reference = load_file(tmp_path / "out" / ck.REFERENCE)
    assert bool(reference["logits"].isfinite().all())
    assert mlp_fusion.verify(tmp_path / "out").passed


def test_overflow_in_memory_is_not_blamed_on_the_architecture() -> None:
    model: Any = tiny_model("gpt2", dtype=torch.float16)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight.mul_(100_000.0)
    for options in ({}, {"calibration": [token_batch()]}, {"calibration": [token_batch()], "sequential": True}):
        with pytest.raises(InputError, match=r"inputs or outputs hold NaN or Inf in float16: run it in float32"):
            mlp_fusion.fuse(model, 16, **options)  # type: ignore[arg-type]


def test_a_reference_that_is_no_number_fails(tmp_path: Path) -> None:
    mlp_fusion.compress(ck.save_tiny(tmp_path / "source"), tmp_path / "out", 16)
    name = "classifier.weight"
    ck.replace_tensor(tmp_path / "out", name, lambda weight: weight.fill_(float("nan")))
    failed = {check.name for check in mlp_fusion.verify(tmp_path / "out").checks if not check.passed}
    assert failed == {"finite", "outputs"}
    assert json.loads((tmp_path / "out" / "mlp_fusion" / "report.json").read_text())["settings"]["method"] == "fusion"


def test_a_batch_without_tokens_is_passed_over() -> None:
    empty = {"input_ids": torch.zeros(1, 0, dtype=torch.long)}
    report = mlp_fusion.fuse(tiny_model("bert"), 16, sample=[token_batch(), empty])
    assert report.sample_rows == int(token_batch()["attention_mask"].sum())
    with pytest.raises(InputError, match="sample needs at least one batch"):
        mlp_fusion.fuse(tiny_model("bert"), 16, sample=empty)


def test_tuning_meets_token_ids_as_well() -> None:
    from mlp_fusion.store.record import architecture_of

    model = tiny_model("bert")
    architecture = architecture_of(model.config)
    with pytest.raises(InputError, match="the calibration text holds token 99, the model knows 0 to 96"):
        output_sensitivities(
            model, architecture, architecture.sites(model), [{"input_ids": torch.tensor([[99, 1]])}], seed=0
        )
