"""`fuse` on every family: what it does to the model, that it trains on, and what it refuses."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

import mlp_fusion
from families import FAMILIES, WIDTH, tiny_model, token_batch
from fusion_kernels import native
from mlp_fusion import FusedGLU, FusedMLP, InputError, fuse, methods
from mlp_fusion.choices import METHODS
from mlp_fusion.families.exchange import narrow
from mlp_fusion.modules import Scaled, ScaledActivation
from mlp_fusion.neurons import NeuronBundle
from mlp_fusion.running.taps import capture_activations
from mlp_fusion.store.record import architecture_of

#: Families whose FFN no module holds by itself: they are narrowed in place.
IN_PLACE = ("bert", "roberta", "xlm-roberta")
LABELS = torch.tensor([0, 1, 0, 1])


def _logits(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        logits: Tensor = model(**token_batch()).logits
    return logits


def _ffns(model: Any) -> list[Scaled]:
    return [m for m in model.modules() if isinstance(m, Scaled)]


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", None])
def test_fused_ffns_compute_the_fused_bundles(family: str, optimizer: str | None) -> None:
    model = tiny_model(family, dtype=torch.float64)
    original = copy.deepcopy(model)
    names = [n for n, _ in model.named_parameters()]
    report = fuse(model, 16, layers=[0, 2], optimizer=optimizer, seed=3, sample=token_batch())

    compiled = "cpu" if native.UNAVAILABLE is None else "reference"
    assert [row.clustered_by for row in report.rows] == [compiled] * 2
    assert f"clustered by k-means on the backend {compiled}" in report.table()
    assert [n for n, _ in model.named_parameters()] == names
    assert len(_ffns(model)) == 2
    gated = "gate_proj" in " ".join(names)
    cls = FusedGLU if gated else ScaledActivation if family in IN_PLACE else FusedMLP
    assert all(type(m) is cls for m in _ffns(model))
    architecture = architecture_of(original.config)
    sites = architecture.sites(original)
    bundle = NeuronBundle.stack([architecture.read(sites[i]) for i in (0, 2)])
    expected = methods.get_method("fusion")(bundle, 16, seed=3).bundle
    rows = capture_activations(model, architecture, architecture.sites(model), token_batch(), rows=99, seed=0)
    for position, layer in enumerate((0, 2)):
        torch.testing.assert_close(expected.select(position).forward(rows[layer].x)[0], rows[layer].y)
        assert report.rows[position].layer == layer
        assert (report.rows[position].neurons_before, report.rows[position].neurons_after) == (WIDTH, 16)
    untouched = architecture.read(sites[1]).forward(rows[1].x)[0]
    torch.testing.assert_close(untouched, rows[1].y)
    assert not torch.allclose(_logits(model), _logits(original))


@pytest.mark.parametrize(("optimizer", "column"), [("adamw", "Adam"), ("sgd", "SGD"), (None, None)])
def test_the_report_says_which_kernel_counts(optimizer: str | None, column: str | None) -> None:
    said = fuse(tiny_model("bert"), 16, method="fusion", optimizer=optimizer).table()
    assert ("tangent kernel" in said) == (column is not None)
    assert column is None or f"which is to keep {column}'s tangent kernel: the other's error is of no account" in said


def test_the_report_names_the_kernel_that_was_matched() -> None:
    said = fuse(
        tiny_model("bert"), 16, calibration=token_batch(), method="fusion", optimizer="adamw", match="gd"
    ).table()
    assert "parameterization scaled (for adamw), which is to keep SGD's tangent kernel" in said


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_bare_loop_trains_every_parameter_of_the_fused_ffns(family: str, optimizer: str) -> None:
    model = tiny_model(family)
    fuse(model, 16, sample=token_batch(), optimizer=optimizer)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    cls: Any = torch.optim.AdamW if optimizer == "adamw" else torch.optim.SGD
    steps = cls(model.parameters(), lr=1e-3)
    model.train()
    losses = []
    for _ in range(3):
        loss = model(**token_batch(), labels=LABELS).loss
        loss.backward()
        steps.step()
        steps.zero_grad()
        losses.append(loss.item())
    assert all(torch.isfinite(torch.tensor(losses)))
    sites = architecture_of(model.config).sites(model)
    trained = dict(model.named_parameters())
    names = [f"{site.path}.{name}" for site in sites for name in site.kind.parameters]
    assert len(names) >= 3 * 2
    for name in names:
        assert not torch.equal(trained[name], before[name]), name


def test_tied_neurons_cost_nothing() -> None:
    """A model whose FFNs hold 16 neurons four times each is fused to 16 without changing its outputs."""
    for family in ("roberta", "gpt2", "llama"):
        model = tiny_model(family, dtype=torch.float64)
        architecture = architecture_of(model.config)
        for site in architecture.sites(model):
            bundle = architecture.read(site)
            rows = bundle.vectors()[:, :16].repeat(1, 4, 1)
            narrow(site, bundle.with_vectors(rows, None))
        before = _logits(model)
        report = fuse(model, 16, sample=token_batch(), optimizer="sgd")
        torch.testing.assert_close(_logits(model), before)
        assert max(row.output_error for row in report.rows) < 1e-7
        assert max(row.ntk_error["gd"]["total"] for row in report.rows) < 1e-7
        assert {row.largest_cluster for row in report.rows} == {4}


def test_report_counts_what_is_there() -> None:
    model = tiny_model("bert")
    total = sum(p.numel() for p in model.parameters())
    progress: list[tuple[int, int]] = []
    report = fuse(model, 0.25, layers="last:2", sample=token_batch(), progress=lambda *p: progress.append(p))
    assert report.parameters_before == total
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    assert report.parameters_before - report.parameters_after == 2 * 48 * (24 + 1 + 24)
    assert report.bytes_after == 4 * report.parameters_after
    assert [row.path for row in report.rows] == ["bert.encoder.layer.1", "bert.encoder.layer.2"]
    assert progress[-1] == (2, 2)
    for row, module in zip(report.rows, _ffns(model), strict=True):
        assert module.scale is not None
        assert int(module.scale.sum()) == WIDTH
        assert row.largest_cluster == int(module.scale.max())
        assert row.singletons == int((module.scale == 1).sum())
        assert row.seconds > 0
        assert row.output_error > 0
    assert "random" in fuse(tiny_model("bert"), 16).sample


def test_same_seed_same_bits() -> None:
    models = [tiny_model("qwen3") for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        fuse(model, 16, seed=seed)
    states = [m.state_dict() for m in models]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not all(torch.equal(states[0][k], states[2][k]) for k in states[0])


@pytest.mark.parametrize("family", ["bert", "gpt2", "gemma"])
def test_dtype_mode_and_frozen_parameters_are_kept(family: str) -> None:
    model = tiny_model(family, dtype=torch.bfloat16)
    model.train()
    architecture = architecture_of(model.config)
    site = architecture.sites(model)[1]
    architecture.projection(site, "w_out").requires_grad_(False)
    fuse(model, 16, sample=token_batch())
    last = site.kind.projection("w_out")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(m.training for m in model.modules())
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert sorted(frozen) == sorted(f"{site.path}.{name}" for name in last.tensors)
    assert torch.isfinite(_logits(model)).all()
    for module in _ffns(model):
        assert module.scale is not None
        assert module.scale.dtype == torch.float32


def test_dropout_of_the_family_is_kept() -> None:
    for family, where in (("gpt2", "transformer.h.0.mlp"), ("distilbert", "distilbert.transformer.layer.0.ffn")):
        extra = {"resid_pdrop": 0.3} if family == "gpt2" else {"dropout": 0.3}
        model = tiny_model(family, **extra)
        fuse(model, 16)
        assert model.get_submodule(where).dropout.p == 0.3
        model.train()
        x = torch.randn(2, 3, 16 if family == "gpt2" else 24)
        zeros = (model.get_submodule(where)(x) == 0).float().mean()
        assert 0.05 < zeros < 0.6


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_functions_that_the_kernels_do_not_know(family: str) -> None:
    """Neurons are merged and chosen by their weights; the model's own activation computes."""
    model = tiny_model(family, dtype=torch.float64, hidden_act="tanh")
    architecture = architecture_of(model.config)
    for site in architecture.sites(model):
        bundle = architecture.read(site)
        narrow(site, bundle.with_vectors(bundle.vectors()[:, :16].repeat(1, 4, 1), None))
    before = _logits(model)
    pruned = copy.deepcopy(model)
    report = fuse(model, 16, sample=token_batch(), optimizer="sgd")
    torch.testing.assert_close(_logits(model), before)
    assert [type(module) for module in _ffns(model)] == [ScaledActivation] * 3
    assert all(math.isnan(row.output_error) for row in report.rows)
    fuse(pruned, 16, method="prune", sample=token_batch())
    assert not torch.allclose(_logits(pruned), before)
    for options in (
        {"calibration": [token_batch()], "refit": True},
        {"calibration": [token_batch()], "sequential": True},
    ):
        with pytest.raises(InputError, match="the function of the model's FFNs is not among those of the kernels"):
            fuse(tiny_model(family, hidden_act="tanh"), **{"width": 16, **options})


