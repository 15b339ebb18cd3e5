"""A stand-in for Triton's driver: launches go through the real binder, and compile as for a GPU that is not here.

What a launch is specialised on (a size that is 1 or a multiple of 16, a pointer's alignment, every constant) decides
how often users wait for the compiler, and is decided by Triton's own code, which runs here on tensors of the CPU.

As a script (`python triton_driver.py 90`, in a process without TRITON_INTERPRET) it writes JSON: by family of calls, by
kernel, how many forms of it Triton would compile. With `few` or `all` behind the capability it compiles those of
degenerate shapes, some or all of them: the first takes seconds.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from unittest import mock

import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton_aot import kmeans_host
from triton_aot_ntk import ntk_host, tangent_kernel

Forms = dict[str, set[str]]
#: Where the MLP's kernels are counted: inputs and neurons, and how many random numbers of tokens up to which.
WIDTH, DRAWS, MOST_TOKENS = (768, 192), 400, 16_384
DTYPES = (torch.bfloat16, torch.float32)


class _Driver:
    """What the binder and the compiler ask of a driver."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch

    def get_current_stream(self, _: int) -> int:
        return 0


@contextmanager
def standing_in(capability: int, really: bool = False) -> Iterator[Forms]:
    """Launches run nothing; yields what would be compiled, by kernel, which is compiled only if `really`."""
    forms: Forms = defaultdict(set)

    def seen(*, key: str, fn: object, **_: object) -> bool:
        forms[fn.name].add(key)  # type: ignore[attr-defined]
        return not really

    run = JITFunction.run
    with ExitStack() as patches:
        # Asking for the active driver where there is no GPU raises.
        patches.enter_context(mock.patch.object(driver, "_active", _Driver(capability)))
        patches.enter_context(
            mock.patch.object(JITFunction, "run", lambda self, *a, **k: run(self, *a, **{**k, "warmup": True}))
        )
        patches.enter_context(mock.patch.object(knobs.runtime, "jit_cache_hook", seen))
        yield forms


@contextmanager
def mlp_host(capability: int) -> Iterator[None]:
    """The MLP's host functions, as they choose tiles for a GPU that is not here."""
    from fusion_kernels.mlp import triton_heuristics, triton_linear, triton_resident

    with ExitStack() as patches:
        for module in (triton_linear, triton_resident):
            patches.enter_context(mock.patch.object(module, "gpu", return_value=triton_heuristics.gpu_of(capability)))
        yield


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def step(T: int, d: int, h: int, dtype: torch.dtype, gated: bool) -> None:
    """A forward and a backward of the epilogue path."""
    from fusion_kernels.mlp import triton_linear

    x, w, out, b, z = (meta(*s, dtype=dtype) for s in ((T, d), (h, d), (d, h), (h,), (T, h)))
    if gated:
        triton_linear.linear_glu(x, w, w, b, b, "silu", save_z=True)
        triton_linear.linear_glu_backward(x, out, z, z, "silu", need_a=True, need_db=True)
    else:
        triton_linear.linear_act(x, w, b, "gelu", save_z=True)
        triton_linear.linear_act_backward(x, out, z, "gelu", need_a=True, need_db1=True)


def passes(T: int, d: int, h: int, dtype: torch.dtype, gated: bool) -> None:
    """A forward and a backward of what stands between products by cuBLAS."""
    from fusion_kernels.mlp import triton_pointwise

    z = meta(T, h, dtype=dtype)
    if gated:
        triton_pointwise.glu_act_forward(z, z, "silu")
        triton_pointwise.glu_act_backward(z, z, z, "silu", True)
    else:
        triton_pointwise.act_forward(z, "gelu")
        triton_pointwise.act_backward(z, z, "gelu", True)


def experts(T: int, d: int, h: int, E: int, dtype: torch.dtype) -> None:
    """A forward and a backward of gated experts, as `fusion_kernels.experts.triton_backend` makes them."""
    from fusion_kernels.mlp import triton_linear
    from fusion_kernels.mlp.triton_tiles import ExpertTiles

    offsets, order = meta(E + 1, dtype=torch.int32), meta(T, dtype=torch.int64)
    owners = ExpertTiles(offsets, T)
    x, w, out, z = (meta(*s, dtype=dtype) for s in ((T, d), (E, h, d), (E, d, h), (T, h)))
    triton_linear.linear_glu(x, w, w, None, None, "silu", save_z=True, experts=owners, rows=order)
    triton_linear.grouped_linear(z, out.mT, owners, places=order)
    triton_linear.linear_glu_backward(x, out, z, z, "silu", need_a=True, need_db=False, experts=owners, rows=order)
    triton_linear.grouped_linear(z, w, owners, second=(z, w), places=order)
    triton_linear.grouped_weight_gradient(z, x, offsets, b_rows=order)
    triton_linear.grouped_weight_gradient(x, z, offsets, a_rows=order)


