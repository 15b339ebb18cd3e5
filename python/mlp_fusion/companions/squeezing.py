"""Dimension squeezing: which bonds of a model's chains are cut next, by what their spectra say that it costs.

A loss is the relative squared error that :meth:`MatrixProductOperator.error_bound` adds: a cut's discarded squares over
the squared norm of its matrix. All of it is known from one decomposition, before anything is cut. Cuts are made where a
parameter that is saved costs least: in a matrix, bond by bond, and among matrices. By the loss alone, cuts would come
first that save nothing: of matrices that are smaller whole than as what is left of their chains.

Source: dimension squeezing of MPOP (arXiv 2106.02205), which cuts where the estimated error is least, whatever that
saves.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mlp_fusion.companions.operators import MatrixProductOperator
from mlp_fusion.errors import InputError

#: Parts that a bond is cut in.
_PARTS = 32


@dataclass(frozen=True)
class Squeezed:
    """Bonds to cut to.

    Attributes:
        bonds: matrix -> the sizes of its bonds.
        parameters: of all matrices then, each as a chain or whole, whichever is less.
        error: the estimated relative squared errors of all matrices, summed up.
    """

    bonds: dict[str, list[int]]
    parameters: int
    error: float


@dataclass(frozen=True)
class Cut:
    """How far a matrix may be cut.

    Attributes:
        parameters: of it then, as a chain or whole.
        error: estimated, relative and squared.
        bonds: the sizes of its bonds.
    """

    parameters: int
    error: float
    bonds: tuple[int, ...]


def chain_size(sides: Sequence[int], bonds: Sequence[int]) -> int:
    """Numbers in a chain with these bonds."""
    ends = [1, *bonds, 1]
    return sum(before * side * after for side, before, after in zip(sides, ends, ends[1:], strict=False))


def stored_size(shape: tuple[int, int], sides: Sequence[int], bonds: Sequence[int]) -> int:
    """Numbers in a chain with these bonds, or in its matrix where that has fewer."""
    return min(chain_size(sides, bonds), math.prod(shape))


def squeeze_bonds(chains: Mapping[str, MatrixProductOperator], allowed: int) -> Squeezed:
    """Cut bonds, the cheapest for each parameter first, until the matrices have `allowed` parameters or fewer.

    Each matrix goes along the lower convex hull of its :func:`cuts`, and of all matrices the one goes on whose next
    step there costs least for each parameter; the last one stops as soon as that is enough.

    Raises:
        InputError: they have more with all bonds at 1.
    """
    curves = {name: list(cuts(chain)) for name, chain in chains.items()}
    chosen = {name: curve[0] for name, curve in curves.items()}
    least = sum(curve[-1].parameters for curve in curves.values())
    if least > allowed:
        raise InputError(f"the matrices have {least:,} parameters with all bonds at 1: allow more")
    steps = [
        (_price(*pair), name, pair[1]) for name, curve in curves.items() for pair in itertools.pairwise(_hull(curve))
    ]
    left = sum(cut.parameters for cut in chosen.values()) - allowed
    # The steps of one matrix are in order of their prices: its hull is convex.
    for _, name, cut in sorted(steps, key=lambda step: step[0]):
        if left <= 0:
            break
        most = chosen[name].parameters - left
        if cut.parameters < most:
            cut = next(one for one in curves[name] if one.parameters <= most)
        left -= chosen[name].parameters - cut.parameters
        chosen[name] = cut
    return Squeezed(
        {name: list(cut.bonds) for name, cut in chosen.items()},
        sum(cut.parameters for cut in chosen.values()),
        sum(cut.error for cut in chosen.values()),
    )


def cuts(chain: MatrixProductOperator) -> Iterator[Cut]:
    """From all of a chain's bonds to 1 at each: every cut takes a thirty-second off the bond where it costs least.

    For each number of the chain that it saves, that is.
    """
    sides = [t.shape[1] * t.shape[2] for t in chain.tensors]
    squares = [spectrum.square() for spectrum in chain.spectra]
    norm = float(squares[0].sum()) if squares else 0.0
    parts = [max(1, size // _PARTS) for size in chain.bonds]
    bonds, error = list(chain.bonds), 0.0
    yield Cut(stored_size(chain.shape, sides, bonds), error, tuple(bonds))
    while any(size > 1 for size in bonds):
        found = []
        for bond, size in enumerate(bonds):
            if size > 1:
                fewer = [*bonds[:bond], max(1, size - parts[bond]), *bonds[bond + 1 :]]
                cost = float(squares[bond][fewer[bond] : size].sum()) / norm if norm > 0.0 else 0.0
                found.append((cost / (chain_size(sides, bonds) - chain_size(sides, fewer)), cost, fewer))
        _, cost, bonds = min(found)
        error += cost
        yield Cut(stored_size(chain.shape, sides, bonds), error, tuple(bonds))


def _hull(curve: Sequence[Cut]) -> list[Cut]:
    """Those of ever fewer parameters that no mixture of others has at a smaller error."""
    hull = [curve[0]]
    for cut in curve[1:]:
        if cut.parameters == hull[-1].parameters:
            continue  # still whole: nothing is saved
        while len(hull) > 1 and _price(hull[-1], cut) <= _price(hull[-2], hull[-1]):
            hull.pop()
        hull.append(cut)
    return hull


def _price(now: Cut, then: Cut) -> float:
    """What a parameter costs that is saved between two cuts."""
    return (then.error - now.error) / (now.parameters - then.parameters)
