"""How often users of the Triton kernels wait for the compiler: launches through Triton's own binder, without a GPU.

`triton_driver.py` stands in for the driver. Numbers of tokens change from call to call; shapes of weights do not.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

ROOT = Path(__file__).parents[2]


@functools.cache
def forms(*arguments: str) -> dict[str, dict[str, int]]:
    """What the stand-in counts, in a process of its own: in this one kernels may be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(ROOT / "tests" / "support" / "triton_driver.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, int]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("family", ["epilogue plain", "epilogue gated"])
def test_any_numbers_of_tokens_make_six_kernels(family: str) -> None:
    # Forward and backward over 400 random numbers of tokens, and the least.
    counted = forms("90")[family]
    assert len(counted) == 3
    assert sum(counted.values()) <= 6


@pytest.mark.parametrize("family", ["cublas plain", "cublas gated"])
def test_passes_between_products_are_compiled_for_few_and_for_many_entries(family: str) -> None:
    counted = forms("90")[family]
    assert len(counted) == 2
    assert max(counted.values()) <= 2


def test_experts_over_any_numbers_of_tokens() -> None:
    counted = forms("90")["experts"]
    # Three tiles each way that tokens go, two where they train; both gradients of weights.
    tiles = {"_linear_glu_kernel": 3, "_linear_act_kernel": 6, "_linear_glu_backward_kernel": 2}
    assert counted == {**tiles, "_expert_gradient_kernel": 2, "_tile_map_kernel": 1}


def test_projections_with_any_seed_between_two_powers_of_two() -> None:
    # Transforms that begin with a fold, with a mixture, with rows cut short, and that end with signs.
    assert forms("90")["projections"] == {"_pass_kernel": 4, "_unmix_kernel": 1}


def test_tangent_kernels_of_any_numbers_of_rows() -> None:
    # Two passes over one set of rows and over two, in the tiles of few rows and of many.
    assert forms("90")["tangent kernels"] == {"_ntk_tile_kernel": 8}


def test_a_shape_of_k_means_is_compiled_once() -> None:
    counted = forms("90")["kmeans"]
    assert len(counted) == 15
    # Three kernels have two modes in a run.
    assert sum(counted.values()) == 18
    # Batches of other sizes, views that begin anywhere, and further runs of a problem.
    assert forms("90")["kmeans in other batches"] == counted


def test_the_smallest_shapes_compile() -> None:
    counted = forms("90", "few")["degenerate"]
    assert {"_linear_glu_kernel", "_linear_glu_backward_kernel", "_column_sums_kernel"} <= set(counted)
    assert {"_pass_kernel", "_unmix_kernel", "_ntk_tile_kernel"} <= set(counted)
    assert {"_plus_plus_kernel", "_select_moves_kernel", "_assign_kernel"} <= set(counted)
