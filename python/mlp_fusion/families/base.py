"""`Architecture`: where the FFNs of a model are, as discovery has found or a checkpoint's record says.

An entry is data: patterns of paths, names of parameters below them and how neurons lie there. Tensor names in memory
are the module paths, so that one set of paths serves modules and state dicts.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fusion_kernels.activations import ACTIVATIONS
from fusion_kernels.gates import Gate
from mlp_fusion.errors import InputError
from mlp_fusion.families.sites import Clamp, Function, WidthKey
from mlp_fusion.modules import Scaled
from mlp_fusion.modules.ffn import FusedFFN
from mlp_fusion.modules.layouts import read_parameter
from mlp_fusion.modules.stored import Projection, bundle_of, count_neurons, parameters_of
from mlp_fusion.neurons import UNNAMED, NeuronBundle

#: How a narrower FFN stands in the model: a module of this package (of a dense FFN, or of a stack of experts); its
#: activation wrapped; its output projection wrapped; or the module that holds its weights wrapped.
FORMS = ("module", "experts", "activation", "projection", "weights")


@dataclass(frozen=True)
class Kind:
    """One kind of FFN of a model. All paths but the first are dotted and relative to it.

    Attributes:
        path: of the module that holds it, with `#` for numbers, below the base model.
        projections: where its neurons lie.
        function: what it computes between them.
        width: neurons before any fusion; of one expert.
        experts: experts in the stack; 0 of a dense FFN.
        group: kinds with the same number are moved by one config key.
        key: the config key of its width, or None where nothing but its width moves with any.
        form: one of :data:`FORMS`.
        activation: path of the activation's module, of the form `activation`.
        dropout: path of the dropout behind the output projection, of the form `module`; else empty.
        counts: numbers that modules keep of the width: path of the attribute -> how many times the width it is.
        instances: paths of all of them, where other kinds have the same pattern and parameters; else empty.
    """

    path: str
    projections: tuple[Projection, ...]
    function: Function
    width: int
    experts: int = 0
    group: int = 0
    key: WidthKey | None = None
    form: str = "module"
    activation: str = ""
    dropout: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)
    instances: tuple[str, ...] = ()

    @property
    def gated(self) -> bool:
        return any(p.role == "w_gate" for p in self.projections)

    @property
    def name(self) -> str:
        """The activation's name in `fusion_kernels.activations`; `UNNAMED` where the function is not the kernels'."""
        f = self.function
        return f.activation if f.activation in ACTIVATIONS and f.factor == 1.0 else UNNAMED

    @property
    def gating(self) -> Gate:
        """Limits and offset of a gated FFN."""
        f = self.function
        if f.clamp is None:
            return Gate(up_offset=f.up_offset)
        return Gate(f.clamp.limit, f.clamp.gate, f.up_offset)  # type: ignore[arg-type]

    @functools.cached_property
    def parameters(self) -> list[str]:
        """Names of all of its parameters below its path, biases too."""
        return parameters_of(self.projections)

    def projection(self, role: str) -> Projection:
        return next(p for p in self.projections if p.role == role)

    @property
    def holder(self) -> str:
        """Path of the module that holds a fused FFN's scale; empty for the one at `path`."""
        return {
            "activation": self.activation,
            "projection": self.projection("w_out").parameter.rpartition(".")[0],
        }.get(self.form, "")

    @property
    def scale(self) -> str:
        """Name of a fused FFN's scale below `path`."""
        return f"{self.holder}.scale".lstrip(".")

    @functools.cached_property
    def pattern(self) -> re.Pattern[str]:
        """Of names in the module at `path`."""
        inside = re.escape(self.path).replace(r"\#", r"\d+")
        return re.compile(rf"(?P<path>(?:.+\.)?{inside})\.(?P<below>.+)" if self.path else r"(?P<path>)(?P<below>.+)")

    def locate(self, name: str) -> tuple[str, str] | None:
        """Split a name into the path of an FFN of this kind and what stands below, or None."""
        found = self.pattern.fullmatch(name)
        if found is None:
            return None
        path = found["path"]
        if self.instances and not any(path == own or path.endswith(f".{own}") for own in self.instances):
            return None
        return path, found["below"]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        values = dataclasses.asdict(self)
        if self.key is not None:
            values["key"].pop("also_moves")
        return values

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Kind:
        """The inverse of :meth:`to_dict`.

        Raises:
            KeyError, TypeError, ValueError: `values` is not one.
        """
        function, key = dict(values["function"]), values["key"]
        if function["clamp"] is not None:
            function["clamp"] = Clamp(**function["clamp"])
        if values["form"] not in FORMS or not isinstance(values["path"], str):
            raise ValueError(values["form"])
        return Kind(
            **{
                **values,
                "projections": tuple(Projection(**p) for p in values["projections"]),
                "function": Function(**function),
                "key": None if key is None else WidthKey(**key),
                "instances": tuple(values["instances"]),
            }
        )


