"""Compression methods: a bundle of neurons in, a smaller bundle out. No method knows any model family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from mlp_fusion.calibration.statistics import FFNStatistics
from mlp_fusion.choices import KEEP_WIDTH, METHODS, NEED_TEXT
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

    @staticmethod
    def plain(bundle: NeuronBundle) -> Reduction:
        """A reduction of a method that has nothing to say beyond the bundle."""
        return Reduction(bundle, None, None, None, ("ok",) * bundle.batch)


class Reducer(Protocol):
    """Reduce every problem of `bundle` to `width` neurons; the same seed gives the same bits.

    `statistics` holds one entry per problem, or is None without calibration.
    """

    def __call__(
        self, bundle: NeuronBundle, width: int, *, seed: int, statistics: Sequence[FFNStatistics] | None = None
    ) -> Reduction: ...


@dataclass(frozen=True)
class Method:
    """A compression method, called as its :class:`Reducer`.

    Attributes:
        name: what users call it.
        reduce: the function.
        needs_statistics: it cannot run without calibration.
        uses_statistics: it does better with calibration.
        narrows: the result has `width` neurons; else it keeps them all and spends the same number of parameters in
            another way, so that it can be measured but not put into a model.
    """

    name: str
    reduce: Reducer
    needs_statistics: bool = False
    uses_statistics: bool = False
    narrows: bool = True

    def __call__(
        self, bundle: NeuronBundle, width: int, *, seed: int, statistics: Sequence[FFNStatistics] | None = None
    ) -> Reduction:
        """Reduce; see :class:`Reducer`.

        Raises:
            InputError: the method needs statistics and there are none.
        """
        if self.needs_statistics and statistics is None:
            raise InputError(f"method {self.name!r} needs calibration text: pass calibration, or use another method")
        return self.reduce(bundle, width, seed=seed, statistics=statistics if self.uses_statistics else None)


_METHODS: dict[str, Method] = {}


def method(
    name: str, *, needs_statistics: bool = False, uses_statistics: bool = False, narrows: bool = True
) -> Callable[[Reducer], Reducer]:
    """Register a function as the method called `name`; the options are attributes of :class:`Method`."""

    def add(function: Reducer) -> Reducer:
        said = (name in METHODS, name in NEED_TEXT, name not in KEEP_WIDTH)
        if said != (True, needs_statistics, narrows):
            raise ValueError(f"mlp_fusion.choices says otherwise of method {name!r} than its registration: amend it")
        _METHODS[name] = Method(name, function, needs_statistics, uses_statistics or needs_statistics, narrows)
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


def method_names() -> list[str]:
    """The registered methods, sorted."""
    return sorted(_METHODS)


from mlp_fusion.methods import fusion, mmd, prune, select, sketch, svd  # noqa: E402  (they register themselves above)

__all__ = [
    "Method",
    "Reducer",
    "Reduction",
    "fusion",
    "get_method",
    "method",
    "method_names",
    "mmd",
    "prune",
    "select",
    "sketch",
    "svd",
]
