"""The Triton kernels of the MLP against float64, interpreted on the CPU, over odd shapes, both dtypes and every tile.

Each stage is held to what rounding may do to it, and over many entries to twice the RMS error of torch (`rounding`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton_interpreter  # noqa: F401, I001 - before any kernel is defined
import torch
from rounding import MANY, Arithmetic, Rounded, assert_rounding
from torch import Tensor

from fusion_kernels.activations import ACTIVATIONS
from fusion_kernels import gpu
from fusion_kernels.mlp import (
    triton_launch,
    triton_linear,
    triton_pointwise,
    triton_resident,
    triton_heuristics,
)
from fusion_kernels.mlp.triton_heuristics import HALF, IEEE, TF32, Gpu, ResidentConfig, TileConfig

pytestmark = pytest.mark.slow

DTYPES = [torch.float32, torch.float16]
#: Tokens, inputs, neurons; one dimension at a time is long.
SHAPES = [(1, 1, 1), (17, 123, 17), (123, 17, 123), (65, 128, 64), (3, 1537, 17)]
SMALL = TileConfig(16, 16, 16, 3, 4, 2)


def draw(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype)


def apart(x: Tensor) -> Tensor:
    """The same rows, further apart in memory than they are long."""
    wide = torch.full((x.shape[0], x.shape[1] + 5), float("nan"), dtype=x.dtype)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


class Problem:
    """Inputs of a block; its stages as rounding leaves them, and in torch, with products of float16 in float32."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, activation: str, bias: bool = True) -> None:
        self.T, self.d, self.h = shape
        self.dtype, self.activation, self.by = dtype, ACTIVATIONS[activation], Arithmetic(dtype)
        self.x = apart(draw(self.T, self.d, dtype=dtype, seed=1))
        self.w, self.up = (draw(self.h, self.d, dtype=dtype, seed=s, scale=self.d**-0.5) for s in (2, 3))
        self.out = draw(self.d, self.h, dtype=dtype, seed=4, scale=self.h**-0.5)
        self.b, self.b_up = (draw(self.h, dtype=dtype, seed=s) if bias else None for s in (5, 6))
        self.b_out = draw(self.d, dtype=dtype, seed=7) if bias else None
        self.dy = apart(draw(self.T, self.d, dtype=dtype, seed=8))

    def linear(self, x: Tensor | Rounded, weight: Tensor, bias: Tensor | None) -> Rounded:
        """x weightᵀ + bias, as it is stored."""
        z = (x if isinstance(x, Rounded) else self.by.exact(x)) @ self.by.exact(weight).T
        return (z if bias is None else z + self.by.exact(bias)).stored()

    def activated(self, z: Tensor | Rounded) -> tuple[Rounded, Rounded]:
        """The activation and its derivative, unstored."""
        return (z if isinstance(z, Rounded) else self.by.exact(z)).activated(self.activation.name)

    def torch_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = x.float() @ weight.T.float()
        return (out if bias is None else out + bias.float()).to(self.dtype)

    def phi(self, z: Tensor) -> Tensor:
        return self.activation.function(z)

    def slope(self, z: Tensor) -> Tensor:
        """In float32, as torch's kernels have it."""
        return self.activation.derivative(z.float())

    def holds(self, **stages: tuple[Tensor | None, Rounded, Tensor | None]) -> None:
        """What was found, what it is, and torch's (None for sums that torch has an order of its own for)."""
        found = {name: own for name, (own, _, _) in stages.items() if own is not None}
        assert set(found) == set(stages)
        exact = {name: stage.value for name, (_, stage, _) in stages.items()}
        bounds = {name: stage for name, (_, stage, _) in stages.items()}
        assert_rounding(found, exact, bounds)
        with_torch = {name: torchs for name, (_, _, torchs) in stages.items() if torchs is not None}
        # Errors of fewer hidden values come back in every column of what is made of them.
        if self.T * self.h >= MANY:
            assert_rounding(*({name: of[name] for name in with_torch} for of in (found, exact, bounds)), with_torch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str, dtype: torch.dtype) -> None:
    p = Problem((33, 17, 123), dtype, activation)
    check_plain(p, None)
    check_gated(p, None)
    check_pointwise(p)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    p = Problem(shape, dtype, "gelu", bias=shape[0] != 17)
    check_plain(p, None)
    check_gated(p, None)
    check_pointwise(p)


