"""`fusion_kernels::experts` and its backward: the blocks of many experts on routed tokens.

The operator is `BlockOperator` on tensors with an axis of experts before the others; behind x, the tokens as they are,
it takes the choices sorted by expert and the ends of the experts' rows, see `reference`. Only what is hidden lies in
that order: who differentiates keeps x and no copy of it, and nothing else has to be put in order before or behind.
Compilers get the `grouped_mm` backend inline where they know its products.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from fusion_kernels.experts import reference as reference
from fusion_kernels.ffn import FFN
from fusion_kernels.gpu import capability
from fusion_kernels.mlp.choice import Choice
from fusion_kernels.mlp.operators import BlockOperator


def aligned(x: Tensor, ffn: FFN) -> bool:
    """Whether all rows are of whole 16 bytes, as torch's products of all experts at once need them."""
    return all(size * x.element_size() % 16 == 0 for size in (*ffn.w_in.shape[1:], ffn.w_out.shape[2]))


# A compiler takes the answer as a constant, and cannot ask itself.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _one_launch(device: torch.device) -> bool:
    """Whether torch has one launch for these products: other GPUs may get a loop that waits for the ends of rows."""
    return capability(device)[0] in (9, 10)


def _without_measurements(x: Tensor, ffn: FFN) -> str:
    # What torch has no one launch for goes expert by expert.
    grouped = x.dtype == torch.bfloat16 and aligned(x, ffn) and _one_launch(x.device)
    return "grouped_mm" if grouped else "loop"


#: x (T, d), the choices by expert (S,), the ends of the experts' rows (E,), and the tensors of the blocks.
EXPERTS = BlockOperator(
    "experts",
    reference.experts_backward,
    Choice(_without_measurements, ("triton",), waiting=("loop",)),
    extra_inputs=("order", "ends"),
)


def by_expert(top_k_index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The choices `top_k_index` (T, k) by expert, (T k,) int64, and the ends of the experts' rows, (E,) int32."""
    # Whatever is no expert here comes last.
    ids = torch.where(top_k_index < 0, experts, top_k_index).reshape(-1)
    owner, order = torch.sort(ids, stable=True)
    ends = torch.searchsorted(owner, torch.arange(experts, device=owner.device, dtype=owner.dtype), right=True)
    return order, ends.int()


def tokens_of(order: Tensor, x: Tensor) -> Tensor:
    """(S,) int64: which token of x is the input of every row."""
    k = reference.choices(x, order)
    return order if k == 1 else order // max(1, k)


def by_choice(rows: Tensor, order: Tensor) -> Tensor:
    """The rows (S, n) in the order of the choices. Every one is written once: nothing is added up."""
    return torch.empty_like(rows).index_copy_(0, order, rows)


def rows_of_experts(ends: Tensor, rows: int) -> Tensor:
    """(rows,) int64: the expert of every row, and the number of experts for rows that belong to none."""
    return torch.searchsorted(ends, torch.arange(rows, device=ends.device, dtype=ends.dtype), right=True)


def sum_of_rows(values: Tensor, ends: Tensor) -> Tensor:
    """(E, n) sums of the rows (S, n) of every expert, in their order, in float32 at least: the same bits every time."""
    bounds = torch.nn.functional.pad(ends.long(), (1, 1))
    bounds[-1] = len(values)
    wide = values.to(torch.promote_types(values.dtype, torch.float32)).contiguous()
    # One more segment for the rows that belong to no expert; unsafe, because the check of the lengths would wait.
    return torch.segment_reduce(wide, "sum", lengths=bounds.diff(), axis=0, unsafe=True)[:-1]


Tensors = TypeVar("Tensors", bound=tuple[Tensor, ...])


def owned(tensors: Tensors, owner: Tensor, experts: int) -> Tensors:
    """`tensors`, with zeros in the rows that belong to no expert; empty ones stay as they are."""
    for t in tensors:
        if len(t):
            t.masked_fill_((owner >= experts).unsqueeze(1), 0)
    return tensors
