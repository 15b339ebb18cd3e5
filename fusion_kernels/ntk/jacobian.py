"""Products with the Jacobian of a feed-forward block, and with the kernels made of it, in closed form.

They are the operators of `operators.py`; the formulas are in `torch_backend.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fusion_kernels.ffn import PARTS
from fusion_kernels.library import check_name
from fusion_kernels.ntk.block import Prepared, ffn_of, prepare
from fusion_kernels.ntk.gram import contraction_named
from fusion_kernels.ntk.operators import NTK_JVP, NTK_VJP, NTK_VP, exactly
from fusion_kernels.ntk.torch_backend import FactoredKernel
from fusion_kernels.ntk.types import KERNELS, Block, Kernel, Reduce

#: How many products an operator expects to serve when it decides what to keep: a solve takes about as many.
_USES = 32


def check_tangents(block: Block, tangents: Mapping[str, Tensor], name: str = "tangents") -> dict[str, Tensor | None]:
    """The tangents by `"<name>[part]"`, each of the shape of its part.

    Raises:
        ValueError: an unknown part, one the block does not have, or a wrong shape.
    """
    own = ffn_of(block).named()
    present = [part for part in PARTS if part in own]
    for part, tangent in tangents.items():
        if part not in present:
            raise ValueError(f"{name}: this block has no {part!r}, its parts are {', '.join(present)}")
        stored = own[part]
        if tangent.shape != stored.shape:
            raise ValueError(f"{name}[{part!r}] must be {tuple(stored.shape)}, got {tuple(tangent.shape)}")
    return {f"{name}[{part}]": tangent for part, tangent in tangents.items()}


def moved_parts(tangents: Mapping[str, Tensor]) -> Sequence[str]:
    """What to `prepare` for: the parts that move, frozen ones too, and any that every block has where none does."""
    return tuple(tangents) or ("w_out",)


def tangent_arguments(prepared: Prepared, name: str = "tangents") -> list[Tensor | None]:
    """The tangents among `prepared.rows` as `ntk_jvp` takes them: by `PARTS`, of the neurons that are kept."""
    kept = slice(None) if prepared.kept is None else prepared.kept
    found = [prepared.rows.get(f"{name}[{part}]") for part in PARTS]
    return [t if t is None else t[0] if part == "b_out" else t[0][kept] for part, t in zip(PARTS, found, strict=True)]


def jvp(block: Block, x: Tensor, tangents: Mapping[str, Tensor], *, backend: str = "auto") -> Tensor:
    """Return the derivative of a block's outputs along a change of its parameters, `J dtheta`.

    Args:
        block: as in `ntk_gram`.
        x: (N, d).
        tangents: part -> tensor of the part's shape, with its batch dimension of 1; parts left out do not change.
        backend: `"auto"`, or the name of one to insist on.

    Returns:
        (N, outputs), float32 or float64: the widest dtype of all that is given, at least float32. Like all products
        here it is computed on detached tensors: nothing can be differentiated through it.

    Raises:
        ValueError: as in `ntk_gram`, or tangents that do not fit the block.
        BackendUnavailableError: `backend` cannot run here.

    Examples:
        >>> block = mlp_fusion.FusedMLP.from_mlp(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
        >>> moved = fusion_kernels.jvp(block, torch.randn(5, 8), {"b_out": torch.ones(1, 4)})
        >>> torch.equal(moved, torch.ones(5, 4))
        True
    """
    function = NTK_JVP.function(backend, x)
    others = check_tangents(block, tangents)
    prepared = prepare(block, {"x": x}, moved_parts(tangents), None, others)
    return function(prepared.rows["x"], *prepared.described(), tangent_arguments(prepared))


def vjp(
    block: Block, x: Tensor, cotangent: Tensor, *, params: str | Sequence[str] | None = None, backend: str = "auto"
) -> dict[str, Tensor]:
    """Return the gradient of `sum(cotangent * outputs)` by the parameters, `J' c`.

    Args:
        block, params: as in `ntk_gram`.
        x: (N, d).
        cotangent: (N, outputs).
        backend: as in `jvp`.

    Returns:
        part -> tensor of the part's shape, with its batch dimension of 1, in the dtype of `jvp`'s result.

    Raises:
        ValueError: as in `ntk_gram`, or a cotangent that does not fit.
        BackendUnavailableError: `backend` cannot run here.

    Examples:
        >>> block = mlp_fusion.FusedMLP.from_mlp(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
        >>> x, cotangent = torch.randn(5, 8), torch.randn(5, 4)
        >>> found = fusion_kernels.vjp(block, x, cotangent)
        >>> (gradient,) = torch.autograd.grad((cotangent * block(x)).sum(), [block.fc1.weight])
        >>> sorted(found), torch.allclose(found["w_in"][0], gradient, atol=1e-4)
        (['b_in', 'b_out', 'w_in', 'w_out'], True)
    """
    function = NTK_VJP.function(backend, x)
    prepared = prepare(block, {"x": x}, params, None, {"cotangent": cotangent})
    check_columns("cotangent", cotangent, (len(x), prepared.outputs))
    found = function(prepared.rows["x"], *prepared.described(), prepared.rows["cotangent"], prepared.parts)
    gradients = dict(zip(prepared.parts, found, strict=True))
    if prepared.kept is not None:
        for part in gradients.keys() - {"b_out"}:
            gradient = gradients[part]
            gradients[part] = gradient.new_zeros(len(prepared.kept), *gradient.shape[1:])
            gradients[part][prepared.kept] = gradient
    return {part: gradient[None] for part, gradient in gradients.items()}


def check_columns(name: str, t: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `t` has the shape."""
    if tuple(t.shape) != shape:
        raise ValueError(f"{name} must be {shape} for these inputs and this block, got {tuple(t.shape)}")


class NTKOperator:
    """The tangent kernel of a block on one set of inputs as a linear operator, never formed.

    It has what `scipy.sparse.linalg.aslinearoperator` asks for (`shape`, `dtype`, `matvec`, `rmatvec`, `matmat`), so
    that `cg`, `eigsh` and the like take it, and `A @ v`. Vectors are tensors or numpy arrays; the result is of the same
    kind, a tensor on the block's device, in the dtype of the operator: a float64 vector on a float32 operator gives
    float32. A product costs O(N (d + outputs) h), or O(N d h) per column for the trace, and the operator holds
    a few (N, neurons) matrices; see `ntk_operator`.

    Attributes:
        shape: (N, N), or (N outputs, N outputs) for the full kernel, whose vectors run over outputs first.

    Examples:
        >>> block = mlp_fusion.FusedMLP.from_mlp(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
        >>> x, v = torch.randn(5, 8), torch.randn(5)
        >>> operator = fusion_kernels.ntk_operator(block, x, reduce="pseudo")
        >>> gram = fusion_kernels.ntk_gram(block, x, reduce="pseudo")
        >>> operator.shape, torch.allclose(operator @ v, gram @ v, rtol=1e-3, atol=1e-4)
        ((5, 5), True)
    """

    def __init__(
        self, prepared: Prepared, x: Tensor, reduce: str, direction: Tensor | None, kernel: str, shift: float = 0.0
    ) -> None:
        """See `ntk_operator`; `reduce` is `"full"`, `"trace"` or `"vector"`."""
        described = (prepared.ffn, prepared.parts, kernel, reduce, direction, prepared.metric, _USES)
        self._kernel: FactoredKernel = exactly(FactoredKernel)(x, *described)
        self._like = prepared.ffn.w_out[:0]
        self._rows, self._outputs, self._shift = len(x), prepared.outputs if reduce == "full" else None, shift
        size = len(x) * (1 if self._outputs is None else self._outputs)
        self.shape = (size, size)

    @property
    def dtype(self) -> Any:
        """The numpy dtype of the products."""
        return torch.empty(0, dtype=self._like.dtype).numpy().dtype

    @property
    def device(self) -> torch.device:
        """Where the products are computed."""
        return self._like.device

    def _columns(self, v: Any, side: int) -> Any:
        """K v for (size,) or (size, M), a tensor or an array."""
        tensor = v if isinstance(v, Tensor) else torch.as_tensor(v)
        if tensor.ndim not in (1, 2) or len(tensor) != self.shape[0]:
            raise ValueError(f"a vector for this operator must be ({self.shape[0]},) or ({self.shape[0]}, M): "
                             f"got {tuple(tensor.shape)}")  # fmt: skip
        columns = tensor.detach().to(self._like)
        if tensor.ndim == 1:
            columns = columns[:, None]
        run = exactly(lambda part: self._kernel.times(part, side))
        if self._outputs is None:
            result = run(columns)
        else:
            parts = [run(c.reshape(self._rows, self._outputs)).reshape(-1, 1) for c in columns.unbind(1)]
            result = torch.cat(parts, 1) if parts else torch.zeros_like(columns)
        result = result.add_(columns, alpha=self._shift).view(tensor.shape)
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
        if self._outputs is not None:
            raise ValueError("diagonal is of a kernel with one number per pair of inputs: reduce the outputs")
        return self._kernel.diagonal() + self._shift


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

    Examples:
        >>> block = mlp_fusion.FusedMLP.from_mlp(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
        >>> x = torch.randn(5, 8)
        >>> operator = fusion_kernels.ntk_operator(block, x, reduce="trace", shift=0.5)
        >>> gram = fusion_kernels.ntk_gram(block, x)
        >>> torch.allclose(operator.matmat(torch.eye(5)), gram + 0.5 * torch.eye(5), rtol=1e-3, atol=1e-4)
        True
    """
    check_name("kernel", kernel, KERNELS)
    if not math.isfinite(shift):
        raise ValueError(f"shift must be finite, got {shift}")
    prepared = prepare(block, {"x": x}, params, metric)
    rows = prepared.rows["x"]
    return NTKOperator(prepared, rows, *_linear(reduce, prepared.outputs, rows), kernel, shift)


def _linear(reduce: Reduce, outputs: int, like: Tensor) -> tuple[str, Tensor | None]:
    """`contraction_named` of a kernel that is a linear operator.

    Raises:
        ValueError: as there, or the diagonal of outputs.
    """
    named, direction = contraction_named(reduce, outputs, like)
    if named == "diagonal":
        raise ValueError("the diagonal of outputs is not a linear operator: use 'full', 'trace', 'pseudo' or a vector")
    return named, direction


def ntk_vp(
    block: Block,
    x: Tensor,
    v: Tensor,
    *,
    params: str | Sequence[str] | None = None,
    metric: Tensor | None = None,
    kernel: Kernel = "gd",
    backend: str = "auto",
) -> Tensor:
    """Return the full tangent kernel of `x` times a matrix: what a step of size 1 along `-v` takes off the outputs.

    Row n of the result is `sum_m K(x_n, x_m) v_m` with the (outputs, outputs) blocks K of `ntk_gram(..., "full")`. No
    kernel is formed: each of its products goes through parameter space (a vjp, then a jvp: 8 N h O + 4 N d h
    operations in all) or through a Gram matrix of inputs or hidden values, whichever costs less.

    Args:
        block, params, metric, kernel: as in `ntk_gram`.
        x: (N, d).
        v: (N, outputs).
        backend: as in `jvp`.

    Returns:
        (N, outputs), in the dtype of the computation.

    Raises:
        ValueError: as in `ntk_gram`, or `v` does not fit.
        BackendUnavailableError: `backend` cannot run here.

    Examples:
        >>> block = mlp_fusion.FusedMLP.from_mlp(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
        >>> x, v = torch.randn(5, 8), torch.randn(5, 4)
        >>> full = fusion_kernels.ntk_gram(block, x, reduce="full")
        >>> product = fusion_kernels.ntk_vp(block, x, v)
        >>> torch.allclose(product, torch.einsum("nmop,mp->no", full, v), rtol=1e-3, atol=1e-4)
        True
    """
    check_name("kernel", kernel, KERNELS)
    function = NTK_VP.function(backend, x)
    prepared = prepare(block, {"x": x}, params, metric, {"v": v})
    check_columns("v", v, (len(x), prepared.outputs))
    rows, columns = prepared.rows["x"], prepared.rows["v"]
    return function(rows, *prepared.described(), columns, prepared.parts, kernel, "full", None, prepared.metric)


def trace_ntk_vp(
    block: Block,
    x: Tensor,
    v: Tensor,
    reduce: Reduce = "trace",
    *,
    params: str | Sequence[str] | None = None,
    metric: Tensor | None = None,
    kernel: Kernel = "gd",
    backend: str = "auto",
) -> Tensor:
    """Return the tangent kernel of `x`, one number per pair of inputs, times vectors: 4 N d h operations per column.

    Args:
        block, params, metric, kernel: as in `ntk_gram`.
        x: (N, d).
        v: (N,) or (N, M).
        reduce: `"trace"`, `"pseudo"` or a vector of outputs.
        backend: as in `jvp`.

    Returns:
        The shape of `v`, in the dtype of the computation.

    Raises:
        ValueError: as in `ntk_gram`, or `v` does not fit.
        BackendUnavailableError: `backend` cannot run here.

    Examples:
        >>> block = mlp_fusion.FusedMLP.from_mlp(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
        >>> x, v = torch.randn(5, 8), torch.randn(5, 3)
        >>> product = fusion_kernels.trace_ntk_vp(block, x, v)
        >>> torch.allclose(product, fusion_kernels.ntk_gram(block, x) @ v, rtol=1e-3, atol=1e-4)
        True
    """
    check_name("kernel", kernel, KERNELS)
    if isinstance(reduce, str) and reduce == "full":
        raise ValueError("trace_ntk_vp is of a kernel with one number per pair of inputs: use ntk_vp for 'full'")
    if v.ndim not in (1, 2) or len(v) != len(x):
        raise ValueError(f"v must be ({len(x)},) or ({len(x)}, M) for these inputs, got {tuple(v.shape)}")
    function = NTK_VP.function(backend, x)
    prepared = prepare(block, {"x": x}, params, metric, {"v": v})
    rows, columns = prepared.rows["x"], prepared.rows["v"]
    contracted = _linear(reduce, prepared.outputs, rows)
    columns = columns if v.ndim == 2 else columns[:, None]
    described = (*prepared.described(), columns, prepared.parts, kernel, *contracted)
    return function(rows, *described, prepared.metric).view(v.shape)
