"""State dicts going into a fused model: which form they are in is known, or they are refused.

The weights of a fused FFN exist in two forms of one name and shape: the model's *own*, beside its scale, and *plain*
ones with the scale inside, as every saved checkpoint has them. Which one a state dict holds cannot be read off its
keys: a plain checkpoint, `dict(model.named_parameters())`, an average of weights and one shard of a checkpoint look
alike. So:

- a state with an FFN's `scale` is the model's own, for that FFN;
- what `Trainer` and `load_sharded_checkpoint` read from a folder that `save_pretrained` wrote is plain, because the
  folder's config says so;
- :func:`state_form` says it in all other cases;
- anything else is an error before a weight is loaded, unless the form makes no difference.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor, nn

from mlp_fusion.errors import InputError
from mlp_fusion.families import Architecture, Kind
from mlp_fusion.modules import Scaled
from mlp_fusion.store.record import FUSION_KEY, known_architecture
from mlp_fusion.store.scale import SCALE_FILE, Rescaling, is_sound, read_scale_file

Form = Literal["own", "plain"]

#: What optimisers' states in a checkpoint of `Trainer` are called, of its own and of DeepSpeed.
_MOMENTS = ("optimizer", "global_step")
_announced: ContextVar[Form | None] = ContextVar("mlp_fusion_state_form", default=None)
#: The scales that a folder's plain weights were folded with, by the names of its model.
_scales: ContextVar[Mapping[str, Tensor]] = ContextVar("mlp_fusion_scales", default={})  # noqa: B039 - never written to


@contextmanager
def state_form(form: Form) -> Iterator[None]:
    """Inside, `load_state_dict` takes a state without the `scale` of a fused FFN for what `form` says it is.

    Args:
        form: `"plain"` for tensors of a checkpoint that `save_pretrained` or `compress` wrote: each one is rescaled to
            the model's parameterization, whichever others come with it. `"own"` for tensors of the model itself, such
            as `dict(model.named_parameters())` or an average of them: they are loaded as they are.

    Raises:
        InputError: another form.

    Examples:
        >>> import safetensors.torch
        >>> from transformers import AutoModel
        >>> model = AutoModel.from_pretrained("all-MiniLM-L6-v2")
        >>> _ = mlp_fusion.fuse(model, width=0.25)
        >>> model.save_pretrained("fused")
        >>> with mlp_fusion.state_form("plain"):
        ...     model.load_state_dict(safetensors.torch.load_file("fused/model.safetensors"), strict=False)
        <All keys matched successfully>
    """
    if form not in get_args(Form):
        raise InputError(f"state_form {form!r}: use plain (a saved checkpoint's tensors) or own (the model's)")
    token = _announced.set(form)
    try:
        yield
    finally:
        _announced.reset(token)


def form_of_folder(folder: str | os.PathLike[str]) -> AbstractContextManager[None]:
    """The context in which the weights of `folder` are loaded: plain ones, where its config has a fusion's record.

    A scale that was trained, and lies beside them, comes back with them.

    Raises:
        InputError: the scales beside the weights cannot be read.
    """
    place = Path(folder)
    place = place.parent if place.is_file() else place
    try:
        config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return nullcontext()
    known = isinstance(config, dict) and config.get(FUSION_KEY)
    return _plain_folder(place / SCALE_FILE) if known else nullcontext()


def check_resumed(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Raise InputError where an optimiser's moments in `folder` are of another form's weights than the model's."""
    place = Path(folder)
    if not any(path.name.startswith(_MOMENTS) for path in place.glob("*")):
        return
    try:
        record = json.loads((place / "config.json").read_text(encoding="utf-8")).get(FUSION_KEY)
    except (OSError, ValueError):
        return
    if not isinstance(record, dict):
        return
    scaled = (module for module in model.modules() if isinstance(module, Scaled) and module.scale is not None)
    found = {module.parameterization for module in scaled} or {"folded"}
    trained = record.get("parameterization") if (place / SCALE_FILE).is_file() else "folded"
    if found != {trained}:
        raise InputError(
            f"{place} was trained in the form {trained}, the model is {' and '.join(sorted(found))}: load that "
            f"checkpoint with from_pretrained, and call mlp_fusion.restore(model, {str(place)!r}), before training "
            "goes on"
        )


@contextmanager
def _plain_folder(file: Path) -> Iterator[None]:
    token = _scales.set(read_scale_file(file) if file.is_file() else {})
    try:
        with state_form("plain"):
            yield
    finally:
        _scales.reset(token)


def _scale_for(key: str, fused: Scaled) -> Tensor:
    """The scale that plain weights are taken apart with: the one they were folded with, if it is known and fits."""
    assert fused.scale is not None
    saved = _scales.get().get(key)
    fits = saved is not None and saved.shape == fused.scale.shape and is_sound(saved)
    return saved.to(fused.scale) if fits and saved is not None else fused.scale.detach()


