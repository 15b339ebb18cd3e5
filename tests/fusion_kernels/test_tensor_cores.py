"""Triton kernels with the accumulation of tensor cores: what rounds to nearest elsewhere is cut off here.

The kernels themselves run, interpreted; `tensor_cores.py` says what is emulated. Each is held to what products in
float32 are held to: an RMS error of at most twice that of a chain of float32 multiply-adds.
"""

from __future__ import annotations

import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton_interpreter  # noqa: F401, I001 - before any kernel is defined
import numpy as np
import tensor_cores
import torch
from torch import Tensor

from fusion_kernels.experts import gpu_cases as of_experts
from fusion_kernels.kmeans import gpu_cases as of_kmeans
from fusion_kernels.kmeans import triton_assign, triton_points
from fusion_kernels.mlp import gpu_cases as of_blocks
from fusion_kernels.mlp import triton_linear, triton_resident
from fusion_kernels.mlp.triton_tiles import ExpertTiles
from fusion_kernels.ntk import gpu_cases as of_kernels
from fusion_kernels.ntk import triton_backend
from fusion_kernels.proof.cases import Case, poisoned

pytestmark = pytest.mark.slow


def neurons(n: int, d: int, seed: int) -> Tensor:
    """(1, n, d) float32: columns of very different sizes, away from the origin."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(1, n, d, generator=g) * torch.rand(d, generator=g).square() + 0.5


def rms(errors: Tensor) -> float:
    return float(errors.square().mean().sqrt())


def test_sums_are_cut_off_towards_zero() -> None:
    whole = np.array([1 + 2.0**-23 - 2.0**-40, -2.0 + 2.0**-30, 2.0**-149 * 1.9, 0.0, 3.0])
    assert tensor_cores.towards_zero(whole).tolist() == [1.0, -(2.0 - 2.0**-23), 2.0**-149, 0.0, 3.0]
    # 32 products that make 1.75 units of the total, and 0.875 in each step: nothing is left of them.
    row, total = np.full((1, 32), 1.0, np.float16), np.full((1, 1), 2.0**14, np.float32)
    column = np.full((32, 1), 1.75 / 32 * 2.0**-9, np.float16)
    assert tensor_cores.product(row, column, total) == total
    assert tensor_cores.product(row, 2 * column, total) == total + 2 * 2.0**-9


@pytest.mark.parametrize(("n", "d"), [(65, 129), (100, 1537)])
def test_gram_errs_no_more_than_twice_as_float32_does(n: int, d: int) -> None:
    x = neurons(n, d, n)
    with tensor_cores.truncating() as lengths:
        points = triton_points.prepare(x, None, None, 1, True)
    assert lengths
    rows = x[0].double() - points.mean[0].double()
    exact, norms = rows @ rows.T, rows.norm(dim=1)
    scale = torch.exp2(torch.log2(points.gram[0, 0, 0].double() / exact[0, 0]).round())
    given = rows.float()
    found, chain = (
        (gram.double() - exact) / (norms[:, None] * norms[None, :])
        for gram in (points.gram[0, :, :n].double() / scale, tensor_cores.multiply_add(given, given))
    )
    assert rms(found) <= 2 * rms(chain)
    # Squared norms are sums of one sign, which truncation only lowers.
    assert abs(float(found.diagonal().mean())) <= 2.0**-21


def test_nearest_where_products_are_far_larger_than_their_difference() -> None:
    d, n = 1024, 24
    # Each point is nearly as far from 2v as from 0. The product with 2v is a sum of one sign, which truncation lowers,
    # and that with 0 has no error; the mean of the centroids is 0, so that no centring makes the products small.
    v = torch.full((d,), 1.6)
    v[0] = 1.999
    centroids = torch.stack([2 * v, torch.zeros(d), -2 * v])[None]
    x = ((1 + torch.linspace(-1.5e-6, 1.5e-6, n).double()[:, None]) * v.double()).float()[None]
    with tensor_cores.truncating() as lengths:
        labels = triton_assign.assign(x, centroids)[0]
    assert lengths
    distances = (x[0, :, None].double() - centroids[0].double()).square().sum(2)
    assert torch.equal(labels, distances.argmin(1))


@pytest.mark.parametrize("gated", [False, True])
def test_the_hidden_layer(gated: bool) -> None:
    T, d, h = 33, 1537, 48
    g = torch.Generator().manual_seed(0)
    x, w, up = ((0.1 + 0.3 * torch.randn(n, d, generator=g)).half() for n in (T, h, h))
    out = torch.randn(d, h, generator=g).half() / 256
    with tensor_cores.truncating() as lengths:
        if gated:
            z, _, a = triton_linear.linear_glu(x, w, up, None, None, "relu", save_z=True)
            y = triton_resident.glu_resident(x, w, up, None, None, out, None, "relu")
        else:
            z, a = triton_linear.linear_act(x, w, None, "relu", save_z=True)
            y = triton_resident.mlp_resident(x, w, None, out, None, "relu")
        da, *_ = triton_linear.linear_act_backward(x, w.T.contiguous(), torch.ones_like(a), "relu", need_a=False,
                                                   need_db1=False)  # fmt: skip
    assert lengths
    assert z is not None
    for found, one, other in ((z, x, w), (da, x, w), (y, a, out)):
        assert bool(found.isfinite().all())
        exact, torchs = one.double() @ other.double().T, (one.float() @ other.float().T).half()
        assert rms(found.double() - exact) <= 2 * rms(torchs.double() - exact)


def test_experts() -> None:
    T, d, h = 2000, 24, 40
    g = torch.Generator().manual_seed(0)
    x, dz = ((0.5 + torch.randn(T, n, generator=g)).half() for n in (d, h))
    w = (0.5 + torch.randn(2, d, h, generator=g)).half()
    offsets = torch.tensor([0, 1900, T], dtype=torch.int32)
    with tensor_cores.truncating() as lengths:
        gradient = triton_linear.grouped_weight_gradient(dz, x, offsets, dtype=torch.float32)
        y = triton_linear.grouped_linear(x, w, ExpertTiles(offsets, T))
    assert lengths
    for e, rows in enumerate((slice(0, 1900), slice(1900, T))):
        exact, plain = dz[rows].double().T @ x[rows].double(), np.zeros((h, d), np.float32)
        # A sum over all tokens in one accumulator, as a library's product has it on tensor cores.
        one = torch.from_numpy(tensor_cores.product(dz[rows].numpy().T, x[rows].numpy(), plain)).double()
        assert rms(gradient[e].double() - exact) <= 2 * rms(one - exact)
        exact, torchs = x[rows].double() @ w[e].double(), (x[rows].float() @ w[e].float()).half()
        assert rms(y[rows].double() - exact) <= 2 * rms(torchs.double() - exact)


CPU = torch.device("cpu")
KERNEL = max(of_kernels.EVERY, key=lambda problem: problem.rows)
#: Of each proof whose kernels multiply on tensor cores, the case of the longest sums, as large as on a device.
LONGEST = {
    "kmeans": lambda: of_kmeans._gram(*max(of_kmeans.GRAMS, key=lambda shape: shape[1]), CPU),
    "mlp": lambda: of_blocks.block_case("epilogue", torch.bfloat16, (300, 768, 192), True, CPU),
    "experts": lambda: of_experts.experts_case(torch.bfloat16, (256, 192), False, CPU),
    "ntk": lambda: of_kernels.gram_case(triton_backend.ntk_gram, KERNEL, torch.float32, "tf32x3", CPU),
    "ntk, sums": lambda: of_kernels.sums_case(triton_backend.ntk_sums, KERNEL, torch.float32, CPU),
}


@pytest.mark.parametrize("name", LONGEST)
def test_cases_of_proofs_hold(name: str) -> None:
    """Their bounds leave room for tensor cores: a right kernel that is refused would never be used."""
    case: Case = LONGEST[name]()
    with tensor_cores.truncating() as lengths, poisoned():
        found = case.run()
    assert lengths
    assert case.wrong(found) is None


def test_the_cases_of_proofs_that_are_tried_are_theirs() -> None:
    assert (300, 768, 192) in of_blocks.SHAPES[torch.bfloat16]
    assert (256, 192) in of_experts.SHAPES[torch.bfloat16]
    assert (torch.float32, "tf32x3") in of_kernels.UNITS
