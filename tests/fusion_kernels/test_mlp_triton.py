"""The Triton kernels of the MLP against float64, interpreted on the CPU, over odd shapes, both dtypes and every tile.

What torch computes in the same dtype sets the tolerance: at most twice its error, in the maximum and in RMS.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton_interpreter  # noqa: F401, I001 - before any kernel is defined
import torch
from torch import Tensor

from fusion_kernels.activations import ACTIVATIONS
from fusion_kernels import gpu
from fusion_kernels.mlp import triton_launch, triton_linear, triton_pointwise, triton_resident, triton_tuning
from fusion_kernels.mlp.triton_tuning import HALF, IEEE, TF32, Gpu, ResidentConfig, TileConfig

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


def assert_close(found: Tensor | None, exact: Tensor, torchs: Tensor) -> None:
    """At most twice torch's error, and half a unit in the last place that torch may have rounded away by luck."""
    assert found is not None
    assert found.shape == exact.shape
    unit = torch.finfo(found.dtype).eps * exact.abs()
    error, peer = (found.double() - exact).abs(), (torchs.double() - exact).abs()
    assert bool((error <= 2 * peer.max() + unit).all()), (float(error.max()), float(peer.max()))
    if error.numel():
        rms, bound = error.square().mean().sqrt(), 2 * peer.square().mean().sqrt() + 0.3 * unit.square().mean().sqrt()
        assert float(rms) <= float(bound), (float(rms), float(bound))


def in_turn(rows: Tensor) -> Tensor:
    """Sums of columns, one row after the other in float32, as the interpreter adds where a GPU has a tree."""
    total = torch.zeros(rows.shape[1])
    for row in rows.float():
        total += row
    return total


