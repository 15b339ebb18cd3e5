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

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

ROOT = Path(__file__).parents[2]
SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024}
#: Points, clusters, columns: a real layer, and the configuration of small problems.
SHAPES = ("3072,768,1537", "64,16,64")


@functools.cache
def resources(capability: int) -> list[dict[str, Any]]:
    """In a process of its own: in this one the kernels may be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(ROOT / "tests" / "support" / "triton_aot.py"), str(capability), *SHAPES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_within_the_resources(capability: int) -> None:
    found = resources(capability)
    names = {kernel["kernel"] for kernel in found}
    assert names == {
        "_assign_kernel", "_best_move_kernel", "_column_mean_kernel", "_commit_kernel", "_gram_kernel",
        "_means_kernel", "_members_kernel", "_nearest_kernel", "_norms_kernel", "_partition_cost_kernel",
        "_plus_plus_kernel",
        "_point_cost_kernel", "_products_kernel", "_row_norm_kernel", "_select_moves_kernel", "_settle_kernel",
        "_split_kernel", "_total_kernel",
    }  # fmt: skip
    for kernel in found:
        assert kernel["stack"] == kernel["local"] == 0, kernel
        assert kernel["shared"] <= SHARED_MEMORY[capability], kernel
        assert kernel["instructions"]["float atomics"] == 0, kernel
    grams = [kernel for kernel in found if kernel["kernel"] == "_gram_kernel"]
    # Exact and fast, Gram and products with given centroids, large and small.
    assert len(grams) == 8
    for kernel in [*grams, *(kernel for kernel in found if kernel["kernel"] == "_nearest_kernel")]:
        # wgmma works on 64 rows and more.
        hopper = capability == 90 and kernel["constants"].get("BM", kernel["constants"].get("BN")) >= 64
        assert kernel["instructions"]["wgmma" if hopper else "mma.sync"] > 0, kernel
        assert kernel["instructions"]["cp.async"] > 0, kernel
