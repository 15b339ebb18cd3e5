"""Every Triton kernel, compiled for GPUs that need not be here, as it is launched for real shapes: what it uses.

The gate: shared memory within what the GPU has (99 KiB for compute capabilities 8.x and 12.x, since consumer GPUs have
no more, 227 KiB for 9.0 and 10.x); next to no spills; and as many programs on a multiprocessor as the host counts on.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fusion_kernels import gpu

pytestmark = pytest.mark.slow

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

ROOT = Path(__file__).parents[2]
VERSION = importlib.metadata.version("triton")
RECORD = ROOT / "tests" / "data" / "triton_resources.json"
#: The compute capabilities for which something is kept of this Triton. With another one, what would take minutes to
#: compile is not compiled for every GPU.
KEPT = sorted({int(key.split()[1]) for key in json.loads(RECORD.read_text("utf-8")) if key.split()[0] == VERSION})
CAPABILITIES = tuple(KEPT or [90])
#: Points, clusters, columns: a real layer, of few columns, since what prepares the points is computed; and the
#: configuration of small problems.
SHAPES = ("3072,768,129", "64,16,64")
#: Bytes of a thread that may go to memory, where ptxas prefers that to one program less on a multiprocessor. Seeding
#: and the search for best moves wait for one step after the other: a few spills for fewer of them.
SPILLED, OF_STEPS = 16, 48
STEPS = ("_plus_plus_kernel", "_best_move_kernel")


@functools.cache
def resources(
    script: str, capabilities: tuple[int, ...], *arguments: str, afresh: str = ""
) -> dict[int, list[dict[str, Any]]]:
    """What a script of tests/support finds, in a process of its own: in this one the kernels may be interpreted.

    `afresh` names a kernel to compile, whatever is kept of it.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if afresh:
        environment["TRITON_AOT"] = f"compile:{afresh}"
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(ROOT / "tests" / "support" / script), ",".join(map(str, capabilities)), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {int(capability): found for capability, found in json.loads(done.stdout).items()}


def test_what_is_kept_is_what_is_compiled() -> None:
    """For one kernel, on every run; `TRITON_AOT=compile` does it for all, and `make resources` keeps them anew."""
    resources("triton_aot.py", (80,), "64,16,64", afresh="_norms_kernel")


def assert_within(found: list[dict[str, Any]], capability: int) -> None:
    shared = gpu.LARGE_SHARED_MEMORY if 90 <= capability < 110 else gpu.SMALL_SHARED_MEMORY
    for kernel in found:
        if refused(kernel["kernel"], capability):
            continue
        assert kernel["spilled"] <= (OF_STEPS if kernel["kernel"] in STEPS else SPILLED), kernel
        assert kernel["shared"] <= shared, kernel
        # A bound on registers is there for a second program.
        assert kernel["programs"] >= (1 if kernel["constants"]["maxnreg"] is None else 2), kernel
        # Not of floating-point numbers, whose order would change results, nor with a fence for the whole device.
        assert not {"float atomics", "ordered atomics"} & set(kernel["instructions"]), kernel


def refused(kernel: str, capability: int) -> bool:
    """Whether this Triton is not to compile it for such a GPU: see `gpu.KNOWN_BAD`."""
    version = tuple(map(int, VERSION.split(".")[:2]))
    return any(
        kernel[1:].removesuffix("_kernel") in bad.kernels and capability // 10 == bad.major and version < bad.before
        for bad in gpu.KNOWN_BAD
    )


