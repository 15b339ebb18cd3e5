"""Products with the Jacobian of a feed-forward block, and with the kernels made of it, composed from torch's.

With the factors A, S (and T) of `fusion_kernels.ntk.reference`, for tangents of the parameters and cotangents c (N, O)
of the outputs,

    J dtheta = (S o (x du' + db)) v + A dv + dc
    J' c     = {du: (S o c v')' x, db: sum (S o c v'), dv: A' c, dc: sum c}

and with E(V) = x (x' V) + sum V, the product of (1 + x x') with V,

    K V = A (A' V) + sum V + (S o E(S o (V v'))) v                                       V (N, O), the full kernel
    K v = O (A (A' v) + sum v) + rowsum(S o E(S |v| o v))                                v (N,), its trace

which take O(N (d + O) h) operations and O(N h) memory. Inner products of per-sample gradients over S tokens, sums of
outer products a_t b_t of each linear layer, are

    <g_n, g_m> = sum_{t, s} (a_nt . a_ms) (b_nt . b_ms)          ghost: from (S, S) products, no gradient
               = <A_n' B_n, A_m' B_m>                            direct: from gradients, a few columns at a time

and which of them costs less depends on S: see `heuristics.py`. A bias is a layer with a = 1. The rounding of torch's
products may depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fusion_kernels.ffn import FFN, PARTS
from fusion_kernels.library import check_name
from fusion_kernels.ntk import heuristics
from fusion_kernels.ntk.reference import contraction, factors
from fusion_kernels.ntk.types import check_names

# The names that this backend knows: it takes none for another, and refuses a new one until that stands here.
_KERNELS, _PRODUCTS, _VIAS = ("gd", "sign"), ("trace", "full", "vector"), ("auto", "ghost", "direct")

# A layer of the gradient: activations (N, S, di), backpropagated (N, S, do), and whether weight and bias count.
_Layer = tuple[Tensor, Tensor, bool, bool]


def block_factors(x: Tensor, ffn: FFN) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden values A and slopes of the rows x (N, d): see `fusion_kernels.ntk.reference.factors`.

    In blocks of rows, so that what the activation and its derivative need on the way stays small.
    """
    step = heuristics.row_block(8 * len(ffn.w_in) * x.element_size())
    if len(x) <= step:
        return factors(ffn, x)
    hidden = x.new_empty(len(x), len(ffn.w_in))
    slopes = {name: torch.empty_like(hidden) for name in (("in", "gate") if ffn.gated else ("in",))}
    for begin in range(0, len(x), step):
        here = slice(begin, begin + step)
        hidden[here], part = factors(ffn, x[here])
        for name, slope in part.items():
            slopes[name][here] = slope
    return hidden, slopes


def jvp(
    x: Tensor,
    ffn: FFN,
    tangents: Sequence[Tensor | None],
) -> Tensor:
    """J times the tangents: arguments and result as in `fusion_kernels.ntk.reference.jvp`."""
    hidden, slopes = block_factors(x, ffn)
    moves = dict(zip(PARTS, tangents, strict=True))
    moved = torch.zeros_like(hidden)
    for name, slope in slopes.items():
        weight, bias = moves[f"w_{name}"], moves[f"b_{name}"]
        if weight is not None:
            moved += slope * (x @ weight.T)
        if bias is not None:
            moved += slope * bias
    result = moved @ ffn.w_out
    if moves["w_out"] is not None:
        result += hidden @ moves["w_out"]
    if moves["b_out"] is not None:
        result += moves["b_out"]
    return result


def vjp(
    x: Tensor,
    ffn: FFN,
    cotangent: Tensor,
    params: Sequence[str],
) -> list[Tensor]:
    """J' times the cotangent: arguments and result as in `fusion_kernels.ntk.reference.vjp`."""
    hidden, slopes = block_factors(x, ffn)
    gradients: dict[str, Tensor] = {}
    back = cotangent @ ffn.w_out.T
    for name, slope in slopes.items():
        pulled = slope * back
        if f"w_{name}" in params:
            gradients[f"w_{name}"] = pulled.T @ x
        if f"b_{name}" in params:
            gradients[f"b_{name}"] = pulled.sum(0)
    if "w_out" in params:
        gradients["w_out"] = hidden.T @ cotangent
    if "b_out" in params:
        gradients["b_out"] = cotangent.sum(0)
    return [gradients[part] for part in params]


