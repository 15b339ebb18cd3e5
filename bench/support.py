"""What the benchmarks take from the tests' helpers, which are not installed: the one place that names their folder."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from ffn_blocks import ACTIVATIONS, Bundle, forward, make_bundle
from points import nearest_gap, neuron_like
from real_model import model_folder

__all__ = ["ACTIVATIONS", "Bundle", "forward", "make_bundle", "model_folder", "nearest_gap", "neuron_like"]
