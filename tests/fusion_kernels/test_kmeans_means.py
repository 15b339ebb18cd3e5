"""Means of the rows of each label: as exact as they can be, in any layout, by compiled code and without."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fusion_kernels import native
from fusion_kernels.kmeans.means import cluster_means, cluster_sums, row_norms

_DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.fixture(params=["compiled", "torch"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(native, "UNAVAILABLE", "not here")
    elif native.UNAVAILABLE is not None:
        pytest.skip(native.UNAVAILABLE)
    return str(request.param)


def drawn(batch: int, n: int, d: int, clusters: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, weights and labels; the last label has no row where there are others."""
    generator = torch.Generator().manual_seed(n + d)
    rows = torch.randn(batch, n, d, generator=generator).to(dtype)
    weights = 0.1 + torch.rand(batch, n, generator=generator, dtype=torch.float32)
    labels = torch.randint(0, max(1, clusters - 1), (batch, n), generator=generator)
    return rows, weights, labels


def expected(rows: Tensor, weights: Tensor, labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """In float64, the obvious way: the means, and those of the absolute values."""
    members = torch.nn.functional.one_hot(labels, clusters).double().transpose(1, 2) * weights.double().unsqueeze(1)
    mass = members.sum(2, keepdim=True)
    shares = torch.where(mass > 0, members / mass, 0.0)
    return shares @ rows.double(), shares @ rows.double().abs()


@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize(
    ("batch", "n", "d", "clusters"), [(1, 1, 1, 1), (2, 17, 1, 5), (3, 123, 15, 40), (1, 200, 16, 3), (2, 65, 1537, 70)]
)
def test_means_are_those_of_float64(how: str, dtype: torch.dtype, batch: int, n: int, d: int, clusters: int) -> None:
    rows, weights, labels = drawn(batch, n, d, clusters, dtype)
    found = cluster_means(rows, weights, labels, clusters)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wanted, magnitudes = expected(rows, weights, labels, clusters)
    # Compiled code rounds once, and divides by way of a reciprocal; torch adds up in the dtype of the result.
    terms = int(torch.stack([torch.bincount(own, minlength=clusters) for own in labels]).max())
    unit = torch.finfo(found.dtype).eps / 2
    roundings = (2 if how == "compiled" and dtype != torch.float64 else 2 * terms) + 4
    assert bool(((found.double() - wanted).abs() <= roundings * unit * magnitudes).all())


@pytest.mark.parametrize("dtype", _DTYPES)
def test_a_row_alone_stays_what_it_is_and_nothing_is_the_mean_of_nothing(how: str, dtype: torch.dtype) -> None:
    rows, _, _ = drawn(1, 4, 33, 4, dtype)
    weights, labels = torch.tensor([[0.3, 1.0, 0.7, 0.0]]), torch.tensor([[2, 0, 0, 3]])
    found = cluster_means(rows, weights, labels, 5)
    if how == "compiled":
        assert torch.equal(found[0, 2], rows[0, 0].to(found.dtype))
    assert not bool(found[0, 1].any())
    assert not bool(found[0, 3].any()), "a row of no weight"
    assert not bool(found[0, 4].any())


def test_strides_threads_and_company_change_no_bit(how: str) -> None:
    rows, weights, labels = drawn(3, 123, 70, 50, torch.bfloat16)
    found = cluster_means(rows, weights, labels, 50)
    laid = rows.transpose(1, 2).contiguous().transpose(1, 2)
    assert not laid.is_contiguous()
    assert torch.equal(cluster_means(laid, weights, labels, 50), found)
    assert torch.equal(cluster_means(rows.float(), weights, labels, 50), found)
    assert torch.equal(cluster_means(rows[1:2], weights[1:2], labels[1:2], 50)[0], found[1])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(cluster_means(rows, weights, labels, 50), found)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", _DTYPES)
def test_norms_of_rows_whose_squares_fit_no_float32(how: str, dtype: torch.dtype) -> None:
    rows = drawn(2, 5, 17, 1, dtype)[0]
    if dtype != torch.float16:
        rows = rows * 1e30
    expected = rows.double().square().sum(2).sqrt()
    laid = rows.transpose(1, 2).contiguous().transpose(1, 2)
    for found in (row_norms(rows), row_norms(laid)):
        assert bool(((found - expected).abs() <= 40 * 2**-53 * expected).all())


def test_sums_are_in_the_order_of_the_rows() -> None:
    # In any other order the small ones would be lost, or not.
    rows = torch.tensor([2.0**24, 1.0, 1.0, -(2.0**24)]).reshape(1, 4, 1)
    found = cluster_sums(rows, torch.ones(1, 4), torch.zeros(1, 4, dtype=torch.int64), 1)
    assert float(found) == 0.0


@pytest.mark.skipif(native.UNAVAILABLE is not None, reason=str(native.UNAVAILABLE))
def test_labels_outside_are_refused() -> None:
    with pytest.raises(RuntimeError, match="labels: outside"):
        cluster_means(torch.randn(1, 3, 4), torch.ones(1, 3), torch.tensor([[0, 1, 2]]), 2)
