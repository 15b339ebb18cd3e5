"""Compression methods: a bundle of neurons in, a smaller bundle out. No method knows any model family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from mlp_fusion.errors import InputError
from mlp_fusion.neurons import NeuronBundle


@dataclass(frozen=True, eq=False)
class Reduction:
    """What a method made of a bundle.

    Attributes:
        bundle: the reduced bundle, K neurons, `(B, ...)` as the input was.
        counts: `(B, K)` int64 cluster sizes, or None for a method that does not cluster.
        inertia: `(B,)` objective that the method minimised, or None.
        iterations: `(B,)` int64, or None.
        status: per problem, a word: `ok`, or what went less than well.
    """

    bundle: NeuronBundle
    counts: Tensor | None
    inertia: Tensor | None
    iterations: Tensor | None
    status: tuple[str, ...]


class Method(Protocol):
    """A compression method: reduce every problem of `bundle` to `width` neurons; the same seed gives the same bits."""

    def __call__(self, bundle: NeuronBundle, width: int, *, seed: int) -> Reduction: ...


_METHODS: dict[str, Method] = {}


def method(name: str) -> Callable[[Method], Method]:
    """Register a method under `name`."""

    def add(function: Method) -> Method:
        _METHODS[name] = function
        return function

    return add


def get_method(name: str) -> Method:
    """The method called `name`.

    Raises:
        InputError: there is none.
    """
    if name not in _METHODS:
        raise InputError(f"unknown method {name!r}: use one of {', '.join(sorted(_METHODS))}")
    return _METHODS[name]


from mlp_fusion.methods import fusion  # noqa: E402  (registers itself above)

__all__ = ["Method", "Reduction", "fusion", "get_method", "method"]
