"""The layers of a model that hold FFNs, and how each is called: what it takes to run them one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from mlp_fusion.errors import InputError
from mlp_fusion.families import FFNSite
from mlp_fusion.families.building import pattern
from mlp_fusion.running.batches import Batch
from mlp_fusion.running.runner import Runner

#: What a layer was called with.
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer and the FFNs in it.

    Attributes:
        path, module: of the layer.
        sites: its FFNs; a stack of experts is one.
    """

    path: str
    module: nn.Module
    sites: tuple[FFNSite, ...]


def layers_of(model: nn.Module, sites: Sequence[FFNSite]) -> list[Layer]:
    """The layers that hold FFNs, in the order in which these stand.

    A layer is the outermost member of a list of modules in which no kind of FFN comes twice, experts aside; an FFN that
    is in no such list is its own layer.
    """
    found: dict[str, list[FFNSite]] = {}
    for site in sites:
        found.setdefault(_layer_path(model, site.path, sites), []).append(site)
    return [Layer(path, model.get_submodule(path), tuple(inside)) for path, inside in found.items()]


def _layer_path(model: nn.Module, path: str, sites: Sequence[FFNSite]) -> str:
    parts = path.split(".")
    for end in range(1, len(parts) + 1):
        layer = ".".join(parts[:end])
        listed = isinstance(model.get_submodule(".".join(parts[: end - 1])), (nn.ModuleList, nn.Sequential))
        inside = {site.path for site in sites if f"{site.path}.".startswith(f"{layer}.")}
        kinds = [pattern(one) for one in inside if "expert" not in one]
        if listed and len(kinds) == len(set(kinds)):
            return layer
    return path


class Recorder:
    """What layers are called with while a model runs, in which order, and which take over what the one before put out.

    Args:
        layers: those that are watched.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers
        #: Per layer and batch, the call.
        self.calls: list[list[Call]] = [[] for _ in layers]
        #: Numbers of the layers, in the order in which they ran.
        self.order: list[int] = []
        #: Layers whose hidden states were, on every batch, what the layer before had put out.
        self.chained: set[int] = set(range(len(layers)))
        self._last: Tensor | None = None

    def run(self, runner: Runner, batches: Sequence[Batch]) -> Recorder:
        """Run the model over the batches.

        Raises:
            InputError: a layer does not run once per batch, or without hidden states.
        """
        handles = []
        for number, layer in enumerate(self.layers):
            handles.append(layer.module.register_forward_pre_hook(self._entering(number), with_kwargs=True))
            handles.append(layer.module.register_forward_hook(self._left))
        try:
            for batch in batches:
                self._last = None
                runner.base(batch, [layer.path for layer in self.layers])
        finally:
            for handle in handles:
                handle.remove()
        if any(len(found) != len(batches) for found in self.calls):
            raise InputError(
                "a layer did not run once per batch: sequential calibration cannot repeat it, leave it out"
            )
        return self

    def _entering(self, number: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # A cache would hold the first run's keys when the layer runs again.
            call = (
                tuple(None if isinstance(value, Cache) else value for value in args),
                {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()},
            )
            if number not in self.order:
                self.order.append(number)
            hidden, last = hidden_of(call), self._last
            same = last is hidden or (last is not None and last.shape == hidden.shape and torch.equal(last, hidden))
            if not same:
                self.chained.discard(number)
            self.calls[number].append(with_hidden(call, torch.empty(0)) if number in self.chained else call)

        return enter

    def _left(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        found = output[0] if isinstance(output, tuple) else output
        self._last = found if isinstance(found, Tensor) else None


def hidden_of(call: Call) -> Tensor:
    """The hidden states among a layer's arguments.

    Raises:
        InputError: there are none.
    """
    args, kwargs = call
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor):
        raise InputError("a layer is called without hidden states: sequential calibration cannot repeat it")
    return hidden


def with_hidden(call: Call, hidden: Tensor) -> Call:
    """The same call on other hidden states."""
    args, kwargs = call
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden}


def run_layer(layer: Layer, call: Call, hidden: Tensor) -> Tensor:
    """What a layer makes of hidden states."""
    args, kwargs = with_hidden(call, hidden)
    output = layer.module(*args, **kwargs)
    found = output[0] if isinstance(output, tuple) else output
    assert isinstance(found, Tensor)
    return found


def segments(order: Sequence[int], chained: set[int]) -> list[list[int]]:
    """Layers that feed one another, in the order in which they run."""
    found: list[list[int]] = []
    for number in order:
        if not found or number not in chained:
            found.append([])
        found[-1].append(number)
    return found
