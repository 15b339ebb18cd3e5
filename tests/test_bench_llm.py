"""The benchmark of the language model: its rows, its blocks of text, its widths by layer, and what it writes down."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

import checkpoints as ck
import mlp_fusion
from families import tiny_model
from mlp_fusion.choices import AUTOMATIC, KEEP_WIDTH, METHODS

pytestmark = pytest.mark.usefixtures("importable")


@pytest.fixture(scope="module")
def llm(importable: None) -> ModuleType:
    return importlib.import_module("llm")


@pytest.fixture(scope="module")
def rows(importable: None) -> ModuleType:
    return importlib.import_module("llm_rows")


@pytest.fixture(scope="module")
def texts(importable: None) -> ModuleType:
    return importlib.import_module("llm_text")


def test_rows_have_names_of_their_own_and_methods_that_exist(rows: ModuleType) -> None:
    every = rows.all_rows(2)
    assert len({row.name for row in every}) == len(every)
    methods = {row.recipe.method for row in every if row.recipe is not None}
    assert methods <= {AUTOMATIC, *METHODS}
    assert {"obs", "osscar", "fasp", "wanda", "twossp", "magnitude", "random", "published", "slice"} <= methods
    assert [row.name for row in every if row.recipe is None] == ["full"]
    assert "0.5 prune refit sequential seed 1" in {row.name for row in every}
    # The width of a method without a narrower form, and a bias that the model has not, are for one run alone.
    alone = [r for r in every if r.recipe is not None and (r.recipe.bias or r.recipe.method in KEEP_WIDTH)]
    assert alone
    assert not any(row.sequential or (row.refit and row.recipe.bias) for row in alone)


def test_only_rows_that_match_and_are_not_done_are_run(llm: ModuleType, rows: ModuleType) -> None:
    every = rows.all_rows(1)
    found = llm.missing(every, "0.5 wanda*", [{"name": "0.5 wanda refit seed 0"}])
    assert [row.name for row in found] == ["0.5 wanda seed 0", "0.5 wanda refit sequential seed 0"]
    assert len(llm.missing(every, "*", [])) == len(every)


def test_what_is_written_is_whole_and_read_again(llm: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "results" / "llm.json"
    written: list[dict[str, Any]] = []
    for seed, perplexity in enumerate((5.0, 3.0, 4.0)):
        row = {"name": f"a {seed}", "form": "a", "perplexity": {"plays": perplexity}}
        row |= {"seconds": {"wall": 1.0, "processor": 2.0}, "peak_bytes": 2**20 * (seed + 1)}
        written.append(row)
        llm.record(file, [*llm.recorded(file), row], "model", final=True)
        assert llm.recorded(file) == written
    assert [path.name for path in file.parent.iterdir()] == ["llm.json"]
    assert json.loads(file.read_text(encoding="utf-8"))["held_out"] == "final"
    line = llm.table(llm.recorded(file))[1]
    assert "4.00 (3.00-5.00)" in line
    assert line.split()[-4:] == ["1.0", "2.0", "3", "3"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Texts whose every word says where it comes from."""

    def words(name: str, count: int) -> list[str]:
        return [f"{name}{n}" for n in range(count)]

    (tmp_path / "tiny_shakespeare.txt").write_text(" ".join(words("play", 160_000)), encoding="utf-8")
    for part in ("train", "dev"):
        lines = [f"{word}\t{n % 2}" for n, word in enumerate(words(part, 20_000))]
        (tmp_path / f"sst2_{part}.tsv").write_text("\n".join(lines), encoding="utf-8")
    facts = [{str(n): {"lexicalisations": [{"lex": word}]}} for n, word in enumerate(words("fact", 40_000))]
    (tmp_path / "webnlg_dev.json").write_text(json.dumps({"entries": facts}), encoding="utf-8")
    (tmp_path / "e2e_test.txt").write_text("\n".join(f"name||{w}" for w in words("food", 20_000)), encoding="utf-8")
    return tmp_path


def test_no_block_is_both_learnt_from_and_measured_on(texts: ModuleType, folder: Path) -> None:
    vocabulary: dict[str, int] = {}

    def tokenize(text: str) -> list[int]:
        return [vocabulary.setdefault(word, len(vocabulary)) for word in text.split()]

    learnt = [texts.calibration_batches(tokenize, folder, seed) for seed in (0, 0, 1)]
    assert sum(len(batch["input_ids"]) for batch in learnt[0]) == 32
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(learnt[0], learnt[1], strict=True))
    assert not all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(learnt[0], learnt[2], strict=True))
    parts = [texts.held_out_blocks(tokenize, folder, final=final) for final in (False, True)]
    assert {kind: len(own) for kind, own in parts[0].items()} == {"shakespeare": 8, "sst2": 4, "webnlg": 8}
    assert {kind: len(own) for kind, own in parts[1].items()} == dict.fromkeys(
        ("shakespeare", "sst2", "webnlg", "e2e"), 16
    )
    seen = [set(torch.cat([batch["input_ids"].flatten() for batch in run]).tolist()) for run in (learnt[0], learnt[2])]
    held = [set(torch.cat([own.flatten() for own in part.values()]).tolist()) for part in parts]
    assert not held[0] & held[1]
    measured = held[0] | held[1]
    assert not (seen[0] | seen[1]) & measured
    assert not any(word.startswith("train") for word, n in vocabulary.items() if n in measured)