@pytest.mark.parametrize("method", [name for name, entry in METHODS.items() if entry.narrows])
def test_a_function_that_no_kernel_has_is_refused_by_what_computes_it(method: str) -> None:
    model, text = tiny_model("bert", hidden_act="tanh"), [token_batch(seed) for seed in range(4)]
    if METHODS[method].computes:
        with pytest.raises(
            InputError, match="is not among those of the kernels: their neurons can be merged and chosen"
        ):
            fuse(model, 16, method=method, calibration=text)
    else:
        assert fuse(model, 16, method=method, calibration=text).rows[0].neurons_after == 16


def test_lora_by_the_familys_own_names() -> None:
    model = tiny_model("bert")
    fuse(model, 16, sample=token_batch())
    config = LoraConfig(r=2, target_modules=["intermediate.dense", "output.dense"], init_lora_weights=False)
    wrapped = get_peft_model(copy.deepcopy(model), config)
    assert not torch.allclose(_logits(wrapped), _logits(model))
    wrapped.train()
    wrapped(**token_batch(), labels=LABELS).loss.backward()
    adapters = {n: p.grad for n, p in wrapped.named_parameters() if "lora" in n and "attention" not in n}
    assert len(adapters) == 3 * 2 * 2
    assert all(g is not None and bool((g != 0).any()) for g in adapters.values())
    merged = copy.deepcopy(wrapped).merge_and_unload()
    torch.testing.assert_close(_logits(merged), _logits(wrapped))


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model("llama")
        fuse(model, 16, sample=token_batch())
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        model(**token_batch(), labels=LABELS).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


