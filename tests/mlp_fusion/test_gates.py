"""Limits and offsets of gated FFNs, through bundles and modules, in every parameterization."""

from __future__ import annotations

import dataclasses
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from blocks import GATES
from torch import Tensor
from transformers import CONFIG_MAPPING, GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from bundles import random_bundle, tie
from fusion_kernels import Gate, ntk_gram
from mlp_fusion import FusedExperts, FusedGLU, FusedMLP, NeuronBundle
from mlp_fusion.calibration import matching
from mlp_fusion.modules import experts as experts_module
from mlp_fusion.modules.experts import experts_forward, read_experts

FORMS = ("folded", "scaled", "split")
gates = pytest.mark.parametrize("gate", GATES)
forms = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def limited(gate: str, batch: int = 1, dtype: torch.dtype = torch.float64) -> NeuronBundle:
    bundle = random_bundle(batch, 17, gated=True, scale=True, activation="quick_gelu", dtype=dtype)
    return dataclasses.replace(bundle, gating=GATES[gate])


def rows(n: int = 23) -> Tensor:
    """Of which the limits bind on both sides."""
    return 6 * torch.randn(n, 5, dtype=torch.float64)


def naive(bundle: NeuronBundle, x: Tensor) -> Tensor:
    """(B, T, d_out), neuron by neuron; the bundle's scale is explicit."""
    limit, clamp, offset = bundle.gating.arguments
    bound = torch.tensor(0.0 if limit is None else limit, dtype=x.dtype)
    y = torch.zeros(bundle.batch, len(x), 4, dtype=x.dtype) + bundle.b_out[:, None]
    for b in range(bundle.batch):
        for j in range(bundle.width):
            g, up = x @ bundle.w_gate[b, j] + bundle.b_gate[b, j], x @ bundle.w_in[b, j] + bundle.b_in[b, j]
            if limit is not None:
                up = torch.minimum(torch.maximum(up, -bound), bound)
            if clamp in ("above", "both"):
                g = torch.minimum(g, bound)
            if clamp == "both":
                g = torch.maximum(g, -bound)
            value = g / (1 + torch.exp(-1.702 * g))
            if clamp == "after":
                value = torch.minimum(value, bound)
            y[b] += torch.outer(bundle.scale[b, j] * value * (up + offset), bundle.w_out[b, j])
    return y


@forms
@gates
def test_a_bundle_is_the_same_function_in_every_parameterization(gate: str, form: str) -> None:
    bundle, x = limited(gate, 2), rows()
    expected, other = naive(bundle, x), bundle.parameterized(form)
    assert other.gating == bundle.gating
    torch.testing.assert_close(other.forward(x), expected)
    torch.testing.assert_close(other.canonical().forward(x), expected)
    assert float((dataclasses.replace(bundle, gating=Gate()).forward(x) - expected).norm()) > 0.01 * expected.norm()


@forms
@gates
def test_fusing_tied_neurons_keeps_the_function(gate: str, form: str) -> None:
    """The identity that the cluster sizes are for: folded, explicit or split."""
    one, sizes, x = dataclasses.replace(limited(gate), scale=None), torch.arange(17) % 4 + 1, rows()
    labels = torch.arange(17).repeat_interleave(sizes)[None]
    wide = tie(one, sizes)
    narrow = wide.reduce(labels).parameterized(form)
    assert narrow.width == 17
    torch.testing.assert_close(narrow.forward(x), wide.forward(x))


