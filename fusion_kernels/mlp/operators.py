"""`fusion_kernels::mlp` and `fusion_kernels::mlp_backward`: one operator per direction, plain and gated alike.

The operators do not look at the grad mode: what the forward saves is its argument `checkpoint_level`, and it returns
what it saves, so that a compiler sees (and may recompute) these tensors like any others. The first derivative is the
backward operator. Its own derivative, which makes `create_graph=True` right to any order, is that of the reference's
formulas; gradients of gradients are rare enough for plain torch.

A backend is a forward of (x, block, checkpoint_level) and a backward of (dy, x, block, kept, checkpoint_level, needs):
the schemas' tensors become one `Block` where they arrive.

Outside of tracing, `run` calls the backend itself: a Python operator costs as much as a block of one token on a CPU, or
as the kernels of a thousand on a GPU. The derivative is then that of `_Direct`, by the same backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fusion_kernels.library import NAMESPACE, Backend, Operator, operator
from fusion_kernels.mlp import heuristics
from fusion_kernels.mlp import reference as reference
from fusion_kernels.mlp.reference import Block

#: y (T, d_out); z, g, a (T, h), each empty (0,) where the level does not save it or the block has none.
Outputs = tuple[Tensor, Tensor, Tensor, Tensor]
#: What the forward has kept for the backward: its z, g, a.
Saved = tuple[Tensor, Tensor, Tensor]
#: What a backend's backward returns: dX, dW_in, db_in, dW_gate, db_gate, dW_out, db_out, dp, each in the dtype of what
#: it belongs to; None where it is not asked for. The operator returns empty (0,) tensors there.
Gradients = reference.Gradients

#: What both operators take: x (T, d) and the seven tensors of the block.
N_INPUTS = 8
_INPUTS = (
    "Tensor x, Tensor w_in, Tensor? b_in, Tensor? w_gate, Tensor? b_gate, Tensor w_out, Tensor? b_out, Tensor? scale"
)


def parse_forward(arguments: Sequence[Any]) -> tuple[Block, int, str]:
    """The block, the level and the backend, of what a forward operator takes behind its rows."""
    *block, checkpoint_level, backend = arguments
    return Block(*block), checkpoint_level, backend


def parse_backward(arguments: Sequence[Any]) -> tuple[Block, Saved, int, str, Sequence[bool]]:
    """The block, what the forward kept, the level, the backend and the needs, of what the backward takes there."""
    *tensors, z, g, a, activation, checkpoint_level, backend, needs = arguments
    return Block._make((*tensors, activation)), (z, g, a), checkpoint_level, backend, needs


def fake_outputs(x: Tensor, block: Block, checkpoint_level: int) -> Outputs:
    """Empty tensors as a forward operator returns them, of one block or of experts."""
    T, h = x.shape[0], block.w_in.shape[-2]
    nothing = (0,)
    return (
        x.new_empty((T, block.w_out.shape[-2])),
        x.new_empty((T, h) if checkpoint_level < 2 else nothing),
        x.new_empty((T, h) if checkpoint_level < 2 and block.w_gate is not None else nothing),
        x.new_empty((T, h) if checkpoint_level == 0 else nothing),
    )


def fake_gradients(x: Tensor, block: Block, needs: Sequence[bool]) -> Gradients:
    """Empty tensors as a backward operator returns them, of one block or of experts."""
    pairs = zip((x, *block.tensors), needs, strict=True)
    return packed(x, [t.new_empty(t.shape) if need and t is not None else None for t, need in pairs])


def _fake_forward(x: Tensor, *rest: Any) -> Outputs:
    block, checkpoint_level, _ = parse_forward(rest)
    return fake_outputs(x, block, checkpoint_level)


def _fake_backward(dy: Tensor, x: Tensor, *rest: Any) -> Gradients:
    block, *_, needs = parse_backward(rest)
    return fake_gradients(x, block, needs)


def packed(x: Tensor, gradients: Sequence[Tensor | None]) -> Gradients:
    """The gradients as the operator returns them: an empty tensor like x where there is none."""
    dx, dw_in, db_in, dw_gate, db_gate, dw_out, db_out, dp = (
        x.new_empty((0,)) if gradient is None else gradient for gradient in gradients
    )
    return dx, dw_in, db_in, dw_gate, db_gate, dw_out, db_out, dp


def saved(y: Tensor, z: Tensor, g: Tensor | None, a: Tensor, checkpoint_level: int) -> Outputs:
    """What the operator returns at this level, of what the forward has computed."""
    nothing = y.new_empty((0,))
    return (
        y,
        z if checkpoint_level < 2 else nothing,
        g if checkpoint_level < 2 and g is not None else nothing.clone(),
        a if checkpoint_level == 0 else nothing.clone(),
    )


def _choose(x: Tensor, block: Block, checkpoint_level: int, backend: str) -> str:
    if backend != "auto" or x.device.type != "cuda":
        return backend
    h, d_out, is_gated = block.w_in.shape[0], block.w_out.shape[0], block.w_gate is not None
    shape = heuristics.Shape(x.shape[0], x.shape[1], h, d_out, is_gated, checkpoint_level)
    return heuristics.path(torch.cuda.get_device_name(x.device), x.dtype, shape)


def _choose_forward(x: Tensor, *rest: Any) -> str:
    return _choose(x, *parse_forward(rest))


def _choose_backward(dy: Tensor, x: Tensor, *rest: Any) -> str:
    block, _, checkpoint_level, backend, _ = parse_backward(rest)
    return _choose(x, block, checkpoint_level, backend)


MLP: Operator = operator(
    "mlp",
    f"({_INPUTS}, str activation, int checkpoint_level, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_forward,
    _choose_forward,
)
MLP_BACKWARD: Operator = operator(
    "mlp_backward",
    f"(Tensor dy, {_INPUTS}, Tensor z, Tensor g, Tensor a, str activation, int checkpoint_level, str backend, "
    "bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
    _choose_backward,
)


class _Functions(NamedTuple):
    """A backend's, with autocast off: what runs where nothing looks at the operators."""

    output: Callable[[Tensor, Block], Tensor]
    forward: Callable[[Tensor, Block, int], Outputs]
    backward: Callable[[Tensor, Tensor, Block, Saved, int, Sequence[bool]], Gradients]