def tiles() -> Iterator[tuple[torch.dtype, TileConfig]]:
    for kind in (HALF, TF32, IEEE):
        for memory in (gpu.SMALL_SHARED_MEMORY, gpu.LARGE_SHARED_MEMORY):
            for config in triton_heuristics.tile_candidates(kind, Gpu(memory, 1), False):
                yield torch.float16 if kind == HALF else torch.float32, config


@pytest.mark.parametrize(("dtype", "config"), sorted(set(tiles()), key=str))
def test_every_tile(dtype: torch.dtype, config: TileConfig) -> None:
    # As many rows and columns as fill a tile and begin another, then exact multiples.
    p = Problem((config.BM + 1, config.BK + 3, config.BN + 1), dtype, "silu")
    check_plain(p, config)
    check_gated(p, config)
    p = Problem((config.BM, 2 * config.BK, config.BN), dtype, "gelu")
    check_plain(p, config)
    check_gated(p, config)


def check_plain(p: Problem, config: TileConfig | None) -> None:
    name = p.activation.name
    z, a = triton_linear.linear_act(p.x, p.w, p.b, name, save_z=True, config=config)
    exact, torchs = p.linear(p.x, p.w, p.b), p.torch_linear(p.x, p.w, p.b)
    p.holds(z=(z, exact, torchs), a=(a, p.activated(exact)[0].stored(), p.phi(torchs)))
    nothing, again = triton_linear.linear_act(p.x, p.w, p.b, name, save_z=False, config=config)
    assert nothing is None
    assert torch.equal(a, again)

    assert z is not None
    dz, recomputed, db = triton_linear.linear_act_backward(
        p.dy, p.out, apart(z), name, need_a=True, need_db1=True, config=config
    )
    assert recomputed is not None
    assert torch.equal(recomputed, a)
    exact = (p.linear(p.dy, p.out.T, None) * p.activated(z)[1]).stored()
    torchs = (p.torch_linear(p.dy, p.out.T, None) * p.slope(z)).to(p.dtype)
    p.holds(dz=(dz, exact, torchs), db=(db, exact.sum(0), None))
    bare = triton_linear.linear_act_backward(p.dy, p.out, z, name, need_a=False, need_db1=False, config=config)
    assert torch.equal(bare[0], dz)
    assert bare[1:] == (None, None)


def check_gated(p: Problem, config: TileConfig | None) -> None:
    name = p.activation.name
    zg, zu, a = triton_linear.linear_glu(p.x, p.w, p.up, p.b, p.b_up, name, save_z=True, config=config)
    g, u = p.linear(p.x, p.w, p.b), p.linear(p.x, p.up, p.b_up)
    g_torch, u_torch = p.torch_linear(p.x, p.w, p.b), p.torch_linear(p.x, p.up, p.b_up)
    hidden = (p.activated(g)[0].stored() * u).stored()
    p.holds(zg=(zg, g, g_torch), zu=(zu, u, u_torch), a=(a, hidden, p.phi(g_torch) * u_torch))
    none_g, none_u, again = triton_linear.linear_glu(p.x, p.w, p.up, p.b, p.b_up, name, save_z=False, config=config)
    assert none_g is None
    assert none_u is None
    assert torch.equal(a, again)

    assert zg is not None
    assert zu is not None
    dzg, dzu, recomputed, dbg, dbu = triton_linear.linear_glu_backward(
        p.dy, p.out, apart(zg), zu, name, need_a=True, need_db=True, config=config
    )
    assert recomputed is not None
    assert torch.equal(recomputed, a)
    da, da_torch = p.linear(p.dy, p.out.T, None), p.torch_linear(p.dy, p.out.T, None)
    value, slope = p.activated(zg)
    exact_g, exact_u = ((da * p.by.exact(zu)).stored() * slope).stored(), (da * value.stored()).stored()
    torch_g, torch_u = (da_torch * zu * p.slope(zg)).to(p.dtype), da_torch * p.phi(zg)
    p.holds(
        dzg=(dzg, exact_g, torch_g), dzu=(dzu, exact_u, torch_u),
        dbg=(dbg, exact_g.sum(0), None), dbu=(dbu, exact_u.sum(0), None),
    )  # fmt: skip
    bare = triton_linear.linear_glu_backward(p.dy, p.out, zg, zu, name, need_a=False, need_db=False, config=config)
    assert torch.equal(bare[0], dzg)
    assert torch.equal(bare[1], dzu)
    assert bare[2:] == (None, None, None)


