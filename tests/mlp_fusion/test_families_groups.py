"""FFNs that one config key moves keep one share of their widths."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from mlp_fusion import InputError
from mlp_fusion.families import FFNSite, Kind
from mlp_fusion.families.groups import resolve_widths
from mlp_fusion.families.sites import Function, WidthKey
from mlp_fusion.selection import resolve_width


def sites(*kinds: tuple[str, int, int, Any]) -> list[FFNSite]:
    """FFNs of kinds, each a path, a width, a group and what the key says (None: there is no key)."""
    found = []
    for index, (path, width, group, value) in enumerate(kinds):
        key = None if value is None else WidthKey("d_ff", "int", value)
        kind = Kind(path, (), Function("plain", "gelu"), width, group=group, key=key)
        found.append(FFNSite(index, path.replace("#", str(index)), nn.Module(), kind))
    return found


@pytest.mark.parametrize("width", [0.25, 0.33, 512, 2000])
def test_one_kind_is_resolved_as_ever(width: float) -> None:
    several = sites(*[("layers.#.mlp", 3072, 0, 3072)] * 3)
    assert resolve_widths(width, several) == [resolve_width(width, 3072)] * 3


def test_kinds_that_one_key_moves_keep_one_share() -> None:
    routed, shared = ("layers.#.mlp.experts", 64, 0, 64), ("layers.#.mlp.shared", 128, 0, 64)
    assert resolve_widths(0.5, sites(routed, shared)) == [32, 64]
    # A count is that of the kind whose width the key states, wherever it stands.
    assert resolve_widths(16, sites(shared, routed, shared)) == [32, 16, 32]
    # Without such a kind, of the narrowest.
    assert resolve_widths(16, sites(("a.#", 96, 0, 4), ("b.#", 64, 0, 4))) == [24, 16]
    assert resolve_widths(16, sites(("a.#", 96, 0, None), ("b.#", 64, 0, None))) == [24, 16]
    # One share is worth more than a multiple of 8; what does not come out even is rounded by itself.
    assert resolve_widths(0.25, sites(("a.#", 64, 0, 64), ("b.#", 40, 0, 64))) == [16, 10]
    assert resolve_widths(24, sites(("a.#", 64, 0, 64), ("b.#", 100, 0, 64))) == [24, resolve_width(0.375, 100)]


def test_groups_are_resolved_by_themselves() -> None:
    encoder, decoder = ("encoder.#", 3072, 0, 3072), ("decoder.#", 1000, 1, 1000)
    found = resolve_widths(0.33, sites(encoder, decoder))
    assert found == [resolve_width(0.33, 3072), resolve_width(0.33, 1000)]
    assert resolve_widths(512, sites(encoder, decoder)) == [512, 512]


def test_what_does_not_suit_is_said_of_the_kind() -> None:
    encoder, decoder = ("encoder.#", 3072, 0, 3072), ("decoder.#", 1024, 1, 1024)
    with pytest.raises(InputError, match=r"^decoder\.#: .*not smaller than the FFN's 1024"):
        resolve_widths(2048, sites(encoder, decoder))
    with pytest.raises(InputError, match=r"^width 4096 gives 4096 neurons: not smaller than the FFN's 3072"):
        resolve_widths(4096, sites(encoder, encoder))
