"""`ntk_compare`: how alike the tangent kernels of two blocks are, at sizes where neither fits into memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusion_kernels.library import Backend, operator
from fusion_kernels.ntk import cpu_backend
from fusion_kernels.ntk.block import Block, Kernel, Prepared, check_kernel, prepare
from fusion_kernels.ntk.gram import Reduce, _no_native, check_block_size, contraction_named
from fusion_kernels.ntk.jacobian import NTKOperator, exactly
from fusion_kernels.reference import ntk as reference

#: Rows up to which the sign kernel, which has no symmetry to save by, is compared exactly unless the caller says.
EXACT_SIGN_ROWS = 8192
#: Columns that are drawn for it above, and in how many groups, whose spread is the error.
SAMPLED_COLUMNS = 2048
_GROUPS = 8


def _fake(x1: Tensor, *_: object) -> Tensor:
    return x1.new_empty(4, dtype=torch.float64)


_NTK_SUMS = operator(
    "ntk_sums",
    "(Tensor x1, Tensor? x2, Tensor?[] a, float a_exponent, str a_activation, str[] a_params, Tensor?[] b, "
    "float b_exponent, str b_activation, str[] b_params, str kernel, Tensor? direction=None, int? block_size=None) "
    "-> Tensor",
    _fake,
)
_NTK_SUMS.register(Backend("cpu", cpu_backend.ntk_sums, ("cpu",), _no_native))
_NTK_SUMS.register(Backend("reference", reference.ntk_sums, ("cpu", "cuda")))


@dataclass(frozen=True)
class NTKComparison:
    """How alike the kernels A and B of two blocks are on N inputs.

    Attributes:
        rows: N.
        columns: how many columns of the kernels the norms are of: N, or fewer where they were drawn.
        relative_error: |A - B|_F / |A|_F; inf where only B is not 0, 0 where both are.
        standard_error: of `relative_error`, from the spread among groups of drawn columns; 0 with all columns.
        cosine: <A, B> / (|A| |B|); NaN where one is 0.
        alignment: the same of the centred kernels, HAH with H = 1 - 11'/N: linear CKA.
        trace: of A and of B.
        eigenvalues: the largest of A and of B, descending: (count,) float64 each. Empty for the sign kernel, which is
            not symmetric.
        eigenvalue_errors: bounds on the distance of each to an eigenvalue, up to rounding.
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

    Args:
        kernel: its size is N.
        count: how many to return, at most N.
        steps: dimension of the Krylov space, at most N; never fewer than `count`.
        seed: of the first vector.

    Returns:
        (count,) float64, descending, and bounds on the distance of each to an eigenvalue.

    Source: Parlett, "The Symmetric Eigenvalue Problem", 1980, chapters 11 and 13.
    """
    n = kernel.shape[0]
    count = min(count, n)
    steps = min(max(steps, count), n)
    if count == 0:
        return torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    q = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis = torch.zeros(steps, n, dtype=torch.float64)
    diagonal, beside = [], [0.0]
    basis[0] = q / q.norm()
    for k in range(steps):
        r = kernel.matvec(basis[k].to(kernel.device)).double().cpu()
        diagonal.append(float(basis[k] @ r))
        for _ in range(2):  # twice is enough
            r -= basis[: k + 1].T @ (basis[: k + 1] @ r)
        beside.append(float(r.norm()))
        if beside[-1] <= 1e-14 * max(map(abs, diagonal)):
            break
        if k + 1 < steps:
            basis[k + 1] = r / beside[-1]
    size = len(diagonal)
    tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    off = torch.tensor(beside[1:size], dtype=torch.float64)
    tridiagonal += torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(tridiagonal)
    found = torch.zeros(count, dtype=torch.float64)  # an exhausted Krylov space: the rest is 0 for its vector
    bounds = torch.full((count,), abs(beside[size]), dtype=torch.float64)
    taken = min(count, size)
    found[:taken] = values.flip(0)[:taken]
    bounds[:taken] = abs(beside[size]) * vectors[-1].abs().flip(0)[:taken]
    return found, bounds


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
    as much for the sign kernel. Row and column sums, for the centring, and the eigenvalues come from products with
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
    """
    check_kernel(kernel)
    check_block_size(block_size)
    if eigenvalues < 0:
        raise ValueError(f"eigenvalues must not be negative, got {eigenvalues}")
    chosen = _NTK_SUMS.select(backend, x.device)
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

    function = _NTK_SUMS.overload if backend == "auto" else chosen.function
    described = [item for p in both for item in ([*p.arguments(), p.metric], p.exponent, p.activation, p.parts)]

    def sums(second: Tensor | None) -> Tensor:
        return function(rows, second, *described, kernel, direction, block_size).cpu()

    if columns is None:
        drawn = torch.arange(n, device=rows.device)
        groups = sums(None)[None]
    else:
        drawn = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:columns].to(rows.device)
        groups = torch.stack([sums(rows[part]) for part in drawn.tensor_split(_GROUPS)])
    operators = [_operator(p, rows, named, direction, kernel) for p in both]
    total = groups.sum(0)
    centred = _centred(total, operators, rows, drawn)
    aa, ab, bb, dd = total.tolist()
    spectra = [
        largest_eigenvalues(k, eigenvalues if kernel == "gd" else 0, steps=2 * eigenvalues + 20, seed=seed)
        for k in operators
    ]
    traces = [float(k.diagonal().double().sum()) for k in operators]
    return NTKComparison(
        rows=n,
        columns=n if columns is None else columns,
        relative_error=_relative(dd, aa),
        standard_error=_standard_error(groups),
        cosine=_cosine(aa, ab, bb),
        alignment=_cosine(*centred),
        trace=(traces[0], traces[1]),
        eigenvalues=(spectra[0][0], spectra[1][0]),
        eigenvalue_errors=(spectra[0][1], spectra[1][1]),
    )


