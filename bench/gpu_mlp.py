"""The MLP's part of bench/gpu.py: whether its kernels are right, then which tile is fastest for which shape.

Right: every kernel in bfloat16, float16 and float32 against float64, at most twice torch's error in the same dtype in
the maximum and in RMS, over even and odd shapes and every tile; the bits of two runs; experts against each alone.
Nothing is timed if any of that fails. Times are medians between device events, of one launch after another, for every
tile that fits the GPU, beside the same product by cuBLAS with and without the pointwise pass that it needs.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from gpu_timing import DEVICE, milliseconds, require
from torch import Tensor

from fusion_kernels.activations import ACTIVATIONS
from fusion_kernels.mlp import triton_heuristics, triton_launch, triton_linear, triton_pointwise, triton_resident

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: Tokens, inputs, neurons.
CHECKED = [(1, 1, 1), (17, 123, 17), (1537, 17, 123), (300, 1537, 64), (1024, 768, 192), (4096, 1024, 256)]
TOKENS = (65536, 8192, 1024)
WIDTHS = [(768, 192), (768, 384), (768, 768), (1024, 256), (2048, 512), (4096, 1024), (4096, 3584)]
COUNTS = (0, 700, 1, 0, 128, 3000, 65)


# --- correctness -----------------------------------------------------------------------------------------------------


def check_mlp() -> dict[str, float]:
    """Largest error of every kernel over torch's in the same dtype, against float64.

    The run ends if one is above 2 in the maximum or in RMS, two runs differ, or an expert is not as if alone.
    """
    worst: dict[str, float] = {}
    for dtype in DTYPES:
        for shape in CHECKED:
            for activation in ACTIVATIONS if shape == CHECKED[4] else ("gelu", "silu"):
                _check_block(shape, dtype, activation, None, worst)
        kind = triton_launch.kind(dtype)
        gpu = triton_launch.gpu(torch.device(DEVICE, torch.cuda.current_device()))
        for config in triton_heuristics.tile_candidates(kind, gpu, True):
            _check_block((config.BM + 1, 2 * config.BK, config.BN), dtype, "gelu", config, worst)
        _check_experts(dtype)
    for h in (16, 64, 128, 192, 256, 384, 512):
        for dtype in (torch.bfloat16, torch.float16):
            _check_resident(h, dtype, worst)
    torch.cuda.synchronize()
    return worst


def _inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    T, d, h = shape
    g = torch.Generator(DEVICE).manual_seed(T + d + h)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*size, generator=g, device=DEVICE, dtype=torch.float64)).to(dtype)

    return {
        "x": draw(T, d), "w": draw(h, d, scale=d**-0.5), "up": draw(h, d, scale=d**-0.5), "b": draw(h), "bu": draw(h),
        "out": draw(d, h, scale=h**-0.5), "bo": draw(d), "dy": draw(T, d),
    }  # fmt: skip


def _compare(name: str, found: Tensor | None, exact: Tensor, torchs: Tensor, worst: dict[str, float]) -> None:
    require(found is not None, f"{name}: nothing came back")
    assert found is not None
    unit = 0.5 * torch.finfo(found.dtype).eps * exact.abs().max().item()
    error, peer = (found.double() - exact).abs(), (torchs.double() - exact).abs()
    # Half a unit in the last place beside torch's error, which luck can make zero for a few entries.
    largest = error.max().item() / (peer.max().item() + unit)
    rms = error.square().mean().sqrt().item() / (peer.square().mean().sqrt().item() + 0.3 * unit)
    worst[name] = max(worst.get(name, 0.0), largest, rms)
    require(largest <= 2 and rms <= 2, f"{name} {tuple(found.shape)} {found.dtype}: {largest:.2f}, RMS {rms:.2f}")


def _check_block(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    activation: str,
    config: triton_heuristics.TileConfig | None,
    worst: dict[str, float],
) -> None:
    i, phi = _inputs(shape, dtype), ACTIVATIONS[activation]
    e = {name: value.double() for name, value in i.items()}
    zg, zu = e["x"] @ e["w"].T + e["b"], e["x"] @ e["up"].T + e["bu"]
    tg, tu = i["x"] @ i["w"].T + i["b"], i["x"] @ i["up"].T + i["bu"]
    label = f"{str(dtype).removeprefix('torch.')} "

    z, a = triton_linear.linear_act(i["x"], i["w"], i["b"], activation, save_z=True, config=config)
    _compare(label + "z", z, zg, tg, worst)
    _compare(label + "a", a, phi.function(zg), phi.function(tg), worst)
    assert z is not None
    runs = [
        triton_linear.linear_act_backward(i["dy"], i["out"], z, activation, need_a=True, need_db1=True, config=config)
        for _ in range(2)
    ]
    for first, second in zip(*runs, strict=True):
        require(first is not None and second is not None and torch.equal(first, second), label + "two runs differ")
    dz, again, db = runs[0]
    require(again is not None and torch.equal(again, a), label + "the recomputed activation differs")
    da, da_torch = e["dy"] @ e["out"], i["dy"] @ i["out"]
    slope, slope_torch = phi.derivative(z.double()), phi.derivative(z.float()).to(dtype)
    _compare(label + "dz", dz, da * slope, da_torch * slope_torch, worst)
    _compare(label + "db", db, (da * slope).sum(0), (da_torch * slope_torch).sum(0), worst)

    g, u, a = triton_linear.linear_glu(i["x"], i["w"], i["up"], i["b"], i["bu"], activation, save_z=True, config=config)
    _compare(label + "glu gate", g, zg, tg, worst)
    _compare(label + "glu up", u, zu, tu, worst)
    _compare(label + "glu a", a, phi.function(zg) * zu, phi.function(tg) * tu, worst)
    assert g is not None
    assert u is not None
    dg, du, again, dbg, dbu = triton_linear.linear_glu_backward(
        i["dy"], i["out"], g, u, activation, need_a=True, need_db=True, config=config
    )
    require(again is not None and torch.equal(again, a), label + "the recomputed gated activation differs")
    slope, slope_torch = phi.derivative(g.double()) * u.double(), phi.derivative(g.float()).to(dtype) * u
    value, value_torch = phi.function(g.double()), phi.function(g)
    _compare(label + "glu dgate", dg, da * slope, da_torch * slope_torch, worst)
    _compare(label + "glu dup", du, da * value, da_torch * value_torch, worst)
    _compare(label + "glu dbgate", dbg, (da * slope).sum(0), (da_torch * slope_torch).sum(0), worst)
    _compare(label + "glu dbup", dbu, (da * value).sum(0), (da_torch * value_torch).sum(0), worst)

    _compare(label + "pointwise a", triton_pointwise.act_forward(g, activation), value, value_torch, worst)
    dz, _ = triton_pointwise.act_backward(u, g, activation, False)
    slope, slope_torch = phi.derivative(g.double()), phi.derivative(g.float()).to(dtype)
    _compare(label + "pointwise dz", dz, u.double() * slope, u * slope_torch, worst)
    a = triton_pointwise.glu_act_forward(g, u, activation)
    _compare(label + "pointwise glu a", a, value * u.double(), value_torch * u, worst)
    dg, du, _ = triton_pointwise.glu_act_backward(z, g, u, activation, True)
    _compare(label + "pointwise glu dgate", dg, z.double() * slope * u.double(), z * slope_torch * u, worst)
    _compare(label + "pointwise glu dup", du, z.double() * value, z * value_torch, worst)


def _check_resident(h: int, dtype: torch.dtype, worst: dict[str, float]) -> None:
    for shape in ((1000, 768, h), (65, 128, h)):
        i = _inputs(shape, dtype)
        e = {name: value.double() for name, value in i.items()}
        gpu = triton_launch.gpu(i["x"].device)
        for gated in (False, True):
            exact = torch.nn.functional.gelu(e["x"] @ e["w"].T + e["b"])
            torchs = torch.nn.functional.gelu(i["x"] @ i["w"].T + i["b"])
            if gated:
                exact, torchs = exact * (e["x"] @ e["up"].T + e["bu"]), torchs * (i["x"] @ i["up"].T + i["bu"])
            exact, torchs = exact @ e["out"].T + e["bo"], torchs @ i["out"].T + i["bo"]
            for config in triton_heuristics.resident_candidates(h, triton_heuristics.HALF, gpu, gated):
                y = _resident(i, gated, config)
                _compare(f"{str(dtype).removeprefix('torch.')} resident", y, exact, torchs, worst)
                require(torch.equal(y, _resident(i, gated, config)), "two runs of the resident kernel differ")


def _resident(i: dict[str, Tensor], gated: bool, config: triton_heuristics.ResidentConfig | None) -> Tensor:
    if gated:
        return triton_resident.glu_resident(
            i["x"], i["w"], i["up"], i["b"], i["bu"], i["out"], i["bo"], "gelu", config=config
        )
    return triton_resident.mlp_resident(i["x"], i["w"], i["b"], i["out"], i["bo"], "gelu", config=config)


def _check_experts(dtype: torch.dtype) -> None:
    """Products of experts, one tile for all, are to the bit what each expert's rows give alone."""
    E, T = len(COUNTS), sum(COUNTS)
    for d, h in ((768, 192), (17, 50)):
        i = _inputs((T, d, h), dtype)
        w, up, out = (torch.stack([i[name].roll(e, 0) for e in range(E)]) for name in ("w", "up", "out"))
        offsets = torch.tensor([0, *COUNTS], device=DEVICE).cumsum(0).to(torch.int32)
        kind, gpu = triton_launch.kind(dtype), triton_launch.gpu(i["x"].device)
        tile = triton_heuristics.tile_candidates(kind, gpu, True, d % 16 == 0 and h % 16 == 0)[0]
        options: dict[str, Any] = {"config": tile}
        z, a = triton_linear.linear_act(i["x"], w, None, "silu", save_z=True, offsets=offsets, **options)
        assert z is not None
        dz, _, db = triton_linear.linear_act_backward(
            i["dy"], out, z, "silu", need_a=False, need_db1=True, offsets=offsets, **options
        )
        *_, gated = triton_linear.linear_glu(
            i["x"], w, up, None, None, "silu", save_z=False, offsets=offsets, **options
        )
        y = triton_linear.grouped_linear(a, out.mT, offsets, **options)
        both = triton_linear.grouped_linear(z, w, offsets, second=(dz, up), **options)
        gradient = triton_linear.grouped_weight_gradient(z, i["x"], offsets, dtype=torch.float32)
        assert db is not None
        at = 0
        for e, count in enumerate(COUNTS):
            rows = slice(at, at + count)
            at += count
            x, dy = i["x"][rows], i["dy"][rows]
            own_z, own_a = triton_linear.linear_act(x, w[e], None, "silu", save_z=True, **options)
            assert own_z is not None
            own_dz, _, own_db = triton_linear.linear_act_backward(
                dy, out[e], own_z, "silu", need_a=False, need_db1=True, **options
            )
            *_, own_gated = triton_linear.linear_glu(x, w[e], up[e], None, None, "silu", save_z=False, **options)
            assert own_db is not None
            pairs = [(z[rows], own_z), (a[rows], own_a), (dz[rows], own_dz), (db[e], own_db), (gated[rows], own_gated)]
            require(all(torch.equal(f, s) for f, s in pairs), f"expert {e} of {COUNTS} is not as if alone, {dtype}")
            eps = 8 * torch.finfo(dtype).eps
            torch.testing.assert_close(y[rows].double(), own_a.double() @ out[e].double().T, rtol=eps, atol=eps)
            exact = own_z.double() @ w[e].double() + own_dz.double() @ up[e].double()
            torch.testing.assert_close(both[rows].double(), exact, rtol=eps, atol=eps)
            exact = own_z.double().T @ x.double()
            torch.testing.assert_close(gradient[e].double(), exact, rtol=1e-4, atol=1e-3)