def test_too_little_text_is_said(texts: ModuleType, folder: Path) -> None:
    (folder / "e2e_test.txt").write_text("name||word\n", encoding="utf-8")
    with pytest.raises(ValueError, match="e2e has 0 blocks of 512 tokens, 16 are wanted"):
        texts.held_out_blocks(lambda text: list(range(len(text.split()))), folder, final=True)


def test_widths_by_layer_share_one_threshold_of_standardised_scores(rows: ModuleType) -> None:
    scores = torch.rand(5, 64, generator=torch.Generator().manual_seed(0)).double() ** torch.tensor(
        [[1], [2], [4], [8], [16]]
    )
    for share in (0.75, 0.5, 0.3):
        standard = [[float((x - own.mean()) / own.std()) for x in own] for own in scores]
        threshold = sorted((x for own in standard for x in own), reverse=True)[int(share * 320) - 1]
        exact = [sum(x >= threshold for x in own) for own in standard]
        assert rows.standardised_widths(scores, share, multiple=1) == exact
        assert sum(exact) == int(share * 320)
        rounded = rows.standardised_widths(scores, share)
        assert all(width % 8 == 0 and abs(width - n) <= 8 for width, n in zip(rounded, exact, strict=True))
        assert int(share * 320) - 8 < sum(rounded) <= int(share * 320)
        # Units of a layer have no part in it.
        assert rows.standardised_widths(scores * torch.tensor([[1e6], [1], [1], [1], [1e-6]]), share) == rounded


def test_no_layer_is_left_without_neurons(rows: ModuleType) -> None:
    scores = torch.zeros(3, 32).double()
    scores[0, 0] = 1.0  # one neuron far above all others of its layer: those are far below the mean
    scores[1:] = torch.linspace(0.0, 1.0, 32).double()
    widths = rows.standardised_widths(scores, 0.25)
    assert min(widths) == 8
    assert sum(widths) <= 24


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint of a few words."""
    folder = ck.save_tiny(tmp_path / "source", "llama", task="CausalLM", vocab_size=8)
    ck.add_tokenizer(folder, pad_token="<pad>")
    return folder


def test_a_row_from_disk_to_disk_ends_in_the_model_that_was_written(
    rows: ModuleType, source: Path, tmp_path: Path
) -> None:
    model = LlamaForCausalLM.from_pretrained(source)
    ids = torch.randint(4, 8, (4, 40), generator=torch.Generator().manual_seed(0))
    row = rows.Row("fusion streamed", rows.RECIPES["fusion streamed"], 0.5, refit=True)
    before = model(ids).logits.detach()
    neurons = model.config.intermediate_size // 2
    assert set(rows.shrink(model, row, [{"input_ids": ids[:2]}, {"input_ids": ids[2:]}])) == {neurons}
    assert model.model.layers[0].mlp.up_proj.out_features == neurons
    assert not torch.equal(model(ids).logits, before)
    text = tmp_path / "text.jsonl"
    tokenizer = AutoTokenizer.from_pretrained(source)
    text.write_text("".join(json.dumps({"text": tokenizer.decode(block)}) + "\n" for block in ids), encoding="utf-8")
    options: dict[str, Any] = {"method": "fusion", "refit": True, "optimizer": None, "stream": True}
    mlp_fusion.compress(source, tmp_path / "out", neurons, calibration=text, **options)
    torch.testing.assert_close(model(ids).logits, LlamaForCausalLM.from_pretrained(tmp_path / "out")(ids).logits)


def test_widths_of_a_row_from_disk_to_disk_stay_within_the_budget(rows: ModuleType, source: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(source)
    ids = torch.randint(4, 8, (8, 40), generator=torch.Generator().manual_seed(0))
    row = rows.Row("by layer", rows.RECIPES["auto by layer streamed"], 0.5, refit=True, sequential=True)
    widths = rows.shrink(model, row, [{"input_ids": ids}])
    found = [layer.mlp.up_proj.out_features for layer in model.model.layers]
    assert widths == found
    assert sum(found) <= len(found) * model.config.intermediate_size // 2


@pytest.mark.parametrize("label", ["auto without text", "auto synthetic", "prune synthetic", "2ssp synthetic"])
def test_rows_without_text_never_look_at_the_blocks(label: str, rows: ModuleType) -> None:
    class Unseen(list[Any]):
        def __iter__(self) -> Any:
            raise AssertionError("the blocks were looked at")

    model: Any = tiny_model("llama", task="CausalLM")
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    refit = "synthetic" in label
    row = rows.Row(label, rows.RECIPES[label], 0.5, refit=refit, sequential=refit)
    assert rows.shrink(model, row, Unseen()) == [32] * 3
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before[:32])
