"""Products with the Jacobian of a feed-forward block, and with the kernels made of it, in closed form.

With the factors A, S (and T) of `fusion_kernels.reference.ntk`, for tangents of the parameters and cotangents c (N, O)
of the outputs,

    J dtheta = (S o (x du' + db)) v + A dv + dc
    J' c     = {du: (S o c v')' x, db: sum (S o c v'), dv: A' c, dc: sum c}

and with E(V) = x (x' V) + sum V, the product of (1 + x x') with V,

    K V = A (A' V) + sum V + (S o E(S o (V v'))) v                                       V (N, O), the full kernel
    K v = O (A (A' v) + sum v) + rowsum(S o E(S |v| o v))                                v (N,), its trace

which take O(N (d + O) h) operations and O(N h) memory. They are compositions of torch's products, so that their
rounding may depend on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fusion_kernels import native
from fusion_kernels.ntk import tuning
from fusion_kernels.ntk.block import PARTS, Block, Kernel, Prepared, check_kernel, prepare
from fusion_kernels.ntk.gram import Reduce, contraction_named
from fusion_kernels.reference.ntk import contraction, factors

#: How many products an operator expects to serve when it decides what to keep: a solve takes about as many.
_USES = 32


def block_factors(prepared: Prepared, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden values A and slopes of the rows x (N, d): see `fusion_kernels.reference.ntk`.

    In blocks of rows, so that what the activation and its derivative need on the way stays small.
    """
    w_in, w_gate, b_in, b_gate, _, scale = prepared.arguments()
    assert w_in is not None
    block = (w_in, w_gate, b_in, b_gate, scale, prepared.exponent, prepared.activation)
    step = tuning.row_block(8 * len(w_in) * x.element_size())
    if len(x) <= step:
        return factors(x, *block)
    hidden = x.new_empty(len(x), len(w_in))
    slopes = {name: torch.empty_like(hidden) for name in (("in",) if w_gate is None else ("in", "gate"))}
    for begin in range(0, len(x), step):
        here = slice(begin, begin + step)
        hidden[here], part = factors(x[here], *block)
        for name, slope in part.items():
            slopes[name][here] = slope
    return hidden, slopes


