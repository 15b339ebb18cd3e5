"""`ntk_gram` against Jacobians from torch.func in float64, and the identities of cluster sizes that it must keep."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import ntk_rounding
import pytest
import torch
from ffn_blocks import ACTIVATIONS, KERNELS, Bundle, forward, jacobian_grams, make_bundle
from rounding import Arithmetic, assert_rounding
from torch import Tensor, nn

from fusion_kernels.library import BackendUnavailableError
from fusion_kernels.ntk import Kernel, jvp, ntk_gram
from fusion_kernels.ntk import gram as ntk_module


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def assert_matches_jacobians(bundle: Bundle, x1: Tensor, x2: Tensor | None) -> None:
    for kernel in KERNELS:
        expected = jacobian_grams(bundle, x1, x1 if x2 is None else x2, kernel)
        for part, gram in expected.items():
            torch.testing.assert_close(
                ntk_gram(bundle, x1, x2, params=(part,), kernel=kernel), gram, rtol=1e-9, atol=1e-11
            )
        total = sum(expected.values(), torch.zeros(()))
        torch.testing.assert_close(ntk_gram(bundle, x1, x2, kernel=kernel), total, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(("scale", "scale_exponent"), [(False, 0.0), (True, 0.0), (True, 0.5), (True, 0.3)])
def test_every_part_matches_numeric_jacobians(activation: str, gated: bool, scale: bool, scale_exponent: float) -> None:
    bundle = make_bundle(17, 13, 5, gated=gated, scale=scale, scale_exponent=scale_exponent, activation=activation)
    x1, x2 = torch.randn(7, 17).double(), torch.randn(5, 17).double()
    assert_matches_jacobians(bundle, x1, x2)
    assert_matches_jacobians(bundle, x1, None)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "d", "neurons", "outputs"),
    [(1, 1, 1, 1), (17, 33, 123, 5), (1, 33, 17, 1), (17, 1, 17, 5), (17, 17, 1, 1), (1, 17, 123, 5)],
)
def test_odd_shapes(gated: bool, bias: bool, rows: int, d: int, neurons: int, outputs: int) -> None:
    bundle = make_bundle(d, neurons, outputs, gated=gated, bias=bias, scale=True, scale_exponent=0.5)
    assert_matches_jacobians(bundle, torch.randn(rows, d).double(), torch.randn(3, d).double())


@pytest.mark.parametrize("missing", ["b_in", "b_gate", "b_out"])
def test_each_bias_may_be_missing_alone(missing: str) -> None:
    changes: dict[str, Any] = {missing: None}
    bundle = replace(make_bundle(5, 6, 3, gated=True, scale=True, scale_exponent=0.5), **changes)
    assert_matches_jacobians(bundle, torch.randn(4, 5).double(), None)


def test_a_subset_of_parts_is_the_sum_of_its_members() -> None:
    bundle = make_bundle(9, 11, 4, gated=True)
    x = torch.randn(6, 9).double()
    expected = jacobian_grams(bundle, x, x, "gd")
    torch.testing.assert_close(ntk_gram(bundle, x, params=["w_in", "w_gate"]), expected["w_in"] + expected["w_gate"])
    torch.testing.assert_close(
        ntk_gram(bundle, x, params=["b_gate", "w_gate"]), expected["b_gate"] + expected["w_gate"]
    )
    torch.testing.assert_close(ntk_gram(bundle, x, params="w_out"), expected["w_out"])
    assert torch.equal(ntk_gram(bundle, x, params=("b_out", "b_out")), torch.full((6, 6), 4.0).double())


def test_by_default_the_parts_a_block_trains_count() -> None:
    bundle = make_bundle(9, 11, 4)

    class Module:
        def as_bundle(self) -> Bundle:
            return bundle

        def trainable_parts(self) -> tuple[str, ...]:
            return ("b_in", "w_out")

    x = torch.randn(6, 9).double()
    assert torch.equal(ntk_gram(Module(), x), ntk_gram(bundle, x, params=("w_out", "b_in")))
    assert torch.equal(ntk_gram(Module(), x, params="w_in"), ntk_gram(bundle, x, params="w_in"))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(("rows1", "rows2"), [(0, None), (0, 4), (4, 0)])
def test_no_rows(kernel: Kernel, gated: bool, rows1: int, rows2: int | None) -> None:
    x2 = None if rows2 is None else torch.randn(rows2, 5)
    gram = ntk_gram(make_bundle(5, 6, 3, gated=gated).to(torch.float32), torch.randn(rows1, 5), x2, kernel=kernel)
    assert gram.shape == (rows1, rows1 if rows2 is None else rows2)
    assert gram.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_gd_is_symmetric_to_the_bit_and_positive_semidefinite(dtype: torch.dtype, gated: bool) -> None:
    bundle = make_bundle(33, 123, 5, gated=gated, scale=True, scale_exponent=0.5).to(dtype)
    # More rows than the kernel of one part can have rank, so that some eigenvalues are zero.
    x = torch.randn(171, 33).to(dtype)
    for params in (None, "w_out", "b_in"):
        gram = ntk_gram(bundle, x, params=params)
        assert torch.equal(gram, gram.T)
        eigenvalues = torch.linalg.eigvalsh(gram.double())
        assert eigenvalues[-1] > 0
        assert eigenvalues[0] >= -100 * torch.finfo(dtype).eps * eigenvalues[-1]


def test_sign_is_not_symmetric() -> None:
    gram = ntk_gram(make_bundle(9, 11, 4), torch.randn(6, 9).double(), kernel="sign")
    assert not torch.allclose(gram, gram.T)


def layerwise_gram(bundle: Bundle, x1: Tensor, x2: Tensor, kernel: Kernel) -> Tensor:
    """The whole kernel as torch code composes it: per layer and output, the Gram of inputs times that of gradients."""
    parts = bundle.parts()
    j1 = torch.func.jacrev(lambda theta: forward(bundle, theta, x1))(parts)
    j2 = torch.func.jacrev(lambda theta: forward(bundle, theta, x2))(parts)
    if kernel == "sign":
        j2 = {name: j.sign() for name, j in j2.items()}
    n_outputs = j1["b_out"].shape[1]
    gram = n_outputs * (1 + j1["w_out"][:, 0, :, 0] @ j2["w_out"][:, 0, :, 0].T)
    over_inputs = 1 + x1 @ (x2 if kernel == "gd" else x2.sign()).T
    for bias in [name for name in ("b_in", "b_gate") if name in parts]:
        gram += sum(over_inputs * (j1[bias][:, o] @ j2[bias][:, o].T) for o in range(n_outputs))
    return gram


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_float32_error_is_that_of_torch(kernel: Kernel, gated: bool) -> None:
    bundle = make_bundle(33, 123, 5, gated=gated, scale=True, scale_exponent=0.5).to(torch.float32)
    x1, x2 = torch.randn(17, 33), torch.randn(19, 33)
    exact = layerwise_gram(bundle.to(torch.float64), x1.double(), x2.double(), kernel)
    gram = ntk_gram(bundle, x1, x2, kernel=kernel)
    assert gram.dtype == torch.float32
    bound = ntk_rounding.gram(Arithmetic(torch.float32), bundle, x1, x2, kernel=kernel)
    assert_rounding({"K": gram}, {"K": exact}, {"K": bound}, {"K": layerwise_gram(bundle, x1, x2, kernel)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    bundle = make_bundle(17, 23, 3, gated=True, scale=True, scale_exponent=0.5).to(dtype)
    x = torch.randn(9, 17).to(dtype)
    gram = ntk_gram(bundle, x)
    assert gram.dtype == torch.float32
    assert torch.equal(gram, ntk_gram(bundle.to(torch.float32), x.float()))


def test_the_widest_dtype_decides() -> None:
    bundle = make_bundle(5, 6, 3)
    x = torch.randn(4, 5)
    assert torch.equal(ntk_gram(bundle, x), ntk_gram(bundle, x.double()))
    assert torch.equal(
        ntk_gram(bundle.to(torch.float32), x.double()), ntk_gram(bundle.to(torch.float32).to(torch.float64), x)
    )


def test_integer_scale() -> None:
    bundle = make_bundle(5, 6, 3, scale=True, scale_exponent=0.5)
    x = torch.randn(4, 5).double()
    assert bundle.scale is not None
    assert torch.equal(ntk_gram(replace(bundle, scale=bundle.scale.long()), x), ntk_gram(bundle, x))


def test_autocast_does_not_lower_the_precision() -> None:
    bundle = make_bundle(17, 23, 3).to(torch.float32)
    x = torch.randn(9, 17)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gram = ntk_gram(bundle, x)
    assert torch.equal(gram, ntk_gram(bundle, x))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_parameters_that_require_grad_are_detached(backend: str) -> None:
    bundle = make_bundle(5, 6, 3)
    x = torch.randn(4, 5).double()
    trained = replace(bundle, w_in=bundle.w_in.clone().requires_grad_())
    gram = ntk_gram(trained, x.clone().requires_grad_(), backend=backend)
    assert not gram.requires_grad
    assert torch.equal(gram, ntk_gram(bundle, x, backend=backend))


def test_strided_inputs() -> None:
    bundle = make_bundle(5, 6, 3)
    x = torch.randn(8, 10).double()
    strided = replace(bundle, w_in=bundle.w_in.mT.contiguous().mT, w_out=bundle.w_out.mT.contiguous().mT)
    torch.testing.assert_close(ntk_gram(strided, x[::2, ::2]), ntk_gram(bundle, x[::2, ::2].contiguous()))


# The power of the cluster size p that weighs a cluster in the kernel, for (the input-side parts, the output weights).
# The original block, whose neurons are tied, has p in both; a form that shows (1, 1) trains as the original does.
FORMS = {
    ("explicit", "gd"): (2.0, 2.0),
    ("folded", "gd"): (2.0, 0.0),
    ("split", "gd"): (1.0, 1.0),
    ("explicit", "sign"): (1.0, 1.0),
    ("folded", "sign"): (1.0, 0.0),
    ("split", "sign"): (0.5, 0.5),
}


def fuse_tied(clusters: Bundle, sizes: Tensor, form: str) -> Bundle:
    """One neuron per cluster of `sizes` copies of the neurons of `clusters`, with p where `form` keeps it."""
    p = sizes.double()[None]
    if form == "folded":
        return replace(clusters, w_out=clusters.w_out * p[..., None])
    a = {"explicit": 0.0, "split": 0.5}[form]
    names = ("w_in", "w_gate", "b_in", "b_gate", "w_out")
    stored = {
        n: t * (p**a if t.ndim == 2 else p[..., None] ** a) for n in names if (t := getattr(clusters, n)) is not None
    }
    return replace(clusters, **stored, scale=p, scale_exponent=a)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(("form", "kernel"), FORMS)
def test_how_each_form_weighs_clusters_of_tied_neurons(activation: str, gated: bool, form: str, kernel: Kernel) -> None:
    clusters = make_bundle(9, 6, 4, gated=gated, activation=activation)
    sizes = torch.tensor([1, 2, 3, 5, 8, 40])
    x1, x2 = torch.randn(7, 9).double(), torch.randn(5, 9).double()
    names = ("w_in", "w_gate", "b_in", "b_gate", "w_out")
    copies = {n: t.repeat_interleave(sizes, dim=1) for n in names if (t := getattr(clusters, n)) is not None}
    tied = replace(clusters, **copies)
    fused = fuse_tied(clusters, sizes, form)
    torch.testing.assert_close(forward(fused, fused.parts(), x1), forward(tied, tied.parts(), x1))

    power_in, power_out = FORMS[form, kernel]
    for part in clusters.parts():
        if part == "b_out":
            continue
        one_neuron = {n: t for n in names if (t := getattr(clusters, n)) is not None}
        shares = torch.stack(
            [
                ntk_gram(
                    replace(clusters, **{n: t[:, j : j + 1] for n, t in one_neuron.items()}),
                    x1,
                    x2,
                    params=part,
                    kernel=kernel,
                )
                for j in range(len(sizes))
            ]
        )
        p = sizes.double()[:, None, None]
        expected = (p ** (power_out if part == "w_out" else power_in) * shares).sum(0)
        torch.testing.assert_close(ntk_gram(fused, x1, x2, params=part, kernel=kernel), expected)
        torch.testing.assert_close(ntk_gram(tied, x1, x2, params=part, kernel=kernel), (p * shares).sum(0))
    same = torch.allclose(ntk_gram(fused, x1, x2, kernel=kernel), ntk_gram(tied, x1, x2, kernel=kernel))
    assert same == ((power_in, power_out) == (1.0, 1.0))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_an_empty_cluster_is_a_silent_neuron(kernel: Kernel, gated: bool) -> None:
    bundle = make_bundle(5, 6, 3, gated=gated, scale=True, scale_exponent=0.5)
    x = torch.randn(4, 5, dtype=torch.float64)
    keep = torch.arange(6) != 2
    neuron_axis = [n for n in ("w_in", "w_gate", "b_in", "b_gate", "w_out", "scale") if getattr(bundle, n) is not None]
    without = replace(bundle, **{n: getattr(bundle, n)[:, keep] for n in neuron_axis})
    scale = bundle.scale
    assert scale is not None
    silent = replace(bundle, scale=torch.where(keep, scale, torch.zeros_like(scale)))
    torch.testing.assert_close(ntk_gram(silent, x, kernel=kernel), ntk_gram(without, x, kernel=kernel))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x1": torch.randn(4, 6)}, "x1 must be (N, 5)"),
        ({"x1": torch.randn(5)}, "x1 must be (N, 5)"),
        ({"x1": torch.randn(1, 4, 5)}, "x1 must be (N, 5)"),
        ({"x2": torch.randn(4, 6)}, "x2 must be (N, 5)"),
        ({"x1": torch.ones(4, 5, dtype=torch.int64)}, "x1 must have a floating-point dtype"),
        ({"x2": torch.ones(4, 5, dtype=torch.complex64)}, "x2 must have a floating-point dtype"),
        ({"x2": torch.ones(4, 5, device="meta")}, "x2 is on meta"),
        ({"w_out": torch.ones(1, 6, 3, dtype=torch.int32)}, "w_out must have a floating-point dtype"),
        ({"w_in": torch.randn(6, 5)}, "w_in must be (1, neurons, d)"),
        ({"w_in": torch.randn(2, 6, 5)}, "batch of 2"),
        ({"w_in": torch.randn(0, 6, 5)}, "batch of 0"),
        ({"w_out": torch.randn(1, 7, 3)}, "w_out must be (1, 6, 3)"),
        ({"b_in": torch.randn(1, 7)}, "b_in must be (1, 6)"),
        ({"scale": torch.ones(6)}, "scale must be (1, 6)"),
        ({"scale": -torch.ones(1, 6), "scale_exponent": 0.5}, "scale must not be negative"),
        ({"w_gate": None}, "b_gate is there without w_gate"),
        ({"activation": "tanh"}, "unknown activation 'tanh'"),
        ({"kernel": "adam"}, "unknown kernel 'adam'"),
        ({"reduce": "sum"}, "unknown reduction 'sum'"),
        ({"backend": "fortran"}, "unknown backend 'fortran'"),
        ({"params": ("w_in", "w_up")}, "unknown part 'w_up'"),
        ({"params": "scale"}, "unknown part 'scale'"),
        ({"params": ()}, "no part to differentiate by"),
        ({"params": ("b_out",), "b_out": None}, "this block has no b_out"),
        ({"params": ("w_gate",), "w_gate": None, "b_gate": None}, "this block has no w_gate"),
    ],
)
def test_bad_input_is_named(changes: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"x1": torch.randn(4, 5)}
    options.update({k: v for k, v in changes.items() if k not in Bundle.__dataclass_fields__})
    bundle = make_bundle(5, 6, 3, gated=True, scale=True).to(torch.float32)
    bundle = replace(bundle, **{k: v for k, v in changes.items() if k in Bundle.__dataclass_fields__})
    with pytest.raises(ValueError, match=re.escape(message)):
        ntk_gram(bundle, **options)


def test_what_is_no_block_is_named() -> None:
    for call in (lambda m: ntk_gram(m, torch.randn(4, 5)), lambda m: jvp(m, torch.randn(4, 5), {})):
        with pytest.raises(TypeError, match=r"block is a Linear: give what has as_bundle\(\)"):
            call(nn.Linear(5, 6))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["x1", "x2", "w_in", "w_gate", "b_in", "b_gate", "w_out", "b_out", "scale"])
def test_values_that_are_not_finite_are_named(name: str, value: float) -> None:
    bundle = make_bundle(5, 6, 3, gated=True, scale=True).to(torch.float32)
    inputs: dict[str, Any] = {"x1": torch.randn(4, 5), "x2": torch.randn(3, 5)}
    tensor = inputs[name] if name in inputs else getattr(bundle, name)
    tensor.view(-1)[1] = value
    with pytest.raises(ValueError, match=rf"^{name} has values that are not finite"):
        ntk_gram(bundle, **inputs)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_device_without_a_backend_raises(backend: str) -> None:
    with pytest.raises(BackendUnavailableError, match="meta"):
        ntk_gram(make_bundle(5, 6, 3), torch.ones(4, 5, device="meta"), backend=backend)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("with_x2", [False, True])
def test_opcheck(kernel: Kernel, gated: bool, with_x2: bool) -> None:
    bundle = make_bundle(5, 6, 3, gated=gated, scale=True, scale_exponent=0.5).to(torch.float32)
    torch.library.opcheck(
        ntk_module._NTK_GRAM.overload,
        (
            torch.randn(4, 5),
            torch.randn(3, 5) if with_x2 else None,
            *bundle.at(0).tensors,
            0.5,
            *bundle.function,
            list(bundle.parts()),
            kernel,
        ),
    )
