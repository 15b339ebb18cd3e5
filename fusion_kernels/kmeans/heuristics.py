"""Which form of k-means costs less: on the Gram matrix of the points, or on the points themselves.

Pure functions of shapes and options, so that the choice can be tested anywhere. The unit is a multiply-add.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

#: Lloyd iterations, and assignments' worth of clusters that change in them: most clusters settle after the first few.
LLOYD_ITERATIONS = 15
CHANGED_SWEEPS = 2.5
#: The same for the rounds of Hartigan moves that follow.
HARTIGAN_SWEEPS = 6
#: What reading an entry of a matrix for one multiply-add costs beside a multiply-add of a matrix product: the sweeps
#: wait for memory, products do not.
MEMORY_COST = 20
#: What one call of a tensor operation costs, and how many the direct form makes for a seed and for an iteration.
CALL_COST = 1e5
CALLS_PER_SEED = 20
CALLS_PER_ITERATION = 60


@dataclass(frozen=True)
class Shape:
    """One k-means problem and how it is to be solved.

    Attributes:
        n: points of positive weight.
        d: columns.
        k: clusters.
        n_init: runs.
        seeding: `"k-means++"`, `"random"`, or `"centroids"` or `"labels"` where these are given.
        hartigan: whether Hartigan moves follow Lloyd's iteration.
        max_iter: most Lloyd iterations, and most rounds of moves.
    """

    n: int
    d: int
    k: int
    n_init: int
    seeding: str
    hartigan: bool
    max_iter: int


def gram_bytes(n: int, k: int, element_size: int, runs: int) -> int:
    """Bytes of the Gram matrix of n points and of what each of `runs` runs at a time computes from it.

    Those are K rows of distances and, in float64, sums of rows of at most n / 24 large clusters.
    """
    return (n + 32) * (n + runs * k) * element_size + runs * n * n // 3


def gram_cost(shape: Shape) -> float:
    """Cost on the Gram matrix: half of a product once, and then nothing that depends on d."""
    n, k = shape.n, shape.k
    once = 0.5 * n * n * shape.d
    if shape.seeding == "centroids":
        once += n * k * shape.d
    iterations = min(LLOYD_ITERATIONS, shape.max_iter)
    run = CHANGED_SWEEPS * n * n + iterations * n * k
    if shape.hartigan and shape.max_iter > 0:
        run += HARTIGAN_SWEEPS * n * n
    if shape.seeding == "k-means++":
        run += k * trials(k) * n
    return once + shape.n_init * run * MEMORY_COST


def direct_cost(shape: Shape) -> float:
    """Cost on the points: a product with the centroids per iteration, and one with the candidates per seed."""
    n, k, d = shape.n, shape.k, shape.d
    # One more assignment, for the centroids of the last iteration, and the means of every one.
    iterations = 1 + min(LLOYD_ITERATIONS, shape.max_iter)
    run = float(iterations * (n * k * d + n * d * MEMORY_COST))
    if shape.hartigan and shape.max_iter > 0:
        run += HARTIGAN_SWEEPS * n * k * d
    if shape.seeding == "k-means++":
        # A handful of candidates at a time: the points are read from memory for them.
        run += k * (n * d * MEMORY_COST + CALLS_PER_SEED * CALL_COST)
    return shape.n_init * (run + iterations * CALLS_PER_ITERATION * CALL_COST)


def trials(k: int) -> int:
    """Candidates of one step of greedy k-means++."""
    return 2 + int(math.log(k))


def prefers_gram(shape: Shape) -> bool:
    """Whether the Gram matrix is the cheaper way, memory aside."""
    return gram_cost(shape) <= direct_cost(shape)
