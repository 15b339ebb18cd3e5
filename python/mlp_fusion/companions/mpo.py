"""MPO (Liu et al., ACL 2021, arXiv 2106.02205): matrices as chains of tensors, of which the small ones are trained.

A chain of five holds nearly all of its numbers in the central tensor. Lightweight fine-tuning freezes that one and
trains the others, less than a tenth of the matrix; with smaller bonds the chain is also smaller than the matrix.

A linear layer runs through whichever costs less: the matrix, made of the chain once as long as nothing changes, or the
tensors one after the other, which only chains with small bonds and few tokens are worth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mlp_fusion.companions.ffns import is_plain, is_projection, is_transposed
from mlp_fusion.companions.frame import CompanionConfig, CompanionLayer, CompanionModel, refuse_another_base
from mlp_fusion.companions.operators import (
    LENGTH,
    centre,
    chain_apply,
    chain_sides,
    most_padded,
    mpo_decompose,
    rebuilding_is_cheaper,
    unfolded,
)
from mlp_fusion.companions.ranking import modules_of
from mlp_fusion.companions.registry import CompanionType, register
from mlp_fusion.errors import InputError


@dataclass
class MpoConfig(CompanionConfig):
    """Options of MPO, for `peft.get_peft_model`.

    Attributes:
        bonds: the most of every bond; None keeps all of them, and with them the function.
        bond_pattern: module -> the most of each of its bonds, which goes before `bonds`.
        length: tensors of a chain.
        train_central: train the central tensors too.
        embeddings: work in embeddings too, where `target_modules` names nothing.
        chains, shapes: filled in, in the model's copy: module -> shapes of its tensors, so that what is stored loads
            without the original weights, and that of its matrix. A model with others is refused.

    Where `target_modules` is None, it works in all linear layers but the output layer, and in embeddings whose weights
    are not the output layer's.

    Source: MPOP (arXiv 2106.02205).

    Examples:
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForSequenceClassification
        >>> model = AutoModelForSequenceClassification.from_pretrained("roberta-base-sst2")
        >>> tuned = get_peft_model(model, mlp_fusion.MpoConfig(modules_to_save=["classifier"]))
        >>> merged = tuned.merge_and_unload()
        >>> type(merged) is type(model)
        True
    """

    kind: ClassVar[CompanionType] = CompanionType.MPO

    bonds: int | None = field(default=None, metadata={"help": "the most of every bond; all of them by default"})
    bond_pattern: dict[str, list[int]] | None = field(
        default=None, metadata={"help": "module -> the most of each of its bonds"}
    )
    length: int = field(default=LENGTH, metadata={"help": "tensors of a chain"})
    train_central: bool = field(default=False, metadata={"help": "train the central tensors too"})
    embeddings: bool = field(default=True, metadata={"help": "work in embeddings too"})
    chains: dict[str, list[list[int]]] | None = field(default=None, metadata={"help": "filled in: shapes of tensors"})
    shapes: dict[str, list[int]] | None = field(default=None, metadata={"help": "filled in: shapes of matrices"})

    def check(self) -> None:
        if self.bonds is not None and (type(self.bonds) is not int or self.bonds < 1):
            raise InputError(f"bonds is {self.bonds!r}: give a size of 1 or more, or None for all")
        if not isinstance(self.length, int) or self.length < 2:
            raise InputError(f"length is {self.length!r}: a chain has 2 tensors or more")


class _Rebuild(torch.autograd.Function):
    """`(left @ central) @ right` out of what was multiplied before, with a backward that keeps nothing of its own.

    A layer that runs many times between two steps (a shared one) is then multiplied out once. All of it is in the dtype
    of the chain, also under autocast, which the backward need not be under: the layer casts the matrix as it would a
    weight.
    """

    @staticmethod
    def forward(ctx: Any, left: Tensor, central: Tensor, right: Tensor, half: Tensor, whole: Tensor) -> Tensor:
        ctx.save_for_backward(left, central, right, half)
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        left, central, right, half = ctx.saved_tensors
        needed = ctx.needs_input_grad
        gradient = gradients[0].reshape(-1, right.shape[1])
        found: list[Tensor | None] = [None, None, None, None, None]
        with torch.autocast(left.device.type, enabled=False):
            if needed[2]:
                found[2] = half.reshape(-1, len(right)).mT @ gradient
            if needed[0] or needed[1]:
                through = (gradient @ right.mT).reshape(len(left), -1)
                found[0] = through @ central.flatten(1).mT if needed[0] else None
                found[1] = (left.mT @ through).reshape(central.shape) if needed[1] else None
        return tuple(found)


@dataclass(eq=False)
class _Made:
    """A chain multiplied out, and what it was made of.

    Versions of tensors tell of changes, but not of those that torch's fused optimisers make: what trains is compared by
    its numbers. So is what was made in inference mode, which has no versions.
    """

    versions: tuple[tuple[int, int], ...]
    compared: tuple[Tensor, ...]
    half: Tensor
    whole: Tensor

    @staticmethod
    def of(tensors: Sequence[Tensor], half: Tensor, whole: Tensor) -> _Made:
        return _Made(_versions(tensors), tuple(t.detach().clone() for t in _unversioned(tensors)), half, whole)

    def still(self, tensors: Sequence[Tensor]) -> bool:
        """Whether it is what these tensors make."""
        compared = _unversioned(tensors)
        return (
            self.versions == _versions(tensors)
            and len(compared) == len(self.compared)
            and all(torch.equal(*pair) for pair in zip(compared, self.compared, strict=True))
        )


def _versions(tensors: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    """What tells tensors that have changed, or are others, from those that were there."""
    return tuple((id(t), 0 if t.is_inference() else t._version) for t in tensors)


def _unversioned(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Those whose changes versions do not tell of."""
    return [t.detach() for t in tensors if t.requires_grad or t.is_inference()]


