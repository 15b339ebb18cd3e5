"""`ScaledWeights`: the same outputs and gradients as the folded module, in every form; and a module's habits."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from bundles import random_bundle
from mlp_fusion.modules import ScaledWeights
from mlp_fusion.modules.scaled_weights import exponents, power
from mlp_fusion.modules.stored import Projection, bundle_of, tensors_of
from mlp_fusion.neurons import SCALE_EXPONENTS, NeuronBundle

D, EXPERTS = 8, 3
FORMS = ("scaled", "split")


class Stack(nn.Module):
    """Experts that are called with all their tokens at once; gate and up in turns."""

    def __init__(self, neurons: int) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.gate_up = nn.Parameter(torch.zeros(EXPERTS, D, 2 * neurons))
        self.gate_up_bias = nn.Parameter(torch.zeros(EXPERTS, 2 * neurons))
        self.down = nn.Parameter(torch.zeros(EXPERTS, neurons, D))
        self.act = nn.SiLU()
        self.register_buffer("weights", torch.ones(EXPERTS), persistent=False)

    def forward(self, x: Tensor, *, times: float = 1.0) -> Tensor:
        z = torch.einsum("td,edn->etn", x, self.gate_up) + self.gate_up_bias[:, None]
        hidden = self.act(z[..., ::2]) * z[..., 1::2]
        if self.training:
            hidden = hidden * 0.5
        return times * torch.einsum("etn,end,e->td", hidden, self.down, self.weights)


PROJECTIONS = (
    Projection("gate_up", "w_gate", "even", 2, 0, "gate_up_bias"),
    Projection("gate_up", "w_in", "odd", 2, 0, "gate_up_bias"),
    Projection("down", "w_out", "whole", 1, 0),
)


def stack_of(bundle: NeuronBundle) -> Stack:
    module = Stack(bundle.width).to(bundle.w_in.dtype)
    names = dict(module.named_parameters())
    for name, tensor in tensors_of(bundle, PROJECTIONS, names).items():
        setattr(module, name, nn.Parameter(tensor))
    return module.eval()


def experts(neurons: int, form: str, dtype: torch.dtype = torch.float64) -> tuple[ScaledWeights, Stack, NeuronBundle]:
    """A stack in a form, and the folded one."""
    bundle = random_bundle(EXPERTS, neurons, D, D, gated=True, scale=True, activation="silu", dtype=dtype)
    bundle = dataclasses.replace(bundle, b_out=None)
    own = bundle.parameterized(form)  # type: ignore[arg-type]
    scaled = ScaledWeights(stack_of(own), PROJECTIONS, own.scale, form, gated=True)
    return scaled, stack_of(bundle.parameterized("folded")), bundle


@pytest.mark.parametrize("neurons", [1, 17, 123])
@pytest.mark.parametrize("form", FORMS)
def test_outputs_and_gradients_are_those_of_the_folded_stack(neurons: int, form: str) -> None:
    scaled, folded, bundle = experts(neurons, form)
    assert bundle.scale is not None
    ours = torch.randn(5, D, dtype=torch.float64, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    y, expected = scaled(ours, times=2.0), folded(theirs, times=2.0)
    torch.testing.assert_close(y, expected)
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    a = SCALE_EXPONENTS[form]
    # w = p^a w': the gradient of the stored weight carries the power that leads to the folded one.
    two = bundle.scale[:, None, :].repeat_interleave(2, -1)
    pairs = {
        "gate_up": two ** -a, "gate_up_bias": two[:, 0] ** -a, "down": bundle.scale[:, :, None] ** (1 - a),
    }  # fmt: skip
    for name, factor in pairs.items():
        torch.testing.assert_close(scaled.get_parameter(name).grad, folded.get_parameter(name).grad * factor)
    read = bundle_of(dict(scaled.named_parameters()), PROJECTIONS, "silu", experts=EXPERTS, scale=scaled.scale,
                     scale_exponent=scaled.scale_exponent)  # fmt: skip
    one = ours.detach()
    wanted = sum(bundle.select(e).forward(one)[0] for e in range(EXPERTS))
    torch.testing.assert_close(sum(read.select(e).forward(one)[0] for e in range(EXPERTS)), wanted)
    torch.testing.assert_close(scaled(one), wanted)


@pytest.mark.parametrize("make", [lambda: nn.Linear(17, 4), lambda: Conv1D(4, 17), lambda: nn.Conv1d(17, 4, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_projections_of_every_class(make: Any, bias: bool) -> None:
    down, scale = make(), torch.randint(1, 6, (17,))
    axis = 0 if isinstance(down, Conv1D) else 1
    projection = Projection("weight", "w_out", "whole", axis, bias="bias" if bias else None)
    x = torch.randn(2, 17, 5) if isinstance(down, nn.Conv1d) else torch.randn(2, 17)
    expected = down(x * (scale[:, None] if x.ndim == 3 else scale))
    scaled = ScaledWeights(down, [projection], scale, "scaled")
    torch.testing.assert_close(scaled(x), expected)
    assert scaled.weight is down.weight
    plain = make()
    none = ScaledWeights(plain, [projection], None, "folded")
    assert torch.equal(none(x), plain(x))
    assert sorted(none.state_dict()) == ["bias", "weight"]
    # What code around asks of such a layer.
    for name in ("in_features", "out_features", "nf", "kernel_size"):
        assert getattr(scaled, name, None) == vars(down).get(name)


@pytest.mark.parametrize("form", FORMS)
def test_copies_pickles_and_states(form: str) -> None:
    scaled, folded, _ = experts(17, form)
    x = torch.randn(4, D, dtype=torch.float64)
    assert sorted(scaled.state_dict()) == ["down", "gate_up", "gate_up_bias", "scale"]
    assert [name for name, _ in scaled.named_parameters()] == [name for name, _ in folded.named_parameters()]
    assert scaled.num_experts == EXPERTS
    expected = scaled(x)
    buffer = io.BytesIO()
    torch.save(scaled, buffer)
    buffer.seek(0)
    others = [copy.deepcopy(scaled), pickle.loads(pickle.dumps(scaled)), torch.load(buffer, weights_only=False)]
    fresh, _, _ = experts(17, form)
    with torch.no_grad():
        for tensor in fresh.state_dict().values():
            tensor.zero_()
    fresh.load_state_dict(scaled.state_dict())
    for other in (*others, fresh):
        torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
        with torch.no_grad():
            other.down.mul_(2.0)
        torch.testing.assert_close(other(x), 2.0 * expected)
        torch.testing.assert_close(scaled(x), expected, rtol=0, atol=0)
        # Modules inside are the copy's own.
        other.act = nn.Identity()
        assert not torch.allclose(other(x), 2.0 * expected)
        assert isinstance(scaled.act, nn.SiLU)


def test_modes_and_dtypes() -> None:
    scaled, folded, _ = experts(17, "scaled", torch.float32)
    x = torch.randn(4, D)
    scaled.train()
    folded.train()
    assert scaled.act.training
    torch.testing.assert_close(scaled(x), folded(x))
    torch.testing.assert_close(scaled.eval()(x), folded.eval()(x))
    half = copy.deepcopy(scaled).to(torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.scale is not None
    assert half.scale.dtype == torch.float32
    assert half.weights.dtype == torch.bfloat16
    y = half(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), folded(x), rtol=0.05, atol=0.05 * float(folded(x).detach().abs().max()))
    assert scaled.to("meta")(x.to("meta")).shape == (4, D)


def test_a_trained_scale_and_parametrisations_take_part() -> None:
    scaled, folded, bundle = experts(17, "scaled")
    x = torch.randn(4, D, dtype=torch.float64)
    assert bundle.scale is not None
    trained = ScaledWeights(
        stack_of(bundle.parameterized("scaled")), PROJECTIONS, nn.Parameter(-bundle.scale), "scaled", gated=True
    )
    torch.testing.assert_close(trained(x), -folded(x))
    trained(x).sum().backward()
    assert trained.scale is not None
    assert trained.scale.grad is not None
    assert trained.scale.grad.abs().min() > 0

    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2.0 * weight

    parametrize.register_parametrization(scaled, "down", Doubled())
    torch.testing.assert_close(scaled(x), 2.0 * folded(x))


@pytest.mark.parametrize("form", FORMS)
def test_replicas_use_their_own_tensors(form: str) -> None:
    """As `torch.nn.DataParallel` makes them: shallow copies whose tensors are set as attributes."""
    scaled, folded, _ = experts(17, form)
    x = torch.randn(4, D, dtype=torch.float64)
    replica = scaled._replicate_for_data_parallel()
    for name, tensor in (*scaled.named_parameters(), *scaled.named_buffers()):
        setattr(replica, name, 3.0 * tensor if name == "down" else tensor)
    replica.act = scaled.act._replicate_for_data_parallel()
    assert replica._inner[0] is not scaled._inner[0]
    torch.testing.assert_close(replica(x), 3.0 * folded(x))
    torch.testing.assert_close(scaled(x), folded(x))


def test_what_there_is_not_is_an_attribute_error() -> None:
    scaled, _, _ = experts(1, "scaled")
    for name in ("absent", "_private", "in_features"):
        with pytest.raises(AttributeError, match=name):
            getattr(scaled, name)
    with pytest.raises(ValueError, match="folded module has its scale inside"):
        ScaledWeights(nn.Linear(2, 2), [Projection("weight", "w_out", "whole", 1)], torch.ones(2), "folded")


def test_powers_of_a_scale() -> None:
    scale = torch.tensor([0.0, 4.0, -2.0])
    assert power(scale, 1.0).tolist() == [0.0, 4.0, -2.0]
    assert power(scale, -1.0).tolist() == [0.0, 0.25, -0.5]
    assert power(scale[:2], -0.5).tolist() == [0.0, 0.5]
    assert exponents(PROJECTIONS, 0.0, 1.0) == {"down": 1.0}
    assert exponents(PROJECTIONS, -0.5, 0.5) == {"gate_up": -0.5, "gate_up_bias": -0.5, "down": 0.5}
