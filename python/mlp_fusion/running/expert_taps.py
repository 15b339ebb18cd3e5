"""What goes into and comes out of each expert of a stack, whatever the module around it looks like.

Stacks have no projections of their own to hang hooks on: the products with slices of their parameters are watched, as
discovery does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mlp_fusion.errors import InputError
from mlp_fusion.families import FFNSite
from mlp_fusion.families.building import eager_experts
from mlp_fusion.families.trace import Product, Trace
from mlp_fusion.modules import Scaled
from mlp_fusion.neurons import NeuronBundle

#: Called as `visit(site number, x (n, d), hidden (n, N), y (n, d_out))`.
ExpertVisitor = Callable[[int, Tensor, Tensor, Tensor], None]


#: Tokens on which a stack is compared with the sum over its experts, and the share by which it may differ: rounding in
#: 16 bits.
_TOKENS, _OFF = 64, 0.03


def going_on(site: FFNSite) -> InputError:
    """The error of an FFN whose module does more than what is known of it."""
    return InputError(
        f"{site.path}: this FFN's module changes what its output projection gives, by code of its own or a hook, which "
        "a narrower FFN in its place would lose: leave it out by layers"
    )


@contextmanager
def experts_tapped(
    sites: Mapping[int, FFNSite], visit: ExpertVisitor, read: Callable[[FFNSite], NeuronBundle]
) -> Iterator[None]:
    """Show `visit` the rows of every expert, in its turn, whenever its stack has run inside; there may be none.

    Inside, experts run eagerly, one product at a time. Where all experts get all rows, those that come to one as zeros
    are not routed to it (Llama 4 multiplies what an expert gets by its score).

    Args:
        sites: number -> an expert.
        visit: sees what belongs to each number.
        read: what a whole stack computes, as a bundle.
    """
    stacks: dict[str, dict[int, int]] = {}
    for number, site in sites.items():
        assert site.expert is not None
        stacks.setdefault(site.path, {})[site.expert] = number
    handles: list[Any] = []
    with ExitStack() as inside:
        if sites:
            inside.enter_context(eager_experts(next(iter(sites.values())).root))
        for path, numbers in stacks.items():
            tap = _StackTap(next(site for site in sites.values() if site.path == path), numbers, visit, read)
            handles += tap.attach()
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _StackTap:
    """Watches one stack of experts."""

    def __init__(
        self, site: FFNSite, numbers: Mapping[int, int], visit: ExpertVisitor, read: Callable[[FFNSite], NeuronBundle]
    ) -> None:
        self._site, self._numbers, self._visit, self._read = site, numbers, visit, read
        self._traces: list[Trace] = []
        #: Whether another module is to take this one's place, and nothing has been compared with it.
        self._replaced = site.kind.form == "experts" and not isinstance(site.module, Scaled)

    def attach(self) -> list[Any]:
        module = self._site.module
        return [
            module.register_forward_pre_hook(self._enter),
            module.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
        ]

    def _enter(self, module: nn.Module, _args: Any) -> None:
        owners = {p.untyped_storage().data_ptr(): (name, p) for name, p in module.named_parameters()}
        self._traces.append(Trace(owners))
        self._traces[-1].__enter__()

    def _leave(self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        trace = self._traces.pop()
        trace.__exit__(None, None, None)
        if output is None:
            return  # it raised
        if self._replaced:
            self._compare(args, named, output)
        kind = self._site.kind
        inputs = self._by_expert(trace.products, kind.projection("w_in").parameter)
        outputs = self._by_expert(trace.products, kind.projection("w_out").parameter)
        last, like = kind.projection("w_out"), next(module.parameters())
        for expert, number in self._numbers.items():
            x, hidden = (found[expert].x if expert in found else None for found in (inputs, outputs))
            if x is None or hidden is None:
                self._visit(number, *(like.new_zeros(0, size) for size in self._site.channels()))
                continue
            y = outputs[expert].y
            if last.bias is not None and not outputs[expert].biased:
                y = y + module.get_parameter(last.bias)[expert].to(y.dtype)
            if inputs[expert].all_rows:
                routed = x.any(dim=1)
                x, hidden, y = x[routed], hidden[routed], y[routed]
            self._visit(number, x, hidden, y)

    def _compare(self, args: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        """Once, on a few tokens: what comes out has to be the sum of what the experts give.

        Raises:
            InputError: it is something else.
        """
        from mlp_fusion.modules.experts import stack_forward  # imports transformers' experts, which plans do without

        self._replaced = False
        b = self._read(dataclasses.replace(self._site, expert=None))
        if b.w_in.is_meta:
            return  # weights that accelerate keeps elsewhere are gone again
        wanted = stack_forward(b, *(t[:_TOKENS] for t in args), **{name: t[:_TOKENS] for name, t in named.items()})
        off = torch.linalg.vector_norm(output[:_TOKENS].float() - wanted.float())
        if bool(wanted.isfinite().all()) and not bool(off <= _OFF * torch.linalg.vector_norm(wanted.float())):
            raise going_on(self._site)

    def _by_expert(self, products: Sequence[Product], parameter: str) -> dict[int, _Passed]:
        """Expert -> what has passed through its product with a parameter."""
        found: dict[int, _Passed] = {}
        for product in products:
            if product.parameter != parameter:
                continue
            added = product.bias is not None or product.operation in ("addmm", "baddbmm")
            if product.expert is not None:
                pairs = [(product.expert, product.x, product.y)]
            elif product.x.ndim == 3 and len(product.x) == self._site.kind.experts:
                pairs = [(n, x, y) for n, (x, y) in enumerate(zip(product.x, product.y, strict=True))]
            else:
                raise InputError(
                    f"{self._site.path}: its experts are not run one by one, so that they cannot be told apart: set "
                    "the model's experts implementation to eager"
                )
            for expert, x, y in pairs:
                rows = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
                if expert in found:
                    rows = torch.cat([found[expert].x, rows[0]]), torch.cat([found[expert].y, rows[1]])
                found[expert] = _Passed(*rows, added, product.expert is None)
        return found


class _Passed(NamedTuple):
    """Rows that have passed through one expert's product with a parameter.

    Attributes:
        x, y: what it got and returned.
        biased: whether a bias is in `y`.
        all_rows: whether one product is of all experts, each with all rows.
    """

    x: Tensor
    y: Tensor
    biased: bool
    all_rows: bool
