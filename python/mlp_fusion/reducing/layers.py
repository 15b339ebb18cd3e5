"""The layers of a model that hold FFNs, and how each is called: what it takes to run them one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from mlp_fusion.errors import SkippableError
from mlp_fusion.families import Architecture, FFNSite
from mlp_fusion.families.building import pattern
from mlp_fusion.running.batches import Batch
from mlp_fusion.running.runner import Runner

#: What a layer was called with.
Call = tuple[tuple[Any, ...], dict[str, Any]]
#: What a layer put out, and the residual stream `(batch, length, d)` with its FFN's outputs just added to it.
Streamed = tuple[Tensor, Tensor]
#: Bytes of the layers' outputs that a :class:`Recorder` keeps.
KEPT_BYTES = 2 * 2**30


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
        architecture: of the model; with it, what the layers put out is kept, as long as all of it fits into
            :data:`KEPT_BYTES`.
    """

    def __init__(self, layers: Sequence[Layer], architecture: Architecture | None = None) -> None:
        self.layers = layers
        #: Per layer and batch, what it put out; None where that is not kept.
        self.outputs: list[list[Streamed]] | None = None if architecture is None else [[] for _ in layers]
        self._architecture = architecture
        self._bytes = 0
        #: Per layer, what the call that runs now has told of its stream.
        self._entered: list[list[Tensor]] = [[] for _ in layers]
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
            SkippableError: a layer does not run once per batch, or without hidden states.
        """
        with ExitStack() as stack:
            for number, layer in enumerate(self.layers):
                if self._architecture is not None:
                    self._entered[number] = stack.enter_context(stream_entered(self._architecture, layer))
                enter = layer.module.register_forward_pre_hook(self._entering(number), with_kwargs=True)
                leave = layer.module.register_forward_hook(self._leaving(number))
                stack.callback(enter.remove)
                stack.callback(leave.remove)
            for batch in batches:
                self._last = None
                runner.base(batch, [layer.path for layer in self.layers])
        if any(len(found) != len(batches) for found in self.calls):
            raise SkippableError(
                "a layer did not run once per batch, which sequential calibration cannot repeat: give sequential=False "
                "(--no-sequential)"
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

    def _leaving(self, number: int) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def leave(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            found = _first(output)
            self._last = found if isinstance(found, Tensor) else None
            if self.outputs is not None and self._last is not None:
                # A copy: some models add to what a layer has put out in place.
                self._keep(number, streamed(self._last.clone(), self._entered[number]))

        return leave

    def _keep(self, number: int, found: Streamed) -> None:
        assert self.outputs is not None
        self._bytes += sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in found}.values())
        self.outputs[number].append(found)
        if self._bytes > KEPT_BYTES:
            self.outputs = None


def hidden_of(call: Call) -> Tensor:
    """The hidden states among a layer's arguments.

    Raises:
        SkippableError: there are none.
    """
    args, kwargs = call
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor):
        raise SkippableError("a layer is called without hidden states: sequential calibration cannot repeat it")
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
    found = _first(layer.module(*args, **kwargs))
    assert isinstance(found, Tensor)
    return found


def _first(output: Any) -> Any:
    """The hidden states of what a layer puts out, which may be more, in a tuple or (OpenAI's GPT) in a list."""
    return output[0] if isinstance(output, (tuple, list)) else output


def run_streamed(architecture: Architecture, layer: Layer, call: Call, hidden: Tensor) -> Streamed:
    """What a layer makes of hidden states, and its stream."""
    with stream_entered(architecture, layer) as entered:
        output = run_layer(layer, call, hidden)
    return streamed(output, entered)


def streamed(output: Tensor, entered: Sequence[Tensor]) -> Streamed:
    """A layer's output with its stream, of what :func:`stream_entered` has shown while it ran."""
    # In chunks of the sequence, where the FFN runs in chunks. Without a normalisation behind it: the layer's output.
    return output, torch.cat(list(entered), dim=1) if entered else output


@contextmanager
def stream_entered(architecture: Architecture, layer: Layer) -> Iterator[list[Tensor]]:
    """What enters the layer's first normalisation behind its FFN, if there is one, when the layer last ran inside.

    Nothing of a layer that has several FFNs, or experts.
    """
    entered: list[Tensor] = []
    if len(layer.sites) != 1 or layer.sites[0].kind.experts:
        yield entered
        return
    waiting: list[bool] = []

    def begin(_module: nn.Module, _args: tuple[Any, ...]) -> None:
        entered.clear()
        waiting.clear()

    def passed(_module: nn.Module, _args: tuple[Any, ...], _y: Tensor) -> None:
        waiting.append(True)

    def enter(_module: nn.Module, args: tuple[Any, ...]) -> None:
        if waiting:
            entered.append(args[0])
            waiting.clear()

    norms = [module for module in layer.module.modules() if "norm" in type(module).__name__.lower()]
    handles = [architecture.projection(layer.sites[0], "w_out").register_forward_hook(passed)]
    handles += [norm.register_forward_pre_hook(enter) for norm in norms]
    handles.append(layer.module.register_forward_pre_hook(begin))
    try:
        yield entered
    finally:
        for handle in handles:
            handle.remove()


def segments(order: Sequence[int], chained: set[int]) -> list[list[int]]:
    """Layers that feed one another, in the order in which they run."""
    found: list[list[int]] = []
    for number in order:
        if not found or number not in chained:
            found.append([])
        found[-1].append(number)
    return found