def products(capability: int, rows: int) -> str:
    """Which instructions multiply tiles of so many rows: the newest that there are take 64 and more."""
    return {9: "wgmma", 10: "tcgen05"}.get(capability // 10, "mma.sync") if rows >= 64 else "mma.sync"


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_compile_within_the_resources(capability: int) -> None:
    found = resources("triton_aot.py", CAPABILITIES, *SHAPES)[capability]
    names = {kernel["kernel"] for kernel in found}
    assert names == {
        "_assign_kernel", "_best_move_kernel", "_column_mean_kernel", "_commit_kernel", "_gram_kernel",
        "_means_kernel", "_members_kernel", "_nearest_kernel", "_norms_kernel", "_partition_cost_kernel",
        "_plus_plus_kernel",
        "_point_cost_kernel", "_products_kernel", "_row_norm_kernel", "_select_moves_kernel", "_settle_kernel",
        "_split_kernel", "_total_kernel",
    }  # fmt: skip
    assert_within(found, capability)
    grams = [kernel for kernel in found if kernel["kernel"] == "_gram_kernel"]
    # Exact and fast, Gram and products with given centroids, large and small.
    assert len(grams) == (8 if KEPT else 1)
    for kernel in [*grams, *(kernel for kernel in found if kernel["kernel"] == "_nearest_kernel")]:
        rows = kernel["constants"].get("BM", kernel["constants"].get("BN"))
        assert kernel["instructions"].get(products(capability, rows), 0) > 0, kernel
        assert kernel["instructions"].get("cp.async", 0) > 0, kernel


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_of_the_mlp_compile_within_the_resources(capability: int) -> None:
    found = resources("triton_aot_mlp.py", CAPABILITIES)[capability]
    names = {kernel["kernel"] for kernel in found}
    multiplying = {
        "_expert_gradient_kernel", "_linear_act_backward_kernel", "_linear_act_kernel", "_linear_glu_backward_kernel",
        "_linear_glu_kernel", "_resident_kernel",
    }  # fmt: skip
    assert names == multiplying | {"_act_backward_kernel", "_act_kernel", "_column_sums_kernel", "_tile_map_kernel"}
    assert_within(found, capability)
    for kernel in found:
        constants, instructions = kernel["constants"], kernel["instructions"]
        if kernel["kernel"] not in multiplying or (constants["PRECISION"] == "ieee" and constants["BK"] == 16):
            # Full float32 has no tensor cores.
            continue
        assert instructions.get(products(capability, constants["BM"]), 0) > 0, kernel
        # Entries that are loaded one by one, as those of odd sizes, are not pipelined.
        loaded = instructions.get("cp.async", 0) > 0
        size = "EVEN_M" if kernel["kernel"] == "_expert_gradient_kernel" else "EVEN_K"
        assert loaded or constants.get(size, constants.get("EVEN_D")) is False, kernel
    # On the GPUs for data centres two programs hide each other's epilogues where tokens are many.
    if capability in (90, 100, 103) and KEPT:
        assert {"_linear_act_kernel", "_linear_act_backward_kernel", "_linear_glu_kernel"} <= {
            kernel["kernel"] for kernel in found if kernel["constants"]["maxnreg"] == 128
        }


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_of_sparse_products_compile_within_the_resources(capability: int) -> None:
    found = resources("triton_aot_sparse.py", CAPABILITIES)[capability]
    assert {kernel["kernel"] for kernel in found} == {"_sampled_kernel"}
    assert_within(found, capability)
    # Four programs hide how long loads take.
    assert all(kernel["programs"] >= 4 for kernel in found)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_of_transforms_compile_within_the_resources(capability: int) -> None:
    found = resources("triton_aot_hadamard.py", CAPABILITIES)[capability]
    assert {kernel["kernel"] for kernel in found} == {"_pass_kernel", "_unmix_kernel"}
    assert_within(found, capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_of_tangent_kernels_compile_within_the_resources(capability: int) -> None:
    found = resources("triton_aot_ntk.py", CAPABILITIES)[capability]
    assert {kernel["kernel"] for kernel in found} == {"_ntk_tile_kernel", "_ntk_strip_kernel"}
    assert_within(found, capability)
    tiles = [kernel for kernel in found if kernel["kernel"] == "_ntk_tile_kernel"]
    # Of each precision: two passes over many rows with themselves and with others, and few. Of either dtype: strips of
    # two kernels, and what adds them up.
    assert (len(tiles), len(found)) == ((29, 33) if KEPT else (1, 2))
    for kernel in tiles:
        constants, instructions = kernel["constants"], kernel["instructions"]
        assert instructions.get("cp.async", 0) > 0, kernel
        if constants["PLANES"] == 2 or constants["PRECISION"] == "tf32":
            assert instructions.get(products(capability, constants["BM"]), 0) > 0, kernel
