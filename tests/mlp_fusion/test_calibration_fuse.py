"""`fuse` and `compress` with calibration text: end to end on tiny models, every family."""

from __future__ import annotations

import copy
import itertools
import os
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_configs import TINY
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

import checkpoints as ck
from families import FAMILIES, WIDTH, tiny_model, token_batch
from mlp_fusion import FusionReport, InputError, fuse, restore
from mlp_fusion.calibration import FFNStatistics, collect
from mlp_fusion.calibration.text import calibration_batches
from mlp_fusion.families.exchange import install, narrow
from mlp_fusion.measure import relative_error
from mlp_fusion.methods import get_method
from mlp_fusion.neurons import NeuronBundle
from mlp_fusion.reducing import every, layers, pipeline, sequential
from mlp_fusion.reducing.curves import hidden_state_changes
from mlp_fusion.reducing.layers import layers_of
from mlp_fusion.reducing.pipeline import Recipe, reduce_ffns
from mlp_fusion.reducing.sequential import reduce_sequentially
from mlp_fusion.running.taps import capture_activations
from mlp_fusion.store.record import architecture_of

pytestmark = pytest.mark.slow

TEXT = [token_batch(seed=n, batch=6, length=12) for n in range(8)]
HELD_OUT = [token_batch(seed=100 + n, batch=6, length=12) for n in range(4)]


def _hidden(model: nn.Module) -> Tensor:
    base: Any = model
    with torch.no_grad():
        states = [base.base_model(**batch).last_hidden_state for batch in HELD_OUT]
    return torch.cat(states)[torch.cat([b["attention_mask"].bool() for b in HELD_OUT])]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_calibration_improves_held_out_outputs(family: str) -> None:
    """Better on text that was not seen, layer by layer and at the end, by the parts together and by the refit alone."""
    original = tiny_model(family)
    exact = _hidden(original)
    errors, at_end = {}, {}
    for name, options in {
        "without": {},
        "unfitted": {"calibration": TEXT, "refit": False},
        "refitted": {"calibration": TEXT},
    }.items():
        model = copy.deepcopy(original)
        report = fuse(model, 24, sample=HELD_OUT, seed=1, **options)
        errors[name] = sum(row.output_error for row in report.rows)
        at_end[name] = relative_error(_hidden(model), exact)
        assert all((row.ridge is not None) == (name == "refitted") for row in report.rows)
        assert (report.calibration is None) == (name == "without")
        assert FusionReport.from_dict(report.to_dict()) == report
    assert errors["refitted"] < min(errors["without"], errors["unfitted"])
    assert at_end["refitted"] < at_end["without"]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", None])
def test_the_model_computes_the_corrected_bundles(optimizer: str | None) -> None:
    model = tiny_model("llama", dtype=torch.float64)
    original = copy.deepcopy(model)
    match = None if optimizer is None else "auto"
    report = fuse(
        model, 16, layers=[0, 2], method="fusion", optimizer=optimizer, seed=2, calibration=TEXT, sample=HELD_OUT,
        match=match,
    )  # fmt: skip
    architecture = architecture_of(model.config)
    sites = [architecture.sites(original)[n] for n in (0, 2)]
    bundles = [architecture.read(site) for site in sites]
    statistics = collect(original, architecture, sites, TEXT, seed=2)
    form: Any = report.parameterization
    recipe = Recipe(get_method("fusion"), 2, form, refit=True, match={"scaled": "sign", "split": "gd"}.get(form))  # type: ignore[arg-type]
    expected = reduce_ffns(recipe, bundles, [16, 16], statistics)
    rows = capture_activations(model, architecture, architecture.sites(model), TEXT, rows=200, seed=0)
    for position, layer in enumerate((0, 2)):
        bundle = expected[position].reduction.bundle
        torch.testing.assert_close(bundle.forward(rows[layer].x)[0], rows[layer].y)
        fused = architecture.fused(architecture.sites(model)[layer])
        assert fused is not None
        if optimizer is not None:
            assert bundle.scale is not None
            torch.testing.assert_close(fused.scale, bundle.scale[0])
            assert report.rows[position].largest_scale == float(bundle.scale.max())
    assert report.calibration is not None
    assert report.settings.match == recipe.match
    assert "outputs refitted" in report.table()


