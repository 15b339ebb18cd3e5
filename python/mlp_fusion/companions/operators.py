"""Matrix product operators: a matrix as a chain of small tensors, cut where its spectra say that it costs least.

With rows and columns factored, `I = i_1 ... i_n` and `J = j_1 ... j_n`,

    W[i_1 ... i_n, j_1 ... j_n] = T_1[i_1, j_1] T_2[i_2, j_2] ... T_n[i_n, j_n],        T_k: (d_{k-1}, i_k, j_k, d_k)

and the singular values of bond k are those of the unfolding of W between its first k pairs of indices and the rest.

The form here is the mixed-canonical one: tensors before the central one have orthonormal columns as
`(d_{k-1} i_k j_k, d_k)`, those behind it orthonormal rows, and every bond stands in the basis of its singular vectors.
Two sweeps of thin decompositions towards the centre find it. Up to one diagonal matrix per bond it is the gauge of the
paper below, so that leading slices of the tensors are the same operators; that gauge divides by square roots of
singular values, and this one by nothing.

Slices of all bonds at once are projections one after the other, each orthogonal to what the one before took away:

    |W - sliced W|_F^2 <= sum over bonds k of  eps_k^2,        eps_k^2 = sum of the squares that bond k gives up

so that every truncation's error is bounded beforehand, without another decomposition.

Source: Gao et al., "Compressing deep neural networks by matrix product operators" (2020, arXiv 1904.06194); Liu et al.,
"Enabling lightweight fine-tuning for pre-trained language model compression based on matrix product operators" (ACL
2021, arXiv 2106.02205); the bound is that of the tensor-train SVD (Oseledets 2011).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlp_fusion.errors import InputError

#: Tensors of a chain, unless somebody says otherwise: the paper's.
LENGTH = 5
#: Rows and columns that may be added to a matrix for it to be factored evenly, as a share.
_PADDING = 0.02
#: Sum of factors that pass for even, in units of that of equal ones.
_UNEVEN = 1.1

#: Factors of the rows, and of the columns.
Shapes = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class MatrixProductOperator:
    """A matrix as a chain of tensors.

    Attributes:
        tensors: `(d_{k-1}, i_k, j_k, d_k)` each, with `d_0 = d_n = 1`.
        spectra: per bond, `(d_k,)` float64 singular values, descending, of the matrix that was decomposed; those behind
            the bond's size are what truncations gave up.
        shape: rows and columns of the matrix; the factors' products may be larger, what is beyond is zero.

    Examples:
        >>> chain = mlp_fusion.mpo_decompose(torch.eye(6), ((2, 3), (3, 2)))
        >>> chain.bonds, chain.numel
        ((6,), 72)
        >>> bool(chain.truncated(2).error_bound(2) == chain.discarded(2).norm())
        True
    """

    tensors: tuple[Tensor, ...]
    spectra: tuple[Tensor, ...]
    shape: tuple[int, int]

    @property
    def shapes(self) -> Shapes:
        """The factors of rows and columns."""
        return tuple(t.shape[1] for t in self.tensors), tuple(t.shape[2] for t in self.tensors)

    @property
    def bonds(self) -> tuple[int, ...]:
        """Sizes of the bonds between the tensors."""
        return tuple(t.shape[3] for t in self.tensors[:-1])

    @property
    def central(self) -> int:
        """Which tensor holds the norm of the matrix: the one in the middle."""
        return centre(len(self.tensors))

    @property
    def numel(self) -> int:
        """Numbers in all tensors."""
        return sum(t.numel() for t in self.tensors)

    def matrix(self) -> Tensor:
        """`(rows, columns)`: the matrix that the chain stands for."""
        return chain_matrix(self.tensors, self.shape)

    def truncated(self, bonds: int | Sequence[int]) -> MatrixProductOperator:
        """The chain with bonds of at most these sizes: slices of its tensors, no new decomposition.

        Args:
            bonds: the most of every bond, or of each.

        Raises:
            InputError: a size is less than 1, or there is not one per bond.
        """
        sizes = self._sizes(bonds)
        ends = [1, *sizes, 1]
        tensors = (t[:before, :, :, :after] for t, before, after in zip(self.tensors, ends, ends[1:], strict=False))
        return MatrixProductOperator(tuple(t.clone() for t in tensors), self.spectra, self.shape)

    def discarded(self, bonds: int | Sequence[int]) -> Tensor:
        """`(n - 1,)` float64: per bond, the norm `eps_k` of the singular values that those sizes give up."""
        sizes = self._sizes(bonds)
        return torch.stack([s[size:].square().sum().sqrt() for s, size in zip(self.spectra, sizes, strict=True)])

    def error_bound(self, bonds: int | Sequence[int]) -> float:
        """What the Frobenius error of those sizes is at most, of the matrix that was decomposed."""
        return float(torch.linalg.vector_norm(self.discarded(bonds)))

    def entropies(self) -> Tensor:
        """`(n - 1,)` float64: the entanglement entropy of each bond, of its squared singular values as shares.

        Between 0 and the logarithm of the bond's full size: how much its two sides have in common. 0 of a zero matrix.
        """
        found = []
        for spectrum in self.spectra:
            total = spectrum.square().sum()
            shares = spectrum.square() / total.where(total > 0, torch.ones_like(total))
            found.append(torch.special.entr(shares).sum())
        return torch.stack(found)

    def _sizes(self, bonds: int | Sequence[int]) -> list[int]:
        asked = [bonds] * len(self.spectra) if isinstance(bonds, int) else list(bonds)
        if len(asked) != len(self.spectra) or any(size < 1 for size in asked):
            raise InputError(f"bonds {asked}: give {len(self.spectra)} sizes of 1 or more")
        return [min(size, full) for size, full in zip(asked, self.bonds, strict=True)]


def mpo_decompose(weight: Tensor, shapes: Shapes | None = None, *, length: int = LENGTH) -> MatrixProductOperator:
    """Decompose a matrix into a chain of tensors, exactly; see this module's docstring for its form.

    Args:
        weight: `(rows, columns)`, any floating-point dtype.
        shapes: factors of rows and of columns, as many of each; their products may exceed the matrix, which is then
            padded by zeros. None: :func:`choose_shapes`.
        length: tensors, where shapes are chosen.

    The work is done in float64; tensors come in the weight's dtype, float32 at least, spectra in float64. Time: one
    thin decomposition per bond, `O(rows columns d)` with d the smaller side of the unfolding.

    Raises:
        InputError: the weight is no matrix of finite numbers, or the shapes do not fit it.

    Examples:
        >>> weight = torch.randn(768, 768, generator=torch.Generator().manual_seed(0))
        >>> chain = mlp_fusion.mpo_decompose(weight)
        >>> chain.shapes, chain.bonds
        (((3, 4, 4, 4, 4), (4, 4, 4, 4, 3)), (12, 192, 192, 12))
        >>> small = chain.truncated(64)
        >>> bool((weight - small.matrix()).norm() <= chain.error_bound(64) * (1 + 1e-6))
        True
    """
    if weight.ndim != 2 or not weight.dtype.is_floating_point or not weight.numel():
        raise InputError(f"a {tuple(weight.shape)} {weight.dtype} tensor: only matrices of numbers are decomposed")
    if not bool(weight.isfinite().all()):
        raise InputError("the matrix holds infinite numbers or NaN: it cannot be decomposed")
    rows, columns = choose_shapes(*weight.shape, length=length) if shapes is None else checked_shapes(weight, shapes)
    n, precise = len(rows), weight.dtype == torch.float64
    remainder = _interleaved(weight.detach().double(), rows, columns)
    sides = [i * j for i, j in zip(rows, columns, strict=True)]
    before: list[Tensor] = []
    behind: list[Tensor] = []
    spectra: dict[int, Tensor] = {}
    # Both sweeps end at the central tensor, which is what they leave.
    left = right = 1
    for k in range(centre(n)):
        basis, spectra[k], remainder = _left_basis(remainder.reshape(left * sides[k], -1), precise)
        before.append(basis.reshape(left, rows[k], columns[k], -1))
        left = basis.shape[1]
    for k in reversed(range(centre(n) + 1, n)):
        basis, spectra[k - 1], remainder = _left_basis(remainder.reshape(-1, sides[k] * right).mT, precise)
        behind.insert(0, basis.mT.reshape(-1, rows[k], columns[k], right))
        right, remainder = basis.shape[1], remainder.mT
    central = remainder.reshape(left, rows[centre(n)], columns[centre(n)], right)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    tensors = tuple(t.to(dtype).contiguous() for t in (*before, central, *behind))
    return MatrixProductOperator(tensors, tuple(spectra[k] for k in range(n - 1)), (len(weight), weight.shape[1]))


def _left_basis(matrix: Tensor, precise: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Left singular vectors `(m, r)`, singular values `(r,)` and the rest `(r, n)` of an `(m, n)` matrix.

    Here r is the smaller of m and n. Of a wide matrix by way of something small that has the same left vectors: its
    triangular factor, or, unless it is to be `precise`, its product with itself. The basis is orthonormal and complete
    either way, so that nothing of the matrix is lost; by the product, vectors of values a hundred-millionth as large as
    the largest are not told apart, which single precision does not tell apart either.
    """
    m, n = matrix.shape
    if n < m:
        basis, values, others = torch.linalg.svd(matrix, full_matrices=False)
        return basis, values, values.unsqueeze(1) * others
    if precise:
        triangle = torch.linalg.qr(matrix.mT, mode="r")[1].mT
        basis, values, _ = torch.linalg.svd(triangle, full_matrices=False)
        return basis, values, basis.mT @ matrix
    basis = torch.linalg.eigh(matrix @ matrix.mT)[1]
    rest = basis.mT @ matrix
    values, order = torch.linalg.vector_norm(rest, dim=1).sort(descending=True)
    return basis[:, order], values, rest[order]


