"""A case of a proof: a small problem, run twice in memory full of NaN, and a bound that its results must keep."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

Found = Mapping[str, Tensor]

_NOTED: ContextVar[dict[str, float] | None] = ContextVar("_NOTED", default=None)


@dataclass(frozen=True)
class Case:
    """
    Attributes:
        name: what it is about, in a few words.
        run: computes the results, by name, on the device; from the same inputs every time.
        wrong: in one line by how much results, on the host, are off; None where they keep the bound.
    """

    name: str
    run: Callable[[], Found]
    wrong: Callable[[Found], str | None]


def failure(case: Case) -> str | None:
    """In one line what is wrong with a case, or None."""
    with poisoned():
        first, second = (_on_host(case.run()) for _ in range(2))
    reason = case.wrong(first)
    if reason is not None:
        return f"{case.name}: {reason}"
    for name, value in first.items():
        if not same_bits(value, second[name]):
            return f"{case.name}: {name} has other bits the second time"
    return None


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether they are equal, NaN to NaN."""
    return one.dtype == other.dtype and torch.equal(one.nan_to_num(nan=-7.0), other.nan_to_num(nan=-7.0))


def beyond(name: str, found: Tensor, exact: Tensor, allowed: Tensor | float) -> str | None:
    """In one line by how much a result is further from `exact` than is allowed for each entry; None if it is not."""
    if found.shape != exact.shape:
        return f"{name} is {tuple(found.shape)}, not {tuple(exact.shape)}"
    error = (found.double() - exact.double()).abs()
    share = torch.where(error == 0, 0.0, error / allowed)
    # A NaN is beyond every bound.
    worst = float(share.nan_to_num(nan=torch.inf).max()) if share.numel() else 0.0
    noted = _NOTED.get()
    if noted is not None:
        noted[name] = max(noted.get(name, 0.0), worst)
    return f"{name} errs by {worst:.3g} times its bound" if worst > 1 else None


@contextlib.contextmanager
def noting() -> Iterator[dict[str, float]]:
    """Yields, by the name of a result, the largest error as a share of its bound in every :func:`beyond` inside."""
    noted: dict[str, float] = {}
    token = _NOTED.set(noted)
    try:
        yield noted
    finally:
        _NOTED.reset(token)


def first_of(*reasons: str | None) -> str | None:
    """The first that there is."""
    return next((reason for reason in reasons if reason is not None), None)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """New memory is full of NaN, or of the largest integer: what is not written shows."""

    def filled(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def make(*arguments: Any, **options: Any) -> Tensor:
            t = original(*arguments, **options)
            if t.dtype == torch.bool or t.is_complex():
                return t
            return t.fill_(torch.nan if t.is_floating_point() else torch.iinfo(t.dtype).max)

        return make

    with contextlib.ExitStack() as stack:
        for where, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            stack.enter_context(mock.patch.object(where, name, filled(getattr(where, name))))
        yield


def _on_host(found: Found) -> dict[str, Tensor]:
    return {name: t.cpu() for name, t in found.items()}
