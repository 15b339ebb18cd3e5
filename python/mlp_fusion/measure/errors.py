"""How far a fused FFN is from the original: its outputs and its neural tangent kernel (NTK)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fusion_kernels import ntk_gram
from fusion_kernels.ntk import Kernel
from mlp_fusion.neurons import NeuronBundle

#: The kernels: what a gradient-descent step sees, and what a sign (Adam-like) step sees.
KERNELS: tuple[Kernel, ...] = ("gd", "sign")
#: Leading eigenvalues of each kernel that are kept.
SPECTRUM_SIZE = 32
#: Multiply-adds of a kernel below which an FFN is measured by one thread: waking others takes longer than it does.
_WORTH_THREADS = 1 << 28


@dataclass(frozen=True)
class FFNErrors:
    """Relative Frobenius errors of one fused FFN.

    Attributes:
        output: of the outputs.
        ntk: kernel (`gd`, `sign`) -> part (`total`, `w_in`, `b_in`, `w_out`) -> error. The gate counts with `w_in`; a
            part that the FFN lacks (a bias) is left out. The output bias is untouched by fusion and counts nowhere.
        spectrum: kernel -> `before` and `after` -> the leading eigenvalues on the inputs, descending, at most
            `SPECTRUM_SIZE`, as shares of the trace of the original's kernel. The sign kernel is not symmetric: these
            are the eigenvalues of its symmetric part, which has the same trace. A kernel that is zero or not finite
            has no such shares and is left out.
    """

    output: float
    ntk: dict[str, dict[str, float]]
    spectrum: dict[str, dict[str, list[float]]]


def relative_error(approximation: Tensor, exact: Tensor) -> float:
    """`|approximation - exact|_F / |exact|_F` in float64; 0 when both are 0, inf when only `exact` is.

    Examples:
        >>> from mlp_fusion.measure import relative_error
        >>> relative_error(torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0]))
        0.8
    """
    difference = float(torch.linalg.vector_norm(approximation.double() - exact.double()))
    norm = float(torch.linalg.vector_norm(exact.double()))
    if norm == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / norm


def ffn_parts(bundle: NeuronBundle) -> dict[str, tuple[str, ...]]:
    """Part (`w_in`, `b_in`, `w_out`) -> the bundle's tensors in it; parts that the FFN lacks are left out."""
    weights = ("w_gate", "w_in") if bundle.gated else ("w_in",)
    biases = tuple(name for name in ("b_gate", "b_in") if getattr(bundle, name) is not None)
    return {"w_in": weights, **({"b_in": biases} if biases else {}), "w_out": ("w_out",)}


def ffn_errors(original: NeuronBundle, fused: NeuronBundle, x: Tensor) -> FFNErrors:
    """Compare one fused FFN with the original on real inputs.

    Args:
        original: the FFN before, B = 1.
        fused: after, B = 1, in the parameterization it will be trained in: the kernel depends on it.
        x: `(T, d)` inputs of this FFN. Time and memory grow as T^2 for the kernels.

    Source: section 4.2 of arXiv 2307.08941 for the kernel; the sign kernel is `J sign(J)^T`, what a step of sign
    descent, to which Adam is close, changes the outputs by.
    """
    inputs, neurons = original.w_in.shape[2], original.width
    with _one_thread(len(x) ** 2 * (inputs + 2 * neurons) < _WORTH_THREADS):
        return _ffn_errors(original, fused, x)


def _ffn_errors(original: NeuronBundle, fused: NeuronBundle, x: Tensor) -> FFNErrors:
    output = relative_error(fused.forward(x)[0], original.forward(x)[0])
    ntk: dict[str, dict[str, float]] = {}
    spectrum: dict[str, dict[str, list[float]]] = {}
    for kernel in KERNELS:
        totals: list[Tensor] = [torch.zeros(()), torch.zeros(())]
        errors: dict[str, float] = {}
        for part, names in ffn_parts(original).items():
            grams = [ntk_gram(b, x, params=names, kernel=kernel) for b in (fused, original)]
            errors[part] = relative_error(*grams)
            totals = [total + gram for total, gram in zip(totals, grams, strict=True)]
        ntk[kernel] = {"total": relative_error(*totals), **errors}
        after, before = totals
        trace = float(before.trace())
        if 0 < trace < math.inf and all(bool(total.isfinite().all()) for total in totals):
            spectrum[kernel] = {
                name: leading_eigenvalues(total / trace) for name, total in (("before", before), ("after", after))
            }
    return FFNErrors(output, ntk, spectrum)


def leading_eigenvalues(kernel: Tensor) -> list[float]:
    """The largest eigenvalues of the symmetric part of a `(T, T)` matrix, descending, at most `SPECTRUM_SIZE`.

    On one thread: LAPACK shares the thousands of small steps of a few hundred rows among all, which then wait for each
    other several times as long as one of them works.
    """
    symmetric = (kernel + kernel.mT) / 2
    # Rows of `kernel` that repeat leave eigenvalues of 0, next to which LAPACK's iterations may never end: what they
    # may leave is measured by the diagonal beside it. All eigenvalues are moved away from there, and back.
    shift = symmetric.diagonal().mean()
    symmetric.diagonal().add_(shift)
    with _one_thread(True):
        values: list[float] = (torch.linalg.eigvalsh(symmetric).flip(0)[:SPECTRUM_SIZE] - shift).tolist()
    return values


@contextmanager
def _one_thread(alone: bool) -> Iterator[None]:
    """What runs inside has one thread if it is to be `alone`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if alone else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
