"""Between the fused model in memory (explicit scale) and the plain checkpoint on disk (scale inside the weights).

`save_pretrained` of a model with fused FFNs writes folded weights, so that any program loads them, and the scale in a
side file; `load_state_dict` of one takes plain weights as well as its own; `restore` rebuilds the fused model from a
plain one and the side file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import cached_file

from mlp_fusion.architectures import Architecture, FFNSite, get_architecture
from mlp_fusion.checkpoint.metadata import (
    FUSION_KEY,
    REFERENCE_FILE,
    REPORT_FILE,
    SCALE_FILE,
    adopt_fused_config,
    fusion_record,
    side_path,
    state_layer_count,
    update_record,
)
from mlp_fusion.errors import InputError
from mlp_fusion.neurons import SCALE_EXPONENTS, scale_power
from mlp_fusion.selection import parameterization_for


@dataclass(frozen=True)
class _Rescaling:
    """Multiplies one FFN's tensors in a state dict by powers of its scale, neuron by neuron."""

    architecture: Architecture
    prefix: str

    def key(self, role: str, kind: str) -> str:
        return f"{self.prefix}{self.architecture.projections[role]}.{kind}"

    def apply(self, state: dict[str, Tensor], scale: Tensor, before: float, after: float) -> None:
        """Input projections (with their biases) times scale^before, the output projection times scale^after."""
        for role in self.architecture.projections:
            exponent = after if role == "w_out" else before
            if exponent == 0.0:
                continue
            # Neurons lie along the outputs of input projections and the inputs of the output projection, in rows of an
            # (out, in) weight and columns of a transposed one respectively.
            in_rows = (role == "w_out") == self.architecture.transposed
            for kind in ("weight", *(() if role == "w_out" else ("bias",))):
                key = self.key(role, kind)
                if key in state:
                    tensor = state[key]
                    factor = scale_power(
                        scale.to(tensor.device, torch.promote_types(scale.dtype, torch.float32)), exponent
                    )
                    if tensor.ndim == 2 and in_rows:
                        factor = factor.unsqueeze(1)
                    state[key] = (tensor * factor).to(tensor.dtype)


def _exponents(parameterization: str) -> tuple[float, float]:
    """Powers of p that take plain (folded) input and output weights to those of `parameterization`."""
    a = SCALE_EXPONENTS[parameterization]
    return a, a - 1.0


