"""`restore`: a model loaded from a fused checkpoint gets its fused FFNs back; and what the side file must hold."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor, nn

from mlp_fusion.errors import InputError
from mlp_fusion.families import FFNSite
from mlp_fusion.families.exchange import install
from mlp_fusion.neurons import NeuronBundle
from mlp_fusion.selection import parameterization_for
from mlp_fusion.store.record import FUSION_KEY, architecture_of, fusion_record, update_record
from mlp_fusion.store.scale import check_scales, matched_scales, read_scales
from mlp_fusion.store.states import know_forms


def restore(model: nn.Module, path: str | os.PathLike[str], optimizer: str | None = "as saved") -> None:
    """Give a model loaded from a fused checkpoint its fused FFNs back, in place, to go on training it.

    A fused checkpoint loads as an ordinary, narrower model with the scale inside its weights. This takes the scale out
    again, in the parameterization that the checkpoint was trained with. Build the optimiser after this call.

    Args:
        model: loaded from `path` with `from_pretrained`.
        path: the checkpoint's folder or hub name.
        optimizer: `"as saved"`, or an optimiser's name to change to the parameterization that suits it.

    Raises:
        InputError: the model was not fused, is restored already, or the side file is missing, damaged, or of another
            checkpoint. The model is then as it was.

    Examples:
        >>> from transformers import AutoModel
        >>> fused = AutoModel.from_pretrained("all-MiniLM-L6-v2")
        >>> _ = mlp_fusion.fuse(fused, width=0.25)
        >>> fused.save_pretrained("fused")
        >>> model = AutoModel.from_pretrained("fused")  # narrower, and plain
        >>> mlp_fusion.restore(model, "fused")  # fused again: train on
        >>> model.state_dict().keys() == fused.state_dict().keys()
        True
    """
    record = fusion_record(getattr(model, "config", None))
    if record is None:
        raise InputError(
            f"the model was not loaded from a fused checkpoint, its config has no {FUSION_KEY!r} entry: "
            f"load {path} with the class that it was saved from, and restore that"
        )
    config: Any = model.config
    architecture = architecture_of(config)
    if any(architecture.fused(site) is not None for site in architecture.sites(model)):
        raise InputError("the model has its fused FFNs already")
    parameterization = record["parameterization"] if optimizer == "as saved" else parameterization_for(optimizer)
    if record["parameterization"] == "folded":
        raise InputError(
            f"{path}: its neurons have no scale, or one folded for good: it trains on as it is, nothing to restore"
        )
    for site, scale, bundle in scaled_sites(model, path, parameterization):
        unfolded = bundle.unfolded(scale.to(bundle.w_in.device).reshape(bundle.w_in.shape[:2]))
        install(site, unfolded, parameterization)
    update_record(model, architecture)
    know_forms(model, architecture)


def scaled_sites(
    model: nn.Module, path: str | os.PathLike[str], parameterization: str
) -> list[tuple[FFNSite, Tensor, NeuronBundle]]:
    """Every fused FFN of a plain model with its scale in the side file at `path`, and its bundle.

    Raises:
        InputError: the side file is missing, damaged, or does not fit the model or the parameterization.
    """
    config: Any = model.config
    architecture = architecture_of(config)
    record = fusion_record(config)
    assert record is not None
    sites = {f"{site.path}.{site.kind.scale}": site for site in architecture.sites(model)}
    scales = matched_scales(read_scales(path), sites)
    found = [(sites[name], scale, architecture.read(sites[name])) for name, scale in scales.items()]
    check_scales(found, record["fused_layers"], parameterization)
    return found
