"""`BlockOperator`: an operator on feed-forward blocks and its backward, of which `fusion_kernels::mlp` is one.

The operators do not look at the grad mode: what the forward saves is its argument `checkpoint_level`, and it returns
what it saves, so that a compiler sees (and may recompute) these tensors like any others. The first derivative is the
backward operator. Its own derivative, which makes `create_graph=True` right to any order, is that of the reference's
formulas; gradients of gradients are rare enough for plain torch.

Outside of tracing, `run` calls the backend itself: a Python operator costs as much as a block of one token on a CPU, or
as the kernels of a thousand on a GPU. The derivative is then that of `_Direct`, by the same backward. A call that is
trained goes `fused_mlp` -> `run` -> `_Direct.forward` -> the backend's forward, with autocast off -> compiled code.
`_Direct` turns the output weight round, and its gradient back: a view that autograd sees costs a twelfth of a small
block's step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fusion_kernels.ffn import FFN, FUNCTION, SCHEMA, TENSORS
from fusion_kernels.gates import Gate
from fusion_kernels.library import NAMESPACE, Backend, Provable, operator
from fusion_kernels.mlp import reference as reference
from fusion_kernels.mlp.choice import Choice
from fusion_kernels.mlp.types import Gradients, Needs, Outputs, Saved, rows_of_call

Result = TypeVar("Result")
#: A block's tensors in their order, as `torch.nn.Linear` stores them: `FFN.of_linears` makes a block of them.
Stored = tuple[Tensor | None, ...]


def without_autocast(function: Callable[..., Result]) -> Callable[..., Result]:
    """`function`, whose first argument is a tensor, with autocast off on its device."""

    @functools.wraps(function)
    def run_it(first: Tensor, *rest: Any) -> Result:
        # Whether it is on anywhere is asked first: that costs a tenth of asking for one device.
        if not torch._C._is_any_autocast_enabled() or not torch.is_autocast_enabled(first.device.type):
            return function(first, *rest)
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *rest)

    return run_it


def is_direct(tensors: Sequence[Tensor | None]) -> bool:
    """Whether nothing looks at the operators: no compiler, no dispatch mode, no tensor subclass."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() != 0:
        return False
    for t in tensors:  # noqa: SIM110 - a generator takes as long as all else here
        if t is not None and type(t) is not Tensor and type(t) is not torch.nn.Parameter:
            return False
    return True


def new_gradients(x: Tensor, ffn: FFN, needs: Needs) -> Gradients:
    """Empty tensors for the gradients that are asked for, as every backend returns them.

    W_out's lies as the weight of a `torch.nn.Linear` does, whose gradient it becomes: with contiguous columns.
    """

    def new(field: str, t: Tensor | None, need: bool) -> Tensor | None:
        if t is None or not need:
            return None
        return t.new_empty(t.mT.shape).mT if field == "w_out" else t.new_empty(t.shape)

    return Gradients(*map(new, Gradients._fields, (x, *ffn.tensors), needs))