@pytest.mark.parametrize(("optimizer", "kernel"), [("adamw", "sign"), ("sgd", "gd")])
def test_matching_lowers_the_reported_kernel_error_and_not_the_outputs(optimizer: str, kernel: str) -> None:
    reports = []
    for match in (None, "auto"):
        model = tiny_model("roberta")
        reports.append(fuse(model, 24, optimizer=optimizer, calibration=TEXT, sample=HELD_OUT, match=match))
    for plain, matched in zip(reports[0].rows, reports[1].rows, strict=True):
        assert matched.output_error == pytest.approx(plain.output_error, rel=1e-4)
    totals = [sum(row.ntk_error[kernel]["total"] for row in report.rows) for report in reports]
    assert totals[1] < totals[0]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_sequential_calibration_sees_what_the_reduced_ffns_before_produce(family: str) -> None:
    """The statistics of each layer are those of the model in which the layers before are already fused."""
    model = tiny_model(family, dtype=torch.float64)
    architecture = architecture_of(model.config)
    sites = architecture.sites(model)
    chosen = [sites[0], sites[2]]
    seen = []
    recipe = Recipe(get_method("fusion"), 0, "scaled", refit=True)

    def reduce(number: int, statistics: Any) -> Any:
        seen.append(statistics)
        bundle = architecture.read(chosen[number])
        return reduce_ffns(recipe, [bundle], [16], [statistics])[0]

    before = {k: v.clone() for k, v in model.state_dict().items()}
    reduced = reduce_sequentially(model, architecture, chosen, TEXT, reduce, seed=0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    together = collect(model, architecture, chosen, TEXT, seed=0)
    torch.testing.assert_close(seen[0].x, together[0].x)
    assert not torch.allclose(seen[1].x, together[1].x)
    install(chosen[0], reduced[0].reduction.bundle, "folded")
    after = collect(model, architecture, chosen, TEXT, seed=0)
    torch.testing.assert_close(seen[1].x, after[1].x)
    torch.testing.assert_close(seen[1].hidden_variance, after[1].hidden_variance)

    fused = tiny_model(family, dtype=torch.float64)
    report = fuse(fused, 16, layers=[0, 2], method="fusion", calibration=TEXT, sequential=True, sample=HELD_OUT)
    assert report.calibration is not None
    assert report.settings.sequential
    for site, ffn in zip((0, 2), reduced, strict=True):
        rows = capture_activations(fused, architecture, [architecture.sites(fused)[site]], HELD_OUT, rows=50, seed=0)
        torch.testing.assert_close(ffn.reduction.bundle.forward(rows[0].x)[0], rows[0].y)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_layers_run_once_less_where_what_they_put_out_is_kept(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same bits; kept are copies, as later modules may write to what a layer has put out."""

    def gathered(room: int) -> tuple[list[FFNStatistics], int]:
        monkeypatch.setattr(layers, "KEPT_BYTES", room)
        model = tiny_model(family)
        architecture = architecture_of(model.config)
        sites = architecture.sites(model)
        statistics: list[FFNStatistics] = []
        runs: list[int] = []

        def reduce(number: int, known: FFNStatistics) -> Any:
            statistics.append(known)
            recipe = Recipe(get_method("published"), 0, "folded")
            return reduce_ffns(recipe, [architecture.read(sites[number])], [8], None)[0]

        layers_of(model, sites)[2].module.register_forward_hook(lambda *_: runs.append(1))
        for norm in [model.model.norm] if family == "llama" else []:
            norm.register_forward_pre_hook(lambda _norm, args: args[0].mul_(2))
        reduce_sequentially(model, architecture, sites, TEXT, reduce, seed=0)
        return statistics, len(runs)

    (without, often), (kept, seldom) = gathered(0), gathered(2**30)
    for one, two in zip(without, kept, strict=True):
        assert torch.equal(one.x, two.x)
        assert torch.equal(one.y, two.y)
    assert (often, seldom) == (4 * len(TEXT), 3 * len(TEXT))


@pytest.mark.parametrize(("family", "chunk"), [*((family, 0) for family in sorted(FAMILIES)), ("bert", 4)])
def test_sequential_targets_lead_back_to_the_original_model(
    family: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An FFN that hits its targets, were they the whole way, undoes what those before it did to the layer's output."""
    monkeypatch.setattr(sequential, "_CORRECTED", 1.0)
    model = tiny_model(family, dtype=torch.float64)
    for layer in model.bert.encoder.layer if chunk else ():
        layer.chunk_size_feed_forward = chunk
    architecture = architecture_of(model.config)
    sites = architecture.sites(model)
    layer = layers_of(model, sites)[2].module
    assert sites[2].module in layer.modules()
    seen: dict[int, Any] = {}

    def reduce(number: int, statistics: Any) -> Any:
        seen[number] = statistics
        bundle = architecture.read(sites[[0, 2][number]])
        return reduce_ffns(Recipe(get_method("published"), 0, "scaled"), [bundle], [8], [statistics])[0]

    reduced = reduce_sequentially(model, architecture, [sites[0], sites[2]], TEXT, reduce, seed=0)

    def outputs() -> list[Tensor]:
        """Of layer 2, at the tokens of every batch."""
        found: list[Tensor] = []
        handle = layer.register_forward_hook(lambda _m, _a, y: found.append(y[0] if type(y) is tuple else y))
        base: Any = model.base_model
        with torch.no_grad():
            for batch in TEXT:
                base(**batch)
        handle.remove()
        return [y[b["attention_mask"].bool()] for y, b in zip(found, TEXT, strict=True)]

    if family == "gemma2":
        torch.testing.assert_close(seen[1].y, collect(model, architecture, sites, TEXT, seed=0)[2].y)
        return
    wanted = torch.cat(outputs())
    install(sites[0], reduced[0].reduction.bundle, "folded")
    bent = torch.cat(outputs())
    assert relative_error(bent, wanted) > 1e-3
    pieces = TEXT[0]["input_ids"].shape[1] // chunk if chunk else 1
    order = torch.cat([b["attention_mask"].bool().flatten() for b in TEXT])
    full = torch.zeros(len(order), seen[1].y.shape[1], dtype=torch.float64)
    full[order] = seen[1].y
    length = TEXT[0]["input_ids"].shape[1]
    targets = iter([p for f in full.reshape(len(TEXT), -1, length, full.shape[1]) for p in f.chunk(pieces, dim=1)])

    def hit(_module: nn.Module, _args: Any, y: Tensor) -> Tensor:
        return next(targets).reshape(y.shape)

    handle = architecture.projection(sites[2], "w_out").register_forward_hook(hit)
    found = torch.cat(outputs())
    handle.remove()
    torch.testing.assert_close(found, wanted)


def test_targets_make_up_for_two_thirds_of_what_was_bent() -> None:
    y, wanted, present = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.int64), "attention_mask": torch.ones(2, 3, dtype=torch.int64)}
    streams = {"wanted": [wanted.view(2, 3, 4)], "present": [present.view(2, 3, 4)]}
    beyond = sequential._beyond(y, streams, batch, "mlp")
    assert beyond is not None
    torch.testing.assert_close(beyond, 2.0 * (wanted - present) / 3.0)


