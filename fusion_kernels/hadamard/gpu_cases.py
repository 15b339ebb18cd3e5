"""What the Triton kernels of transforms and Fastfood prove themselves with: see `fusion_kernels.proof`.

Transforms have the bits of the reference. P and its transpose may err by what their sums allow, from the sums of
absolute values: a sign, a place or a number of G that is another is far beyond.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusion_kernels.hadamard import reference as reference
from fusion_kernels.hadamard import triton_backend
from fusion_kernels.hadamard.types import bits_of
from fusion_kernels.proof.cases import Case, Found, beyond, first_of, same_bits

#: Rows and bits of transforms: less than a tile, one, and passes over near and distant bits, over rows and rests.
TRANSFORMS = ((5, 0), (3, 7), (2, 12), (3, 15), (1, 22))
#: Entries of theta and of P theta: both in one tile or beyond it, theta longer than P theta, and no powers of two.
PROJECTIONS = ((5, 3), (3000, 768), (200, 70_000), (9000, 20_000))
SEED = 20


def transforms(device: torch.device) -> list[Case]:
    """The cases of `triton` on a device."""
    dtypes = (torch.float32, torch.float64)
    cases = [transform_case(rows, bits, dtype, device) for rows, bits in TRANSFORMS for dtype in dtypes]
    return cases + [fastfood_case(d, size, dtype, device) for d, size in PROJECTIONS for dtype in dtypes]


def transform_case(rows: int, bits: int, dtype: torch.dtype, device: torch.device) -> Case:
    """Rows of 2^bits entries."""
    x = _draw(rows, 1 << bits, dtype)

    def wrong(found: Found) -> str | None:
        return None if same_bits(found["y"], reference.hadamard(x)) else "y has other bits than the reference"

    return Case(f"{rows} rows of 2^{bits}, {dtype}", lambda: {"y": triton_backend.hadamard(x.to(device))}, wrong)


def fastfood_case(d: int, size: int, dtype: torch.dtype, device: torch.device) -> Case:
    """P of some theta, and its transpose."""
    theta, y = _draw(2, d, dtype), _draw(2, size, dtype)

    def run() -> Found:
        return {
            "y": triton_backend.fastfood(theta.to(device), size, SEED),
            "theta": triton_backend.fastfood_transposed(y.to(device), d, SEED),
        }

    def wrong(found: Found) -> str | None:
        exact = {
            "y": reference.fastfood(theta.double(), size, SEED),
            "theta": reference.fastfood_transposed(y.double(), d, SEED),
        }
        allowed = {"y": rounding(theta, d, size, SEED), "theta": rounding(y, d, size, SEED)}
        return first_of(*(beyond(name, t, exact[name], allowed[name]) for name, t in found.items()))

    return Case(f"{d} entries to {size} and back, {dtype}", run, wrong)


def rounding(x: Tensor, d: int, size: int, seed: int) -> Tensor:
    """(rows, 1) float64: by how much entries of P x or P^T x may err, for x (rows, entries), d entries of theta.

    Every entry is at most scale * sum |G| * sum |x|. A term of it goes through the additions of two transforms, of a
    fold each way, and two products. In float64, which is no more exact than what it is compared with, twice of that.
    """
    bits = bits_of(size)
    units = torch.finfo(x.dtype).eps / 2 * (2 if x.dtype == torch.float64 else 1)
    # Both folds add up to L / u entries, or to d / L.
    additions = 2 * bits + max(1 << bits, d) // min(1 << bits, d) + 4
    weight = float(reference.gaussians(seed, 1 << bits).abs().sum())
    scale = reference.scale(size, reference.energy(seed, bits))
    return additions * units * 1.01 * scale * weight * x.double().abs().sum(1, keepdim=True)


def _draw(rows: int, entries: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rows + entries)
    return torch.randn(rows, entries, generator=generator, dtype=torch.float64).to(dtype)
