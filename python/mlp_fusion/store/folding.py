"""From the fused model in memory (explicit scale) to the plain checkpoint on disk (scale inside the weights).

`save_pretrained` of a model with fused FFNs writes folded weights, so that any program loads them, and the scale in a
side file. The way back is in `states` (into a fused model) and in `restoring` (a plain model becomes fused again).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mlp_fusion.errors import InputError
from mlp_fusion.families import Architecture
from mlp_fusion.modules import Scaled
from mlp_fusion.store.record import REFERENCE_FILE, REPORT_FILE, architecture_of, update_record
from mlp_fusion.store.scale import Rescaling, check_whole, write_scales


def fold_state_dict(
    model: nn.Module, architecture: Architecture, state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a fused model's state dict into a plain one with folded weights, and the scales.

    Weights that accelerate has offloaded are brought back for it, one FFN at a time.

    Returns:
        `(plain, scales)`; the tensors of `state` are not changed.

    Raises:
        InputError: a fused FFN's tensors are not in `state` under the model's own names, or are sharded, quantised, or
            nowhere to be had; or `model` is a part of a model that was fused, and does not show where its FFNs are.
    """
    plain = dict(state)
    scales: dict[str, Tensor] = {}
    sites = architecture.sites(model)
    if not sites and any(isinstance(module, Scaled) and module.scale is not None for module in model.modules()):
        raise InputError(
            f"{type(model).__name__} is a part of a fused model, in which FFNs have other names: save the whole model"
        )
    for site in sites:
        fused = architecture.fused(site)
        if fused is None or fused.scale is None:
            continue
        folding = Rescaling.to_plain(site.kind, f"{site.path}.", fused.parameterization)
        name, weights = f"{site.path}.{site.kind.scale}", folding.weights
        for key in (name, *weights):
            if key not in plain:
                raise _absent(key, plain)
        for key in (name, *weights, *folding.rescaled()):
            if key in plain and plain[key].is_meta:
                plain[key] = brought_back(model, key)
        for key in (name, *weights):
            check_whole(key, plain[key])
        scales[name] = plain.pop(name)
        folding.apply(plain, scales[name])
    for name, module in model.named_modules():
        if isinstance(module, Scaled) and module.scale is not None and f"{name}.scale" in plain:
            raise InputError(
                f"{name} holds a scale, which no plain checkpoint has, where the model has no FFN to fold it into: "
                "call its merge_scale() before saving"
            )
    return plain, scales


def _absent(key: str, state: Mapping[str, Tensor]) -> InputError:
    """What to say of a tensor that a fused FFN has to have."""
    path, _, name = key.rpartition(".")
    if f"{path}.{name}_orig" in state or any(other.startswith(f"{path}.parametrizations.{name}.") for other in state):
        remedy = "torch.nn.utils computes it of other tensors: make it permanent first (prune.remove, or "
        return InputError(f"{key} is not in the state dict: {remedy}parametrize.remove_parametrizations)")
    return InputError(
        f"{key} is not in the state dict: merge adapters first, and pass a state dict with the model's own names"
    )


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

    Where transformers itself has put adapters into the model (`add_adapter`), it writes these alone: there is nothing
    to fold, and no scale to keep.

    Raises:
        InputError: see :func:`fold_state_dict`; or `push_to_hub`, which would leave the side file behind.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        more = {**kwargs, "state_dict": state_dict, "push_to_hub": push_to_hub}
        save(model, save_directory, is_main_process=is_main_process, **more)
        return
    if push_to_hub:
        raise InputError("save_pretrained(push_to_hub=True) would leave the scale behind: use model.push_to_hub(name)")
    architecture = architecture_of(model.config)
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
        for stale in (REFERENCE_FILE, REPORT_FILE):
            (folder / stale).unlink(missing_ok=True)
        write_scales(folder, scales)
