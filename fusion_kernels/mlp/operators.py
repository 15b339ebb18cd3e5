"""`fusion_kernels::mlp` and `fusion_kernels::mlp_backward`: one operator per direction, plain and gated alike.

The operators do not look at the grad mode: what the forward saves is its argument `checkpoint_level`, and it returns
what it saves, so that a compiler sees (and may recompute) these tensors like any others. The first derivative is the
backward operator. Its own derivative, which makes `create_graph=True` right to any order, is that of the reference's
formulas; gradients of gradients are rare enough for plain torch.

Outside of tracing, `run` calls the backend itself: a Python operator costs as much as a block of one token on a CPU, or
as the kernels of a thousand on a GPU. The derivative is then that of `_Direct`, by the same backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from fusion_kernels.library import NAMESPACE, Backend, Operator, operator
from fusion_kernels.mlp import tuning
from fusion_kernels.reference import mlp as reference

#: y (T, d_out); z, g, a (T, h), each empty (0,) where the level does not save it or the block has none.
Outputs = tuple[Tensor, Tensor, Tensor, Tensor]
#: What a backend's backward returns: dX, dW_in, db_in, dW_gate, db_gate, dW_out, db_out, dp, each in the dtype of what
#: it belongs to; None where it is not asked for. The operator returns empty (0,) tensors there.
Gradients = reference.Gradients

#: What both operators take: x (T, d) and the seven tensors of the block.
N_INPUTS = 8
_INPUTS = (
    "Tensor x, Tensor w_in, Tensor? b_in, Tensor? w_gate, Tensor? b_gate, Tensor w_out, Tensor? b_out, Tensor? scale"
)


def _fake_forward(
    x: Tensor,
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
    T, h = x.shape[0], w_in.shape[0]
    nothing = (0,)
    return (
        x.new_empty((T, w_out.shape[0])),
        x.new_empty((T, h) if checkpoint_level < 2 else nothing),
        x.new_empty((T, h) if checkpoint_level < 2 and w_gate is not None else nothing),
        x.new_empty((T, h) if checkpoint_level == 0 else nothing),
    )


def _fake_backward(
    dy: Tensor,
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    scale: Tensor | None,
    z: Tensor,
    g: Tensor,
    a: Tensor,
    activation: str,
    checkpoint_level: int,
    backend: str,
    needs: Sequence[bool],
) -> Gradients:
    inputs = (x, w_in, b_in, w_gate, b_gate, w_out, b_out, scale)
    return packed(
        x, [t.new_empty(t.shape) if n and t is not None else None for t, n in zip(inputs, needs, strict=True)]
    )


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


def _choose(x: Tensor, w_in: Tensor, w_gate: Tensor | None, w_out: Tensor, checkpoint_level: int, backend: str) -> str:
    if backend != "auto" or x.device.type != "cuda":
        return backend
    shape = tuning.Shape(x.shape[0], x.shape[1], w_in.shape[0], w_out.shape[0], w_gate is not None, checkpoint_level)
    return tuning.path(torch.cuda.get_device_name(x.device), x.dtype, shape)


def _choose_forward(*arguments: Any) -> str:
    x, w_in, _, w_gate, _, w_out, _, _, _, checkpoint_level, backend = arguments
    return _choose(x, w_in, w_gate, w_out, checkpoint_level, backend)


def _choose_backward(*arguments: Any) -> str:
    _, x, w_in, _, w_gate, _, w_out, *_, checkpoint_level, backend, _ = arguments
    return _choose(x, w_in, w_gate, w_out, checkpoint_level, backend)


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


def register(
    name: str,
    forward: Callable[..., Outputs],
    backward: Callable[..., Gradients],
    device_types: tuple[str, ...],
    why_not: Callable[[], str | None] = lambda: None,
    *,
    output: Callable[..., Tensor] | None = None,
    both_factors: bool = False,
) -> None:
    """Add a backend of both operators: functions of their schemas' arguments, the backward's with `Gradients`.

    `output` is the forward at level 2 with y alone, where that costs less than the forward.

    They run with autocast off, whatever it was where the operator was called: what they compute in is the dtype of x.
    Without `both_factors` their scale is (h,) or None: a factor before phi is then folded into the weights for them.
    """
    if not both_factors:
        forward, backward = _folding_forward(forward), _folding_backward(backward)

    def packed(*arguments: Any) -> tuple[Tensor, ...]:
        empty = arguments[1].new_empty
        return tuple(empty((0,)) if gradient is None else gradient for gradient in direct(*arguments))

    def first(*arguments: Any) -> Tensor:
        return full(*arguments)[0]

    full, direct = without_autocast(forward), without_autocast(backward)
    _OUTPUTS[name] = first if output is None else without_autocast(output)
    _BACKWARDS[name] = direct
    MLP.register(Backend(name, full, device_types, why_not))
    MLP_BACKWARD.register(Backend(name, packed, device_types, why_not))


def _folded(inputs: Sequence[Any], before: Tensor, behind: Tensor | None) -> list[Any]:
    """The block's inputs with the factor before phi folded into the projection that feeds it."""
    x, weight, bias = inputs[0], *inputs[_fed_by(inputs)]
    wide = torch.promote_types(torch.promote_types(weight.dtype, x.dtype), torch.float32)
    factor = before.to(wide)
    folded = [*inputs[: N_INPUTS - 1], behind]
    folded[_fed_by(inputs)] = (
        weight.to(wide) * factor.unsqueeze(1),
        None if bias is None else bias.to(wide) * factor,
    )
    return folded