class MpoLayer(CompanionLayer):
    """A linear layer or an embedding whose weight is a chain of tensors, each under a name of its own."""

    other_param_names = ()

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.adapter_layer_names: tuple[str, ...] = ()
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        self._made: dict[str, _Made] = {}
        #: Adapters whose tensors have yet to be loaded.
        self._awaited: set[str] = set()

    def update_layer(self, adapter: str, tensors: Sequence[Tensor], *, train_central: bool, awaited: bool) -> None:
        """Add an adapter with this chain; `awaited`: its numbers come with a checkpoint."""
        for k, tensor in enumerate(tensors):
            name = f"mpo_{k}"
            if name not in self.adapter_layer_names:
                self.add_module(name, nn.ParameterDict())
                self.adapter_layer_names = (*self.adapter_layer_names, name)
            getattr(self, name)[adapter] = nn.Parameter(tensor)
        if not train_central:
            self.frozen_peft_weight_names[adapter] = (f"mpo_{centre(len(tensors))}",)
        if awaited:
            self._awaited.add(adapter)

    def chain(self, adapter: str) -> list[Tensor]:
        """The tensors of an adapter.

        Raises:
            InputError: they are not loaded.
        """
        names = (name for name in self.adapter_layer_names if adapter in getattr(self, name))
        tensors: list[Tensor] = [getattr(self, name)[adapter] for name in names]
        # Whoever loads them: they are there when they are numbers.
        if adapter in self._awaited and bool(tensors[0].isnan().all()):
            raise InputError(
                "the config is another adapter's, whose tensors are not loaded: use PeftModel.from_pretrained, or a "
                "new MpoConfig to begin anew"
            )
        self._awaited.discard(adapter)
        return tensors

    def matrix(self, adapter: str) -> Tensor:
        """The weight that an adapter stands for, `(out, in)` or `(entries, size)`."""
        tensors = self.chain(adapter)
        with torch.autocast(tensors[0].device.type, enabled=False):
            left, central, right = chain_sides(tensors)
            made = self._made.get(adapter)
            # A cast or a move of parameters leaves their versions as they were.
            alike = made is not None and (made.whole.device, made.whole.dtype) == (left.device, left.dtype)
            if made is None or not alike or not made.still(tensors):
                # What inference has multiplied out serves training as well.
                with torch.inference_mode(False), torch.no_grad():
                    half = left @ central.flatten(1)
                    made = _Made.of(tensors, half, half.reshape(-1, len(right)) @ right)
                self._made[adapter] = made
            whole = _Rebuild.apply(left, central, right, made.half, made.whole)  # type: ignore[no-untyped-call]
        return unfolded(whole, tensors, self._shape())

    def changed(self, adapters: list[str]) -> dict[str, Tensor]:
        if len(adapters) > 1:
            raise InputError(f"adapters {', '.join(adapters)} each make the whole weight: activate one of them")
        if not adapters:
            return {}
        matrix = self.matrix(adapters[0])
        laid = matrix.mT if is_transposed(self.base_layer) else matrix
        return {"weight": laid.to(self.base_layer.get_parameter("weight").dtype)}

    def deltas(self, adapter: str) -> dict[str, Tensor]:
        return {"weight": self.changed([adapter])["weight"] - self.base_layer.get_parameter("weight")}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        adapters = self.working()
        if len(adapters) != 1 or kwargs or len(args) != 1 or not self._through_the_tensors(adapters[0], args[0]):
            return super().forward(*args, **kwargs)
        x: Tensor = args[0]
        tensors = [t.to(x.dtype) for t in self.chain(adapters[0])]
        y = chain_apply(tensors, x.reshape(-1, x.shape[-1]), self._shape()[0]).reshape(*x.shape[:-1], -1)
        bias: Any = self.base_layer.bias
        return y if bias is None else y + bias.to(y.dtype)

    def _through_the_tensors(self, adapter: str, x: Tensor) -> bool:
        """Whether x costs less through the tensors than by the matrix."""
        if not is_plain(self.base_layer):
            return False
        tensors = self.chain(adapter)
        made = self._made.get(adapter)
        known = made is not None and made.still(tensors)
        shapes = tuple(t.shape[1] for t in tensors), tuple(t.shape[2] for t in tensors)
        bonds = [t.shape[3] for t in tensors[:-1]]
        return not rebuilding_is_cheaper(x.numel() // x.shape[-1], self._shape(), shapes, bonds, made=known)

    def _shape(self) -> tuple[int, int]:
        rows, columns = self.base_layer.get_parameter("weight").shape
        return (columns, rows) if is_transposed(self.base_layer) else (rows, columns)


class MpoModel(CompanionModel):
    """A model whose matrices are chains of tensors."""

    prefix = "mpo_"
    tuner_layer_cls = MpoLayer

    def _prepare_model(self, peft_config: MpoConfig, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        head: Any = getattr(model, "get_output_embeddings", lambda: None)()
        self._head = getattr(head, "weight", None)
        known = {name for name, _ in model.named_modules()}
        unknown = [name for name in peft_config.bond_pattern or {} if name not in known]
        if unknown:
            raise InputError(f"bond_pattern names {unknown[0]}: the model has no such module")
        self._stored = peft_config.chains
        if self._stored is not None:
            _check_base(peft_config, model)
        peft_config.chains, peft_config.shapes = dict(peft_config.chains or {}), dict(peft_config.shapes or {})

    def targets(self, model: nn.Module, config: Any) -> list[str]:
        return chain_targets(model, embeddings=config.embeddings)

    def add(self, layer: MpoLayer, config: MpoConfig, adapter: str, name: str) -> None:
        base = layer.base_layer
        if not is_projection(base) and type(base) is not nn.Embedding:
            raise InputError(f"{name} is a {type(base).__name__}: MPO works in linear layers and embeddings")
        if type(base) is nn.Embedding and base.weight is self._head:
            raise InputError(f"{name} is the output layer's weight too: leave it out of target_modules")
        weight = base.get_parameter("weight").detach()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if self._stored is not None:
            if name not in self._stored:
                raise InputError(f"the stored adapter has no chain for {name}: it is of another model")
            tensors = [weight.new_full(shape, math.nan, dtype=dtype) for shape in self._stored[name]]
        else:
            whole = mpo_decompose(as_matrix(base), length=config.length)
            most = (config.bond_pattern or {}).get(name, config.bonds)
            tensors = list((whole if most is None else whole.truncated(most)).tensors)
        config.chains[name] = [list(t.shape) for t in tensors]  # type: ignore[index]
        config.shapes[name] = list(as_matrix(base).shape)  # type: ignore[index]
        layer.update_layer(adapter, tensors, train_central=config.train_central, awaited=self._stored is not None)


def chain_targets(model: nn.Module, *, embeddings: bool) -> list[str]:
    """Names of a model's linear layers, and of its embeddings, but for what the output layer multiplies by."""
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    found = []
    for name, module in modules_of(model):
        fits = is_projection(module) or (embeddings and type(module) is nn.Embedding)
        if fits and (head is None or module.weight is not head.weight):
            found.append(name)
    return found


def _check_base(config: MpoConfig, model: nn.Module) -> None:
    """Raise InputError where the stored chains do not stand for matrices of this model."""
    stored = config.chains or {}
    fitting = {name: m for name, m in modules_of(model) if is_projection(m) or type(m) is nn.Embedding}
    here = {name: list(as_matrix(module).shape) for name, module in fitting.items()}
    refuse_another_base(stored, config.shapes, here)
    for name, chain in stored.items():
        # All that is seen of an adapter that was stored without shapes.
        whole = [math.prod(tensor[axis] for tensor in chain) for axis in (1, 2)]
        if not all(size <= padded <= most_padded(size) for size, padded in zip(here[name], whole, strict=True)):
            raise InputError(
                f"the stored chain of {name} is of {whole[0]} x {whole[1]}, which does not make {here[name][0]} x "
                f"{here[name][1]}: load the base that it was trained on"
            )


def as_matrix(module: nn.Module) -> Tensor:
    """The weight of a linear layer or embedding, `(out, in)` or `(entries, size)`."""
    weight = module.get_parameter("weight").detach()
    return weight.mT if is_transposed(module) else weight


register(MpoConfig, MpoModel)
