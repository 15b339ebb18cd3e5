"""Dimension squeezing: which bonds of a model's chains are cut next, by what their spectra say that it costs.

Every cut takes a thirty-second off one bond, of all bonds of all matrices the one whose singular values are the least
loss. A loss is the relative squared error that :meth:`MatrixProductOperator.error_bound` adds: a cut's discarded
squares over the squared norm of its matrix. All of it is known from one decomposition, before anything is cut.

Source: dimension squeezing of MPOP (arXiv 2106.02205), which cuts where the estimated error is least.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

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


def stored_size(shape: tuple[int, int], sides: list[int], bonds: list[int]) -> int:
    """Numbers in a chain with these bonds, or in its matrix where that has fewer."""
    ends = [1, *bonds, 1]
    chain = sum(before * side * after for side, before, after in zip(sides, ends, ends[1:], strict=False))
    return min(chain, math.prod(shape))


def squeeze_bonds(chains: Mapping[str, MatrixProductOperator], allowed: int) -> Squeezed:
    """Cut bonds, the cheapest first, until the matrices have `allowed` parameters or fewer.

    Raises:
        InputError: they have more with all bonds at 1.
    """
    sides = {name: [t.shape[1] * t.shape[2] for t in chain.tensors] for name, chain in chains.items()}
    bonds = {name: list(chain.bonds) for name, chain in chains.items()}
    sizes = {name: stored_size(chain.shape, sides[name], bonds[name]) for name, chain in chains.items()}
    squares = {name: [s.square() for s in chain.spectra] for name, chain in chains.items()}
    norms = {name: float(parts[0].sum()) for name, parts in squares.items() if parts}
    error = 0.0

    def cut(name: str, bond: int) -> tuple[float, str, int, int]:
        """What the next cut of a bond costs, and the size that it leaves."""
        now = bonds[name][bond]
        left = max(1, now - max(1, chains[name].bonds[bond] // _PARTS))
        return _share(squares[name][bond][left:now], norms[name]), name, bond, left

    waiting = [cut(name, bond) for name, own in bonds.items() for bond, size in enumerate(own) if size > 1]
    heapq.heapify(waiting)
    while sum(sizes.values()) > allowed:
        if not waiting:
            raise InputError(f"the matrices have {sum(sizes.values()):,} parameters with all bonds at 1: allow more")
        cost, name, bond, left = heapq.heappop(waiting)
        bonds[name][bond] = left
        error += cost
        sizes[name] = stored_size(chains[name].shape, sides[name], bonds[name])
        if left > 1:
            heapq.heappush(waiting, cut(name, bond))
    return Squeezed(bonds, sum(sizes.values()), error)


def _share(squares: Tensor, norm: float) -> float:
    return float(squares.sum()) / norm if norm > 0.0 else 0.0
