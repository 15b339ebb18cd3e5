"""A model of which one layer is in memory at a time: its weights are read when it runs, and let go afterwards."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mlp_fusion.errors import InputError
from mlp_fusion.families import FFNSite, building
from mlp_fusion.reducing.layers import Call, Layer, Recorder, hidden_of, layers_of
from mlp_fusion.running.batches import Batch
from mlp_fusion.running.runner import Runner
from mlp_fusion.store.naming import Conversion
from mlp_fusion.store.reference import experts_options, stays_wide, wide_patterns
from mlp_fusion.store.tensors import Tensors


class LayerwiseModel:
    """A checkpoint as a model whose layers are empty until they are asked for; all else is in memory.

    Args:
        folder: the checkpoint.
        config: its config.
        dtype: that the model runs in.
        device: that it runs on.

    Raises:
        InputError: transformers builds no model from the config.
    """

    def __init__(self, folder: Path, config: Any, dtype: torch.dtype, device: torch.device) -> None:
        self._tensors = Tensors(folder, config)
        self._dtype, self._device = dtype, device
        self.model = _hollow(config, dtype)
        self._conversion = Conversion(self.model)
        self._names: dict[str, list[str]] = {}
        for name in self._tensors:
            place = self._conversion.place(name)
            if place is not None:
                self._names.setdefault(place[0], []).append(name)
        self._wide = wide_patterns(self.model, dtype)
        self._hands_on = False

    def stacks(self, sites: Sequence[FFNSite], batch: Batch, wanted: Collection[int]) -> list[list[Layer]]:
        """The lists of layers that run, those without an FFN too, in the order in which they stand.

        Everything else is read, but for layers that do not run: those for images, of a model that reads text.

        Args:
            sites: all FFNs of the model.
            batch: what it is run on, layers standing aside.
            wanted: numbers of FFNs that must be in a list that runs.

        Raises:
            InputError: an FFN stands in no list of layers, or one that is wanted does not run.
        """
        found = {layer.path: layer for layer in layers_of(self.model, sites)}
        lists = {path: self._listed(path.rpartition(".")[0], found) for path in found}
        stacks = {stack[0].path: stack for path in found if (stack := lists[path] or [found[path]])}
        inside = tuple(f"{layer.path}." for stack in lists.values() for layer in stack)
        self._read([parameter for parameter in self._names if not parameter.startswith(inside)])
        running = []
        for stack, runs in zip(stacks.values(), self._ran([*stacks.values()], batch), strict=True):
            idle = [site.path for layer in stack for site in layer.sites if site.index in wanted and not runs]
            if idle:
                raise InputError(f"{idle[0]} does not run on text: leave it out (layers), or leave out stream")
            if runs and not lists.get(stack[0].path, stack):
                raise InputError(
                    f"{stack[0].path} is in no list of layers, that could be run one by one: leave out stream"
                )
            if runs:
                running.append(stack)
        return running

    def _listed(self, path: str, found: Mapping[str, Layer]) -> list[Layer]:
        """The layers of a list of them, those without an FFN too; none where the path is of something else."""
        members = self.model.get_submodule(path)
        if not isinstance(members, (nn.ModuleList, nn.Sequential)):
            return []
        paths = {f"{path}.{name}": module for name, module in members.named_children()}
        return [found.get(path, Layer(path, module, ())) for path, module in paths.items()]

    def _ran(self, stacks: Sequence[Sequence[Layer]], batch: Batch) -> list[bool]:
        """Which of the stacks run on a batch; all, where that cannot be seen while layers stand aside."""
        for handed in (_itself, _in_a_tuple, None):
            ran: set[int] = set()
            with Runner(self.model, "the calibration text") as runner, ExitStack() as inside:
                for number, stack in enumerate(stacks):
                    if handed is None:
                        inside.enter_context(self.loaded(stack[0]))
                    entered = functools.partial(ran.add, number)
                    inside.enter_context(_standing_aside(stack, handed, torch.clone, None, entered))
                try:
                    runner.base(batch)
                except InputError:
                    continue  # something else is expected of layers
            return [number in ran for number in range(len(stacks))]
        return [True] * len(stacks)

    @contextmanager
    def loaded(self, layer: Layer) -> Iterator[None]:
        """Inside, a layer has its weights."""
        names = [name for name in self._names if name.startswith(f"{layer.path}.")]
        self._read(names)
        try:
            yield
        finally:
            for module in layer.module.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        module._parameters[name] = _empty(parameter)

    @contextmanager
    def whole(self, stacks: Sequence[Sequence[Layer]], ran: Callable[[], None]) -> Iterator[nn.Module]:
        """Inside, the model runs as one that is in memory: layers are read when they run.

        Nothing of a layer is kept for a backward pass: it is read and run again then. `ran` is called each time that a
        layer has run.
        """

        def reading(layer: Layer, forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                with self.loaded(layer):
                    found = forward(*args, **kwargs)
                ran()
                return found

            def run_again(*args: Any, **kwargs: Any) -> Any:
                if not torch.is_grad_enabled():
                    return run(*args, **kwargs)
                return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

            return run_again

        with ExitStack() as stack:
            for layer in itertools.chain.from_iterable(stacks):
                stack.callback(_put_back, layer.module, vars(layer.module).get("forward"))
                layer.module.forward = reading(layer, layer.module.forward)
            yield self.model

    def _read(self, parameters: Sequence[str]) -> None:
        """Read parameters and buffers, all of those that are made of the same tensors.

        Raises:
            InputError: a parameter is not finite.
        """
        buffers = {name for name, _ in self.model.named_buffers()}
        read: dict[str, Tensor] = {}
        for parameter in parameters:
            # Buffers, masks among them, may be infinite.
            one = self._tensors.read if parameter in buffers else self._tensors.read_finite
            read.update((name, one(name)) for name in self._names[parameter])
        made = self._conversion.convert(read)
        read.clear()
        for name in list(made):
            path, _, own = name.rpartition(".")
            module = self.model.get_submodule(path)
            value = made.pop(name)
            if value.is_floating_point():
                value = value.to(torch.float32 if stays_wide(name, self._wide) else self._dtype)
            value = value.to(self._device)
            if own in module._buffers:
                module._buffers[own] = value
            else:
                module._parameters[own] = nn.Parameter(value, requires_grad=False)
        self.model.tie_weights()

    def record(
        self, stacks: Sequence[Sequence[Layer]], batches: Sequence[Batch], ends: Sequence[Sequence[Tensor]]
    ) -> list[list[Call]]:
        """What each layer of a stack is called with, of hidden states those of the first only: few layers are run.

        Layers stand aside and hand on what they get. What they get besides must not depend on it, which is seen when
        they hand on something else, or must come from the first of a stack (the relative positions of T5), which runs
        then.

        Args:
            stacks: all lists of layers; that of which calls are wanted stands behind as many as have `ends`.
            batches: what the model runs on.
            ends: what the last layers of earlier stacks put out, per batch.

        Returns:
            Per layer and batch, the call.

        Raises:
            InputError: the text holds tokens that the model does not know, a layer gets something else than what the
                one before has put out, or stacks run in another order than they stand in.
        """
        runner = Runner(self.model, "the calibration text")
        for batch in batches:  # what follows tries ways of calling, and passes over what fails
            runner.check_vocabulary(batch)
        for handed in (_itself, _in_a_tuple, None):
            calls = self._recorded(stacks, batches, ends, handed)
            if calls is None:
                continue  # they are asked for something else
            # What nobody may depend on is something else now.
            others = self._recorded(stacks, batches, ends, handed, torch.neg)
            if others is not None and _alike(calls, others):
                self._hands_on = handed is None
                return calls
        raise InputError(
            f"{type(self.model).__name__}: its layers do not feed one another from the first to the last, so that they "
            "cannot be run one by one: leave out stream, or the calibration"
        )

    def _recorded(
        self,
        stacks: Sequence[Sequence[Layer]],
        batches: Sequence[Batch],
        ends: Sequence[Sequence[Tensor]],
        handed: _Form | None,
        turned: Callable[[Tensor], Tensor] = torch.clone,
    ) -> list[list[Call]] | None:
        """As :meth:`record`, of layers that put out what `turned` makes of hidden states; None if they do not fit."""
        layers = stacks[len(ends)]
        recorder = Recorder(layers)
        ran: list[int] = []
        with Runner(self.model, "the calibration text") as runner, ExitStack() as inside:
            for number, stack in enumerate(stacks):
                if handed is None:
                    inside.enter_context(self.loaded(stack[0]))
                given = ends[number] if number < len(ends) else None
                entered = functools.partial(ran.append, number)
                inside.enter_context(_standing_aside(stack, handed, turned, given, entered))
            try:
                recorder.run(runner, batches)
            except InputError:
                return None
        chained = recorder.order == list(range(len(layers))) and recorder.chained >= set(range(1, len(layers)))
        return recorder.calls if chained and _in_order(ran, len(ends), len(batches)) else None

    @contextmanager
    def checked(self, layer: Layer, stack: Sequence[Layer]) -> Iterator[None]:
        """Inside, a layer that runs hands on, besides hidden states, what it got: so the next one's call is known.

        Raises:
            InputError: it does not.
        """

        def left(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            got = {id(value) for value in (*args, *kwargs.values())}
            if any(isinstance(value, Tensor) and id(value) not in got for value in output[1:]):
                raise InputError(
                    f"{layer.path} puts out more than hidden states, so that layers cannot be run one by one: leave "
                    "out stream, or the calibration"
                )

        if not self._hands_on or layer is stack[0]:
            yield
            return
        handle = layer.module.register_forward_hook(left, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


#: How layers put out hidden states.
_Form = Callable[[Tensor], Any]


def _itself(hidden: Tensor) -> Any:
    return hidden


def _in_a_tuple(hidden: Tensor) -> Any:
    return (hidden,)


def _alike(one: Any, other: Any) -> bool:
    """Whether calls hold the same tensors."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_alike, one, other))
    return True


