"""In which form a narrower FFN stands in its model: found by watching one small module, and proved there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlp_fusion import InputError
from mlp_fusion.families import Kind, forms
from mlp_fusion.families.calls import Way
from mlp_fusion.families.sites import Function
from mlp_fusion.modules.stored import Projection

WIDTH = 24


class _Gated(nn.Module):
    """A gated FFN with gate and up in one projection; `kind` says what is unusual about it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.both, self.down = nn.Linear(8, 2 * WIDTH), nn.Linear(WIDTH, 8)
        self.act = nn.SiLU()
        if kind == "two names":
            self.same = self.act
        if kind == "inner dropout":
            self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).split(WIDTH if self.kind == "width" else self.both.out_features // 2, -1)
        if self.kind == "function":
            return self.down(nn.functional.silu(gate) * up)  # type: ignore[no-any-return]
        if self.kind == "mean":
            return self.down(self.act(gate) * up * (self.down.in_features / WIDTH))  # type: ignore[no-any-return]
        if self.kind == "norm":
            hidden = self.act(gate) * up
            return self.down(hidden / hidden.norm(dim=-1, keepdim=True))  # type: ignore[no-any-return]
        if self.kind == "inner dropout":
            return self.down(self.drop(self.act(gate) * up))  # type: ignore[no-any-return]
        return self.down(self.act(gate) * up)  # type: ignore[no-any-return]


class _Plain(nn.Module):
    """A plain FFN in a module of its own; `kind` says where dropouts lie."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.up, self.down, self.act = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 8), nn.GELU()
        self.drop, self.other = nn.Dropout(0.3), nn.Dropout(0.3)
        if kind == "weights beside":
            self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.up(x))
        if self.kind == "inside":
            return self.down(self.drop(hidden))  # type: ignore[no-any-return]
        y = self.down(hidden)
        if self.kind == "written out":
            return nn.functional.dropout(y, 0.3, self.training)
        if self.kind == "weights beside":
            return self.norm(y)  # type: ignore[no-any-return]
        if self.kind == "none":
            return y  # type: ignore[no-any-return]
        return self.drop(self.other(y) if self.kind == "two" else y)  # type: ignore[no-any-return]


def found(module: Any, kind: Kind, monkeypatch: pytest.MonkeyPatch, *, own: bool) -> Kind:
    """What is found in modules that `module` makes."""

    def small(*_: Any) -> tuple[nn.Module, Way]:
        torch.manual_seed(0)
        made, x = module().eval(), torch.randn(3, 8)
        return made, Way("", lambda: made(x), x)

    monkeypatch.setattr(forms, "_small", small)
    site: Any = SimpleNamespace(own_module=own, shared=())
    return forms.with_form(None, site, kind, {})


GATED = Kind(
    "",
    (
        Projection("both.weight", "w_gate", "first", 0, bias="both.bias"),
        Projection("both.weight", "w_in", "second", 0, bias="both.bias"),
        Projection("down.weight", "w_out", "whole", 1, bias="down.bias"),
    ),
    Function("gated", "silu"),
    WIDTH,
)
PLAIN = Kind(
    "",
    (
        Projection("up.weight", "w_in", "whole", 0, bias="up.bias"),
        Projection("down.weight", "w_out", "whole", 1, bias="down.bias"),
    ),
    Function("plain", "gelu"),
    WIDTH,
)


@pytest.mark.parametrize(
    ("kind", "form", "holder"),
    [
        ("usual", "activation", "act"),
        ("inner dropout", "activation", "act"),
        ("function", "projection", "down"),
        ("two names", "projection", "down"),
    ],
)
def test_the_activation_is_found_by_watching(
    kind: str, form: str, holder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = found(lambda: _Gated(kind), GATED, monkeypatch, own=False)
    assert (seen.form, seen.holder, seen.scale) == (form, holder, f"{holder}.scale")
    # Without a key, the layers' own numbers of channels follow the width.
    assert seen.counts == {"both.out_features": 2, "down.in_features": 1}


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("width", r"do not run with fewer neurons \(\w+\)"),
        ("mean", r"compute something else once they are narrower \(relative difference \d"),
        ("norm", r"compute something else once they are narrower \(relative difference \d"),
    ],
)
def test_ffns_that_heed_their_width_are_refused(kind: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=reason):
        found(lambda: _Gated(kind), GATED, monkeypatch, own=False)


@pytest.mark.parametrize(
    ("kind", "form", "dropout"),
    [
        ("none", "module", ""),
        ("behind", "module", "drop"),
        ("inside", "activation", ""),
        ("two", "activation", ""),
        ("written out", "activation", ""),
        ("weights beside", "activation", ""),
    ],
)
def test_modules_that_are_ffns_and_no_more_are_replaced(
    kind: str, form: str, dropout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = found(lambda: _Plain(kind), PLAIN, monkeypatch, own=True)
    assert (seen.form, seen.dropout) == (form, dropout)
    assert seen.holder == ("" if form == "module" else "act")
    assert found(lambda: _Plain(kind), PLAIN, monkeypatch, own=False).form == "activation"


def test_a_function_that_the_kernels_lack_keeps_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    unnamed = Kind("", PLAIN.projections, Function("plain", "tanh"), WIDTH)
    assert found(lambda: _Plain("none"), unnamed, monkeypatch, own=True).form == "activation"
