"""`fusion_kernels::experts` and its backward: the blocks of many experts on rows that are sorted by expert.

As with `fusion_kernels::mlp`, the forward returns what its level saves and the backward is an operator too, and outside
of tracing `run` calls the backend itself. Gradients of gradients come from differentiating the specification.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from fusion_kernels.experts import reference as reference
from fusion_kernels.library import NAMESPACE, Backend, Operator, operator
from fusion_kernels.mlp.operators import (
    Gradients,
    Outputs,
    Saved,
    fake_gradients,
    fake_outputs,
    is_direct,
    parse_backward,
    parse_forward,
)
from fusion_kernels.mlp.reference import Block, fold_scale

#: x (S, d), the ends of the experts' rows (E,), and the seven tensors of the blocks.
N_INPUTS = 9
_INPUTS = (
    "Tensor x, Tensor ends, Tensor w_in, Tensor? b_in, Tensor? w_gate, Tensor? b_gate, Tensor w_out, Tensor? b_out, "
    "Tensor? scale"
)


def _fake_forward(x: Tensor, ends: Tensor, *rest: Any) -> Outputs:
    block, checkpoint_level, _ = parse_forward(rest)
    return fake_outputs(x, block, checkpoint_level)


def _fake_backward(dy: Tensor, x: Tensor, ends: Tensor, *rest: Any) -> Gradients:
    block, *_, needs = parse_backward(rest)
    return fake_gradients(x, block, needs)


def _choose(x: Tensor, block: Block, backend: str) -> str:
    if backend != "auto" or x.device.type != "cuda":
        return backend
    # Products of all experts in one launch need rows of whole 16 bytes; everything else goes expert by expert.
    aligned = all(size * x.element_size() % 16 == 0 for size in (*block.w_in.shape[1:], block.w_out.shape[1]))
    hopper = torch.cuda.get_device_capability(x.device)[0] >= 9
    return "grouped_mm" if hopper and aligned and x.dtype == torch.bfloat16 else "loop"


def _choose_forward(x: Tensor, ends: Tensor, *rest: Any) -> str:
    block, _, backend = parse_forward(rest)
    return _choose(x, block, backend)


def _choose_backward(dy: Tensor, x: Tensor, ends: Tensor, *rest: Any) -> str:
    block, _, _, backend, _ = parse_backward(rest)
    return _choose(x, block, backend)


EXPERTS: Operator = operator(
    "experts",
    f"({_INPUTS}, str activation, int checkpoint_level, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_forward,
    _choose_forward,
)
EXPERTS_BACKWARD: Operator = operator(
    "experts_backward",
    f"(Tensor dy, {_INPUTS}, Tensor z, Tensor g, Tensor a, str activation, int checkpoint_level, str backend, "
    "bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
    _choose_backward,
)


def register(
    name: str,
    forward: Callable[[Tensor, Tensor, Block, int], Outputs],
    backward: Callable[[Tensor, Tensor, Tensor, Block, Saved, int, Sequence[bool]], Gradients],
    device_types: tuple[str, ...],
    why_not: Callable[[], str | None] = lambda: None,
) -> None:
    """Add a backend of both operators; its tensors of the block have an axis of experts before the others."""

    def forward_of_schema(x: Tensor, ends: Tensor, *rest: Any) -> Outputs:
        block, checkpoint_level, _ = parse_forward(rest)
        return forward(x, ends, block, checkpoint_level)

    def backward_of_schema(dy: Tensor, x: Tensor, ends: Tensor, *rest: Any) -> Gradients:
        block, kept, checkpoint_level, _, needs = parse_backward(rest)
        return backward(dy, x, ends, block, kept, checkpoint_level, needs)

    EXPERTS.register(Backend(name, forward_of_schema, device_types, why_not))
    EXPERTS_BACKWARD.register(Backend(name, backward_of_schema, device_types, why_not))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:N_INPUTS], *output[1:])
    ctx.options = inputs[N_INPUTS:]


def _differentiate(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:N_INPUTS])
    nothing = (None,) * len(ctx.options)
    if dy is None:
        return (*(None for _ in wanted), *nothing)
    x, ends, *weights = ctx.saved_tensors[:N_INPUTS]
    if torch.is_grad_enabled():
        # create_graph: the gradients themselves will be differentiated.
        inputs: list[Any] = [None if t is None else t.view_as(t) for t in (x, *weights)]
        x, *tensors = inputs
        y = reference.experts(x, ends, Block._make((*tensors, ctx.options[0])))
        needs = [wanted[0], *wanted[2:]]
        sources = [t for t, need in zip(inputs, needs, strict=True) if need and t is not None]
        found = iter(torch.autograd.grad(y, sources, dy, create_graph=True, allow_unused=True))
        dx, *others = (next(found) if need else None for need in needs)
        return (dx, None, *others, *nothing)
    needs = [wanted[0], *wanted[2:]]
    saved = ctx.saved_tensors
    backward = EXPERTS_BACKWARD.direct if is_direct((dy, *saved)) else EXPERTS_BACKWARD.overload
    gradients: Gradients = backward(dy, *saved, *ctx.options, needs)
    dx, *others = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
    return (dx, None, *others, *nothing)


torch.library.register_autograd(f"{NAMESPACE}::experts", _differentiate, setup_context=_save)


class _Direct(torch.autograd.Function):
    """The forward operator's derivative without the operators between."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y, z, g, a = EXPERTS.direct(*inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:N_INPUTS], z, g, a)
        ctx.options = inputs[N_INPUTS:]
        return y

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return _differentiate(ctx, cotangents[0])


def run(*arguments: Any, trains: bool) -> Tensor:
    """y of the forward operator's arguments, differentiable; `trains` says whether anything asks for a gradient."""
    if not is_direct(arguments[:N_INPUTS]):
        y: Tensor = EXPERTS.overload(*arguments)[0]
        return y
    return _Direct.apply(*arguments) if trains else EXPERTS.direct(*arguments)[0]


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


def folded(w_out: Tensor, scale: Tensor | None, x: Tensor) -> Tensor:
    """W_out diag(p) of every expert, (E, d_out, h), in the dtype of x."""
    return fold_scale(w_out, None if scale is None else scale.unsqueeze(1), x.dtype)
