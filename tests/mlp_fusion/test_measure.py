"""Errors and captured activations against naive ones, and the report."""

from __future__ import annotations

import json
import math

import pytest
import torch
from moe_models import moe_model
from torch import Tensor

from bundles import random_bundle, tie
from families import FAMILIES, tiny_model, token_batch
from fusion_kernels import ntk_gram
from mlp_fusion import FusionReport, InputError
from mlp_fusion.measure import FFNRow, ffn_errors, relative_error
from mlp_fusion.measure.report import CalibrationRecord, EmbeddingSimilarity, format_bytes
from mlp_fusion.neurons import NeuronBundle
from mlp_fusion.running.drawing import random_batch
from mlp_fusion.running.taps import capture_activations
from mlp_fusion.settings import FuseSettings
from mlp_fusion.store.record import architecture_of


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_architecture_computes_what_the_model_does(family: str) -> None:
    """The numeric self-test: rebuild each FFN from its bundle, compare with the model's own forward."""
    model = tiny_model(family, dtype=torch.float64)
    architecture = architecture_of(model.config)
    sites = architecture.sites(model)
    assert [site.index for site in sites] == [0, 1, 2]
    captured = capture_activations(model, architecture, sites, token_batch(), rows=99, seed=0)
    for site, rows in zip(sites, captured, strict=True):
        bundle = architecture.read(site)
        assert bundle.width == 64
        assert site.kind.width == site.neurons == 64
        assert rows.y.abs().max() > 0.1
        torch.testing.assert_close(bundle.forward(rows.x)[0], rows.y, rtol=1e-9, atol=1e-9)


def test_experts_that_get_all_rows_are_shown_those_that_are_routed_to_them() -> None:
    """Llama 4 multiplies what an expert gets by its score, which is 0 for all but the best."""
    model = moe_model("Llama4TextConfig")
    architecture = architecture_of(model.config)
    experts = [expert for site in architecture.sites(model) for expert in site.experts() if expert.is_expert]
    scores: list[Tensor] = []
    router = model.get_submodule(experts[0].path.removesuffix("experts") + "router")
    with router.register_forward_hook(lambda _module, _args, output: scores.append(output[0])):
        found = capture_activations(model, architecture, experts, token_batch(), rows=999, seed=0)
    assert [len(rows.x) for rows in found] == (scores[0] > 0).sum(dim=0).tolist()
    for expert, rows in zip(experts, found, strict=True):
        torch.testing.assert_close(architecture.read(expert).forward(rows.x)[0], rows.y)


def test_captured_rows_are_the_unmasked_positions_of_a_plain_run() -> None:
    model = tiny_model("llama")
    architecture = architecture_of(model.config)
    sites = architecture.sites(model)
    batches = [token_batch(seed=1, batch=3), token_batch(seed=2, batch=2, length=5)]
    seen: list[torch.Tensor] = []
    handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    expected = torch.cat([x[b["attention_mask"].bool()] for x, b in zip(seen, batches, strict=True)])
    everything = capture_activations(model, architecture, sites, batches, rows=10_000, seed=0)
    assert torch.equal(everything[1].x, expected)
    some = capture_activations(model, architecture, sites, iter(batches), rows=7, seed=3)
    assert len(some[1].x) == 7
    assert all(bool((expected == row).all(dim=1).any()) for row in some[1].x)
    again = capture_activations(model, architecture, sites, batches, rows=7, seed=3)
    other = capture_activations(model, architecture, sites, batches, rows=7, seed=4)
    assert torch.equal(some[0].y, again[0].y)
    assert not torch.equal(some[0].y, other[0].y)


def test_capturing_leaves_the_model_as_it_was() -> None:
    model = tiny_model("bert")
    model.train()
    model.bert.encoder.layer[0].eval()
    modes = [m.training for m in model.modules()]
    architecture = architecture_of(model.config)
    capture_activations(model, architecture, architecture.sites(model), random_batch(model, seed=0), rows=9, seed=0)
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_chunked_feed_forward_is_captured_whole() -> None:
    whole, chunked = tiny_model("bert"), tiny_model("bert", chunk_size_feed_forward=3)
    architecture = architecture_of(whole.config)
    batch = token_batch(length=9)
    found = [
        capture_activations(m, architecture, architecture.sites(m), batch, rows=99, seed=0) for m in (whole, chunked)
    ]
    torch.testing.assert_close(found[0][2].x, found[1][2].x)
    torch.testing.assert_close(found[0][2].y, found[1][2].y)