def test_automatic_widths_keep_the_budget_and_favour_what_is_hard() -> None:
    model = tiny_model("bert")
    # Layer 1 holds 8 neurons eight times over: it needs no more.
    architecture = architecture_of(model.config)
    site = architecture.sites(model)[1]
    bundle = architecture.read(site)
    narrow(site, bundle.with_vectors(bundle.vectors()[:, :8].repeat(1, 8, 1), None))
    report = fuse(model, "auto", method="fusion", budget=0.5, calibration=TEXT, sample=HELD_OUT, seed=0)
    widths = [row.neurons_after for row in report.rows]
    assert widths[1] == 8
    assert widths[0] + widths[2] > 64
    assert sum(widths) <= 0.5 * 3 * WIDTH
    assert [site.neurons for site in architecture.sites(model)] == widths
    assert report.rows[1].output_error < 1e-3
    even = fuse(tiny_model("bert"), "auto", method="fusion", budget=0.5, calibration=TEXT, sample=HELD_OUT, layers=[0])
    assert even.rows[0].neurons_after == 32


def test_automatic_widths_of_experts_are_tried_and_one_for_a_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.MixtralConfig(**{**TINY["mixtral"], "vocab_size": 97})
    model: Any = transformers.MixtralForCausalLM(config).eval()
    asked: list[int] = []
    monkeypatch.setattr(every, "elimination_curve", lambda *_, **__: asked.append(1))
    report = fuse(model, "auto", budget=0.5, calibration=TEXT, sample=HELD_OUT, seed=0)
    assert not asked
    assert [row.path for row in report.rows] == [f"model.layers.{n}.mlp.experts" for n in range(2)]
    assert sum(row.neurons_after for row in report.rows) <= 0.5 * sum(row.neurons_before for row in report.rows)


def test_an_ffn_that_a_budget_leaves_whole_is_not_fused(tmp_path: Path) -> None:
    model = tiny_model("bert")
    report = fuse(model, "auto", method="fusion", budget=0.92, calibration=TEXT, sample=HELD_OUT, seed=0)
    whole = [row.layer for row in report.rows if row.neurons_after == WIDTH]
    assert whole
    assert model.config.mlp_fusion["fused_layers"] == sorted({0, 1, 2} - set(whole))
    architecture = architecture_of(model.config)
    fused = [architecture.fused(site) is not None for site in architecture.sites(model)]
    assert fused == [n not in whole for n in range(3)]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    restore(loaded, tmp_path)
    torch.testing.assert_close(_hidden(loaded), _hidden(model), rtol=1e-5, atol=1e-5)


