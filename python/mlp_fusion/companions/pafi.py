"""PaFi (Liao, Meng and Monz, arXiv 2305.16742): the smallest of the pre-trained values train, all others stay.

Which ones is a matter of the pre-trained weights alone, and the same for every task. They are trained as the difference
to what they were, a vector for each module: nothing else has a gradient, or is moved by weight decay.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import (
    _maybe_include_all_linear_layers,
    check_adapters_to_merge,
    check_target_module_exists,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fusion_kernels import transforms
from mlp_fusion.companions import sparse
from mlp_fusion.companions.fisher import fisher_scores
from mlp_fusion.companions.frame import (
    CompanionConfig,
    CompanionLayer,
    CompanionModel,
    refuse_another_base,
    refuse_quantised,
)
from mlp_fusion.companions.ranking import CRITERIA, RANKINGS, base_hash, candidates, choose, modules_of
from mlp_fusion.companions.registry import CompanionType, register
from mlp_fusion.errors import InputError
from mlp_fusion.modules.layouts import obstacle

#: Name of a parameter -> which of an adapter's values are its own, and their coordinates there.
_Places = dict[str, tuple[slice, tuple[Tensor, ...]]]


@dataclass
class PafiConfig(CompanionConfig):
    """Options of PaFi, for `peft.get_peft_model`.

    Attributes:
        budget: values to train: a count, or a share of the tensors that are chosen from.
        ranking: `global`, the smallest of all tensors at once, or `matrix`, the same share of each.
        criterion: what is smallest: the `magnitude`, or the empirical `fisher` information on `text`.
        text: file of texts for `fisher`, as calibration reads them.
        biases, norms, embeddings: whether values of biases, of normalising layers and of embeddings may be chosen.
        save_indices: whether which values they are is stored with them. Without, they are chosen again when the values
            are loaded, which needs the very model that they were chosen on; it takes half of the space.
        counts, shapes, base: filled in, in the model's copy: how many values each module has, the shapes of its
            parameters, and, without `save_indices`, a hash of the tensors that they were chosen of. A model with others
            is refused.

    Where `target_modules` is None, all modules are chosen from but those in `modules_to_save`, which train whole. Exact
    zeros, the padding's row of embeddings, and tensors that several modules share are never chosen.

    Source: PaFi (arXiv 2305.16742).

    Examples:
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForSequenceClassification
        >>> model = AutoModelForSequenceClassification.from_pretrained("roberta-base")
        >>> tuned = get_peft_model(model, mlp_fusion.PafiConfig(budget=1000, modules_to_save=["classifier"]))
        >>> sum(p.numel() for name, p in tuned.named_parameters() if "pafi_values" in name)
        1000
    """

    kind: ClassVar[CompanionType] = CompanionType.PAFI

    budget: int | float = field(default=0.005, metadata={"help": "values to train, a count or a share of all"})
    ranking: str = field(default="global", metadata={"help": "rank all tensors at once (global) or each (matrix)"})
    criterion: str = field(default="magnitude", metadata={"help": "what is smallest: magnitude or fisher"})
    text: str | None = field(default=None, metadata={"help": "file of texts for fisher"})
    biases: bool = field(default=True, metadata={"help": "choose from biases too"})
    norms: bool = field(default=True, metadata={"help": "choose from normalising layers too"})
    embeddings: bool = field(default=False, metadata={"help": "choose from embeddings too"})
    save_indices: bool = field(default=True, metadata={"help": "store which values they are"})
    counts: dict[str, int] | None = field(default=None, metadata={"help": "filled in: values by module"})
    shapes: dict[str, list[list[int]]] | None = field(
        default=None, metadata={"help": "filled in: shapes of parameters by module"}
    )
    base: str | None = field(default=None, metadata={"help": "filled in: hash of what they were chosen of"})

    def check(self) -> None:
        b = self.budget
        if isinstance(b, bool) or not isinstance(b, (int, float)) or not (b >= 1 if isinstance(b, int) else 0 < b <= 1):
            raise InputError(f"budget is {b!r}: give a count of 1 or more, or a share above 0 and up to 1.0")
        for name, value, known in (("ranking", self.ranking, RANKINGS), ("criterion", self.criterion, CRITERIA)):
            if value not in known:
                raise InputError(f"{name} is {value!r}: choose {' or '.join(known)}")
        if (self.criterion == "fisher") != (self.text is not None):
            raise InputError("criterion fisher needs text, a file of texts, and no other criterion takes one")
        if self.criterion == "fisher" and not self.save_indices:
            raise InputError("criterion fisher needs save_indices: values that a text has chosen cannot be found again")


class PafiLayer(CompanionLayer):
    """A module some of whose parameters' values are trained.

    Indices count through its own parameters, one after the other, and are ascending.
    """

    adapter_layer_names = ("pafi_values",)
    other_param_names = ("pafi_indices", "pafi_ruled")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.pafi_values = nn.ParameterDict()
        #: Indices of adapters that store them, and of those whose rule finds them again.
        self.pafi_indices, self.pafi_ruled = BufferDict(persistent=True), BufferDict(persistent=False)
        #: Where values are written into parameters now, and what stood there.
        self._written: list[tuple[str, tuple[Tensor, ...], Tensor]] = []
        self.stamp = 0
        #: Where the values of an adapter belong, and the indices, with their version, that say so.
        self._places: dict[str, tuple[Tensor, int, _Places]] = {}
        self.register_state_dict_pre_hook(_restored)  # type: ignore[no-untyped-call]

    def update_layer(self, adapter: str, indices: Tensor, *, stored: bool) -> None:
        """Add an adapter whose values change nothing yet.

        Args:
            indices: flat, ascending; -1 of those that come with a checkpoint.
            stored: whether they go to checkpoints.
        """
        parameters = list(self.base_layer.parameters(recurse=False))
        size = sum(parameter.numel() for parameter in parameters)
        dtype = torch.promote_types(parameters[0].dtype, torch.float32)
        device = parameters[0].device
        self.pafi_values[adapter] = nn.Parameter(torch.zeros(len(indices), dtype=dtype, device=device))
        held = self.pafi_indices if stored else self.pafi_ruled
        held[adapter] = indices.to(device, torch.int32 if size < 2**31 else torch.int64)

    def places(self, adapter: str) -> _Places:
        """By the parameters that have some: which of the adapter's values they are, and their coordinates."""
        indices = (self.pafi_indices if adapter in self.pafi_indices else self.pafi_ruled)[adapter]
        version = 0 if indices.is_inference() else indices._version
        known = self._places.get(adapter)
        if known is None or known[0] is not indices or known[1] != version:
            # Those that inference has found serve training as well.
            with torch.inference_mode(False):
                known = self._places[adapter] = indices, version, self._find_places(indices.long())
        return known[2]

    def _find_places(self, indices: Tensor) -> _Places:
        if bool((indices < 0).any()):
            raise InputError(
                "the config is another adapter's, whose indices are not loaded: use PeftModel.from_pretrained, or a "
                "new PafiConfig to begin anew"
            )
        found: _Places = {}
        begin = 0
        parameters = list(self.base_layer.named_parameters(recurse=False))
        ends = torch.tensor([parameter.numel() for _, parameter in parameters]).cumsum(0)
        if bool((indices >= int(ends[-1])).any()):
            # All that is seen of an adapter that was stored without shapes.
            raise InputError(
                f"the stored values are of a module with more than {int(indices.max()):,} values, this one has "
                f"{int(ends[-1]):,}: load the base that they were trained on"
            )
        bounds = [0, *torch.searchsorted(indices, ends.to(indices.device)).tolist()]
        for (name, parameter), first, last in zip(parameters, bounds[:-1], bounds[1:], strict=True):
            if last > first:
                own = slice(first, last)
                at = torch.unravel_index(indices[own] - begin, parameter.shape)
                found[name] = own, tuple(axis.contiguous() for axis in at)
            begin += parameter.numel()
        return found

    def deltas(self, adapter: str) -> dict[str, Tensor]:
        found = {}
        for name, (own, at) in self.places(adapter).items():
            values = self.pafi_values[adapter][own]
            found[name] = values.new_zeros(self.base_layer.get_parameter(name).shape).index_put(at, values)
        return found

    @torch.no_grad()
    def write(self, adapters: list[str]) -> None:
        """Let the parameters hold the values of these adapters, as they are now, and of no others."""
        self.restore()
        self.stamp += 1
        for adapter in adapters:
            for name, (own, at) in self.places(adapter).items():
                parameter = self.base_layer.get_parameter(name)
                before = parameter[at]
                parameter.index_put_(at, (before + self.pafi_values[adapter][own]).to(parameter.dtype))
                self._written.append((name, at, before))

    @torch.no_grad()
    def restore(self) -> None:
        """Bring back the very bits that stood in the parameters."""
        self.stamp += bool(self._written)
        while self._written:
            name, at, before = self._written.pop()
            self.base_layer.get_parameter(name).index_put_(at, before)

    def _apply(self, fn: Any, recurse: bool = True) -> PafiLayer:
        self.restore()  # what is moved or cast is the base as it was
        return super()._apply(fn, recurse)  # type: ignore[no-any-return]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        adapters = self.working()
        if self.merged and not self.disable_adapters:
            return self.base_layer(*args, **kwargs)
        if not adapters or kwargs or len(args) != 1 or not self._plain():
            self.unmerge()
            return super().forward(*args, **kwargs)
        places = {adapter: self.places(adapter) for adapter in adapters}
        chosen = [adapter for adapter in adapters if "weight" in places[adapter]]
        at = [places[adapter]["weight"][1] for adapter in chosen]
        values = [self.pafi_values[adapter][places[adapter]["weight"][0]] for adapter in chosen]
        if isinstance(self.base_layer, nn.Embedding):
            return sparse.embedding(self, adapters, args[0], at, values)  # type: ignore[arg-type]
        self.restore()
        bias: Any = self.base_layer.bias
        for adapter in adapters:
            if "bias" in places[adapter]:
                own, where = places[adapter]["bias"]
                bias = bias.index_put(where, self.pafi_values[adapter][own].to(bias.dtype), accumulate=True)
        return sparse.linear(self, adapters, args[0], bias, at, values)  # type: ignore[arg-type]

    def _plain(self) -> bool:
        """Whether a pass may run on the weight, with values written into it."""
        base = self.base_layer
        if torch.compiler.is_compiling() or transforms.active():
            return False
        if type(base) is nn.Embedding:
            return base.max_norm is None and not base.sparse and not base.scale_grad_by_freq
        return type(base) in (nn.Linear, Conv1D) and obstacle(base) is None

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        if not enabled and not self.merged:
            self.restore()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Leave the values in the parameters; `unmerge` brings back what was there.

        Raises:
            InputError: with `safe_merge`, a value is not finite; nothing is changed.
        """
        held = self._get_available_adapters()
        adapters = [adapter for adapter in check_adapters_to_merge(self, adapter_names) or [] if adapter in held]
        for adapter in adapters if safe_merge else []:
            if not bool(torch.isfinite(self.pafi_values[adapter]).all()):
                raise InputError(f"merging {adapter} would make weights infinite or NaN: the adapter is broken")
        self.write([*self.merged_adapters, *adapters])
        self.merged_adapters.extend(adapters)

    def unmerge(self) -> None:
        self.restore()
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module within, with the values or as it was; peft calls this."""
        if merge:
            self.merge(safe_merge, adapter_names)
        else:
            self.restore()
        return self.base_layer