def _fed_by(inputs: Sequence[Any]) -> slice:
    """Where the projection lies whose outputs phi takes, weight and bias: the gate's, or the only one."""
    return slice(1, 3) if inputs[3] is None else slice(3, 5)


def _folding_forward(forward: Callable[..., Outputs]) -> Callable[..., Outputs]:
    @functools.wraps(forward)
    def folding(*arguments: Any) -> Outputs:
        before, behind = reference.factors(arguments[N_INPUTS - 1])
        if before is None:
            return forward(*arguments)
        return forward(*_folded(arguments[:N_INPUTS], before, behind), *arguments[N_INPUTS:])

    return folding


def _folding_backward(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    @functools.wraps(backward)
    def folding(dy: Tensor, *arguments: Any) -> Gradients:
        inputs, needs = arguments[:N_INPUTS], arguments[-1]
        scale = inputs[-1]
        before, behind = reference.factors(scale)
        if before is None:
            return backward(dy, *arguments)
        here = _fed_by(inputs)
        inner = list(needs)
        if needs[-1]:
            inner[here] = True, inputs[here][1] is not None
        found: list[Any] = list(backward(dy, *_folded(inputs, before, behind), *arguments[N_INPUTS:-1], inner))
        (weight, bias), (dw, db) = inputs[here], found[here]
        wide = weight.dtype if dw is None else dw.dtype
        if needs[-1]:
            d_before = (dw * weight.to(wide)).sum(1)
            if db is not None:
                d_before = d_before + db.to(wide) * bias.to(wide)
            found[-1] = torch.stack([found[-1].to(wide), d_before]).to(scale.dtype)
        wanted, wanted_b = needs[here]
        found[here] = (
            (dw * before.to(wide).unsqueeze(1)).to(weight.dtype) if wanted else None,
            (db * before.to(db.dtype)).to(bias.dtype) if wanted_b and db is not None else None,
        )
        return tuple(found)  # type: ignore[return-value]

    return folding


_OUTPUTS: dict[str, Callable[..., Tensor]] = {}
_BACKWARDS: dict[str, Callable[..., Gradients]] = {}
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


def run(*arguments: Any, trains: bool) -> Tensor:
    """y of the forward operator's arguments, differentiable; `trains` says whether anything asks for a gradient.

    Where nothing does, the arguments' level is 2: nothing is kept.
    """
    if not is_direct(arguments[:N_INPUTS]):
        y: Tensor = MLP.overload(*arguments)[0]
        return y
    if trains:
        return _Direct.apply(*arguments)
    return _OUTPUTS[MLP.select(_choose_forward(*arguments), arguments[0].device).name](*arguments)


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
    """The forward operator's derivative without the operators between."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y, z, g, a = MLP.select(_choose_forward(*inputs), inputs[0].device).function(*inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:N_INPUTS], z, g, a)
        ctx.options = inputs[N_INPUTS:]
        return y

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        (dy,) = cotangents
        saved = ctx.saved_tensors
        if dy is None or torch.is_grad_enabled() or not is_direct((dy, *saved)):
            return _differentiate(ctx, dy)
        arguments = (dy, *saved, *ctx.options, ctx.needs_input_grad[:N_INPUTS])
        chosen = MLP_BACKWARD.select(_choose_backward(*arguments), dy.device).name
        return (*_BACKWARDS[chosen](*arguments), None, None, None)


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
        inputs = [None if t is None else t.view_as(t) for t in ctx.saved_tensors]
        dy, x, w_in, b_in, w_gate, b_gate, w_out, b_out, scale = inputs
        assert dy is not None
        assert x is not None
        assert w_in is not None
        assert w_out is not None
        outputs = without_autocast(reference.mlp_backward)(
            dy, x, w_in, b_in, w_gate, b_gate, w_out, b_out, scale, ctx.activation, ctx.needs
        )
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