class Problem:
    """Inputs of a block, and its forward and backward in any dtype; products of float16 are summed in float32."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, activation: str, bias: bool = True) -> None:
        self.T, self.d, self.h = shape
        self.dtype, self.activation = dtype, ACTIVATIONS[activation]
        self.x = apart(draw(self.T, self.d, dtype=dtype, seed=1))
        self.w, self.up = (draw(self.h, self.d, dtype=dtype, seed=s, scale=self.d**-0.5) for s in (2, 3))
        self.out = draw(self.d, self.h, dtype=dtype, seed=4, scale=self.h**-0.5)
        self.b, self.b_up = (draw(self.h, dtype=dtype, seed=s) if bias else None for s in (5, 6))
        self.b_out = draw(self.d, dtype=dtype, seed=7) if bias else None
        self.dy = apart(draw(self.T, self.d, dtype=dtype, seed=8))

    def product(self, a: Tensor, b: Tensor, exact: bool, bias: Tensor | None = None) -> Tensor:
        wide = torch.float64 if exact else torch.float32
        out = a.to(wide) @ b.to(wide)
        out = out if bias is None else out + bias.to(wide)
        return out if exact else out.to(self.dtype)

    def hidden(self, exact: bool) -> tuple[Tensor, Tensor]:
        return self.product(self.x, self.w.T, exact, self.b), self.product(self.x, self.up.T, exact, self.b_up)

    def phi(self, z: Tensor) -> Tensor:
        return self.activation.function(z)

    def slope(self, z: Tensor) -> Tensor:
        """In z's dtype, by way of float32 as torch's kernels have it."""
        wide = z.float() if z.dtype == torch.float16 else z
        return self.activation.derivative(wide)


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
            for config in triton_tuning.tile_candidates(kind, Gpu(memory, 1), False):
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
    exact, torchs = p.hidden(True)[0], p.hidden(False)[0]
    assert_close(z, exact, torchs)
    assert_close(a, p.phi(exact), p.phi(torchs))
    nothing, again = triton_linear.linear_act(p.x, p.w, p.b, name, save_z=False, config=config)
    assert nothing is None
    assert torch.equal(a, again)

    assert z is not None
    dz, recomputed, db = triton_linear.linear_act_backward(
        p.dy, p.out, apart(z), name, need_a=True, need_db1=True, config=config
    )
    assert recomputed is not None
    assert torch.equal(recomputed, a)
    exact = p.product(p.dy, p.out, True) * p.slope(z.double())
    torchs = (p.product(p.dy, p.out, False) * p.slope(z)).to(p.dtype)
    assert_close(dz, exact, torchs)
    assert_close(db, exact.sum(0), in_turn(torchs))
    bare = triton_linear.linear_act_backward(p.dy, p.out, z, name, need_a=False, need_db1=False, config=config)
    assert torch.equal(bare[0], dz)
    assert bare[1:] == (None, None)


def check_gated(p: Problem, config: TileConfig | None) -> None:
    name = p.activation.name
    zg, zu, a = triton_linear.linear_glu(p.x, p.w, p.up, p.b, p.b_up, name, save_z=True, config=config)
    (g, u), (g_torch, u_torch) = p.hidden(True), p.hidden(False)
    assert_close(zg, g, g_torch)
    assert_close(zu, u, u_torch)
    assert_close(a, p.phi(g) * u, p.phi(g_torch) * u_torch)
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
    da, da_torch = p.product(p.dy, p.out, True), p.product(p.dy, p.out, False)
    g, u = zg.double(), zu.double()
    exact_g, torch_g = da * u * p.slope(g), (da_torch * zu * p.slope(zg)).to(p.dtype)
    assert_close(dzg, exact_g, torch_g)
    exact_u, torch_u = da * p.phi(g), da_torch * p.phi(zg)
    assert_close(dzu, exact_u, torch_u)
    assert_close(dbg, exact_g.sum(0), in_turn(torch_g))
    assert_close(dbu, exact_u.sum(0), in_turn(torch_u))
    bare = triton_linear.linear_glu_backward(p.dy, p.out, zg, zu, name, need_a=False, need_db=False, config=config)
    assert torch.equal(bare[0], dzg)
    assert torch.equal(bare[1], dzu)
    assert bare[2:] == (None, None, None)


def check_pointwise(p: Problem) -> None:
    name = p.activation.name
    z, up = (draw(p.T, p.h, dtype=p.dtype, seed=s) for s in (9, 10))
    da = apart(draw(p.T, p.h, dtype=p.dtype, seed=11))
    exact_z, exact_up, exact_da = z.double(), up.double(), da.double()
    for given in (z, apart(z)):
        a = triton_pointwise.act_forward(given, name)
        assert_close(a, p.phi(exact_z), p.phi(z))
        dz, recomputed = triton_pointwise.act_backward(da, given, name, True)
        assert_close(dz, exact_da * p.slope(exact_z), (da * p.slope(z)).to(p.dtype))
        assert recomputed is not None
        assert torch.equal(recomputed, a)
        a = triton_pointwise.glu_act_forward(given, up, name)
        assert_close(a, p.phi(exact_z) * exact_up, p.phi(z) * up)
        dg, du, recomputed = triton_pointwise.glu_act_backward(da.contiguous(), given, up, name, True)
        assert_close(dg, exact_da * exact_up * p.slope(exact_z), (da * up * p.slope(z)).to(p.dtype))
        assert_close(du, exact_da * p.phi(exact_z), da * p.phi(z))
        assert recomputed is not None
        assert torch.equal(recomputed, a)
    assert triton_pointwise.act_backward(da, z, name, False)[1] is None
    assert triton_pointwise.glu_act_backward(da, z, up, name, False)[2] is None


# --- hidden-resident -------------------------------------------------------------------------------------------------


def check_resident(p: Problem, config: ResidentConfig | None) -> None:
    name = p.activation.name
    (g, u), (g_torch, u_torch) = p.hidden(True), p.hidden(False)
    y = triton_resident.mlp_resident(p.x, p.w, p.b, p.out, p.b_out, name, config=config)
    exact, torchs = p.phi(g), p.phi(g_torch)
    assert_close(y, p.product(exact, p.out.T, True, p.b_out), p.product(torchs, p.out.T, False, p.b_out))
    y = triton_resident.glu_resident(p.x, p.w, p.up, p.b, p.b_up, p.out, p.b_out, name, config=config)
    exact, torchs = p.phi(g) * u, p.phi(g_torch) * u_torch
    assert_close(y, p.product(exact, p.out.T, True, p.b_out), p.product(torchs, p.out.T, False, p.b_out))


RESIDENT = [(1, 17, 1), (17, 1, 3), (123, 17, 50), (65, 128, 64), (3, 1537, 50)]


@pytest.mark.parametrize(
    ("T", "d", "h", "activation"),
    [(*shape, "gelu") for shape in RESIDENT] + [(17, 123, 17, name) for name in ACTIVATIONS],
)
def test_resident(T: int, d: int, h: int, activation: str) -> None:
    p = Problem((T, d, h), torch.float16, activation, bias=T != 17)
    check_resident(p, None)
    p = Problem((T, d, h), torch.float32, activation, bias=T != 17)
    check_resident(p, ResidentConfig(16, *triton_tuning.hidden_parts(h), 32, 16, 4, 2))


@pytest.mark.parametrize("h", [16, 40, 96, 170, 192, 256, 320, 384, 512])
def test_resident_in_two_parts(h: int) -> None:
    H0, H1 = triton_tuning.hidden_parts(h)
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
    gpu = triton_tuning.gpu_of(90)
    large = triton_tuning.tile_config(65536, 768, HALF, gpu)
    assert large.BM * large.BN >= 128 * 128
    few = triton_tuning.tile_config(1024, 192, HALF, gpu)
    assert -(-1024 // few.BM) * -(-192 // few.BN) >= 64
    assert triton_tuning.tile_config(1, 768, HALF, gpu).BM == 16
