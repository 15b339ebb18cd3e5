"""`discovered`: the `Architecture` of the model that a config describes, made from what was found and proved in it."""

from __future__ import annotations

import functools
import json
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from mlp_fusion.errors import InputError
from mlp_fusion.families.base import Architecture, Kind, unsupported
from mlp_fusion.families.sites import Description, Refusal, Site, WidthKey


def discovered(config: Any) -> Architecture:
    """The entry for the model that `config` describes; found and proved once per config.

    What is like an FFN and is not proved, or has no form for a narrower one, is named in `Architecture.unproved`.

    Raises:
        InputError: there is no FFN that could be narrowed; the message says what stands there.
    """
    plain = {name: value for name, value in config.to_dict().items() if name not in ("_name_or_path", "dtype")}
    config_class: Any = type(config)
    return _discovered(config_class, json.dumps(plain, sort_keys=True, default=str))


@functools.lru_cache(maxsize=64)
def _discovered(config_class: type[PreTrainedConfig], content: str) -> Architecture:
    # Here, because it imports all of transformers' models by name: records of fused models do without.
    from mlp_fusion.families.describe import describe

    config = config_class.from_dict(json.loads(content))
    description = describe(config)
    prefix = _prefix(description)
    kinds = []
    unproved = [f"{refusal.parameter} belongs to no FFN that could be proved ({refusal.reason})"
                for refusal in description.refused]  # fmt: skip
    for site in description.sites:
        try:
            kind = _kind(config, site, description, prefix)
        except InputError as error:
            unproved.append(str(error))
            continue
        if kind is not None:
            kinds.append(kind)
    if not kinds:
        raise InputError(unsupported(config.model_type, [*unproved, "no FFN was found in it"][0]))
    ordered = sorted(kinds, key=lambda kind: -kind.path.count("."))
    return Architecture(config.model_type, prefix, tuple(ordered), tuple(unproved))


def _kind(config: Any, site: Site, description: Description, prefix: str) -> Kind | None:
    """The kind that a site of the description is.

    None where nobody names what lies between two projections, no key moves it, and it fails when it is narrowed: that
    was seen once, on one input, and is no FFN (an attention with a head for each channel).

    Raises:
        InputError: it cannot be narrowed; the message says why.
    """
    from mlp_fusion.families.forms import with_form

    if site.shared:
        raise InputError(f"the FFNs at {site.path} share their weights with those at {site.shared[0]}")
    if (beside := _moved_beside(site, description)) is not None:
        raise InputError(f"{beside.parameter} would have to be narrowed with the FFNs at {site.path}: {beside.reason}")
    alike: list[Any] = [
        other
        for other in description.sites
        if other.path == site.path
        and {p.parameter for p in other.projections} & {p.parameter for p in site.projections}
    ]
    alike += [refusal for refusal in description.refused if refusal.parameter in site.parameters]
    key = site.width_keys[0] if site.width_keys and not site.width_keys[0].also_moves else None
    kind = Kind(
        path=site.path.removeprefix(f"{prefix}."),
        projections=site.projections,
        function=site.function,
        width=site.width,
        experts=site.experts,
        group=site.group,
        key=key,
        instances=tuple(path.removeprefix(f"{prefix}.") for path, _ in site.instances) if len(alike) > 1 else (),
    )
    try:
        return with_form(config, site, kind, {} if key is None else _counts(config, site, key))
    except InputError as error:
        if site.function.activation is None and not site.width_keys:
            return None
        raise InputError(f"the FFNs at {site.path} {error}") from error


def _moved_beside(site: Site, description: Description) -> Refusal | None:
    """What has the width of an FFN's neurons and stands among its projections, but is none: norms, copies."""
    for refusal in description.refused:
        below = refusal.parameter.startswith(f"{site.path}.")
        if below and refusal.key is not None and refusal.parameter not in site.parameters:
            return refusal
    return None


def _counts(config: Any, site: Site, key: WidthKey) -> dict[str, int]:
    """Numbers that the modules of a kind keep of the width: those that follow when the key is changed."""
    from mlp_fusion.families import building

    path, cls = site.instances[0][0], building.model_class(config)
    first = site.projections[-1]
    with building.undisturbed():
        before = building.build(cls, config).get_submodule(path)
        for value in _other_values(key):
            changed = building.put(config.to_dict(), tuple(key.path.split(".")), value)
            try:
                after = building.build(cls, type(config).from_dict(changed)).get_submodule(path)
            except Exception:  # noqa: BLE001  (a config with another number may fail in any way)
                continue
            sizes = [m.get_parameter(first.parameter).shape[first.neuron_axis] for m in (before, after)]
            return _following(before, after, sizes[0] // site.width, sizes)
    return {}


def _following(before: nn.Module, after: nn.Module, stacked: int, sizes: list[int]) -> dict[str, int]:
    """Attributes that are multiples of the width in both modules; `sizes` are their widths, `stacked` times."""
    widths = [size // max(stacked, 1) for size in sizes]
    others = dict(after.named_modules())
    found = {}
    for name, part in before.named_modules():
        for attribute, value in vars(part).items():
            now = vars(others[name]).get(attribute) if name in others else None
            if type(value) is int and type(now) is int and value != now and value % widths[0] == 0:
                times = value // widths[0]
                if now == times * widths[1]:
                    found[f"{name}.{attribute}".lstrip(".")] = times
    return found


def _other_values(key: WidthKey) -> list[Any]:
    if key.value is None:
        return [1000, 24]
    if isinstance(key.value, list):
        return [[entry * 2 for entry in key.value], [entry + 8 for entry in key.value]]
    return [key.value * 2] if isinstance(key.value, float) or key.value < 16 else [key.value + 8, key.value * 2]


def _prefix(description: Description) -> str:
    """What stands before names of the base model in a model with a head."""
    import transformers

    cls: Any = getattr(transformers, description.model_class, None)
    return str(getattr(cls, "base_model_prefix", "") or "model")
