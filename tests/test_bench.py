"""The benchmarks' house: where they import from, what they keep, and that the index names every result."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, SwitchTransformersConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

from mlp_fusion.tuning import FinetuneSettings

BENCH = Path(__file__).parents[1] / "bench"
pytestmark = pytest.mark.usefixtures("importable")
SCRIPTS = sorted(BENCH.glob("*.py"))


@pytest.fixture(scope="module")
def finetune(importable: None) -> ModuleType:
    return importlib.import_module("finetune")


@pytest.fixture(scope="module")
def moe(importable: None) -> ModuleType:
    return importlib.import_module("moe_experts")


class OneBlock(nn.Module):
    """A block of four experts, of which no token reaches the last one: every token has a 1 in front."""

    def __init__(self, shape: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        if shape == "mixtral":
            self.config: Any = MixtralConfig(
                hidden_size=6, intermediate_size=8, num_local_experts=4, num_experts_per_tok=2,
                experts_implementation="eager",
            )  # fmt: skip
            self.block: Any = MixtralSparseMoeBlock(self.config)
            router = self.block.gate
        else:
            self.config = SwitchTransformersConfig(d_model=6, d_ff=8, num_experts=4, dropout_rate=0.0)
            self.block = SwitchTransformersSparseMLP(self.config)
            router = self.block.router.classifier
        with torch.no_grad():
            for parameter in self.block.parameters():
                parameter.normal_()
            router.weight[:, 0] = torch.tensor([0.0, 0.0, 0.0, -1000.0])
        self.eval()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.block(hidden)

    @staticmethod
    def tokens() -> Tensor:
        hidden = torch.randn(2, 20, 6, generator=torch.Generator().manual_seed(1))
        hidden[..., 0] = 1
        return hidden

    def parts(self, moe: ModuleType) -> tuple[Tensor, Tensor, Tensor]:
        """Every expert's outputs `[N, E, D]`, and who reaches whom and with what weight, `[N, E]`."""
        seen: list[Any] = []
        handle = self.block.experts.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
        self(self.tokens())
        handle.remove()
        experts, hidden = self.block.experts, self.tokens().view(-1, 6)
        outputs = torch.stack([moe.expert_output(experts, index, hidden) for index in range(4)], dim=1)
        return outputs, *moe.routing(experts, *seen[0])


def report(final: float) -> dict[str, Any]:
    """What `finetune` reports of a run, in plain JSON types."""
    return {
        "method": "fusion", "parameterization": "scaled", "settings": FinetuneSettings(task="lm").recorded(),
        "examples": 9, "metric": "accuracy", "initial": {"accuracy": 0.5}, "final": {"accuracy": final},
        "evaluations": [{"epoch": 1.0, "accuracy": final}], "seconds": 1.0, "model": "/a/folder",
        "train": [{"step": n, "loss": 1.0} for n in range(50)],
        "distillation": {"layerwise": {"steps": 50, "loss": [[n, 1.0] for n in range(50)]}},
    }  # fmt: skip


def test_benchmarks_import_nothing_from_the_examples_and_name_the_helpers_once() -> None:
    texts = {script.name: script.read_text(encoding="utf-8") for script in SCRIPTS}
    assert len(texts) > 10
    assert [name for name, text in texts.items() if re.search(r"from demo|import demo|/ .examples.", text)] == []
    assert [name for name, text in texts.items() if "sys.path" in text] == ["support.py"]


