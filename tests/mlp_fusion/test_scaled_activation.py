"""`ScaledActivation`: the scale between projections that were narrowed in place."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional as F

from bundles import random_bundle
from mlp_fusion.modules import ScaledActivation
from mlp_fusion.modules.layouts import make_projection
from mlp_fusion.neurons import NeuronBundle

FORMS = ("folded", "scaled", "split")


class FFN(nn.Module):
    """An FFN as models write them: projections and an activation of its own, gated or not."""

    def __init__(self, bundle: NeuronBundle, form: str) -> None:
        super().__init__()
        b = bundle.parameterized(form)
        self.up = make_projection(b.w_in[0], None if b.b_in is None else b.b_in[0], nn.Linear)
        self.down = make_projection(b.w_out[0].T, None if b.b_out is None else b.b_out[0], nn.Linear)
        self.gate = None
        if b.w_gate is not None:
            self.gate = make_projection(b.w_gate[0], None if b.b_gate is None else b.b_gate[0], nn.Linear)
        scale = None if b.scale is None else b.scale[0].clone()
        self.act = ScaledActivation(nn.GELU(), scale, form, gated=b.w_gate is not None)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(self.act(self.up(x)))
        return self.down(self.act(self.gate(x)) * self.up(x))


def bundle(gated: bool, dtype: torch.dtype = torch.float32, seed: int = 0) -> NeuronBundle:
    return random_bundle(width=17, gated=gated, scale=True, dtype=dtype, seed=seed)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gated", [False, True])
def test_it_computes_the_bundle_in_every_form(gated: bool, form: str) -> None:
    exact = bundle(gated, dtype=torch.float64)
    ffn = FFN(exact, form).double()
    x = torch.randn(5, ffn.up.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ffn(x), exact.forward(x)[0], rtol=1e-10, atol=1e-10)
    names = {name for name in ffn.state_dict() if name.startswith("act.")}
    assert names == (set() if form == "folded" else {"act.scale"})


@pytest.mark.parametrize("form", ["scaled", "split"])
@pytest.mark.parametrize("gated", [False, True])
def test_tied_neurons_train_as_in_the_wide_model(gated: bool, form: str) -> None:
    """After a step of sign descent (scaled) or gradient descent (split), outputs are those of the tied model."""
    narrow = random_bundle(width=6, gated=gated, scale=False, dtype=torch.float64)
    labels = torch.arange(18) % 6
    wide = NeuronBundle.stack([narrow])
    picked = {
        name: None if (t := getattr(wide, name)) is None else t[:, labels]
        for name in ("w_in", "b_in", "w_out", "w_gate", "b_gate")
    }
    tied = NeuronBundle(**picked, b_out=wide.b_out, activation="gelu")  # type: ignore[arg-type]
    fused = tied.reduce(labels[None])
    models = [FFN(tied, "folded").double(), FFN(fused, form).double()]
    x = torch.randn(9, models[0].up.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for model in models:
        model(x).square().sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                step = parameter.grad.sign() if form == "scaled" else parameter.grad  # type: ignore[union-attr]
                parameter -= 1e-3 * step
    torch.testing.assert_close(models[1](x), models[0](x), rtol=1e-8, atol=1e-8)


class ScaledInput(nn.Linear):
    """The other place that a scale could have: inside the output projection."""

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: Tensor) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=bias is not None)
        self.weight = nn.Parameter(weight.clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x * self.scale, self.weight, self.bias)  # type: ignore[operator]


def _with_adapters(model: nn.Module, targets: list[str]) -> tuple[Any, Any]:
    config = LoraConfig(r=3, target_modules=targets, init_lora_weights=False)
    adapted = inject_adapter_in_model(config, model)
    layers = [module for module in adapted.modules() if hasattr(module, "merge") and hasattr(module, "unmerge")]
    return adapted, layers


@pytest.mark.parametrize("form", ["scaled", "split"])
@pytest.mark.parametrize("gated", [False, True])
def test_adapters_merge_into_what_they_were_trained_as(gated: bool, form: str) -> None:
    """With the scale in the activation, and not with a scale in the projection: that is why it lies here."""
    exact = bundle(gated)
    x = torch.randn(7, exact.w_in.shape[-1], generator=torch.Generator().manual_seed(2))
    torch.manual_seed(3)
    adapted, layers = _with_adapters(FFN(exact, form), ["up", "down", *(["gate"] if gated else [])])
    before = adapted(x)
    for layer in layers:
        layer.merge()
    torch.testing.assert_close(adapted(x), before, rtol=1e-4, atol=1e-4)

    other = FFN(exact, "folded")
    plain = exact.parameterized("scaled")
    assert plain.scale is not None
    other.down = ScaledInput(plain.w_out[0].T, other.down.bias, plain.scale[0])
    other.up, other.gate = FFN(plain, "scaled").up, FFN(plain, "scaled").gate
    torch.testing.assert_close(other(x), exact.forward(x)[0], rtol=1e-4, atol=1e-4)
    adapted, layers = _with_adapters(other, ["down"])
    before = adapted(x)
    for layer in layers:
        layer.merge()
    assert float((adapted(x) - before).detach().abs().max()) > 1e-2


def test_it_stands_in_models_that_keep_no_ffn_module() -> None:
    """OPT: both projections and the activation lie in the layer itself."""
    sizes = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
    torch.manual_seed(0)
    model = transformers.OPTModel(transformers.OPTConfig(**sizes, word_embed_proj_dim=16)).eval()
    tied = copy.deepcopy(model)
    labels = torch.arange(24) % 8
    counts = torch.full((8,), 3)
    for wide, narrow in zip(tied.decoder.layers, model.decoder.layers, strict=True):
        with torch.no_grad():
            w_in, b_in, w_out = narrow.fc1.weight[:8], narrow.fc1.bias[:8], narrow.fc2.weight[:, :8]
            wide.fc1.weight.copy_(w_in[labels])
            wide.fc1.bias.copy_(b_in[labels])
            wide.fc2.weight.copy_(w_out[:, labels])
            for projection, weight in ((narrow.fc1, w_in), (narrow.fc2, w_out)):
                projection.weight = nn.Parameter(weight.clone())
            narrow.fc1.bias = nn.Parameter(b_in.clone())
        narrow.activation_fn = ScaledActivation(narrow.activation_fn, counts, "scaled")
    ids = torch.arange(12).reshape(2, 6)
    torch.testing.assert_close(model(ids).last_hidden_state, tied(ids).last_hidden_state, rtol=1e-4, atol=1e-5)
    assert set(model.state_dict()) - set(tied.state_dict()) == {
        f"decoder.layers.{n}.activation_fn.scale" for n in range(2)
    }


def test_casts_copies_states_and_compilation() -> None:
    ffn = FFN(bundle(True), "split")
    half = copy.deepcopy(ffn).to(torch.bfloat16)
    assert half.act.scale is not None
    assert half.act.scale.dtype == torch.float32
    x = torch.randn(4, ffn.up.in_features, generator=torch.Generator().manual_seed(4))
    assert half(x.bfloat16()).dtype == torch.bfloat16
    again = FFN(bundle(True, seed=5), "split")
    again.load_state_dict(ffn.state_dict())
    assert torch.equal(again(x), ffn(x))
    compiled = torch.compile(ffn, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), ffn(x))
    with pytest.raises(ValueError, match="this module has no scale"):
        FFN(bundle(True), "folded").load_state_dict(ffn.state_dict())


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="PReLU has weights of its own"):
        ScaledActivation(nn.PReLU(), None, "folded")
    with pytest.raises(ValueError, match="a folded module has its scale inside"):
        ScaledActivation(nn.GELU(), torch.ones(3), "folded")
    with pytest.raises(ValueError, match="unknown parameterization"):
        ScaledActivation(nn.GELU(), None, "half")
    plain = ScaledActivation(torch.relu, None, "folded")  # a function, as some models have it
    assert torch.equal(plain(torch.tensor([-1.0, 2.0])), torch.tensor([0.0, 2.0]))
