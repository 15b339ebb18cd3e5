"""Whether a checkpoint holds what its config says, and no FFN beyond what was proved."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlp_fusion.errors import InputError
from mlp_fusion.families import Architecture, FFNSite, building
from mlp_fusion.store.disk import DiskFFN, disk_ffns, dropped_ffns, unknown_strays
from mlp_fusion.store.naming import Conversion, places
from mlp_fusion.store.quantised import plain_names, quantisation, unpacked
from mlp_fusion.store.record import architecture_of
from mlp_fusion.store.source import Headers, read_headers
from mlp_fusion.store.weights import TensorInfo

#: Parts of a tensor's name that speak of a feed-forward layer, in the families that transformers knows.
_FFN_WORDS = re.compile(
    r"mlp|ffn|ffw|ff|feed_?forward|intermediate|experts?|shared_expert|fc_?\d?|c_fc|lin\d|w[123]|w[io](_\d)?"
    r"|(gate|up|down|gate_up)_proj|dense_h_to_4h|dense_4h_to_h|wide|ff_?out"
)
_ATTENTION_WORDS = re.compile(r"attn|attention|self_attn|self_attention|crossattention")


def meta_model(config: Any) -> Any:
    """The model that a checkpoint with `config` is loaded into, on the meta device.

    Raises:
        InputError: transformers builds none.
    """
    with building.undisturbed():
        try:
            return building.build(building.model_class(config), config)
        except Exception as error:
            raise InputError(f"{config.model_type}: transformers builds no model from this config: {error}") from error


def ffn_tensors(config: Any, names: Iterable[str]) -> set[str]:
    """Those of the tensors of a checkpoint, by their names on disk, that belong to FFNs."""
    architecture = architecture_of(config)
    placed = places(meta_model(config), names)
    return {name for name, place in placed.items() if architecture.locate(place.parameter) is not None}


def claimed_tensors(
    headers: Headers, model: Any, architecture: Architecture, sites: Sequence[FFNSite]
) -> dict[str, list[TensorInfo]]:
    """Parameter of an FFN -> the tensors on disk that it consists of.

    Raises:
        InputError: one is missing, quantised, or of another shape than the config says.
    """
    placed = places(model, headers.tensors)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    held: dict[str, list[TensorInfo]] = {}
    for name, place in placed.items():
        info = headers.tensors[name]
        found = architecture.locate(place.parameter)
        if found is not None:
            if not info.floating and len(info.shape) > 1 and quantisation(headers.config) is None:
                raise InputError(
                    f"{headers.name}: {name} is stored as {info.dtype}: start from the unquantised checkpoint"
                )
            if not place.converted and info.shape != shapes[place.parameter]:
                raise InputError(
                    f"{headers.name}: {name} is {info.shape}, but config.json makes it {shapes[place.parameter]}"
                )
        held.setdefault(place.parameter, []).append(info)
    # One tensor may become several parameters, of which only the first is known.
    if not any(place.converted for place in placed.values()):
        _refuse_gaps(headers, model, held)
    for site in sites:
        for name in site.kind.parameters:
            held.setdefault(f"{site.path}.{name}", [])
    return held


def _refuse_gaps(headers: Headers, model: Any, held: Mapping[str, Sequence[TensorInfo]]) -> None:
    """Raise InputError where a parameter is not on disk; heads and poolers may be drawn anew."""
    lost = gap(model, held)
    if lost is not None:
        raise InputError(f"{headers.name}: {lost} is missing: the checkpoint is incomplete")


def gap(model: Any, held: Container[str]) -> str | None:
    """A parameter of a model that is none of those `held`, but for heads and poolers, which may be drawn anew."""
    base = model.base_model
    prefix = "" if base is model else f"{model.base_model_prefix}."
    ignored = [re.compile(words) for words in model._keys_to_ignore_on_load_missing or ()]
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    for name, _ in base.named_parameters():
        full = f"{prefix}{name}"
        known = full in held or full in tied or name.startswith("pooler.")
        if not known and not any(words.search(full) for words in ignored):
            return full
    return None


def stored_buffers(headers: Headers, model: Any) -> set[str]:
    """Names on disk of a model's buffers."""
    buffers = {name for name, _ in model.named_buffers()}
    return {name for name, place in places(model, headers.tensors).items() if place.parameter in buffers}