def _quantised() -> Any:
    model = tiny_model("llama")
    model.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    return model


def _nan() -> Any:
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight[3, 3] = float("nan")
    return model


def _fused() -> Any:
    model = tiny_model("bert")
    fuse(model, 16)
    return model


def _other_activation() -> Any:
    model = tiny_model("bert")
    model.bert.encoder.layer[2].intermediate.intermediate_act_fn = nn.ReLU()
    return model


def _without_ffns() -> Any:
    return tiny_model("bert", num_hidden_layers=0)


def _layers_cut_off() -> Any:
    model = tiny_model("bert")
    model.bert.encoder.layer = nn.ModuleList()
    return model


def _other_width() -> Any:
    model = tiny_model("gpt2")
    model.config.n_inner = 48
    return model


def _meta() -> Any:
    model = tiny_model("llama")
    model.model.layers[0].mlp.to("meta")
    return model


def _lora() -> Any:
    return get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["up_proj"]))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: nn.Linear(2, 2), {}, "give a Hugging Face model"),
        (_quantised, {}, "quantised"),
        (_nan, {}, r"transformer\.h\.1\.mlp\.c_proj\.weight holds NaN or Inf"),
        (_fused, {}, "fused already"),
        (_other_activation, {}, r"layer.2: this FFN does not compute what the 'bert' architecture says"),
        (_without_ffns, {}, "bert: no FFN was found in it.*`mlp-fusion families bert` shows all"),
        (_layers_cut_off, {}, "no FFN found in BertForSequenceClassification where the 'bert' architecture has them"),
        (_other_width, {}, r"transformer\.h\.0\.mlp has 64 neurons, its config says 48: mend the config"),
        (_meta, {}, "on the meta device"),
        (_lora, {}, "merge adapters"),
        (lambda: tiny_model("bert"), {"width": 0}, "must be positive"),
        (lambda: tiny_model("bert"), {"width": -8}, "must be positive"),
        (lambda: tiny_model("bert"), {"width": 128}, "not smaller than the FFN's 64"),
        (lambda: tiny_model("bert"), {"width": 20}, "not a multiple of 8"),
        (lambda: tiny_model("bert"), {"layers": [1, 3]}, "layers 3 out of range"),
        (lambda: tiny_model("bert"), {"method": "fussion"}, "unknown method 'fussion': use one of auto, cluster"),
        (lambda: tiny_model("bert"), {"optimizer": "adamm"}, "unknown optimizer"),
        (lambda: tiny_model("bert"), {"sample": []}, "sample needs at least one batch"),
    ],
)
def test_refusals_leave_the_model_as_it_was(make: Any, options: dict[str, Any], message: str) -> None:
    model = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    config = repr(getattr(model, "config", None))
    modules = [type(m) for m in model.modules()]
    attributes = set(model.__dict__)
    with pytest.raises(InputError, match=message) as caught:
        fuse(model, **{"width": 16, **options})
    assert "\n" not in str(caught.value)
    assert [type(m) for m in model.modules()] == modules
    assert repr(getattr(model, "config", None)) == config
    assert set(model.__dict__) == attributes
    after = model.state_dict()
    for key, tensor in before.items():
        if tensor.device.type != "meta":
            torch.testing.assert_close(after[key], tensor, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_architectures_know_what_stands_before_their_names(family: str) -> None:
    model = tiny_model(family)
    assert architecture_of(model.config).base == model.base_model_prefix


def test_a_model_that_is_not_run_is_fused_alike_and_its_errors_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    measured, unmeasured = tiny_model("llama"), tiny_model("llama")
    fuse(measured, 16)

    def run(*_: Any, **__: Any) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr(type(unmeasured.model), "forward", run)
    report = fuse(unmeasured, 16, unmeasured=True)
    monkeypatch.undo()
    for name, tensor in measured.state_dict().items():
        assert torch.equal(unmeasured.state_dict()[name], tensor), name
    assert all(math.isnan(row.output_error) for row in report.rows)
    assert report.sample_rows == 0
    assert "nan" not in report.table()
    assert re.search(r"64 → 16 +- +- +-", report.table())
    assert mlp_fusion.FusionReport.from_dict(report.to_dict()).rows[0].path == report.rows[0].path
    with pytest.raises(InputError, match="calibration runs the model: leave out unmeasured"):
        fuse(tiny_model("llama"), 16, unmeasured=True, calibration=token_batch())
