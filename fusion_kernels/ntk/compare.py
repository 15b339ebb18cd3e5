"""`ntk_compare`: how alike the tangent kernels of two blocks are, at sizes where neither fits into memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusion_kernels.ffn import FFN
from fusion_kernels.gates import Gate
from fusion_kernels.library import Backend, check_name, operator
from fusion_kernels.ntk import cpu_backend, cuda_backend, triton_backend
from fusion_kernels.ntk import reference as reference
from fusion_kernels.ntk.block import Prepared, prepare
from fusion_kernels.ntk.gram import OF_CUDA, OF_TRITON, check_block_size, contraction_named
from fusion_kernels.ntk.jacobian import NTKOperator
from fusion_kernels.ntk.operators import exactly
from fusion_kernels.ntk.types import KERNELS, Block, Differentiated, Kernel, Reduce

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
    "(Tensor x1, Tensor? x2, "
    "Tensor?[] a, float a_exponent, str a_activation, float? a_limit, str a_clamp, float a_up_offset, str[] a_params, "
    "Tensor?[] b, float b_exponent, str b_activation, float? b_limit, str b_clamp, float b_up_offset, str[] b_params, "
    "str kernel, Tensor? direction=None, int? block_size=None) -> (Tensor, Tensor, Tensor)",
    _fake,
)


def _of_blocks(sums: Callable[..., Any]) -> Callable[..., Any]:
    """`sums` of two blocks as the operator calls it, with their members in seven arguments each."""
    run = exactly(sums)

    def flat(x1: Tensor, x2: Tensor | None, *given: Any) -> Any:
        blocks = [
            Differentiated(FFN.of(tensors, activation, exponent, Gate(*gate)), params, metric)
            for (*tensors, metric), exponent, activation, *gate, params in (given[:7], given[7:14])
        ]
        return run(x1, x2, *blocks, *given[14:])

    return flat


_NTK_SUMS.register(Backend("cpu", _of_blocks(cpu_backend.ntk_sums), ("cpu",), cpu_backend.why_not))
_NTK_SUMS.register(
    Backend("triton", _of_blocks(triton_backend.ntk_sums), ("cuda",), triton_backend.why_not, proof=OF_TRITON)
)
_NTK_SUMS.register(Backend("reference", _of_blocks(reference.ntk_sums), ("cpu", "cuda")))
# Behind the reference, as of `ntk_gram`.
_NTK_SUMS.register(Backend("cuda", _of_blocks(cuda_backend.ntk_sums), ("cuda",), cuda_backend.why_not, proof=OF_CUDA))


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
    check_name("kernel", kernel, KERNELS)
    check_block_size(block_size)
    if eigenvalues < 0:
        raise ValueError(f"eigenvalues must not be negative, got {eigenvalues}")
    chosen = _NTK_SUMS.select(backend, x.device)
    both = [prepare(block, {"x": x}, params, metric) for block, metric in zip((a, b), metrics, strict=True)]
    named, direction = _contraction(both[0], both[1], reduce)
    rows, n = both[0].rows["x"], len(x)
    if backend == "auto" and chosen.name == "triton" and rows.dtype == torch.float64:
        # As of `ntk_gram`: the reference's products may have tensor cores for float64.
        backend, chosen = "reference", _NTK_SUMS.backend("reference")
    function = _NTK_SUMS.overload if backend == "auto" else chosen.function
    columns = _columns(columns, n, kernel)
    described = [
        part for p in both for part in ([*p.ffn.tensors, p.metric], p.ffn.scale_exponent, *p.ffn.function, p.parts)
    ]

    def sums_with(second: Tensor | None) -> Any:
        return function(rows, second, *described, kernel, direction, block_size)

    sums = _summed(sums_with, rows, columns, seed)
    operators = [NTKOperator(p, rows, named, direction, kernel) for p in both]
    spectra = [
        largest_eigenvalues(k, eigenvalues if kernel == "gd" else 0, steps=2 * eigenvalues + 20, seed=seed)
        for k in operators
    ]
    traces = [float(k.diagonal().double().sum()) for k in operators]
    aa, ab, bb, dd = sums.total.tolist()
    return NTKComparison(
        rows=n,
        columns=n if columns is None else columns,
        relative_error=_relative(dd, aa),
        standard_error=0.0 if columns is None else _standard_error(sums.groups) * math.sqrt(1 - columns / n),
        cosine=_cosine(aa, ab, bb),
        alignment=_alignment(sums.total, sums.centred, both[0].dtype),
        trace=(traces[0], traces[1]),
        eigenvalues=(spectra[0][0], spectra[1][0]),
        eigenvalue_errors=(spectra[0][1], spectra[1][1]),
    )


def _contraction(a: Prepared, b: Prepared, reduce: Reduce) -> tuple[str, Tensor | None]:
    """`contraction_named` of both kernels.

    Raises:
        ValueError: as there; there are no rows, or the kernels cannot be compared.
    """
    if len(a.rows["x"]) == 0:
        raise ValueError("x must have at least one row to compare kernels on")
    if a.outputs != b.outputs:
        raise ValueError(f"the blocks must have as many outputs: {a.outputs} and {b.outputs}")
    if a.dtype != b.dtype:
        raise ValueError(f"the blocks are computed in {a.dtype} and {b.dtype}: convert one of them")
    named, direction = contraction_named(reduce, a.outputs, a.rows["x"])
    if named in ("full", "diagonal"):
        raise ValueError(f"reduce {named!r} has an axis of outputs: use 'trace', 'pseudo' or a vector to compare")
    return named, direction


def _columns(columns: int | None, n: int, kernel: str) -> int | None:
    """How many of n columns to draw, or None for all.

    Raises:
        ValueError: `columns` is too small for an error, or larger than n.
    """
    if columns is None:
        return SAMPLED_COLUMNS if kernel == "sign" and n > EXACT_SIGN_ROWS else None
    if not _GROUPS <= columns <= n:
        raise ValueError(f"columns must be between {_GROUPS} and the {n} inputs, got {columns}")
    return None if columns == n else columns


class _Sums(NamedTuple):
    """What the kernels are compared by: sums over groups of columns (groups, 4), over all, and of centred kernels."""

    groups: Tensor
    total: Tensor
    centred: list[float]


def _summed(sums: Callable[[Tensor | None], Any], rows: Tensor, columns: int | None, seed: int) -> _Sums:
    """The sums over all columns at once, or over groups of those that are drawn.

    Args:
        sums: of the kernels of `rows` with other rows, or with themselves for None: what `ntk_sums` returns.
    """
    parts: list[Tensor | None] = [None]
    if columns is not None:
        drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:columns].to(rows.device)
        parts = [rows[part] for part in drawn.tensor_split(_GROUPS)]
    found = [[t.cpu() for t in sums(part)] for part in parts]
    groups = torch.stack([group for group, _, _ in found])
    total = groups.sum(0)
    of_rows, of_columns = torch.stack([r for _, r, _ in found]).sum(0), torch.cat([c for _, _, c in found], 1)
    return _Sums(groups, total, _centred(total, of_rows, of_columns))


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
