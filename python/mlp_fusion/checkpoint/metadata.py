"""What a fused checkpoint says about itself in `config.json`, and where the rest of it lies."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from mlp_fusion.architectures import Architecture

#: Key in config.json. Readers that do not know it keep it and pass over it.
FUSION_KEY = "mlp_fusion"
FORMAT_VERSION = 1

#: Everything beyond the plain checkpoint is in this subfolder: engines that load every *.safetensors of the top
#: folder must not meet it.
SIDE_FOLDER = "mlp_fusion"
SCALE_FILE = f"{SIDE_FOLDER}/scale.safetensors"
REFERENCE_FILE = f"{SIDE_FOLDER}/reference.safetensors"
REPORT_FILE = f"{SIDE_FOLDER}/report.json"


def record_fusion(
    model: nn.Module, architecture: Architecture, widths: dict[int, int], *, method: str, parameterization: str
) -> None:
    """Write the new widths and how they came about into `model.config`.

    One width in all layers becomes the config's width itself, so that the checkpoint is an ordinary one; otherwise
    the config gets transformers' `per_layer_config`.
    """
    config: Any = model.config
    full = architecture.width(config)
    everywhere = {site.index: widths.get(site.index, full) for site in architecture.sites(model)}
    apply_widths(config, architecture, everywhere)
    record = {
        "format": FORMAT_VERSION,
        "method": method,
        "parameterization": parameterization,
        "original_width": full,
        "widths": {str(index): width for index, width in sorted(widths.items())},
    }
    setattr(config, FUSION_KEY, record)


def apply_widths(config: Any, architecture: Architecture, widths: dict[int, int]) -> None:
    """State `widths` (layer -> neurons, every layer) in `config`, plainly when they are all the same."""
    values = set(widths.values())
    if len(values) == 1:
        setattr(config, architecture.width_key, values.pop())
    else:
        config.per_layer_config = {index: {architecture.width_key: width} for index, width in sorted(widths.items())}


def fusion_record(config: Any) -> dict[str, Any] | None:
    """The record that :func:`record_fusion` left, or None for an unfused model."""
    return getattr(config, FUSION_KEY, None)


def side_path(folder: str | os.PathLike[str], name: str) -> Path:
    """The path of a side file, its folder made."""
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
