"""Ways to call a module on random input without knowing what it is, likely ones first."""

from __future__ import annotations

import collections
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

_TOKENS, _CHOSEN = 6, 2
#: The way of a module that is called with what a whole model called it with.
AS_CALLED = "as the model calls it"
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)


@dataclass(frozen=True)
class Way:
    """One way to call a module.

    Attributes:
        how: in words.
        call: does it.
        x: the input.
        arguments: the routing, of an experts module.
        partly: it calls a part of the module only, and other ways call other parts.
    """

    how: str
    call: Callable[[], Any]
    x: Tensor
    arguments: tuple[Tensor, ...] = ()
    partly: bool = False


def matrices(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters that may be projections: with more than one row and column, and no embeddings."""
    found: list[tuple[str, Tensor]] = []
    for name, parameter in module.named_parameters():
        holder = owner(module, name)
        # Convolutions are (out, in, kernel), stacks of experts (experts, rows, columns).
        rows_columns = parameter.shape[:2] if isinstance(holder, _CONVOLUTIONS) else parameter.shape[-2:]
        if parameter.dim() >= 2 and min(rows_columns) > 1 and not isinstance(holder, nn.Embedding):
            found.append((name, parameter))
    return found


def owner(module: nn.Module, name: str) -> nn.Module:
    """The submodule that holds the parameter `name`."""
    return module.get_submodule(name.rpartition(".")[0])


def ways_to_call(module: nn.Module, experts: bool, recorded: Any = None) -> Iterator[Way]:
    """The module itself, then its feed-forward method, then two of its children one after the other.

    Args:
        module: with real weights.
        experts: it follows transformers' experts interface.
        recorded: `(args, kwargs)` that it was called with in a whole model; then that is the first way.
    """
    g = torch.Generator().manual_seed(1)
    if experts:
        yield from _experts(module, g)
        return
    if recorded is not None:
        args, kwargs = recorded
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.is_floating_point()]
        x = tensors[0] if tensors else torch.zeros(1)
        yield Way(AS_CALLED, lambda: module(*args, **kwargs), x)
    else:
        yield from _itself(module, g)
    yield from _feed_forward_methods(module, g)
    yield from _children(module, g)


def _inputs(module: nn.Module) -> list[int]:
    """Sizes that inputs may have, likely ones first."""
    counted: collections.Counter[int] = collections.Counter()
    found = matrices(module)
    for name, parameter in found:
        holder = owner(module, name)
        if parameter.dim() == 3 and not isinstance(holder, nn.Conv1d):
            counted.update([parameter.shape[2], parameter.shape[1]])
        else:
            counted[parameter.shape[0] if isinstance(holder, Conv1D) else parameter.shape[1]] += 1
    if not found:
        return []
    name, first = found[0]
    lead = first.shape[0] if isinstance(owner(module, name), Conv1D) else first.shape[-1 if first.dim() <= 3 else 1]
    return list(dict.fromkeys([lead, *(size for size, _ in counted.most_common())]))[:4]


def _experts(module: nn.Module, g: torch.Generator) -> Iterator[Way]:
    stack = max([p.shape[0] for _, p in matrices(module) if p.dim() == 3] or [2])
    for size in _inputs(module):
        x = torch.randn(_TOKENS, size, generator=g)
        index = torch.stack([torch.randperm(stack, generator=g)[:_CHOSEN] for _ in range(_TOKENS)])
        weights = torch.rand(_TOKENS, min(_CHOSEN, stack), generator=g)
        yield Way(
            f"on {tuple(x.shape)} and a routing",
            lambda x=x, i=index, w=weights: module(x, i, w),  # type: ignore[misc]
            x,
            (index, weights),
        )


def _itself(module: nn.Module, g: torch.Generator) -> Iterator[Way]:
    stacks = [p.shape[0] for _, p in matrices(module) if p.dim() == 3] or [0]
    convolves = any(isinstance(part, (nn.Conv1d, nn.Conv2d)) for part in module.modules())
    needed = [
        parameter.name
        for parameter in inspect.signature(module.forward).parameters.values()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.default is parameter.empty
    ]
    for d in _inputs(module):
        sizes: list[tuple[int, ...]] = [(1, _TOKENS, d), (_TOKENS, d)]
        sizes += [(3 * max(stacks), d)] if max(stacks) else []
        sizes += [(1, d, 6, 6), (1, d, 12)] if convolves else []
        for size in [*sizes, (1, 4, 4, d)]:
            x = torch.randn(size, generator=g)
            rest = [_argument(name, x, min(stacks) or _CHOSEN, g) for name in needed[1:]]
            yield Way(f"on {size}", lambda x=x, rest=rest: module(x, *rest), x)  # type: ignore[misc]
            masked = [
                torch.ones(1, 1, _TOKENS, _TOKENS) if value is None and "mask" in name else value
                for name, value in zip(needed[1:], rest, strict=True)
            ]
            if any(a is not b for a, b in zip(masked, rest, strict=True)):
                yield Way(f"on {size} and a mask", lambda x=x, rest=masked: module(x, *rest), x)  # type: ignore[misc]


def _argument(name: str, x: Tensor, experts: int, g: torch.Generator) -> Any:
    """A guess at a required argument, by its name."""
    tokens = x.shape[0] if x.dim() == 2 else x.shape[1]
    if re.search(r"top_k_w|routing_w|topk_w|expert_weights", name):
        return torch.rand(tokens, _CHOSEN, generator=g)
    if re.search(r"top_k_ind|selected_exp|router_ind|topk_id", name):
        return torch.randint(0, experts, (tokens, _CHOSEN), generator=g)
    if re.search(r"residual|input_tensor|attention_output|hidden_states|query|^x$|input", name):
        return x
    return {"height": 2, "width": tokens // 2}.get(name)


def _feed_forward_methods(module: nn.Module, g: torch.Generator) -> Iterator[Way]:
    sizes = list(dict.fromkeys(p.shape[1] for _, p in matrices(module) if p.dim() == 2))[:2]
    for name in [key for key in dir(type(module)) if key.startswith("feed_forward_chunk")]:
        for d in sizes:
            x = torch.randn((1, _TOKENS, d), generator=g)
            call = lambda x=x, key=name: getattr(module, key)(x)  # noqa: E731
            yield Way(f"{name} on {tuple(x.shape)}", call, x, partly=True)


def _children(module: nn.Module, g: torch.Generator) -> Iterator[Way]:
    """Children with one matrix each that fit one behind the other, as BERT's `intermediate` and `output`."""
    found = matrices(module)
    parts = []
    for name, child in module.named_modules():
        inside = [p for key, p in found if key.startswith(f"{name}.")] if name else []
        if len(inside) == 1 and inside[0].dim() == 2 and not isinstance(child, (nn.Linear, Conv1D, nn.ModuleList)):
            parts.append((name, child, inside[0]))
    for name, first, w_in in parts:
        for other, second, w_out in parts:
            width, d = w_in.shape
            if (
                first is second
                or width == d
                or width not in (w_out.shape[1], 2 * w_out.shape[1])
                or d != w_out.shape[0]
            ):
                continue
            x = torch.randn((1, _TOKENS, d), generator=g)
            for residual in (True, False):

                def call(x: Tensor = x, f: Any = first, h: Any = second, residual: bool = residual) -> Any:
                    return h(f(x), x) if residual else h(f(x))

                yield Way(f"children {name}, {other} on {tuple(x.shape)}", call, x, partly=True)