@dataclass(eq=False)
class StateForm:
    """A `load_state_dict` pre-hook of a module with a fused FFN: plain weights become weights of its parameterization.

    Raises (when called):
        InputError: the form is not known, or a tensor does not fit the module.
    """

    kind: Kind

    def __call__(self, module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        form = check_form(self.kind, module, state, prefix)
        fused = _holder(self.kind, module)
        if form == "plain" and fused is not None and fused.scale is not None:
            key = f"{prefix}{self.kind.scale}"
            scale = _scale_for(key, fused)
            Rescaling.to_own(self.kind, prefix, fused.parameterization).apply(state, scale)
            state[key] = scale


def _holder(kind: Kind, module: nn.Module) -> Scaled | None:
    found = module.get_submodule(kind.holder)
    return found if isinstance(found, Scaled) else None


def check_form(kind: Kind, module: nn.Module, state: Mapping[str, Tensor], prefix: str) -> Form:
    """The form in which `state` holds the FFN of `module`, whose keys begin with `prefix`.

    Raises:
        InputError: it is not known, or `state` has a scale for which the module has no place.
    """
    key = f"{prefix}{kind.scale}"
    fused = _holder(kind, module)
    if fused is None or fused.scale is None:
        if key in state:
            raise dropped_scale([key])
        return "own"
    announced = _announced.get()
    if key in state:
        if announced == "plain":
            raise InputError(f"the state is said to be plain, but holds {key}: it is a fused model's own")
        return "own"
    rescaling = Rescaling.to_own(kind, prefix, fused.parameterization)
    if announced is not None:
        if not any(f"{prefix}{name}" in state for name in kind.parameters):
            return "own"
        if announced == "plain":
            rescaling.check(state, fused.scale.detach())
        return announced
    undecided = [name for name in rescaling.rescaled() if name in state]
    if undecided:
        raise InputError(
            f"{undecided[0]} comes without {key}, so that it may be a plain checkpoint's or the fused model's own: "
            "load it inside \"with mlp_fusion.state_form('plain')\" or \"with mlp_fusion.state_form('own')\""
        )
    return "own"


def check_forms(model: Any, state: Mapping[str, Tensor], prefix: str) -> None:
    """Raise what loading `state` into `model` would raise of its FFNs, before anything is loaded."""
    inside = (key[len(prefix) :] for key in state if key.startswith(prefix) and key.endswith(".scale"))
    check_unexpected(model, inside)
    config = getattr(model, "config", None)
    architecture = None if getattr(config, FUSION_KEY, None) is None else known_architecture(config)
    if architecture is not None and any(architecture.locate(key) for key in state):
        sites = architecture.sites(model)
        for site in sites:
            check_form(site.kind, site.module, state, f"{prefix}{site.path}.")
        record = getattr(config, FUSION_KEY, None)
        folded = not isinstance(record, Mapping) or record.get("parameterization") == "folded"
        if _announced.get() == "own" and not folded and sites and not any(architecture.fused(site) for site in sites):
            raise InputError(
                "the state is said to be a fused model's own, and this model is a plain one: restore it first"
            )


def check_unexpected(model: nn.Module, keys: Iterable[str]) -> None:
    """Raise InputError if a fused FFN's scale is among keys, of a state of `model`, that have no place in it.

    That is the scale of a module that is there, and has none.
    """
    modules = dict(model.named_modules())
    lost = []
    for key in keys:
        path, _, name = key.rpartition(".")
        if name == "scale" and path in modules and not hasattr(modules[path], "scale"):
            lost.append(key)
    if lost:
        raise dropped_scale(sorted(lost))


def check_given_state(config: Any) -> None:
    """Raise InputError if `from_pretrained(..., state_dict=...)` cannot know the form of what it was given."""
    record = getattr(config, FUSION_KEY, None)
    if isinstance(record, Mapping) and record.get("parameterization") != "folded" and _announced.get() != "plain":
        raise InputError(
            "state_dict= of a fused model may be plain or the model's own, of which the latter wants its scale: save "
            "with save_pretrained and load that, or say \"with mlp_fusion.state_form('plain')\""
        )


def dropped_scale(keys: list[str]) -> InputError:
    """The error for a scale that would be lost."""
    return InputError(
        f"{keys[0]} is the scale of a fused FFN, and the model has no place for it: its outputs would be wrong; save "
        "with model.save_pretrained, or fuse (or restore) the model before loading this state"
    )


def has_forms(model: nn.Module) -> bool:
    """Whether `model` holds fused FFNs whose own weights are not the plain ones."""
    return any(isinstance(module, Scaled) and module.scale is not None for module in model.modules())


def as_own(model: nn.Module, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """`state` as `load_state_dict` of `model` would load it, for what does not go through it; a copy if it changes."""
    changed = dict(state)
    for name, module in model.named_modules():
        for hook in module._load_state_dict_pre_hooks.values():
            form = getattr(hook, "hook", None)
            if isinstance(form, StateForm):
                form(module, changed, f"{name}.")
    return changed if has_forms(model) else state


@dataclass(eq=False)
class PartForm:
    """The same for a module below the layer, when it is loaded by itself.

    Attributes:
        form: the layer's hook.
        layer: the layer.
        path: from the layer to the module.
    """

    form: StateForm
    layer: nn.Module
    path: str

    def __call__(self, module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        inside, own = f"{self.path}.", prefix
        if own and (own.endswith(inside) or inside.endswith(own)):
            return  # the load began at the layer, above it, or at a module in between, which has seen to it
        found = {f"{inside}{key[len(prefix) :]}": key for key in list(state) if key.startswith(prefix)}
        view = {name: state[key] for name, key in found.items()}
        self.form(self.layer, view, "")
        state.update({found[name]: tensor for name, tensor in view.items() if name in found})
        scale = self.form.kind.scale
        if scale in view and scale not in found and scale.startswith(inside):
            state[f"{prefix}{scale[len(inside) :]}"] = view[scale]


def know_forms(model: nn.Module, architecture: Architecture) -> None:
    """Make `load_state_dict` know the form of what it is given, for the FFNs of `model` that are fused."""
    for site in architecture.sites(model):
        if architecture.fused(site) is None:
            continue
        hook = StateForm(site.kind)
        root = site.module
        root.register_load_state_dict_pre_hook(hook)
        paths: set[str] = set()
        for name in (site.kind.scale, *site.kind.parameters):
            parts = name.split(".")[:-1]
            paths.update(".".join(parts[: i + 1]) for i in range(len(parts)))
        for path in sorted(paths):
            root.get_submodule(path).register_load_state_dict_pre_hook(PartForm(hook, root, path))
