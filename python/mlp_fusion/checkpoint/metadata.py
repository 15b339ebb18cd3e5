"""What a fused checkpoint says about itself in `config.json`, and where the rest of it lies."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mlp_fusion.architectures import Architecture, get_architecture
from mlp_fusion.errors import InputError

#: Key in config.json. Readers that do not know it keep it and pass over it.
FUSION_KEY = "mlp_fusion"
FORMAT_VERSION = 1

#: Everything beyond the plain checkpoint is in this subfolder: engines that load every *.safetensors of the top
#: folder must not meet it.
SIDE_FOLDER = "mlp_fusion"
SCALE_FILE = f"{SIDE_FOLDER}/scale.safetensors"
REFERENCE_FILE = f"{SIDE_FOLDER}/reference.safetensors"
REPORT_FILE = f"{SIDE_FOLDER}/report.json"


def check_config(config: Any) -> Architecture:
    """The architecture of a model that can be fused.

    Raises:
        InputError: unknown architecture, quantised, fused already, or layers that differ in some other way already.
    """
    architecture = get_architecture(config.model_type)
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is not None:
        kind = quantisation.get("quant_method") if isinstance(quantisation, Mapping) else quantisation.quant_method
        raise InputError(
            f"the weights are quantised ({getattr(kind, 'value', kind)}): start from the unquantised checkpoint"
        )
    if fusion_record(config) is not None:
        raise InputError("the model is fused already: start again from the original, fusing twice compounds the loss")
    if config.is_heterogeneous:
        raise InputError("the model's layers differ already (per_layer_config): only models of equal layers are fused")
    return architecture


def record_fusion(
    model: nn.Module, architecture: Architecture, fused: list[int], *, method: str, parameterization: str
) -> None:
    """Write the widths and how they came about into `model.config`, once the FFNs of the layers `fused` are in place.

    One width in all layers becomes the config's width itself, so that the checkpoint is an ordinary one; otherwise
    the config gets transformers' `per_layer_config`.
    """
    config: Any = model.config
    record = {
        "format": FORMAT_VERSION,
        "method": method,
        "parameterization": parameterization,
        "fused_layers": fused,
        "original_width": architecture.width(config),
    }
    widths = {site.index: architecture.neurons(site) for site in architecture.sites(model)}
    if len(set(widths.values())) == 1:
        setattr(config, architecture.width_key, widths[fused[0]])
    else:
        config.per_layer_config = {index: {architecture.width_key: width} for index, width in widths.items()}
    setattr(config, FUSION_KEY, record)


def fusion_record(config: Any) -> dict[str, Any] | None:
    """The record that :func:`record_fusion` left, or None for an unfused model."""
    return getattr(config, FUSION_KEY, None)


def side_path(folder: str | os.PathLike[str], name: str) -> Path:
    """The path of a side file, its folder made."""
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
