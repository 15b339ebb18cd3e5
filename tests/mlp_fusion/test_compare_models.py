"""`compare_models`: tangent kernels of whole models against numeric Jacobians, and where they must not differ."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mlp_fusion
from families import FAMILIES, tiny_model, token_batch
from fusion_kernels.ntk import Kernel
from mlp_fusion import InputError
from mlp_fusion.measure import compare_models, models
from mlp_fusion.measure.models import Outputs, pooled

pytestmark = pytest.mark.slow


def fused(family: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    original = tiny_model(family, task="Model", dtype=torch.float64)
    other = copy.deepcopy(original)
    mlp_fusion.fuse(other, 16, sample=token_batch(), **options)
    return original, other


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_a_model_and_itself(family: str) -> None:
    model = tiny_model(family, task="Model", dtype=torch.float64)
    found = compare_models(model, copy.deepcopy(model), token_batch(), rows=20, samples=3)
    for row in found.ffns:
        assert row.relative_error == pytest.approx(0, abs=1e-12)
        assert row.cosine == pytest.approx(1)
        assert row.alignment == pytest.approx(1)
        assert row.trace[0] == pytest.approx(row.trace[1])
    assert found.network is not None
    assert found.network.relative_error == pytest.approx(0, abs=1e-12)
    assert found.rows == 20
    assert [row.part for row in found.ffns] == ["total", "w_in", "b_in", "w_out"] * 3


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_parts_add_up_and_the_measured_errors_are_those_of_the_report(family: str) -> None:
    original, other = fused(family)
    found = compare_models(original, other, token_batch(), rows=512, samples=0)
    assert found.network is None
    by_layer: dict[int, dict[str, Any]] = {}
    for row in found.ffns:
        by_layer.setdefault(row.layer, {})[row.part] = row
    report = mlp_fusion.fuse(copy.deepcopy(original), 16, sample=token_batch())
    for expected in report.rows:
        rows = by_layer[expected.layer]
        for part, error in expected.ntk_error["gd"].items():
            assert rows[part].relative_error == pytest.approx(error, rel=1e-4), part
        for side in (0, 1):
            parts = [row.trace[side] for part, row in rows.items() if part != "total"]
            assert rows["total"].trace[side] == pytest.approx(sum(parts))


def numeric_kernel(model: Any, batch: dict[str, Tensor], kernel: str, outputs: Outputs) -> Tensor:
    """Summed over all outputs, from the whole Jacobian of every sample with respect to the parameters of all FFNs."""
    parameters = [
        p
        for n, p in model.named_parameters()
        if "intermediate.dense" in n or ("output.dense" in n and "attention" not in n)
    ]
    assert len(parameters) == 12
    rows = []
    for i in range(len(batch["input_ids"])):
        length = int(batch["attention_mask"][i].sum())
        y = outputs(model, {k: v[i : i + 1, :length] for k, v in batch.items()})[0]
        of_outputs = [torch.autograd.grad(o, parameters, retain_graph=True) for o in y]
        rows.append(torch.stack([torch.cat([g.flatten() for g in gradients]) for gradients in of_outputs]))
    jacobian = torch.stack(rows)  # (N, O, P)
    return torch.einsum("nop,mop->nm", jacobian, jacobian.sign() if kernel == "sign" else jacobian)


def first(model: nn.Module, batch: Any) -> Tensor:
    return pooled(model, batch)[:, :1]


@pytest.mark.parametrize("kernel", ["gd", "sign"])
def test_the_networks_kernel_is_that_of_the_jacobian(kernel: Kernel) -> None:
    """One output: no estimate is involved."""
    original, other = fused("bert")
    found = compare_models(original, other, token_batch(), rows=8, kernel=kernel, samples=4, outputs=first).network
    assert found is not None
    a, b = (numeric_kernel(model, token_batch(), kernel, first) for model in (original, other))
    assert found.relative_error == pytest.approx(float((b - a).norm() / a.norm()), rel=1e-4)
    assert found.trace == pytest.approx((float(a.trace()), float(b.trace())), rel=1e-4)
    assert found.cosine == pytest.approx(float((a * b).sum() / (a.norm() * b.norm())), rel=1e-4)


@pytest.mark.parametrize("kernel", ["gd", "sign"])
def test_drawn_outputs_estimate_the_sum_over_all(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("bert", task="Model", dtype=torch.float64)
    exact = float(numeric_kernel(model, token_batch(), kernel, pooled).trace())

    def network(drawn: int, seed: int = 0) -> models.NetworkKernel:
        options: dict[str, Any] = {"rows": 4, "samples": 4, "kernel": kernel, "drawn_outputs": drawn, "seed": seed}
        found = compare_models(model, model, token_batch(), **options).network
        assert found is not None
        return found

    everything = network(24)
    assert everything.outputs == 24
    assert everything.trace[0] == pytest.approx(exact, rel=1e-6)
    parts = [network(6, seed).trace[0] for seed in range(12)]
    assert sum(parts) / len(parts) == pytest.approx(exact, rel=0.1)
    monkeypatch.setattr(models, "GRADIENT_BYTES", 1)
    again = network(24)
    assert again.trace == pytest.approx(everything.trace, rel=1e-9)
    assert again.cosine == pytest.approx(everything.cosine)


def test_outputs_that_do_not_depend_on_every_ffn_and_without_gradients_around() -> None:
    original, other = fused("bert")

    def early(model: Any, batch: Any) -> Tensor:
        return model(**batch, output_hidden_states=True).hidden_states[1].mean(1)

    with torch.no_grad():
        found = compare_models(original, other, token_batch(), rows=8, samples=2, outputs=early).network
    assert found is not None
    assert found.trace[0] > 0


def test_small_differences_of_float64_models_are_seen() -> None:
    original = tiny_model("bert", task="Model", dtype=torch.float64)
    other = copy.deepcopy(original)
    with torch.no_grad():
        other.encoder.layer[0].output.dense.weight.mul_(1 + 1e-9)
    found = compare_models(original, other, token_batch(), rows=8, samples=3)
    assert found.network is not None
    assert 1e-11 < found.network.relative_error < 1e-7


def test_rows_come_from_many_sentences_and_samples_are_as_many_as_asked() -> None:
    model = tiny_model("bert", task="Model")
    one_by_one = [{k: v[:1] for k, v in token_batch(seed=seed).items()} for seed in range(40)]
    found = compare_models(model, model, one_by_one, rows=8, samples=16)
    assert found.network is not None
    assert found.network.samples == 16
    assert found.rows == 8


def test_a_model_is_left_as_it_was() -> None:
    original, other = fused("bert")
    other.train()
    for p in list(original.parameters())[::2]:
        p.requires_grad_(False)
    before = [p.requires_grad for p in original.parameters()]
    compare_models(original, other, token_batch(), rows=8, samples=2)
    assert [p.requires_grad for p in original.parameters()] == before
    assert other.training
    assert all(p.grad is None for p in other.parameters())


def test_models_that_do_not_match_are_refused() -> None:
    bert, gpt2 = tiny_model("bert"), tiny_model("gpt2")
    with pytest.raises(InputError, match="the models are a 'bert' and a 'gpt2': compare two models of one"):
        compare_models(bert, gpt2, token_batch())
    with pytest.raises(InputError, match="the models have 3 and 2 FFNs"):
        compare_models(bert, tiny_model("bert", num_hidden_layers=2), token_batch())
    with pytest.raises(InputError, match="compare two models of one"):
        compare_models(nn.Linear(2, 2), bert, token_batch())
    with pytest.raises(InputError, match=r"is torch.float32 in one model and torch.float64 in the other: convert"):
        compare_models(bert, tiny_model("bert", dtype=torch.float64), token_batch())
    with pytest.raises(InputError, match="has 24 inputs in one model and 16 in the other"):
        compare_models(bert, tiny_model("bert", hidden_size=16), token_batch())
    for options, message in (({"rows": 0}, "rows must be at least 1"), ({"samples": -1}, "samples must be at least 0")):
        with pytest.raises(ValueError, match=message):
            compare_models(bert, bert, token_batch(), **options)
