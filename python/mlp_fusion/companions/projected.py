"""Parameters that are moved along random directions, without a second copy of the model.

A module runs with `W + sum of lambda P theta` in place of its parameter W. The sum is made when the module is called
and forgotten when the call returns; where the backward needs it, it is made again, to the same bits. P is
`fusion_kernels.fastfood`, of which nothing is stored; gradients go back through its transpose.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fusion_kernels import fastfood, fastfood_transposed

#: Entries from which on a changed parameter is not kept for the backward.
LARGE = 1 << 14


@dataclass(frozen=True)
class Term:
    """lambda P theta, for one parameter.

    Attributes:
        theta: (d,), shared by all parameters.
        scale: lambda, a number; None for 1.
        seed: of P.
        damping: what the gradient of theta is multiplied by; 1 for the right one.
    """

    theta: Tensor
    scale: Tensor | None
    seed: int
    damping: float = 1.0


#: A parameter and what is added to it.
Moved = tuple[Tensor, Sequence[Term]]


def changed(weight: Tensor, terms: Sequence[Term]) -> Tensor:
    """`weight` with the terms added, in its dtype; differentiable by theta and lambda."""
    made: Tensor = _Changed.apply(weight, *_flat(terms))
    return made


def delta(shape: torch.Size, term: Term) -> Tensor:
    """lambda P theta by operations that torch differentiates and compiles."""
    # The damped part of theta is the same number, whose gradient is left out.
    theta = _wide(term.theta) if term.damping == 1.0 else _damped(_wide(term.theta), term.damping)
    made = fastfood(theta, shape.numel(), term.seed).view(shape)
    return made if term.scale is None else term.scale * made


def linear(x: Tensor, weight: Moved, bias: Tensor | None, transposed: bool) -> Tensor:
    """x W^T + b, or x W + b for a transposed W, with a moved W that is not kept for the backward."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        bias = None if bias is None else bias.to(x.dtype)
        parameter, terms = weight
        made: Tensor = _Linear.apply(x, bias, transposed, _origin(x), parameter, *_flat(terms))
        return made