@dataclass(frozen=True, eq=False)
class FFNSite:
    """One FFN in a loaded model.

    Attributes:
        index: its number among the model's FFNs; where each layer has one, the layer's.
        path: dotted path of the module that holds it.
        root: the model.
        kind: what it is.
        expert: which of a stack of experts, which share index and path; None for a dense FFN, or the whole stack.
    """

    index: int
    path: str
    root: nn.Module
    kind: Kind
    expert: int | None = None

    @property
    def module(self) -> nn.Module:
        """The module that holds it, as it stands in the model now."""
        return self.root.get_submodule(self.path)

    @property
    def label(self) -> str:
        """Its path, and the expert's number."""
        return self.path if self.expert is None else f"{self.path}[{self.expert}]"

    @property
    def is_expert(self) -> bool:
        """Whether it sees only the tokens that are routed to it, which may be none."""
        return self.expert is not None or bool(re.search(r"(?:^|\.)experts?[._]", f"{self.path}."))

    @property
    def is_routed(self) -> bool:
        """Whether it is an expert, or a stack of them."""
        return self.is_expert or bool(self.kind.experts)

    def channels(self) -> tuple[int, int, int]:
        """Inputs, neurons and outputs, of one expert."""
        tensors = {name: self.module.get_parameter(name) for name in self.kind.parameters}
        bundle = bundle_of(tensors, self.kind.projections, self.kind.name, experts=max(self.kind.experts, 1))
        return bundle.w_in.shape[2], bundle.width, bundle.w_out.shape[2]

    @property
    def neurons(self) -> int:
        """Its width, as it stands in the model now; of one expert."""
        p = self.kind.projection("w_in")
        return count_neurons(_parameter(self, p.parameter).shape, p, self.kind.experts)

    def below(self, path: str) -> nn.Module:
        """The submodule at a path below the FFN's own; itself for an empty one."""
        try:
            return self.module.get_submodule(path)
        except AttributeError as error:
            raise InputError(f"{self.path} has no {path}, where a part of its FFN is said to be") from error

    def experts(self) -> list[FFNSite]:
        """The experts of a stack, one by one; of a dense FFN, itself."""
        if not self.kind.experts:
            return [self]
        return [dataclasses.replace(self, expert=number) for number in range(self.kind.experts)]


