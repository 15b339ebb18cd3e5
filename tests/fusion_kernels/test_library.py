"""The operator registry: selection of backends, and what it says of those that are not there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fusion_kernels import BackendUnavailableError, backends, native
from fusion_kernels.activations import ACTIVATIONS, get_activation
from fusion_kernels.library import Backend, Operator

pytestmark = pytest.mark.slow


def _operator() -> Operator:
    op = Operator("double", "(Tensor x) -> Tensor")
    op.register(Backend("fast", lambda x: x * 2, ("cuda",)))
    op.register(Backend("absent", lambda x: x * 2, ("cpu",), why_not=lambda: "its library is not built: run the build"))
    op.register(Backend("reference", lambda x: x + x, ("cpu", "cuda")))
    return op


def test_auto_takes_the_first_that_can_run() -> None:
    assert _operator().select("auto", torch.device("cpu")).name == "reference"
    assert _operator().select("auto", torch.device("cuda")).name == "fast"


def test_asking_by_name() -> None:
    assert _operator().select("reference", torch.device("cuda")).name == "reference"
    with pytest.raises(BackendUnavailableError, match="its library is not built"):
        _operator().select("absent", torch.device("cpu"))
    with pytest.raises(BackendUnavailableError, match="runs on cuda, the tensor is on cpu"):
        _operator().select("fast", torch.device("cpu"))
    with pytest.raises(ValueError, match="unknown backend 'quick': use one of auto, fast, absent, reference"):
        _operator().select("quick", torch.device("cpu"))
    with pytest.raises(BackendUnavailableError, match="no backend runs on device type 'xpu'"):
        _operator().select("auto", torch.device("xpu"))


def test_backends_lists_every_operator() -> None:
    compiled = native.UNAVAILABLE is None
    assert {name: row["cpu"] for name, row in backends().items()} == {
        "experts": "loop",
        "experts_backward": "loop",
        "kmeans": "cpu" if compiled else "reference",
        "kmeans_assign": "cpu" if compiled else "reference",
        "mlp": "cpu" if compiled else "torch",
        "mlp_backward": "cpu" if compiled else "torch",
        **dict.fromkeys(("ntk_gram", "ntk_gram_out", "ntk_sums"), "cpu" if compiled else "reference"),
        **dict.fromkeys(("ntk_gradient_gram", "ntk_gradient_norms", "ntk_jvp", "ntk_vjp", "ntk_vp"), "torch"),
    }


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activation_derivatives_match_autograd(name: str) -> None:
    z = torch.linspace(-9, 9, 1801, dtype=torch.float64).requires_grad_()
    activation = ACTIVATIONS[name]
    (expected,) = torch.autograd.grad(activation.function(z).sum(), z)
    found: Tensor = activation.derivative(z.detach())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_unknown_activation() -> None:
    with pytest.raises(ValueError, match="unknown activation 'tanh': use one of gelu, gelu_tanh, relu, relu2, silu"):
        get_activation("tanh")


@pytest.mark.parametrize("newer", [False, True])
def test_products_are_exact_whatever_torch_was_told(newer: bool) -> None:
    """In a process of its own: torch refuses to mix its two interfaces."""
    allow = (
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'; torch.backends.mkldnn.matmul.fp32_precision = 'bf16'"
        if newer
        else "torch.set_float32_matmul_precision('medium')"
    )
    script = f"""
import torch
from fusion_kernels.native import exact_products
{allow}
x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
exact = x.double() @ x.double()
before = torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
assert before == ("tf32", "bf16"), before
with exact_products():
    assert float((x @ x - exact).abs().max()) < 1e-3
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"
from ffn_blocks import make_bundle
from fusion_kernels import ntk_gram
bundle, x = make_bundle(9, 200, 4).to(torch.float32), torch.randn(60, 9)
wide = ntk_gram(bundle.to(torch.float64), x.double())
for backend in ("reference", "auto"):
    assert float((ntk_gram(bundle, x, backend=backend) - wide).norm() / wide.norm()) < 1e-5, backend
assert (torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision) == before
"""
    support = str(Path(__file__).parents[1] / "support")
    subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {support!r}){script}"], check=True)