def call(module: nn.Module, moved: Mapping[str, Moved], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`module` called with moved parameters, of which large ones are not kept for the backward."""
    # Modules within that share a parameter are moved by themselves.
    made = {name: changed(*of) for name, of in moved.items()}
    # The backward of a look-up keeps ids alone.
    remade = {} if isinstance(module, nn.Embedding) or not torch.is_grad_enabled() else {
        tensor.untyped_storage().data_ptr(): moved[name] for name, tensor in made.items() if tensor.numel() >= LARGE
    }  # fmt: skip
    if not remade:
        return functional_call(module, made, args, kwargs, tie_weights=False)

    def pack(tensor: Tensor) -> Tensor | _Remade:
        of = remade.get(tensor.untyped_storage().data_ptr())
        return tensor if of is None else _Remade.like(tensor, of)

    def unpack(kept: Tensor | _Remade) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept.tensor()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return functional_call(module, made, args, kwargs, tie_weights=False)


@dataclass(frozen=True)
class _Remade:
    """A view of a changed parameter, by what it was made of."""

    of: Moved
    versions: tuple[int, ...]
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def like(cls, tensor: Tensor, of: Moved) -> _Remade:
        return cls(of, _versions(of), tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def tensor(self) -> Tensor:
        if _versions(self.of) != self.versions:
            raise RuntimeError(
                "theta, lambda or the weight were changed in place between forward and backward: call backward first"
            )
        return _sum(*self.of).as_strided(self.size, self.stride, self.offset)


@dataclass(frozen=True)
class _Origin:
    """What a tensor was made of, which another backward keeps already, and how to make it again."""

    function: Callable[..., Tensor]
    of: tuple[Tensor, ...]


#: Nodes of torch's graph whose backward keeps what their result can be made of, and how.
_ORIGINS: dict[str, Callable[[Any], tuple[Callable[..., Tensor], tuple[Any, ...]]]] = {
    "GeluBackward0": lambda n: (functools.partial(F.gelu, approximate=n._saved_approximate), (n._saved_self,)),
    "SiluBackward0": lambda n: (F.silu, (n._saved_self,)),
    "MulBackward0": lambda n: (torch.mul, (n._saved_self, n._saved_other)),
}


def _origin(x: Tensor) -> _Origin | None:
    """The origin of x, if x itself need not be kept: the hidden values of an FFN are the largest of all inputs."""
    node = x.grad_fn
    if node is None or x._version or node.name() not in _ORIGINS or not torch.is_grad_enabled():
        return None
    # What hooks have taken away, to recompute or to offload it, must not be asked for now.
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return None
    function, of = _ORIGINS[node.name()](node)
    if not all(isinstance(t, Tensor) and t.dtype == x.dtype and t.shape == x.shape for t in of):
        return None
    return _Origin(function, tuple(t.detach() for t in of))


def _versions(of: Moved) -> tuple[int, ...]:
    weight, terms = of
    tensors = [weight, *(t.theta for t in terms), *(t.scale for t in terms if t.scale is not None)]
    return tuple(tensor._version for tensor in tensors)


def _flat(terms: Sequence[Term]) -> tuple[Any, ...]:
    """The fields of all terms, one after the other: a function of autograd sees tensors only so."""
    return tuple(value for t in terms for value in (t.theta, t.scale, t.seed, t.damping))


def _terms(flat: Sequence[Any]) -> list[Term]:
    return [Term(*flat[i : i + 4]) for i in range(0, len(flat), 4)]


@torch.no_grad()
def _sum(weight: Tensor, terms: Sequence[Term]) -> Tensor:
    """As :func:`changed`; no more memory than one such tensor and what the projection takes."""
    total = None
    for term in terms:
        made = fastfood(_wide(term.theta.detach()), weight.numel(), term.seed)
        if term.scale is not None:
            made *= term.scale
        total = made if total is None else total.add_(made)
    assert total is not None
    # In the wider of the two dtypes: a sum in bfloat16 would lose what is small beside the weight.
    return total.view(weight.shape).add_(weight).to(weight.dtype)


def _gradients(dw: Tensor, terms: Sequence[Term], needed: Sequence[bool]) -> list[Tensor | None]:
    """Of what :func:`_flat` makes of the terms, from that of the changed parameter."""
    found: list[Tensor | None] = []
    for i, term in enumerate(terms):
        of_theta, of_scale = needed[4 * i : 4 * i + 2]
        dtheta = dscale = None
        if of_theta or of_scale:
            theta = _wide(term.theta)
            back = fastfood_transposed(dw.reshape(-1).to(theta.dtype), len(theta), term.seed)
            if of_scale and term.scale is not None:
                dscale = (back @ theta).to(term.scale.dtype)  # <dW, P theta>, without another projection
            if of_theta:
                dtheta = back if term.scale is None else back * term.scale
                dtheta = (dtheta if term.damping == 1.0 else dtheta * term.damping).to(term.theta.dtype)
        found += [dtheta, dscale, None, None]
    return found


class _Kept:
    """What the functions below keep for their backward: the tensors of the terms, and the rest as it is."""

    @staticmethod
    def save(ctx: Any, weight: Tensor, terms: Sequence[Term], *more: Tensor) -> None:
        ctx.rest = [(t.scale is not None, t.seed, t.damping) for t in terms]
        tensors = [t for term in terms for t in (term.theta, term.scale) if t is not None]
        ctx.save_for_backward(weight, *more, *tensors)
        ctx.more = len(more)

    @staticmethod
    def load(ctx: Any) -> tuple[Tensor, list[Tensor], list[Term]]:
        weight, *rest = ctx.saved_tensors
        more, tensors = rest[: ctx.more], iter(rest[ctx.more :])
        terms = [Term(next(tensors), next(tensors) if scaled else None, *other) for scaled, *other in ctx.rest]
        return weight, more, terms


class _Changed(torch.autograd.Function):
    """weight + terms."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, *flat: Any) -> Tensor:
        terms = _terms(flat)
        _Kept.save(ctx, weight, terms)
        return _sum(weight, terms)

    @staticmethod
    def backward(ctx: Any, dw: Tensor) -> tuple[Tensor | None, ...]:
        _, _, terms = _Kept.load(ctx)
        return dw if ctx.needs_input_grad[0] else None, *_gradients(dw, terms, ctx.needs_input_grad[1:])


class _Linear(torch.autograd.Function):
    """x (weight + terms)^T + bias."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, transposed: bool, origin: _Origin | None, weight: Tensor, *flat: Any
    ) -> Tensor:
        terms = _terms(flat)
        _Kept.save(ctx, weight, terms, *([x] if origin is None else origin.of))
        ctx.transposed, ctx.made_by = transposed, None if origin is None else origin.function
        w = _sum(weight, terms).to(x.dtype)
        return F.linear(x, w.t() if transposed else w, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, more, terms = _Kept.load(ctx)
        dx = db = dw = None
        if ctx.needs_input_grad[0]:
            w = _sum(weight, terms).to(dy.dtype)
            dx = dy @ (w.t() if ctx.transposed else w)
            del w
        g = dy.reshape(-1, dy.shape[-1])
        if ctx.needs_input_grad[1]:
            db = g.sum(0)
        if any(ctx.needs_input_grad[4:]):
            x = more[0] if ctx.made_by is None else ctx.made_by(*more)
            inputs = x.reshape(-1, x.shape[-1])
            dw = inputs.t() @ g if ctx.transposed else g.t() @ inputs
        found = [None] * (4 * len(terms)) if dw is None else _gradients(dw, terms, ctx.needs_input_grad[5:])
        return dx, db, None, None, dw if ctx.needs_input_grad[4] else None, *found


def _wide(theta: Tensor) -> Tensor:
    """theta as the projections take it: a model that is cast to 16 bits has it in these."""
    return theta.to(torch.promote_types(theta.dtype, torch.float32))


def _damped(theta: Tensor, damping: float) -> Tensor:
    """theta, with its gradient times `damping`."""
    return theta * damping + (theta - theta * damping).detach()
