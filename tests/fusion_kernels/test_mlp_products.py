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
from blocks import check, make_block
# Rests of every kind: of tiles (21 rows and 57, 22 columns), of panels (193 and 385 deep) and of blocks (521 columns).
for tokens, d, h, d_out in [(21, 193, 22, 33), (57, 24, 521, 385), (123, 385, 40, 1537), (700, 31, 47, 29)]:
    for gated in (False, True):
        check(make_block(tokens, d=d, h=h, d_out=d_out, gated=gated), "cpu", torch.float32, levels=(1,))
"""
#: Bits are those of contiguous tensors. NaN lies between the rows, and between the columns where these lie apart.
STRIDES = """
import torch
from blocks import make_block
from fusion_kernels import fused_mlp
block = make_block(123, d=256, h=48, d_out=24, scale=None).to(torch.float32)
def spread(tensor, step):
    whole = torch.full((len(tensor), 2 * tensor.shape[1] * step), torch.nan)
    whole[:, : tensor.shape[1] * step : step] = tensor
    return whole[:, : tensor.shape[1] * step : step]
def computed(x, w_in):
    leaves = [t.detach().requires_grad_() for t in (x, w_in, block.b_in, block.w_out, block.b_out)]
    assert leaves[0].stride() == x.stride() and leaves[1].stride() == w_in.stride()
    y = fused_mlp(*leaves, backend="cpu")
    return [y, *torch.autograd.grad(y.square().sum(), leaves)]
x, w_in = block.x.detach(), block.w_in.detach()
expected = computed(x, w_in)
# Columns apart, rows as far apart as a cache's places, one row for all, and weights the other way round.
for other, strides in ((spread(x, 2), (1024, 2)), (spread(x, 1), (512, 1))):
    assert other.stride() == strides
    for w in (w_in, spread(w_in, 2), w_in.t().contiguous().t()):
        for found, wanted in zip(computed(other, w), expected):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)
one = x[:1].expand(123, 256)
for found, wanted in zip(computed(one, w_in), computed(one.contiguous(), w_in)):
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
"""
THREADS = """
import torch
from dataclasses import replace
from blocks import make_block
for tokens, d, h in ((90, 200, 150), (2100, 70, 66), (2049, 40, 24)):
    block = make_block(tokens, d=d, h=h, d_out=d, gated=True).to(torch.float32)
    with torch.no_grad():
        few = torch.cat([replace(block, x=part).fused(1, "cpu") for part in block.x.split(683)])
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


@pytest.mark.slow
@pytest.mark.parametrize("products", ["own", "blas"])
def test_odd_shapes(products: str) -> None:
    done = run(SHAPES, products)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_strides_batches_and_threads_change_no_bit() -> None:
    done = run(STRIDES + THREADS, "own")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_name_that_is_unknown_is_refused() -> None:
    script = "\nimport torch, fusion_kernels\nx = torch.ones(3, 3)\n"
    done = run(f"{script}fusion_kernels.fused_mlp(x, x, None, x, None, backend='cpu')\n", "mine")
    assert "FUSION_KERNELS_CPU_PRODUCTS is mine: use auto, own or blas" in done.stderr
    assert done.returncode != 0
