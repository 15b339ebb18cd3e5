"""`restore`: a model loaded from a fused checkpoint gets its fused FFNs back; and what the side file must hold."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers.utils import cached_file

from mlp_fusion.errors import InputError
from mlp_fusion.families import FFNSite, get_architecture
from mlp_fusion.neurons import NeuronBundle
from mlp_fusion.selection import parameterization_for
from mlp_fusion.store.record import FUSION_KEY, SCALE_FILE, fusion_record, update_record
from mlp_fusion.store.states import is_sound, know_forms, read_scale_file


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
            f"load {path} with from_pretrained and restore that"
        )
    config: Any = model.config
    architecture = get_architecture(config.model_type)
    if any(architecture.fused(site) is not None for site in architecture.sites(model)):
        raise InputError("the model has its fused FFNs already")
    parameterization = record["parameterization"] if optimizer == "as saved" else parameterization_for(optimizer)
    if record["parameterization"] == "folded":
        raise InputError(f"{path}: saved with its scale folded for good: it trains on as it is, nothing to restore")
    for site, scale, bundle in read_scales(model, path, parameterization):
        unfolded = bundle.unfolded(scale.to(bundle.w_in.device).unsqueeze(0))
        architecture.install(site, unfolded, parameterization)
    update_record(model, architecture)
    know_forms(model, architecture)


def read_scales(
    model: nn.Module, path: str | os.PathLike[str], parameterization: str
) -> list[tuple[FFNSite, Tensor, NeuronBundle]]:
    """Every fused FFN of a plain model with its `(N,)` scale in the side file at `path`, and its bundle (B = 1).

    Raises:
        InputError: the side file is missing, damaged, or does not fit the model or the parameterization.
    """
    config: Any = model.config
    architecture = get_architecture(config.model_type)
    record = fusion_record(config)
    assert record is not None
    sites = {architecture.scale_name(site.path): site for site in architecture.sites(model)}
    scales = _matched(_side_file(path), sites)
    found = [(sites[name], scale, architecture.read(sites[name], config)) for name, scale in scales.items()]
    _check_scales(found, record["fused_layers"], parameterization)
    return found


def _check_scales(
    found: Sequence[tuple[FFNSite, Tensor, NeuronBundle]], fused: Sequence[int], parameterization: str
) -> None:
    present = {site.index for site, _, _ in found}
    without, beyond = sorted(set(fused) - present), sorted(present - set(fused))
    if without:
        raise InputError(f"{SCALE_FILE} has no scale for layer {without[0]}: it belongs to another checkpoint")
    if beyond:
        raise InputError(f"{SCALE_FILE} has a scale for layer {beyond[0]}, which is not fused: it is of another one")
    for site, scale, bundle in found:
        layer = site.index
        if scale.shape != (bundle.width,):
            raise InputError(
                f"{SCALE_FILE}: layer {layer} has {scale.numel()} entries, the layer {bundle.width} neurons"
            )
        if not is_sound(scale):
            raise InputError(
                f"{SCALE_FILE}: the scale of layer {layer} holds NaN or Inf, or numbers that float32 cannot: the file "
                "is damaged"
            )
        if parameterization == "split" and bool((scale < 0).any()):
            raise InputError(
                f"{SCALE_FILE}: the scale of layer {layer} is negative in places, which the form for SGD cannot hold: "
                "restore with optimizer='adamw'"
            )
        silent = (scale == 0).to(bundle.w_out.device)
        if bool((bundle.w_out[0][silent] != 0).any()):
            raise InputError(
                f"{SCALE_FILE}: the scale of layer {layer} is 0 for neurons that have an output: it is of another "
                "checkpoint, or damaged"
            )


def _side_file(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    folder, name = os.path.split(SCALE_FILE)
    try:
        file = cached_file(os.fspath(path), name, subfolder=folder)
    except OSError as error:
        if os.path.isdir(path):
            what = f"{SCALE_FILE} is missing, which fused checkpoints have"
        else:
            what = f"neither a folder here nor a fused checkpoint on the hub ({str(error).splitlines()[0]})"
        raise InputError(f"{path}: {what}: the model cannot train on as it was saved") from error
    return read_scale_file(file)


def _matched(scales: Mapping[str, Tensor], sites: Mapping[str, FFNSite]) -> dict[str, Tensor]:
    # A task model saved and its bare encoder loaded, or the reverse, differ in a leading `bert.` and the like.
    found: dict[str, Tensor] = {}
    for key, scale in scales.items():
        matches = [n for n in sites if n == key or n.endswith(f".{key}") or key.endswith(f".{n}")]
        if len(matches) != 1 or matches[0] in found:
            raise InputError(f"{SCALE_FILE}: {key} fits no layer of the model")
        found[matches[0]] = scale
    return found