# --- time ------------------------------------------------------------------------------------------------------------


def median(work: Callable[[], object]) -> float:
    """Milliseconds."""
    return milliseconds(work)["median"]


def sweep(budget: float) -> list[dict[str, Any]]:
    """Milliseconds of every kernel by shape and tile in bfloat16, the best first; ends after `budget` seconds."""
    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    gpu = triton_launch.gpu(torch.device(DEVICE, torch.cuda.current_device()))
    for T in TOKENS:
        for d, h in WIDTHS:
            rows += _timed(gpu, T, d, h)
            print(json.dumps(rows[-1]), flush=True)
            if time.perf_counter() - began > budget:
                print(f"stopped after {budget} s, before shapes smaller than {T, d, h}")
                return rows
    return rows


def _timed(gpu: triton_heuristics.Gpu, T: int, d: int, h: int) -> list[dict[str, Any]]:
    """Rows of one shape: the products by tile, the resident kernels where they fit, and what cuBLAS takes."""
    i = _timed_inputs(T, d, h)
    half = triton_heuristics.HALF

    def forward(c: Any) -> object:
        return triton_linear.linear_act(i["x"], i["w"], i["b"], "gelu", save_z=True, config=c)

    def backward(c: Any) -> object:
        return triton_linear.linear_act_backward(i["x"], i["out"], i["z"], "gelu", need_a=True, need_db1=True, config=c)

    def glu(c: Any) -> object:
        return triton_linear.linear_glu(i["x"], i["w"], i["up"], None, None, "silu", save_z=True, config=c)

    def glu_backward(c: Any) -> object:
        return triton_linear.linear_glu_backward(
            i["x"], i["out"], i["z"], i["zu"], "silu", need_a=True, need_db=False, config=c
        )

    def resident(c: Any) -> object:
        return _resident(i, False, c)

    def glu_resident(c: Any) -> object:
        return _resident(i, True, c)

    def product() -> Tensor:
        return torch.nn.functional.linear(i["x"], i["w"], i["b"])

    def backward_product() -> Tensor:
        return i["x"] @ i["out"]

    def backward_and_pass() -> Tensor:
        return triton_pointwise.act_backward(backward_product(), i["z"], "gelu", True)[0].sum(0)

    rows = []
    works = ((forward, False), (backward, False), (glu, True), (glu_backward, True))
    for work, wide in works:
        tiles = triton_heuristics.tile_candidates(half, gpu, wide)
        rows.append(_row(work, (T, d, h), tiles, triton_heuristics.tile_config(T, h, d, half, gpu, wide=wide)))
    for work, gated in ((resident, False), (glu_resident, True)):
        chosen = triton_heuristics.resident_config(T, h, half, gpu, gated)
        if chosen is not None:
            rows.append(_row(work, (T, d, h), triton_heuristics.resident_candidates(h, half, gpu, gated), chosen))
    cublas = {
        "product": median(product),
        "product and pass": median(lambda: triton_pointwise.act_forward(product(), "gelu")),
        "backward product": median(backward_product),
        "backward product, pass and sum": median(backward_and_pass),
        "whole forward": median(
            lambda: torch.nn.functional.linear(triton_pointwise.act_forward(product(), "gelu"), i["out"], i["bo"])
        ),
    }
    rows.append({"kernel": "cuBLAS", "shape": [T, d, h], "ms": cublas})
    return rows


def _timed_inputs(T: int, d: int, h: int) -> dict[str, Tensor]:
    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*size, device=DEVICE, dtype=torch.bfloat16)

    return {
        "x": draw(T, d), "w": draw(h, d, scale=d**-0.5), "up": draw(h, d, scale=d**-0.5), "b": draw(h), "bu": draw(h),
        "out": draw(d, h, scale=h**-0.5), "bo": draw(d), "z": draw(T, h), "zu": draw(T, h),
    }  # fmt: skip


def _row(
    work: Callable[[Any], object], shape: tuple[int, int, int], candidates: tuple[Any, ...], chosen: Any
) -> dict[str, Any]:
    times = {config: median(functools.partial(work, config)) for config in candidates}
    order = sorted(candidates, key=times.__getitem__)
    row: dict[str, Any] = {
        "kernel": work.__name__, "shape": list(shape), "chosen_over_best": times[chosen] / times[order[0]],
        "tiles": [{"ms": times[config], **asdict(config)} for config in order],
    }  # fmt: skip
    print(json.dumps({**row, "tiles": row["tiles"][:1]}), flush=True)
    return row
