"""The Triton kernels of the MLP for experts: every expert's rows as if it were alone, to the bit."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton_interpreter  # noqa: F401, I001 - before any kernel is defined
import torch
from rounding import Arithmetic, assert_rounding
from torch import Tensor

from fusion_kernels.mlp import triton_linear, triton_pointwise
from fusion_kernels.mlp.triton_heuristics import TileConfig
from fusion_kernels.mlp.triton_tiles import ExpertTiles

pytestmark = pytest.mark.slow

DTYPES = [torch.float32, torch.float16]
#: Rows of every expert: none at either end and in between, one, less than a tile, a tile, more.
COUNTS = [(0, 1, 0, 16, 33, 7, 0), (40,), (0, 0, 0), (5, 64)]
TILE = TileConfig(16, 16, 16, 2, 4, 2)
d, h = 19, 23


def draw(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=g) / 4).to(dtype)


def offsets_of(counts: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0).to(torch.int32)


def rows(tensor: Tensor | None, offsets: Tensor, e: int) -> Tensor:
    assert tensor is not None
    return tensor[int(offsets[e]) : int(offsets[e + 1])]


@pytest.mark.parametrize("height", [1, 16, 64])
@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("counts", [*COUNTS, (1,), (0,), (1, 1, 1), (2200, 3), (0,) * 40 + (17,)])
def test_the_map_of_tiles(counts: tuple[int, ...], before: int, height: int) -> None:
    """Against a loop, for rows before the first expert's and behind the last one's, too."""
    offsets = offsets_of(counts) + before
    rows = int(offsets[-1]) + 5
    experts = ExpertTiles(offsets, rows)
    expected = []
    for expert, count in enumerate(counts):
        first, end = int(offsets[expert]), int(offsets[expert]) + count
        while first < end:
            expected.append([expert, first, end])
            first += height
    found = experts.map(height)
    assert found.dtype == torch.int32
    assert found.shape == (experts.count(height), 3)
    assert len(expected) <= experts.count(height) <= rows // height + len(counts)
    assert found[: len(expected)].tolist() == expected
    left_over = found[len(expected) :]
    assert bool((left_over[:, 1] >= 0).all())
    assert not bool(left_over[:, 2].any())
    assert experts.map(height) is found


def test_no_rows_make_no_tiles() -> None:
    experts = ExpertTiles(offsets_of((0, 0)), 0)
    assert experts.map(16).shape == (0, 3)
    y = triton_linear.grouped_linear(torch.zeros(0, d), torch.zeros(2, d, h), experts)
    assert y.shape == (0, h)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", COUNTS)
def test_plain(counts: tuple[int, ...], dtype: torch.dtype) -> None:
    E, offsets = len(counts), offsets_of(counts)
    T = int(offsets[-1])
    experts = ExpertTiles(offsets, T)
    x, dy = draw(T, d, dtype=dtype, seed=1), draw(T, d, dtype=dtype, seed=2)
    w, b, out = (draw(E, *s, dtype=dtype, seed=3 + i) for i, s in enumerate([(h, d), (h,), (d, h)]))
    z, a = triton_linear.linear_act(x, w, b, "gelu", save_z=True, experts=experts, config=TILE)
    assert z is not None
    dz, again, db = triton_linear.linear_act_backward(
        dy, out, z, "gelu", need_a=True, need_db1=True, experts=experts, config=TILE
    )
    assert again is not None
    assert torch.equal(again, a)
    assert db is not None
    assert db.shape == (E, h)
    for e in range(E):
        alone = triton_linear.linear_act(rows(x, offsets, e), w[e], b[e], "gelu", save_z=True, config=TILE)
        assert torch.equal(rows(z, offsets, e), rows(alone[0], offsets_of(counts[e : e + 1]), 0))
        assert torch.equal(rows(a, offsets, e), alone[1])
        dz_alone, _, db_alone = triton_linear.linear_act_backward(
            rows(dy, offsets, e), out[e], rows(z, offsets, e), "gelu", need_a=False, need_db1=True, config=TILE
        )
        assert torch.equal(rows(dz, offsets, e), dz_alone)
        assert torch.equal(db[e], db_alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", COUNTS)
def test_gated(counts: tuple[int, ...], dtype: torch.dtype) -> None:
    E, offsets = len(counts), offsets_of(counts)
    T = int(offsets[-1])
    experts = ExpertTiles(offsets, T)
    x, dy = draw(T, d, dtype=dtype, seed=1), draw(T, d, dtype=dtype, seed=2)
    # One tensor for both, as experts have it in checkpoints.
    both, out = draw(E, 2 * h, d, dtype=dtype, seed=3), draw(E, d, h, dtype=dtype, seed=4)
    gate, up = both[:, :h], both[:, h:]
    b = draw(E, h, dtype=dtype, seed=5)
    zg, zu, a = triton_linear.linear_glu(x, gate, up, b, None, "silu", save_z=True, experts=experts, config=TILE)
    assert zg is not None
    assert zu is not None
    dzg, dzu, again, dbg, dbu = triton_linear.linear_glu_backward(
        dy, out, zg, zu, "silu", need_a=True, need_db=True, experts=experts, config=TILE
    )
    assert again is not None
    assert torch.equal(again, a)
    assert dbg is not None
    assert dbu is not None
    for e in range(E):
        alone = triton_linear.linear_glu(
            rows(x, offsets, e), gate[e], up[e], b[e], None, "silu", save_z=True, config=TILE
        )
        own = [rows(t, offsets, e) for t in (zg, zu, a)]
        assert all(
            torch.equal(found, expected) for found, expected in zip(own, alone, strict=True) if expected is not None
        )
        expected = triton_linear.linear_glu_backward(
            rows(dy, offsets, e), out[e], own[0], own[1], "silu", need_a=False, need_db=True, config=TILE
        )
        found = (rows(dzg, offsets, e), rows(dzu, offsets, e), dbg[e], dbu[e])
        assert all(
            torch.equal(f, x) for f, x in zip(found, (*expected[:2], *expected[3:]), strict=True) if x is not None
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", COUNTS)
def test_products(counts: tuple[int, ...], dtype: torch.dtype) -> None:
    E, offsets = len(counts), offsets_of(counts)
    T = int(offsets[-1])
    experts = ExpertTiles(offsets, T)
    a, a2 = draw(T, h, dtype=dtype, seed=1), draw(T, h, dtype=dtype, seed=2)
    w, w2, bias = (draw(E, *s, dtype=dtype, seed=3 + i) for i, s in enumerate([(d, h), (d, h), (d,)]))
    y = triton_linear.grouped_linear(a, w.mT, experts, bias)
    back = triton_linear.grouped_linear(a, w.mT, experts, second=(a2, w2.mT))
    x = draw(T, d, dtype=dtype, seed=7)
    gradient = triton_linear.grouped_weight_gradient(a, x, offsets, dtype=torch.float32)
    small = triton_linear.grouped_weight_gradient(a, x, offsets, config=TILE)
    sums = triton_pointwise.column_sums(x, offsets)
    assert gradient.shape == small.shape == (E, h, d)
    assert small.dtype == dtype
    by = Arithmetic(dtype)
    for e in range(E):
        own, own2, own_x = (by.exact(rows(t, offsets, e)) for t in (a, a2, x))
        first = own @ by.exact(w[e]).T
        bounds = {
            "y": (first + by.exact(bias[e])).stored(),
            # One sum of both products.
            "back": (first + own2 @ by.exact(w2[e]).T).rounded(2 * h).stored(),
            "gradient": (own.T @ own_x).rounded(),
            "small": (own.T @ own_x).stored(),
            "sums": own_x.sum(0).rounded(),
        }
        found = {
            "y": rows(y, offsets, e), "back": rows(back, offsets, e), "gradient": gradient[e], "small": small[e],
            "sums": sums[e],
        }  # fmt: skip
        assert_rounding(found, {name: bound.value for name, bound in bounds.items()}, bounds)


def test_rows_of_no_expert_are_left_alone() -> None:
    x, w = draw(50, d, dtype=torch.float32, seed=1), draw(2, h, d, dtype=torch.float32, seed=2)
    offsets = torch.tensor([3, 20, 41], dtype=torch.int32)
    experts = ExpertTiles(offsets, 50)
    _, a = triton_linear.linear_act(x, w, None, "relu", save_z=False, experts=experts, config=TILE)
    # What is uninitialised is NaN in tests.
    assert bool(a[:3].isnan().all())
    assert bool(a[41:].isnan().all())
    torch.testing.assert_close(a[3:20], torch.relu(x[3:20] @ w[0].T), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(a[20:41], torch.relu(x[20:41] @ w[1].T), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(triton_pointwise.column_sums(x, offsets)[1], x[20:41].sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [*COUNTS, (0, 37, 2)])
def test_rows_are_read_and_written_where_they_lie(counts: tuple[int, ...], dtype: torch.dtype) -> None:
    """The bits of rows that were copied first; some rows belong to nobody, and no other token is looked at."""
    E, offsets = len(counts), offsets_of(counts)
    S = int(offsets[-1]) + 4
    experts, order = ExpertTiles(offsets, S), torch.randperm(S, generator=torch.Generator().manual_seed(8))
    x, dy, z = (draw(*s, dtype=dtype, seed=i) for i, s in enumerate([(9, d), (S, d), (S, h)]))
    x[7:] = torch.nan
    tokens = order % 7
    w, b, out = (draw(E, *s, dtype=dtype, seed=3 + i) for i, s in enumerate([(h, d), (h,), (d, h)]))
    mine, how = slice(0, S - 4), {"experts": experts, "config": TILE}

    def same(found: Sequence[Tensor | None], copied: Sequence[Tensor | None]) -> None:
        for one, other in zip(found, copied, strict=True):
            assert one is not None
            assert other is not None
            assert one.shape == other.shape
            places = mine if len(one) == S else slice(None)
            assert torch.equal(one[places], other[places])

    for function, weights in ((triton_linear.linear_act, (w, b)), (triton_linear.linear_glu, (w, w, b, b))):
        function_: Any = function
        read = function_(x, *weights, "gelu", save_z=True, rows=tokens, **how)
        same(read, function_(x[tokens], *weights, "gelu", save_z=True, **how))
    plain: Any = {"need_a": True, "need_db1": True, **how}
    read = triton_linear.linear_act_backward(dy, out, z, "gelu", rows=order, **plain)
    same(read, triton_linear.linear_act_backward(dy[order], out, z, "gelu", **plain))
    gated: Any = {"need_a": True, "need_db": True, **how}
    read = triton_linear.linear_glu_backward(dy, out, z, z, "gelu", rows=order, **gated)
    same(read, triton_linear.linear_glu_backward(dy[order], out, z, z, "gelu", **gated))
    sums = triton_linear.grouped_weight_gradient
    for a, b_, rows_a, rows_b in ((z, x, None, tokens), (dy, z, order, None), (dy, x, order, tokens)):
        copied = (a if rows_a is None else a[rows_a], b_ if rows_b is None else b_[rows_b])
        same([sums(a, b_, offsets, a_rows=rows_a, b_rows=rows_b, config=TILE)], [sums(*copied, offsets, config=TILE)])
    same([triton_pointwise.column_sums(dy, offsets, rows=order)], [triton_pointwise.column_sums(dy[order], offsets)])
    placed = triton_linear.grouped_linear(z, w, experts, draw(E, d, dtype=dtype, seed=9), places=order, config=TILE)
    same([placed[order]], [triton_linear.grouped_linear(z, w, experts, draw(E, d, dtype=dtype, seed=9), config=TILE)])
    assert not bool(placed[order[S - 4 :]].any())


def test_pairs_of_different_strides_are_refused() -> None:
    x, w = draw(8, d, dtype=torch.float32, seed=1), draw(1, d, h, dtype=torch.float32, seed=2)
    with pytest.raises(ValueError, match="must have the same strides"):
        triton_linear.grouped_linear(x, w, ExpertTiles(offsets_of((8,)), 8), second=(x, w.mT.contiguous().mT))
