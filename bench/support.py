"""What the benchmarks take from the tests' helpers, which are not installed: the one place that names their folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from ffn_blocks import ACTIVATIONS, Bundle, forward, make_bundle
from points import nearest_gap, neuron_like
from real_model import model_folder

__all__ = [
    "ACTIVATIONS", "Bundle", "forward", "make_bundle", "model_folder", "nearest_gap", "neuron_like", "round_trips",
    "triton_aot",
]  # fmt: skip


def round_trips() -> Any:
    """The module of that name; it imports transformers, which others need not."""
    import round_trips as module

    return module


def triton_aot() -> Any:
    """The module of that name; it imports Triton, which others need not."""
    import triton_aot as module

    return module