def _operator(prepared: Prepared, x: Tensor, named: str, direction: Tensor | None, kernel: str) -> NTKOperator:
    return exactly(lambda rows: NTKOperator(prepared, rows, named, direction, kernel))(x)


def _centred(sums: Tensor, operators: Sequence[NTKOperator], x: Tensor, drawn: Tensor) -> tuple[float, float, float]:
    """<A, A>, <A, B>, <B, B> of the centred kernels on the columns `drawn`, from those of the kernels.

    With r, c and mu the row means, column means and mean of a kernel and u the sums of its rows over the drawn columns,
    these are the sums of products of `A_nm - r_n - c_m + mu`, expanded: sums of squares, whichever columns are drawn.
    """
    n, m = len(x), len(drawn)
    indicator = torch.zeros_like(x[:, 0])
    indicator[drawn] = 1.0
    both = torch.stack([torch.ones_like(indicator), indicator], 1)
    products = [k.matmat(both).double().cpu() for k in operators]
    rows = [product[:, 0] / n for product in products]
    parts = [product[:, 1] for product in products]
    columns = [k.rmatvec(both[:, 0]).double().cpu()[drawn.cpu()] / n for k in operators]
    means = [float(r.mean()) for r in rows]
    result = []
    for value, (i, j) in zip(sums[:3].tolist(), ((0, 0), (0, 1), (1, 1)), strict=True):
        value -= float(rows[j] @ parts[i] + rows[i] @ parts[j])
        value += means[j] * float(parts[i].sum()) + means[i] * float(parts[j].sum())
        value += m * float(rows[i] @ rows[j]) - n * float(columns[i] @ columns[j]) - n * m * means[i] * means[j]
        result.append(value)
    return result[0], result[1], result[2]


def _relative(difference: float, norm: float) -> float:
    """The quotient's root; 0 where both are 0, inf where only the norm is."""
    if norm == 0.0:
        return 0.0 if difference == 0.0 else math.inf
    return math.sqrt(difference / norm)


def _cosine(aa: float, ab: float, bb: float) -> float:
    return ab / math.sqrt(aa * bb) if aa > 0 and bb > 0 else math.nan


def _standard_error(groups: Tensor) -> float:
    """Of the relative error, by the delta method on the groups' ratios |A - B|^2 / |A|^2."""
    if len(groups) == 1:
        return 0.0
    mean = groups.mean(0)
    if float(mean[0]) == 0.0 or float(mean[3]) == 0.0:
        return 0.0
    ratio = float(mean[3] / mean[0])
    residuals = (groups[:, 3] - ratio * groups[:, 0]) / mean[0]
    error = float(residuals.square().sum().sqrt()) / math.sqrt(len(groups) * (len(groups) - 1))
    return error / (2 * math.sqrt(ratio))
