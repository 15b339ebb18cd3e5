"""k-means of balanced blocks: the clusters of the rows that it does not form, the same bits, and what it declines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from points import neuron_like
from torch import Tensor

from fusion_kernels import native
from fusion_kernels.kmeans import Status, kmeans
from fusion_kernels.kmeans.blocks import BlocksResult, fits, kmeans_blocks
from fusion_kernels.kmeans.types import Options

pytestmark = pytest.mark.skipif(native.UNAVAILABLE is not None, reason=str(native.UNAVAILABLE))

#: Points, columns of the blocks, clusters: around the sizes of tiles, panels and blocks of columns.
SHAPES = [(7, (3, 5), 3), (97, (33, 31, 1), 40), (120, (64, 40), 60), (289, (70, 70, 90), 96), (193, (2048, 2050), 96)]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def drawn(n: int, widths: Sequence[int], problems: int = 1, *, exact: bool = True, like: Any = None) -> list[Tensor]:
    """Blocks (problems, n, d) of unlike variance; `exact` in bfloat16."""
    like = like or (lambda n, d, seed: torch.randn(n, d, generator=torch.Generator().manual_seed(seed)))
    blocks = [torch.stack([like(n, d, 10 * b + i) for b in range(problems)]) for i, d in enumerate(widths)]
    scaled = [block * 10.0 ** (1 - 2 * i) for i, block in enumerate(blocks)]
    return [block.bfloat16().float() if exact else block for block in scaled]


def weights_of(problems: int, n: int) -> Tensor:
    return 0.1 + 2 * torch.rand(problems, n, generator=torch.Generator().manual_seed(9))


def rows_of(blocks: Sequence[Tensor]) -> Tensor:
    """What is clustered, the obvious way, in float64."""
    wide = [block.double() for block in blocks]
    return torch.cat([w / (w - w.mean(1, keepdim=True)).square().sum((1, 2), keepdim=True).sqrt() for w in wide], 2)


def inertia_of(rows: Tensor, w: Tensor, labels: Tensor, K: int) -> Tensor:
    members = torch.nn.functional.one_hot(labels, K).double().transpose(1, 2) * w.double().unsqueeze(1)
    means = members @ rows / members.sum(2, keepdim=True)
    nearest = means.gather(1, labels.unsqueeze(2).expand(-1, -1, rows.shape[2]))
    return (w.double() * (rows - nearest).square().sum(2)).sum(1)


def assert_same(one: BlocksResult, other: BlocksResult) -> None:
    for name in BlocksResult.__annotations__:
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def products(x: Tensor, factor: float = 1.0, before: float = 0.0) -> Tensor:
    """What is added to `before`, (problems, n, n), up to the diagonal; what stands elsewhere is poisoned."""
    problems, n, _ = x.shape
    gram = torch.full((problems, n, -(-n // 16) * 16 + 16), before)
    gram[:, :, :n].masked_fill_(torch.ones(n, n, dtype=torch.bool).triu(1), torch.nan)
    native.operators().add_products(gram, x, torch.full((problems,), factor, dtype=torch.float64))
    return gram[:, :, :n].tril()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("n", "d"), [(1, 1), (6, 32), (7, 33), (24, 2048), (97, 2100), (193, 4100), (289, 70)])
def test_products_are_as_exact_as_those_of_float32(n: int, d: int, exact: bool) -> None:
    (x,) = drawn(n, [d], 3, exact=exact)
    found, plain = products(x), native.operators().gram(x)[:, :, :n].tril()
    expected = (x.double() @ x.double().transpose(1, 2)).tril()
    magnitudes = x.double().abs() @ x.double().abs().transpose(1, 2)
    errors, usual = found - expected, plain - expected
    assert bool((errors.abs() <= (d + 1) * 2**-24 * magnitudes).all())
    assert float(errors.square().mean()) <= 4 * float(usual.square().mean()) or n < 16
    scaled = products(x, 3.0, 2.0) - (2 + 3 * expected).tril()
    assert bool((scaled.abs() <= (d + 3) * 2**-24 * (2 + 3 * magnitudes)).all())
    # One problem that is exact beside others that are not, alone and on other threads.
    mixed = torch.cat([x, x.bfloat16().float() + 2.0**-20])
    torch.set_num_threads(3)
    assert torch.equal(products(mixed)[:3], found)
    assert torch.equal(products(x[1:2].contiguous())[0], found[1])
    # The same numbers in the other type.
    assert torch.equal(products(x.bfloat16()), products(x.bfloat16().float()))


def test_nothing_is_added_of_a_problem_without_a_factor() -> None:
    (x,) = drawn(20, [30], 2)
    gram = torch.ones(2, 20, 32)
    native.operators().add_products(gram, x, torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert torch.equal(gram[0], torch.ones(20, 32))
    assert not torch.equal(gram[1], gram[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "d"), [(1, 1), (17, 123), (65, 1537)])
def test_moments(n: int, d: int, dtype: torch.dtype) -> None:
    (x,) = drawn(n, [d], 2)
    wide, taken = x.to(dtype).double(), x.to(dtype)
    found, of_rows = native.operators().moments(taken)
    squares = wide.square().sum((1, 2))
    assert bool(((of_rows - wide.square().sum(2)).abs() <= 2 * d * 2**-53 * wide.square().sum(2)).all())
    variance = (wide - wide.mean(1, keepdim=True)).square().sum((1, 2))
    assert bool(((found[:, 1] - squares).abs() <= 2 * n * d * 2**-53 * squares).all())
    assert bool(((found[:, 0] - variance).abs() <= 8 * n * d * 2**-53 * squares).all())


@pytest.mark.parametrize("like", [None, neuron_like])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("n", "widths", "K"), SHAPES)
def test_the_clusters_are_those_of_the_balanced_rows(
    n: int, widths: tuple[int, ...], K: int, exact: bool, like: Any
) -> None:
    blocks, w = drawn(n, widths, 2, exact=exact, like=like), weights_of(2, n)
    options = Options(K, max_iter=500, seed=3)
    found = kmeans_blocks(blocks, w, options)
    rows = rows_of(blocks)
    expected = kmeans(rows.float(), K, sample_weight=w, max_iter=500, seed=3)
    if like is None:
        assert bool(found.settled.all())
    for b in found.settled.nonzero().squeeze(1).tolist():
        assert int(found.status[b]) == Status.OK
        actual = inertia_of(rows[b : b + 1], w[b : b + 1], found.labels[b : b + 1], K)[0]
        assert float(found.inertia[b]) == pytest.approx(float(actual), rel=1e-4, abs=1e-6)
        # Near-ties may lead elsewhere, and nowhere much worse.
        assert float(actual) <= float(expected.inertia[b]) * 1.02
        agree = float((found.labels[b] == expected.labels[b]).double().mean())
        assert agree > 0.9 or float(actual) < float(expected.inertia[b])


@pytest.mark.parametrize("exact", [True, False])
def test_a_problem_has_the_same_bits_alone_in_a_batch_and_on_any_threads(exact: bool) -> None:
    blocks, w = drawn(193, (130, 70), 4, exact=exact), weights_of(4, 193)
    options = Options(90, max_iter=500)
    torch.set_num_threads(1)
    together = kmeans_blocks(blocks, w, options)
    alone = [kmeans_blocks([x[b : b + 1] for x in blocks], w[b : b + 1], options) for b in range(4)]
    for b, one in enumerate(alone):
        fields = {name: getattr(together, name)[b : b + 1] for name in BlocksResult.__annotations__}
        assert_same(one, BlocksResult(**fields))
    torch.set_num_threads(3)
    assert_same(kmeans_blocks(blocks, w, options), together)


def test_bfloat16_blocks_are_clustered_as_their_copies_in_float32_are() -> None:
    blocks, w = drawn(193, (130, 70), 3), weights_of(3, 193)
    options = Options(90, max_iter=500)
    assert_same(kmeans_blocks([x.bfloat16() for x in blocks], w, options), kmeans_blocks(blocks, w, options))


def test_what_products_do_not_decide_is_not_settled_and_spoils_no_other() -> None:
    blocks, w = drawn(100, (40, 30), 6), weights_of(6, 100)
    plain = kmeans_blocks([x[5:] for x in blocks], w[5:], Options(40))
    blocks[0][0] = 1.0  # no variance
    blocks[0][1, 3, 4] = float("nan")
    blocks[1][2, 3, 4] = float("inf")
    blocks[0][3] += 1000.0  # a mean beside which the points are nothing
    blocks[0][4], blocks[1][4] = blocks[0][4, :5].repeat(20, 1), blocks[1][4, :5].repeat(20, 1)  # five distinct points
    found = kmeans_blocks(blocks, w, Options(40))
    assert found.settled.tolist() == [False] * 5 + [True]
    assert torch.equal(found.labels[5], plain.labels[0])
    assert torch.equal(found.inertia[5], plain.inertia[0])


def test_where_it_does_not_fit() -> None:
    blocks = drawn(100, (40, 30))
    assert fits(blocks, Options(40))
    assert not fits(blocks, Options(100))
    assert not fits([block.double() for block in blocks], Options(40))
    assert not fits([torch.empty(1, 30000, 8, device="meta")], Options(2))
    assert not fits([torch.zeros(1, 30000, 8)], Options(2))  # direct products cost less
