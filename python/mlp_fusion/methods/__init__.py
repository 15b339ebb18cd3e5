"""Compression methods: a bundle of neurons in, a smaller bundle out. No method knows any model family.

A method is one file here and one line in :data:`mlp_fusion.choices.METHODS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from mlp_fusion.calibration.statistics import FFNStatistics
from mlp_fusion.choices import METHODS, MethodEntry
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
        clustered_by: the backend that k-means ran on, or None for a method that does not cluster.
    """

    bundle: NeuronBundle
    counts: Tensor | None
    inertia: Tensor | None
    iterations: Tensor | None
    status: tuple[str, ...]
    clustered_by: str | None = None

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
        entry: what `choices` says of it.
    """

    name: str
    reduce: Reducer
    entry: MethodEntry

    @property
    def needs_statistics(self) -> bool:
        """Whether it cannot run without calibration."""
        return self.entry.text == "needed"

    @property
    def uses_statistics(self) -> bool:
        """Whether it does better with calibration."""
        return self.entry.text != "unused"

    @property
    def narrows(self) -> bool:
        """Whether the result has `width` neurons."""
        return self.entry.narrows

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


def get_method(name: str) -> Method:
    """The method called `name`, whose file is imported now.

    Raises:
        InputError: there is none.
    """
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}: use one of {', '.join(METHODS)}")
    module = importlib.import_module(f"mlp_fusion.methods.{METHODS[name].file}")
    return Method(name, getattr(module, name), METHODS[name])
