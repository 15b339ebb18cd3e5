"""The tangent kernels of bench/gpu.py: whether the tiles are right, then how long they take beside cuBLAS.

Their proofs have few cases; here are many, of Triton's tiles and of the compiled ones. Right: every precision against
float64 over odd shapes, activations, split parts, metrics and directions, with the error of torch on the same GPU
beside it; symmetric and repeatable to the bit; on a stream of its own and on another device; results of more than 2^32
values, where an offset of 32 bits would show; no memory of the result's size beside it. The compiled ones need the CUDA
library, which the compile stage builds. The peer is the closed form composed from torch calls, in place, its three
products by cuBLAS in float32, TF32 or bfloat16. The floors are the operations of half the tiles (three products for
`tf32x3` and `bf16x3`), or the bytes of the result, over the rates of the device stage, TF32 at half that of bfloat16.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import gpu_timing
import torch
from gpu_device import known_rates
from gpu_running import Told, Work
from gpu_timing import compared, in_brief, in_turn, require
from ntk import torch_in_place
from support import ACTIVATIONS, Bundle, make_bundle
from torch import Tensor

from fusion_kernels import native, ntk_compare, ntk_gram
from fusion_kernels.ntk import cuda_backend, triton_backend, triton_heuristics
from fusion_kernels.ntk.passes import Products

#: By name, why a backend cannot run here, or None.
BACKENDS: Mapping[str, Callable[[], str | None]] = {
    "triton": triton_backend.why_not,
    "cuda": cuda_backend.why_not,
}
PRECISIONS = ("highest", "tf32x3", "bf16x3", "bf16")
#: The largest error of a value over the largest value: four rounded factors.
BOUNDS = {"highest": 1e-5, "tf32x3": 1e-5, "bf16x3": 2**-15, "bf16": 2**-7}
#: N, d, h and outputs; d and h are multiples of 32, which the tiles would pad them to.
SHAPES = {"4096 inputs": (4096, 768, 192, 768), "16384 inputs": (16384, 1024, 256, 1024)}
#: Checked: inputs, other inputs, d and h; the sizes at which options are; inputs and blocks of comparisons.
SIZES = [
    (1, None, 1, 1), (17, 123, 1, 17), (123, None, 17, 123), (128, 129, 64, 32), (300, 1000, 33, 70),
    (1537, None, 123, 65), (640, None, 1537, 384),
]  # fmt: skip
OPTIONS = (300, 200, 33, 70)
COMPARED = [(1, None), (300, 128), (1537, None), (3000, 640)]
#: Inputs of a result that 32 bits cannot count.
MANY = 66_000
#: Rows whose errors are looked at.
ROWS = 256


def lines(told: Told) -> Iterator[tuple[str, Work]]:
    """Checks and times, in the order of what is learnt from them."""
    rates = known_rates(told)
    for backend in BACKENDS:
        yield f"{backend}: against float64", functools.partial(_where_it_is, backend, check_against_float64)
    for name in SHAPES:
        yield f"{name}: times", functools.partial(measure, name, rates)
    for backend in BACKENDS:
        yield f"{backend}: streams and devices", functools.partial(_where_it_is, backend, check_streams_and_devices)
    for backend in BACKENDS:
        yield f"{backend}: comparisons", functools.partial(_where_it_is, backend, check_comparisons)
    for backend in BACKENDS:
        yield f"{backend}: more than 2^32 values", functools.partial(_where_it_is, backend, check_large)


def jobs() -> dict[str, Callable[[], object]]:
    """Every form of Triton's tiles that is launched here, in small: the compiled ones are built with the library."""
    found: dict[str, Callable[[], object]] = {}
    for precision in (*PRECISIONS, "float64"):
        # Few rows, one of them or more; many, of rows that are aligned and of others; with themselves and others.
        for n, m in ((1, None), (17, 33), (128, None), (129, None), (129, 112), (128, 99)):
            for params in (("w_in", "w_out"), ("w_in", "b_gate")):
                name = f"ntk {precision} of {n} and {m} by {' '.join(params)}"
                found[name] = functools.partial(_small, n, m, params, precision)
    for dtype in (torch.float32, torch.float64):
        for kernel in ("gd", "sign"):
            found[f"ntk sums in {dtype}, {kernel}"] = functools.partial(_small_sums, dtype, kernel)
    return found