@pytest.mark.parametrize("called", [False, True], ids=["operator", "children"])
@forms
@gates
def test_a_module_computes_the_bundle(gate: str, form: str, called: bool) -> None:
    bundle, x = limited(gate), rows()
    module, plain = FusedGLU.from_bundle(bundle, form), FusedGLU.from_bundle(bundle, "folded")
    if called:  # a hook on a projection: it has to be called
        module.projection("w_in").register_forward_hook(lambda *_: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = module(x)
    torch.testing.assert_close(y, naive(bundle, x)[0])
    torch.testing.assert_close(module.as_bundle().forward(x)[0], y.detach())
    again = pickle.loads(pickle.dumps(plain))
    torch.testing.assert_close(again(x), y)
    # What is stored as p^a times the folded weights has p^-a times their gradients.
    power = {"folded": (0.0, 0.0), "scaled": (0.0, -1.0), "split": (0.5, -0.5)}[form]
    roles, p = ("w_gate", "w_in", "w_out"), bundle.scale[0]
    found, ideal = (
        torch.autograd.grad(of(x).square().sum(), [of.projection(role).weight for role in roles])
        for of in (module, plain)
    )
    for stored, folded in zip(found[:2], ideal[:2], strict=True):
        torch.testing.assert_close(stored, folded * (p ** -power[0])[:, None])
    torch.testing.assert_close(found[2], ideal[2] * p ** -power[1])
    module.merge_scale()
    assert module.scale is None
    torch.testing.assert_close(FusedGLU.from_bundle(module.as_bundle())(x), y)


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["above", "after"])
def test_a_module_compiles_whole(gate: str) -> None:
    module, x = FusedGLU.from_bundle(limited(gate), "split"), rows().requires_grad_()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    leaves = [x, *module.parameters()]
    expected = module(x)
    torch.testing.assert_close(compiled(x), expected)
    wanted = torch.autograd.grad(expected.square().sum(), leaves)
    for found, ideal in zip(torch.autograd.grad(compiled(x).square().sum(), leaves), wanted, strict=True):
        torch.testing.assert_close(found, ideal)