def exactly(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run `function` without autograd and autocast, with products of float32 in float32."""

    def wrapped(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False), native.exact_products():
            return function(x, *args, **kwargs)

    return wrapped


def check_tangents(block: Block, tangents: Mapping[str, Tensor], name: str = "tangents") -> dict[str, Tensor | None]:
    """The tangents by `"<name>[part]"`, each of the shape of its part.

    Raises:
        ValueError: an unknown part, one the block does not have, or a wrong shape.
    """
    bundle = block.as_bundle()
    for part, tangent in tangents.items():
        stored = getattr(bundle, part) if part in PARTS else None
        if stored is None:
            present = ", ".join(p for p in PARTS if getattr(bundle, p) is not None)
            raise ValueError(f"{name}: this block has no {part!r}, its parts are {present}")
        if tangent.shape != stored.shape:
            raise ValueError(f"{name}[{part!r}] must be {tuple(stored.shape)}, got {tuple(tangent.shape)}")
    return {f"{name}[{part}]": tangent for part, tangent in tangents.items()}


def moved_parts(tangents: Mapping[str, Tensor]) -> Sequence[str]:
    """What to `prepare` for: the parts that move, frozen ones too, and any that every block has where none does."""
    return tuple(tangents) or ("w_out",)


def pushed_forward(x: Tensor, prepared: Prepared, name: str = "tangents") -> Tensor:
    """J times the tangents among `prepared.rows`, for rows x (N, d): (N, O)."""
    hidden, slopes = block_factors(prepared, x)
    kept = slice(None) if prepared.kept is None else prepared.kept

    def tangent(part: str) -> Tensor | None:
        found = prepared.rows.get(f"{name}[{part}]")
        return None if found is None else found[0] if part == "b_out" else found[0][kept]

    result = x.new_zeros(len(x), prepared.outputs)
    moved = torch.zeros_like(hidden)
    for term, slope in slopes.items():
        weight, bias = tangent(f"w_{term}"), tangent(f"b_{term}")
        if weight is not None:
            moved += slope * (x @ weight.T)
        if bias is not None:
            moved += slope * bias
    result += moved @ prepared.tensors["w_out"]
    weight, bias = tangent("w_out"), tangent("b_out")
    if weight is not None:
        result += hidden @ weight
    if bias is not None:
        result += bias
    return result


def jvp(block: Block, x: Tensor, tangents: Mapping[str, Tensor]) -> Tensor:
    """Return the derivative of a block's outputs along a change of its parameters, `J dtheta`.

    Args:
        block: as in `ntk_gram`.
        x: (N, d).
        tangents: part -> tensor of the part's shape, with its batch dimension of 1; parts left out do not change.

    Returns:
        (N, outputs), float32 or float64: the widest dtype of all that is given, at least float32.

    Raises:
        ValueError: as in `ntk_gram`, or tangents that do not fit the block.
    """
    others = check_tangents(block, tangents)
    prepared = prepare(block, {"x": x}, moved_parts(tangents), None, others)
    return exactly(pushed_forward)(prepared.rows["x"], prepared)


def vjp(block: Block, x: Tensor, cotangent: Tensor, *, params: str | Sequence[str] | None = None) -> dict[str, Tensor]:
    """Return the gradient of `sum(cotangent * outputs)` by the parameters, `J' c`.

    Args:
        block, params: as in `ntk_gram`.
        x: (N, d).
        cotangent: (N, outputs).

    Returns:
        part -> tensor of the part's shape, with its batch dimension of 1, in the dtype of `jvp`'s result.

    Raises:
        ValueError: as in `ntk_gram`, or a cotangent that does not fit.
    """
    prepared = prepare(block, {"x": x}, params, None, {"cotangent": cotangent})
    check_columns("cotangent", cotangent, (len(x), prepared.outputs))
    return exactly(_pulled_back)(prepared.rows["x"], prepared, prepared.rows["cotangent"])


def check_columns(name: str, t: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `t` has the shape."""
    if tuple(t.shape) != shape:
        raise ValueError(f"{name} must be {shape} for these inputs and this block, got {tuple(t.shape)}")


def _pulled_back(x: Tensor, prepared: Prepared, c: Tensor) -> dict[str, Tensor]:
    hidden, slopes = block_factors(prepared, x)
    gradients: dict[str, Tensor] = {}
    back = c @ prepared.tensors["w_out"].T
    for term, slope in slopes.items():
        gradients[f"w_{term}"] = (slope * back).T @ x
        gradients[f"b_{term}"] = (slope * back).sum(0)
    gradients["w_out"] = hidden.T @ c
    if prepared.kept is not None:
        for part, gradient in gradients.items():
            whole = gradient.new_zeros(len(prepared.kept), *gradient.shape[1:])
            whole[prepared.kept] = gradient
            gradients[part] = whole
    gradients["b_out"] = c.sum(0)
    return {part: gradients[part][None] for part in prepared.parts}


@dataclass
class _Products:
    """F F' V for the pairs of matrices (F, F') of a kernel, through the Gram matrix where that costs less."""

    uses: int
    grams: dict[str, Tensor] = field(default_factory=dict)

    def apply(self, name: str, left: Tensor, right: Tensor, v: Tensor) -> Tensor:
        """`left right' v`: (N, K), (N, K) and (N, M)."""
        if not tuning.gram_is_cheaper(len(left), left.shape[1], v.shape[1], self.uses):
            return left @ (right.T @ v)
        if name not in self.grams:
            self.grams[name] = left @ right.T
        return self.grams[name] @ v


class NTKOperator:
    """The tangent kernel of a block on one set of inputs as a linear operator, never formed.

    It has what `scipy.sparse.linalg.aslinearoperator` asks for (`shape`, `dtype`, `matvec`, `rmatvec`, `matmat`), so
    that `cg`, `eigsh` and the like take it, and `A @ v`. Vectors are tensors or numpy arrays; the result is of the same
    kind, a tensor on the block's device, in the dtype of the operator: a float64 vector on a float32 operator gives
    float32. A product costs O(N (d + outputs) h), or O(N d h) per column for the trace, and the operator holds
    a few (N, neurons) matrices; see `ntk_operator`.

    Attributes:
        shape: (N, N), or (N outputs, N outputs) for the full kernel, whose vectors run over outputs first.
    """

    def __init__(
        self,
        prepared: Prepared,
        x: Tensor,
        reduce: str,
        direction: Tensor | None,
        kernel: str,
        shift: float = 0.0,
        uses: int = _USES,
    ) -> None:
        """See `ntk_operator`; `reduce` is `"full"`, `"trace"` or `"vector"`."""
        hidden, slopes = block_factors(prepared, x)
        self._w_out, self._parts, self._shift = prepared.tensors["w_out"], prepared.parts, shift
        self._full = reduce == "full"
        self._same = 1.0
        left = right = self._w_out.new_ones(len(self._w_out))
        if not self._full:
            left, right, self._same = contraction(self._w_out, direction, kernel)
        metric = torch.ones_like(left) if prepared.metric is None else prepared.metric
        if kernel == "gd":
            # One set of factors serves both sides: these matrices are most of the memory.
            root = metric.sqrt()
            hidden.mul_(root)
            for slope in slopes.values():
                slope.mul_(left * root)
            self._x, self._v, self._hidden = (x, x), (self._w_out, self._w_out), (hidden, hidden)
            self._slopes = (slopes, slopes)
        else:
            self._x, self._v = (x, x.sign()), (self._w_out, self._w_out.sign())
            self._hidden = (hidden * metric, hidden.sign())
            first = {name: s * (metric * left) for name, s in slopes.items()}
            self._slopes = (first, {name: s.sign() * right for name, s in slopes.items()})
        self._products = (_Products(uses), _Products(uses))
        size = len(x) * (prepared.outputs if self._full else 1)
        self.shape = (size, size)

    @property
    def dtype(self) -> Any:
        """The numpy dtype of the products."""
        return torch.empty(0, dtype=self._w_out.dtype).numpy().dtype

    @property
    def device(self) -> torch.device:
        """Where the products are computed."""
        return self._w_out.device

    def _input_side(self, name: str, u: Tensor, side: int) -> Tensor:
        """E u for the inputs and the bias of the term `name`."""
        if f"w_{name}" not in self._parts:
            return u.sum(0).expand_as(u)
        result = self._products[side].apply("x", self._x[side], self._x[1 - side], u)
        return result.add_(u.sum(0)) if f"b_{name}" in self._parts else result

    def _kernel(self, v: Tensor, side: int) -> Tensor:
        """K v for (N, outputs) or (N, columns); side 1 is the transpose."""
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
        return result.add_(v, alpha=self._shift)

    def _columns(self, v: Any, side: int) -> Any:
        """K v for (size,) or (size, M), a tensor or an array."""
        tensor = v if isinstance(v, Tensor) else torch.as_tensor(v)
        if tensor.ndim not in (1, 2) or len(tensor) != self.shape[0]:
            raise ValueError(f"a vector for this operator must be ({self.shape[0]},) or ({self.shape[0]}, M): "
                             f"got {tuple(tensor.shape)}")  # fmt: skip
        columns = tensor.detach().to(self._w_out)
        if tensor.ndim == 1:
            columns = columns[:, None]
        run = exactly(lambda part: self._kernel(part, side))
        if self._full:
            outputs = self._w_out.shape[1]
            parts = [run(c.reshape(len(self._x[0]), outputs)).reshape(-1, 1) for c in columns.unbind(1)]
            result = torch.cat(parts, 1) if parts else columns
        else:
            result = run(columns)
        result = result.view(tensor.shape)
        return result if isinstance(v, Tensor) else result.cpu().numpy()

    def matvec(self, v: Any) -> Any:
        """K v for a vector (size,) or (size, 1)."""
        return self._columns(v, 0)

    def rmatvec(self, v: Any) -> Any:
        """K' v; the same as `matvec` for gradient descent."""
        return self._columns(v, 1)

    def matmat(self, v: Any) -> Any:
        """K V for (size, M)."""
        return self._columns(v, 0)

    def rmatmat(self, v: Any) -> Any:
        """K' V for (size, M)."""
        return self._columns(v, 1)

    __matmul__ = matvec

    def diagonal(self) -> Tensor:
        """(N,): the kernel of each input with itself; not for the full kernel."""
        if self._full:
            raise ValueError("diagonal is of a kernel with one number per pair of inputs: reduce the outputs")
        result = self._x[0].new_full((len(self._x[0]),), self._shift)
        if "w_out" in self._parts:
            result += self._same * torch.linalg.vecdot(*self._hidden)
        if "b_out" in self._parts:
            result += self._same
        inputs = torch.linalg.vecdot(*self._x)
        for n in self._slopes[0]:
            over = inputs * (f"w_{n}" in self._parts) + float(f"b_{n}" in self._parts)
            result += over * torch.linalg.vecdot(self._slopes[0][n], self._slopes[1][n])
        return result


def ntk_operator(
    block: Block,
    x: Tensor,
    reduce: Reduce = "trace",
    *,
    params: str | Sequence[str] | None = None,
    metric: Tensor | None = None,
    kernel: Kernel = "gd",
    shift: float = 0.0,
) -> NTKOperator:
    """Return the tangent kernel of `x` as a linear operator, for conjugate gradients and Lanczos.

    Args:
        block, params, metric, kernel: as in `ntk_gram`.
        x: (N, d).
        reduce: `"trace"`, `"pseudo"`, a vector of outputs, or `"full"`, the kernel of all (input, output) pairs.
        shift: added to the diagonal, a ridge.

    Raises:
        ValueError: as in `ntk_gram`, or a shift that is not finite.
    """
    check_kernel(kernel)
    if not math.isfinite(shift):
        raise ValueError(f"shift must be finite, got {shift}")
    return _operator(block, {"x": x}, reduce, params, metric, kernel, shift)


def _operator(
    block: Block,
    rows: Mapping[str, Tensor],
    reduce: Reduce,
    params: str | Sequence[str] | None,
    metric: Tensor | None,
    kernel: str,
    shift: float = 0.0,
    uses: int = _USES,
    others: Mapping[str, Tensor | None] | None = None,
) -> NTKOperator:
    prepared = prepare(block, rows, params, metric, others)
    x = prepared.rows["x"]
    named, direction = contraction_named(reduce, prepared.outputs, x)
    if named == "diagonal":
        raise ValueError("the diagonal of outputs is not a linear operator: use 'full', 'trace', 'pseudo' or a vector")
    return exactly(lambda rows: NTKOperator(prepared, rows, named, direction, kernel, shift, uses))(x)


def ntk_vp(
    block: Block,
    x: Tensor,
    v: Tensor,
    *,
    params: str | Sequence[str] | None = None,
    metric: Tensor | None = None,
    kernel: Kernel = "gd",
) -> Tensor:
    """Return the full tangent kernel of `x` times a matrix: what a step of size 1 along `-v` takes off the outputs.

    Row n of the result is `sum_m K(x_n, x_m) v_m` with the (outputs, outputs) blocks K of `ntk_gram(..., "full")`. No
    kernel is formed: each of its products goes through parameter space (a vjp, then a jvp: 8 N h O + 4 N d h
    operations in all) or through a Gram matrix of inputs or hidden values, whichever costs less.

    Args:
        block, params, metric, kernel: as in `ntk_gram`.
        x: (N, d).
        v: (N, outputs).

    Returns:
        (N, outputs), in the dtype of the computation.

    Raises:
        ValueError: as in `ntk_gram`, or `v` does not fit.
    """
    check_kernel(kernel)
    operator = _operator(block, {"x": x}, "full", params, metric, kernel, uses=1, others={"v": v})
    outputs = block.as_bundle().w_out.shape[2]
    check_columns("v", v, (len(x), outputs))
    return operator.matvec(v.reshape(-1)).view(len(x), outputs)


def trace_ntk_vp(
    block: Block,
    x: Tensor,
    v: Tensor,
    reduce: Reduce = "trace",
    *,
    params: str | Sequence[str] | None = None,
    metric: Tensor | None = None,
    kernel: Kernel = "gd",
) -> Tensor:
    """Return the tangent kernel of `x`, one number per pair of inputs, times vectors: 4 N d h operations per column.

    Args:
        block, params, metric, kernel: as in `ntk_gram`.
        x: (N, d).
        v: (N,) or (N, M).
        reduce: `"trace"`, `"pseudo"` or a vector of outputs.

    Returns:
        The shape of `v`, in the dtype of the computation.

    Raises:
        ValueError: as in `ntk_gram`, or `v` does not fit.
    """
    check_kernel(kernel)
    if isinstance(reduce, str) and reduce == "full":
        raise ValueError("trace_ntk_vp is of a kernel with one number per pair of inputs: use ntk_vp for 'full'")
    if v.ndim not in (1, 2) or len(v) != len(x):
        raise ValueError(f"v must be ({len(x)},) or ({len(x)}, M) for these inputs, got {tuple(v.shape)}")
    return _operator(block, {"x": x}, reduce, params, metric, kernel, uses=1, others={"v": v}).matvec(v)
