"""Model families: where FFNs are, found by what they compute."""

from __future__ import annotations

from mlp_fusion.families.base import Architecture, FFNSite, Kind

__all__ = ["Architecture", "FFNSite", "Kind"]
