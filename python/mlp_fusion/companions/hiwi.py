"""HiWi (Liao, Meng and Monz, arXiv 2305.16742): adapters that are fed the FFNs' own parameters, then thrown away.

With W as `(in, out)`, of a projection's weight it makes `W + s f(W D) U`, of its bias `b + s f(b D) U`, where D is
`(out, r)`, U is `(r, out)`, and s a constant. U starts at zero, and so does what is added. After training only the sum
is needed, so that what has to be stored does not grow with r.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from mlp_fusion.companions.ffns import ffn_projections, is_projection, is_transposed
from mlp_fusion.companions.frame import CompanionConfig, CompanionLayer, CompanionModel
from mlp_fusion.companions.registry import CompanionType, register
from mlp_fusion.errors import InputError

#: What `parameters` may be -> the parameters of a projection that get an adapter.
_PARTS = {"bias": ("bias",), "weight": ("weight",), "both": ("weight", "bias")}


@dataclass
class HiWiConfig(CompanionConfig):
    """Options of HiWi, for `peft.get_peft_model`.

    Attributes:
        r: rank; of each parameter with an adapter, `2 r out` numbers are trained.
        parameters: what the adapters are fed and change: `bias`, `weight` or `both`.
        scaling: factor of what is added.
        act_fn: the function f, a name in `transformers.activations.ACT2FN`.

    Where `target_modules` is None, it works in the projections of the model's dense FFNs, fused ones too.

    Source: HiWi (arXiv 2305.16742), in which f, the start and the scale are not given.
    """

    kind: ClassVar[CompanionType] = CompanionType.HIWI

    r: int = field(default=4, metadata={"help": "rank of the adapters"})
    parameters: str = field(default="bias", metadata={"help": "what is adapted: bias, weight or both"})
    scaling: float = field(default=1.0, metadata={"help": "factor of what the adapters add"})
    act_fn: str = field(default="gelu", metadata={"help": "function between the adapters' two matrices"})

    def check(self) -> None:
        if not isinstance(self.r, int) or self.r < 1:
            raise InputError(f"r is {self.r}: HiWi needs a rank of 1 or more")
        if self.parameters not in _PARTS:
            raise InputError(f"parameters is {self.parameters!r}: choose bias, weight or both")
        if self.act_fn not in ACT2FN:
            raise InputError(f"act_fn is {self.act_fn!r}, which is no name in transformers.activations.ACT2FN")
        if not math.isfinite(self.scaling) or self.scaling == 0.0:
            raise InputError(f"scaling is {self.scaling}: it has to be a finite number other than 0")


class HiWiLayer(CompanionLayer):
    """A projection with adapters on its weight, its bias, or both."""

    adapter_layer_names = ("hiwi_weight_down", "hiwi_weight_up", "hiwi_bias_down", "hiwi_bias_up")
    other_param_names = ("options",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.hiwi_weight_down, self.hiwi_weight_up = nn.ParameterDict(), nn.ParameterDict()
        self.hiwi_bias_down, self.hiwi_bias_up = nn.ParameterDict(), nn.ParameterDict()
        self.options: dict[str, HiWiConfig] = {}

    def update_layer(self, adapter: str, config: HiWiConfig) -> None:
        """Add an adapter that changes nothing yet."""
        self.options[adapter] = config
        for part in _PARTS[config.parameters]:
            parameter = getattr(self.base_layer, part)
            if parameter is None:
                continue
            n = self._matrix().shape[1]
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            down = torch.empty(n, config.r, dtype=dtype, device=parameter.device)
            nn.init.uniform_(down, -1 / math.sqrt(n), 1 / math.sqrt(n))
            getattr(self, f"hiwi_{part}_down")[adapter] = nn.Parameter(down)
            getattr(self, f"hiwi_{part}_up")[adapter] = nn.Parameter(down.new_zeros(config.r, n))

    def _matrix(self) -> Tensor:
        """The base layer's weight as `(in, out)`."""
        weight: Tensor = self.base_layer.weight  # type: ignore[assignment]
        return weight if is_transposed(self.base_layer) else weight.t()

    def _hidden(self, part: str, adapter: str, fed: Tensor) -> Tensor:
        """`s f(fed D)`: `(..., out)` -> `(..., r)`."""
        down, options = getattr(self, f"hiwi_{part}_down")[adapter], self.options[adapter]
        hidden: Tensor = options.scaling * ACT2FN[options.act_fn](fed.to(down.dtype) @ down)
        return hidden

    def deltas(self, adapter: str) -> dict[str, Tensor]:
        found = {}
        if adapter in self.hiwi_weight_up:
            delta = self._hidden("weight", adapter, self._matrix()) @ self.hiwi_weight_up[adapter]
            found["weight"] = delta if is_transposed(self.base_layer) else delta.t()
        if adapter in self.hiwi_bias_up:
            bias: Tensor = self.base_layer.bias  # type: ignore[assignment]
            found["bias"] = self._hidden("bias", adapter, bias) @ self.hiwi_bias_up[adapter]
        return found


class HiWiModel(CompanionModel):
    """A model with HiWi in the projections of its FFNs."""

    prefix = "hiwi_"
    tuner_layer_cls = HiWiLayer

    def targets(self, model: nn.Module, config: Any) -> list[str]:
        return ffn_projections(model)

    def add(self, layer: HiWiLayer, config: HiWiConfig, adapter: str, name: str) -> None:
        if not is_projection(layer.base_layer):
            raise InputError(f"{name} is a {type(layer.base_layer).__name__}: HiWi works in linear projections")
        layer.update_layer(adapter, config)


register(HiWiConfig, HiWiModel)