def test_effects_are_those_of_a_model_with_one_ffn_replaced() -> None:
    model = tiny_model("gpt2", dtype=torch.float64)
    architecture = architecture_of(model.config)
    sites = architecture.sites(model)
    bundles = [get_method("published")(architecture.read(s), 8, seed=0).bundle for s in sites]
    found = hidden_state_changes(model, architecture, sites, HELD_OUT, bundles)
    exact = _hidden(model)
    for number, bundle in enumerate(bundles):
        changed = copy.deepcopy(model)
        install(architecture.sites(changed)[number], bundle, "folded")
        assert found[number] == pytest.approx(relative_error(_hidden(changed), exact) ** 2)
    torch.testing.assert_close(_hidden(model), exact, rtol=0, atol=0)


def test_same_seed_same_bits() -> None:
    for options in (
        {"match": "auto"},
        {"sequential": True},
        {"method": "select", "optimizer": "sgd", "match": "auto"},
        {"tune_steps": 3},
    ):
        states = []
        for _ in range(2):
            model = tiny_model("qwen3")
            fuse(model, 16, seed=5, calibration=iter(TEXT), **options)  # type: ignore[arg-type]
            states.append(model.state_dict())
        assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_the_model_runs_over_the_text_once() -> None:
    model = tiny_model("bert")
    runs: list[int] = []
    base: Any = model.base_model
    base.register_forward_pre_hook(lambda _m, _args: runs.append(1))
    fuse(model, 16, method="fusion", calibration=TEXT)
    assert len(runs) == len(TEXT)