_FUNCTIONS: dict[str, _Functions] = {}


def register(
    name: str,
    forward: Callable[[Tensor, Block, int], Outputs],
    backward: Callable[[Tensor, Tensor, Block, Saved, int, Sequence[bool]], Gradients],
    device_types: tuple[str, ...],
    why_not: Callable[[], str | None] = lambda: None,
    *,
    output: Callable[[Tensor, Block], Tensor] | None = None,
    both_factors: bool = False,
) -> None:
    """Add a backend of both operators.

    `output` is the forward at level 2 with y alone, where that costs less than the forward.

    They run with autocast off, whatever it was where the operator was called: what they compute in is the dtype of x.
    Without `both_factors` their scale is (h,) or None: a factor before phi is then folded into the weights for them.
    """
    if not both_factors:
        forward, backward = _folding_forward(forward), _folding_backward(backward)

    def first(x: Tensor, block: Block) -> Tensor:
        return forward(x, block, 2)[0]

    functions = _Functions(without_autocast(output or first), without_autocast(forward), without_autocast(backward))

    def forward_of_schema(x: Tensor, *rest: Any) -> Outputs:
        block, checkpoint_level, _ = parse_forward(rest)
        return functions.forward(x, block, checkpoint_level)

    def backward_of_schema(dy: Tensor, x: Tensor, *rest: Any) -> Gradients:
        block, kept, checkpoint_level, _, needs = parse_backward(rest)
        return packed(x, functions.backward(dy, x, block, kept, checkpoint_level, needs))

    _FUNCTIONS[name] = functions
    MLP.register(Backend(name, forward_of_schema, device_types, why_not))
    MLP_BACKWARD.register(Backend(name, backward_of_schema, device_types, why_not))