def packed(x: Tensor, gradients: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The gradients as the operator returns them: an empty tensor like x where there is none."""
    return tuple(x.new_empty((0,)) if gradient is None else gradient for gradient in gradients)


def saved(y: Tensor, z: Tensor, g: Tensor | None, a: Tensor, checkpoint_level: int) -> Outputs:
    """What the operator returns at this level, of what the forward has computed."""
    nothing = y.new_empty((0,))
    return (
        y,
        z if checkpoint_level < 2 else nothing,
        g if checkpoint_level < 2 and g is not None else nothing.clone(),
        a if checkpoint_level == 0 else nothing.clone(),
    )


class Functions(NamedTuple):
    """A backend's, with autocast off: what runs where nothing looks at the operators.

    With `extra` for what the operator takes behind x:

    Attributes:
        output: (x, *extra, ffn) -> y, where nothing is kept.
        forward: (x, *extra, ffn, checkpoint_level) -> `Outputs`.
        backward: (dy, x, *extra, ffn, kept, checkpoint_level, needs) -> `Gradients`.
    """

    output: Callable[..., Tensor]
    forward: Callable[..., Outputs]
    backward: Callable[..., Gradients]


class Inlined(NamedTuple):
    """Differentiable operations that a compiler fuses better than a backend as one node: what it gets instead.

    Attributes:
        function: (x, *extra, ffn) -> y.
        fits: (x, ffn) -> whether a compiler takes them; else it gets the node.
    """

    function: Callable[..., Tensor]
    fits: Callable[[Tensor, FFN], bool] = lambda x, ffn: True


class BlockOperator:
    """The operator `fusion_kernels::<name>`, `fusion_kernels::<name>_backward`, and the backends of both.

    Attributes:
        forward_operator: takes x, the extra inputs, the block's tensors, `FFN.function`, the level and a backend.
        backward_operator: takes dy, the same tensors, what the forward kept, and the rest as the forward does; then
            `needs`, whether x and each of the block's tensors need their gradients.
    """

    def __init__(
        self,
        name: str,
        backward: Callable[..., Gradients],
        choice: Choice,
        extra_inputs: tuple[str, ...] = (),
    ) -> None:
        """Declare both operators.

        Args:
            name: the forward's.
            backward: the specification's, (dy, x, *extra, ffn, needs) -> `Gradients`, of differentiable operations.
            choice: which backend `"auto"` is on a GPU.
            extra_inputs: names of the tensors between x and the block's, which have no gradient. Where there are any,
                the first has an entry for every row that is computed, of which there may be more than x has.
        """
        self._specified, self.choice = without_autocast(backward), choice
        self._inlined: dict[str, Inlined] = {}
        self._before = 1 + len(extra_inputs)
        #: How many tensors the forward takes.
        self._inputs = self._before + len(TENSORS)
        self._functions: dict[str, Functions] = {}
        inputs = ", ".join(["Tensor x", *(f"Tensor {extra}" for extra in extra_inputs), SCHEMA])
        options = f"{FUNCTION}, int checkpoint_level, str backend"
        gradients = ", ".join("Tensor" for _ in Gradients._fields)
        self.forward_operator = operator(
            name,
            f"({inputs}, {options}) -> (Tensor, Tensor, Tensor, Tensor)",
            self._fake_forward,
            self._choose_forward,
        )
        self.backward_operator = operator(
            f"{name}_backward",
            f"(Tensor dy, {inputs}, Tensor z, Tensor g, Tensor a, {options}, bool[] needs) -> ({gradients})",
            self._fake_backward,
            self._choose_backward,
        )
        choice.attach(self.forward_operator, lambda backend: self._functions[backend][1:])
        for of, differentiate, save in (
            (self.forward_operator, self._differentiate, self._save_forward),
            (self.backward_operator, self._differentiate_twice, self._save_backward),
        ):
            torch.library.register_autograd(f"{NAMESPACE}::{of.name}", differentiate, setup_context=save)

    def register(
        self,
        name: str,
        forward: Callable[..., Outputs],
        backward: Callable[..., Gradients],
        device_types: tuple[str, ...],
        why_not: Callable[[torch.device | None], str | None] = lambda _: None,
        *,
        output: Callable[..., Tensor] | None = None,
        proof: Provable | None = None,
        inlined: Inlined | None = None,
    ) -> None:
        """Add a backend of both operators; its functions are as in `Functions`.

        `output` is the forward at level 2 with y alone, where that costs less than the forward; `inlined`, what a
        compiler gets in the place of them all.

        They run with autocast off, whatever it was where the operator was called: what they compute in is the dtype of
        x.
        """

        def first(*inputs: Any) -> Tensor:
            return forward(*inputs, 2)[0]

        functions = Functions(*(without_autocast(function) for function in (output or first, forward, backward)))  # type: ignore[arg-type]

        def forward_of_schema(*arguments: Any) -> Outputs:
            rows, ffn, checkpoint_level, _ = self._parse_forward(arguments)
            return functions.forward(*rows, ffn, checkpoint_level)

        def backward_of_schema(dy: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
            rows, ffn, kept, checkpoint_level, _, needs = self._parse_backward(arguments)
            return packed(rows[0], functions.backward(dy, *rows, ffn, kept, checkpoint_level, needs))

        self._functions[name] = functions
        if inlined is not None:
            self._inlined[name] = inlined._replace(function=without_autocast(inlined.function))
        self.forward_operator.register(Backend(name, forward_of_schema, device_types, why_not, proof=proof))
        self.backward_operator.register(Backend(name, backward_of_schema, device_types, why_not, proof=proof))

    def functions(self, rows: tuple[Tensor, ...], ffn: FFN, checkpoint_level: int, backend: str) -> Functions:
        """Those of the backend that answers for a call on x and the extra inputs.

        Raises:
            ValueError, BackendUnavailableError: as `Operator.select` does.
        """
        chosen = self._choose(rows, ffn, checkpoint_level, backend)
        return self._functions[self.forward_operator.select(chosen, rows[0].device).name]

    def run(
        self,
        x: Tensor,
        stored: Stored,
        activation: str,
        gating: Gate,
        checkpoint_level: int,
        backend: str,
        *extra: Tensor,
        trains: bool,
    ) -> Tensor:
        """y of the forward operator, differentiable.

        Args:
            stored: the block's tensors, as `FFN.of_linears` takes them: what gradients are wanted for, so that no view
                of them need be differentiated.
            checkpoint_level: 2 where nothing asks for a gradient: nothing is kept.
            trains: whether anything does.
        """
        if not is_direct((x, *extra, *stored)):
            ffn = FFN.of_linears(stored, activation, gating)
            if torch.compiler.is_compiling():
                backend = self._traced((x, *extra), ffn, checkpoint_level, backend)
                if backend in self._inlined and self._inlined[backend].fits(x, ffn):
                    return self._inlined[backend].function(x, *extra, ffn)
            options = (*ffn.function, checkpoint_level, backend)
            y: Tensor = self.forward_operator.overload(x, *extra, *ffn.tensors, *options)[0]
            return y
        if trains:
            return _Direct.apply(x, *extra, *stored, self, (activation, gating, checkpoint_level, backend))
        ffn = FFN.of_linears(stored, activation, gating)
        return self.functions((x, *extra), ffn, checkpoint_level, backend).output(x, *extra, ffn)

    # --- what the schemas take ---------------------------------------------------------------------------------------

    def _parse_forward(self, arguments: Sequence[Any]) -> tuple[tuple[Tensor, ...], FFN, int, str]:
        """x and the extra inputs, the block, the level and the backend."""
        *function, checkpoint_level, backend = arguments[self._inputs :]
        ffn = _of_function(arguments[self._before : self._inputs], function)
        return tuple(arguments[: self._before]), ffn, checkpoint_level, backend

    def _parse_backward(self, arguments: Sequence[Any]) -> tuple[tuple[Tensor, ...], FFN, Saved, int, str, Needs]:
        """The same behind dy, with what the forward kept behind the block, and the needs at the end."""
        z, g, a, *function, checkpoint_level, backend, needs = arguments[self._inputs :]
        ffn = _of_function(arguments[self._before : self._inputs], function)
        return tuple(arguments[: self._before]), ffn, (z, g, a), checkpoint_level, backend, Needs(*needs)

    def _fake_forward(self, *arguments: Any) -> Outputs:
        inputs, ffn, checkpoint_level, _ = self._parse_forward(arguments)
        x, T, neurons, nothing = inputs[0], rows_of_call(inputs), ffn.w_in.shape[-2], (0,)
        return (
            x.new_empty((T, ffn.w_out.shape[-1])),
            x.new_empty((T, neurons) if checkpoint_level < 2 else nothing),
            x.new_empty((T, neurons) if checkpoint_level < 2 and ffn.gated else nothing),
            x.new_empty((T, neurons) if checkpoint_level == 0 else nothing),
        )

    def _fake_backward(self, dy: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        (x, *_), ffn, *_, needs = self._parse_backward(arguments)
        return packed(x, new_gradients(x, ffn, needs))

    def _choose(self, rows: tuple[Tensor, ...], ffn: FFN, checkpoint_level: int, backend: str) -> str:
        if backend != "auto" or not rows[0].is_cuda:
            return backend
        return self.choice(rows, ffn, checkpoint_level)

    def _traced(self, rows: tuple[Tensor, ...], ffn: FFN, checkpoint_level: int, backend: str) -> str:
        """The same while a compiler traces, which then keeps to it."""
        if backend != "auto" or not rows[0].is_cuda:
            return backend
        return self.choice.traced(rows, ffn, checkpoint_level)

    def _choose_forward(self, *arguments: Any) -> str:
        rows, ffn, checkpoint_level, backend = self._parse_forward(arguments)
        return self._choose(rows, ffn, checkpoint_level, backend)

    def _choose_backward(self, dy: Tensor, *arguments: Any) -> str:
        rows, ffn, _, checkpoint_level, backend, _ = self._parse_backward(arguments)
        return self._choose(rows, ffn, checkpoint_level, backend)

    # --- derivatives -------------------------------------------------------------------------------------------------

    def _needs(self, ctx: Any) -> Needs:
        flags = ctx.needs_input_grad
        return Needs(flags[0], *flags[self._before : self._inputs])

    def _save_forward(self, ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[: self._inputs], *output[1:])
        ctx.options = inputs[self._inputs :]

    def _differentiate(self, ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * len(ctx.options)
        if dy is None:
            return (*(None,) * self._inputs, *nothing)
        dx, *others = self._derivative(dy, ctx.saved_tensors, ctx.options, self._needs(ctx))
        return (dx, *(None,) * (self._before - 1), *others, *nothing)

    def _derivative(self, dy: Tensor, tensors: Sequence[Any], options: tuple[Any, ...], needs: Needs) -> Gradients:
        """The gradients by the backward operator.

        Args:
            tensors: the forward's, and what it has kept.
            options: the forward's, behind its tensors.
        """
        found = self.backward_operator.overload(dy, *tensors, *options, list(needs))
        return Gradients(*(t if need else None for t, need in zip(found, needs, strict=True)))

    def _save_backward(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.needs = Needs(*inputs[-1])
        ctx.mark_non_differentiable(*(t for t, need in zip(output, ctx.needs, strict=True) if not need))
        tensors = 1 + self._inputs
        ctx.save_for_backward(*inputs[:tensors])
        ctx.function = inputs[tensors + 3 : -3]
        ctx.unused = len(inputs) - tensors

    def _differentiate_twice(self, ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[: 1 + self._inputs]
        with torch.enable_grad():
            # Views, because dy usually depends on the other inputs: what leads from one to another is not ours to
            # count.
            inputs: list[Any] = [None if t is None else t.view_as(t) for t in ctx.saved_tensors]
            ffn = _of_function(inputs[1 + self._before :], ctx.function)
            outputs = self._specified(*inputs[: 1 + self._before], ffn, ctx.needs)
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


class _Direct(torch.autograd.Function):
    """The forward operator's derivative without the operators between.

    Its inputs are x, the extra inputs and the block's tensors as `torch.nn.Linear` stores them; then the operator and
    the forward's options.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, of, options = inputs
        activation, gating, checkpoint_level, backend = options
        rows, ffn = tensors[: of._before], FFN.of_linears(tensors[of._before :], activation, gating)
        functions = of.functions(tuple(rows), ffn, checkpoint_level, backend)
        y, z, g, a = functions.forward(*rows, ffn, checkpoint_level)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, z, g, a)
        ctx.call = of, options, functions
        return y

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        (dy,) = cotangents
        (of, options, functions), saved = ctx.call, ctx.saved_tensors
        if dy is None:
            return (None,) * (of._inputs + 2)
        needs, rows, kept = of._needs(ctx), saved[: of._before], saved[of._inputs :]
        activation, gating, checkpoint_level, backend = options
        ffn = FFN.of_linears(saved[of._before : of._inputs], activation, gating)
        if torch.is_grad_enabled() or not is_direct((dy, *saved)):
            flat = (*ffn.function, checkpoint_level, backend)
            found = of._derivative(dy, (*rows, *ffn.tensors, *kept), flat, needs)
        else:
            found = functions.backward(dy, *rows, ffn, kept, checkpoint_level, needs)
        dx, dw_in, dw_out, *others = found
        dw_out = None if dw_out is None else dw_out.mT
        return (dx, *(None,) * (of._before - 1), dw_in, dw_out, *others, None, None)


def _of_function(tensors: Sequence[Any], function: Sequence[Any]) -> FFN:
    """A block of its tensors and of `FFN.function`."""
    activation, *gate = function
    return FFN.of(tensors, activation, gating=Gate(*gate))


#: On a GPU torch's own operations, unless a kernel was measured to be faster; `resident` saves nothing, and so is for
#: those who ask by name.
MLP = BlockOperator("mlp", reference.mlp_backward, Choice(lambda x, ffn: "torch", ("cublas", "epilogue")))
