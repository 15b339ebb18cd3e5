"""A model of which one layer is in memory at a time: its weights are read when it runs, and let go afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mlp_fusion.errors import InputError
from mlp_fusion.families import FFNSite, building
from mlp_fusion.reducing.layers import Layer, Recorder, hidden_of, layers_of
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

    def stack(self, sites: Sequence[FFNSite]) -> list[Layer]:
        """The layers, those without an FFN too, in the order in which they stand; everything else is read.

        Raises:
            InputError: an FFN stands in no list of layers.
        """
        found = {layer.path: layer for layer in layers_of(self.model, sites)}
        lists = dict.fromkeys(path.rpartition(".")[0] for path in found)
        for path in lists:
            if not isinstance(self.model.get_submodule(path), (nn.ModuleList, nn.Sequential)):
                raise InputError(
                    f"{next(iter(found))} is in no list of layers, that could be run one by one: leave out stream"
                )
        layers = [
            found.get(f"{path}.{name}", Layer(f"{path}.{name}", module, ()))
            for path in lists
            for name, module in self.model.get_submodule(path).named_children()
        ]
        self._read([p for p in self._names if not any(p.startswith(f"{layer.path}.") for layer in layers)])
        return layers

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

    def record(self, layers: Sequence[Layer], batches: Sequence[Batch]) -> Recorder:
        """What each layer is called with, of hidden states those of the first only: no layer is run.

        Layers stand aside and hand on what they get. What they get besides must not depend on it.

        Raises:
            InputError: a layer gets something else than what the one before has put out.
        """
        for handed in (_itself, _in_a_tuple):
            recorder = Recorder(layers)
            with Runner(self.model, "the calibration text") as runner, _standing_aside(layers, handed):
                try:
                    recorder.run(runner, batches)
                except InputError:
                    continue  # it takes something else from its layers
            if recorder.order == list(range(len(layers))) and recorder.chained >= set(range(1, len(layers))):
                return recorder
        raise InputError(
            f"{type(self.model).__name__}: its layers do not feed one another from the first to the last, so that they "
            "cannot be run one by one: leave out stream, or the calibration"
        )


def _itself(hidden: Tensor) -> Any:
    return hidden


def _in_a_tuple(hidden: Tensor) -> Any:
    return (hidden,)


@contextmanager
def _standing_aside(layers: Sequence[Layer], handed: Any) -> Iterator[None]:
    """Inside, layers put out the hidden states that they get."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return handed(hidden_of((args, kwargs)))

    for layer in layers:
        layer.module.forward = forward
    try:
        yield
    finally:
        for layer in layers:
            del layer.module.forward


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