def _restored(layer: PafiLayer, prefix: str, keep_vars: bool) -> None:
    """State dicts hold the base as it was."""
    layer.restore()


class PafiModel(CompanionModel):
    """A model in whose modules PaFi has chosen values."""

    prefix = "pafi_"
    tuner_layer_cls = PafiLayer

    def _prepare_model(self, peft_config: PafiConfig, model: nn.Module) -> None:
        refuse_quantised(model)
        _maybe_include_all_linear_layers(peft_config, model)
        stored = peft_config.counts if peft_config.save_indices else None
        here = {
            name: [list(parameter.shape) for parameter in module.parameters(recurse=False)]
            for name, module in modules_of(model)
        }
        if stored is not None:
            refuse_another_base(stored, peft_config.shapes, here)
            # Which ones they are comes with the values.
            self._chosen = {name: torch.full((count,), -1) for name, count in stored.items()}
        else:
            for module in model.modules():
                if isinstance(module, PafiLayer):
                    module.restore()
            self._chosen = _choose(peft_config, model)
        peft_config.counts = {name: len(indices) for name, indices in self._chosen.items()}
        peft_config.shapes = {name: here[name] for name in self._chosen}

    def _check_target_module_exists(self, peft_config: PafiConfig, key: str) -> bool:  # type: ignore[override]
        return key in self._chosen

    def add(self, layer: PafiLayer, config: PafiConfig, adapter: str, name: str) -> None:
        layer.update_layer(adapter, self._chosen[name], stored=config.save_indices)


def _choose(config: PafiConfig, model: nn.Module) -> dict[str, Tensor]:
    """Module -> flat indices of its values that are trained; and the config's hash, filled in or checked."""
    # peft's own match needs targets, and knows modules that are excluded or train whole.
    asked = dataclasses.replace(config, target_modules=".*") if config.target_modules is None else config
    found = candidates(model, config, lambda name: bool(check_target_module_exists(asked, name)))
    if not config.save_indices:
        base = base_hash(found)
        if config.base not in (None, base):
            raise InputError("the values were chosen of another model's: load the base that they were trained on")
        config.base = base
    scores = fisher_scores(model, found, config.text) if config.text is not None else None
    chosen: dict[str, list[Tensor]] = {}
    for candidate, indices in zip(found, choose(found, config.budget, config.ranking, scores), strict=True):
        if len(indices):
            chosen.setdefault(candidate.module, []).append(indices + candidate.offset)
    return {name: torch.cat(parts).cpu() for name, parts in chosen.items()}


register(PafiConfig, PafiModel)
