"""Layers, widths and optimisers: what is accepted and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from mlp_fusion.errors import InputError
from mlp_fusion.selection import parameterization_for, resolve_layers, resolve_width

TWELVE = list(range(12))


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, TWELVE),
        ("all", TWELVE),
        (range(4, 12), TWELVE[4:]),
        ([7, 3, 3], [3, 7]),
        ("last:8", TWELVE[4:]),
        ("first:2", [0, 1]),
        ("4-11", TWELVE[4:]),
        ("0, 2,5-6", [0, 2, 5, 6]),
    ],
)
def test_layers(layers: Any, expected: list[int]) -> None:
    assert resolve_layers(layers, TWELVE) == expected


def test_last_counts_ffns_not_numbers() -> None:
    assert resolve_layers("last:2", [1, 3, 5, 7]) == [5, 7]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([12], "layers 12 out of range: the model has FFNs in layers 0-11"),
        ([-1], "layers -1 out of range"),
        ("11-13", "layers 12, 13 out of range"),
        ([], "no layer chosen"),
        ("", "cannot be read"),
        ("4-", "cannot be read"),
        ("last:0", "the model has 12 FFNs"),
        ("last:13", "the model has 12 FFNs"),
        ("7-5", "runs backwards"),
        ([1.5], "give layer numbers"),
        ([True], "give layer numbers"),
        (3, "give a range, a list"),
    ],
)
def test_bad_layers(layers: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve_layers(layers, TWELVE)


@pytest.mark.parametrize(
    ("width", "full", "expected"),
    [
        (768, 3072, 768),
        (0.25, 3072, 768),
        (0.25, 1536, 384),
        (0.3, 1536, 512),  # 460.8, to the nearest multiple of 128
        (0.01, 1536, 128),  # never nothing
        (0.25, 11008, 2816),  # 2752 = 21.5 x 128, to the even multiple
        (0.3, 64, 16),  # small FFNs keep multiples of 8
        (0.3, 37, 11),  # odd ones keep none
        (11, 37, 11),
    ],
)
def test_widths(width: float, full: int, expected: int) -> None:
    assert resolve_width(width, full) == expected


@pytest.mark.parametrize(
    ("width", "message"),
    [
        (0, "must be positive"),
        (-8, "must be positive"),
        (0.0, "strictly between 0 and 1"),
        (-0.5, "strictly between 0 and 1"),
        (1.0, "strictly between 0 and 1"),
        (768.0, "strictly between 0 and 1"),
        (float("nan"), "strictly between 0 and 1"),
        (1536, "not smaller than the FFN's 1536"),
        (4096, "not smaller than the FFN's 1536"),
        (0.99, "not smaller than the FFN's 1536"),
        (383, "not a multiple of 8, as engines need it: use 384"),
        (3, "use 8"),
        (1533, "use 1528"),
        (1537, "not smaller than the FFN's 1536"),
        (True, "give a count"),
        ("768", "give a count"),
        (None, "give a count"),
    ],
)
def test_bad_widths(width: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve_width(width, 1536)


def test_optimizers() -> None:
    assert parameterization_for(None) == "folded"
    assert {parameterization_for(n) for n in ("adam", "AdamW", "adafactor", "lion")} == {"scaled"}
    assert {parameterization_for(n) for n in ("sgd", "SGD", "momentum", "muon")} == {"split"}
    with pytest.raises(InputError, match="unknown optimizer 'adamm'"):
        parameterization_for("adamm")


def test_patterns_of_paths_and_lists_of_them() -> None:
    paths = ["model.encoder.layers.0", "model.encoder.layers.1", "model.decoder.layers.0"]
    assert resolve_layers("encoder.*", [0, 1, 2], paths) == [0, 1]
    assert resolve_layers("model.decoder.layers.0", [0, 1, 2], paths) == [2]
    assert resolve_layers("*.layers.0", [0, 1, 2], paths) == [0, 2]
    assert resolve_layers(["decoder.*", 1], [0, 1, 2], paths) == [1, 2]
    with pytest.raises(InputError, match=r"no FFN lies there; the first is model\.encoder\.layers\.0"):
        resolve_layers("vision.*", [0, 1, 2], paths)


def test_a_multiple_that_was_asked_for() -> None:
    assert resolve_width(0.5, 1408, 256) == 768
    assert resolve_width(0.3, 1408, 256) == 512
    assert resolve_width(0.3, 1408) == 384
    assert resolve_width(512, 1408, 256) == 512
    assert resolve_width(0.01, 1408, 256) == 256
    with pytest.raises(InputError, match="width 700 is not a multiple of 256, as was asked for: use 768"):
        resolve_width(700, 1408, 256)
    with pytest.raises(InputError, match="multiple 1408 leaves no width below the FFN's 1408 neurons"):
        resolve_width(0.5, 1408, 1408)