def kmeans(N: int, K: int, D: int, dtype: torch.dtype, batches: tuple[int, ...] = (1,), n_init: int = 1) -> None:
    from fusion_kernels.kmeans import triton_backend
    from fusion_kernels.kmeans.types import Options

    for B in batches:
        # One element behind a boundary, as a view of something larger may begin.
        x = torch.zeros(B * N * D + 1, dtype=dtype)[B % 2 :][: B * N * D].view(B, N, D)
        triton_backend.kmeans(x, None, None, Options(K, n_init=n_init, max_iter=1))


def projections() -> None:
    """Fastfood and its transpose, of tensors of many sizes between two powers of two, each with a seed of its own."""
    from fusion_kernels.hadamard import triton_backend

    for seed, size in enumerate(range(600, 1000, 20)):
        # One element behind a boundary, as a view of something larger may begin.
        theta, y = torch.zeros(201)[seed % 2 :][:200], torch.zeros(size)
        triton_backend.fastfood(theta, size, seed << 20)
        triton_backend.fastfood_transposed(y, 200 - seed, seed << 20)


def smallest_projection(dtype: torch.dtype) -> None:
    """Of one number to one."""
    from fusion_kernels.hadamard import triton_backend

    triton_backend.fastfood(torch.zeros(1, 1, dtype=dtype), 1, 0)
    triton_backend.fastfood_transposed(torch.zeros(1, 1, dtype=dtype), 1, 0)


def tangent_kernels() -> None:
    """Of a block in one precision, of many numbers of rows with themselves and with others."""
    params, counts = ("w_in", "b_gate", "w_out"), draws()[::8] + draws()[-6:]
    for n, m in pairwise(counts):
        for others in (None, m):
            tangent_kernel(n, others, 64, 32, params, torch.float32, "bf16x3")


def draws() -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return [*torch.randint(1, MOST_TOKENS + 1, (DRAWS,), generator=generator).tolist(), 1, 16, 17, 64, 65, 1024]


def families() -> dict[str, Callable[[], None]]:
    """Calls whose kernels are counted together, by name."""

    def over_draws(call: Callable[..., None], *fixed: object) -> Callable[[], None]:
        return lambda: [call(T, *WIDTH, *fixed) for T in draws()] and None

    found: dict[str, Callable[[], None]] = {
        "kmeans": lambda: kmeans(300, 40, 129, torch.float32),
        "kmeans in other batches": lambda: kmeans(300, 40, 129, torch.float32, (1, 2, 16, 33), 2),
    }
    for gated in (False, True):
        kind = "gated" if gated else "plain"
        found[f"epilogue {kind}"] = over_draws(step, torch.bfloat16, gated)
        found[f"cublas {kind}"] = over_draws(passes, torch.bfloat16, gated)
    found["projections"] = projections
    found["tangent kernels"] = tangent_kernels
    found["experts"] = over_draws(experts, 8, torch.bfloat16)
    return found


def degenerate(few: bool) -> None:
    """The smallest shapes there are."""
    if few:
        step(1, 1, 1, torch.bfloat16, True)
        smallest_projection(torch.float32)
        tangent_kernel(1, None, 1, 1, ("b_in",), torch.float32, "bf16x3")
        kmeans(2, 1, 1, torch.float64, (1,), 2)
        return
    for dtype in DTYPES:
        for gated in (False, True):
            step(1, 1, 1, dtype, gated)
            passes(1, 1, 1, dtype, gated)
        for E in (1, 2):
            experts(1, 1, 1, E, dtype)
    for dtype in (torch.float32, torch.float64):
        smallest_projection(dtype)
        for others in (None, 1, 2):
            tangent_kernel(1, others, 1, 1, ("w_in", "b_gate"), dtype, "highest")
        for N, K, D in ((2, 1, 1), (3, 2, 1)):
            kmeans(N, K, D, dtype, (1, 2), 2)


def main() -> None:
    """Write the number of forms by family and kernel, or compile those of the degenerate shapes."""
    capability, counted = int(sys.argv[1]), {}
    with kmeans_host(capability), mlp_host(capability), ntk_host(capability):
        if sys.argv[2:]:
            with standing_in(capability, really=True) as forms:
                degenerate({"few": True, "all": False}[sys.argv[2]])
            counted["degenerate"] = {name: len(keys) for name, keys in forms.items()}
        else:
            for name, calls in families().items():
                with standing_in(capability) as forms:
                    calls()
                counted[name] = {kernel: len(keys) for kernel, keys in forms.items()}
    sys.stdout.write(json.dumps(counted))


if __name__ == "__main__":
    main()