@forms
@gates
def test_the_tangent_kernel_of_a_module_is_that_of_its_parameters(gate: str, form: str) -> None:
    module, x = FusedGLU.from_bundle(limited(gate), form), rows(7)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def outputs(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(module, parameters, x)

    j = torch.cat([t.flatten(2) for t in torch.func.jacrev(outputs)(parameters).values()], 2)
    torch.testing.assert_close(ntk_gram(module, x), torch.einsum("nop,mop->nm", j, j))


@forms
@gates
def test_experts(gate: str, form: str) -> None:
    bundle, x = limited(gate, 3), rows()
    experts = FusedExperts(bundle, form)
    index, weights = torch.rand(23, 3).topk(2).indices, torch.rand(23, 2, dtype=torch.float64)
    share = torch.zeros(23, 3, dtype=torch.float64).scatter(1, index, weights)
    expected = torch.einsum("te,etd->td", share, naive(bundle, x))
    torch.testing.assert_close(experts(x, index, weights), expected)
    torch.testing.assert_close(experts.as_bundle().forward(x), naive(bundle, x))
    experts.merge_scale()
    torch.testing.assert_close(experts(x, index, weights), expected)


@pytest.mark.parametrize("kernel", ["gd", "sign"])
@gates
def test_matching_has_the_factors_of_the_tangent_kernel(gate: str, kernel: str) -> None:
    bundle, x = limited(gate).parameterized("folded"), rows(9)
    ones = torch.ones(17, dtype=torch.float64)
    found = matching._Factors(bundle, x, kernel).kernel(ones, ones)  # type: ignore[arg-type]
    parts = ("w_gate", "w_in", "b_gate", "b_in", "w_out")
    torch.testing.assert_close(found, ntk_gram(bundle, x, params=parts, kernel=kernel))


#: Classes of transformers that gate in a way of their own: (activation, limit, clamp, offset).
OWN = {
    "gpt_oss.GptOssExperts": ("quick_gelu", 7.0, "above", 1.0),
    "minimax_m3_vl.MiniMaxM3VLExperts": ("quick_gelu", 7.0, "above", 1.0),
    "openai_privacy_filter.OpenAIPrivacyFilterExperts": ("quick_gelu", 7.0, "above", 1.0),
    "deepseek_v4.DeepseekV4Experts": ("silu", 10.0, "above", 0.0),
    "hy_v4.HYV4Experts": ("silu", 10.0, "above", 0.0),
    "beam.BeamExperts": ("silu", None, "none", 0.0),
}


@pytest.mark.parametrize("name", OWN)
def test_own_gates_are_recognised_by_what_they_compute(name: str) -> None:
    family, _, kind = name.partition(".")
    module = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    config = CONFIG_MAPPING[family]()
    with torch.device("meta"):
        experts = getattr(module, kind)(getattr(config, "text_config", config))
    bundle = read_experts(experts)
    assert bundle.function == OWN[name]
    assert "limit" not in vars(experts) or bundle.gating.limit == experts.limit


@pytest.fixture
def own_gate() -> Any:
    """gpt-oss's experts."""
    experts: Any = GptOssExperts(GptOssConfig(hidden_size=16, intermediate_size=24, num_local_experts=4, head_dim=8))
    for parameter in experts.double().parameters():
        torch.nn.init.normal_(parameter)
    experts.config._experts_implementation = "eager"
    return experts


INDEX, WEIGHTS = torch.randint(0, 4, (9, 2)), torch.rand(9, 2).double()


def test_experts_with_a_gate_of_their_own_run_fused(own_gate: Any) -> None:
    """With arguments beyond its limits, and with another limit later."""
    x = 3 * torch.randn(9, 16).double()
    fused = FusedExperts.from_experts(own_gate)
    torch.testing.assert_close(fused(x, INDEX, WEIGHTS), own_gate(x, INDEX, WEIGHTS))
    torch.testing.assert_close(experts_forward(own_gate, x, INDEX, WEIGHTS), own_gate(x, INDEX, WEIGHTS))
    before, own_gate.limit = own_gate(x, INDEX, WEIGHTS), 5.0
    torch.testing.assert_close(experts_forward(own_gate, x, INDEX, WEIGHTS), own_gate(x, INDEX, WEIGHTS))
    assert not torch.allclose(own_gate(x, INDEX, WEIGHTS), before)


@pytest.mark.parametrize("whole", [True, False])
def test_a_gate_of_their_own_is_asked_for_while_compiling(
    whole: bool, own_gate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By torch 2.12 on; what cannot ask says so where the graph has to be whole, and runs as it is elsewhere."""
    if not whole:
        monkeypatch.setattr(experts_module, "_MODULES_ARE_CONSTANTS", False)
    x = 3 * torch.randn(9, 16).double()

    def run(fullgraph: bool) -> torch.Tensor:
        torch.compiler.reset()
        compiled: Any = torch.compile(
            lambda x: experts_forward(own_gate, x, INDEX, WEIGHTS), fullgraph=fullgraph, backend="aot_eager"
        )
        return compiled(x)  # type: ignore[no-any-return]

    if experts_module._MODULES_ARE_CONSTANTS:
        torch.testing.assert_close(run(fullgraph=True), own_gate(x, INDEX, WEIGHTS))
        return
    with pytest.raises(Exception, match=r"GptOssExperts gates in a way of its own, .* before torch 2\.12"):
        run(fullgraph=True)
    torch.testing.assert_close(run(fullgraph=False), own_gate(x, INDEX, WEIGHTS))


def test_what_is_refused() -> None:
    bundle = limited("above")
    with pytest.raises(ValueError, match="different shape, dtype or activation cannot be stacked"):
        NeuronBundle.stack([bundle, dataclasses.replace(bundle, gating=Gate())])
    with pytest.raises(ValueError, match="there is no w_gate: a plain block has no gate"):
        dataclasses.replace(bundle, w_gate=None, b_gate=None)
    plain = random_bundle(gated=False)
    projections, _ = FusedMLP.split_bundle(plain, "folded")
    with pytest.raises(ValueError, match="a plain FFN has no gate"):
        FusedMLP(projections, "gelu", gating=bundle.gating)
    gate, up, down = torch.nn.Linear(5, 8), torch.nn.Linear(5, 8), torch.nn.Linear(8, 4)
    made = FusedGLU.from_mlp(gate, up, down, "quick_gelu", gating=bundle.gating)
    x = rows(3).float()
    g, u = gate(x).clamp(max=7), up(x).clamp(-7, 7)
    torch.testing.assert_close(made(x), down(g * torch.sigmoid(1.702 * g) * (u + 1)))
    assert "gating=Gate(limit=7.0, clamp='above', up_offset=1.0)" in repr(made)
