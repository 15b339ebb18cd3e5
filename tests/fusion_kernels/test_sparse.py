"""Entries of gᵀ x, by every backend that runs on the CPU, against float64."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from rounding import Arithmetic, assert_rounding
from torch import Tensor

import fusion_kernels
from fusion_kernels import native, sparse
from fusion_kernels.sparse import heuristics, torch_backend
from fusion_kernels.sparse.reference import sampled_product as specified

BACKENDS = ["auto", "torch", "reference", *(["cpu"] if native.UNAVAILABLE is None else [])]
#: Tokens, rows, columns, entries: none of each, chunks of 256 tokens and rests, entries that share rows or do not.
SHAPES = [(1, 1, 1, 1), (300, 40, 33, 250), (513, 7, 300, 900), (9, 200, 3, 12), (0, 4, 5, 6), (20, 4, 5, 0)]


def draw(T: int, N: int, d: int, k: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(T + N + d)
    g, x = (torch.randn(T, n, generator=generator, dtype=torch.float64).to(dtype) for n in (N, d))
    at = torch.randperm(N * d, generator=generator)[:k].sort().values
    return g, x, at // d, at % d


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_as_in_float64(backend: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    g, x, rows, columns = draw(*shape, dtype)
    found = fusion_kernels.sampled_product(g, x, rows, columns, backend=backend)
    by = Arithmetic(torch.float64 if dtype == torch.float64 else torch.float32)
    bound = (by.exact(g).T @ by.exact(x))[rows, columns]
    assert found.dtype == by.dtype
    exact = specified(g.double(), x.double(), rows, columns)
    # In float64 the specification is what the others are compared with.
    usual = [] if dtype == torch.float64 else [{"found": specified(g, x, rows, columns)}]
    assert_rounding({"found": found}, {"found": exact}, {"found": bound}, *usual)


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_and_either_integers(backend: str) -> None:
    g, x, rows, columns = draw(70, 12, 10, 60)
    wanted = fusion_kernels.sampled_product(g, x, rows, columns, backend=backend)
    wide = torch.zeros(70, 40)
    wide[:, 5:15] = x
    views = (g.T.contiguous().T, wide[:, 5:15], rows.int(), torch.stack([columns, rows], 1)[:, 0].int())
    assert torch.allclose(fusion_kernels.sampled_product(*views, backend=backend), wanted, atol=1e-5)


@pytest.mark.skipif(native.UNAVAILABLE is not None, reason="the compiled library is not there")
def test_compiled_sums_are_the_same_bits_on_any_number_of_threads() -> None:
    inputs = draw(700, 64, 80, 3000)
    alone = fusion_kernels.sampled_product(*inputs, backend="cpu")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(min(4, os.cpu_count() or 1))
        again = fusion_kernels.sampled_product(*inputs, backend="cpu")
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(again, alone)


def test_no_backend_but_the_reference_holds_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heuristics, "BLOCK", 64 * 30)
    sizes: list[int] = []
    product = torch.Tensor.__matmul__

    def noted(a: Tensor, b: Tensor) -> Tensor:
        found = product(a, b)
        sizes.append(found.numel())
        return found

    g, x, rows, columns = draw(20, 500, 30, 400)
    monkeypatch.setattr(torch.Tensor, "__matmul__", noted)
    found = torch_backend.sampled_product(g, x, rows, columns)
    assert sizes == [64 * 30] * 7 + [52 * 30]
    assert torch.allclose(found, specified(g, x, rows, columns), atol=1e-4)


def test_the_operator_is_declared_as_torch_wants_it() -> None:
    g, x, rows, columns = draw(6, 5, 4, 7, torch.float64)
    inputs = (g.requires_grad_(), x.requires_grad_(), rows.int(), columns.int())
    torch.library.opcheck(sparse.SAMPLED.overload, inputs)
    assert torch.autograd.gradcheck(lambda g, x: fusion_kernels.sampled_product(g, x, rows, columns), inputs[:2])


@pytest.mark.parametrize(
    "changes", [{"x": torch.zeros(5, 4)}, {"x": torch.zeros(6, 4).double()}, {"g": torch.zeros(6)}]
)
def test_matrices_that_do_not_fit(changes: dict[str, Tensor]) -> None:
    at = torch.zeros(3, dtype=torch.int64)
    inputs: dict[str, Any] = {"g": torch.zeros(6, 5), "x": torch.zeros(6, 4), "rows": at, "columns": at, **changes}
    with pytest.raises(ValueError, match=r"pass \(T, N\) and \(T, d\) of one dtype"):
        fusion_kernels.sampled_product(**inputs)


@pytest.mark.parametrize(
    "columns", [torch.zeros(2, dtype=torch.int64), torch.zeros(3), torch.zeros(3, dtype=torch.int32)]
)
def test_entries_that_do_not_fit(columns: Tensor) -> None:
    at = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="one pair for each entry"):
        fusion_kernels.sampled_product(torch.zeros(6, 5), torch.zeros(6, 4), at, columns)


@pytest.mark.skipif(native.UNAVAILABLE is not None, reason="the compiled library is not there")
def test_compiled_code_reads_nothing_outside() -> None:
    at = torch.tensor([0, 5])
    with pytest.raises(RuntimeError, match="outside of the product"):
        fusion_kernels.sampled_product(torch.zeros(6, 5), torch.zeros(6, 9), at, at, backend="cpu")


def test_which_way_is_cheaper() -> None:
    """Few entries one by one; many, or a GPU's 16 bits, out of blocks; and no more entries make up for one more way."""
    assert heuristics.one_by_one(4096, 3072, 768, 11_796, on_gpu=False, short=False)
    assert not heuristics.one_by_one(4096, 3072, 768, 3072 * 768, on_gpu=False, short=False)
    assert heuristics.one_by_one(4096, 3072, 768, 11_796, on_gpu=True, short=False)
    assert not heuristics.one_by_one(4096, 3072, 768, 117_960, on_gpu=True, short=True)
    ways = [heuristics.one_by_one(64, 300, 200, k, on_gpu=False, short=False) for k in range(1, 60_000, 500)]
    assert ways == sorted(ways, reverse=True)
    assert True in ways
    assert False in ways
    g, x, rows, columns = draw(8, 30, 20, 600)
    assert sparse.SAMPLED.chosen(g, x, rows.int(), columns.int()).name == "torch"
