"""The backend `"triton"` of `ntk_gram`, interpreted on the CPU: sums are rounded, or cut off as on tensor cores.

It is held to what the compiled tiles are held to (`ntk_precision.py`).
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton_interpreter  # noqa: F401, I001 - before any kernel is defined
import ntk_rounding
import tensor_cores
import torch
from ffn_blocks import ACTIVATIONS, KERNELS, make_bundle
from ntk_precision import (
    PRECISIONS,
    STRIPS,
    assert_bfloat16_beats_torch,
    assert_comparisons,
    assert_long_sums_round,
    assert_not_finite_is_kept,
    assert_nothing_above_is_read,
    assert_precise,
    assert_sums,
    moved,
    rms,
)
from rounding import Arithmetic
from torch import Tensor

from fusion_kernels import BackendUnavailableError, Gate, ntk_compare, ntk_gram
from fusion_kernels.library import Backend
from fusion_kernels.ntk import Kernel, gpu_cases, triton_backend, triton_heuristics
from fusion_kernels.ntk import compare as comparison
from fusion_kernels.ntk import gram as module
from fusion_kernels.ntk import reference as reference
from fusion_kernels.ntk.block import prepare
from fusion_kernels.proof.cases import failure, poisoned

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
ON_TENSOR_CORES = ["tf32x3", "bf16x3", "bf16"]


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`backend="triton"` takes tensors of the CPU, and new memory is full of NaN."""
    for operator in (module._NTK_GRAM, module._NTK_GRAM_OUT, comparison._NTK_SUMS):
        triton = operator.backend("triton")
        others = [backend for backend in operator.backends if backend is not triton]
        monkeypatch.setattr(operator, "backends", [Backend("triton", triton.function, ("cpu",)), *others])
    with torch.random.fork_rng(), poisoned():
        torch.manual_seed(0)
        yield


@pytest.fixture(params=["rounded", "cut off"])
def sums(request: pytest.FixtureRequest) -> Iterator[None]:
    """How products that tensor cores compute are added up."""
    if request.param == "rounded":
        yield
        return
    with tensor_cores.truncating() as lengths:
        yield
    assert set(lengths) <= {16, 32, 64}


@pytest.mark.usefixtures("sums")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_every_activation(kernel: Kernel, activation: str, gated: bool) -> None:
    bundle = make_bundle(33, 40, 5, gated=gated, scale=True, scale_exponent=0.5, activation=activation)
    x = torch.randn(37, 33).double()
    metric = torch.rand(40).double()
    assert_precise("triton", bundle, x, None, "cpu", kernel=kernel)
    if activation == "gelu":
        direction = torch.randn(5).double()
        weights = {"metric": metric.float().double(), "reduce": direction.float().double()}
        assert_precise("triton", bundle, x, x[:20].flip(0), "cpu", kernel=kernel, **weights)


@pytest.mark.usefixtures("sums")
@pytest.mark.parametrize(
    ("rows", "others", "d", "neurons"),
    [
        (1, None, 1, 1), (17, None, 1, 123), (123, 1, 17, 17), (1, 123, 123, 1), (128, None, 64, 64),
        (129, 257, 33, 31), (257, None, 65, 1), (300, None, 5, 70), (40, None, 1537, 17),
    ],
)  # fmt: skip
def test_odd_shapes(rows: int, others: int | None, d: int, neurons: int) -> None:
    bundle = make_bundle(d, neurons, 3, gated=rows % 2 == 1, scale=True, scale_exponent=0.5)
    x2 = None if others is None else torch.randn(others, d).double()
    assert_precise("triton", bundle, torch.randn(rows, d).double(), x2, "cpu")


def test_many_tiles() -> None:
    """More rows of tiles than are walked together."""
    bundle = make_bundle(7, 9, 3)
    assert_precise("triton", bundle, torch.randn(600, 7).double(), None, "cpu")
    assert_precise("triton", bundle, torch.randn(580, 7).double(), torch.randn(150, 7).double(), "cpu")


