"""What the Triton kernels of experts prove themselves with: rows of each expert as one block's, see `mlp/gpu_cases.py`.

Some experts have no rows, and some rows have no expert: their results are zeros.
"""

from __future__ import annotations

import torch

from fusion_kernels.experts import triton_backend
from fusion_kernels.experts.reference import spans
from fusion_kernels.mlp.gpu_cases import draw, off
from fusion_kernels.mlp.types import Needs
from fusion_kernels.proof.cases import Case, Found

#: Rows of each expert, and rows of none behind them.
COUNTS, BEYOND = (0, 130, 1, 0, 64, 17), 5
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
    (d, h), S, E = shape, sum(COUNTS) + BEYOND, len(COUNTS)
    x, dy, ffn = draw(S, d, h, gated, dtype, (E,))
    ends = torch.tensor(COUNTS).cumsum(0).int()

    def run() -> Found:
        there, block, at = x.to(device), ffn.map(lambda t: t.to(device)), ends.to(device)
        y, *kept = triton_backend.forward(there, at, block, 1)
        needs = Needs(True, *(t is not None for t in block.tensors))
        found = triton_backend.backward(dy.to(device), there, at, block, (kept[0], kept[1], kept[2]), 1, needs)
        return {"y": y, **{name: t for name, t in found._asdict().items() if t is not None}}

    def wrong(found: Found) -> str | None:
        if bool(found["y"][S - BEYOND :].any()) or bool(found["x"][S - BEYOND :].any()):
            return "rows of no expert are not zero"
        reached = dict(spans(ends))
        for expert in range(E):
            if expert not in reached:
                if any(bool(t[expert].any()) for name, t in found.items() if name not in ("y", "x")):
                    return f"expert {expert} has no rows, and gradients that are not zero"
                continue
            rows = reached[expert]
            own = {name: t[rows] if name in ("y", "x") else t[expert] for name, t in found.items()}
            reason = off(own, x[rows], dy[rows], ffn.at(expert))
            if reason is not None:
                return f"expert {expert}: {reason}"
        return None

    return Case(f"{E} experts, {'gated' if gated else 'plain'}, {dtype}, {S} x {d} x {h}", run, wrong)
