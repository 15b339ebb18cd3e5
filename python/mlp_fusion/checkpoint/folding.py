"""Between the fused model in memory (explicit scale) and the plain checkpoint on disk (scale inside the weights).

`save_pretrained` of a fused model writes folded weights, so that any program loads them, and the scale in a side
file; `load_state_dict` of a fused model takes plain weights as well as its own; `restore` rebuilds the fused model from
a plain one and the side file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import cached_file

from mlp_fusion.architectures import Architecture, FFNSite, get_architecture
from mlp_fusion.checkpoint.metadata import FUSION_KEY, SCALE_FILE, fusion_record, side_path
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


def fold_state_dict(model: nn.Module, architecture: Architecture, state: Mapping[str, Tensor]) -> tuple[dict, dict]:
    """Split a fused model's state dict into a plain one with folded weights, and the scales.

    Returns:
        `(plain, scales)`; the tensors of `state` are not changed.
    """
    plain = dict(state)
    scales: dict[str, Tensor] = {}
    for site in architecture.sites(model):
        fused = architecture.fused(site)
        name = architecture.scale_name(site.path)
        if fused is None or name not in plain:
            continue
        scale = plain.pop(name)
        scales[name] = scale.detach().to("cpu", torch.float32).contiguous()
        before, after = _exponents(fused.parameterization)
        _Rescaling(architecture, f"{site.path}.").apply(plain, scale, -before, -after)
    return plain, scales


@dataclass(eq=False)
class FoldingSave:
    """`save_pretrained` of a fused model: the host class's own, given folded weights, plus the side file.

    An instance stands in the model's `__dict__`, so that every caller (a training loop, `Trainer`, `push_to_hub`) gets
    it. It is an object rather than a bound function so that the model still copies and pickles.
    """

    model: Any
    architecture: Architecture

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a plain checkpoint; arguments as in `transformers.PreTrainedModel.save_pretrained`."""
        state = self.model.state_dict() if state_dict is None else state_dict
        plain, scales = fold_state_dict(self.model, self.architecture, state)
        if is_main_process and scales:
            save_file(scales, side_path(save_directory, SCALE_FILE), metadata={"format": "pt"})
        save = type(self.model).save_pretrained
        save(self.model, save_directory, is_main_process=is_main_process, state_dict=plain, **kwargs)


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


def attach(model: nn.Module, architecture: Architecture) -> None:
    """Make saving fold and loading unfold, for the FFNs of `model` that are fused."""
    model.__dict__["save_pretrained"] = FoldingSave(model, architecture)
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
        raise InputError(f"{path}: not a fused checkpoint: config.json has no {FUSION_KEY!r} entry")
    config: Any = model.config
    architecture = get_architecture(config.model_type)
    sites = {architecture.scale_name(site.path): site for site in architecture.sites(model)}
    if any(architecture.fused(site) is not None for site in sites.values()):
        raise InputError("the model has its fused FFNs already")
    parameterization = record["parameterization"] if optimizer == "as saved" else parameterization_for(optimizer)
    scales = _read_scales(path, sites)
    for name, scale in scales.items():
        bundle = architecture.read(sites[name], config)
        if scale.shape != (bundle.width,):
            raise InputError(f"{SCALE_FILE}: {name} has {scale.numel()} entries, the layer {bundle.width} neurons")
    for name, scale in scales.items():
        bundle = architecture.read(sites[name], config)
        unfolded = bundle.unfolded(scale.to(bundle.w_in.device).unsqueeze(0))
        architecture.install(sites[name], unfolded, parameterization)
    config.__dict__[FUSION_KEY] = {**record, "parameterization": parameterization}
    attach(model, architecture)


def _read_scales(path: str | os.PathLike[str], sites: Mapping[str, FFNSite]) -> dict[str, Tensor]:
    folder, name = os.path.split(SCALE_FILE)
    try:
        file = cached_file(os.fspath(path), name, subfolder=folder)
    except OSError as error:
        raise InputError(f"{path}: {SCALE_FILE} is missing: the checkpoint cannot be trained on as before") from error
    scales = load_file(Path(file))
    # A task model saved and its bare encoder loaded, or the reverse, differ in a leading `bert.` and the like.
    found: dict[str, Tensor] = {}
    for key, scale in scales.items():
        matches = [n for n in sites if n == key or n.endswith(f".{key}") or key.endswith(f".{n}")]
        if len(matches) != 1:
            raise InputError(f"{SCALE_FILE}: {key} fits no layer of the model")
        found[matches[0]] = scale
    return found
