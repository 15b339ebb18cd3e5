"""From the fused model in memory (explicit scale) to the plain checkpoint on disk (scale inside the weights).

`save_pretrained` of a model with fused FFNs writes folded weights, so that any program loads them, and the scale in a
side file. The way back is in `states` (into a fused model) and in `restoring` (a plain model becomes fused again).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mlp_fusion.errors import InputError
from mlp_fusion.families import Architecture, get_architecture
from mlp_fusion.modules.layouts import FLOATING
from mlp_fusion.neurons import SCALE_EXPONENTS, reciprocal, scale_power
from mlp_fusion.store.record import (
    REFERENCE_FILE,
    REPORT_FILE,
    SCALE_FILE,
    adopt_fused_config,
    side_path,
    state_layer_count,
    update_record,
)


@dataclass(frozen=True)
class Rescaling:
    """Multiplies one FFN's tensors in a state dict by powers of its scale, each tensor by itself.

    Attributes:
        architecture: the family's entry.
        prefix: of the layer's keys in the state dict, with its dot.
        before, after: exponents of the scale on the input projections (with their biases) and on the output projection.
    """

    architecture: Architecture
    prefix: str
    before: float
    after: float

    @staticmethod
    def to_own(architecture: Architecture, prefix: str, parameterization: str) -> Rescaling:
        """From plain (folded) weights to those of `parameterization`."""
        a = SCALE_EXPONENTS[parameterization]
        return Rescaling(architecture, prefix, a, a - 1.0)

    @staticmethod
    def to_plain(architecture: Architecture, prefix: str, parameterization: str) -> Rescaling:
        """From weights of `parameterization` to plain ones."""
        a = SCALE_EXPONENTS[parameterization]
        return Rescaling(architecture, prefix, -a, 1.0 - a)

    def key(self, role: str, kind: str) -> str:
        """The key of a projection's `weight` or `bias`."""
        return f"{self.prefix}{self.architecture.projections[role]}.{kind}"

    def rescaled(self) -> dict[str, tuple[float, int]]:
        """The keys that the scale stands in, each with its exponent and the axis along which the neurons lie."""
        found = {}
        for role in self.architecture.projections:
            exponent = self.after if role == "w_out" else self.before
            if exponent == 0.0:
                continue
            # Neurons lie along the outputs of input projections and the inputs of the output projection, in rows of an
            # (out, in) weight and columns of a transposed one respectively.
            found[self.key(role, "weight")] = exponent, int((role == "w_out") != self.architecture.transposed)
            if role != "w_out":
                found[self.key(role, "bias")] = exponent, 0
        return found

    def check(self, state: Mapping[str, Tensor], scale: Tensor) -> None:
        """Raise what :meth:`apply` would, of all of the tensors, before one is exchanged."""
        check_whole("the scale", scale)
        for key, (_, axis) in self.rescaled().items():
            if key in state:
                tensor = state[key]
                check_whole(key, tensor)
                if tensor.ndim <= axis or tensor.shape[axis] != len(scale):
                    raise InputError(
                        f"{key} has shape {tuple(tensor.shape)}, the model's FFN has {len(scale)} neurons: it belongs "
                        "to another model"
                    )

    def apply(self, state: dict[str, Tensor], scale: Tensor) -> None:
        """Rescale what there is in `state`; its tensors are exchanged, not written to.

        Raises:
            InputError: a tensor is sharded, quantised, not in memory, or of another number of neurons than the scale.
        """
        self.check(state, scale)
        for key, (exponent, axis) in self.rescaled().items():
            if key in state:
                tensor = state[key]
                wide = scale.to(tensor.device, torch.promote_types(scale.dtype, torch.float32))
                # A scale that is trained may be of any sign: only the powers of the split form, which cannot have such
                # a one, take its size.
                factor = {1.0: wide, -1.0: reciprocal(wide)}.get(exponent)
                factor = scale_power(wide, exponent) if factor is None else factor
                shape = [-1 if i == axis else 1 for i in range(tensor.ndim)]
                state[key] = (tensor * factor.reshape(shape)).to(tensor.dtype)


def check_whole(key: str, tensor: Tensor) -> None:
    """Raise InputError unless `tensor` is an ordinary one, in memory, of a floating type that can be multiplied."""
    if type(tensor) not in (Tensor, nn.Parameter):
        raise InputError(f"{key} is a {type(tensor).__name__}: pass state_dict= with full tensors")
    if tensor.is_meta:
        raise InputError(f"{key} is on the meta device: load or bring back the weights first")
    if tensor.dtype not in FLOATING:
        raise InputError(f"{key} is {tensor.dtype}, quantised after the fusion: save the unquantised model")


def fold_state_dict(
    model: nn.Module, architecture: Architecture, state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a fused model's state dict into a plain one with folded weights, and the scales.

    Weights that accelerate has offloaded are brought back for it, one FFN at a time.

    Returns:
        `(plain, scales)`; the tensors of `state` are not changed.

    Raises:
        InputError: a fused FFN's tensors are not in `state` under the model's own names, or are sharded, quantised, or
            nowhere to be had.
    """
    plain = dict(state)
    scales: dict[str, Tensor] = {}
    for site in architecture.sites(model):
        fused = architecture.fused(site)
        if fused is None or fused.scale is None:
            continue
        folding = Rescaling.to_plain(architecture, f"{site.path}.", fused.parameterization)
        name = architecture.scale_name(site.path)
        weights = [folding.key(role, "weight") for role in architecture.projections]
        for key in (name, *weights):
            if key not in plain:
                raise InputError(
                    f"{key} is not in the state dict: merge adapters first, and pass a state dict with the model's "
                    "own names"
                )
        for key in (name, *weights, *folding.rescaled()):
            if key in plain and plain[key].is_meta:
                plain[key] = brought_back(model, key)
        for key in (name, *weights):
            check_whole(key, plain[key])
        scale = plain.pop(name)
        scales[name] = scale.detach().to("cpu", torch.float32).contiguous()
        folding.apply(plain, scale)
    return plain, scales


def brought_back(model: nn.Module, key: str) -> Tensor:
    """A copy of the tensor called `key`, on the CPU, from wherever accelerate has offloaded it to.

    Raises:
        InputError: no hook of accelerate knows where it is.
    """
    path, _, name = key.rpartition(".")
    module = model.get_submodule(path)
    if hasattr(module, "_hf_hook"):
        from accelerate.utils import align_module_device

        with align_module_device(module, "cpu"):
            found = module.state_dict()[name]
            if not found.is_meta:
                return found.clone()
    raise InputError(f"{key} is on the meta device, and nothing says where its values are: load the model into memory")


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
    # Where transformers does not know of an offloading it would write nothing for the rest of the weights.
    if not hasattr(model, "hf_device_map"):
        plain = {key: brought_back(model, key) if tensor.is_meta else tensor for key, tensor in plain.items()}
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
