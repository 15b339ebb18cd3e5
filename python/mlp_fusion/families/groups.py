"""FFNs that one config key moves: they shrink by one share, and are experts together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from mlp_fusion.errors import InputError
from mlp_fusion.families.base import FFNSite, Kind
from mlp_fusion.selection import Width, resolve_width


def resolve_widths(width: Width, sites: Sequence[FFNSite], multiple: int | None = None) -> list[int]:
    """The number of neurons that each FFN keeps.

    Kinds that one key of the config moves (routed and shared experts, the stages of a pyramid) keep one share of their
    widths, wherever that comes out even: a config can then state them all. A count is that of the kind whose width the
    key states, or of the narrowest.

    Args:
        width, multiple: as in :func:`mlp_fusion.selection.resolve_width`.
        sites: the chosen FFNs.

    Raises:
        InputError: the width does not suit one of them; the message names it where there are several kinds.
    """
    shares: dict[int, Fraction] = {}
    for number in {site.kind.group for site in sites}:
        first = min((site.kind for site in sites if site.kind.group == number), key=_rank)
        try:
            shares[number] = Fraction(resolve_width(width, first.width, multiple), first.width)
        except InputError as error:
            if len({site.kind.path for site in sites}) == 1:
                raise
            raise InputError(f"{first.path}: {error}") from error
    found = []
    for site in sites:
        after = site.kind.width * shares[site.kind.group]
        found.append(
            int(after) if after.denominator == 1 else resolve_width(float(after / site.kind.width), site.kind.width)
        )
    return found


def only_some(only: str, sites: Sequence[FFNSite]) -> list[FFNSite]:
    """The FFNs of `sites` that are meant by `experts` or by `dense`.

    Shared experts are experts where they stand in the layer of routed ones, and one key of the config states the widths
    of both: a config could not state others.

    Args:
        only: `experts` or `dense`.
        sites: all FFNs of a model.
    """
    routed = {(_layer(site), site.kind.group) for site in sites if site.is_routed}
    experts = [site.is_routed or (_layer(site), site.kind.group) in routed for site in sites]
    return [site for site, is_one in zip(sites, experts, strict=True) if is_one is (only == "experts")]


def _layer(site: FFNSite) -> str:
    """The path to the last number in front of experts."""
    above = re.split(r"(?:^|\.)experts?(?:[._]|$)", site.path)[0]
    found = re.match(r"(?:.*\.)?\d+(?=\.|$)", above)
    return found[0] if found else ""


def _rank(kind: Kind) -> tuple[bool, int]:
    return kind.key is None or kind.key.value != kind.width, kind.width
