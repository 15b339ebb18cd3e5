"""`ntk_compare`: how alike the tangent kernels of two blocks are, at sizes where neither fits into memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusion_kernels.library import Backend, operator
from fusion_kernels.ntk import cpu_backend, cuda_backend
from fusion_kernels.ntk import reference as reference
from fusion_kernels.ntk.block import Block, Kernel, check_kernel, prepare
from fusion_kernels.ntk.gram import Reduce, check_block_size, contraction_named, no_native
from fusion_kernels.ntk.jacobian import NTKOperator
from fusion_kernels.ntk.operators import exactly, function_named
from fusion_kernels.ntk.reference import FFN, Differentiated

#: Rows up to which the sign kernel, which has no symmetry to save by, is compared exactly unless the caller says.
EXACT_SIGN_ROWS = 8192
#: Columns that are drawn for it above, and in how many groups, whose spread is the error.
SAMPLED_COLUMNS = 2048
_GROUPS = 8


def _fake(x1: Tensor, x2: Tensor | None, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    columns = len(x1 if x2 is None else x2)
    return tuple(x1.new_empty(shape, dtype=torch.float64) for shape in ((4,), (2, len(x1)), (2, columns)))  # type: ignore[return-value]


_NTK_SUMS = operator(
    "ntk_sums",
    "(Tensor x1, Tensor? x2, Tensor?[] a, float a_exponent, str a_activation, str[] a_params, Tensor?[] b, "
    "float b_exponent, str b_activation, str[] b_params, str kernel, Tensor? direction=None, int? block_size=None) "
    "-> (Tensor, Tensor, Tensor)",
    _fake,
)


def _of_blocks(sums: Callable[..., Any]) -> Callable[..., Any]:
    """`sums` of two blocks as the operator calls it, with their members in four arguments each."""
    run = exactly(sums)

    def flat(x1: Tensor, x2: Tensor | None, *given: Any) -> Any:
        blocks = [
            Differentiated(FFN(*tensors, exponent, activation), params, metric)  # type: ignore[call-arg]
            for (*tensors, metric), exponent, activation, params in (given[:4], given[4:8])
        ]
        return run(x1, x2, *blocks, *given[8:])

    return flat


_NTK_SUMS.register(Backend("cpu", _of_blocks(cpu_backend.ntk_sums), ("cpu",), no_native))
_NTK_SUMS.register(Backend("reference", _of_blocks(reference.ntk_sums), ("cpu", "cuda")))
# Behind the reference, as of `ntk_gram`.
_NTK_SUMS.register(Backend("cuda", _of_blocks(cuda_backend.ntk_sums), ("cuda",), cuda_backend.why_not))


@dataclass(frozen=True)
class NTKComparison:
    """How alike the kernels A and B of two blocks are on N inputs.

    Attributes:
        rows: N.
        columns: how many columns of the kernels the norms are of: N, or fewer where they were drawn.
        relative_error: |A - B|_F / |A|_F; inf where only B is not 0, 0 where both are.
        standard_error: of `relative_error`, from the spread among groups of drawn columns, which are without
            replacement: 0 with all columns.
        cosine: <A, B> / (|A| |B|); NaN where one is 0.
        alignment: the same of the centred kernels, HAH with H = 1 - 11'/N: linear CKA. NaN where one is constant up to
            rounding. Of drawn columns, it is centred over those.
        trace: of A and of B.
        eigenvalues: the largest of A and of B, descending: (count,) float64 each. Empty for the sign kernel, which is
            not symmetric.
        eigenvalue_errors: bounds on the distance of each to an eigenvalue, up to rounding.

    Examples:
        >>> block = mlp_fusion.FusedMLP.from_mlp(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
        >>> found = fusion_kernels.ntk_compare(block, block, torch.randn(20, 8))
        >>> found.rows, found.relative_error < 1e-6, found.standard_error
        (20, True, 0.0)
    """

    rows: int
    columns: int
    relative_error: float
    standard_error: float
    cosine: float
    alignment: float
    trace: tuple[float, float]
    eigenvalues: tuple[Tensor, Tensor]
    eigenvalue_errors: tuple[Tensor, Tensor]


def largest_eigenvalues(kernel: NTKOperator, count: int, *, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues of a symmetric operator, by Lanczos with full reorthogonalization.

    Where the Krylov space is exhausted early, it goes on from a random vector orthogonal to it, so that equal
    eigenvalues are found as often as there are steps for.

    Args:
        kernel: its size is N.
        count: how many to return, at most N.
        steps: dimension of the Krylov space, at most N; never fewer than `count`.
        seed: of the random vectors.

    Returns:
        (count,) float64, descending, and bounds on the distance of each to an eigenvalue.

    Source: Parlett, "The Symmetric Eigenvalue Problem", 1980, chapters 11 and 13.
    """
    n = kernel.shape[0]
    count = min(count, n)
    steps = min(max(steps, count), n)
    if count == 0:
        return torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(n, generator=generator, dtype=torch.float64)
    basis = torch.zeros(steps, n, dtype=torch.float64)
    diagonal, beside = [], [0.0]
    basis[0] = q / q.norm()
    for k in range(steps):
        r = kernel.matvec(basis[k].to(kernel.device)).double().cpu()
        diagonal.append(float(basis[k] @ r))
        for _ in range(2):  # twice is enough
            r -= basis[: k + 1].T @ (basis[: k + 1] @ r)
        beside.append(float(r.norm()))
        if k + 1 == steps:
            break
        if beside[-1] <= 1e-14 * max(map(abs, diagonal)):
            # An invariant subspace: the rest of the space, other copies of these eigenvalues included, is searched
            # from another vector.
            beside[-1] = 0.0
            r = torch.randn(n, generator=generator, dtype=torch.float64)
            for _ in range(2):
                r -= basis[: k + 1].T @ (basis[: k + 1] @ r)
        basis[k + 1] = r / r.norm()
    tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    off = torch.tensor(beside[1:-1], dtype=torch.float64)
    tridiagonal += torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(tridiagonal)
    return values.flip(0)[:count], beside[-1] * vectors[-1].abs().flip(0)[:count]


def ntk_compare(
    a: Block,
    b: Block,
    x: Tensor,
    reduce: Reduce = "trace",
    *,
    params: str | Sequence[str] | None = None,
    metrics: tuple[Tensor | None, Tensor | None] = (None, None),
    kernel: Kernel = "gd",
    columns: int | None = None,
    eigenvalues: int = 8,
    seed: int = 0,
    block_size: int | None = None,
    backend: str = "auto",
) -> NTKComparison:
    """Compare the tangent kernels of two blocks on the same inputs, without storing either.

    Tiles of both kernels are computed side by side and summed in float64, so that memory is O(N (neurons of a and b))
    whatever N; the product of inputs is shared. The work is N^2 (d + 2 neurons of a + 2 neurons of b) operations, twice
    as much for the sign kernel. Row and column sums, for the centring, are of the same tiles: inputs with a large mean,
    whose kernels are nearly constant, lose no more digits than the kernels did. The eigenvalues come from products with
    vectors, linear in N.

    Args:
        a: the block to compare with; its kernel is the denominator.
        b: the other, with the same d and outputs; its width, scale and parameterization may differ.
        x: (N, d), N at least 1.
        reduce: `"trace"`, `"pseudo"` or a vector of outputs.
        params: the parts of both, as in `ntk_gram`.
        metrics: (neurons,) of each block, or None.
        kernel: `"gd"` or `"sign"`.
        columns: how many columns to draw, without replacement, for the norms and products of the kernels; the error of
            doing so is in `standard_error`. None takes all, but 2,048 of the sign kernel of more than 8,192 inputs.
        eigenvalues: how many of the largest to find, by 2 `eigenvalues` + 20 steps of Lanczos.
        seed: of the drawn columns and of the first Lanczos vector.
        block_size, backend: as in `ntk_gram`.

    Raises:
        ValueError: as in `ntk_gram`; no inputs; blocks of different d, outputs or dtypes; columns outside 8..N.
        BackendUnavailableError: `backend` cannot run here.

    Source for the alignment: Cortes et al., "Algorithms for Learning Kernels Based on Centered Alignment", 2012;
    Kornblith et al., "Similarity of Neural Network Representations Revisited", 2019, arXiv 1905.00414.

    Examples:
        >>> block = mlp_fusion.FusedMLP.from_mlp(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
        >>> wide = block.as_bundle()
        >>> labels = fusion_kernels.kmeans(wide.vectors(), 12).labels
        >>> found = fusion_kernels.ntk_compare(wide, wide.reduce(labels), torch.randn(20, 8))
        >>> found.rows, found.relative_error > 0
        (20, True)
    """
    check_kernel(kernel)
    check_block_size(block_size)
    if eigenvalues < 0:
        raise ValueError(f"eigenvalues must not be negative, got {eigenvalues}")
    function = function_named(_NTK_SUMS, backend, x.device)
    both = [prepare(block, {"x": x}, params, metric) for block, metric in zip((a, b), metrics, strict=True)]
    n = len(x)
    if n == 0:
        raise ValueError("x must have at least one row to compare kernels on")
    if both[0].outputs != both[1].outputs:
        raise ValueError(f"the blocks must have as many outputs: {both[0].outputs} and {both[1].outputs}")
    if both[0].dtype != both[1].dtype:
        raise ValueError(f"the blocks are computed in {both[0].dtype} and {both[1].dtype}: convert one of them")
    rows = both[0].rows["x"]
    named, direction = contraction_named(reduce, both[0].outputs, rows)
    if named in ("full", "diagonal"):
        raise ValueError(f"reduce {named!r} has an axis of outputs: use 'trace', 'pseudo' or a vector to compare")
    if columns is None and kernel == "sign" and n > EXACT_SIGN_ROWS:
        columns = SAMPLED_COLUMNS
    if columns is not None and not _GROUPS <= columns <= n:
        raise ValueError(f"columns must be between {_GROUPS} and the {n} inputs, got {columns}")
    if columns == n:
        columns = None

    described = [item for p in both for item in ([*p.arguments(), p.metric], p.exponent, p.activation, p.parts)]

    def sums(second: Tensor | None) -> list[Tensor]:
        return [t.cpu() for t in function(rows, second, *described, kernel, direction, block_size)]

    if columns is None:
        parts: list[Tensor | None] = [None]
    else:
        drawn = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:columns].to(rows.device)
        parts = [rows[part] for part in drawn.tensor_split(_GROUPS)]
    found = [sums(part) for part in parts]
    groups = torch.stack([group for group, _, _ in found])
    total = groups.sum(0)
    centred = _centred(total, torch.stack([r for _, r, _ in found]).sum(0), torch.cat([c for _, _, c in found], 1))
    aa, ab, bb, dd = total.tolist()
    operators = [NTKOperator(p, rows, named, direction, kernel) for p in both]
    spectra = [
        largest_eigenvalues(k, eigenvalues if kernel == "gd" else 0, steps=2 * eigenvalues + 20, seed=seed)
        for k in operators
    ]
    traces = [float(k.diagonal().double().sum()) for k in operators]
    return NTKComparison(
        rows=n,
        columns=n if columns is None else columns,
        relative_error=_relative(dd, aa),
        standard_error=0.0 if columns is None else _standard_error(groups) * math.sqrt(1 - columns / n),
        cosine=_cosine(aa, ab, bb),
        alignment=_alignment(total, centred, both[0].dtype),
        trace=(traces[0], traces[1]),
        eigenvalues=(spectra[0][0], spectra[1][0]),
        eigenvalue_errors=(spectra[0][1], spectra[1][1]),
    )


