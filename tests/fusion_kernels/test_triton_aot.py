"""Every Triton kernel, compiled for GPUs that need not be here, as it is launched for real shapes: what it uses.

The gate: no spills (no stack, no local memory); shared memory within 99 KiB for compute capability 8.0, which is what
the consumer GPUs 8.6 and 8.9 have, and within 227 KiB for 9.0.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

ROOT = Path(__file__).parents[2]
SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024}
#: Points, clusters, columns: a real layer, of few columns, since what prepares the points is computed; and the
#: configuration of small problems.
SHAPES = ("3072,768,129", "64,16,64")


@functools.cache
def resources(script: str, capability: int, *arguments: str, afresh: str = "") -> list[dict[str, Any]]:
    """What a script of tests/support finds, in a process of its own: in this one the kernels may be interpreted.

    `afresh` names a kernel to compile, whatever is kept of it.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if afresh:
        environment["TRITON_AOT"] = f"compile:{afresh}"
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(ROOT / "tests" / "support" / script), str(capability), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_what_is_kept_is_what_is_compiled() -> None:
    """For one kernel, on every run; `TRITON_AOT=compile` does it for all, and `make resources` keeps them anew."""
    resources("triton_aot.py", 80, "64,16,64", afresh="_norms_kernel")


def assert_within(found: list[dict[str, Any]], capability: int) -> None:
    for kernel in found:
        assert kernel["stack"] == kernel["local"] == 0, kernel
        assert kernel["shared"] <= SHARED_MEMORY[capability], kernel
        assert kernel["instructions"]["float atomics"] == 0, kernel


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_within_the_resources(capability: int) -> None:
    found = resources("triton_aot.py", capability, *SHAPES)
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
    assert len(grams) == 8
    for kernel in [*grams, *(kernel for kernel in found if kernel["kernel"] == "_nearest_kernel")]:
        # wgmma works on 64 rows and more.
        hopper = capability == 90 and kernel["constants"].get("BM", kernel["constants"].get("BN")) >= 64
        assert kernel["instructions"]["wgmma" if hopper else "mma.sync"] > 0, kernel
        assert kernel["instructions"]["cp.async"] > 0, kernel


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_of_the_mlp_compile_within_the_resources(capability: int) -> None:
    found = resources("triton_aot_mlp.py", capability)
    names = {kernel["kernel"] for kernel in found}
    products = {
        "_expert_gradient_kernel", "_linear_act_backward_kernel", "_linear_act_kernel", "_linear_glu_backward_kernel",
        "_linear_glu_kernel", "_resident_kernel",
    }  # fmt: skip
    assert names == products | {"_act_backward_kernel", "_act_kernel", "_column_sums_kernel"}
    assert_within(found, capability)
    for kernel in found:
        constants, instructions = kernel["constants"], kernel["instructions"]
        if kernel["kernel"] not in products or (constants["PRECISION"] == "ieee" and constants["BK"] == 16):
            # Full float32 has no tensor cores.
            continue
        hopper = capability == 90 and constants["BM"] >= 64
        assert instructions["wgmma"] + (0 if hopper else instructions["mma.sync"]) > 0, kernel
        # Entries that are loaded one by one are not pipelined.
        assert instructions["cp.async"] > 0 or constants.get("EVEN_K", constants.get("EVEN_D")) is False, kernel