def test_every_result_stands_in_the_index_and_the_index_names_no_other() -> None:
    index = (BENCH / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `([\w.-]+\.json)` \|", index, flags=re.MULTILINE)
    assert sorted(named) == sorted(file.name for file in (BENCH / "results").iterdir() if file.suffix == ".json")
    assert [place for place in (BENCH / "results").iterdir() if place.is_dir()] == []
    for script in re.findall(r"bench/(\w+\.py)", index):
        assert (BENCH / script).is_file(), script


def test_a_run_takes_the_place_of_the_same_run_and_of_no_other(finetune: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "results" / "finetune-cpu.json"
    for mode, seed, final in (("fusion", 1, 0.6), ("fusion", 0, 0.7), ("full", 0, 0.8), ("fusion", 1, 0.9)):
        described = {"task": "sst2", "mode": mode, "seed": seed, "width": 0.25, "parameters": 5, "reduction": {}}
        finetune.record(file, finetune.summarised(described, report(final)))
    runs = finetune.recorded(file)
    assert [(r["mode"], r["seed"], r["final"]["accuracy"]) for r in runs] == [
        ("full", 0, 0.8), ("fusion", 0, 0.7), ("fusion", 1, 0.9),
    ]  # fmt: skip
    assert runs[0]["layerwise"]
    assert not runs[0]["logits"]
    assert "model" not in runs[0]
    assert max(len(value) for value in runs[0].values() if isinstance(value, list)) == 1


def test_the_kept_runs_are_as_a_new_run_would_write_them(finetune: ModuleType) -> None:
    file = BENCH / "results" / "finetune-cpu.json"
    runs = finetune.recorded(file)
    described = {"task", "mode", "seed", "width", "parameters", "reduction"}
    expected = set(finetune.summarised(dict.fromkeys(described), report(0.5)))
    assert {frozenset(run) for run in runs} == {frozenset(expected)}
    assert len(file.read_text(encoding="utf-8").splitlines()) == len(runs) + 2
    assert json.loads(file.read_text(encoding="utf-8")).keys() == {"runs"}


@pytest.mark.parametrize("shape", ["mixtral", "switch"])
@torch.no_grad()
def test_experts_are_scored_by_what_they_do_with_their_tokens(moe: ModuleType, shape: str) -> None:
    model = OneBlock(shape)
    outputs, mask, weights = model.parts(moe)
    torch.testing.assert_close((weights.unsqueeze(2) * outputs).sum(1), model(model.tokens()).view(-1, 6))
    halves = [{"hidden": half} for half in model.tokens().split(1)]
    (known,) = moe.expert_statistics(model, halves)
    assert known.tokens.tolist() == mask.sum(0).tolist()
    assert known.tokens[3] == known.saliency[3] == known.redundancy[3] == 0
    for index in range(3):
        mine = outputs[mask[:, index], index]
        weighed = (weights[mask[:, index], index] * mine.norm(dim=1)).mean()
        torch.testing.assert_close(known.saliency[index].float(), weighed)
        torch.testing.assert_close(known.mean[index].float(), mine.mean(0))
        torch.testing.assert_close(known.deviation[index].float(), mine.var(0).sum().sqrt())
        used = mask[:, index].sum() / mask.sum()
        torch.testing.assert_close(known.redundancy[index].float(), used * mine.var(0).sum().sqrt())


@pytest.mark.parametrize("shape", ["mixtral", "switch"])
@torch.no_grad()
def test_an_expert_that_no_token_reaches_is_dropped_first_and_changes_nothing(moe: ModuleType, shape: str) -> None:
    for dropped_as in ("reap", "mone"):
        model = OneBlock(shape)
        before = model(model.tokens())
        known = moe.expert_statistics(model, [{"hidden": model.tokens()}])
        scores = known[0].saliency if dropped_as == "reap" else known[0].redundancy
        kept = moe.highest(scores, 3)
        assert kept == [0, 1, 2]
        if dropped_as == "reap":
            moe.drop_experts(model, [kept])
            assert model.config.num_experts == 3 if shape == "switch" else model.config.num_local_experts == 3
        else:
            moe.constant_experts(model, [kept], known)
        torch.testing.assert_close(model(model.tokens()), before)


@pytest.mark.parametrize("shape", ["mixtral", "switch"])
@torch.no_grad()
def test_a_constant_expert_answers_with_its_mean_and_its_weight(moe: ModuleType, shape: str) -> None:
    model = OneBlock(shape)
    outputs, mask, weights = model.parts(moe)
    known = moe.expert_statistics(model, [{"hidden": model.tokens()}])
    moe.constant_experts(model, [[0, 2]], known)
    outputs[:, 1] = outputs[mask[:, 1], 1].mean(0)
    assert mask[:, 1].any()
    torch.testing.assert_close(model(model.tokens()).view(-1, 6), (weights.unsqueeze(2) * outputs).sum(1))


@torch.no_grad()
def test_dropped_experts_leave_their_tokens_to_the_others(moe: ModuleType) -> None:
    model = OneBlock("mixtral")
    outputs, _, _ = model.parts(moe)
    logits = model.tokens().view(-1, 6) @ model.block.gate.weight.T
    moe.drop_experts(model, [[1]])
    assert model.block.gate.top_k == model.config.num_experts_per_tok == 1
    torch.testing.assert_close(model(model.tokens()).view(-1, 6), outputs[:, 1])
    model = OneBlock("mixtral")
    moe.drop_experts(model, [[0, 2]])
    expected = (logits[:, [0, 2]].softmax(1).unsqueeze(2) * outputs[:, [0, 2]]).sum(1)
    torch.testing.assert_close(model(model.tokens()).view(-1, 6), expected)


def test_the_kept_medians_are_those_of_the_kept_runs(importable: None) -> None:
    quality = importlib.import_module("moe_quality")
    found = json.loads((BENCH / "results" / "moe-quality-cpu.json").read_text(encoding="utf-8"))
    assert found["medians"] == quality.medians(found["runs"])
    first = {"whole": {"perplexity": 10.0, "parameters": 4}, "shape": "mixtral", "seed": 0, "rows": [
        {"method": "reap", "share": 0.5, "perplexity": 12.0, "parameters": 2, "tuned": 11.0}]}  # fmt: skip
    second = {"whole": {"perplexity": 20.0, "parameters": 4}, "shape": "mixtral", "seed": 1, "rows": [
        {"method": "reap", "share": 0.5, "perplexity": 28.0, "parameters": 2}]}  # fmt: skip
    whole, reap = quality.medians([first, second])
    assert (whole["method"], whole["perplexity"], whole["ratio"]) == ("whole", 15.0, 1.0)
    assert (reap["perplexity"], reap["seeds"], reap["tuned_seeds"]) == (20.0, 2, 1)
    assert reap["tuned_ratio"] == pytest.approx(1.1)
    assert reap["ratio"] == pytest.approx(1.3)
    assert reap["ratio_range"] == pytest.approx([1.2, 1.4])


def test_the_page_says_what_the_default_does_to_experts() -> None:
    found = json.loads((BENCH / "results" / "moe-quality-cpu.json").read_text(encoding="utf-8"))
    added: dict[float, list[float]] = {0.5: [], 0.25: []}
    for run in found["runs"]:
        rows, whole = {(row["share"], row["method"]): row for row in run["rows"]}, run["whole"]["perplexity"]
        # The default on other text is no other way.
        others = {place: row for place, row in rows.items() if place[1] not in ("auto", "synthetic")}
        best = {s: min(row["perplexity"] for (at, _), row in others.items() if at == s) for s in added}
        if run["shape"] == "switch":
            assert all(rows[share, "auto"]["perplexity"] < 1.006 * least for share, least in best.items())
        if run["shape"] not in ("mixtral", "qwen3"):
            continue
        for share, ratios in added.items():
            ratios.append((rows[share, "auto"]["perplexity"] - whole) / (best[share] - whole))
        least = min(row["perplexity"] for (share, _), row in rows.items() if share == 0.75)
        assert rows[0.75, "auto"]["perplexity"] < 1.01 * least
        tuned = {name: row["tuned"] for (_, name), row in rows.items() if "tuned" in row}
        assert not tuned or min(tuned, key=tuned.__getitem__) == "auto"
    assert all(len(ratios) == 6 for ratios in added.values())
    assert all(0.25 < ratio < 0.85 for ratio in added[0.5])
    assert all(0.35 < ratio < 0.65 for ratio in added[0.25])


def test_the_page_says_what_text_of_its_own_is_worth_to_experts() -> None:
    found = json.loads((BENCH / "results" / "moe-quality-cpu.json").read_text(encoding="utf-8"))
    losses: dict[str, list[float]] = {}
    for run in found["runs"]:
        rows, whole = {(row["share"], row["method"]): row for row in run["rows"]}, run["whole"]["perplexity"]
        if (0.5, "synthetic") in rows:
            own, given = (rows[0.5, method]["perplexity"] / whole - 1 for method in ("synthetic", "auto"))
            losses[run["shape"]] = [round(100 * own, 1), round(100 * given, 1)]
            assert rows[0.25, "synthetic"]["perplexity"] < rows[0.25, "auto"]["perplexity"]
    assert losses == {"mixtral": [1.2, 2.4], "qwen3": [1.9, 2.0]}
    page = " ".join((BENCH.parent / "docs" / "results" / "moe.md").read_text(encoding="utf-8").split())
    assert "the default loses 1.2 % with the one and 2.4 % with the other; of Qwen3-MoE's shape 1.9 % and 2.0 %" in page


def test_chains_are_measured_beside_a_plain_layer(importable: None, monkeypatch: pytest.MonkeyPatch) -> None:
    mpo = importlib.import_module("mpo")
    monkeypatch.setattr(mpo, "TOKENS", 5)
    monkeypatch.setattr(mpo, "CUT", 2)
    weight, shapes = torch.randn(8, 12, generator=torch.Generator().manual_seed(0)), ((2, 2, 2), (3, 2, 2))
    found = mpo.decompositions(weight, shapes, repeats=1, peer=False)
    assert found["error"] < 1e-6 < found["cut_error"] <= found["cut_bound"]
    assert found["seconds"] > 0.0
    assert set(mpo.steps(weight, shapes, repeats=1, peer=False)) == {"plain", "chain"}