def _centred(sums: Tensor, rows: Tensor, columns: Tensor) -> list[float]:
    """<A, A>, <A, B>, <B, B> of the centred kernels HAH (N, M), from those of the kernels and their sums.

    Args:
        sums: (4,), as `ntk_sums` returns them.
        rows, columns: (2, N) and (2, M), the sums of the rows and of the columns of A and of B.
    """
    n, m = rows.shape[1], columns.shape[1]
    result = []
    for value, i, j in zip(sums.tolist(), (0, 0, 1), (0, 1, 1), strict=False):
        of_means = float(rows[i].sum() * rows[j].sum()) / (n * m)
        result.append(value - float(rows[i] @ rows[j]) / m - float(columns[i] @ columns[j]) / n + of_means)
    return result


def _alignment(sums: Tensor, centred: Sequence[float], dtype: torch.dtype) -> float:
    """The cosine of the centred kernels; NaN where one is what rounding leaves of a constant."""
    aa, _, bb, _ = sums.tolist()
    # Values are rounded to the dtype, their sums to float64.
    lost = max((8 * torch.finfo(dtype).eps) ** 2, 64 * torch.finfo(torch.float64).eps)
    return _cosine(*centred) if centred[0] > lost * aa and centred[2] > lost * bb else math.nan


def _relative(difference: float, norm: float) -> float:
    """The quotient's root; 0 where both are 0, inf where only the norm is."""
    if norm == 0.0:
        return 0.0 if difference == 0.0 else math.inf
    return math.sqrt(difference / norm)


def _cosine(aa: float, ab: float, bb: float) -> float:
    return ab / math.sqrt(aa * bb) if aa > 0 and bb > 0 else math.nan


def _standard_error(groups: Tensor) -> float:
    """Of the relative error, by the delta method on the groups' ratios |A - B|^2 / |A|^2, of drawn columns."""
    mean = groups.mean(0)
    if float(mean[0]) == 0.0 or float(mean[3]) == 0.0:
        return 0.0
    ratio = float(mean[3] / mean[0])
    residuals = (groups[:, 3] - ratio * groups[:, 0]) / mean[0]
    error = float(residuals.square().sum().sqrt()) / math.sqrt(len(groups) * (len(groups) - 1))
    return error / (2 * math.sqrt(ratio))
