"""What backends of tangent kernels for GPUs are held to, in every precision that they have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ntk_rounding
import pytest
import torch
from ffn_blocks import Bundle, make_bundle
from rounding import Arithmetic, assert_rounding

from fusion_kernels import ntk_compare, ntk_gram
from fusion_kernels.ntk import Kernel
from fusion_kernels.ntk import reference as reference
from fusion_kernels.ntk.block import prepare
from fusion_kernels.ntk.types import Differentiated


def moved(bundle: Bundle, device: str, dtype: torch.dtype) -> Bundle:
    return bundle.to(dtype).map(lambda t: t.to(device))


def rms(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The RMS error over the RMS of `exact`."""
    return float((found.detach().cpu().double() - exact).norm() / exact.norm())


#: Of each precision: unit roundoff of the two factors of a product, and of its sums, which tensor cores cut off; the
#: RMS error that it may have, over that of the values, where torch has no such arithmetic to compare with.
PRECISIONS = {
    "highest": (None, None, None),
    "tf32x3": (1.5 * 2**-22, 2**-23, None),
    "bf16x3": (1.5 * 2**-16, 2**-23, 2**-16),
    "bf16": (2**-8, 2**-23, 2**-7),
}


def assert_not_finite_is_kept(operand: Callable[..., torch.Tensor], precision: str) -> None:
    """Each side of the products stores NaN, of any bits, and infinity as they are, with nothing left of them to add."""
    bits = [0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001, 0x7F800000, -0x800000, 0x3F800001]
    x = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    one, neurons = torch.ones(1, 1), torch.zeros(1)
    how = ("gelu", None, "none", 0.0, False, True, False, False, False, precision)
    planes = operand(x, one, None, None, neurons, neurons, None, *how)[:, 0, : len(bits)].float()
    assert planes[0, :4].isnan().all()
    assert planes[0, 4:6].tolist() == [torch.inf, -torch.inf]
    assert planes[0, 6] == 1.0 or precision == "highest"
    assert not planes[1:, 4:].isnan().any()
    assert planes[1:, 4:6].tolist() == [[0.0, 0.0]] * (len(planes) - 1)


def assert_precise(
    backend: str, bundle: Bundle, x1: torch.Tensor, x2: torch.Tensor | None, device: str, **options: Any
) -> None:
    """Every precision against float64, beside torch in the same dtype where it has that dtype."""
    there = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    for dtype in (torch.float64, torch.float32):
        low, wide = bundle.to(dtype), bundle.to(dtype).to(torch.float64)
        exact = {"K": ntk_gram(wide, x1, x2, backend="reference", **options)}
        block = moved(low, device, dtype)
        rows = [None if x is None else x.to(device, dtype) for x in (x1, x2)]
        given = [None if x is None else x.to(dtype) for x in (x1, x2)]
        torchs = {"K": ntk_gram(low, *given, backend="reference", **options)}  # type: ignore[arg-type]
        many = dtype == torch.float32 and ntk_rounding.enough(bundle, x1, x2)
        for precision, (operand, total, largest) in PRECISIONS.items():
            if dtype == torch.float64 and precision != "highest":
                continue
            found = ntk_gram(block, *rows, backend=backend, precision=precision, **there)  # type: ignore[arg-type]
            assert found.dtype == dtype
            bound = ntk_rounding.gram(Arithmetic(dtype, operand, total), wide, x1, x2, **options)
            assert_rounding({"K": found}, exact, {"K": bound}, *([torchs] if many and largest is None else []))
            if many and largest is not None:
                assert rms(found, exact["K"]) <= largest, precision
            if x2 is None and options.get("kernel", "gd") == "gd":
                assert torch.equal(found, found.T)


def assert_bfloat16_beats_torch(backend: str, gated: bool, device: str) -> None:
    """Products of bfloat16 err no more than everything in bfloat16 does."""
    single = make_bundle(64, 100, 5, gated=gated).to(torch.float32)
    x = torch.randn(150, 64)
    exact = ntk_gram(single.to(torch.float64), x.double(), backend="reference")
    prepared = prepare(single, {"x1": x}, None, None)
    ffn = prepared.ffn.map(lambda t: t.bfloat16())
    torchs = reference.ntk_gram(x.bfloat16(), None, ffn, prepared.parts, "gd")
    assert torchs.dtype == torch.bfloat16
    found = ntk_gram(moved(single, device, torch.float32), x.to(device), backend=backend, precision="bf16")
    assert rms(found, exact) <= rms(torchs, exact)


def assert_long_sums_round(backend: str, precision: Any, device: str) -> None:
    """Tensor cores cut sums off: 4,096 positive products summed there alone would end too low by several 1e-6.

    Everything else is exact: inputs of 8 significant bits, and slopes of 1.
    """
    bundle = make_bundle(4096, 4, 1, activation="relu")
    bundle = replace(bundle, w_out=torch.ones(1, 4, 1).double(), b_in=torch.full((1, 4), 1e4).double())
    x = (torch.rand(9, 4096) + 0.5).bfloat16()
    exact = ntk_gram(bundle, x.double(), params="w_in", backend="reference")
    block = moved(bundle, device, torch.float32)
    found = ntk_gram(block, x.float().to(device), params="w_in", precision=precision, backend=backend)
    assert float((found.cpu() / exact - 1).abs().max()) <= 1e-6


