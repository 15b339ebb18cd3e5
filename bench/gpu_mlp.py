"""The small FFNs of bench/gpu.py: whole blocks beside ordinary layers, and kernels by tile beside cuBLAS.

bfloat16, forward without gradients and a training step (forward and backward, gradients returned), recorded as CUDA
graphs. Blocks run on the same weights with the scale folded in, except ours, which fold it in every call. Peers: eager
layers, `torch.compile`, and where they are installed Liger's gated kernels and flash-attn's FusedMLP. The floor of a
block is, of each product, the longer of its operations and of the bytes that an epilogue-fused path moves, over the
rates of the device stage. Whether results are right is what the proofs find out.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import gpu_timing
import torch
from fused_mlp import Problem, Step, forward_only, training
from gpu_bars import over_compiled
from gpu_device import known_rates
from gpu_running import Told, Work
from gpu_timing import all_captured, compared, in_brief, in_turn, peak_bytes
from torch import Tensor
from torch.nn import functional as F

from fusion_kernels.ffn import FFN
from fusion_kernels.mlp import gpu_backend, triton_heuristics, triton_launch, triton_linear, triton_pointwise
from fusion_kernels.mlp.operators import MLP


@dataclass(frozen=True)
class Block:
    """Tokens, inputs and outputs, neurons."""

    T: int
    d: int
    h: int
    gated: bool = False

    def __str__(self) -> str:
        return f"{'gated ' if self.gated else ''}{self.T} x {self.d} x {self.h}"

    def problem(self) -> Problem:
        """Its tensors."""
        return Problem.draw(self.T, self.d, self.h, self.gated, gpu_timing.DEVICE, gpu_timing.DTYPE)


BLOCKS = (
    Block(65536, 768, 192),
    Block(8192, 768, 192),
    Block(16384, 2048, 512, gated=True),
    Block(65536, 768, 768),
)
#: Rows and columns of tiles, of which whole blocks are timed with one beside the tile that is chosen.
OTHER_TILES, IN_OTHER_TILE = ((128, 128), (128, 64)), "epilogue, other tile"
#: Kernels are timed with tiles of at least so many rows, all that fill a GPU.
LEAST_ROWS = 64
BASE, COMPILED, RESIDENT, BACKENDS = "eager", "compile", "resident, forward only", ("torch", "cublas", "epilogue")


def lines(told: Told) -> Iterator[tuple[str, Work]]:
    """Blocks both ways, which backend the product takes, and kernels by tile."""
    rates = known_rates(told)
    for block in BLOCKS:
        yield f"{block}: forward", functools.partial(timed_blocks, block, rates, trained=False)
        yield f"{block}: training step", functools.partial(timed_blocks, block, rates, trained=True)
    for block in BLOCKS:
        yield f"{block}: tiles", functools.partial(timed_tiles, block, rates)
    for block in BLOCKS:
        yield f"{block}: choice", functools.partial(choice, block)


def jobs() -> dict[str, Callable[[], object]]:
    """Calls that launch everything that is timed here, by name."""
    found: dict[str, Callable[[], object]] = {}
    for block in BLOCKS:
        found[f"mlp compiled layers, {block}"] = functools.partial(_once, block, compiled=True)
        found[f"mlp blocks, {block}"] = functools.partial(_once, block, compiled=False)
        found[f"mlp tiles, {block}"] = functools.partial(_each_tile, block)
    return found


def _once(block: Block, *, compiled: bool) -> None:
    problem = block.problem()
    for trained in (False, True):
        for name, step in steps_of(problem, trained=trained).items():
            if (name == COMPILED) is compiled:
                step()


def _each_tile(block: Block) -> None:
    for kernels, *_ in tile_kernels(block):
        for call in kernels.values():
            call()


# --- whole blocks ----------------------------------------------------------------------------------------------------


def variants(problem: Problem) -> dict[str, Callable[[], Tensor]]:
    """The block by ours and by peers."""
    found: dict[str, Callable[[], Tensor]] = {BASE: problem.eager, COMPILED: compiled(problem.eager)}
    for name in BACKENDS:
        found[name] = functools.partial(problem.fused, 1, name)
    found[IN_OTHER_TILE] = found["epilogue"]
    if _resident_runs(problem):
        found[RESIDENT] = functools.partial(problem.fused, 2, "resident")
    if problem.w_gate is not None:
        liger = optional("liger_kernel.ops.swiglu", "LigerSiLUMulFunction")
        if liger is not None:
            found["liger"] = lambda: F.linear(
                liger.apply(F.linear(problem.x, problem.w_gate), F.linear(problem.x, problem.w_in, problem.b_in)),
                problem.w_out, problem.b_out,
            )  # fmt: skip
    else:
        flash = optional("flash_attn.ops.fused_dense", "fused_mlp_func")
        if flash is not None:
            found["flash-attn (tanh)"] = lambda: flash(
                problem.x, problem.w_in, problem.w_out, problem.b_in, problem.b_out, activation="gelu_approx",
                save_pre_act=True, checkpoint_lvl=1, heuristic=0,
            )  # fmt: skip
    return found


def _resident_runs(problem: Problem) -> bool:
    """Whether the hidden layer fits on the chip, and Triton compiles that kernel rightly for the device."""
    device = problem.x.device
    fits = triton_heuristics.resident_candidates(
        len(problem.w_in), triton_heuristics.HALF, triton_launch.gpu(device), problem.w_gate is not None
    )
    return bool(fits) and gpu_backend.resident_why_not(device) is None


def compiled(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """By `torch.compile`, for one shape."""
    torch._dynamo.reset()
    return torch.compile(run, fullgraph=True, dynamic=False)


def optional(module: str, name: str) -> Any:
    """`name` of a package that may not be installed."""
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError:
        return None


def steps_of(problem: Problem, *, trained: bool) -> dict[str, Step]:
    """What is timed: forwards without gradients, or training steps."""
    found: dict[str, Step] = {}
    for name, run in variants(problem).items():
        if not trained or name != RESIDENT:
            step = training(problem, run) if trained else forward_only(run)
            found[name] = functools.partial(_in_tile, other_tile(problem), step) if name == IN_OTHER_TILE else step
    return found


def other_tile(problem: Problem) -> tuple[int, int]:
    """The first of the other tiles that is not chosen anyway."""
    (T, d), h = problem.x.shape, len(problem.w_in)
    device, wide = triton_launch.gpu(problem.x.device), problem.w_gate is not None
    chosen = triton_heuristics.tile_config(T, h, d, triton_heuristics.HALF, device, wide=wide)
    return next(tile for tile in OTHER_TILES if tile != (chosen.BM, chosen.BN))


def _in_tile(tile: tuple[int, int], step: Step) -> Any:
    with tile_of(tile):
        return step()


@contextlib.contextmanager
def tile_of(tile: tuple[int, int]) -> Iterator[None]:
    """Products have tiles of these rows and columns where such a one fits."""
    usual = triton_heuristics.tile_config

    def chosen(rows: int, columns: int, depth: int, kind: str, gpu: Any, **how: Any) -> Any:
        candidates = triton_heuristics.tile_candidates(kind, gpu, how.get("wide", False), how.get("aligned", True))
        fitting = [config for config in candidates if tile == (config.BM, config.BN)]
        return fitting[0] if fitting else usual(rows, columns, depth, kind, gpu, **how)

    with mock.patch.object(triton_heuristics, "tile_config", chosen):
        yield


def timed_blocks(block: Block, rates: dict[str, float], *, trained: bool) -> dict[str, Any]:
    """Milliseconds of every variant, ratios to eager layers, shares of the floor, and memory of a training step."""
    problem = block.problem()
    steps = steps_of(problem, trained=trained)
    graphs, refused = all_captured(steps)
    rows = in_turn(graphs)
    found = compared(rows, BASE, floors(block, rates)["both" if trained else "forward"])
    found["compile over"] = over_compiled(rows)
    if trained:
        found["peak bytes"] = {name: peak_bytes(steps[name]) for name in graphs}
    # Peers may not run here; what is ours, and fits the shape, has to.
    ours = {name: why for name, why in refused.items() if name.startswith((*BACKENDS, RESIDENT))}
    if ours:
        found["failed"] = "; ".join(f"{name}: {why}" for name, why in ours.items())
    found["other tile"] = other_tile(problem)
    times = ", ".join(f"{name} {ratio:.2f}" for name, ratio in found["compile over"].items())
    return {**asdict(block), **found, "not run": refused, "brief": f"{in_brief(rows)}; compile over {times}"}


def floors(block: Block, rates: dict[str, float]) -> dict[str, float]:
    """Milliseconds below which no epilogue-fused path can be: of each product, the longer of arithmetic and memory."""
    T, d, h, inputs = block.T, block.d, block.h, 2 if block.gated else 1

    def product(rows: int, inner: int, columns: int, elements: int) -> float:
        return 1e3 * max(2 * rows * inner * columns / rates["bf16_flops"], 2 * elements / rates["copy_bytes"])

    wide, narrow, weight = T * d, T * h, d * h
    first = product(T, d, inputs * h, wide + inputs * weight + (inputs + 1) * narrow)
    forward = first + product(T, h, d, narrow + weight + wide)
    da = product(T, d, h, wide + weight + (2 * inputs + 1) * narrow)
    dx = product(T, inputs * h, d, inputs * (narrow + weight) + wide)
    weights = product(d, T, h, wide + narrow + weight) + product(inputs * h, T, d, wide + inputs * narrow)
    return {"forward": forward, "both": forward + da + dx + weights}


# --- the product's own choice ----------------------------------------------------------------------------------------


def choice(block: Block) -> dict[str, Any]:
    """What `auto` measures for such a block, and takes."""
    problem = block.problem()
    activation = "silu" if block.gated else "gelu"
    weights = (problem.w_in, problem.w_out, problem.w_gate, problem.b_in, None, problem.b_out, None)
    ffn = FFN.of_linears(tuple(None if t is None else t.detach() for t in weights), activation)
    found = MLP.choice.measure((problem.x.detach(),), ffn, 1)
    return {**found, "brief": f"{found['backend']} of {found['ms']}"}


# --- kernels by tile -------------------------------------------------------------------------------------------------


def tile_kernels(block: Block) -> Iterator[tuple[dict[str, Step], Any, dict[str, Step]]]:
    """Of each kernel its calls by tile, the tile that is chosen, and what cuBLAS and a pass do instead."""
    T, d, h = block.T, block.d, block.h
    i = _tensors(T, d, h)
    device = triton_launch.gpu(i["x"].device)
    kind, activation = triton_heuristics.HALF, "silu" if block.gated else "gelu"

    def forward(c: Any) -> object:
        if block.gated:
            return triton_linear.linear_glu(i["x"], i["w"], i["up"], None, None, activation, save_z=True, config=c)
        return triton_linear.linear_act(i["x"], i["w"], i["b"], activation, save_z=True, config=c)

    def backward(c: Any) -> object:
        if block.gated:
            return triton_linear.linear_glu_backward(
                i["x"], i["out"], i["z"], i["zu"], activation, need_a=True, need_db=False, config=c
            )
        return triton_linear.linear_act_backward(
            i["x"], i["out"], i["z"], activation, need_a=True, need_db1=True, config=c
        )

    def forward_by_blas() -> object:
        z = F.linear(i["x"], i["w"], i["b"])
        if block.gated:
            return triton_pointwise.glu_act_forward(z, F.linear(i["x"], i["up"]), activation)
        return triton_pointwise.act_forward(z, activation)

    def backward_by_blas() -> object:
        da = i["x"] @ i["out"]
        if block.gated:
            return triton_pointwise.glu_act_backward(da, i["z"], i["zu"], activation, True)
        return triton_pointwise.act_backward(da, i["z"], activation, True)[0].sum(0)

    tiles = [c for c in triton_heuristics.tile_candidates(kind, device, block.gated) if c.BM >= LEAST_ROWS]
    chosen = triton_heuristics.tile_config(T, h, d, kind, device, wide=block.gated)
    for work, by_blas in ((forward, forward_by_blas), (backward, backward_by_blas)):
        calls = {tile_name(c): functools.partial(work, c) for c in dict.fromkeys([chosen, *tiles])}
        yield calls, chosen, {f"{work.__name__}, cuBLAS and a pass": by_blas}


def tile_name(config: Any) -> str:
    """Rows x columns x depth, warps, stages."""
    return f"{config.BM} x {config.BN} x {config.BK}, {config.num_warps} warps, {config.num_stages} stages"


def _tensors(T: int, d: int, h: int) -> dict[str, Tensor]:
    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*size, device=gpu_timing.DEVICE, dtype=gpu_timing.DTYPE)

    return {
        "x": draw(T, d), "w": draw(h, d, scale=d**-0.5), "up": draw(h, d, scale=d**-0.5), "b": draw(h),
        "out": draw(d, h, scale=h**-0.5), "z": draw(T, h), "zu": draw(T, h),
    }  # fmt: skip


def timed_tiles(block: Block, rates: dict[str, float]) -> dict[str, Any]:
    """Milliseconds of the kernel of each direction by tile, and how far the chosen one is from the best."""
    found: dict[str, Any] = {}
    brief = []
    for calls, chosen, by_blas in tile_kernels(block):
        (base,) = by_blas
        graphs, refused = all_captured({**calls, **by_blas})
        rows = in_turn(graphs)
        direction = base.split(",")[0]
        own = {name: row["median"] for name, row in rows.items() if name != base}
        best, taken = min(own, key=own.__getitem__), own[tile_name(chosen)]
        found[direction] = {
            **compared(rows, base, None), "not run": refused, "chosen": tile_name(chosen), "best": best,
            "chosen over best": taken / own[best],
        }  # fmt: skip
        brief.append(f"{direction} {taken:.3f}, best {own[best]:.3f} ({best}), cuBLAS {rows[base]['median']:.3f} ms")
    return {**asdict(block), **found, "brief": "; ".join(brief)}
