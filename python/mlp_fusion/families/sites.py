"""What discovery finds in a model: plain records that go into JSON and back.

A site is one kind of FFN: all modules whose paths differ only in their numbers and whose FFNs are alike. Names of
parameters are relative to the module at the site's path, so that one record serves all of its instances.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mlp_fusion.modules.stored import Projection


@dataclass(frozen=True)
class Clamp:
    """Limits inside a gated FFN. The up projection is always clamped to `[-limit, limit]`.

    Attributes:
        limit: the bound.
        gate: what is clamped of the gate: `none`; its upper side, `above`; both sides, `both`; or the upper side
            `after` the activation.
    """

    limit: float
    gate: str


@dataclass(frozen=True)
class Function:
    """What lies between the input projections and the output projection, neuron by neuron.

    A plain FFN multiplies the output weights by `factor * act(z)`, a gated one by
    `factor * act(gate) * (up + up_offset)`, after the clamp.

    Attributes:
        form: `plain` or `gated`.
        activation: a name of `families.catalogue.ACTIVATIONS`, or None: elementwise, but without a name here. Of a
            gated FFN, gate and up may then be the other way round.
        own: class of the module's own activation that computes it, where it has no name here.
        clamp, up_offset, factor: see above.
    """

    form: str
    activation: str | None
    own: str | None = None
    clamp: Clamp | None = None
    up_offset: float = 0.0
    factor: float = 1.0


@dataclass(frozen=True)
class WidthKey:
    """A key of the config that moves the width.

    Attributes:
        path: dotted, through nested configs.
        kind: `int`, `ratio`, `list` (one value per stage, group or layer), or `unset`.
        value: what it says in this config.
        also_moves: parameters that it moves although no proved site owns them; empty for a key that can be used.
    """

    path: str
    kind: str
    value: Any
    also_moves: tuple[str, ...] = ()

    @property
    def numbers(self) -> list[Any]:
        """The numbers in its value."""
        return list(self.value) if isinstance(self.value, (list, tuple)) else [self.value]


@dataclass(frozen=True)
class Proof:
    """How well the FFN was rebuilt from its parameters alone.

    Attributes:
        error: relative error of the rebuilt output; where the function has no name, of both sides of it.
        call: how the module was called.
        experts: relative error of the whole module, by implementation of transformers' experts interface.
    """

    error: float
    call: str
    experts: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Site:
    """One kind of FFN, proved.

    Attributes:
        path: of the module that holds it, with `#` for numbers.
        instances: path and layer number of every module of the kind; modules that share parameters count once.
        shared: paths of further modules that use the parameters of an instance.
        kind: `dense`, `shared` (experts that see every token) or `experts`.
        module: class of the module.
        width, d_in, d_out: neurons, inputs, outputs; of one expert.
        experts: experts in a stack; 0 of one FFN by itself.
        projections: gate first, output last.
        function: what lies between.
        width_keys: config keys that move the width, the best first.
        group: sites with the same number are moved by one key, and shrink together.
        own_module: input and output of the module are those of the FFN.
        proof: how it was proved.
        unsaved: why a narrower one could not be saved, or None.
    """

    path: str
    instances: tuple[tuple[str, int], ...]
    shared: tuple[str, ...]
    kind: str
    module: str
    width: int
    d_in: int
    d_out: int
    projections: tuple[Projection, ...]
    function: Function
    width_keys: tuple[WidthKey, ...]
    group: int
    own_module: bool
    proof: Proof
    unsaved: str | None = None
    experts: int = 0

    @property
    def parameters(self) -> list[str]:
        """Patterns of all of its parameters, biases too."""
        names = [name for p in self.projections for name in (p.parameter, p.bias) if name is not None]
        return [f"{self.path}.{name}" for name in dict.fromkeys(names)]


@dataclass(frozen=True)
class Refusal:
    """A parameter that belongs to no proved site, although a width key moves it or it looks like part of an FFN.

    Attributes:
        parameter: its name, with `#` for numbers.
        count: how many such parameters there are.
        key: the config key that moves it, or None.
        reason: what was seen there.
    """

    parameter: str
    count: int
    key: str | None
    reason: str


@dataclass(frozen=True)
class SetApart:
    """Two projections with a function between them that are no FFN, by rule.

    Attributes:
        path: of the module, with `#` for numbers.
        parameters: names below it.
        reason: the rule.
    """

    path: str
    parameters: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Description:
    """What was found in the model that a config describes.

    Attributes:
        model_type: `config.model_type`.
        model_class: the class that was built.
        sites: the FFNs, proved.
        refused: what the width keys move besides. A model with any is not to be narrowed.
        set_apart: what looks like an FFN and is none.
    """

    model_type: str
    model_class: str
    sites: tuple[Site, ...]
    refused: tuple[Refusal, ...]
    set_apart: tuple[SetApart, ...]

    @property
    def complete(self) -> bool:
        """Whether there are FFNs and nothing is left unclaimed."""
        return bool(self.sites) and not self.refused

    @property
    def keyed(self) -> bool:
        """Whether every FFN can be saved narrower."""
        return bool(self.sites) and all(site.unsaved is None for site in self.sites)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return _plain(dataclasses.asdict(self))  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Description:
        """The inverse of :meth:`to_dict`.

        Raises:
            KeyError, TypeError: `values` is not one.
        """
        return cls(
            model_type=values["model_type"],
            model_class=values["model_class"],
            sites=tuple(_site(site) for site in values["sites"]),
            refused=tuple(Refusal(**refusal) for refusal in values["refused"]),
            set_apart=tuple(
                SetApart(s["path"], tuple(s["parameters"]), s["reason"]) for s in values["set_apart"]
            ),
        )  # fmt: skip


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value


def _site(values: Mapping[str, Any]) -> Site:
    function = dict(values["function"])
    function["clamp"] = None if function["clamp"] is None else Clamp(**function["clamp"])
    return Site(
        **{
            **values,
            "instances": tuple((path, index) for path, index in values["instances"]),
            "shared": tuple(values["shared"]),
            "projections": tuple(Projection(**projection) for projection in values["projections"]),
            "function": Function(**function),
            "width_keys": tuple(_key(key) for key in values["width_keys"]),
            "proof": Proof(**values["proof"]),
        }
    )


def _key(values: Mapping[str, Any]) -> WidthKey:
    return WidthKey(**{**values, "also_moves": tuple(values["also_moves"])})


def in_groups(keys: Iterable[str | None]) -> list[int]:
    """Number what has the same key: equal keys get one number, and what has none gets one of its own."""
    numbers: dict[str, int] = {}
    found: list[int] = []
    count = 0
    for key in keys:
        if key is None or key not in numbers:
            if key is not None:
                numbers[key] = count
            found.append(count)
            count += 1
        else:
            found.append(numbers[key])
    return found