def check_pointwise(p: Problem) -> None:
    name = p.activation.name
    z, up = (draw(p.T, p.h, dtype=p.dtype, seed=s) for s in (9, 10))
    da = apart(draw(p.T, p.h, dtype=p.dtype, seed=11))
    value, slope = p.activated(z)
    exact_up, exact_da = p.by.exact(up), p.by.exact(da)
    for given in (z, apart(z)):
        a = triton_pointwise.act_forward(given, name)
        dz, recomputed = triton_pointwise.act_backward(da, given, name, True)
        assert recomputed is not None
        assert torch.equal(recomputed, a)
        p.holds(
            a=(a, value.stored(), p.phi(z)),
            dz=(dz, (exact_da * slope).stored(), (da * p.slope(z)).to(p.dtype)),
        )  # fmt: skip
        a = triton_pointwise.glu_act_forward(given, up, name)
        dg, du, recomputed = triton_pointwise.glu_act_backward(da.contiguous(), given, up, name, True)
        assert recomputed is not None
        assert torch.equal(recomputed, a)
        p.holds(
            a=(a, (value.stored() * exact_up).stored(), p.phi(z) * up),
            dg=(dg, ((exact_da * exact_up).stored() * slope).stored(), (da * up * p.slope(z)).to(p.dtype)),
            du=(du, (exact_da * value.stored()).stored(), da * p.phi(z)),
        )  # fmt: skip
    assert triton_pointwise.act_backward(da, z, name, False)[1] is None
    assert triton_pointwise.glu_act_backward(da, z, up, name, False)[2] is None


# --- hidden-resident -------------------------------------------------------------------------------------------------


def check_resident(p: Problem, config: ResidentConfig | None) -> None:
    name = p.activation.name
    g, u = p.linear(p.x, p.w, p.b), p.linear(p.x, p.up, p.b_up)
    g_torch, u_torch = p.torch_linear(p.x, p.w, p.b), p.torch_linear(p.x, p.up, p.b_up)
    plain, plain_torch = p.activated(g)[0].stored(), p.phi(g_torch)
    gated, gated_torch = (plain * u).stored(), plain_torch * u_torch
    y = triton_resident.mlp_resident(p.x, p.w, p.b, p.out, p.b_out, name, config=config)
    p.holds(y=(y, p.linear(plain, p.out, p.b_out), p.torch_linear(plain_torch, p.out, p.b_out)))
    y = triton_resident.glu_resident(p.x, p.w, p.up, p.b, p.b_up, p.out, p.b_out, name, config=config)
    p.holds(y=(y, p.linear(gated, p.out, p.b_out), p.torch_linear(gated_torch, p.out, p.b_out)))


RESIDENT = [(1, 17, 1), (17, 1, 3), (123, 17, 50), (65, 128, 64), (3, 1537, 50)]


@pytest.mark.parametrize(
    ("T", "d", "h", "activation"),
    [(*shape, "gelu") for shape in RESIDENT] + [(17, 123, 17, name) for name in ACTIVATIONS],
)
def test_resident(T: int, d: int, h: int, activation: str) -> None:
    p = Problem((T, d, h), torch.float16, activation, bias=T != 17)
    check_resident(p, None)
    p = Problem((T, d, h), torch.float32, activation, bias=T != 17)
    check_resident(p, ResidentConfig(16, *triton_heuristics.hidden_parts(h), 32, 16, 4, 2))