#: Of sums over two kernels: rows of both sides, parts and the rows of a strip.
STRIPS = [
    (300, None, None, None), (300, None, None, 100), (257, 140, None, 128), (1, 17, None, 7), (40, None, None, 1),
    (140, None, ("w_in", "b_gate", "w_out"), 64), (0, 4, None, None), (4, 0, None, None), (0, None, None, 3),
]  # fmt: skip


def assert_sums(
    backend: Any, device: str, dtype: torch.dtype, kernel: Kernel, rows: int, others: int | None, params: Any,
    block_size: int | None,
) -> None:  # fmt: skip
    """Strips of a comparison, whatever their height: of the same values as whole kernels, to the last bits of float64.

    They add up what rounding all entries have in common: torch's errors in float32 are one draw of few.
    """
    wide = make_bundle(9, 20, 4, gated=True, scale=True, scale_exponent=0.5)
    narrow = make_bundle(9, 7, 4, gated=True)
    x1 = torch.randn(rows, 9).double()
    x2 = None if others is None else torch.randn(others, 9).double()
    direction = torch.randn(4).double()

    # In what both dtypes hold, or rounding the parameters would be an error too.
    wide, narrow, direction = wide.to(dtype).to(torch.float64), narrow.to(dtype).to(torch.float64), direction.to(dtype)
    metrics = [torch.linspace(0.5, 2, bundle.w_in.shape[1], dtype=dtype) for bundle in (wide, narrow)]

    def blocks_in(dtype: torch.dtype, device: str) -> list[Differentiated]:
        blocks = []
        for bundle, metric in zip((wide, narrow), metrics, strict=True):
            prepared = prepare(moved(bundle, device, dtype), {"x": x1.to(device, dtype)}, params, None)
            blocks.append(Differentiated(prepared.ffn, prepared.parts, metric.to(device, dtype)))
        return blocks

    def rows_in(dtype: torch.dtype, device: str) -> list[Any]:
        return [None if x is None else x.to(device, dtype) for x in (x1, x2)]

    precision, names = "tf32x3" if dtype == torch.float32 else "highest", ("sums", "rows", "columns")
    given, blocks, along = rows_in(dtype, device), blocks_in(dtype, device), direction.to(device)
    found = backend.ntk_sums(*given, *blocks, kernel, along, block_size)
    assert all(t.dtype == torch.float64 for t in found)
    ka, kb = (
        backend.ntk_gram(*given, b.ffn, b.params, kernel, "vector", along, b.metric, precision).double() for b in blocks
    )
    inner = [ka.square().sum(), (ka * kb).sum(), kb.square().sum(), (ka - kb).square().sum()]
    whole = torch.stack(inner), torch.stack([ka.sum(1), kb.sum(1)]), torch.stack([ka.sum(0), kb.sum(0)])
    # Row sums of signed values cancel, up to what is lost of the largest.
    for own, expected in zip(found, whole, strict=True):
        largest = float(expected.abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12 * largest)

    by = Arithmetic(dtype, *PRECISIONS[precision][:2])
    how = {"kernel": kernel, "params": params, "reduce": direction}
    grams = [ntk_rounding.gram(by, b, x1, x2, metric=m, **how) for b, m in zip((wide, narrow), metrics, strict=True)]
    exact = reference.ntk_sums(
        *rows_in(torch.float64, "cpu"), *blocks_in(torch.float64, "cpu"), kernel, direction.double()
    )
    named = (dict(zip(names, values, strict=True)) for values in (found, exact, ntk_rounding.sums(*grams)))
    assert_rounding(*named)


def assert_comparisons(backend: str, device: str) -> None:
    """Comparisons by strips against whole kernels in float64."""
    a, b = make_bundle(9, 20, 4), make_bundle(9, 7, 4)
    x = torch.randn(150, 9).double()
    exact = ntk_compare(a, b, x, backend="reference", eigenvalues=0)
    for dtype, rel in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        blocks = moved(a, device, dtype), moved(b, device, dtype)
        found = ntk_compare(*blocks, x.to(device, dtype), backend=backend, eigenvalues=0, block_size=64)
        assert found.relative_error == pytest.approx(exact.relative_error, rel=rel)
        assert found.cosine == pytest.approx(exact.cosine, rel=rel)
        assert found.alignment == pytest.approx(exact.alignment, rel=10 * rel)


def assert_nothing_above_is_read(add: Callable[..., None]) -> None:
    """What `add` adds up of the strips of two symmetric kernels."""
    a, b = torch.randn(5, 9).double(), torch.randn(5, 9).double()
    above = torch.arange(9) > 4 + torch.arange(5)[:, None]
    sums, rows, columns = (torch.zeros(*shape).double() for shape in ((1, 4), (2, 5), (2, 12)))
    add(a.masked_fill(above, torch.nan), b, 4, True, sums, rows, columns)
    assert sums.isfinite().all()
    a, b = a.masked_fill(above, 0), b.masked_fill(above, 0)
    on = torch.arange(9) == 4 + torch.arange(5)[:, None]
    torch.testing.assert_close(sums[0, 1], (2 * a * b).sum() - (a * b)[on].sum())
    torch.testing.assert_close(rows[0], a.sum(1))
    torch.testing.assert_close(columns[1, :9], b.masked_fill(on, 0).sum(0))
    assert columns[:, 9:].eq(0).all()
