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

from fusion_kernels import native
from mlp_fusion.errors import InputError

#: Tensors of a chain, unless somebody says otherwise: the paper's.
LENGTH = 5
#: Rows and columns that may be added to a matrix for it to be factored evenly, as a share.
_PADDING = 0.02
#: Sum of factors that pass for even, in units of that of equal ones.
_UNEVEN = 1.1
#: Rows of a matrix's product with itself that are made at once: its upper triangle is left out, but for theirs.
_PANEL = 96

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

    Bases and spectra are found in float64; tensors come in the weight's dtype, float32 at least, spectra in float64.
    Time: a product of the matrix with itself from either side, and per bond a decomposition of something no larger than
    the smaller side of its unfolding. In float64, and where an unfolding is taller than wide, a thin decomposition
    stands in the product's place.

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
    # Both ends are NaN where any number is. (All of them compared take a twentieth of the decomposition.)
    if not all(math.isfinite(end) for end in torch.aminmax(weight.detach())):
        raise InputError("the matrix holds infinite numbers or NaN: it cannot be decomposed")
    rows, columns = choose_shapes(*weight.shape, length=length) if shapes is None else checked_shapes(weight, shapes)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False), native.exact_products():
        tensors, spectra = _decomposed(weight.to(torch.promote_types(weight.dtype, torch.float32)), rows, columns)
    return MatrixProductOperator(tensors, spectra, (len(weight), weight.shape[1]))