def _small(n: int, m: int | None, params: tuple[str, ...], precision: str) -> None:
    dtype = torch.float64 if precision == "float64" else torch.float32
    block = on_device(make_bundle(33, 70, 5, gated=True), dtype)
    x1, x2 = (None if k is None else torch.ones(k, 33, dtype=dtype, device=gpu_timing.DEVICE) for k in (n, m))
    how: Any = "highest" if precision == "float64" else precision
    ntk_gram(block, x1, x2, params=params, backend="triton", precision=how)  # type: ignore[arg-type]


def _small_sums(dtype: torch.dtype, kernel: str) -> None:
    blocks = [on_device(make_bundle(33, h, 5), dtype) for h in (70, 20)]
    x = torch.ones(150, 33, dtype=dtype, device=gpu_timing.DEVICE)
    ntk_compare(*blocks, x, kernel=kernel, eigenvalues=0, backend="triton")  # type: ignore[arg-type]


def _where_it_is(backend: str, work: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    reason = BACKENDS[backend]()
    return work(backend) if reason is None else {"skipped": reason}


def on_device(bundle: Bundle, dtype: torch.dtype) -> Bundle:
    """The block there, in a dtype."""
    return bundle.to(dtype).map(lambda t: t.to(gpu_timing.DEVICE))


def errors(found: Tensor, exact: Tensor) -> tuple[float, float]:
    """Largest and RMS error, over those of `exact`."""
    difference = found.double() - exact
    return float(difference.abs().max() / exact.abs().max()), float(difference.norm() / exact.norm())


# --- correctness -----------------------------------------------------------------------------------------------------


def check_against_float64(backend: str) -> dict[str, float]:
    """The largest RMS error of each precision, and how often float32's error is torch's."""
    worst = {**dict.fromkeys(PRECISIONS, 0.0), "float64": 0.0, "highest over torch float32": 0.0}
    cases: list[tuple[int, int | None, int, int, bool, str, str, tuple[str, ...]]] = [
        (n, m, d, h, gated, kernel, "gelu", ())
        for n, m, d, h in SIZES
        for gated in (False, True)
        for kernel in ("gd", "sign")
    ]  # fmt: skip
    n, beside, d, h = OPTIONS
    for kernel in ("gd", "sign"):
        cases += [(n, beside, d, h, gated, kernel, phi, ()) for gated in (False, True) for phi in ACTIVATIONS]
        cases += [(n, m, d, h, gated, kernel, "gelu", ("metric", "vector"))
                  for m in (None, beside) for gated in (False, True)]  # fmt: skip
        cases += [(n, m, d, h, True, kernel, "gelu", ("params",)) for m in (None, beside)]
    for n, m, d, h, gated, kernel, activation, extras in cases:
        generator = torch.Generator().manual_seed(n)
        torch.manual_seed(n)
        bundle = make_bundle(d, h, 5, gated=gated, scale=True, scale_exponent=0.5, activation=activation)
        # In float32's values, so that every dtype computes the same kernel; parts split within a term take two passes.
        every: dict[str, dict[str, Any]] = {
            "metric": {"metric": torch.rand(h, generator=generator).to(gpu_timing.DEVICE)},
            "vector": {"reduce": torch.randn(5, generator=generator).to(gpu_timing.DEVICE)},
            "params": {"params": ("w_in", "b_gate")},
        }
        options: dict[str, Any] = {"kernel": kernel}
        for extra in extras:
            options.update(every[extra])
        x1 = torch.randn(n, d, generator=generator).to(gpu_timing.DEVICE)
        x2 = None if m is None else torch.randn(m, d, generator=generator).to(gpu_timing.DEVICE)
        what = f"{(n, m, d, h)}, gated {gated}, {kernel}, {activation} {' '.join(extras)}"
        double, single = on_device(bundle, torch.float64), on_device(bundle, torch.float32)
        wide = (x1.double(), None if x2 is None else x2.double())
        exact = ntk_gram(double, *wide, backend="reference", **options)
        found = ntk_gram(double, *wide, backend=backend, **options)
        worst["float64"] = max(worst["float64"], *errors(found, exact))
        with native.exact_products():
            peer = errors(ntk_gram(single, x1, x2, backend="reference", **options), exact)
        for precision in PRECISIONS:
            found, again = (
                ntk_gram(single, x1, x2, backend=backend, precision=precision, **options)  # type: ignore[arg-type]
                for _ in range(2)
            )
            require(torch.equal(found, again), f"{precision} has other bits when it runs again: {what}")
            if m is None and kernel == "gd":
                require(torch.equal(found, found.T), f"{precision} is not symmetric: {what}")
            own = errors(found, exact)
            worst[precision] = max(worst[precision], own[1])
            # Where a sign is that of a rounded zero, float32 errs more than the products do.
            bound = max(BOUNDS[precision], 2 * peer[0])
            require(own[0] <= bound, f"{precision} errs by {own[0]}, torch by {peer[0]}: {what}")
            if precision == "highest":
                times = max(e / max(p, 2e-7) for e, p in zip(own, peer, strict=True))
                worst["highest over torch float32"] = max(worst["highest over torch float32"], times)
    require(worst["float64"] <= 1e-13, f"float64 is off: {worst}")
    require(worst["highest over torch float32"] <= 2, f"float32 errs more than twice as much as torch: {worst}")
    return {"RMS errors": worst, "cases": len(cases)}


def check_streams_and_devices(backend: str) -> dict[str, Any]:
    """A kernel on a stream of its own waits for that stream's work and no other; it runs where its tensors are."""
    block = on_device(make_bundle(64, 96, 5), torch.float32)
    x = torch.randn(1000, 64, device=gpu_timing.DEVICE)
    expected = ntk_gram(block, x, backend=backend)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = x + 0
        found = ntk_gram(block, late, backend=backend)
    stream.synchronize()
    require(torch.equal(found, expected), "on a stream of its own the kernel is another")
    for index in range(1, torch.cuda.device_count()):
        other = replace(block, **{k: t.to(f"cuda:{index}") for k, t in vars(block).items() if isinstance(t, Tensor)})
        found = ntk_gram(other, x.to(f"cuda:{index}"), backend=backend)
        require(torch.equal(found.to(gpu_timing.DEVICE), expected), f"on device {index} the kernel is another")
    return {"devices": torch.cuda.device_count()}


def check_large(backend: str) -> dict[str, Any]:
    """A result of more than 2^32 values, row by row, and the memory beside it in bytes."""
    n, d, h = MANY, 64, 32
    block = on_device(make_bundle(d, h, 5), torch.float32)
    x = torch.randn(n, d, device=gpu_timing.DEVICE)
    out = torch.empty(n, n, device=gpu_timing.DEVICE)
    for precision in PRECISIONS:
        out.fill_(float("nan"))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ntk_gram(block, x, backend=backend, precision=precision, out=out)  # type: ignore[arg-type]
        beside = torch.cuda.max_memory_allocated() - before
        require(beside <= 64 * n * (d + 3 * h), f"{precision} takes {beside} bytes beside the result")
        for row in sorted({min(row, n - 1) for row in (0, 127, 128, 32_767, 46_341, 65_535, 65_536, n)}):
            alone = ntk_gram(block, x[row : row + 1], x, backend=backend, precision=precision)[0]  # type: ignore[arg-type]
            require(errors(out[row], alone)[0] <= BOUNDS[precision], f"{precision}: row {row} of {n} is wrong")
            require(torch.equal(out[row], out[:, row]), f"{precision}: row {row} of {n} is not its column")
    return {"N": n, "bytes beside the result": beside}


def check_comparisons(backend: str) -> dict[str, Any]:
    """The largest difference of the sums over two kernels, as errors and cosines, from those in float64."""
    worst = 0.0
    for n, block_size in COMPARED:
        torch.manual_seed(n)
        x = torch.randn(n, 33, device=gpu_timing.DEVICE)
        bundles = make_bundle(33, 70, 5, gated=True), make_bundle(33, 17, 5, gated=True)
        for kernel in ("gd", "sign"):
            options: dict[str, Any] = {"kernel": kernel, "eigenvalues": 0}
            double = [on_device(bundle.to(torch.float32), torch.float64) for bundle in bundles]
            exact = ntk_compare(*double, x.double(), backend="reference", **options)
            for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
                blocks = [on_device(bundle.to(torch.float32), dtype) for bundle in bundles]
                found, again = (
                    ntk_compare(*blocks, x.to(dtype), backend=backend, block_size=block_size, **options)
                    for _ in range(2)
                )
                require(found.relative_error == again.relative_error, f"other bits when compared again: {n}, {kernel}")
                off = abs(found.relative_error - exact.relative_error) + abs(found.cosine - exact.cosine)
                require(off <= bound, f"a comparison in {dtype} is off by {off}: {n}, {kernel}")
                worst = max(worst, off)
    return {"largest difference": worst}


# --- time ------------------------------------------------------------------------------------------------------------


def compositions(bundle: Bundle, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The closed form by torch calls, in place: its products in float32, TF32 and bfloat16."""
    low = bundle.to(torch.bfloat16)

    def tf32() -> Tensor:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            return torch_in_place(bundle, x)
        finally:
            torch.set_float32_matmul_precision(before)

    def float32() -> Tensor:
        with native.exact_products():
            return torch_in_place(bundle, x)

    return {"torch float32": float32, "torch tf32": tf32, "torch bf16": lambda: torch_in_place(low, x.bfloat16())}


def measure(name: str, rates: dict[str, float]) -> dict[str, Any]:
    """Times of the trace kernel of one set of rows, with errors and the share of the floors that the tiles reach."""
    n, d, h, outputs = SHAPES[name]
    torch.manual_seed(0)
    bundle = on_device(make_bundle(d, h, outputs), torch.float32)
    x = torch.randn(n, d, device=gpu_timing.DEVICE)
    out = torch.empty(n, n, device=gpu_timing.DEVICE)
    there = [backend for backend, why_not in BACKENDS.items() if why_not() is None]
    work: dict[str, Callable[[], Tensor]] = {
        f"{k} {p}": lambda k=k, p=p: ntk_gram(bundle, x, backend=k, precision=p, out=out)  # type: ignore[misc]
        for k in there
        for p in PRECISIONS
    }
    work.update(compositions(bundle, x))
    some = torch.arange(0, n, max(1, n // ROWS), device=gpu_timing.DEVICE)
    exact = ntk_gram(on_device(bundle, torch.float64), x[some].double(), x.double(), backend="reference")
    off = {what: errors(call()[some], exact)[1] for what, call in work.items()}
    rows = in_turn(work)
    other = on_device(make_bundle(d, 4 * h, outputs), torch.float32)
    comparisons = {
        backend: functools.partial(ntk_compare, other, bundle, x, backend=backend, eigenvalues=0)
        for backend in (*there, "reference")
    }
    tiles = {backend: _tiles(backend, n, d, h, out, rates) for backend in there}
    return {
        "N": n, "d": d, "h": h, "outputs": outputs, **compared(rows, "torch tf32", None), "RMS errors": off,
        "tiles": tiles, "comparison": compared(in_turn(comparisons), "reference", None),
        "brief": in_brief(rows),
    }  # fmt: skip


def _tiles(backend: str, n: int, d: int, h: int, out: Tensor, rates: dict[str, float]) -> dict[str, Any]:
    """Of the kernel that multiplies, by precision: times, and shares of the floors."""
    calls: dict[str, Callable[[], Any]] = {}
    floors: dict[str, float] = {}
    how = Products(d, h, 1, True, 1.0, 1.0, False)
    width = _width(backend, d) + 2 * _width(backend, h)
    for precision, planes, products in (("tf32x3", 2, 6), ("bf16x3", 2, 3), ("bf16", 1, 1)):
        operand = torch.randn(planes, n, width, device=gpu_timing.DEVICE)
        if precision != "tf32x3":
            operand = operand.bfloat16()
        if backend == "triton":
            calls[precision] = functools.partial(triton_backend.tiles, operand, operand, how, True, precision, out, n)
        else:
            tiles = native.cuda_operators().ntk_tiles
            calls[precision] = functools.partial(tiles, operand, operand, *how, True, out)
        multiplied = products * n * (n + 1) * (d + 2 * h) / rates["bf16_flops"]
        floors[precision] = 1e3 * max(4 * n * n / rates["copy_bytes"], multiplied)
    rows = in_turn(calls)
    shares = {precision: floors[precision] / row["median"] for precision, row in rows.items()}
    return {"ms": rows, "floors ms": floors, "share of the floor": shares}


def _width(backend: str, columns: int) -> int:
    """Of a range of so many columns, as the backend's operands have it."""
    multiple = triton_heuristics.COLUMNS if backend == "triton" else 32
    return -(-columns // multiple) * multiple
