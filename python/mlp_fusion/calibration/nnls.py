"""Non-negative least squares from the normal equations."""

from __future__ import annotations

import torch
from torch import Tensor

#: Exchanges in blocks that may fail to leave fewer violated signs than ever before.
_PATIENCE = 5


def nnls(gram: Tensor, cross: Tensor, *, max_iter: int | None = None) -> Tensor:
    """The `c >= 0` that minimises `c^T gram c - 2 cross^T c`, the normal-equation form of `min |A c - b|`.

    Block principal pivoting: a set of coefficients is free, the others are 0; all that violate a sign are exchanged at
    once while that makes progress, in a few dozen Cholesky factorisations of at most `(n, n)`. Where it makes none
    (columns that depend on one another), an active-set method begins anew, which frees one coefficient at a time and
    never goes uphill: about one factorisation of the free ones for each of them.

    Args:
        gram: `(n, n)` symmetric positive semidefinite, float32 or float64; solved in float64, with a ridge of 1e-10 of
            its diagonal, so that coefficients of linearly dependent columns are shared and not arbitrary. A ridge of
            `n eps` in float32, whose rounding alone can leave a singular matrix indefinite.
        cross: `(n,)`.
        max_iter: most factorisations; `10 n + 100` when None.

    Returns:
        `(n,)` float64. A column of zeros has coefficient 0.

    Raises:
        RuntimeError: no optimum after `max_iter` factorisations; the matrix is not positive semidefinite.

    Source: Portugal, Judice & Vicente 1994; Kim & Park 2011 ("Fast nonnegative matrix factorization"); the active-set
    method is Lawson & Hanson's (1974).
    """
    n = len(cross)
    ridge = max(1e-10, n * torch.finfo(gram.dtype).eps)
    gram, cross = gram.double(), cross.double()
    size = gram.diagonal().clamp(min=0.0).sqrt()
    alive = size > 0
    inverse = torch.where(alive, 1.0 / size.where(alive, torch.ones_like(size)), 0.0)
    normal = gram * torch.outer(inverse, inverse)
    normal.diagonal().add_(ridge)
    target = cross * inverse
    most = 10 * n + 100 if max_iter is None else max_iter
    solution = _by_blocks(normal, target, alive, most)
    if solution is None:
        solution = _one_by_one(normal, target, alive, most)
    if solution is None:
        raise RuntimeError(
            f"non-negative least squares found no optimum for {n} coefficients: is the matrix semidefinite?"
        )
    return solution.clamp(min=0.0) * inverse


def _by_blocks(normal: Tensor, target: Tensor, alive: Tensor, most: int) -> Tensor | None:
    """Block principal pivoting; None where it stops making progress."""
    tolerance = _tolerance(target)
    free = torch.zeros_like(alive)
    best, patience = len(target) + 1, _PATIENCE
    for _ in range(most):
        solution = _solve(normal, target, free)
        gradient = normal @ solution - target
        wrong = torch.where(free, solution < -tolerance, (gradient < -tolerance) & alive)
        count = int(wrong.sum())
        if count == 0:
            return solution
        if count < best:
            best, patience = count, _PATIENCE
        elif patience > 0:
            patience -= 1
        else:
            break
        free = free ^ wrong
    return None


def _one_by_one(normal: Tensor, target: Tensor, alive: Tensor, most: int) -> Tensor | None:
    """The active-set method of Lawson and Hanson; None after `most` factorisations."""
    found = torch.zeros_like(target)
    free = torch.zeros_like(alive)
    refused = ~alive
    for _ in range(most):
        descent = (target - normal @ found).masked_fill(free | refused, 0.0)
        if not bool((descent > _tolerance(target)).any()):
            return found
        entering = int(descent.argmax())
        free[entering] = True
        solution = _solve(normal, target, free)
        if float(solution[entering]) <= 0.0:
            # By rounding alone: freeing it would not go downhill.
            free[entering], refused[entering] = False, True
            continue
        refused = ~alive
        while bool((leaving := free & (solution <= 0.0)).any()):
            # Towards the solution as far as all signs allow; who reaches 0 leaves.
            steps = torch.where(leaving, found / (found - solution), torch.inf)
            step = float(steps.min())
            found = found + step * (solution - found)
            free = free & ~(leaving & (steps <= step))
            found = found.where(free, torch.zeros_like(found))
            solution = _solve(normal, target, free)
        found = solution
    return None


def _tolerance(target: Tensor) -> float:
    return 1e-12 * float(target.abs().max()) if len(target) else 0.0


def _solve(normal: Tensor, target: Tensor, free: Tensor) -> Tensor:
    solution = torch.zeros_like(target)
    if bool(free.any()):
        factor = torch.linalg.cholesky(normal[free][:, free])
        solution[free] = torch.cholesky_solve(target[free].unsqueeze(1), factor).squeeze(1)
    return solution