def _decomposed(
    weight: Tensor, rows: Sequence[int], columns: Sequence[int]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The tensors of a chain, in the dtype of a weight of float32 or float64, and its spectra."""
    c = centre(len(rows))
    core = _grouped(weight, rows, columns)
    first, _, last = (i * j for i, j in zip(_groups(rows), _groups(columns), strict=True))
    before, left, above = _side(core.reshape(first, -1), rows[:c], columns[:c])
    behind, right, below = _side(core.reshape(-1, last).mT, rows[c + 1 :], columns[c + 1 :], from_the_end=True)
    central = (left.mT @ core.reshape(first, -1)).reshape(-1, last) @ right
    tensors = (
        *before,
        central.reshape(left.shape[1], rows[c], columns[c], right.shape[1]),
        *(t.permute(3, 1, 2, 0) for t in reversed(behind)),
    )
    return tuple(t.contiguous() for t in tensors), (*above, *reversed(below))


def _side(
    unfolding: Tensor, rows: Sequence[int], columns: Sequence[int], *, from_the_end: bool = False
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """The tensors on one side of the central one, from their end of the chain on.

    Args:
        unfolding: `(m, n)`, at the bond next to the central tensor, with rows in the order of :func:`_grouped`.
        rows, columns: factors of m.
        from_the_end: the last of them stands at the chain's end.

    Returns:
        Tensors `(d, i, j, d')`, d' being nearer to the centre; what they multiply out to, `(m, d')`; their spectra.

    All bonds of a side can be had from something small that has the unfolding's left singular vectors: its triangular
    factor or, in float32, its product with itself, of which inner bonds see partial traces. Bases are orthonormal with
    both, and complete where the unfolding is wide, so that nothing of the matrix is lost. By the product, vectors of
    values a hundred-millionth as large as the largest are not told apart, which float32 does not tell apart either.
    """
    count, dtype = len(rows), unfolding.dtype
    along = range(count)[::-1] if from_the_end else range(count)
    order = [axis for k in along for axis in (k, count + k)]
    m, n = unfolding.shape
    places = torch.arange(m, device=unfolding.device).reshape((*rows, *columns)).permute(order).reshape(-1)
    by_product = dtype == torch.float32 and m <= n
    whole = unfolding.double()
    known = _product(whole)[places][:, places] if by_product else _triangle(whole)[places]
    reached = known.new_ones(1, 1)
    tensors, spectra = [], []
    for k in along:
        d, side = reached.shape[1], rows[k] * columns[k]
        basis, values = (_of_product if by_product else _of_factor)(known, d * side)
        if k != along[-1]:
            known = (_product_in if by_product else _factor_in)(basis, known)
        reached = (reached @ basis.reshape(d, -1)).reshape(len(reached) * side, -1)
        tensors.append(basis.reshape(d, rows[k], columns[k], -1).to(dtype))
        spectra.append(values)
    found = torch.empty_like(reached)
    found[places] = reached
    return tensors, found.to(dtype), spectra


def _product(matrix: Tensor) -> Tensor:
    """`(m, m)`: an `(m, n)` matrix's product with itself, symmetric to the bit."""
    found = matrix.new_zeros(len(matrix), len(matrix))
    for begin in range(0, len(matrix), _PANEL):
        panel = slice(begin, begin + _PANEL)
        found[begin:, panel] = matrix[begin:] @ matrix[panel].mT
    return found.tril() + found.tril(-1).mT


def _triangle(matrix: Tensor) -> Tensor:
    """`(m, m)` with the left singular vectors and the singular values of a wide matrix; others as they are."""
    return torch.linalg.qr(matrix.mT, mode="r")[1].mT if len(matrix) < matrix.shape[1] else matrix


def _of_factor(matrix: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Left singular vectors `(m, r)` and singular values `(r,)` of a matrix as m rows."""
    basis, values, _ = torch.linalg.svd(_triangle(matrix.reshape(m, -1)), full_matrices=False)
    return basis, values


def _factor_in(basis: Tensor, matrix: Tensor) -> Tensor:
    """The matrix, as the m rows of `basis (m, r)`, in that basis: `(r, ...)`."""
    return basis.mT @ matrix.reshape(len(basis), -1)


def _of_product(product: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Left singular vectors `(m, m)` and values `(m,)` of a matrix as m rows, by its product with itself as m s."""
    s = len(product) // m
    outer = product.reshape(m, s, m, s).diagonal(dim1=1, dim2=3).sum(dim=-1)
    squares, basis = (t.flip(-1) for t in torch.linalg.eigh(outer))
    return basis, squares.clamp(min=0.0).sqrt()


def _product_in(basis: Tensor, product: Tensor) -> Tensor:
    """The product `(m s, m s)` of a matrix with itself after its change to `basis (m, m)`."""
    for _ in range(2):
        product = (basis.mT @ product.reshape(len(basis), -1)).reshape(product.shape).mT
    return product


def centre(length: int) -> int:
    """Number of the central tensor of a chain."""
    return length // 2


def _grouped(weight: Tensor, rows: Sequence[int], columns: Sequence[int]) -> Tensor:
    """The padded matrix, flat, its indices in the order: before the centre, at it, behind it.

    In each of the three come the indices of rows and then those of columns, so that long stretches stay as they are.
    """
    more = math.prod(columns) - weight.shape[1], math.prod(rows) - len(weight)
    padded = torch.nn.functional.pad(weight, (0, more[0], 0, more[1])) if any(more) else weight
    return padded.reshape(_groups(rows) + _groups(columns)).permute(0, 3, 1, 4, 2, 5).reshape(-1)


def _groups(factors: Sequence[int]) -> list[int]:
    """Products of the factors before the centre, at it and behind it."""
    c = centre(len(factors))
    return [math.prod(factors[:c]), factors[c], math.prod(factors[c + 1 :])]


def chain_matrix(tensors: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
    """`shape`: the matrix of a chain. Multiplied from both ends towards the centre, whose tensor is largest."""
    left, middle, right = chain_sides(tensors)
    return unfolded(((left @ middle.flatten(1)).reshape(-1, len(right)) @ right), tensors, shape)


def chain_sides(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors before the central one as an `(m, d)` matrix, the central one, those behind it as a `(d', m')`.

    Their m and m' indices are in the order of :func:`_grouped`, so that few strides are left for the whole matrix.
    """
    c = centre(len(tensors))
    left = tensors[0].new_ones(1, 1)
    for t in tensors[:c]:
        left = (left @ t.flatten(1)).reshape(-1, t.shape[3])
    right = left.new_ones(1, 1)
    for t in reversed(tensors[c + 1 :]):
        right = (t.flatten(0, 2) @ right).reshape(len(t), -1)
    return _regrouped(left.mT, tensors[:c]).mT, tensors[c], _regrouped(right, tensors[c + 1 :])


def _regrouped(side: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """`(d, m)` with its m indices `i_1 j_1 i_2 j_2 ...` in the order of :func:`_grouped`."""
    factors = [size for t in tensors for size in t.shape[1:3]]
    order = [0, *range(1, len(factors), 2), *range(2, len(factors) + 1, 2)]
    return side.reshape((len(side), *factors)).permute(order).reshape(len(side), -1)


def unfolded(whole: Tensor, tensors: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
    """`shape`: a chain's matrix out of what has its indices in the order of :func:`_grouped`."""
    rows, columns = _groups([t.shape[1] for t in tensors]), _groups([t.shape[2] for t in tensors])
    sides = [side for pair in zip(rows, columns, strict=True) for side in pair]
    padded = whole.reshape(sides).permute(0, 2, 4, 1, 3, 5).reshape(math.prod(rows), math.prod(columns))
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


def most_padded(size: int) -> int:
    """The largest number that :func:`even_factors` may factor in place of `size`."""
    return size + int(size * _PADDING)


def even_factors(size: int, count: int) -> tuple[int, ...]:
    """`count` factors, ascending, of the first number from `size` on that is made of even ones.

    Even: with a sum of at most a tenth more than that of equal ones. Of numbers up to 2 % larger; where none of them
    is, those whose sum is least.
    """
    found = [_factors(size, count)]
    for padded in range(size + 1, most_padded(size) + 1):
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