@dataclass
class _Products:
    """F F' V for the pairs of matrices (F, F') of a kernel, through the Gram matrix where that costs less."""

    uses: int
    grams: dict[str, Tensor] = field(default_factory=dict)

    def apply(self, name: str, left: Tensor, right: Tensor, v: Tensor) -> Tensor:
        """`left right' v`: (N, K), (N, K) and (N, M)."""
        if not heuristics.gram_is_cheaper(len(left), left.shape[1], v.shape[1], self.uses):
            return left @ (right.T @ v)
        if name not in self.grams:
            self.grams[name] = left @ right.T
        return self.grams[name] @ v


class FactoredKernel:
    """The tangent kernel of one set of rows as the factors that it is a product of: a few (N, neurons) matrices."""

    def __init__(
        self,
        x: Tensor,
        ffn: FFN,
        params: Sequence[str],
        kernel: str,
        reduce: str,
        direction: Tensor | None,
        metric: Tensor | None,
        uses: int,
    ) -> None:
        """Arguments as in `fusion_kernels.ntk.reference.ntk_vp`; `uses` is how many products are expected."""
        check_names(kernel, reduce, direction, _KERNELS, _PRODUCTS)
        hidden, slopes = block_factors(x, ffn)
        w_out = ffn.w_out
        self._w_out, self._parts = w_out, params
        self._full = reduce == "full"
        self._same = 1.0
        left = right = w_out.new_ones(len(w_out))
        if not self._full:
            left, right, self._same = contraction(w_out, direction, kernel)
        metric = torch.ones_like(left) if metric is None else metric
        if kernel == "gd":
            # One set of factors serves both sides: these matrices are most of the memory.
            root = metric.sqrt()
            hidden.mul_(root)
            for slope in slopes.values():
                slope.mul_(left * root)
            self._x, self._v, self._hidden = (x, x), (w_out, w_out), (hidden, hidden)
            self._slopes = (slopes, slopes)
        else:
            self._x, self._v = (x, x.sign()), (w_out, w_out.sign())
            self._hidden = (hidden * metric, hidden.sign())
            first = {name: s * (metric * left) for name, s in slopes.items()}
            self._slopes = (first, {name: s.sign() * right for name, s in slopes.items()})
        self._products = (_Products(uses), _Products(uses))

    def _input_side(self, name: str, u: Tensor, side: int) -> Tensor:
        """E u for the inputs and the bias of the term `name`."""
        if f"w_{name}" not in self._parts:
            return u.sum(0).expand_as(u)
        result = self._products[side].apply("x", self._x[side], self._x[1 - side], u)
        return result.add_(u.sum(0)) if f"b_{name}" in self._parts else result

    def times(self, v: Tensor, side: int) -> Tensor:
        """K v for (N, outputs) of the full kernel, (N, M) of others; side 1 is the transpose."""
        other = 1 - side
        result = torch.zeros_like(v)
        if "w_out" in self._parts:
            result += self._products[side].apply("hidden", self._hidden[side], self._hidden[other], v)
        if "b_out" in self._parts:
            result += v.sum(0)
        terms = [n for n in self._slopes[0] if f"w_{n}" in self._parts or f"b_{n}" in self._parts]
        if self._full:
            back = v @ self._v[other].T
            for n in terms:
                moved = self._input_side(n, self._slopes[other][n] * back, side)
                result += (self._slopes[side][n] * moved) @ self._v[side]
        else:
            result *= self._same
            for column in range(v.shape[1]):
                for n in terms:
                    moved = self._input_side(n, self._slopes[other][n] * v[:, column, None], side)
                    result[:, column] += torch.linalg.vecdot(self._slopes[side][n], moved)
        return result

    def diagonal(self) -> Tensor:
        """(N,), the kernel of each row with itself; not of the full kernel."""
        result = self._x[0].new_zeros(len(self._x[0]))
        if "w_out" in self._parts:
            result += self._same * torch.linalg.vecdot(*self._hidden)
        if "b_out" in self._parts:
            result += self._same
        inputs = torch.linalg.vecdot(*self._x)
        for n in self._slopes[0]:
            over = inputs * (f"w_{n}" in self._parts) + float(f"b_{n}" in self._parts)
            result += over * torch.linalg.vecdot(self._slopes[0][n], self._slopes[1][n])
        return result


def ntk_vp(
    x: Tensor,
    ffn: FFN,
    v: Tensor,
    params: Sequence[str],
    kernel: str,
    reduce: str,
    direction: Tensor | None,
    metric: Tensor | None,
) -> Tensor:
    """K v: arguments and result as in `fusion_kernels.ntk.reference.ntk_vp`."""
    return FactoredKernel(x, ffn, params, kernel, reduce, direction, metric, 1).times(v, 0)