@dataclass(frozen=True)
class Architecture:
    """Where a model's FFNs are.

    Attributes:
        model_type: `config.model_type`.
        base: what stands before the names of the base model's tensors in a model with a head.
        kinds: the kinds of FFNs, longer paths first.
        unproved: what looks like an FFN, or part of one, and is none of them: a sentence each. None in a record.
    """

    model_type: str
    base: str
    kinds: tuple[Kind, ...]
    unproved: tuple[str, ...] = ()

    def locate(self, name: str) -> tuple[Kind, str, str] | None:
        """Split the name of a tensor of an FFN into kind, path of the FFN and what stands below it, or None.

        The scale of a fused FFN is one of its tensors.
        """
        for kind in self.kinds:
            found = kind.locate(name)
            if found is not None and (found[1] in kind.parameters or found[1] == kind.scale):
                return kind, *found
        return None

    def relative(self, path: str) -> str:
        """A path without what wrappers and models with heads put before it."""
        for kind in self.kinds:
            found = kind.locate(f"{path}.{kind.parameters[0]}")
            if found is not None and found[1] == kind.parameters[0]:
                return ".".join(path.split(".")[-(kind.path.count(".") + 1) :]) if kind.path else path
        return path

    def name(self, site: FFNSite) -> str:
        """What an FFN is called in a record: its path, and its output projection where others have that path too."""
        path = self.relative(site.path)
        if sum(kind.path == site.kind.path for kind in self.kinds) == 1 or site.kind.instances:
            return path
        return f"{path}.{site.kind.projection('w_out').parameter.removesuffix('.weight')}"

    def sites(self, model: nn.Module) -> list[FFNSite]:
        """The model's FFNs, fused ones too, in the order in which its modules stand; a stack of experts is one."""
        found: dict[tuple[str, int], str] = {}
        names = [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
        for name in names:
            for number, kind in enumerate(self.kinds):
                first = kind.projection("w_in").parameter
                located = kind.locate(name)
                if located is not None and located[1] in (first, first.removesuffix(".weight")):
                    found.setdefault((located[0], number), name)
                    break
        order = {name: number for number, name in enumerate(names)}
        # A layer may hold two FFNs of its own: of text and layout, of text and queries.
        keys = sorted(found, key=lambda key: (order[key[0]], order[found[key]]))
        return [FFNSite(index, path, model, self.kinds[n]) for index, (path, n) in enumerate(keys)]

    def projection(self, site: FFNSite, role: str) -> nn.Module:
        """The module that multiplies by the weight in `role`."""
        return site.below(site.kind.projection(role).parameter.rpartition(".")[0])

    def fused(self, site: FFNSite) -> Scaled | None:
        """The module that holds the scale of the FFN at `site`, or None where the model's own FFN stands."""
        module = site.below(site.kind.holder)
        return module if isinstance(module, Scaled) else None

    def read(self, site: FFNSite) -> NeuronBundle:
        """The FFN at `site` as a bundle (views of the weights): B = 1, or the number of experts of a whole stack.

        Raises:
            InputError: a projection is not a plain floating-point layer; the message names it.
        """
        kind, fused = site.kind, self.fused(site)
        try:
            if isinstance(fused, FusedFFN):
                return fused.as_bundle()
            tensors: dict[str, Tensor] = {}
            for name in kind.parameters:
                path, _, own = name.rpartition(".")
                module = site.below(path)
                tensors[name] = read_parameter(module, own)
        except InputError as error:
            raise InputError(f"{site.path}: {error}") from error
        scale, exponent = (None, 0.0) if fused is None else (fused.scale, fused.scale_exponent)
        bundle = bundle_of(
            tensors, kind.projections, kind.name, gating=kind.gating, experts=max(kind.experts, 1), scale=scale,
            scale_exponent=exponent,
        )  # fmt: skip
        return bundle if site.expert is None else bundle.select(site.expert)


def unsupported(model_type: str, reason: str) -> str:
    """The message that FFNs of a model type cannot be narrowed."""
    return f"{model_type}: {reason}, which is not supported: `mlp-fusion families {model_type}` shows all"


def _parameter(site: FFNSite, name: str) -> Any:
    path, _, own = name.rpartition(".")
    module: Any = site.below(path)
    while not hasattr(module, own) and hasattr(module, "base_layer"):  # an adapter around it
        module = module.base_layer
    return getattr(module, own)