def test_bad_samples() -> None:
    model = tiny_model("bert")
    architecture = architecture_of(model.config)
    sites = architecture.sites(model)
    for sample in ([], [{"tokens": torch.ones(1, 3)}], {"attention_mask": torch.ones(1, 3)}):
        with pytest.raises(InputError, match="input_ids"):
            capture_activations(model, architecture, sites, sample, rows=9, seed=0)
    empty = {"input_ids": torch.ones(1, 3, dtype=torch.int64), "attention_mask": torch.zeros(1, 3)}
    with pytest.raises(InputError, match="no token"):
        capture_activations(model, architecture, sites, empty, rows=9, seed=0)


def test_relative_error() -> None:
    exact = torch.tensor([3.0, 4.0])
    assert relative_error(exact + torch.tensor([0.0, 1.0]), exact) == pytest.approx(0.2)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative_error(exact, torch.zeros(2)) == float("inf")


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_errors_are_relative_frobenius_per_part_and_in_total(gated: bool, bias: bool) -> None:
    original = random_bundle(width=9, gated=gated, bias=bias)
    fused = original.reduce(torch.tensor([[0, 0, 1, 1, 1, 2, 3, 3, 3]])).parameterized("split")
    x = torch.randn(11, 5, dtype=torch.float64)
    errors = ffn_errors(original, fused, x)
    y, y_fused = original.forward(x)[0], fused.forward(x)[0]
    assert errors.output == pytest.approx(float((y_fused - y).norm() / y.norm()))
    parts = {"w_in": ("w_gate", "w_in") if gated else ("w_in",), "w_out": ("w_out",)}
    if bias:
        parts["b_in"] = ("b_gate", "b_in") if gated else ("b_in",)
    for kernel in ("gd", "sign"):
        assert set(errors.ntk[kernel]) == {"total", *parts}
        for part, names in {**parts, "total": sum(parts.values(), ())}.items():
            k, k_fused = (ntk_gram(b, x, params=names, kernel=kernel) for b in (original, fused))
            assert errors.ntk[kernel][part] == pytest.approx(float((k_fused - k).norm() / k.norm()))


def test_errors_vanish_on_tied_neurons_in_the_matching_parameterization() -> None:
    sizes = torch.tensor([3, 1, 2, 5, 4, 1])
    tied = tie(random_bundle(), sizes)
    fused = tied.reduce(torch.arange(6).repeat_interleave(sizes).unsqueeze(0))
    x = torch.randn(8, 5, dtype=torch.float64)
    for form, kernel, other in (("scaled", "sign", "gd"), ("split", "gd", "sign")):
        errors = ffn_errors(tied, fused.parameterized(form), x)
        assert errors.output < 1e-12
        assert max(errors.ntk[kernel].values()) < 1e-12
        assert min(errors.ntk[other].values()) > 0.1


def _report(optimizer: str | None = "adamw", **changes: object) -> FusionReport:
    ntk = {kernel: {"total": 0.5, "w_in": 0.25, "w_out": 0.75} for kernel in ("gd", "sign")}
    row = FFNRow(3, "encoder.layer.3", 1536, 384, 0.325, ntk, 511, 300, 0, "ok", 1.5)
    values: dict[str, object] = {
        "model_type": "bert", "settings": FuseSettings(width=0.25, optimizer=optimizer), "parameterization": "scaled",
        "sample": "text", "sample_rows": 512, "parameters_before": 1000, "parameters_after": 250,
        "bytes_before": 4096, "bytes_after": 1024, "seconds": 2.0, "rows": [row],
        "embeddings": EmbeddingSimilarity(0.9, 0.8, 64),
    }  # fmt: skip
    return FusionReport(**{**values, **changes})  # type: ignore[arg-type]