@pytest.mark.usefixtures("sums")
@pytest.mark.parametrize(
    "params",
    [
        "w_in", "b_in", "w_out", "b_out", ("b_in", "b_gate"), ("w_in", "b_gate"), ("w_in", "b_in", "w_gate"),
        ("b_gate", "w_gate", "b_out"), ("w_in", "w_gate", "b_gate", "w_out", "b_out"),
    ],
)  # fmt: skip
def test_every_choice_of_parts(params: Any) -> None:
    """Terms multiplied by inputs, by a bias or by both take one pass each, and the later ones add to the first."""
    bundle = make_bundle(20, 33, 4, gated=True, scale=True, scale_exponent=0.5)
    assert_precise("triton", bundle, torch.randn(140, 20).double(), None, "cpu", params=params)
    assert_precise("triton", bundle, torch.randn(11, 20).double(), torch.randn(5, 20).double(), "cpu", params=params)


@pytest.mark.parametrize("clamp", ["none", "above", "both", "after"])
def test_limits_of_gates(clamp: Any) -> None:
    bundle = make_bundle(9, 20, 3, gated=True, scale=True, scale_exponent=0.5, gating=Gate(0.7, clamp, 1.0), spread=2)
    assert_precise("triton", bundle, torch.randn(30, 9).double(), torch.randn(12, 9).double(), "cpu")


@pytest.mark.parametrize(("rows", "others"), [(0, None), (0, 4), (4, 0)])
def test_no_rows(rows: int, others: int | None) -> None:
    bundle = moved(make_bundle(5, 6, 3), "cpu", torch.float32)
    x2 = None if others is None else torch.randn(others, 5)
    gram = ntk_gram(bundle, torch.randn(rows, 5), x2, backend="triton")
    assert gram.shape == (rows, rows if others is None else others)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("params", ["w_in", ("w_in", "b_gate")], ids=["one pass", "two passes"])
