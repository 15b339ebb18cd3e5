"""The scale of fused FFNs, on disk and in state dicts: where it lies, and how weights are folded and unfolded by it.

How a scale is stored is known here and nowhere else; `docs/reference/checkpoint-format.md` says the same in words.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import cached_file

from mlp_fusion.errors import InputError
from mlp_fusion.families import FFNSite, Kind
from mlp_fusion.modules.layouts import FLOATING
from mlp_fusion.modules.scaled_weights import exponents, power
from mlp_fusion.modules.stored import spread
from mlp_fusion.neurons import SCALE_EXPONENTS, NeuronBundle, reciprocal
from mlp_fusion.store.record import SIDE_FOLDER, side_path

SCALE_FILE = f"{SIDE_FOLDER}/scale.safetensors"


def write_scales(folder: str | os.PathLike[str], scales: Mapping[str, Tensor]) -> None:
    """Write the scales of a model's fused FFNs, by name, beside its checkpoint; without any, there is no file."""
    if not scales:
        (Path(folder) / SCALE_FILE).unlink(missing_ok=True)
        return
    stored = {name: scale.detach().to("cpu", torch.float32).contiguous() for name, scale in scales.items()}
    save_file(stored, side_path(folder, SCALE_FILE), metadata={"format": "pt"})