def check_written(folder: Path) -> None:
    """Raise InputError unless the weights in a fused checkpoint have the shapes that its config says."""
    headers = read_headers(folder)
    model, architecture = meta_model(headers.config), architecture_of(headers.config)
    sites = architecture.sites(model)
    claimed_tensors(headers, model, architecture, sites)
    dropped_layers(headers, model, architecture, sites)


def dropped_layers(headers: Headers, model: Any, architecture: Architecture, sites: Sequence[FFNSite]) -> list[DiskFFN]:
    """FFNs on disk that transformers does not load, of layers for multi-token prediction: engines load them.

    Raises:
        InputError: a tensor looks like part of an FFN and is neither one of the model's nor of such a layer.
    """
    shapes = plain_shapes(headers)
    conversion = Conversion(model)
    strays = [
        n for n, shape in shapes.items() if len(shape) > 1 and looks_like_ffn(n) and conversion.place(n) is None
    ]  # fmt: skip
    if not strays:
        return []
    placed = {name for name in shapes if conversion.place(name) is not None}
    _refuse_wrapped(headers, architecture, strays, placed)
    found: list[DiskFFN] = []
    if any(architecture.locate(place[0]) for name in placed if (place := conversion.place(name)) is not None):
        ffns = disk_ffns(model, architecture, sites, shapes)
        found = dropped_ffns(model, ffns, shapes)
        strays = sorted(set(unknown_strays(model, [*ffns, *found], shapes)) & set(strays))
    if strays:
        raise InputError(
            f"{headers.name}: {strays[0]} looks like part of an FFN, but the {architecture.model_type!r} model of "
            f"config.json has no place for it ({len(strays)} such tensors), and it is like none that has: this model "
            "is not supported (what transformers drops can be taken out of the checkpoint)"
        )
    return found


def plain_shapes(headers: Headers) -> dict[str, tuple[int, ...]]:
    """Shapes of a checkpoint's tensors by their unquantised names, as they are when nothing is quantised."""
    names = plain_names(headers.config, headers.tensors)
    held = {plain: headers.tensors[name].shape for name, plain in names.items()}
    held |= {name: headers.tensors[name].shape for name, plain in names.items() if name == plain}
    packed = {name: plain for name, plain in names.items() if name == f"{plain}_blocks"}
    return held | {plain: unpacked(headers.tensors[name].shape) for name, plain in packed.items()}


def parameters(headers: Headers, model: Any) -> int:
    """How many parameters a checkpoint holds: its buffers and what quantised values are multiplied with are none."""
    buffers = stored_buffers(headers, model)
    names = plain_names(headers.config, headers.tensors)
    held = {plain for name, plain in names.items() if name not in buffers}
    # Quantised values may be bytes, others are floating-point.
    held -= {name for name, plain in names.items() if name == plain and not headers.tensors[name].parameter}
    return sum(math.prod(shape) for name, shape in plain_shapes(headers).items() if name in held)


def _refuse_wrapped(headers: Headers, architecture: Architecture, strays: Sequence[str], placed: Iterable[str]) -> None:
    """Raise InputError where FFNs have the names of a model inside another one."""
    kinds = [found for name in strays if (found := architecture.locate(name)) is not None]
    first = strays[0]
    if kinds and not any(architecture.locate(name) for name in placed):
        prefix = first[: first.index(architecture.relative(kinds[0][1]))] if kinds[0][0].path else first
        raise InputError(
            f"{headers.name}: tensors are named {prefix}{architecture.relative(kinds[0][1])}..., as a wrapped model "
            "(DataParallel, torch.compile) saves them, and transformers would not find them: save the one inside"
        )


def looks_like_ffn(tensor_name: str) -> bool:
    """Whether a tensor's name speaks of a feed-forward layer (and not of attention)."""
    parts = tensor_name.split(".")
    if any(_ATTENTION_WORDS.fullmatch(part) for part in parts):
        return False
    return any(_FFN_WORDS.fullmatch(part) for part in parts)