def _folded(x: Tensor, block: Block, before: Tensor, behind: Tensor | None) -> Block:
    """The block with the factor before phi folded into the projection that feeds it."""
    inputs: list[Any] = [x, *block]
    here = _fed_by(block)
    weight, bias = inputs[here]
    wide = torch.promote_types(torch.promote_types(weight.dtype, x.dtype), torch.float32)
    factor = before.to(wide)
    inputs[here] = weight.to(wide) * factor.unsqueeze(1), None if bias is None else bias.to(wide) * factor
    return Block(*inputs[1:])._replace(scale=behind)


def _fed_by(block: Block) -> slice:
    """Where, behind x, the projection lies whose outputs phi takes, weight and bias: the gate's, or the only one."""
    return slice(1, 3) if block.w_gate is None else slice(3, 5)


def _folding_forward(forward: Callable[[Tensor, Block, int], Outputs]) -> Callable[[Tensor, Block, int], Outputs]:
    @functools.wraps(forward)
    def folding(x: Tensor, block: Block, checkpoint_level: int) -> Outputs:
        before, behind = reference.factors(block.scale)
        return forward(x, block if before is None else _folded(x, block, before, behind), checkpoint_level)

    return folding


def _folding_backward(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    @functools.wraps(backward)
    def folding(
        dy: Tensor, x: Tensor, block: Block, kept: Saved, checkpoint_level: int, needs: Sequence[bool]
    ) -> Gradients:
        before, behind = reference.factors(block.scale)
        if before is None or block.scale is None:
            return backward(dy, x, block, kept, checkpoint_level, needs)
        here = _fed_by(block)
        inputs: tuple[Any, ...] = (x, *block.tensors)
        weight, bias = inputs[here]
        inner = list(needs)
        if needs[-1]:
            inner[here] = True, bias is not None
        found: list[Any] = list(backward(dy, x, _folded(x, block, before, behind), kept, checkpoint_level, inner))
        dw, db = found[here]
        wide = weight.dtype if dw is None else dw.dtype
        if needs[-1]:
            d_before = (dw * weight.to(wide)).sum(1)
            if db is not None:
                d_before = d_before + db.to(wide) * bias.to(wide)
            found[-1] = torch.stack([found[-1].to(wide), d_before]).to(block.scale.dtype)
        wanted, wanted_b = needs[here]
        found[here] = (
            (dw * before.to(wide).unsqueeze(1)).to(weight.dtype) if wanted else None,
            (db * before.to(db.dtype)).to(bias.dtype) if wanted_b and db is not None else None,
        )
        return tuple(found)  # type: ignore[return-value]

    return folding


Result = TypeVar("Result")


def without_autocast(function: Callable[..., Result]) -> Callable[..., Result]:
    """`function`, whose first argument is a tensor, with autocast off on its device."""

    @functools.wraps(function)
    def run_it(first: Tensor, *rest: Any) -> Result:
        if not torch.is_autocast_enabled(first.device.type):
            return function(first, *rest)
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *rest)

    return run_it


def run(x: Tensor, block: Block, checkpoint_level: int, backend: str, *, trains: bool) -> Tensor:
    """y of the forward operator, differentiable; `trains` says whether anything asks for a gradient.

    Where nothing does, the level is 2: nothing is kept.
    """
    if not is_direct((x, *block[:-1])):
        y: Tensor = MLP.overload(x, *block, checkpoint_level, backend)[0]
        return y
    if trains:
        return _Direct.apply(x, *block[:-1], block, checkpoint_level, backend)
    return _FUNCTIONS[MLP.select(_choose(x, block, checkpoint_level, backend), x.device).name].output(x, block)


def forward(x: Tensor, block: Block, checkpoint_level: int, backend: str) -> Outputs:
    """What the forward operator returns, without the operator."""
    chosen = MLP.select(_choose(x, block, checkpoint_level, backend), x.device).name
    return _FUNCTIONS[chosen].forward(x, block, checkpoint_level)


