"""On tied neurons the fused FFN follows the original's training exactly, in the parameterization that suits the
optimiser, and in no other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bundles import random_bundle, tie
from mlp_fusion.modules import FusedFFN, FusedGLU, FusedMLP
from mlp_fusion.neurons import NeuronBundle

pytestmark = pytest.mark.slow

Optimizer = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]

# Epsilon tiny, because it is the one thing in Adam that is not invariant to the scale of the gradient.
OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=2e-3, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=2e-3, eps=1e-30, weight_decay=0.1),
}
STEPS = 200


def _train(bundle: NeuronBundle, form: str, optimizer: Optimizer) -> tuple[Tensor, Tensor]:
    """Outputs on held-out rows before and after training `bundle` in `form` on a fixed task."""
    g = torch.Generator().manual_seed(7)
    x, held_out = (torch.randn(40, 5, generator=g, dtype=torch.float64) for _ in range(2))
    target = torch.randn(40, 4, generator=g, dtype=torch.float64)
    cls: type[FusedFFN] = FusedGLU if bundle.gated else FusedMLP
    module = cls.from_bundle(bundle, form)
    before = module(held_out).detach()
    steps = optimizer(list(module.parameters()))
    for _ in range(STEPS):
        steps.zero_grad()
        (module(x) - target).square().mean().backward()
        steps.step()
    return before, module(held_out).detach()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("name", "right", "wrong"), [("sgd", "split", "scaled"), ("adamw", "scaled", "split")])
def test_the_right_form_follows_the_original_and_the_wrong_one_does_not(
    gated: bool, name: str, right: str, wrong: str
) -> None:
    sizes = torch.tensor([1, 2, 3, 4, 5, 1])
    canonical = random_bundle(width=6, gated=gated, seed=3)
    tied = tie(canonical, sizes)
    fused = tied.reduce(torch.arange(6).repeat_interleave(sizes).unsqueeze(0))
    before, expected = _train(tied, "folded", OPTIMIZERS[name])
    moved = (expected - before).abs().max()
    assert moved > 0.1
    errors = {}
    for form in (right, wrong, "folded"):
        start, end = _train(fused, form, OPTIMIZERS[name])
        torch.testing.assert_close(start, before, rtol=1e-9, atol=1e-9)
        errors[form] = float((end - expected).abs().max() / moved)
    # Round-off, which Adam's division by the gradient's size amplifies.
    assert errors[right] < (1e-11 if name == "sgd" else 1e-6)
    assert errors[wrong] > 0.02
    assert errors["folded"] > 0.02