def _layers(
    x: Tensor,
    ffn: FFN,
    c: Tensor,
    params: Sequence[str],
    metric: Tensor | None,
) -> Iterator[_Layer]:
    n, s = c.shape[:2]
    hidden, slopes = block_factors(x.flatten(0, 1), ffn)
    root = hidden.new_ones(hidden.shape[1]) if metric is None else metric.sqrt()
    back = c.flatten(0, 1) @ ffn.w_out.T * root
    for name, slope in slopes.items():
        weight, bias = f"w_{name}" in params, f"b_{name}" in params
        if weight or bias:
            yield x, (slope * back).view(n, s, slope.shape[1]), weight, bias
    if "w_out" in params:
        yield (hidden * root).view(n, s, hidden.shape[1]), c, True, False
    if "b_out" in params:
        yield c.new_zeros(n, s, 0), c, False, True


def gradient_gram(
    x: Tensor,
    ffn: FFN,
    cotangents: Tensor,
    params: Sequence[str],
    metric: Tensor | None,
    via: str,
) -> Tensor:
    """All inner products of gradients: arguments and result as in `fusion_kernels.ntk.reference.gradient_gram`."""
    check_name("form", via, _VIAS)
    n, s = cotangents.shape[:2]
    gram = x.new_zeros(n, n)
    for a, b, weight, bias in _layers(x, ffn, cotangents, params, metric):
        ghost = (
            heuristics.ghost_gram_is_cheaper(n, s, a.shape[2] + bias, b.shape[2]) if via == "auto" else via == "ghost"
        )
        (_add_ghost_gram if ghost else _add_direct_gram)(gram, a, b, weight, bias)
    return gram.tril() + gram.tril(-1).T


def _add_ghost_gram(gram: Tensor, a: Tensor, b: Tensor, weight: bool, bias: bool) -> None:
    """Add the lower triangle of a layer's Gram, in blocks of samples, or of a sample's tokens where one is too many."""
    n, s = a.shape[:2]
    step = heuristics.row_block(2 * n * s * s * a.element_size())
    tokens = heuristics.row_block(2 * n * s * a.element_size())
    for begin in range(0, n, step):
        here, there = slice(begin, min(begin + step, n)), slice(0, min(begin + step, n))
        for first in range(0, s, tokens):
            some = slice(first, first + tokens)
            products = b[here, some].flatten(0, 1) @ b[there].flatten(0, 1).T
            if weight:
                products *= (a[here, some].flatten(0, 1) @ a[there].flatten(0, 1).T).add_(float(bias))
            gram[here, there] += products.view(here.stop - begin, -1, there.stop, s).sum((1, 3))


def _add_direct_gram(gram: Tensor, a: Tensor, b: Tensor, weight: bool, bias: bool) -> None:
    """Add a layer's Gram from its gradients, a few columns of them at a time."""
    step = heuristics.row_block(len(a) * max(1, a.shape[2]) * a.element_size())
    for columns in b.split(step, dim=2) if weight else ():
        gradients = torch.bmm(a.mT, columns).flatten(1)
        gram += gradients @ gradients.T
    if bias:
        sums = b.sum(1)
        gram += sums @ sums.T


def gradient_norms(
    x: Tensor,
    ffn: FFN,
    cotangents: Tensor,
    params: Sequence[str],
    metric: Tensor | None,
    via: str,
) -> Tensor:
    """The norms of gradients: arguments and result as in `fusion_kernels.ntk.reference.gradient_norms`."""
    check_name("form", via, _VIAS)
    n, s = cotangents.shape[:2]
    squares = x.new_zeros(n)
    for a, b, weight, bias in _layers(x, ffn, cotangents, params, metric):
        inputs, outputs = a.shape[2], b.shape[2]
        ghost = heuristics.ghost_norm_is_cheaper(s, inputs, outputs) if via == "auto" else via == "ghost"
        step = heuristics.row_block(2 * (s * s if ghost else inputs * outputs) * a.element_size())
        tokens = heuristics.row_block(2 * s * a.element_size())
        for begin in range(0, n, step):
            here = slice(begin, begin + step)
            if weight and ghost:
                for first in range(0, s, tokens):
                    some = slice(first, first + tokens)
                    products = torch.bmm(a[here, some], a[here].mT)
                    squares[here] += products.mul_(torch.bmm(b[here, some], b[here].mT)).sum((1, 2))
            elif weight:
                squares[here] += torch.bmm(a[here].mT, b[here]).square().sum((1, 2))
        if bias:
            squares += b.sum(1).square().sum(1)
    return squares.clamp_(min=0).sqrt_()
