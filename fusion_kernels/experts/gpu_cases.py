"""What the Triton kernels of experts prove themselves with: rows of each expert as one block's, see `mlp/gpu_cases.py`.

Some experts have no rows, and some rows have no expert: their results are zeros. Tokens have several choices each,
whose gradients are added up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusion_kernels.experts import triton_backend
from fusion_kernels.experts.operators import tokens_of
from fusion_kernels.experts.reference import experts_backward, spans
from fusion_kernels.ffn import FFN
from fusion_kernels.mlp.gpu_cases import UNITS, draw, off, sizes
from fusion_kernels.mlp.types import Needs
from fusion_kernels.proof.cases import Case, Found, beyond

#: Rows of each expert, at least so many of none behind them, and choices of each token.
COUNTS, BEYOND, CHOICES = (0, 130, 1, 0, 64, 17), 5, 2
#: Inputs, neurons.
SHAPES = {torch.bfloat16: [(256, 192), (123, 50)], torch.float16: [(256, 192)]}


def experts(device: torch.device) -> list[Case]:
    """The cases of `triton` on a device."""
    return [
        experts_case(dtype, shape, gated, device)
        for dtype, shapes in SHAPES.items()
        for shape in shapes
        for gated in (False, True)
    ]


def experts_case(dtype: torch.dtype, shape: tuple[int, int], gated: bool, device: torch.device) -> Case:
    """All experts of one layer."""
    (d, h), E, T = shape, len(COUNTS), -(-(sum(COUNTS) + BEYOND) // CHOICES)
    S = T * CHOICES
    every, dy, ffn = draw(S, d, h, gated, dtype, (E,))
    x, ends = every[:T], torch.tensor(COUNTS).cumsum(0).int()
    order = torch.randperm(S, generator=torch.Generator().manual_seed(0))

    def run() -> Found:
        routed, block = (x.to(device), order.to(device), ends.to(device)), ffn.map(lambda t: t.to(device))
        y, *kept = triton_backend.forward(*routed, block, 1)
        needs = Needs(True, *(t is not None for t in block.tensors))
        found = triton_backend.backward(dy.to(device), *routed, block, (kept[0], kept[1], kept[2]), 1, needs)
        return {"y": y, **{name: t for name, t in found._asdict().items() if t is not None}}

    def wrong(found: Found) -> str | None:
        if bool(found["y"][order[sum(COUNTS) :]].any()):
            return "rows of no expert are not zero"
        reached, rows, given = dict(spans(ends)), x[tokens_of(order, x)], dy[order]
        of_experts = {name: t for name, t in found.items() if name not in ("y", "x")}
        for expert in range(E):
            if expert not in reached:
                if any(bool(t[expert].any()) for t in of_experts.values()):
                    return f"expert {expert} has no rows, and gradients that are not zero"
                continue
            own = reached[expert]
            results = {"y": found["y"][order[own]], **{name: t[expert] for name, t in of_experts.items()}}
            reason = off(results, rows[own], given[own], ffn.at(expert))
            if reason is not None:
                return f"expert {expert}: {reason}"
        return _sums_off(found["x"], x, dy, order, ends, ffn)

    return Case(f"{E} experts, {'gated' if gated else 'plain'}, {dtype}, {T} x {CHOICES} x {d} x {h}", run, wrong)


def _sums_off(found: Tensor, x: Tensor, dy: Tensor, order: Tensor, ends: Tensor, ffn: FFN) -> str | None:
    """In one line by how much the gradient of x is off: each token's is the sum of its choices', as if it were many."""
    rows, given, block = x.double().repeat_interleave(CHOICES, 0), dy.double(), ffn.map(Tensor.double)
    exact = experts_backward(given, rows, order, ends, block, Needs(True, *(False for _ in ffn.tensors))).x
    assert exact is not None
    size = exact.abs()
    for expert, own in spans(ends):
        size[order[own]] += sizes(rows[order[own]], given[order[own]], block.at(expert))["x"]
    total = exact.unflatten(0, (-1, CHOICES)).sum(1)
    allowed = size.square().unflatten(0, (-1, CHOICES)).sum(1).sqrt() + total.abs()
    return beyond("x", found, total, UNITS * torch.finfo(x.dtype).eps * allowed)
