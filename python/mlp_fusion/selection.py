"""Which layers, how wide, and which parameterization: the options of `plan`, `fuse` and `compress`, checked."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING

from mlp_fusion.errors import InputError

if TYPE_CHECKING:
    from mlp_fusion.neurons import Parameterization

Layers = Iterable[int] | str | None
Width = int | float

_ADAPTIVE = ("adam", "adamw", "adamax", "nadam", "radam", "adafactor", "lion", "signsgd", "lamb", "rmsprop", "adagrad")
_GRADIENT = ("sgd", "momentum", "nesterov", "muon", "lbfgs")

#: Optimiser name -> the parameterization that keeps the training dynamics under it.
OPTIMIZERS: dict[str, Parameterization] = {
    **dict.fromkeys(_ADAPTIVE, "scaled"),
    **dict.fromkeys(_GRADIENT, "split"),
}


#: Layers that a message names.
_SHOWN = 8


def parameterization_for(optimizer: str | None) -> Parameterization:
    """`scaled` for Adam-like optimisers, `split` for SGD-like ones, `folded` for None (inference and export).

    Raises:
        InputError: unknown optimiser.
    """
    if optimizer is None:
        return "folded"
    known = ", ".join(sorted(OPTIMIZERS))
    if not isinstance(optimizer, str):
        raise InputError(f"optimizer {optimizer!r}: give a name, one of {known}, or None")
    # Trainer's names carry an implementation: adamw_torch_fused, paged_lion_8bit.
    named = [part for part in optimizer.lower().split("_") if part in OPTIMIZERS]
    if not named:
        raise InputError(
            f"unknown optimizer {optimizer!r}: use one of {known}, or None for inference (none on the command line)"
        )
    return OPTIMIZERS[named[0]]


def resolve_layers(layers: Layers, available: list[int], paths: Sequence[str] = ()) -> list[int]:
    """Turn a choice of layers into sorted indices.

    Args:
        layers: None or `"all"`; a range or any iterable of indices; a text of comma-separated parts, each `4`, `4-11`
            (both ends included), `first:4`, `last:8`, or a pattern of paths such as `decoder.*`.
        available: the indices of the layers that have an FFN.
        paths: of their FFNs, in the same order.

    Raises:
        InputError: a part cannot be read, a layer does not exist, or nothing is chosen.
    """
    if layers is None or (isinstance(layers, str) and layers == "all"):
        return sorted(available)
    chosen: set[int] = set()
    if not isinstance(layers, Iterable):
        raise InputError(f"layers is {layers!r}: give a range, a list or a text such as last:8")
    if isinstance(layers, str):
        for part in layers.split(","):
            chosen.update(_parse_part(part.strip(), sorted(available), dict(zip(available, paths, strict=False))))
    else:
        for index in layers:
            if isinstance(index, str) and ("*" in index or "." in index):
                chosen.update(_parse_part(index, sorted(available), dict(zip(available, paths, strict=False))))
                continue
            if isinstance(index, bool) or not isinstance(index, Integral):
                raise InputError(f"layers holds {index!r}: give layer numbers")
            chosen.add(int(index))
            if len(chosen) > len(available):
                break  # there is one among them that the model lacks, and who knows how many are to come
    missing = sorted(chosen - set(available))
    if missing:
        shown = ", ".join(map(str, missing[:_SHOWN])) + (", ..." if len(missing) > _SHOWN else "")
        raise InputError(f"layers {shown} out of range: the model has FFNs in layers {min(available)}-{max(available)}")
    if not chosen:
        raise InputError("no layer chosen: layers is empty")
    return sorted(chosen)


def _parse_part(part: str, available: list[int], paths: Mapping[int, str]) -> list[int]:
    if found := re.fullmatch(r"(first|last):(\d{1,18})", part):
        count = int(found[2])
        if not 1 <= count <= len(available):
            raise InputError(
                f"layers {part!r}: the model has {len(available)} FFNs: use {found[1]}:N up to that, or all"
            )
        return available[:count] if found[1] == "first" else available[-count:]
    if found := re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", part):
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first:
            raise InputError(f"layers {part!r}: the range runs backwards")
        # One that is out of range is enough to say so.
        return list(range(first, min(last, max(first, *available) + _SHOWN + 1) + 1))
    if paths and ("*" in part or "." in part):
        # Below the base model, or with what a head puts before it.
        patterns = (part, f"*.{part}")
        matched = [i for i, path in paths.items() if any(fnmatch.fnmatchcase(path, p) for p in patterns)]
        if not matched:
            raise InputError(f"layers {part!r}: no FFN lies there; the first is {next(iter(paths.values()))}")
        return matched
    raise InputError(
        f"layers {part!r} cannot be read: use all, 4, 4-11, first:4, last:8, a pattern of paths such as decoder.*, or "
        "several with commas"
    )


def width_multiple(full: int) -> int:
    """The multiple that an FFN of `full` neurons keeps when shrunk by a share.

    128 is the tile that serving engines and GPU kernels cut matrices into; 8 is the least that keeps 16-bit rows
    aligned for tensor cores. FFNs that do not have the property are not given it.
    """
    if full >= 1024 and full % 128 == 0:
        return 128
    return 8 if full % 8 == 0 else 1


def is_automatic(width: object, budget: float | None) -> bool:
    """Whether FFNs get their widths from a budget.

    Raises:
        InputError: a text that is not `"auto"`, or one of `"auto"` and the budget without the other.
    """
    automatic = isinstance(width, str)
    if automatic and width != "auto":
        raise InputError(f"width {width!r}: give a number, a count such as 768 or a share such as 0.25, or auto")
    if automatic != (budget is not None):
        raise InputError("width auto and budget go together: budget 0.4 keeps 40% of the FFNs' parameters")
    return automatic


def resolve_width(width: Width, full: int, multiple: int | None = None) -> int:
    """The number of neurons that an FFN of `full` neurons keeps.

    Args:
        width: a count (int), or a share (float) strictly between 0 and 1, rounded to the multiple.
        full: neurons now.
        multiple: what the number is to be a multiple of; None for `width_multiple(full)`, and 8 of counts.

    Raises:
        InputError: zero, negative, not smaller than `full`, or a count that engines cannot serve (not a multiple of 8
            where `full` is one, or not of `multiple`).
    """
    if isinstance(width, bool) or not isinstance(width, Real):
        raise InputError(f"width {width!r}: give a count such as 768 or a share such as 0.25")
    if multiple is not None and multiple >= full:
        raise InputError(f"multiple {multiple} leaves no width below the FFN's {full} neurons: use a smaller one")
    if isinstance(width, Integral):
        count, step = int(width), multiple or (8 if full % 8 == 0 else 1)
        if count <= 0:
            raise InputError(f"width {width} must be positive")
        if count % step and count < full:
            near = min(max(step, round(count / step) * step), (full - 1) // step * step)
            why = "as engines need it" if multiple is None else "as was asked for"
            raise InputError(f"width {width} is not a multiple of {step}, {why}: use {near}")
    else:
        if not 0.0 < width < 1.0:
            raise InputError(f"width {width} as a share must lie strictly between 0 and 1; a count is an integer")
        step = multiple or width_multiple(full)
        count = max(step, round(float(width) * full / step) * step)
    if count >= full:
        raise InputError(f"width {width} gives {count} neurons: not smaller than the FFN's {full}")
    return count
