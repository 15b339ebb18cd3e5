"""How many FFNs go through a method side by side: by bytes, which on a GPU follow from the memory that is left."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from bundles import random_bundle
from mlp_fusion.methods import get_method
from mlp_fusion.reducing import pipeline
from mlp_fusion.reducing.pipeline import Recipe, reduce_ffns

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[torch.device, int]:
    """Bytes that are free, by device: of one that is not in here nobody may ask."""
    found: dict[torch.device, int] = {}
    monkeypatch.setattr(pipeline.gpu, "free_memory", found.__getitem__)
    return found


@pytest.mark.parametrize(
    ("left", "expected"),
    [(141 * 2**30, 141 * 2**27), (2 * 2**30 + 8, 256 * 2**20 + 1), (2 * 2**30 - 8, 256 * 2**20), (0, 256 * 2**20)],
)
def test_bytes_are_an_eighth_of_what_a_gpu_has_left(free: dict[torch.device, int], left: int, expected: int) -> None:
    free[GPU] = left
    assert pipeline._batch_bytes(GPU) == expected
    # The CPU's do not depend on what is free.
    assert pipeline._batch_bytes(CPU) == 256 * 2**20


@pytest.mark.parametrize(
    ("left", "chunks"), [(0, [1, 1, 1, 1, 1]), (8 * 2 * 200, [2, 2, 1]), (8 * 4 * 200, [4, 1]), (10**9, [5])]
)
def test_as_many_go_side_by_side(
    free: dict[torch.device, int], left: int, chunks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    free[GPU] = left
    of_device = pipeline._batch_bytes
    monkeypatch.setattr(pipeline, "BATCH_BYTES", 1)
    monkeypatch.setattr(pipeline, "_batch_bytes", lambda _: of_device(GPU))
    bundles = [random_bundle(width=5, d=5, d_out=4, dtype=torch.float32, seed=seed) for seed in range(5)]
    assert 4 * bundles[0].width * bundles[0].vector_length == 200
    method, sizes = get_method("fusion"), []

    def reduce(bundle: Any, *given: Any, **how: Any) -> Any:
        sizes.append(len(bundle.w_in))
        return method.reduce(bundle, *given, **how)

    counted = dataclasses.replace(method, reduce=reduce)
    found = reduce_ffns(Recipe(counted, 0, "folded"), bundles, [2] * 5, None)
    assert sizes == chunks
    # What is found does not depend on how many that are.
    (alone,) = reduce_ffns(Recipe(method, 0, "folded"), bundles[3:4], [2], None)
    assert torch.equal(found[3].bundle.w_in, alone.bundle.w_in)
