"""What `ntk_gram` makes of the outputs, metrics, tiles and given memory, on both backends."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import ntk_rounding
import pytest
import torch
from ffn_blocks import ACTIVATIONS, KERNELS, full_gram, make_bundle
from hypothesis import given
from hypothesis import strategies as st
from rounding import Arithmetic, assert_rounding

from fusion_kernels import native, ntk_gram
from fusion_kernels.gates import PLAIN
from fusion_kernels.ntk import Kernel, heuristics
from fusion_kernels.ntk import gram as module

BACKENDS = ["reference", *([] if native.UNAVAILABLE else ["cpu"])]
compiled = pytest.mark.skipif(native.UNAVAILABLE is not None, reason=str(native.UNAVAILABLE))


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("parts", [None, ("w_in",), ("b_in", "w_out"), ("b_out",)], ids=str)
@pytest.mark.parametrize("with_x2", [False, True])
def test_every_reduction_is_that_of_explicit_jacobians(
    backend: str, kernel: Kernel, gated: bool, parts: tuple[str, ...] | None, with_x2: bool
) -> None:
    bundle = make_bundle(7, 6, 3, gated=gated, scale=True, scale_exponent=0.5)
    x1 = torch.randn(5, 7).double()
    x2 = torch.randn(4, 7).double() if with_x2 else None
    metric, r = torch.rand(6).double(), torch.randn(3).double()
    full = full_gram(bundle, x1, x1 if x2 is None else x2, kernel, parts, metric)
    diagonal = full.diagonal(dim1=2, dim2=3)
    expected: list[tuple[Any, torch.Tensor]] = [("full", full), ("diagonal", diagonal), ("trace", diagonal.sum(-1))]
    # The kernel of the function r.F, as torch.func sees it: a block whose output weights are contracted.
    single = replace(
        bundle,
        w_out=(bundle.w_out @ r)[..., None],
        b_out=None if bundle.b_out is None else (bundle.b_out @ r)[..., None],
    )
    over_neurons = tuple(p for p in parts or bundle.parts() if p not in ("w_out", "b_out"))
    weight = r.square().sum() if kernel == "gd" else r.abs().sum()
    along = torch.zeros(5, diagonal.shape[1]).double()
    if over_neurons:
        along = full_gram(single, x1, x1 if x2 is None else x2, kernel, over_neurons, metric)[..., 0, 0]
    for part in ("w_out", "b_out"):
        if parts is None or part in parts:
            along = along + weight * full_gram(bundle, x1, x1 if x2 is None else x2, kernel, (part,), metric)[..., 0, 0]
    expected.append((r, along))
    if kernel == "gd":
        torch.testing.assert_close(along, torch.einsum("nmop,o,p->nm", full, r, r))
        expected.append(("pseudo", full.sum((2, 3)) / 3))
    for reduce, gram in expected:
        for block_size in (None, 1, 2, 3):
            found = ntk_gram(
                bundle,
                x1,
                x2,
                reduce,
                params=parts,
                metric=metric,
                kernel=kernel,
                backend=backend,
                block_size=block_size,
            )
            torch.testing.assert_close(found, gram, rtol=1e-9, atol=1e-11)
            if kernel == "gd" and x2 is None:
                pairs = found.permute(1, 0, 3, 2) if reduce is not r and reduce == "full" else found.transpose(0, 1)
                assert torch.equal(found, pairs)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_the_full_kernel_is_positive_semidefinite(gated: bool) -> None:
    bundle = make_bundle(5, 7, 4, gated=gated, scale=True, scale_exponent=0.5)
    x = torch.randn(30, 5).double()  # 120 outputs of at most 5 * 7 * (1 + gated) + ... parameters each: rank-deficient
    gram = ntk_gram(bundle, x, reduce="full", params=("w_in",)).transpose(1, 2).reshape(120, 120)
    eigenvalues = torch.linalg.eigvalsh(gram)
    assert eigenvalues[-1] > 0
    assert eigenvalues[0] >= -100 * torch.finfo(torch.float64).eps * eigenvalues[-1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reduce", ["trace", "pseudo", "vector", "diagonal", "full"])
def test_every_kernel_is_symmetric_and_positive_semidefinite(
    backend: str, gated: bool, dtype: torch.dtype, reduce: str
) -> None:
    """Of more rows than the block has neurons, inputs and outputs together, so that rounding is all that some see."""
    bundle = make_bundle(5, 7, 3, gated=gated, scale=True, scale_exponent=0.5).to(dtype)
    x, metric = torch.randn(151, 5).to(dtype), torch.rand(7)
    named: Any = torch.randn(3) if reduce == "vector" else reduce
    gram = ntk_gram(bundle, x, reduce=named, metric=metric, backend=backend)
    if reduce == "full":
        matrices = gram.transpose(1, 2).reshape(1, 453, 453)
    else:
        matrices = gram.movedim(2, 0) if reduce == "diagonal" else gram[None]
    for matrix in matrices:
        assert torch.equal(matrix, matrix.T)
        eigenvalues = torch.linalg.eigvalsh(matrix.double())
        assert eigenvalues[-1] > 0
        assert eigenvalues[0] >= -100 * torch.finfo(dtype).eps * eigenvalues[-1]
    # What it is the kernel of is the full one's business, in every dtype.
    if reduce != "full":
        full = ntk_gram(bundle.to(torch.float64), x.double(), reduce="full", metric=metric, backend="reference")
        direction = (
            torch.full((3,), 3**-0.5, dtype=torch.float64)
            if reduce == "pseudo"
            else named
            if reduce == "vector"
            else torch.ones(3)
        )
        expected = {
            "trace": lambda: full.diagonal(dim1=2, dim2=3).sum(2),
            "diagonal": lambda: full.diagonal(dim1=2, dim2=3),
        }.get(reduce, lambda: torch.einsum("nmop,o,p->nm", full, direction.double(), direction.double()))()
        assert (gram - expected).norm() <= 8 * torch.finfo(dtype).eps * expected.norm()


@compiled
@pytest.mark.parametrize(("rows", "block_size"), [(63, None), (64, None), (65, None), (129, 64), (193, 50), (7, 3)])
def test_halves_of_a_symmetric_kernel_meet(rows: int, block_size: int | None) -> None:
    """Sizes at and beside those at which a triangle is one square, or two and what lies below the diagonal."""
    bundle, x = make_bundle(5, 6, 3), torch.randn(rows, 5).double()
    found = ntk_gram(bundle, x, backend="cpu", block_size=block_size)
    torch.testing.assert_close(found, ntk_gram(bundle, x, backend="reference"), rtol=1e-12, atol=1e-12)
    assert torch.equal(found, found.T)


def test_the_metric_undoes_explicit_cluster_sizes() -> None:
    """Tied neurons fused with an explicit p weigh p^2 in the gradient-descent kernel, and p with the metric 1/p."""
    clusters = make_bundle(9, 6, 4, gated=True)
    sizes = torch.tensor([1, 2, 3, 5, 8, 40])
    names = ("w_in", "w_gate", "b_in", "b_gate", "w_out")
    tied = replace(clusters, **{n: getattr(clusters, n).repeat_interleave(sizes, dim=1) for n in names})
    fused = replace(clusters, scale=sizes.double()[None])
    x = torch.randn(7, 9).double()
    for reduce in ("trace", "full", "diagonal", "pseudo"):
        torch.testing.assert_close(
            ntk_gram(fused, x, reduce=reduce, metric=1 / sizes.double()), ntk_gram(tied, x, reduce=reduce)
        )
    assert not torch.allclose(ntk_gram(fused, x), ntk_gram(tied, x))


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "d", "neurons"), [(1, 17, 1), (17, 1, 123), (123, 17, 17), (131, 5, 3)])
def test_tiles_are_the_reference(
    dtype: torch.dtype, kernel: Kernel, activation: str, rows: int, d: int, neurons: int
) -> None:
    gated = rows % 2 == 1 and d == 17
    bundle = make_bundle(d, neurons, 5, gated=gated, scale=True, scale_exponent=0.5, activation=activation).to(dtype)
    x = torch.randn(rows, d).to(dtype)
    for x2 in (None, x[: rows // 2 + 1].flip(0)):
        found, torchs = (ntk_gram(bundle, x, x2, kernel=kernel, backend=name, block_size=37) for name in BACKENDS[::-1])
        wide = None if x2 is None else x2.double()
        exact = ntk_gram(bundle.to(torch.float64), x.double(), wide, kernel=kernel, backend="reference")
        bound = ntk_rounding.gram(Arithmetic(dtype), bundle, x, x2, kernel=kernel)
        many = dtype == torch.float32 and ntk_rounding.enough(bundle, x, x2)
        assert_rounding({"K": found}, {"K": exact}, {"K": bound}, *([{"K": torchs}] if many else []))


@compiled
@pytest.mark.parametrize("rows", [640, 1537])
def test_many_tiles(rows: int) -> None:
    bundle = make_bundle(17, 23, 3).to(torch.float32)
    x = torch.randn(rows, 17)
    found = ntk_gram(bundle, x, backend="cpu")
    assert torch.equal(found, found.T)
    expected = ntk_gram(bundle.to(torch.float64), x.double(), backend="reference")
    bound = ntk_rounding.gram(Arithmetic(torch.float32), bundle, x, None)
    torchs = ntk_gram(bundle, x, backend="reference")
    assert_rounding({"K": found}, {"K": expected}, {"K": bound}, {"K": torchs})
    rectangle, rest = ntk_gram(bundle, x, x[:401], backend="cpu"), (slice(None), slice(401))
    assert_rounding({"K": rectangle}, {"K": expected[rest]}, {"K": bound[rest]}, {"K": torchs[rest]})


@compiled
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_the_bits_do_not_depend_on_the_number_of_threads(gated: bool) -> None:
    bundle = make_bundle(33, 70, 3, gated=gated, scale=True, scale_exponent=0.5).to(torch.float32)
    x = torch.randn(517, 33)
    grams = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            grams.append(
                (ntk_gram(bundle, x, backend="cpu"), ntk_gram(bundle, x, x[:300], kernel="sign", backend="cpu"))
            )
    finally:
        torch.set_num_threads(threads)
    for one, other in grams[1:]:
        assert torch.equal(one, grams[0][0])
        assert torch.equal(other, grams[0][1])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("reduce", ["trace", "diagonal", "full"])
@pytest.mark.parametrize("others", [None, 5])
def test_blocks_of_rows_of_the_reference(kernel: Kernel, reduce: Any, others: int | None) -> None:
    bundle = make_bundle(6, 7, 3, gated=True)
    x1 = torch.randn(11, 6).double()
    x2 = None if others is None else torch.randn(others, 6).double()
    whole, blocks = (
        ntk_gram(bundle, x1, x2, reduce, kernel=kernel, block_size=size, backend="reference") for size in (None, 4)
    )
    torch.testing.assert_close(blocks, whole, rtol=1e-12, atol=1e-12)
    if kernel == "gd" and x2 is None:
        turned = blocks.transpose(0, 1) if reduce != "full" else blocks.permute(1, 0, 3, 2)
        assert torch.equal(blocks, turned)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduce", ["trace", "diagonal", "full"])
def test_out_is_written_and_returned(backend: str, reduce: Any) -> None:
    bundle = make_bundle(5, 6, 3)
    x = torch.randn(9, 5).double()
    expected = ntk_gram(bundle, x, reduce=reduce, backend=backend)
    out = torch.full((20, *expected.shape[1:]), float("nan")).double()
    assert ntk_gram(bundle, x, reduce=reduce, backend=backend, out=out[:18:2]).data_ptr() == out.data_ptr()
    torch.testing.assert_close(out[:18:2], expected, rtol=1e-14, atol=0)
    assert out[1::2].isnan().all()
    assert out[18:].isnan().all()
    wide = torch.full((9, 40), float("nan")).double()
    if reduce == "trace":
        ntk_gram(bundle, x, backend=backend, out=wide[:, 3:12])
        torch.testing.assert_close(wide[:, 3:12], expected, rtol=1e-14, atol=0)
        assert wide[:, :3].isnan().all()
        assert wide[:, 12:].isnan().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduce": "mean"}, "unknown reduction 'mean'"),
        ({"reduce": torch.ones(4)}, "a vector to reduce by must be (3,) for this block, got (4,)"),
        ({"reduce": [1.0, float("nan"), 1.0]}, "the vector to reduce by has values that are not finite"),
        ({"precision": "tf32"}, "unknown precision 'tf32': use one of highest, tf32x3, bf16x3, bf16"),
        ({"precision": "bf16"}, "computes in the dtype itself, use 'highest'"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"metric": torch.ones(5)}, "metric must be (6,), one per neuron, got (5,)"),
        ({"metric": -torch.ones(6)}, "metric must not be negative"),
        ({"metric": torch.full((6,), float("inf"))}, "metric has values that are not finite"),
        ({"out": torch.zeros(4, 3).double()}, "out must be (4, 4), got (4, 3)"),
        ({"out": torch.zeros(4, 4, dtype=torch.float32)}, "out must be torch.float64 on cpu"),
        ({"out": torch.zeros(4, 4).double().T}, "the rows of out must be contiguous"),
        ({"out": torch.zeros(1, 4).double().expand(4, 4)}, "the rows of out must be contiguous"),
        ({"out": torch.zeros(4, 4).double().requires_grad_()}, "out requires grad"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ntk_gram(make_bundle(5, 6, 3), torch.randn(4, 5).double(), **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["x1", "x2", "w_in", "metric", "direction"])
def test_out_is_not_in_the_memory_of_an_input(backend: str, name: str) -> None:
    bundle = make_bundle(4, 4, 4)
    memory = torch.randn(4, 4).double()
    x1, x2 = torch.randn(4, 4).double(), torch.randn(4, 4).double()
    metric, direction = torch.rand(4).double(), torch.randn(4).double()
    if name == "w_in":
        bundle = replace(bundle, w_in=memory[None])
    x1, x2 = memory if name == "x1" else x1, memory if name == "x2" else x2
    metric = memory[0].abs_() if name == "metric" else metric
    direction = memory[1] if name == "direction" else direction
    with pytest.raises(ValueError, match="out shares memory with a tensor that the kernel is computed from"):
        ntk_gram(bundle, x1, x2, direction, metric=metric, backend=backend, out=memory)
    separate = torch.empty(4, 4).double()
    ntk_gram(bundle, x1, x2, direction, metric=metric, backend=backend, out=separate)
    assert separate.isfinite().all()


@given(
    rows=st.integers(0, 40),
    others=st.one_of(st.none(), st.integers(0, 20)),
    d=st.integers(1, 20),
    neurons=st.integers(1, 20),
    outputs=st.integers(1, 4),
    gated=st.booleans(),
    exponent=st.sampled_from([0.0, 0.5]),
    reduce=st.sampled_from(["trace", "full", "diagonal", "pseudo"]),
    kernel=st.sampled_from(KERNELS),
    block_size=st.one_of(st.none(), st.integers(1, 50)),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    rows: int,
    others: int | None,
    d: int,
    neurons: int,
    outputs: int,
    gated: bool,
    exponent: float,
    reduce: Any,
    kernel: Kernel,
    block_size: int | None,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    bundle = make_bundle(d, neurons, outputs, gated=gated, scale=True, scale_exponent=exponent)
    x1 = torch.randn(rows, d).double()
    x2 = None if others is None else torch.randn(others, d).double()
    found = ntk_gram(bundle, x1, x2, reduce, kernel=kernel, block_size=block_size)
    expected = ntk_gram(bundle, x1, x2, reduce, kernel=kernel, backend="reference")
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("reduce", ["trace", "full", "diagonal", "vector"])
@pytest.mark.parametrize("with_out", [False, True])
def test_opcheck(reduce: str, with_out: bool) -> None:
    bundle = make_bundle(5, 6, 3, gated=True, scale=True).to(torch.float32)
    direction = torch.randn(3) if reduce == "vector" else None
    axes = {"full": (3, 3), "diagonal": (3,)}.get(reduce, ())
    arguments = (
        *(torch.randn(4, 5), torch.randn(2, 5)),
        *bundle.at(0).tensors,
        *(0.0, "gelu", *PLAIN.arguments, list(bundle.parts()), "gd", reduce, direction, torch.rand(6), "highest", 3),
    )
    if with_out:
        torch.library.opcheck(module._NTK_GRAM_OUT.overload, (torch.zeros(4, 2, *axes), *arguments))
    else:
        torch.library.opcheck(module._NTK_GRAM.overload, arguments)


@pytest.mark.parametrize("rows", [1, 100, 1000, 10_000])
def test_tiles_are_a_few_megabytes(rows: int) -> None:
    edge = heuristics.tile_edge(rows)
    assert edge >= 128
    assert 3 * edge**2 * torch.float64.itemsize <= 8 << 20
    assert edge <= max(128, rows // 2)
