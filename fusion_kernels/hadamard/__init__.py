"""Walsh-Hadamard transforms, and Fastfood: random projections of any size that take no memory.

Three operators (`fusion_kernels::hadamard`, `fusion_kernels::fastfood`, `fusion_kernels::fastfood_transposed`), each
the gradient of itself or of another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusion_kernels import gpu, transforms
from fusion_kernels.hadamard import cpu_backend, triton_backend
from fusion_kernels.hadamard import reference as reference
from fusion_kernels.hadamard.types import MOST_BITS
from fusion_kernels.library import NAMESPACE, Backend, Operator, operator
from fusion_kernels.proof import Proof

__all__ = ["fastfood", "fastfood_transposed", "hadamard_transform"]

_PROOF = Proof("hadamard triton", "fusion_kernels.hadamard.gpu_cases:transforms")


def _declare(name: str, arguments: str, size: int | None) -> Operator:
    """An operator of a tensor and `arguments`, of which number `size` says how many entries rows have afterwards."""

    def fake(x: Tensor, *given: Any) -> Tensor:
        return x.new_empty(x.shape if size is None else (*x.shape[:-1], given[size]))

    def implementation(module: Any) -> Any:
        return lambda *given: getattr(module, name)(*given[:-1])

    op = operator(name, f"(Tensor x, {arguments}str backend) -> Tensor", fake, choose=lambda *given: given[-1])
    op.register(Backend("cpu", implementation(cpu_backend), ("cpu",), cpu_backend.why_not))
    op.register(Backend("triton", implementation(triton_backend), ("cuda",), gpu.why_not, proof=_PROOF))
    op.register(Backend("reference", implementation(reference), ("cpu", "cuda")))
    return op


HADAMARD = _declare("hadamard", "", None)
FASTFOOD = _declare("fastfood", "int size, int seed, ", 0)
FASTFOOD_TRANSPOSED = _declare("fastfood_transposed", "int length, int seed, ", 0)


def _differentiate(of: Operator, by: Operator) -> None:
    """Let `by`, which takes the number of entries of `of`'s input as its first argument, be the gradient of `of`."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *rest = inputs
        ctx.given = (x.shape[-1], *rest[1:]) if len(rest) > 1 else tuple(rest)

    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return by.overload(dy, *ctx.given), *[None] * len(ctx.given)

    torch.library.register_autograd(f"{NAMESPACE}::{of.name}", backward, setup_context=save)


_differentiate(HADAMARD, HADAMARD)
_differentiate(FASTFOOD, FASTFOOD_TRANSPOSED)
_differentiate(FASTFOOD_TRANSPOSED, FASTFOOD)


def hadamard_transform(x: Tensor, *, backend: str = "auto") -> Tensor:
    """The Walsh-Hadamard transform H x over the last axis, not normalised: H H = L.

    H_1 = 1, H_2n = [[H_n, H_n], [H_n, -H_n]]: the matrix of `scipy.linalg.hadamard`. Every backend adds in the same
    order, and has the same bits. An entry errs by at most log2(L) units of roundoff of the sum of absolute values.

    Args:
        x: (..., L) float32 or float64, L a power of two up to 2^30. Differentiable, any number of times.
        backend: `"auto"`, `"cpu"` (compiled), `"triton"` on CUDA, or `"reference"`.

    Returns:
        (..., L), new and contiguous.

    Raises:
        ValueError: L is no power of two or too large, or the dtype is another one.
        BackendUnavailableError: `backend` cannot run here.

    Source: Fino & Algazi 1976, "Unified matrix treatment of the fast Walsh-Hadamard transform".

    Examples:
        >>> fusion_kernels.hadamard_transform(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        tensor([10., -2., -4.,  0.])
    """
    _check("x", x)
    L = x.shape[-1]
    if L & (L - 1):
        raise ValueError(f"x has {L} entries in its last axis: fill it up with zeros to a power of two")
    if transforms.active():
        return reference.hadamard(x)
    result: Tensor = HADAMARD.overload(x, backend)
    return result


def fastfood(theta: Tensor, size: int, seed: int, *, backend: str = "auto") -> Tensor:
    """P theta: a random projection of theta to any number of entries, up or down, that keeps its norm on average.

    P is the first `size` rows of H G Pi H B / sqrt(size * sum of G^2), with L the least power of two that is not below
    `size`, H of :func:`hadamard_transform`, B signs, Pi a permutation and G nearly Gaussian numbers. They follow from
    seed and index alone, in integers, to the same bits on every device, and are drawn where they are used: a call needs
    memory for L entries, and none stays.

    Args:
        theta: (..., d) float32 or float64, 1 <= d <= 2^30. Of d > L entries those that are L apart are added up, each
            with its own sign: none is left out, and the norm is still kept on average. Differentiable.
        size: entries of the result, 1 to 2^30.
        seed: 0 <= seed < 2^63.
        backend: as for :func:`hadamard_transform`.

    Returns:
        (..., size), new and contiguous.

    Raises:
        ValueError: a number that is out of range, or another dtype.
        BackendUnavailableError: `backend` cannot run here.

    Source: Le, Sarlos & Smola 2013, "Fastfood: approximating kernel expansions in loglinear time", as Li et al. 2018
    (arXiv 1804.08838) use it.

    Examples:
        >>> theta = torch.randn(200)
        >>> y = fusion_kernels.fastfood(theta, 30_000, seed=0)
        >>> y.shape, bool(0.8 < y.norm() / theta.norm() < 1.2)
        (torch.Size([30000]), True)
    """
    _check("theta", theta)
    _check_numbers("size", size, seed)
    if transforms.active():
        return reference.fastfood(theta, size, seed)
    result: Tensor = FASTFOOD.overload(theta, size, seed, backend)
    return result


def fastfood_transposed(y: Tensor, length: int, seed: int, *, backend: str = "auto") -> Tensor:
    """P^T y for the P of :func:`fastfood`: the gradient of theta from that of P theta.

    Args:
        y: (..., size) float32 or float64. Differentiable.
        length: entries of theta, 1 to 2^30.
        seed: that of P.
        backend: as for :func:`hadamard_transform`.

    Returns:
        (..., length), new and contiguous.

    Raises:
        ValueError: a number that is out of range, or another dtype.
        BackendUnavailableError: `backend` cannot run here.

    Examples:
        >>> theta, y = torch.randn(10).double(), torch.randn(300).double()
        >>> ahead, back = fusion_kernels.fastfood(theta, 300, 7), fusion_kernels.fastfood_transposed(y, 10, 7)
        >>> torch.allclose(ahead @ y, theta @ back)
        True
    """
    _check("y", y)
    _check_numbers("length", length, seed)
    if transforms.active():
        return reference.fastfood_transposed(y, length, seed)
    result: Tensor = FASTFOOD_TRANSPOSED.overload(y, length, seed, backend)
    return result


def _check(name: str, x: Tensor) -> None:
    if x.ndim == 0 or not 1 <= x.shape[-1] <= 1 << MOST_BITS:
        raise ValueError(f"{name} is {tuple(x.shape)}: its last axis must have 1 to 2^{MOST_BITS} entries")
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} is {x.dtype}: convert it to torch.float32 or torch.float64")


def _check_numbers(name: str, number: int, seed: int) -> None:
    if not 1 <= number <= 1 << MOST_BITS:
        raise ValueError(f"{name} is {number}: use 1 to 2^{MOST_BITS}")
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"seed is {seed}: use 0 to 2^63 - 1")
