"""`ntk_gram` against stored results of neural-tangents, another implementation by other people.

The results are those of `empirical_ntk_fn` in float64 (structured derivatives for `full`, Jacobian contraction for
`trace`, whose mean over outputs was multiplied by their number), on the blocks and inputs that are built here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ffn_blocks import Bundle
from torch import Tensor

from fusion_kernels import ntk_gram

STORED: dict[str, Any] = json.loads((Path(__file__).parents[1] / "data" / "ntk_neural_tangents.json").read_text())


def waves(*shape: int, phase: float) -> Tensor:
    return torch.sin(1.7 * torch.arange(torch.Size(shape).numel(), dtype=torch.float64) + phase).view(shape)


def block(gated: bool) -> Bundle:
    return Bundle(
        w_in=waves(1, 5, 4, phase=0.1),
        b_in=None if gated else waves(1, 5, phase=0.2),
        w_out=waves(1, 5, 3, phase=0.3),
        b_out=None if gated else waves(1, 3, phase=0.4),
        w_gate=waves(1, 5, 4, phase=0.7) if gated else None,
        scale=torch.arange(1.0, 6.0, dtype=torch.float64)[None],
        activation="silu" if gated else "gelu",
    )


@pytest.mark.parametrize("name", ["plain", "gated"])
@pytest.mark.parametrize("reduce", ["full", "trace"])
def test_as_neural_tangents(name: str, reduce: Any) -> None:
    x1, x2 = waves(3, 4, phase=0.5), waves(2, 4, phase=0.6)
    found = ntk_gram(block(name == "gated"), x1, x2, reduce)
    expected = torch.tensor(STORED[name][reduce], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