def test_report_table_says_everything() -> None:
    text = _report().table()
    line = next(line for line in text.splitlines() if line.strip().startswith("encoder.layer.3"))
    assert line.split() == ["encoder.layer.3", "1536", "→", "384", "0.325", "0.5", "0.5", "511", "300", "1.50"]
    assert "parameters: 1,000 → 250 (25.0%)" in text
    assert "bytes: 4.0 KiB → 1.0 KiB (25.0%)" in text
    assert "64 sentence embeddings to the original's: mean 0.900, smallest 0.800" in text
    assert "512 token positions of text" in text
    assert "note" not in text
    troubled = FFNRow(**{**_report().rows[0].__dict__, "status": "max_iter", "largest_cluster": None})
    assert "note: encoder.layer.3: max_iter" in _report(rows=[troubled]).table()


def test_report_table_says_what_was_learnt_from() -> None:
    nothing = "reduced by weights alone: calibrated"
    assert f"{nothing}, or on synthetic tokens where there is no text, it keeps more" in _report().table()
    assert f"{nothing} it keeps more" in _report(streamed=True).table()
    known = {"settings": FuseSettings(width=0.25, refit=True), "calibration": CalibrationRecord(4096, 1.0)}
    assert "\ncalibrated on 4,096 tokens, outputs refitted\n" in (text := _report(**known).table())
    assert nothing not in text
    known["calibration"] = CalibrationRecord(4096, 1.0, "random tokens")
    assert "\ncalibrated on 4,096 random tokens, outputs refitted\n" in _report(**known).table()


def test_report_says_what_was_trained() -> None:
    row = _report().rows[0]

    def said(*trained: bool | None) -> str:
        settings = FuseSettings(width=0.25, refit=True, tune_steps=80)
        rows = [FFNRow(**{**row.__dict__, "trained": each}) for each in trained]
        found = _report(settings=settings, calibration=CalibrationRecord(4096, 1.0), rows=rows).learnt()
        assert found is not None
        return found.rpartition("refitted, ")[2]

    assert said(True, True, None) == said(None) == "tuned for 80 steps"  # reports of earlier versions do not know
    assert said(True, False, None) == "tuned for 80 steps (1 of 2 FFNs)"
    assert said(False, False) == "too few tokens to tune"


def test_report_survives_json() -> None:
    for report in (_report(), _report(embeddings=None, optimizer=None)):
        assert FusionReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_numbers_that_are_not_finite_are_null_in_json() -> None:
    row = _report().rows[0]
    worst = {"gd": {"total": math.inf, "w_in": 0.5}, "sign": {"total": math.nan}}
    rows = [FFNRow(**{**row.__dict__, "output_error": math.inf, "ntk_error": worst})]
    report = _report(rows=rows, embeddings=EmbeddingSimilarity(math.nan, -1.0, 3))
    written = json.dumps(report.to_dict(), allow_nan=False)
    read = FusionReport.from_dict(json.loads(written))
    assert math.isnan(read.rows[0].output_error)
    assert math.isnan(read.rows[0].ntk_error["gd"]["total"])
    assert read.rows[0].ntk_error["gd"]["w_in"] == 0.5
    assert read.embeddings is not None
    assert math.isnan(read.embeddings.mean)
    assert "nan" in read.table()
    assert json.dumps(read.to_dict(), allow_nan=False) == written


def test_format_bytes() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1536, 5 * 2**20, 3 * 2**30, 2**41)] == [
        "0 B", "1023 B", "1.5 KiB", "5.0 MiB", "3.0 GiB", "2.0 TiB",
    ]  # fmt: skip


def test_random_batch_stays_within_positions_and_vocabulary() -> None:
    model = tiny_model("roberta")
    batch = random_batch(model, seed=5)
    assert batch["input_ids"].shape == (8, 38)
    assert int(batch["input_ids"].max()) < 97
    assert not bool((batch["input_ids"] == model.config.pad_token_id).any())
    assert torch.equal(batch["input_ids"], random_batch(model, seed=5)["input_ids"])
    model(**batch)


def test_bundle_of_the_wrong_kind_is_refused_by_the_gram() -> None:
    with pytest.raises(ValueError, match="batch of 2"):
        ffn_errors(
            *[NeuronBundle.stack([random_bundle(), random_bundle()])] * 2, torch.randn(3, 5, dtype=torch.float64)
        )
