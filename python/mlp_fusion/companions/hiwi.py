"""HiWi (Liao, Meng and Monz, arXiv 2305.16742): adapters that are fed the FFNs' own parameters, then thrown away.

With W as `(in, out)`, of a projection's weight it makes `W + s f(W D) U`, of its bias `b + s f(b D) U`, where D is
`(out, r)`, U is `(r, out)`, and s a constant. U starts at zero, and so does what is added. After training only the sum
is needed, so that what has to be stored does not grow with r.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers.activations import ACT2FN

from mlp_fusion.companions.ffns import ffn_projections, is_plain, is_projection, is_transposed
from mlp_fusion.companions.frame import CompanionConfig, CompanionLayer, CompanionModel
from mlp_fusion.companions.registry import CompanionType, register
from mlp_fusion.errors import InputError

#: What `parameters` may be -> the parameters of a projection that get an adapter.
_PARTS = {"bias": ("bias",), "weight": ("weight",), "both": ("weight", "bias")}
#: Factor of what is added, by default: at a learning rate of 1e-3 these were the best of powers of ten on SST-2 (see
#: `docs/decisions.md`). The sum over a bias is one vector, and small; that over a weight has a row for every input.
SCALES = {"bias": 100.0, "weight": 10.0}
#: Products with fewer columns take as long as with these: what is multiplied has to be read.
_NARROW = 16


def low_rank_is_cheaper(tokens: int, n_in: int, n_out: int, r: int, *, trains: bool) -> bool:
    """Whether a pass over `tokens` costs fewer multiplications as `x W + (x H) U` than as `x (W + H U)`.

    H is `(n_in, r)` and U `(r, n_out)`; H has to be made for either. With `trains`, the backward counts too: the second
    way then computes the gradient of a whole matrix.
    """
    apart = tokens * max(r, _NARROW) * (n_in + n_out)
    together = n_in * n_out * (r + 1)
    if trains:
        apart, together = 3 * apart, together + n_in * n_out * (tokens + 2 * r)
    return apart < together


@dataclass
class HiWiConfig(CompanionConfig):
    """Options of HiWi, for `peft.get_peft_model`.

    Attributes:
        r: rank; of each parameter with an adapter, `2 r out` numbers are trained.
        parameters: what the adapters are fed and change: `bias`, `weight` or `both`.
        scaling: factor of what is added; None for :data:`SCALES`, that of biases and of weights.
        act_fn: the function f, a name in `transformers.activations.ACT2FN`.
        merged: of a stored one, that it holds what the adapters added, and no adapters; see
            :func:`mlp_fusion.save_merged_delta`.

    Where `target_modules` is None, it works in the projections of the model's dense FFNs, fused ones too. A bias that
    is missing, or zero, gets no adapter: nothing can be made of it.

    Source: HiWi (arXiv 2305.16742).

    Examples:
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForSequenceClassification
        >>> model = AutoModelForSequenceClassification.from_pretrained("roberta-base-sst2")
        >>> tuned = get_peft_model(model, mlp_fusion.HiWiConfig(parameters="weight", r=2))
        >>> ids = torch.arange(3, 8)[None]
        >>> merged = tuned.merge_and_unload()
        >>> type(merged) is type(model)
        True
    """

    kind: ClassVar[CompanionType] = CompanionType.HIWI

    r: int = field(default=4, metadata={"help": "rank of the adapters"})
    parameters: str = field(default="bias", metadata={"help": "what is adapted: bias, weight or both"})
    scaling: float | None = field(default=None, metadata={"help": "factor of what the adapters add"})
    act_fn: str = field(default="gelu", metadata={"help": "function between the adapters' two matrices"})
    merged: bool = field(default=False, metadata={"help": "filled in: what is stored is the sum alone"})

    def check(self) -> None:
        if not isinstance(self.r, int) or self.r < 1:
            raise InputError(f"r is {self.r}: HiWi needs a rank of 1 or more")
        if self.parameters not in _PARTS:
            raise InputError(f"parameters is {self.parameters!r}: choose bias, weight or both")
        if self.act_fn not in ACT2FN:
            raise InputError(f"act_fn is {self.act_fn!r}, which is no name in transformers.activations.ACT2FN")
        if self.scaling is not None and (not math.isfinite(self.scaling) or self.scaling == 0.0):
            raise InputError(f"scaling is {self.scaling}: it has to be a finite number other than 0")


class HiWiLayer(CompanionLayer):
    """A projection with adapters on its weight, its bias, or both."""

    adapter_layer_names = (
        "hiwi_weight_down", "hiwi_weight_up", "hiwi_weight_delta", "hiwi_bias_down", "hiwi_bias_up", "hiwi_bias_delta",
    )  # fmt: skip
    other_param_names = ("options",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        for name in self.adapter_layer_names:
            self.add_module(name, nn.ParameterDict())
        self.options: dict[str, HiWiConfig] = {}
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}

    def update_layer(self, adapter: str, config: HiWiConfig) -> None:
        """Add an adapter that changes nothing yet."""
        self.options[adapter] = config
        for part in _PARTS[config.parameters]:
            parameter = getattr(self.base_layer, part)
            if parameter is None or not bool(parameter.any()):
                continue
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            if config.merged:
                delta = nn.Parameter(torch.zeros_like(parameter, dtype=dtype), requires_grad=False)
                getattr(self, f"hiwi_{part}_delta")[adapter] = delta
                continue
            n = self._matrix().shape[1]
            down = torch.empty(n, config.r, dtype=dtype, device=parameter.device)
            nn.init.uniform_(down, -1 / math.sqrt(n), 1 / math.sqrt(n))
            getattr(self, f"hiwi_{part}_down")[adapter] = nn.Parameter(down)
            getattr(self, f"hiwi_{part}_up")[adapter] = nn.Parameter(down.new_zeros(config.r, n))
        if config.merged:
            self.frozen_peft_weight_names[adapter] = ("hiwi_weight_delta", "hiwi_bias_delta")

    def _matrix(self) -> Tensor:
        """The base layer's weight as `(in, out)`."""
        weight: Tensor = self.base_layer.weight  # type: ignore[assignment]
        return weight if is_transposed(self.base_layer) else weight.t()

    def _hidden(self, part: str, adapter: str, fed: Tensor) -> Tensor:
        """`s f(fed D)`: `(..., out)` -> `(..., r)`; not in autocast's dtype, as when it is merged."""
        down, options = getattr(self, f"hiwi_{part}_down")[adapter], self.options[adapter]
        scale = SCALES[part] if options.scaling is None else options.scaling
        with torch.autocast(fed.device.type, enabled=False):
            hidden: Tensor = scale * ACT2FN[options.act_fn](fed.to(down.dtype) @ down)
            return hidden

    def _delta(self, part: str, adapter: str, fed: Tensor) -> Tensor:
        """`s f(fed D) U`."""
        with torch.autocast(fed.device.type, enabled=False):
            delta: Tensor = self._hidden(part, adapter, fed) @ getattr(self, f"hiwi_{part}_up")[adapter]
            return delta

    def deltas(self, adapter: str) -> dict[str, Tensor]:
        found = {}
        if adapter in self.hiwi_weight_up:
            delta = self._delta("weight", adapter, self._matrix())
            found["weight"] = delta if is_transposed(self.base_layer) else delta.t()
        if (bias := self._bias_delta(adapter)) is not None:
            found["bias"] = bias
        if adapter in self.hiwi_weight_delta:
            found["weight"] = self.hiwi_weight_delta[adapter]
        return found

    def _bias_delta(self, adapter: str) -> Tensor | None:
        if adapter in self.hiwi_bias_delta:
            return self.hiwi_bias_delta[adapter]
        if adapter not in self.hiwi_bias_up:
            return None
        return self._delta("bias", adapter, self.base_layer.bias)  # type: ignore[arg-type]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        adapters = self.working()
        if kwargs or len(args) != 1 or not all(map(self._apart_is_cheaper, adapters, args * len(adapters))):
            return super().forward(*args, **kwargs)
        if self.disable_adapters or not adapters:
            return super().forward(*args)
        x: Any = args[0]
        bias: Any = self.base_layer.bias
        for adapter in adapters:
            if (delta := self._bias_delta(adapter)) is not None:
                bias = (bias + delta).to(bias.dtype)
        y = functional_call(self.base_layer, {} if bias is None else {"bias": bias}, (x,))
        for adapter in adapters:
            if adapter in self.hiwi_weight_up:
                hidden = self._hidden("weight", adapter, self._matrix()).to(x.dtype)
                y = y + (x @ hidden) @ self.hiwi_weight_up[adapter].to(x.dtype)
        return y

    def _apart_is_cheaper(self, adapter: str, x: Tensor) -> bool:
        """Whether x goes through the adapter beside the weight, which is then as it was."""
        if adapter in self.hiwi_weight_delta or not is_plain(self.base_layer):
            return False
        if adapter not in self.hiwi_weight_up:
            return True
        (n_in, n_out), up = self._matrix().shape, self.hiwi_weight_up[adapter]
        trains = torch.is_grad_enabled() and up.requires_grad
        return low_rank_is_cheaper(x.numel() // n_in, n_in, n_out, len(up), trains=trains)


class HiWiModel(CompanionModel):
    """A model with HiWi in the projections of its FFNs."""

    prefix = "hiwi_"
    tuner_layer_cls = HiWiLayer

    def targets(self, model: nn.Module, config: Any) -> list[str]:
        return ffn_projections(model)

    def _prepare_model(self, peft_config: HiWiConfig, model: nn.Module) -> None:
        if peft_config.merged and not peft_config.inference_mode:
            raise InputError(
                "what is stored is what HiWi had added, its adapters are gone: load it without is_trainable, or train "
                "a new HiWiConfig"
            )
        super()._prepare_model(peft_config, model)
        found = [m for name, m in model.named_modules() if self._check_target_module_exists(peft_config, name)]
        biases = [b for m in found if isinstance(b := getattr(m, "bias", None), Tensor)]
        if found and peft_config.parameters == "bias" and not any(bool(b.any()) for b in biases):
            raise InputError("all projections are without biases, or with zeros: choose parameters='weight'")

    def add(self, layer: HiWiLayer, config: HiWiConfig, adapter: str, name: str) -> None:
        if not is_projection(layer.base_layer):
            raise InputError(f"{name} is a {type(layer.base_layer).__name__}: HiWi works in linear projections")
        layer.update_layer(adapter, config)


@torch.no_grad()
def save_merged_delta(model: Any, folder: str | Path, adapter: str = "default") -> None:
    """Write what HiWi adds to a model's parameters, without the adapters that make it: its size does not depend on r.

    `PeftModel.from_pretrained` loads it, to run and to merge; it cannot be trained on. Modules that were trained whole
    are written beside it.

    Args:
        model: a `PeftModel` with HiWi.
        folder: to write `adapter_model.safetensors` and `adapter_config.json` to.
        adapter: which adapter.

    Raises:
        InputError: the adapter is not HiWi's.

    Examples:
        >>> from peft import PeftModel, get_peft_model
        >>> from transformers import AutoModelForSequenceClassification
        >>> model = AutoModelForSequenceClassification.from_pretrained("roberta-base-sst2")
        >>> tuned = get_peft_model(model, mlp_fusion.HiWiConfig(parameters="weight"))
        >>> mlp_fusion.save_merged_delta(tuned, "delta")
        >>> model = AutoModelForSequenceClassification.from_pretrained("roberta-base-sst2")
        >>> PeftModel.from_pretrained(model, "delta").peft_config["default"].merged
        True
    """
    config = model.peft_config.get(adapter)
    if not isinstance(config, HiWiConfig):
        raise InputError(f"adapter {adapter!r} is not one of HiWi: save it with save_pretrained")
    state = {n: t for n, t in get_peft_model_state_dict(model, adapter_name=adapter).items() if ".hiwi_" not in n}
    for name, module in model.named_modules():
        if isinstance(module, HiWiLayer):
            for own, delta in module.deltas(adapter).items():
                state[f"{name}.hiwi_{own}_delta"] = delta
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(
        {name: t.detach().contiguous() for name, t in state.items()}, Path(folder) / SAFETENSORS_WEIGHTS_NAME,
        metadata={"format": "pt"},
    )  # fmt: skip
    name = model.get_base_model().__dict__.get("name_or_path") or None
    stored = copy.copy(config)
    stored.merged = stored.inference_mode = True
    stored.base_model_name_or_path = config.base_model_name_or_path or name
    stored.save_pretrained(str(folder))


register(HiWiConfig, HiWiModel)
