"""Calibration: statistics of the FFNs on a little text, and the closed-form corrections that they allow."""

from mlp_fusion.calibration.matching import match_ntk
from mlp_fusion.calibration.nnls import nnls
from mlp_fusion.calibration.refit import Refit, refit
from mlp_fusion.calibration.statistics import FFNStatistics, collect

__all__ = ["FFNStatistics", "Refit", "collect", "match_ntk", "nnls", "refit"]
