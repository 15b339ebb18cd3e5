"""What a fused checkpoint says about itself in `config.json`, and where the rest of it lies."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn
from transformers import PreTrainedConfig

from mlp_fusion.errors import InputError
from mlp_fusion.families import Architecture, FFNSite, Kind
from mlp_fusion.families.discovered import discovered
from mlp_fusion.neurons import Parameterization
from mlp_fusion.store.quantised import check_readable, quantisation
from mlp_fusion.store.widths import width_keys

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


def check_config(config: Any, *, stored: bool = False) -> Architecture:
    """The architecture of a model that can be fused.

    Args:
        config: of the model.
        stored: it is that of a checkpoint, whose weights may be quantised in a way that can be read as plain ones.

    Raises:
        InputError: quantised, fused already, of layers that differ, or with FFNs that are not found or not proved.
    """
    check_readable(config)
    if not stored and (method := quantisation(config)) is not None:
        raise InputError(f"the weights are quantised ({method}): load the model with dequantize=True, or compress it")
    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
        raise InputError(f"config.json says dtype {str(dtype)[6:]}, in which no model can be loaded: mend it")
    if fusion_record(config) is not None:
        raise InputError("the model is fused already: start again from the original, fusing twice compounds the loss")
    return architecture_of(config)


def known_architecture(config: Any) -> Architecture | None:
    """Where the FFNs are, as the record of a model's fusion says; None of a model without one.

    Raises:
        InputError: the record is damaged.
    """
    record = fusion_record(config)
    if record is None:
        return None
    try:
        kinds = tuple(Kind.from_dict(values) for values in record["kinds"])
        return Architecture(str(config.model_type), str(record["base"]), kinds)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged("it does not say where the FFNs are") from error


def architecture_of(config: Any) -> Architecture:
    """Where the FFNs of a model are: as its record says, or as discovery finds them.

    Raises:
        InputError: none are found, or one is not proved.
    """
    known = known_architecture(config)
    return discovered(config) if known is None else known


def fused_config(
    model: Any,
    architecture: Architecture,
    sites: Sequence[FFNSite],
    widths: Sequence[int],
    *,
    method: str,
    parameterization: str,
) -> Any:
    """A copy of the config of `model` that states the new widths and how they came about.

    A copy, because models share config objects (a teacher and its student, say). Where the config has keys that lead
    to the widths, they say them, so that the checkpoint is an ordinary one. Widths that no key can state are in the
    record, and models are built by it once `mlp_fusion` is imported.

    Args:
        model: unfused; on any device, meta included.
        architecture: its.
        sites: all of its FFNs.
        widths: of each, after the fusion.
        method: name of the method.
        parameterization: the parameterization.
    """
    changed = copy.deepcopy(model.config)
    setattr(changed, FUSION_KEY, None)
    changed, told = width_keys(model, changed, sites, widths)
    fused = [site for site, width in zip(sites, widths, strict=True) if width < site.kind.width]
    record: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "method": method,
        "parameterization": parameterization,
        "fused_layers": sorted(site.index for site in fused),
        "base": architecture.base,
        "kinds": [kind.to_dict() for kind in architecture.kinds],
    }
    untold = {
        architecture.name(site): width
        for site, width in zip(sites, widths, strict=True)
        if site.kind.group not in told and site in fused
    }
    if untold:
        record["widths"] = untold
    setattr(changed, FUSION_KEY, record)
    return changed


def replace_config(model: nn.Module, config: Any) -> None:
    """Make `config`, a changed copy, the config of `model` and of every submodule that shares its present one.

    Parts of a model (a tower, a decoder) that share a config nested in the present one share that in its copy then.
    """
    copies = dict(_nested(model.config, config))
    for module in model.modules():
        changed = copies.get(id(module.__dict__.get("config")))
        if changed is not None:
            module.config = changed


def _nested(present: Any, changed: Any) -> Iterator[tuple[int, Any]]:
    """The identity of a config, and of all that are nested in it, with what is in its place in a copy."""
    yield id(present), changed
    for name, own in vars(present).items():
        if isinstance(own, PreTrainedConfig):
            yield from _nested(own, getattr(changed, name))


def adopt_fused_config(model: nn.Module) -> None:
    """Let a model whose inner model was fused share the inner one's config, as it did before."""
    if fusion_record(model.config) is not None:
        return
    for module in model.modules():
        config = module.__dict__.get("config")
        if getattr(config, FUSION_KEY, None) is None:
            continue
        if type(config) is not type(model.config):
            raise InputError(
                f"{type(module).__name__}, a part of the model, was fused by itself: fuse the whole model with layers "
                "set to its paths, or save the part"
            )
        replace_config(model, config)
        return


def follow_layers(model: Any) -> None:
    """Make the record of a model that is to be saved say which of its FFNs are fused now, and how wide they are.

    Layers may have been taken out or moved. Where a width cannot be read (parameters that are packed, or elsewhere),
    the record stays as it is.

    Raises:
        InputError: as :func:`adopt_fused_config`.
    """
    adopt_fused_config(model)
    if getattr(model.config, FUSION_KEY, None) is None:
        return
    record, architecture = fusion_record(model.config), known_architecture(model.config)
    sites = [] if architecture is None else architecture.sites(model)
    widths = [_width(site) for site in sites]
    if record is None or architecture is None or not sites or None in widths:
        return
    fused = {site: width for site, width in zip(sites, widths, strict=True) if width != site.kind.width}
    changed = {**record, "fused_layers": [site.index for site in fused]}
    if "widths" in record:
        changed["widths"] = {architecture.name(site): width for site, width in fused.items()}
    # Where none is left, there is nothing to record.
    setattr(model.config, FUSION_KEY, changed if fused else None)


def _width(site: FFNSite) -> int | None:
    """The neurons of an FFN, or None where its parameters do not show it."""
    try:
        shown = site.module.get_parameter(site.kind.projection("w_in").parameter)
        width = site.neurons
    except AttributeError:
        return None
    return width if shown.ndim > 1 and 0 < width <= site.kind.width else None


def update_record(model: Any, architecture: Architecture) -> None:
    """Make the record say the parameterization that the fused FFNs of `model` have now."""
    found = [f for site in architecture.sites(model) if (f := architecture.fused(site)) is not None]
    forms = {f.parameterization for f in found if f.scale is not None} or {"folded"}
    if len(forms) > 1:
        raise InputError(f"the model's FFNs are in different parameterizations ({', '.join(sorted(forms))}): use one")
    record = fusion_record(model.config)
    if record is not None:
        setattr(model.config, FUSION_KEY, {**record, "parameterization": forms.pop()})


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
    layers, widths = record.get("fused_layers"), record.get("widths", {})
    if record.get("parameterization") not in get_args(Parameterization):
        raise _damaged(f"its parameterization is {record.get('parameterization')!r}")
    if not isinstance(layers, list) or not layers or not all(type(i) is int and i >= 0 for i in layers):
        raise _damaged(f"its fused_layers are {layers!r}")
    if not isinstance(record.get("method"), str):
        raise _damaged("it does not say the method")
    if not isinstance(widths, Mapping) or not all(type(width) is int and width > 0 for width in widths.values()):
        raise _damaged(f"its widths are {widths!r}")
    return dict(record)


def _damaged(what: str) -> InputError:
    return InputError(f"the {FUSION_KEY!r} entry of config.json is damaged ({what}): fuse the original again")


def side_path(folder: str | os.PathLike[str], name: str) -> Path:
    """The path of a side file, its folder made."""
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