@pytest.mark.parametrize("h", [16, 40, 96, 170, 192, 256, 320, 384, 512])
def test_resident_in_two_parts(h: int) -> None:
    H0, H1 = triton_heuristics.hidden_parts(h)
    assert h <= H0 + H1 <= 1.5 * h
    check_resident(Problem((33, 32, h), torch.float16, "gelu"), ResidentConfig(32, H0, H1, 16, 32, 4, 2))


def test_resident_fits() -> None:
    fits = triton_resident.resident_fits
    for sm in (80, 86, 90, 100, 120):
        assert fits(192, 768, torch.bfloat16, sm)
        assert fits(256, 1024, torch.float16, sm, gated=True)
        assert not fits(3072, 768, torch.bfloat16, sm)
        assert not fits(192, 768, torch.float32, sm)
    assert fits(512, 2048, torch.bfloat16, 90)
    assert not fits(512, 2048, torch.bfloat16, 90, gated=True)
    assert not fits(256, 1537, torch.bfloat16, 90)
    p = Problem((3, 5, 1537), torch.float16, "gelu")
    with pytest.raises(ValueError, match=r"1537 neurons of torch\.float16 do not fit"):
        triton_resident.mlp_resident(p.x, p.w, p.b, p.out, p.b_out, "gelu")


# --- no rows, other layouts, bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_tokens(dtype: torch.dtype) -> None:
    p = Problem((0, 17, 33), dtype, "gelu")
    z, a = triton_linear.linear_act(p.x, p.w, p.b, "gelu", save_z=True)
    assert z is not None
    assert z.shape == a.shape == (0, 33)
    dz, recomputed, db = triton_linear.linear_act_backward(p.dy, p.out, z, "gelu", need_a=True, need_db1=True)
    assert recomputed is not None
    assert dz.shape == recomputed.shape == (0, 33)
    assert torch.equal(db, torch.zeros(33))
    zg, zu, _ = triton_linear.linear_glu(p.x, p.w, p.up, None, None, "silu", save_z=True)
    assert zg is not None
    assert zu is not None
    *_, dbg, dbu = triton_linear.linear_glu_backward(p.dy, p.out, zg, zu, "silu", need_a=False, need_db=True)
    assert torch.equal(dbg, torch.zeros(33))
    assert torch.equal(dbu, torch.zeros(33))
    assert triton_pointwise.act_forward(z, "gelu").shape == (0, 33)
    if dtype == torch.float16:
        assert triton_resident.mlp_resident(p.x, p.w, p.b, p.out, p.b_out, "gelu").shape == (0, 17)


def test_weights_in_any_layout() -> None:
    p = Problem((33, 17, 20), torch.float32, "gelu")
    _, expected = triton_linear.linear_act(p.x, p.w, p.b, "gelu", save_z=False, config=SMALL)
    _, found = triton_linear.linear_act(p.x, p.w.T.contiguous().T, p.b, "gelu", save_z=False, config=SMALL)
    assert torch.equal(found, expected)
    # Gate and up in one tensor, interleaved, and then of different layouts.
    both = torch.stack([p.w, p.up], 1).flatten(0, 1)
    *_, expected = triton_linear.linear_glu(p.x, p.w, p.up, p.b, p.b_up, "silu", save_z=False, config=SMALL)
    for gate, up in ((both[0::2], both[1::2]), (both[0::2], p.up)):
        *_, found = triton_linear.linear_glu(p.x, gate, up, p.b, p.b_up, "silu", save_z=False, config=SMALL)
        assert torch.equal(found, expected)
    expected, *_ = triton_linear.linear_act_backward(p.dy, p.out, expected, "gelu", need_a=False, need_db1=False)
    turned = p.out.T.contiguous().T
    found, *_ = triton_linear.linear_act_backward(p.dy, turned, found, "gelu", need_a=False, need_db1=False)
    assert torch.equal(found, expected)


def test_bad_input() -> None:
    p = Problem((5, 17, 20), torch.float32, "gelu")
    with pytest.raises(ValueError, match=r"rows must be contiguous.*call \.contiguous\(\)"):
        triton_linear.linear_act(p.x.T.contiguous().T, p.w, p.b, "gelu", save_z=False)
    with pytest.raises(ValueError, match=r"not torch\.float64: convert x first"):
        triton_linear.linear_act(p.x.double(), p.w, p.b, "gelu", save_z=False)


