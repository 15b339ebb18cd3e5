"""The products of feed-forward blocks on the CPU, by the library's own kernel and by torch's BLAS.

Which one is taken is decided once in a process, so that each is tried in one of its own, whatever the machine takes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusion_kernels import native

pytestmark = pytest.mark.skipif(native.UNAVAILABLE is not None, reason="the compiled library is not there")

SHAPES = """
import torch
from dataclasses import replace
from blocks import check, make_block
# Rests of every kind: of tiles (21 rows and 57, 22 columns), of panels (193 and 385 deep) and of blocks (521 columns).
for tokens, d, h, d_out in [(21, 193, 22, 33), (57, 24, 521, 385), (123, 385, 40, 1537), (700, 31, 47, 29)]:
    for gated in (False, True):
        check(make_block(tokens, d=d, h=h, d_out=d_out, gated=gated), "cpu", torch.float32, levels=(1,))
# Columns that lie apart, rows that lie as far apart as a cache's places, and a gradient that is one number.
block = make_block(123, d=256, h=48, d_out=24).to(torch.float32)
spread = torch.full((123, 512), torch.nan)
spread[:, ::2] = block.x.detach()
everywhere = torch.full((123, 512), torch.nan)
everywhere[:, :256] = block.x.detach()
for x in (spread[:, ::2], everywhere[:, :256]):
    check(replace(block, x=x, w_in=block.w_in.t().contiguous().t()), "cpu", torch.float32, levels=(1,))
"""
THREADS = """
import torch
from blocks import computed, make_block
for tokens, d, h in ((90, 200, 150), (2100, 70, 66)):
    block = make_block(tokens, d=d, h=h, d_out=d, gated=True).to(torch.float32)
    with torch.no_grad():
        few = torch.cat([block.__class__(**{**vars(block), "x": part}).fused(1, "cpu") for part in block.x.split(90)])
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(block.fused(1, "cpu"))
    for other in (few, *found[1:]):
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)
"""


def run(script: str, products: str) -> subprocess.CompletedProcess[str]:
    support = str(Path(__file__).parents[1] / "support")
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {support!r}){script}"],
        env={**os.environ, "FUSION_KERNELS_CPU_PRODUCTS": products},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("products", ["own", "blas"])
def test_odd_shapes_and_strides(products: str) -> None:
    done = run(SHAPES, products)
    assert done.returncode == 0, done.stderr


def test_a_token_has_the_same_bits_in_any_batch_and_with_any_number_of_threads() -> None:
    done = run(THREADS, "own")
    assert done.returncode == 0, done.stderr


def test_a_name_that_is_unknown_is_refused() -> None:
    script = "\nimport torch, fusion_kernels\nx = torch.ones(30, 30)\nfusion_kernels.fused_mlp(x, x, None, x, None)\n"
    done = run(script, "mine")
    assert "FUSION_KERNELS_CPU_PRODUCTS is mine: use auto, own or blas" in done.stderr
    assert done.returncode != 0