def test_only_the_result_is_written(precision: Any, params: Any) -> None:
    bundle = moved(make_bundle(5, 6, 3, gated=True), "cpu", torch.float32)
    for x2 in (None, torch.randn(71, 5)):
        x = torch.randn(133, 5)
        options: dict[str, Any] = {"backend": "triton", "precision": precision, "params": params}
        expected = ntk_gram(bundle, x, x2, **options)
        out = torch.full((268, 151), float("nan"))
        there = out[1:267:2, 7 : 7 + expected.shape[1]]
        ntk_gram(bundle, x, x2, out=there, **options)
        assert torch.equal(there, expected)
        there.fill_(float("nan"))
        assert out.isnan().all()
        one = torch.full((1, 71), float("nan"))
        ntk_gram(bundle, x[:1], x[:71], out=one.as_strided((1, 71), (5, 1)), **options)
        torch.testing.assert_close(one, ntk_gram(bundle, x[:1], x[:71], **options), rtol=0, atol=0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_columns_that_pad_an_operand_are_zeros(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing else of it is: each value is that of its place."""
    made: list[Tensor] = []
    operand = triton_backend.operand
    monkeypatch.setattr(triton_backend, "operand", lambda *given: made.append(operand(*given)) or made[-1])
    bundle = make_bundle(5, 70, 3, gated=True)
    prepared = prepare(bundle, {"x": torch.randn(4, 5).double()}, None, None)
    triton_backend.ntk_gram(prepared.rows["x"], None, prepared.ffn, prepared.parts, kernel)
    (values,) = made[0]
    assert values.shape == (4, 64 + 3 * 128)
    ranges = values.split([5, 59, 70, 58, 70, 58, 70, 58], 1)
    assert all(bool((part == 0).all()) for part in ranges[1::2])
    hidden, slopes = reference.factors(prepared.ffn, prepared.rows["x"])
    weight, _, coefficient = reference.contraction(prepared.ffn.w_out, None, kernel)
    of_hidden = coefficient**0.5 if kernel == "gd" else coefficient
    for found, exact in zip(
        ranges[::2], (prepared.rows["x"], slopes["in"] * weight, slopes["gate"] * weight, hidden * of_hidden),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(found, exact, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize(("name", "bits", "parts"), [("bf16", 8, 1), ("bf16x3", 16, 2), ("tf32x3", 22, 2)])
def test_what_splitting_keeps(name: str, bits: int, parts: int) -> None:
    values = torch.cat([torch.randn(1, 4000), torch.randn(1, 4000) * 1e20, torch.tensor([[0.0, -0.0, 1.0, -3.0]])], 1)
    planes = torch.empty(parts, *values.shape, dtype=torch.bfloat16 if name.startswith("bf16") else torch.float32)
    triton_backend._round_to(planes, values, name)
    kept = planes.double().sum(0)
    assert float(((kept - values.double()).abs() / values.double().abs().clamp(min=1e-30)).max()) <= 1.01 * 2.0**-bits
    if name == "tf32x3":
        # Tensor cores read no more than the bits of TF32.
        assert bool((planes.view(torch.int32) & 0x1FFF == 0).all())
        ties = triton_backend._to_tf32(torch.tensor([1 + 2.0**-11, 1 + 3 * 2.0**-11]))
        assert ties.tolist() == [1.0, 1 + 2 * 2.0**-10]


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_bfloat16_errs_less_than_torch_in_bfloat16(gated: bool) -> None:
    assert_bfloat16_beats_torch("triton", gated, "cpu")


@pytest.mark.parametrize("precision", ON_TENSOR_CORES)
def test_long_sums_round(precision: Any) -> None:
    with tensor_cores.truncating() as lengths:
        assert_long_sums_round("triton", precision, "cpu")
    assert lengths


def test_products_of_bfloat16_err_twice_as_float32_does_where_their_factors_are_exact() -> None:
    """What tensor cores add to rounding: inputs and slopes have 8 significant bits, and long sums cancel."""
    bundle = make_bundle(1537, 257, 1, activation="relu").to(torch.bfloat16).to(torch.float32)
    bundle = replace(bundle, w_out=torch.ones_like(bundle.w_out))
    x = torch.randn(33, 1537).bfloat16().float()
    exact = ntk_gram(bundle.to(torch.float64), x.double(), params="w_in", backend="reference")
    torchs = ntk_gram(bundle, x, params="w_in", backend="reference")
    for precision in ON_TENSOR_CORES:
        with tensor_cores.truncating():
            found = ntk_gram(bundle, x, params="w_in", precision=precision, backend="triton")  # type: ignore[arg-type]
        assert rms(found, exact) <= 2 * rms(torchs, exact), precision


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_same_call_has_the_same_bits(kernel: Kernel) -> None:
    bundle = moved(make_bundle(33, 40, 5, gated=True), "cpu", torch.float32)
    x = torch.randn(150, 33)
    for precision in PRECISIONS:
        one, other = (ntk_gram(bundle, x, kernel=kernel, precision=precision, backend="triton") for _ in range(2))  # type: ignore[arg-type]
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_has_the_bits_of_the_dtype(dtype: torch.dtype) -> None:
    """As a number of a launch it would be rounded to float32."""
    bundle = moved(make_bundle(5, 6, 3), "cpu", dtype)
    direction = torch.tensor([0.1, 0.7, -1.3], dtype=torch.float64)
    gram = ntk_gram(bundle, torch.randn(3, 5).to(dtype), params="b_out", reduce=direction, backend="triton")
    assert torch.equal(gram, direction.to(dtype).double().square().sum().to(dtype).expand(3, 3))


@pytest.mark.parametrize("reduce", ["full", "diagonal"])
def test_outputs_are_products_by_torch(reduce: Any) -> None:
    bundle = make_bundle(5, 6, 3, gated=True)
    x = torch.randn(7, 5).double()
    exact = ntk_gram(bundle, x, reduce=reduce, backend="reference")
    found = ntk_gram(bundle, x, reduce=reduce, backend="triton")
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_not_finite_stays_so(precision: str) -> None:
    assert_not_finite_is_kept(triton_backend.operand, precision)


def test_precisions_are_checked() -> None:
    x = torch.randn(4, 5)
    single, double = (moved(make_bundle(5, 6, 3), "cpu", dtype) for dtype in (torch.float32, torch.float64))
    default = ntk_gram(single, x, backend="triton")
    assert torch.equal(default, ntk_gram(single, x, backend="triton", precision="tf32x3"))
    assert not torch.equal(default, ntk_gram(single, x, backend="triton", precision="highest"))
    for block, options, message in (
        (double, {}, "backend 'triton' or 'cuda': this kernel is torch.float64, use 'highest'"),
        (single, {"reduce": "full"}, "reduce='full' has an axis of outputs, use 'highest'"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            ntk_gram(block, x, **{"backend": "triton", "precision": "bf16", **options})


def test_by_itself_it_answers_where_tensor_cores_do(monkeypatch: pytest.MonkeyPatch) -> None:
    x, answered = torch.randn(4, 5), []
    for operator in (module._NTK_GRAM, module._NTK_GRAM_OUT, comparison._NTK_SUMS):
        triton = operator.backend("triton")
        function = triton.function
        seen = replace(triton, function=lambda *given, of=function: (answered.append(True), of(*given))[1])
        monkeypatch.setattr(operator, "backends", [seen, *operator.backends[1:]])
    single, double = (moved(make_bundle(5, 6, 3), "cpu", dtype) for dtype in (torch.float32, torch.float64))
    cases: list[tuple[Any, dict[str, Any], bool]] = [
        (single, {}, True), (single, {"precision": "bf16"}, True), (single, {"precision": "highest"}, False),
        (single, {"reduce": "full"}, False), (double, {}, False),
    ]  # fmt: skip
    for bundle, options, takes in cases:
        for out in (None, torch.empty(4, 4, dtype=bundle.w_in.dtype)) if "reduce" not in options else (None,):
            answered.clear()
            found = ntk_gram(bundle, x.to(bundle.w_in.dtype), out=out, **options)
            assert bool(answered) == takes, options
            if not takes:
                assert torch.equal(found, ntk_gram(bundle, x.to(found.dtype), backend="reference", **options))
    for bundle in (single, double):
        answered.clear()
        ntk_compare(bundle, bundle, x.to(bundle.w_in.dtype), eigenvalues=0)
        assert bool(answered) == (bundle is single)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_backend_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(BackendUnavailableError, match="torch finds no CUDA device"):
        ntk_gram(make_bundle(5, 6, 3), torch.randn(4, 5).double(), backend="triton")


# --- tiles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shared", [99 * 1024, 227 * 1024])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_tiles_are_square_and_their_steps_divide_every_range(dtype: torch.dtype, shared: int, precision: str) -> None:
    if dtype == torch.float64 and precision != "highest":
        return
    for major in (8, 9, 10):
        few, many, added = (
            triton_heuristics.tile_config(n, precision, dtype, accumulate, shared, major)
            for n, accumulate in ((64, False), (65, False), (65, True))
        )
        assert few.tile[0] < added.tile[0] <= many.tile[0]
        for config in (few, many, added):
            assert config.tile[0] == config.tile[1]
            assert triton_heuristics.COLUMNS % config.depth == 0


# --- proof -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("sums")
def test_it_proves_itself() -> None:
    cases = gpu_cases.of_triton(CPU)
    assert len(cases) == 2 * len(gpu_cases.UNITS) + 3 + 2 * 2
    assert len({case.name for case in cases}) == len(cases)
    assert [failure(case) for case in cases] == [None] * len(cases)


@pytest.mark.parametrize("how", gpu_cases.UNITS, ids=str)
@pytest.mark.parametrize("problem", [*gpu_cases.EVERY, *gpu_cases.FURTHER], ids=lambda problem: problem.name)
def test_a_proof_allows_what_rounding_may_do(problem: gpu_cases.Problem, how: tuple[torch.dtype, str]) -> None:
    """Its bound is about that of `ntk_rounding`, which rounds signs and what a gate multiplies once more.

    In single entries it may be far larger, where only one of the two is sure of a sign.
    """
    dtype, precision = how
    x1, x2, ffn, direction = gpu_cases.draw(problem, dtype)
    double = replace(
        make_bundle(1, 1, 1), activation=ffn.activation, **{name: t.double()[None] for name, t in ffn.named().items()}
    )
    operand, total = gpu_cases.UNITS[how]
    other = ntk_rounding.gram(
        Arithmetic(dtype, operand, total), double, x1.double(), None if x2 is None else x2.double(),
        kernel=problem.kernel, params=problem.params, reduce=None if direction is None else direction.double(),  # type: ignore[arg-type]
    )  # fmt: skip
    share = gpu_cases.bound(problem, dtype, precision) / other.error
    assert 0.2 <= float(share.min()) <= float(share.median()) <= 3


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_that_is_left_out_is_found(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last input of 65."""
    whole = triton_backend.operand

    def short(x: Tensor, *others: Any) -> Tensor:
        return whole(torch.cat([x[:, :-1], torch.zeros_like(x[:, -1:])], 1), *others)

    monkeypatch.setattr(triton_backend, "operand", short)
    case = gpu_cases.gram_case(triton_backend.ntk_gram, gpu_cases.EVERY[0], torch.float32, precision, CPU)
    assert ": K errs by " in str(failure(case))


@pytest.mark.parametrize("precision", ["tf32x3", "bf16x3"])
@pytest.mark.parametrize("side", [0, 1])
def test_a_low_part_that_is_left_out_is_found(precision: str, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = triton_backend.tiles

    def short(*given: Any) -> None:
        given = (*(t.clone() for t in given[:2]), *given[2:])
        given[side][1] = 0
        tiles(*given)

    monkeypatch.setattr(triton_backend, "tiles", short)
    case = gpu_cases.gram_case(triton_backend.ntk_gram, gpu_cases.EVERY[0], torch.float32, precision, CPU)
    assert ": K errs by " in str(failure(case))


def test_a_tile_that_is_not_written_and_a_kernel_that_is_not_symmetric_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launch = triton_backend.launch
    case = gpu_cases.gram_case(triton_backend.ntk_gram, gpu_cases.EVERY[0], torch.float64, "highest", CPU)
    with monkeypatch.context() as patch:
        patch.setattr(triton_backend, "launch", lambda kernel, programs, **own: launch(kernel, programs - 1, **own))
        assert ": K errs by inf" in str(failure(case))

    def bent(*given: Any) -> None:
        tiles(*given)
        given[-2][3, 1] *= 1 + 2.0**-52

    tiles = triton_backend.tiles
    monkeypatch.setattr(triton_backend, "tiles", bent)
    assert str(failure(case)).endswith("K is not symmetric")


def test_the_compiled_tiles_have_the_same_cases() -> None:
    assert [case.name for case in gpu_cases.of_cuda(CPU)] == [case.name for case in gpu_cases.of_triton(CPU)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("rows", "others", "params", "block_size"), STRIPS)
def test_sums_of_two_kernels(
    dtype: torch.dtype, kernel: Kernel, rows: int, others: int | None, params: Any, block_size: int | None
) -> None:
    assert_sums(triton_backend, "cpu", dtype, kernel, rows, others, params, block_size)


def test_comparisons_by_strips() -> None:
    assert_comparisons("triton", "cpu")


def test_a_strip_reads_nothing_above_the_diagonal() -> None:
    assert_nothing_above_is_read(triton_backend._add_strips)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("problem", gpu_cases.EVERY, ids=lambda problem: problem.name)
def test_sums_prove_themselves(problem: gpu_cases.Problem, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """And do not where the last row of the second strip is left out."""
    case = gpu_cases.sums_case(triton_backend.ntk_sums, problem, dtype, CPU)
    assert failure(case) is None
    add = triton_backend._add_strips

    def short(a: Tensor, b: Tensor, first: int, *others: Any) -> None:
        if first:
            a = torch.cat([a[:-1], torch.zeros_like(a[-1:])])
        add(a, b, first, *others)

    monkeypatch.setattr(triton_backend, "_add_strips", short)
    assert ": sums errs by " in str(failure(case))
