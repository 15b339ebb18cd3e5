"""`ScaledWeights`: the scale of fused neurons inside a module's weights, where no activation can hold it.

Stacks of experts are called with all of their tokens at once, and an activation between them does not know whose
neurons it sees. There, and where an activation is a function that no module holds, the scale multiplies the weights
themselves whenever they are used.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mlp_fusion.modules.scaled import Scaled
from mlp_fusion.modules.stored import Projection, spread
from mlp_fusion.neurons import reciprocal, scale_power


class ScaledWeights(Scaled):
    """Calls a module with its weights multiplied by powers of the scale; they are stored without.

    It stands in the module's place: parameters, buffers and submodules keep their names, and `scale` comes beside them.
    Whatever the module computes, and however its code reads its weights, it does so with the multiplied ones. That
    costs a copy of the weights in every pass, so it is the form of last resort.

    Shapes: those of the module; `scale` is `(N,)`, or `(E, N)` for a stack of E experts.

    Examples:
        >>> from mlp_fusion.modules import ScaledWeights
        >>> from mlp_fusion.modules.stored import Projection
        >>> sizes = torch.tensor([2.0, 1.0, 3.0])
        >>> down = torch.nn.Linear(3, 4)
        >>> scaled = ScaledWeights(down, [Projection("weight", "w_out", "whole", 1)], sizes, "scaled")
        >>> hidden = torch.randn(5, 3)
        >>> torch.allclose(scaled(hidden), down(hidden * sizes)), sorted(scaled.state_dict())
        (True, ['bias', 'scale', 'weight'])
    """

    def __init__(
        self,
        module: nn.Module,
        projections: Sequence[Projection],
        scale: Tensor | None,
        parameterization: str,
        *,
        gated: bool = False,
    ) -> None:
        """Stand in for a module, whose parameters are taken over.

        Args:
            module: whose parameters, or its submodules', hold the projections; they already are in `parameterization`.
            projections: those that the scale belongs to, by names of its parameters.
            scale: cluster sizes; None for ones, and for `folded`.
            parameterization: `scaled`, `split` or `folded`.
            gated: whether what the activation puts out is multiplied by an up projection.

        Raises:
            ValueError: unknown parameterization, or a scale where there can be none.
        """
        super().__init__(scale, parameterization)
        self._gated = gated
        self.projections = tuple(projections)
        self._held = tuple(n for n, t in (*module._parameters.items(), *module._buffers.items()) if t is not None)
        for name, parameter in module._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in module._buffers.items():
            self.register_buffer(name, buffer, persistent=name not in module._non_persistent_buffers_set)
        for name, child in module._modules.items():
            self.add_module(name, child)
        # Out of the module tree on purpose: its code is wanted, its tensors are held here.
        self._inner = (_around(module, self),)
        self.training = module.training

    def __getattr__(self, name: str) -> Any:
        """What code around it asks of a module of its kind: a number of features, of experts."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            inner = self.__dict__.get("_inner")
            if inner is None or name.startswith("_") or name not in vars(inner[0]):
                raise
            return vars(inner[0])[name]

    @property
    def gated(self) -> bool:
        return self._gated

    def train(self, mode: bool = True) -> ScaledWeights:
        self._inner[0].training = mode
        return super().train(mode)

    def _replicate_for_data_parallel(self) -> ScaledWeights:
        replica: ScaledWeights = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call, assignment]
        replica._inner = (_around(self._inner[0], replica),)
        return replica

    def multiplied(self) -> dict[str, Tensor]:
        """The module's parameters as it is called with them, and its own buffers."""
        # As attributes: an adapter or a parametrisation of a parameter takes part.
        tensors: dict[str, Any] = {name: operator.attrgetter(name)(self) for name in self._held}
        scale = self.scale
        if scale is not None:
            for name, exponent in exponents(self.projections, -self.scale_exponent, 1.0 - self.scale_exponent).items():
                tensor = operator.attrgetter(name)(self)
                factor = spread(power(scale, exponent), self.projections, name, tensor)
                tensors[name] = (tensor * factor).to(tensor.dtype)
        return tensors

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module makes of its arguments."""
        return functional_call(self._inner[0], self.multiplied(), args, kwargs)

    def extra_repr(self) -> str:
        return f"{type(self._inner[0]).__name__}, parameterization={self.parameterization}, gated={self.gated}"


def exponents(projections: Sequence[Projection], before: float, after: float) -> dict[str, float]:
    """Name of every parameter that has a power of the scale in it -> the exponent, where that is not 0.

    Args:
        projections: of the FFN.
        before, after: the exponents of input projections with their biases, and of the output projection.
    """
    found: dict[str, float] = {}
    for p in projections:
        exponent = after if p.role == "w_out" else before
        if exponent != 0.0:
            found.update(dict.fromkeys(p.tensors[:1] if p.role == "w_out" else p.tensors, exponent))
    return found


def power(scale: Tensor, exponent: float) -> Tensor:
    """`scale ** exponent`, and 0 where `scale` is 0; only powers of the split form take its size alone.

    A scale that is trained may be of any sign, and such a one has no other powers.
    """
    simple = {1.0: scale, -1.0: reciprocal(scale)}.get(exponent)
    return scale_power(scale, exponent) if simple is None else simple


def _around(module: nn.Module, holder: nn.Module) -> nn.Module:
    """A copy of a module for its code: the submodules of `holder`, no tensors of its own that take up memory."""
    inner: nn.Module = type(module).__new__(type(module))
    inner.__dict__.update({name: value for name, value in module.__dict__.items() if not name.startswith("_hf_")})
    inner._modules = holder._modules
    inner._parameters = {
        name: None if p is None else nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
        for name, p in module._parameters.items()
    }
    inner._buffers = {
        name: None if b is None else torch.empty_like(b, device="meta") for name, b in module._buffers.items()
    }
    return inner
