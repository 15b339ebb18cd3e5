"""Non-negative least squares from the normal equations."""

from __future__ import annotations

import torch
from torch import Tensor


def nnls(gram: Tensor, cross: Tensor, *, max_iter: int | None = None) -> Tensor:
    """The `c >= 0` that minimises `c^T gram c - 2 cross^T c`, the normal-equation form of `min |A c - b|`.

    Block principal pivoting: a set of coefficients is free, the others are 0; all that violate a sign are exchanged at
    once while that makes progress, the last one alone otherwise, which ends at the optimum for every positive definite
    matrix. A few dozen Cholesky factorisations of at most `(n, n)`, whatever the number of zeros.

    Args:
        gram: `(n, n)` symmetric positive semidefinite, float32 or float64; solved in float64, with a ridge of 1e-10 of
            its diagonal, so that coefficients of linearly dependent columns are shared and not arbitrary.
        cross: `(n,)`.
        max_iter: most exchanges; `10 n + 100` when None.

    Returns:
        `(n,)` float64. A column of zeros has coefficient 0.

    Raises:
        RuntimeError: no optimum after `max_iter` exchanges; the matrix is not positive semidefinite.

    Source: Portugal, Judice & Vicente 1994; Kim & Park 2011 ("Fast nonnegative matrix factorization").
    """
    gram, cross = gram.double(), cross.double()
    n = len(cross)
    size = gram.diagonal().clamp(min=0.0).sqrt()
    alive = size > 0
    inverse = torch.where(alive, 1.0 / size.where(alive, torch.ones_like(size)), 0.0)
    normal = gram * torch.outer(inverse, inverse)
    normal.diagonal().add_(1e-10)
    target = cross * inverse
    tolerance = 1e-12 * float(target.abs().max()) if n else 0.0
    free = torch.zeros(n, dtype=torch.bool, device=gram.device)
    best, patience = n + 1, 3
    for _ in range(10 * n + 100 if max_iter is None else max_iter):
        solution = _solve(normal, target, free)
        gradient = normal @ solution - target
        wrong = torch.where(free, solution < -tolerance, (gradient < -tolerance) & alive)
        count = int(wrong.sum())
        if count == 0:
            return solution.clamp(min=0.0) * inverse
        if count < best:
            best, patience = count, 3
        elif patience > 0:
            patience -= 1
        else:
            last = int(wrong.nonzero()[-1])
            wrong = torch.zeros_like(wrong)
            wrong[last] = True
        free = free ^ wrong
    raise RuntimeError(f"non-negative least squares found no optimum for {n} coefficients: is the matrix semidefinite?")


def _solve(normal: Tensor, target: Tensor, free: Tensor) -> Tensor:
    solution = torch.zeros_like(target)
    if bool(free.any()):
        factor = torch.linalg.cholesky(normal[free][:, free])
        solution[free] = torch.cholesky_solve(target[free].unsqueeze(1), factor).squeeze(1)
    return solution