@pytest.mark.parametrize("one_by_one", [False, True])
def test_as_many_rows_are_kept_as_are_asked_for(one_by_one: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default few, so that memory is bounded; beyond the default where the caller says so."""
    monkeypatch.setattr("mlp_fusion.calibration.statistics.CALIBRATION_ROWS", 50)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in TEXT)
    kept: list[int] = []
    whole = pipeline.refit

    def recorded(reduced: NeuronBundle, statistics: FFNStatistics) -> Any:
        kept.append(len(statistics.x))
        return whole(reduced, statistics)

    monkeypatch.setattr(pipeline, "refit", recorded)
    for rows, expected in ((None, 50), (120, 120), (10**9, tokens)):
        kept.clear()
        fuse(tiny_model("bert"), 16, method="fusion", calibration=TEXT, calibration_rows=rows, sequential=one_by_one)
        assert kept == [expected] * 3


def test_lists_are_read_to_their_end_and_streams_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlp_fusion.calibration.statistics.CALIBRATION_TOKENS", 100)
    batch = token_batch(batch=6, length=12)
    tokens = int(batch["attention_mask"].sum())
    for one_by_one in (False, True):
        reports = [
            fuse(tiny_model("bert"), 16, calibration=text, sequential=one_by_one)
            for text in ([batch] * 5, itertools.repeat(batch))
        ]
        found = [report.calibration.tokens for report in reports if report.calibration is not None]
        assert found == [5 * tokens, 2 * tokens]


def test_without_a_sample_errors_are_of_the_calibration_text_and_say_so() -> None:
    report = fuse(tiny_model("bert"), 16, calibration=TEXT)
    assert report.sample == "the calibration text, which was fitted to"
    assert fuse(tiny_model("bert"), 16, calibration=TEXT, sample=HELD_OUT).sample == "the given sample"


class _Dataset:
    """What of a `datasets.Dataset` is used."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self.column_names = rows, list(rows[0]) if rows else []

    def __iter__(self) -> Any:
        return iter(self.rows)


def test_calibration_from_datasets() -> None:
    model = tiny_model("bert")
    tokens = _Dataset([{"input_ids": [5, 6, 7 + n % 3], "attention_mask": [1, 1, 1], "label": 1} for n in range(600)])
    batches: Any = calibration_batches(tokens, model)
    assert len(batches) == 512
    assert batches[2]["input_ids"].tolist() == [[5, 6, 9]]
    assert len(calibration_batches(tokens, model, sentences=599)) == 599  # type: ignore[arg-type]
    assert set(batches[0]) == {"input_ids", "attention_mask"}
    fuse(model, 16, calibration=tokens)
    assert calibration_batches(TEXT, model) is TEXT
    for bad, message in (
        (_Dataset([{"label": 1}]), "columns label: it needs input_ids or one of text"),
        (_Dataset([{"text": "a b"}]), "not loaded from a folder with a tokenizer"),
        (_Dataset([]), "without rows"),
    ):
        with pytest.raises(InputError, match=message):
            calibration_batches(bad, model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refit": True}, "refit needs calibration text"),
        ({"match": "gd"}, "match needs calibration text: pass calibration \\(--calibration FILE\\)"),
        ({"sequential": True}, "sequential needs calibration text"),
        ({"width": "auto", "budget": 0.4}, "width auto needs calibration text"),
        ({"method": "select"}, "method select needs calibration text"),
        ({"calibration_rows": 9}, "calibration_rows needs calibration text"),
        ({"calibration_sentences": 9}, "calibration_sentences needs calibration text"),
        ({"calibration_rows": 0, "calibration": TEXT}, "calibration_rows 0: give an integer from 1 on"),
        ({"calibration_sentences": True, "calibration": TEXT}, "calibration_sentences True: give an integer"),
        ({"calibration_sentences": None, "calibration": TEXT}, "calibration_sentences None: give an integer"),
        ({"method": "svd"}, "method 'svd' keeps the width"),
        ({"match": "adam", "calibration": TEXT}, "match 'adam': use gd, sign, auto or none"),
        ({"match": "auto", "optimizer": None, "calibration": TEXT}, "match needs an optimizer"),
        ({"width": "auto", "calibration": TEXT}, "width auto and budget go together"),
        ({"budget": 0.3, "calibration": TEXT}, "width auto and budget go together"),
        ({"width": "0.5", "calibration": TEXT}, "width '0.5': give a number, a count"),
        ({"width": "auto", "budget": 1.5, "calibration": TEXT}, "strictly between 0 and 1"),
        ({"width": "auto", "budget": 0.05, "calibration": TEXT}, "budget is too small"),
        ({"calibration": []}, "calibration needs at least one batch"),
        ({"calibration": "no/such/file"}, "no/such/file: no such file"),
        ({"calibration": ""}, f"{re.escape(os.getcwd())} is a folder: name a file of texts"),
    ],
)
def test_refusals_leave_the_model_as_it_was(options: dict[str, Any], message: str) -> None:
    model = tiny_model("bert")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(InputError, match=message) as caught:
        fuse(model, **{"width": 16, **options})
    assert "\n" not in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_list_of_sentences_is_a_file_of_them(tmp_path: Path) -> None:
    ck.add_tokenizer(tmp_path, pad_token="<pad>", eos_token="</s>")
    model: Any = tiny_model("bert")
    model.name_or_path = str(tmp_path)
    sentences = ["the cat sat", "a cat"] * 300
    (tmp_path / "text.txt").write_text("\n".join(sentences), encoding="utf-8")
    from_list, from_file = (list(calibration_batches(c, model)) for c in (sentences, tmp_path / "text.txt"))
    assert sum(len(batch["input_ids"]) for batch in from_list) == 512
    for one, other in zip(from_list, from_file, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    for source in (sentences, tmp_path / "text.txt"):
        report = fuse(copy.deepcopy(model), 16, calibration=source, calibration_sentences=520)
        assert report.calibration is not None
        assert report.calibration.tokens == 260 * 3 + 260 * 2
    for bad in (["a cat", " "], ["a cat", 3]):
        with pytest.raises(InputError, match="some are blank or no text"):
            calibration_batches(bad, model)


def test_text_files_need_the_models_tokenizer(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("one\ntwo\n", encoding="utf-8")
    with pytest.raises(InputError, match="not loaded from a folder with a tokenizer"):
        fuse(tiny_model("bert"), 16, calibration=file)


def test_a_text_of_few_tokens_is_said_to_be_one() -> None:
    """Two tokens for each input of the FFNs, and one less."""
    inputs = tiny_model("bert").config.hidden_size
    enough = {"input_ids": torch.arange(2 * inputs).reshape(2, -1), "attention_mask": torch.ones(2, inputs)}
    few = {**enough, "attention_mask": torch.ones(2, inputs)}
    few["attention_mask"][1, -1] = 0
    with pytest.warns(UserWarning, match=f"{2 * inputs - 1} tokens of .* fewer than 2 for each of {inputs}"):
        fuse(tiny_model("bert"), 16, calibration=few)
    with pytest.warns(UserWarning, match=f"{2 * inputs - 1} tokens of .* fewer than 2 for each of {inputs}"):
        fuse(tiny_model("bert"), 16, calibration=enough, calibration_rows=2 * inputs - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fuse(tiny_model("bert"), 16, calibration=enough)
        fuse(tiny_model("bert"), 16, calibration=few, refit=False)