def fold_state_dict(
    model: nn.Module, architecture: Architecture, state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a fused model's state dict into a plain one with folded weights, and the scales.

    Returns:
        `(plain, scales)`; the tensors of `state` are not changed.

    Raises:
        InputError: a fused FFN's tensors are not in `state` under the model's own names, or are sharded.
    """
    plain = dict(state)
    scales: dict[str, Tensor] = {}
    for site in architecture.sites(model):
        fused = architecture.fused(site)
        if fused is None or fused.scale is None:
            continue
        rescaling = _Rescaling(architecture, f"{site.path}.")
        name = architecture.scale_name(site.path)
        needed = [name, *(rescaling.key(role, "weight") for role in architecture.projections)]
        for key in needed:
            if key not in plain:
                raise InputError(
                    f"{key} is not in the state dict: merge adapters first, and pass a state dict with the model's "
                    "own names"
                )
            if type(plain[key]) not in (Tensor, nn.Parameter):
                raise InputError(f"{key} is a {type(plain[key]).__name__}: pass state_dict= with full tensors")
        scale = plain.pop(name)
        scales[name] = scale.detach().to("cpu", torch.float32).contiguous()
        before, after = _exponents(fused.parameterization)
        rescaling.apply(plain, scale, -before, -after)
    return plain, scales


def save_folded(
    model: Any,
    save: Callable[..., None],
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    push_to_hub: bool = False,
    **kwargs: Any,
) -> None:
    """`save_pretrained` of a model with fused FFNs: `save`, the host's own, given folded weights; and the side file.

    Raises:
        InputError: see :func:`fold_state_dict`; or `push_to_hub`, which would leave the side file behind.
    """
    if push_to_hub:
        raise InputError("save_pretrained(push_to_hub=True) would leave the scale behind: use model.push_to_hub(name)")
    adopt_fused_config(model)
    architecture = get_architecture(model.config.model_type)
    state = model.state_dict() if state_dict is None else state_dict
    plain, scales = fold_state_dict(model, architecture, state)
    update_record(model, architecture)
    save(model, save_directory, is_main_process=is_main_process, state_dict=plain, **kwargs)
    folder = Path(save_directory)
    if is_main_process and folder.is_dir():
        # What an earlier save or compression left beside the weights does not belong to these weights.
        for stale in (SCALE_FILE, REFERENCE_FILE, REPORT_FILE):
            (folder / stale).unlink(missing_ok=True)
        if scales:
            save_file(scales, side_path(folder, SCALE_FILE), metadata={"format": "pt"})
        state_layer_count(folder, model.config)


@dataclass(eq=False)
class UnfoldOnLoad:
    """A `load_state_dict` pre-hook of a layer: plain weights become weights of the layer's parameterization.

    A state dict without the layer's scale is a plain one (`Trainer` resumes from such checkpoints); one with it is the
    model's own and is left alone.
    """

    architecture: Architecture

    def __call__(self, layer: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        fused = self.architecture.fused(FFNSite(-1, "", layer))
        scale_key = f"{prefix}{self.architecture.module}.scale"
        rescaling = _Rescaling(self.architecture, prefix)
        if fused is None or fused.scale is None or scale_key in state or rescaling.key("w_out", "weight") not in state:
            return
        rescaling.apply(state, fused.scale, *_exponents(fused.parameterization))
        state[scale_key] = fused.scale


def unfold_on_load(model: nn.Module, architecture: Architecture) -> None:
    """Make `load_state_dict` unfold plain weights, for the FFNs of `model` that are fused."""
    hook = UnfoldOnLoad(architecture)
    for site in architecture.sites(model):
        if architecture.fused(site) is not None:
            site.layer.register_load_state_dict_pre_hook(hook)


def restore(model: nn.Module, path: str | os.PathLike[str], optimizer: str | None = "as saved") -> None:
    """Give a model loaded from a fused checkpoint its fused FFNs back, in place, to go on training it.

    A fused checkpoint loads as an ordinary, narrower model with the scale inside its weights. This takes the scale out
    again, in the parameterization that the checkpoint was trained with. Build the optimiser after this call.

    Args:
        model: loaded from `path` with `from_pretrained`.
        path: the checkpoint's folder or hub name.
        optimizer: `"as saved"`, or an optimiser's name to change to the parameterization that suits it.

    Raises:
        InputError: the model was not fused, is restored already, or the side file is missing or does not fit it.
    """
    record = fusion_record(getattr(model, "config", None))
    if record is None:
        raise InputError(
            f"the model was not loaded from a fused checkpoint, its config has no {FUSION_KEY!r} entry: "
            f"load {path} with from_pretrained and restore that"
        )
    config: Any = model.config
    architecture = get_architecture(config.model_type)
    sites = {architecture.scale_name(site.path): site for site in architecture.sites(model)}
    if any(architecture.fused(site) is not None for site in sites.values()):
        raise InputError("the model has its fused FFNs already")
    parameterization = record["parameterization"] if optimizer == "as saved" else parameterization_for(optimizer)
    if record["parameterization"] == "folded":
        raise InputError(f"{path}: saved with its scale folded for good: it trains on as it is, nothing to restore")
    scales = _read_scales(path, sites)
    without = sorted(set(record["fused_layers"]) - {sites[name].index for name in scales})
    if without:
        raise InputError(f"{path}: {SCALE_FILE} has no scale for layer {without[0]}: it belongs to another checkpoint")
    bundles = {name: architecture.read(sites[name], config) for name in scales}
    for name, scale in scales.items():
        if scale.shape != (bundles[name].width,):
            raise InputError(
                f"{SCALE_FILE}: {name} has {scale.numel()} entries, the layer {bundles[name].width} neurons"
            )
    for name, scale in scales.items():
        unfolded = bundles[name].unfolded(scale.to(bundles[name].w_in.device).unsqueeze(0))
        architecture.install(sites[name], unfolded, parameterization)
    update_record(model, architecture)
    unfold_on_load(model, architecture)


def _read_scales(path: str | os.PathLike[str], sites: Mapping[str, FFNSite]) -> dict[str, Tensor]:
    folder, name = os.path.split(SCALE_FILE)
    try:
        file = cached_file(os.fspath(path), name, subfolder=folder)
    except OSError as error:
        if os.path.isdir(path):
            what = f"{SCALE_FILE} is missing, which fused checkpoints have"
        else:
            what = f"neither a folder here nor a fused checkpoint on the hub ({str(error).splitlines()[0]})"
        raise InputError(f"{path}: {what}: the model cannot train on as it was saved") from error
    try:
        scales = load_file(file)
    except SafetensorError as error:
        raise InputError(f"{file}: damaged or cut short: fetch it again") from error
    # A task model saved and its bare encoder loaded, or the reverse, differ in a leading `bert.` and the like.
    found: dict[str, Tensor] = {}
    for key, scale in scales.items():
        matches = [n for n in sites if n == key or n.endswith(f".{key}") or key.endswith(f".{n}")]
        if len(matches) != 1:
            raise InputError(f"{SCALE_FILE}: {key} fits no layer of the model")
        found[matches[0]] = scale
    return found