def read_scales(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The scales beside the checkpoint at `path`, a folder or a hub name, by the names of the model that was saved.

    Raises:
        InputError: there are none, or they are damaged.
    """
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


def read_scale_file(file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The scales in a side file, by the names of the model that was saved.

    Raises:
        InputError: it is damaged.
    """
    try:
        scales: dict[str, Tensor] = load_file(file)
    except SafetensorError as error:
        raise InputError(f"{file}: damaged or cut short: fetch it again") from error
    return scales


def is_sound(scale: Tensor) -> bool:
    """Whether weights can be multiplied with `scale` and divided by it again, in float32."""
    if scale.dtype not in FLOATING:
        return False
    narrow = scale.float()
    whole = torch.isfinite(narrow) & torch.isfinite(reciprocal(narrow)) & ((narrow != 0) == (scale != 0))
    return bool(whole.all())


def matched_scales(scales: Mapping[str, Tensor], sites: Mapping[str, FFNSite]) -> dict[str, Tensor]:
    """The scales by the names that a model has for them.

    Raises:
        InputError: one fits no FFN of the model.
    """
    # A task model saved and its bare encoder loaded, or the reverse, differ in a leading `bert.` and the like.
    found: dict[str, Tensor] = {}
    for key, scale in scales.items():
        matches = [key] if key in sites else [n for n in sites if n.endswith(f".{key}") or key.endswith(f".{n}")]
        if len(matches) != 1 or matches[0] in found:
            raise InputError(f"{SCALE_FILE}: {key} fits no layer of the model: load the class that was saved")
        found[matches[0]] = scale
    return found


def check_scales(
    found: Sequence[tuple[FFNSite, Tensor, NeuronBundle]], fused: Sequence[int], parameterization: str
) -> None:
    """Raise InputError unless there is a sound scale for each fused layer, and none for others.

    Args:
        found: places with their scales and bundles.
        fused: layers that the checkpoint's record calls fused.
        parameterization: that the scales are to be used in.
    """
    present = {site.index for site, _, _ in found}
    without, beyond = sorted(set(fused) - present), sorted(present - set(fused))
    if without:
        raise InputError(f"{SCALE_FILE} has no scale for layer {without[0]}: it belongs to another checkpoint")
    if beyond:
        raise InputError(f"{SCALE_FILE} has a scale for layer {beyond[0]}, which is not fused: it is of another one")
    for site, scale, bundle in found:
        layer = site.index
        shape = (bundle.batch, bundle.width) if site.kind.experts else (bundle.width,)
        if scale.shape != shape:
            raise InputError(
                f"{SCALE_FILE}: layer {layer} has {scale.numel()} entries, the layer {math.prod(shape)} neurons"
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
        silent = (scale == 0).to(bundle.w_out.device).reshape(bundle.w_out.shape[:2])
        if bool((bundle.w_out[silent] != 0).any()):
            raise InputError(
                f"{SCALE_FILE}: the scale of layer {layer} is 0 for neurons that have an output: it is of another "
                "checkpoint, or damaged"
            )


@dataclass(frozen=True)
class Rescaling:
    """Multiplies one FFN's tensors in a state dict by powers of its scale, each tensor by itself.

    Attributes:
        kind: of the FFN.
        prefix: of the FFN's keys in the state dict, with its dot.
        before, after: exponents of the scale on the input projections (with their biases) and on the output projection.
    """

    kind: Kind
    prefix: str
    before: float
    after: float

    @staticmethod
    def to_own(kind: Kind, prefix: str, parameterization: str) -> Rescaling:
        """From plain (folded) weights to those of `parameterization`."""
        a = SCALE_EXPONENTS[parameterization]
        return Rescaling(kind, prefix, a, a - 1.0)

    @staticmethod
    def to_plain(kind: Kind, prefix: str, parameterization: str) -> Rescaling:
        """From weights of `parameterization` to plain ones."""
        a = SCALE_EXPONENTS[parameterization]
        return Rescaling(kind, prefix, -a, 1.0 - a)

    @property
    def weights(self) -> list[str]:
        """The keys of the projections, without biases."""
        return list(dict.fromkeys(f"{self.prefix}{p.parameter}" for p in self.kind.projections))

    def rescaled(self) -> dict[str, float]:
        """The keys that the scale stands in, each with its exponent."""
        found = exponents(self.kind.projections, self.before, self.after)
        return {f"{self.prefix}{name}": exponent for name, exponent in found.items()}

    def check(self, state: Mapping[str, Tensor], scale: Tensor) -> None:
        """Raise what :meth:`apply` would, of all of the tensors, before one is exchanged."""
        check_whole("the scale", scale)
        for key in self.rescaled():
            if key in state:
                tensor = state[key]
                check_whole(key, tensor)
                self._factor(key, tensor, scale)

    def _factor(self, key: str, tensor: Tensor, scale: Tensor) -> Tensor:
        """The scale, as it is multiplied with a tensor."""
        try:
            factor = spread(scale, self.kind.projections, key[len(self.prefix) :], tensor)
            fits = torch.broadcast_shapes(factor.shape, tensor.shape) == tensor.shape
        except (RuntimeError, IndexError):
            fits = False
        if not fits:
            raise InputError(
                f"{key} has shape {tuple(tensor.shape)}, the model's FFN has {scale.shape[-1]} neurons: it belongs "
                "to another model"
            )
        return factor

    def apply(self, state: dict[str, Tensor], scale: Tensor) -> None:
        """Rescale what there is in `state`; its tensors are exchanged, not written to.

        Raises:
            InputError: a tensor is sharded, quantised, not in memory, or of another number of neurons than the scale.
        """
        self.check(state, scale)
        for key, exponent in self.rescaled().items():
            if key in state:
                tensor = state[key]
                wide = scale.to(tensor.device, torch.promote_types(scale.dtype, torch.float32))
                state[key] = (tensor * self._factor(key, tensor, power(wide, exponent))).to(tensor.dtype)


def check_whole(key: str, tensor: Tensor) -> None:
    """Raise InputError unless `tensor` is an ordinary one, in memory, of a floating type that can be multiplied."""
    if type(tensor) not in (Tensor, nn.Parameter):
        raise InputError(f"{key} is a {type(tensor).__name__}: pass state_dict= with full tensors")
    if tensor.is_meta:
        raise InputError(f"{key} is on the meta device: load or bring back the weights first")
    if tensor.dtype not in FLOATING:
        raise InputError(f"{key} is {tensor.dtype}, quantised after the fusion: save the unquantised model")