def _in_order(ran: Sequence[int], stack: int, batches: int) -> bool:
    """Whether, on each batch, the stacks before number `stack` ran before it, one after the other, and others later.

    Args:
        ran: the stack of each layer that ran, in order.
        stack: number of one.
        batches: how many there were.
    """
    found = [number for number, _ in itertools.groupby(min(number, stack + 1) for number in ran)]
    alone, followed = (
        [number for number, _ in itertools.groupby([*range(stack + more)] * batches)] for more in (1, 2)
    )  # fmt: skip
    return found in (alone, followed)


@contextmanager
def _standing_aside(
    stack: Sequence[Layer],
    handed: _Form | None,
    turned: Callable[[Tensor], Tensor],
    ends: Sequence[Tensor] | None,
    entered: Callable[[], None],
) -> Iterator[None]:
    """Inside, layers put out what `turned` makes of the hidden states that they get.

    Args:
        stack: the layers.
        handed: the form in which they put them out; without it the first layer runs, and what it puts out besides
            hidden states is what all do.
        turned: makes hidden states of hidden states.
        ends: what the last layer puts out instead, per batch, if it is known.
        entered: called when one would run.
    """
    left = None if ends is None else iter(ends)
    runs, besides = stack[0].module.forward, tuple[Any, ...]()

    def forward(layer: Layer, *args: Any, **kwargs: Any) -> Any:
        nonlocal besides
        entered()
        hidden = hidden_of((args, kwargs))
        if handed is None and layer is stack[0]:
            hidden, *others = runs(*args, **kwargs)
            besides = tuple(others)
        hidden = turned(hidden)
        if left is not None and layer is stack[-1]:
            hidden = next(left)
        return (hidden, *besides) if handed is None else handed(hidden)

    with ExitStack() as back:
        for layer in stack:
            back.callback(_put_back, layer.module, vars(layer.module).get("forward"))
            layer.module.forward = functools.partial(forward, layer)
        yield


def _put_back(module: Any, forward: Any) -> None:
    """Give a module the method back that it had of its own, as some have, or none."""
    if forward is None:
        del module.forward
    else:
        module.forward = forward


def _hollow(config: Any, dtype: torch.dtype) -> Any:
    """The model of a config, with buffers, and with parameters on the meta device."""
    own = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        own(module, name, None if parameter is None else _empty(parameter))

    cls: Any = building.model_class(config)
    with building.undisturbed():
        nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
        try:
            model = cls._from_config(config, dtype=dtype, **experts_options(dtype))
        except Exception as error:
            raise InputError(f"{config.model_type}: transformers builds no model from this config: {error}") from error
        finally:
            nn.Module.register_parameter = own  # type: ignore[method-assign]
    return model.eval()


def _empty(parameter: nn.Parameter) -> nn.Parameter:
    return parameter if parameter.is_meta else nn.Parameter(parameter.to("meta"), requires_grad=False)
