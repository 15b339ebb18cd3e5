"""Which activation and which `Gate` a module's own way of gating is, found by comparing numbers."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any, get_args

import torch
from torch import Tensor, nn

from fusion_kernels import Gate, split_gate_up
from fusion_kernels.activations import ACTIVATIONS
from fusion_kernels.gates import Clamp

#: Values to compare at lie between these and their negatives; between the first, no limit is looked for.
_SPREADS = (0.5, 2.0, 12.0, 1e2, 1e3, 1e4)
_ROWS = 128
_OFFSETS = (0.0, 1.0)

#: Activation and `Gate.arguments`; or what is there instead, in a few words.
Form = tuple[str, float | None, str, float] | str

#: Of a module: what the answer depended on, and the answer. It takes longer than the experts of a few tokens.
_known: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Form]] = weakref.WeakKeyDictionary()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def form_of(module: nn.Module, method: str, layout: str) -> Form:
    """The form of a module's own gate, or what it does instead.

    Limits are looked for among the numbers that the module holds. One that it does not hold is noticed below 10,000.

    Args:
        method: name of the module's method: gate and up projections `(T, 2 h)` -> hidden values `(T, h)`.
        layout: how gate and up lie in the `2 h`, as in `split_gate_up`.
    """
    limits = sorted({float(v) for v in vars(module).values() if type(v) in (int, float) and 0 < v < math.inf})
    gated = getattr(module, method)
    asked = (getattr(gated, "__func__", gated), layout, limits, type(getattr(module, "act_fn", None)))
    known = _known.get(module)
    if known is None or known[0] != asked:
        known = _known[module] = asked, _recognised(gated, limits, layout)
    return known[1]


def _recognised(gated: Callable[[Tensor], Tensor], limits: list[float], layout: str) -> Form:
    with torch.no_grad():
        near, far = _arguments(_SPREADS[:1]), _arguments((*_SPREADS, *(1.5 * limit for limit in limits)))
        try:
            found = [gated(arguments) for arguments in (near, far)]
        except Exception as error:  # noqa: BLE001 - the module's own code, which may want whatever
            return f"raises {type(error).__name__} when it is asked alone"
        if any(type(h) is not Tensor or h.shape != (len(a), 2) for h, a in zip(found, (near, far), strict=True)):
            return "returns no hidden values of one gate and one up each"
        for name, activation in ACTIVATIONS.items():
            for offset in _OFFSETS:
                if not _same(found[0], activation.function, Gate(up_offset=offset), near, layout):
                    continue
                for gate in _gates(limits, offset):
                    if _same(found[1], activation.function, gate, far, layout):
                        return name, *gate.arguments
    return "is no form that there is a kernel for"


def _arguments(spreads: tuple[float, ...]) -> Tensor:
    """(T, 4) in float64: gates and ups of two neurons, evenly spread."""
    g = torch.Generator().manual_seed(0)
    each = torch.rand(_ROWS, 4, generator=g, dtype=torch.float64, device="cpu") * 2 - 1
    return torch.cat([spread * each for spread in spreads])


def _gates(limits: list[float], offset: float) -> Iterator[Gate]:
    yield Gate(up_offset=offset)
    for limit in limits:
        for clamp in get_args(Clamp):
            yield Gate(limit, clamp, offset)


def _same(found: Tensor, phi: Callable[[Tensor], Tensor], gate: Gate, arguments: Tensor, layout: str) -> bool:
    g, up = (part.T for part in split_gate_up(arguments.T, layout))
    expected = gate.after(phi(gate.inside(g))) * gate.up(up)
    return torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-7)