def backward(
    dy: Tensor, x: Tensor, block: Block, kept: Saved, checkpoint_level: int, backend: str, needs: Sequence[bool]
) -> Gradients:
    """The gradients that are needed, without the backward operator."""
    chosen = MLP_BACKWARD.select(_choose(x, block, checkpoint_level, backend), dy.device).name
    return _FUNCTIONS[chosen].backward(dy, x, block, kept, checkpoint_level, needs)


def is_direct(tensors: Sequence[Tensor | None]) -> bool:
    """Whether nothing looks at the operators: no compiler, no dispatch mode, no tensor subclass."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() != 0:
        return False
    for t in tensors:  # noqa: SIM110 - a generator takes as long as all else here
        if t is not None and type(t) is not Tensor and type(t) is not torch.nn.Parameter:
            return False
    return True


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:N_INPUTS], *output[1:])
    ctx.options = inputs[N_INPUTS:]


def _differentiate(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:N_INPUTS])
    nothing = (None,) * len(ctx.options)
    if dy is None:
        return (*(None for _ in needs), *nothing)
    gradients = MLP_BACKWARD.overload(dy, *ctx.saved_tensors, *ctx.options, needs)
    return (*(gradient if need else None for gradient, need in zip(gradients, needs, strict=True)), *nothing)


class _Direct(torch.autograd.Function):
    """The forward operator's derivative without the operators between; in the activation's place comes the block."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        block, checkpoint_level, backend = inputs[N_INPUTS:]
        y, z, g, a = forward(inputs[0], block, checkpoint_level, backend)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:N_INPUTS], z, g, a)
        ctx.options = block.activation, checkpoint_level, backend
        return y

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        (dy,) = cotangents
        saved = ctx.saved_tensors
        if dy is None or torch.is_grad_enabled() or not is_direct((dy, *saved)):
            return _differentiate(ctx, dy)
        activation, checkpoint_level, backend = ctx.options
        x, block, kept = saved[0], Block._make((*saved[1:N_INPUTS], activation)), saved[N_INPUTS:]
        needs = ctx.needs_input_grad[:N_INPUTS]
        return (*backward(dy, x, block, kept, checkpoint_level, backend, needs), None, None, None)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.needs = inputs[-1]
    ctx.mark_non_differentiable(*(t for t, need in zip(output, ctx.needs, strict=True) if not need))
    ctx.save_for_backward(*inputs[: 1 + N_INPUTS])
    ctx.activation = inputs[4 + N_INPUTS]
    ctx.unused = len(inputs) - 1 - N_INPUTS


def _differentiate_twice(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[: 1 + N_INPUTS]
    with torch.enable_grad():
        # Views, because dy usually depends on the other inputs: what leads from one to another is not ours to count.
        inputs: list[Any] = [None if t is None else t.view_as(t) for t in ctx.saved_tensors]
        dy, x, *tensors = inputs
        outputs = without_autocast(reference.mlp_backward)(dy, x, Block._make((*tensors, ctx.activation)), ctx.needs)
    # A gradient that no input reaches has nothing to differentiate, e.g. that of b_out when dy is constant.
    pairs = [
        (output, cotangent)
        for output, cotangent in zip(outputs, cotangents, strict=True)
        if output is not None and cotangent is not None and output.requires_grad
    ]
    sources = [t for t, want in zip(inputs, wanted, strict=True) if want and t is not None]
    found = iter(
        torch.autograd.grad(
            [output for output, _ in pairs],
            sources,
            [cotangent for _, cotangent in pairs],
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
        if pairs
        else [None] * len(sources)
    )
    return (*(next(found) if want else None for want in wanted), *(None,) * ctx.unused)


torch.library.register_autograd(f"{NAMESPACE}::mlp", _differentiate, setup_context=_save_forward)
torch.library.register_autograd(f"{NAMESPACE}::mlp_backward", _differentiate_twice, setup_context=_save_backward)
