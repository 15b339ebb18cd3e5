"""What the tangent-kernel functions and their operators take: names of kernels and reductions, and blocks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from fusion_kernels.ffn import FFN
from fusion_kernels.library import check_name

Kernel = Literal["gd", "sign"]
#: How the outputs of a block enter its kernel; a vector is a direction r, for the kernel of the function r.F.
Reduce = Literal["trace", "full", "diagonal", "pseudo"] | Sequence[float] | Tensor
#: How the products of a float32 kernel are computed; all but the first by the backends `"triton"` and `"cuda"` only:
#:
#:     highest   multiply-add in float32, without tensor cores
#:     tf32x3    each value as the sum of two TF32, 22 significant bits; three products on tensor cores
#:     bf16x3    each value as the sum of two bfloat16, 16 significant bits; three products on tensor cores
#:     bf16      each value rounded to bfloat16, 8 significant bits; one product
#:
#: float64 kernels have float64 multiply-add, `highest`.
Precision = Literal["highest", "tf32x3", "bf16x3", "bf16"]
#: What inner products of gradients are computed through: products of tokens, or the gradients themselves.
Via = Literal["auto", "ghost", "direct"]

#: What callers may name. Each backend has a list of its own of what it knows, and refuses what is not in that.
KERNELS = ("gd", "sign")
VIAS = ("auto", "ghost", "direct")


class Block(Protocol):
    """Anything that can be seen as an `FFN` with a batch axis of 1: what `as_bundle()` returns has the fields of one.

    A block may also offer `trainable_parts() -> tuple[str, ...]`: the parts that count in its NTK unless the caller
    names others.
    """

    def as_bundle(self) -> FFN: ...


class Differentiated(NamedTuple):
    """A block, the parts it is differentiated by, and the metric (N,) of its neurons or None."""

    ffn: FFN
    params: Sequence[str]
    metric: Tensor | None


def check_names(
    kernel: str, reduce: str, direction: Tensor | None, kernels: Collection[str], reductions: Collection[str]
) -> None:
    """Raise ValueError for a kernel or a reduction that is not known, or a direction that does not go with it."""
    check_name("kernel", kernel, kernels)
    check_name("reduction", reduce, reductions)
    if (direction is not None) != (reduce == "vector"):
        raise ValueError(f"reduction {reduce!r}: pass a direction to 'vector' and to no other")
