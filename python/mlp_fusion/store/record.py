"""What a fused checkpoint says about itself in `config.json`, and where the rest of it lies."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from mlp_fusion.errors import InputError
from mlp_fusion.families import ARCHITECTURES, Architecture
from mlp_fusion.families.discovered import DiscoveredArchitecture, discovered
from mlp_fusion.neurons import Parameterization

#: Key in config.json. Readers that do not know it keep it and pass over it.
FUSION_KEY = "mlp_fusion"
FORMAT_VERSION = 1

#: Everything beyond the plain checkpoint is in this subfolder: engines that load every *.safetensors of the top
#: folder must not meet it.
SIDE_FOLDER = "mlp_fusion"
REFERENCE_FILE = f"{SIDE_FOLDER}/reference.safetensors"
REPORT_FILE = f"{SIDE_FOLDER}/report.json"
#: In the reference file's metadata: the dtype that the model ran in.
DTYPE_KEY = "dtype"


def check_config(config: Any) -> Architecture:
    """The architecture of a model that can be fused.

    Raises:
        InputError: quantised, fused already, layers that differ already, or FFNs that are not found, not
            proved, or not supported.
    """
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is not None:
        kind = quantisation.get("quant_method") if isinstance(quantisation, Mapping) else quantisation.quant_method
        raise InputError(
            f"the weights are quantised ({getattr(kind, 'value', kind)}): start from the unquantised checkpoint"
        )
    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
        raise InputError(f"config.json says dtype {str(dtype)[6:]}, in which no model can be loaded: mend it")
    if fusion_record(config) is not None:
        raise InputError("the model is fused already: start again from the original, fusing twice compounds the loss")
    if config.is_heterogeneous:
        raise InputError("the model's layers differ already (per_layer_config): only models of equal layers are fused")
    return architecture_of(config)


def known_architecture(config: Any) -> Architecture | None:
    """The entry of a model's family, or that which the record of its fusion holds; None where neither knows.

    Raises:
        InputError: the record is damaged.
    """
    model_type = getattr(config, "model_type", None) or ""
    record = getattr(config, FUSION_KEY, None)
    if model_type not in ARCHITECTURES and isinstance(record, Mapping) and "ffn" in record:
        return DiscoveredArchitecture.of_record(model_type, record["ffn"])
    return ARCHITECTURES.get(model_type)


def architecture_of(config: Any) -> Architecture:
    """The entry for a model: its family's, the one in its record, or one that is discovered.

    Raises:
        InputError: there is none, and none can be made.
    """
    known = known_architecture(config)
    return discovered(config) if known is None else known


def check_widths(architecture: Architecture, *, uneven: bool) -> None:
    """Raise InputError if layers are to differ in width, of a family in which that cannot be loaded again."""
    if uneven and isinstance(architecture, DiscoveredArchitecture):
        raise InputError(
            f"{architecture.model_types[0]}: layers of different widths are not supported for this family: fuse all to "
            "one"
        )


def fused_config(
    config: Any,
    architecture: Architecture,
    widths: dict[int, int],
    fused: list[int],
    *,
    method: str,
    parameterization: str,
) -> Any:
    """A copy of `config` that states the new widths and how they came about.

    A copy, because models share config objects (a teacher and its student, say). One width in all layers becomes the
    config's width itself, so that the checkpoint is an ordinary one; otherwise the config gets transformers'
    `per_layer_config`.

    Args:
        config: of the unfused model.
        widths: neurons of every layer after the fusion.
        fused: layers to fuse.
        method: name of the method.
        parameterization: the parameterization.
    """
    changed = copy.deepcopy(config)
    record = {
        "format": FORMAT_VERSION,
        "method": method,
        "parameterization": parameterization,
        "fused_layers": fused,
        "original_width": architecture.width(config),
    }
    if isinstance(architecture, DiscoveredArchitecture):
        record["ffn"] = architecture.kept()
    check_widths(architecture, uneven=len(set(widths.values())) > 1)
    if len(set(widths.values())) == 1:
        setattr(changed, architecture.width_key, widths[fused[0]])
    else:
        changed.per_layer_config = {index: {architecture.width_key: width} for index, width in widths.items()}
    setattr(changed, FUSION_KEY, record)
    return changed


def replace_config(model: nn.Module, config: Any) -> None:
    """Make `config` the config of `model` and of every submodule that shares its present one."""
    present = model.config
    for module in model.modules():
        if module.__dict__.get("config") is present:
            module.config = config


def adopt_fused_config(model: nn.Module) -> None:
    """Let a model whose inner model was fused share the inner one's config, as it did before."""
    if fusion_record(model.config) is not None:
        return
    for module in model.modules():
        config = module.__dict__.get("config")
        if getattr(config, FUSION_KEY, None) is not None:
            replace_config(model, config)
            return


def update_record(model: Any, architecture: Architecture) -> None:
    """Make the record say the parameterization that the fused FFNs of `model` have now."""
    found = [f for site in architecture.sites(model) if (f := architecture.fused(site)) is not None]
    forms = {f.parameterization for f in found if f.scale is not None} or {"folded"}
    if len(forms) > 1:
        raise InputError(f"the model's FFNs are in different parameterizations ({', '.join(sorted(forms))}): use one")
    record = fusion_record(model.config)
    if record is not None:
        setattr(model.config, FUSION_KEY, {**record, "parameterization": forms.pop()})


def state_layer_count(folder: Path, config: Any) -> None:
    """Write `num_hidden_layers` into the config.json of a model with per-layer widths.

    Programs that read it with the base config class (`Trainer`, when it resumes) do not know a family's own name for
    it, and transformers checks layer indices against it.
    """
    file = folder / "config.json"
    if not config.is_heterogeneous or not file.is_file():
        return
    content = json.loads(file.read_text(encoding="utf-8"))
    content["num_hidden_layers"] = config.num_hidden_layers
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def fusion_record(config: Any) -> dict[str, Any] | None:
    """The record that :func:`fused_config` left, checked, or None for an unfused model.

    Raises:
        InputError: it is damaged, or of a format that this version does not know.
    """
    record = getattr(config, FUSION_KEY, None)
    if record is None:
        return None
    if not isinstance(record, Mapping):
        raise _damaged(f"it is {record!r}")
    version = record.get("format")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise _damaged(f"its format is {version!r}")
    if version > FORMAT_VERSION:
        raise InputError(
            f"the {FUSION_KEY!r} entry of config.json has format {version}, this version knows {FORMAT_VERSION}: "
            "update mlp-fusion"
        )
    layers, width = record.get("fused_layers"), record.get("original_width")
    if record.get("parameterization") not in get_args(Parameterization):
        raise _damaged(f"its parameterization is {record.get('parameterization')!r}")
    if not isinstance(layers, list) or not layers or not all(type(i) is int and i >= 0 for i in layers):
        raise _damaged(f"its fused_layers are {layers!r}")
    if not isinstance(record.get("method"), str) or type(width) is not int or width < 1:
        raise _damaged("it does not say the method and the original width")
    return dict(record)


def _damaged(what: str) -> InputError:
    return InputError(f"the {FUSION_KEY!r} entry of config.json is damaged ({what}): fuse the original again")


def side_path(folder: str | os.PathLike[str], name: str) -> Path:
    """The path of a side file, its folder made."""
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