def centre(length: int) -> int:
    """Number of the central tensor of a chain."""
    return length // 2


def _interleaved(weight: Tensor, rows: Sequence[int], columns: Sequence[int]) -> Tensor:
    """The padded matrix with its indices in the order `i_1 j_1 i_2 j_2 ...`, flat."""
    more = math.prod(columns) - weight.shape[1], math.prod(rows) - len(weight)
    padded = torch.nn.functional.pad(weight, (0, more[0], 0, more[1]))
    n = len(rows)
    order = [axis for k in range(n) for axis in (k, n + k)]
    return padded.reshape(*rows, *columns).permute(order).reshape(-1)


def chain_matrix(tensors: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
    """`shape`: the matrix of a chain. Multiplied from both ends towards the centre, whose tensor is largest."""
    left, middle, right = chain_sides(tensors)
    return unfolded(((left @ middle.flatten(1)).reshape(-1, len(right)) @ right), tensors, shape)


def chain_sides(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors before the central one as a `(..., d)` matrix, the central one, those behind it as a `(d', ...)`."""
    c = centre(len(tensors))
    left = tensors[0].new_ones(1, 1)
    for t in tensors[:c]:
        left = (left @ t.flatten(1)).reshape(-1, t.shape[3])
    right = left.new_ones(1, 1)
    for t in reversed(tensors[c + 1 :]):
        right = (t.flatten(0, 2) @ right).reshape(len(t), -1)
    return left, tensors[c], right


def unfolded(whole: Tensor, tensors: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
    """`shape`: a chain's matrix out of what has its indices in the order `i_1 j_1 i_2 j_2 ...`."""
    rows, columns = [t.shape[1] for t in tensors], [t.shape[2] for t in tensors]
    sides = [side for pair in zip(rows, columns, strict=True) for side in pair]
    order = [*range(0, len(sides), 2), *range(1, len(sides), 2)]
    padded = whole.reshape(sides).permute(order).reshape(math.prod(rows), math.prod(columns))
    return padded[: shape[0], : shape[1]]


def chain_apply(tensors: Sequence[Tensor], x: Tensor, rows: int) -> Tensor:
    """`(tokens, rows)`: a chain's matrix times every row of `x (tokens, columns)`, through the tensors."""
    padded = torch.nn.functional.pad(x, (0, math.prod(t.shape[2] for t in tensors) - x.shape[1]))
    # (tokens, outputs so far, bond, columns to come): each tensor takes its column and gives its row.
    state = padded.reshape(len(x), 1, 1, -1)
    for t in tensors:
        before, _, j, after = t.shape
        state = state.reshape(len(x), -1, before, j, state.shape[3] // j)
        state = torch.einsum("toajc,aijb->toibc", state, t).reshape(len(x), -1, after, state.shape[4])
    return state.reshape(len(x), -1)[:, :rows]


def rebuilding_cost(shapes: Shapes, bonds: Sequence[int]) -> int:
    """Multiply-adds of :func:`chain_matrix`."""
    sides, ends = [i * j for i, j in zip(*shapes, strict=True)], [1, *bonds, 1]
    c, total, left, right = centre(len(sides)), 0, 1, 1
    for k in range(c):
        total += left * ends[k] * sides[k] * ends[k + 1]
        left *= sides[k]
    for k in reversed(range(c + 1, len(sides))):
        total += ends[k] * sides[k] * ends[k + 1] * right
        right *= sides[k]
    within = left * sides[c] * ends[c + 1]
    return total + within * ends[c] + within * right


def applying_cost(shapes: Shapes, bonds: Sequence[int]) -> int:
    """Multiply-adds of :func:`chain_apply` per token."""
    (rows, columns), ends = shapes, [1, *bonds, 1]
    total, done, to_come = 0, 1, math.prod(columns)
    for k, (i, j) in enumerate(zip(rows, columns, strict=True)):
        to_come //= j
        total += done * ends[k] * j * to_come * i * ends[k + 1]
        done *= i
    return total


def rebuilding_is_cheaper(
    tokens: int, shape: tuple[int, int], shapes: Shapes, bonds: Sequence[int], *, made: bool = False
) -> bool:
    """Whether to multiply by the matrix takes no more multiply-adds than to go through the tensors.

    Args:
        tokens: rows that are multiplied.
        shape: of the matrix.
        shapes, bonds: of its chain.
        made: whether the matrix is there already.
    """
    whole = tokens * shape[0] * shape[1] + (0 if made else rebuilding_cost(shapes, bonds))
    return whole <= tokens * applying_cost(shapes, bonds)


def checked_shapes(weight: Tensor, shapes: Shapes) -> Shapes:
    """`shapes`, if they are factors for `weight`.

    Raises:
        InputError: they are not.
    """
    rows, columns = (tuple(side) for side in shapes)
    if len(rows) != len(columns) or not rows or min(*rows, *columns) < 1:
        raise InputError(f"shapes {rows} and {columns}: give as many factors of the rows as of the columns")
    if math.prod(rows) < len(weight) or math.prod(columns) < weight.shape[1]:
        raise InputError(
            f"shapes {rows} and {columns} make a matrix of {math.prod(rows)} x {math.prod(columns)}: too small for "
            f"one of {len(weight)} x {weight.shape[1]}"
        )
    return rows, columns


def choose_shapes(rows: int, columns: int, *, length: int = LENGTH) -> Shapes:
    """Factors for a matrix: even ones, with at most 2 % of padding where it takes that, the large ones in the middle.

    Raises:
        InputError: a side or the length is less than 1.

    Examples:
        >>> from mlp_fusion.companions.operators import choose_shapes
        >>> choose_shapes(768, 3072)
        ((3, 4, 4, 4, 4), (4, 6, 8, 4, 4))
    """
    if min(rows, columns, length) < 1:
        raise InputError(f"{rows} rows, {columns} columns, {length} tensors: give 1 or more of each")
    return _arranged(even_factors(rows, length)), _arranged(even_factors(columns, length))[::-1]


def even_factors(size: int, count: int) -> tuple[int, ...]:
    """`count` factors, ascending, of the first number from `size` on that is made of even ones.

    Even: with a sum of at most a tenth more than that of equal ones. Of numbers up to 2 % larger; where none of them
    is, those whose sum is least.
    """
    found = [_factors(size, count)]
    for padded in range(size + 1, size + int(size * _PADDING) + 1):
        if sum(found[-1]) <= _UNEVEN * count * size ** (1.0 / count):
            return found[-1]
        found.append(_factors(padded, count))
    return min(found, key=sum)


def _factors(size: int, count: int) -> tuple[int, ...]:
    """`count` factors of `size` with a small sum: its prime factors, the largest first, each to the smallest so far."""
    found = [1] * count
    for prime in sorted(_primes(size), reverse=True):
        smallest = min(range(count), key=found.__getitem__)
        found[smallest] *= prime
    return tuple(sorted(found))


def _primes(size: int) -> list[int]:
    found, divisor = [], 2
    while divisor * divisor <= size:
        while size % divisor == 0:
            found.append(divisor)
            size //= divisor
        divisor += 1
    return [*found, size] if size > 1 else found


def _arranged(factors: Sequence[int]) -> tuple[int, ...]:
    """The largest in the middle, the next behind it and before it by turns."""
    places = sorted(range(len(factors)), key=lambda k: (abs(k - centre(len(factors))), -k))
    found = [1] * len(factors)
    for place, factor in zip(places, sorted(factors, reverse=True), strict=True):
        found[place] = factor
    return tuple(found)