def test_float32_precision_follows_torch() -> None:
    assert triton_launch.kind(torch.float32) == IEEE
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert triton_launch.kind(torch.float32) == TF32
        assert triton_launch.kind(torch.bfloat16) == HALF
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_tiles_fill_the_gpu() -> None:
    gpu = triton_heuristics.gpu_of(90)
    large = triton_heuristics.tile_config(65536, 768, 768, HALF, gpu)
    assert large.BM * large.BN == 128 * 128
    # Two programs beside each other, which hides the epilogue of one. Where products take far longer, fewer loads.
    assert large.programs(HALF, gpu, False) == 2
    assert triton_heuristics.tile_config(65536, 1024, 4096, HALF, gpu).BN == 256
    few = triton_heuristics.tile_config(1024, 192, 768, HALF, gpu)
    assert -(-1024 // few.BM) * -(-192 // few.BN) >= 48
    assert triton_heuristics.tile_config(1, 768, 768, HALF, gpu).BM == 16


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("wide", [False, True])
def test_any_number_of_rows_takes_one_of_three_tiles_that_fit(wide: bool, capability: int) -> None:
    gpu = triton_heuristics.gpu_of(capability)
    for columns, depth in ((192, 768), (768, 768), (512, 2048), (3584, 14336), (1, 1)):
        for kind in (HALF, TF32, IEEE):
            tiles = {
                triton_heuristics.tile_config(rows, columns, depth, kind, gpu, wide=wide)
                for rows in (*range(1, 200), *range(200, 70_000, 331))
            }
            assert len(tiles) <= 3
            assert all(tile.programs(kind, gpu, wide) >= 1 for tile in tiles)
            assert all(tile.shared(kind, wide) <= gpu.shared_memory for tile in tiles)


@pytest.mark.parametrize("operand", ["x", "w"])
def test_operands_between_boundaries_take_tiles_of_single_entries(
    operand: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[bool] = []
    original = triton_heuristics.tile_config

    def watched(*arguments: Any, **options: Any) -> TileConfig:
        chosen.append(options["aligned"])
        return original(*arguments, **options)

    monkeypatch.setattr(triton_heuristics, "tile_config", watched)
    wide = {"x": draw(17, 48, dtype=torch.float16, seed=1), "w": draw(16, 48, dtype=torch.float16, seed=2)}
    even = {name: t[:, 8:40] for name, t in wide.items()}
    _, expected = triton_linear.linear_act(even["x"], even["w"], None, "gelu", save_z=False)
    odd = even | {operand: torch.zeros(100, 48, dtype=torch.float16).flatten()[1 : 1 + 48 * 20].view(20, 48)}
    odd[operand] = odd[operand][: len(even[operand]), :32].copy_(even[operand])
    _, found = triton_linear.linear_act(odd["x"], odd["w"], None, "gelu", save_z=False)
    assert chosen == [True, False]
    torch.testing.assert_close(found, expected)
    triton_linear.linear_act_backward(odd["x"], odd["w"].mT, found[:, :16], "gelu", need_a=False, need_db1=False)
    triton_linear.grouped_weight_gradient(even["x"], odd["x"], torch.tensor([0, 17], dtype=torch.int32))
    assert chosen[2:] == [False, operand != "x"]


def test_gelu_of_16_bits_errs_far_less_than_they_do() -> None:
    z = torch.cat([torch.linspace(-8, 8, 4001), torch.tensor([0.0, -0.0, 65504.0, -65504.0])]).half()[None]
    a = triton_pointwise.act_forward(z, "gelu")
    slope, _ = triton_pointwise.act_backward(torch.ones_like(z), z, "gelu", False)
    wide = z.double().requires_grad_()
    exact = torch.nn.functional.gelu(wide)
    (exact_slope,) = torch.autograd.grad(exact.sum(), wide)
    for found, value in ((a, exact), (slope, exact_slope)):
        # Half a unit of float16, and what the short form loses: 5e-7 of the argument.
        allowed = 2.0**-11 * value.abs() + 2.0**-25 + 5e-7 * (1 + z.double().abs())
        assert bool(((found.double() - value).abs() <= allowed).all())
