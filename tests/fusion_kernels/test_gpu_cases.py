"""The cases that kernels prove themselves with: right kernels pass, interpreted and small, and wrong ones do not."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton_interpreter  # noqa: F401, I001 - before any kernel is defined
import torch
from torch import Tensor

from fusion_kernels.experts import gpu_cases as of_experts
from fusion_kernels.kmeans import gpu_cases as of_kmeans
from fusion_kernels.kmeans.types import Options
from fusion_kernels.mlp import gpu_cases as of_blocks
from fusion_kernels.mlp import reference_backend, torch_backend
from fusion_kernels.proof.cases import failure

CPU = torch.device("cpu")


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", of_blocks.BACKENDS)
def test_blocks(name: str, gated: bool) -> None:
    assert failure(of_blocks.block_case(name, torch.float16, (33, 40, 24), gated, CPU)) is None


@pytest.mark.slow
def test_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_experts, "COUNTS", (0, 20, 1, 0))
    for gated in (False, True):
        assert failure(of_experts.experts_case(torch.float16, (24, 17), gated, CPU)) is None


@pytest.mark.slow
def test_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_kmeans, "NARROW", (14, 5, 4))
    cases = [
        of_kmeans._gram(17, 65, CPU),
        of_kmeans._nearest(20, 9, 5, torch.float32, CPU),
        of_kmeans._like_the_reference(12, 3, 3, Options(0, seed=3), CPU),
        of_kmeans._like_the_reference(15, 2, 3, Options(0, seed=3), CPU, draw=of_kmeans.scattered),
        of_kmeans._float32(CPU),
    ]
    assert [failure(case) for case in cases] == [None] * 5


@pytest.mark.parametrize("gated", [False, True])
def test_a_product_that_leaves_out_a_step_is_found(gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, whose units are the widest, and one step of 64 of 768; torch's operations pass with room."""

    def forward(x: Tensor, ffn: Any, level: int) -> Any:
        return reference_backend.forward(torch.cat([x[:, :-64], torch.zeros_like(x[:, -64:])], 1), ffn, level)

    backward = torch_backend.backward
    monkeypatch.setitem(of_blocks.BACKENDS, "torch", (reference_backend.forward, backward))
    monkeypatch.setitem(of_blocks.BACKENDS, "short", (forward, backward))
    shape = (300, 768, 192)
    assert failure(of_blocks.block_case("torch", torch.bfloat16, shape, gated, CPU)) is None
    assert ": y errs by " in str(failure(of_blocks.block_case("short", torch.bfloat16, shape, gated, CPU)))


def test_labels_that_are_not_nearest_are_found() -> None:
    x, centroids = of_kmeans.points(50, 4, 0), of_kmeans.points(5, 4, 1)
    labels = torch.cdist(x, centroids).argmin(1)
    assert of_kmeans._not_nearest(x, centroids, labels) is None
    labels[7] = (labels[7] + 1) % 5
    assert "the distance to the nearest errs by" in str(of_kmeans._not_nearest(x, centroids, labels))
    labels[7] = 5
    assert of_kmeans._not_nearest(x, centroids, labels) == "labels are outside [0, 5)"
