"""`fusion_kernels::experts` and its backward: the blocks of many experts on rows that are sorted by expert.

As with `fusion_kernels::mlp`, the forward returns what its level saves and the backward is an operator too, and outside
of tracing `run` calls the backend itself. Gradients of gradients come from differentiating the specification.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from fusion_kernels.library import NAMESPACE, Operator, operator
from fusion_kernels.mlp.operators import Gradients, Outputs, is_direct, packed
from fusion_kernels.reference import experts as reference
from fusion_kernels.reference.mlp import fold_scale

#: x (S, d), the ends of the experts' rows (E,), and the seven tensors of the blocks.
N_INPUTS = 9
_INPUTS = (
    "Tensor x, Tensor ends, Tensor w_in, Tensor? b_in, Tensor? w_gate, Tensor? b_gate, Tensor w_out, Tensor? b_out, "
    "Tensor? scale"
)


def _fake_forward(
    x: Tensor,
    ends: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    scale: Tensor | None,
    activation: str,
    checkpoint_level: int,
    backend: str,
) -> Outputs:
    hidden = (x.shape[0], w_in.shape[1])
    return (
        x.new_empty((x.shape[0], w_out.shape[1])),
        x.new_empty(hidden if checkpoint_level < 2 else (0,)),
        x.new_empty(hidden if checkpoint_level < 2 and w_gate is not None else (0,)),
        x.new_empty(hidden if checkpoint_level == 0 else (0,)),
    )


def _fake_backward(dy: Tensor, x: Tensor, ends: Tensor, *rest: Any) -> Gradients:
    weights, needs = rest[: N_INPUTS - 2], rest[-1]
    pairs = zip((x, *weights), needs, strict=True)
    return packed(x, [t.new_empty(t.shape) if need and t is not None else None for t, need in pairs])


def _choose(x: Tensor, w_in: Tensor, w_out: Tensor, backend: str) -> str:
    if backend != "auto" or x.device.type != "cuda":
        return backend
    # Products of all experts in one launch need rows of whole 16 bytes; everything else goes expert by expert.
    aligned = all(size * x.element_size() % 16 == 0 for size in (*w_in.shape[1:], w_out.shape[1]))
    hopper = torch.cuda.get_device_capability(x.device)[0] >= 9
    return "grouped_mm" if hopper and aligned and x.dtype == torch.bfloat16 else "loop"


EXPERTS: Operator = operator(
    "experts",
    f"({_INPUTS}, str activation, int checkpoint_level, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_forward,
    lambda x, ends, w_in, b_in, w_gate, b_gate, w_out, *rest: _choose(x, w_in, w_out, rest[-1]),
)
EXPERTS_BACKWARD: Operator = operator(
    "experts_backward",
    f"(Tensor dy, {_INPUTS}, Tensor z, Tensor g, Tensor a, str activation, int checkpoint_level, str backend, "
    "bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
    lambda dy, x, ends, w_in, b_in, w_gate, b_gate, w_out, *rest: _choose(x, w_in, w_out, rest[-2]),
)


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
        x, w_in, b_in, w_gate, b_gate, w_out, b_out, scale = inputs
        y = reference.experts(x, ends, w_in, b_in, w_gate, b_gate, w_out, b_out, scale, ctx.options[0])
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
