"""The operator registry: selection of backends, and what it says of those that are not there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fusion_kernels import BackendUnavailableError, backends, gpu, library, native
from fusion_kernels.activations import ACTIVATIONS, get_activation
from fusion_kernels.library import Backend, Operator

pytestmark = pytest.mark.slow


def _operator() -> Operator:
    op = Operator("double", "(Tensor x) -> Tensor")
    op.register(Backend("fast", lambda x: x * 2, ("cuda",)))
    op.register(Backend("absent", lambda x: x * 2, ("cpu",), why_not=lambda _: "its library is not built: build it"))
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


class _Picky(NamedTuple):
    """Options of an operator, of which one backend does not know `weighted`."""

    weighted: bool


def _picky() -> Operator:
    op = Operator("sum", "(Tensor x, bool weighted) -> Tensor", options=lambda x, weighted: _Picky(weighted))
    lacks = "it has no weights: use backend='reference'"
    op.register(Backend("fast", lambda *_: "fast", ("cpu",), takes=lambda options: lacks if options.weighted else None))
    op.register(Backend("reference", lambda *_: "reference", ("cpu", "cuda")))
    return op


def test_a_backend_may_decline_options() -> None:
    op, cpu, x = _picky(), torch.device("cpu"), torch.zeros(1)
    assert op.select("auto", cpu).name == op.select("auto", cpu, _Picky(False)).name == "fast"
    assert op.select("auto", cpu, _Picky(True)).name == "reference"
    assert op.select("fast", cpu, _Picky(False)).name == "fast"
    reason = "sum: backend 'fast': it has no weights: use backend='reference'"
    with pytest.raises(BackendUnavailableError, match=reason):
        op.select("fast", cpu, _Picky(True))
    assert op.chosen(x, False).name == op.direct(x, False) == op.function("fast", x, False)() == "fast"
    assert op.chosen(x, True).name == op.direct(x, True) == "reference"
    with pytest.raises(BackendUnavailableError, match=reason):
        op.function("fast", x, True)


def test_where_all_decline_each_says_why() -> None:
    op = _picky()
    op.backends.pop()
    op.register(Backend("absent", lambda *_: "absent", ("cpu",), why_not=lambda _: "it is not built"))
    op.register(Backend("elsewhere", lambda *_: "elsewhere", ("cuda",)))
    message = (
        r"sum: no backend runs on device type 'cpu' here with these options: "
        r"fast: it has no weights: use backend='reference'; absent: it is not built$"
    )
    with pytest.raises(BackendUnavailableError, match=message):
        op.select("auto", torch.device("cpu"), _Picky(True))


def test_what_is_missing_comes_before_what_is_declined() -> None:
    backend = Backend("b", lambda: None, ("cuda",), lambda _: "it is not built", lambda _: "it has no weights")
    assert backend.refuses(torch.device("cpu"), _Picky(True)) == "it is not built"
    there = replace(backend, why_not=lambda _: None)
    assert there.refuses(torch.device("cpu"), _Picky(True)) == "runs on cuda, the tensor is on cpu"
    assert there.refuses(torch.device("cuda"), _Picky(True)) == "it has no weights"
    assert there.refuses(torch.device("cuda"), None) is None


def test_backends_says_what_is_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    op = _picky()
    op.variants = (_Picky(False), _Picky(True), _Picky(True))
    monkeypatch.setattr(library, "_OPERATORS", {"sum": op})
    row = backends()["sum"]
    assert row["cpu"] == "fast"
    assert row["fast declines"] == "it has no weights: use backend='reference'"
    assert "reference declines" not in row


def test_a_name_becomes_a_member() -> None:
    class Colour(Enum):
        RED = "red"
        BLUE = "blue"

    assert library.member("colour", "red", Colour) is library.member("colour", Colour.RED, Colour) is Colour.RED
    for unknown in ("green", "RED", None, 1):
        with pytest.raises(ValueError, match=f"unknown colour '{unknown}': use one of red, blue"):
            library.member("colour", unknown, Colour)  # type: ignore[arg-type]


def test_a_table_has_an_entry_for_a_member_or_raises() -> None:
    Size = Enum("Size", {"SMALL": "small", "LARGE": "large"})
    assert library.by_member({Size.SMALL: 1}, Size.SMALL) == 1
    with pytest.raises(ValueError, match="no Size 'large' here: use one of 'small'"):
        library.by_member({Size.SMALL: 1}, Size.LARGE)


def test_backends_lists_every_operator() -> None:
    compiled = native.UNAVAILABLE is None
    assert {name: row["cpu"] for name, row in backends().items()} == {
        "experts": "loop",
        "experts_backward": "loop",
        **dict.fromkeys(("fastfood", "fastfood_transposed", "hadamard"), "cpu" if compiled else "reference"),
        "kmeans": "cpu" if compiled else "reference",
        "kmeans_assign": "cpu" if compiled else "reference",
        "mlp": "cpu" if compiled else "torch",
        "mlp_backward": "cpu" if compiled else "torch",
        "sampled_product": "cpu" if compiled else "torch",
        **dict.fromkeys(("ntk_gram", "ntk_gram_out", "ntk_sums"), "cpu" if compiled else "reference"),
        **dict.fromkeys(("ntk_gradient_gram", "ntk_gradient_norms", "ntk_jvp", "ntk_vjp", "ntk_vp"), "torch"),
    }


class _Kernel:
    """What a launch sees of a Triton kernel."""

    arg_names = ("x_ptr", "y_ptr", "N", "BLOCK")

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def run(
            x_ptr: object, y_ptr: object, N: int, BLOCK: int, num_warps: int = 4, enable_fp_fusion: bool = False
        ) -> None:
            self.launched = (grid, x_ptr, y_ptr, N, BLOCK, num_warps)
            self.fuses = enable_fp_fusion

        return run


def test_a_launch_is_by_the_names_of_the_parameters() -> None:
    x, y = torch.zeros(1), torch.ones(1)
    shared = gpu.pointers(SimpleNamespace(x=y, y=y, z=y, size=3), SimpleNamespace(x=x)) | {"N": 5, "K": 6}
    assert sorted(shared) == ["K", "N", "x_ptr", "y_ptr", "z_ptr"]
    kernel = _Kernel()
    gpu.launch(kernel, 7, shared, N=9, BLOCK=16, num_warps=8)
    assert kernel.launched == ((7,), x, y, 9, 16, 8)
    # A multiply and an add as one instruction, whatever is Triton's default.
    assert kernel.fuses
    with pytest.raises(TypeError, match="BLOCK"):
        gpu.launch(kernel, 7, shared)
    with pytest.raises(TypeError, match="block"):
        gpu.launch(kernel, 7, shared, BLOCK=16, block=16)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activation_derivatives_match_autograd(name: str) -> None:
    z = torch.linspace(-9, 9, 1801, dtype=torch.float64).requires_grad_()
    activation = ACTIVATIONS[name]
    (expected,) = torch.autograd.grad(activation.function(z).sum(), z)
    found: Tensor = activation.derivative(z.detach())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_unknown_activation() -> None:
    known = "gelu, gelu_tanh, quick_gelu, relu, relu2, silu"
    with pytest.raises(ValueError, match=f"unknown activation 'tanh': use one of {known}$"):
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
