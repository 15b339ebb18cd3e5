"""Calibration: statistics of the FFNs on a little text, and the corrections that they allow."""

from mlp_fusion.calibration.local_training import LocallyTrained, train_locally
from mlp_fusion.calibration.matching import match_ntk
from mlp_fusion.calibration.nnls import nnls
from mlp_fusion.calibration.refit import Refit, refit
from mlp_fusion.calibration.sensitivity import (
    GradientSums,
    OutputSensitivity,
    output_gradients,
    output_sensitivities,
)
from mlp_fusion.calibration.statistics import FFNStatistics, collect

__all__ = [
    "FFNStatistics",
    "GradientSums",
    "LocallyTrained",
    "OutputSensitivity",
    "Refit",
    "collect",
    "match_ntk",
    "nnls",
    "output_gradients",
    "output_sensitivities",
    "refit",
    "train_locally",
]
