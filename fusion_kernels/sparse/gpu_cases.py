"""What the Triton kernel of sampled products proves itself with: every entry against float64."""

from __future__ import annotations

import torch
from torch import Tensor

from fusion_kernels.proof.cases import Case, Found, beyond
from fusion_kernels.sparse import triton_backend
from fusion_kernels.sparse.reference import sampled_product

#: Tokens, rows and columns of the product, entries: whole tiles and rests, few tokens, one entry.
SHAPES = [(1024, 192, 768, 3000), (300, 65, 123, 517), (5, 7, 9, 1)]
#: Units in the last place of float32 that an entry may be off, of the sum of its absolute values: every 256th token is
#: added to the same sum, and these sums then in a tree.
UNITS = 16


def sampled(device: torch.device) -> list[Case]:
    """The cases of `triton` on a device."""
    return [
        sampled_case(dtype, shape, device)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for shape in SHAPES
    ]


def draw(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """g, x, rows and columns, the same on every machine."""
    T, N, d, k = shape
    generator = torch.Generator().manual_seed(T + N + d + k)
    g, x = (torch.randn(T, n, generator=generator, dtype=torch.float64).to(dtype) for n in (N, d))
    at = torch.randperm(N * d, generator=generator)[:k].sort().values
    return g, x, (at // d).int(), (at % d).int()


def sampled_case(dtype: torch.dtype, shape: tuple[int, int, int, int], device: torch.device) -> Case:
    """One product."""
    g, x, rows, columns = draw(shape, dtype)

    def run() -> Found:
        return {"found": triton_backend.sampled_product(*(t.to(device) for t in (g, x, rows, columns)))}

    def wrong(found: Found) -> str | None:
        exact = sampled_product(g.double(), x.double(), rows, columns)
        absolute = sampled_product(g.double().abs(), x.double().abs(), rows, columns)
        return beyond("found", found["found"], exact, UNITS * torch.finfo(torch.float32).eps * absolute + 1e-30)

    T, N, d, k = shape
    return Case(f"{k} entries of {N} x {d} over {T} tokens, {dtype}", run, wrong)
