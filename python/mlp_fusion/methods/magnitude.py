"""Pruning by weights alone, whatever is known of the text: the baseline that says what data is worth in a choice.

Source: joint ranking of a neuron's input and output weights as in LLM-Pruner (arXiv 2305.11627), by their norms.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlp_fusion.calibration.statistics import FFNStatistics
from mlp_fusion.methods import Reduction
from mlp_fusion.methods.prune import joint_norms, keep_best
from mlp_fusion.neurons import NeuronBundle


def magnitude(
    bundle: NeuronBundle, width: int, *, seed: int, statistics: Sequence[FFNStatistics] | None = None
) -> Reduction:
    """Keep the `width` neurons with the greatest |w_in| |w_out|, as `prune` does without text; no scale."""
    return Reduction.plain(keep_best(bundle, joint_norms(bundle), width))
