"""Sequential calibration: every FFN is calibrated on what the FFNs before it, already reduced, make of the text.

The model runs once, to catch what each layer is called with; then the layers run one by one on hidden states, each
with its own FFN to gather statistics and with the reduced one to make the next layer's input. The model is not changed.

An FFN's outputs are added to a residual stream, which the reduced FFNs before have bent. Its targets are therefore not
what the original FFN makes of the bent inputs, but what leads the stream back to the original model's:

    target = original stream after the FFN - (stream at hand after the FFN - its outputs)

Where a layer does not get what the layer before it put out (a decoder behind its encoder, a stage of a vision model
behind its downsampling), it starts on the original's hidden states; decoders attend to the original encoder's.

Where outputs are normalised before they are added (Gemma 2), this comes to what the original FFN put out in the
original model.

Source: matching the full model's outputs on the reduced model's inputs is the asymmetric calibration of "GPTAQ" (Li et
al., ICML 2025, arXiv 2504.02692), there for single weight matrices; the residual stream's part in the target is this
project's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from mlp_fusion.calibration.statistics import Collector, FFNStatistics, row_capacity, take_calibration
from mlp_fusion.errors import InputError
from mlp_fusion.families import Architecture, FFNSite
from mlp_fusion.reducing.pipeline import ReducedFFN
from mlp_fusion.running.batches import Batch
from mlp_fusion.running.positions import by_sequence
from mlp_fusion.running.runner import Runner
from mlp_fusion.running.sampling import RowPlan, RowSample
from mlp_fusion.running.taps import Taps, replaced, tapped

_Call = tuple[tuple[Any, ...], dict[str, Any]]


@torch.no_grad()
def reduce_sequentially(
    model: nn.Module,
    architecture: Architecture,
    sites: Sequence[FFNSite],
    calibration: Batch | Iterable[Batch],
    reduce: Callable[[int, FFNStatistics], ReducedFFN],
    *,
    seed: int,
    rows: int | None = None,
) -> list[ReducedFFN]:
    """Reduce the FFNs in `sites` one after the other; `reduce(number, statistics)` does one.

    The outputs `y` in the statistics are the targets that this module's docstring gives. `rows` and the length of the
    text are as in :func:`mlp_fusion.calibration.collect`.

    Memory beside the model: three times the hidden states of all calibration tokens at one layer, and the statistics of
    one FFN (see :func:`mlp_fusion.calibration.collect`). Time: four runs of the model.

    Raises:
        InputError: the calibration text cannot be used, or a layer is called in a way that cannot be repeated.
    """
    batches = take_calibration(model, calibration)
    plan = RowPlan(batches, seed)
    first, last = min(site.index for site in sites), max(site.index for site in sites)
    between = [site for site in architecture.sites(model) if first <= site.index <= last]
    numbers = {site.path: number for number, site in enumerate(sites)}
    reduced: dict[int, ReducedFFN] = {}
    with Runner(model, "the calibration text") as runner:
        # Hidden states of the model with the FFNs reduced so far, and of the original.
        states: list[Tensor] = []
        exact: list[Tensor] = []
        for site, site_calls in _record(runner, between, batches):
            given = [_hidden_of(call) for call in site_calls]
            if all(x.numel() > 0 for x in given):
                states = exact = given
            runs = [_streamed(architecture, site, call, x) for call, x in zip(site_calls, exact, strict=True)]
            exact, wanted = [output for output, _ in runs], [stream for _, stream in runs]
            if site.path not in numbers:
                states = [_run(site, call, x) for call, x in zip(site_calls, states, strict=True)]
                continue
            inputs = architecture.read(site, model.config).w_in
            sample = RowSample(plan, row_capacity(rows, inputs.shape[-1], inputs.element_size()))
            statistics = _statistics(architecture, site, site_calls, states, wanted, batches, sample)
            number = numbers[site.path]
            reduced[number] = reduce(number, statistics)
            with replaced(architecture, site, reduced[number].reduction.bundle):
                states = [_run(site, call, x) for call, x in zip(site_calls, states, strict=True)]
    return [reduced[number] for number in range(len(sites))]


def _record(runner: Runner, layers: Sequence[FFNSite], batches: Sequence[Batch]) -> list[tuple[FFNSite, list[_Call]]]:
    """The layers as they run, each with what it was called with, per batch.

    Hidden states only of those that did not get, in every batch, what the layer before them put out; else empty.
    """
    calls: dict[int, list[_Call]] = {}
    chained = dict.fromkeys(range(len(layers)), True)
    before: list[Tensor] = []

    def recorder(number: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # A cache would hold the first run's keys when the layer runs again.
            call = (
                tuple(None if isinstance(value, Cache) else value for value in args),
                {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()},
            )
            calls.setdefault(number, []).append(call)
            hidden = _hidden_of(call)
            chained[number] &= bool(before) and before[-1].shape == hidden.shape and torch.equal(before[-1], hidden)
            if chained[number]:
                calls[number][-1] = _with_hidden(call, torch.empty(0))

        return record

    def note(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        before[:] = [output[0] if isinstance(output, tuple) else output]

    handles = [
        site.layer.register_forward_pre_hook(recorder(number), with_kwargs=True) for number, site in enumerate(layers)
    ]
    handles += [site.layer.register_forward_hook(note) for site in layers]
    try:
        for batch in batches:
            before.clear()
            runner.base(batch)
    finally:
        for handle in handles:
            handle.remove()
    counts = [len(calls.get(number, ())) for number in range(len(layers))]
    kept = [{_hidden_of(call).numel() > 0 for call in found} for found in calls.values()]
    if any(count != len(batches) for count in counts) or any(len(found) > 1 for found in kept):
        raise InputError("a layer did not run once per batch, or alike: sequential calibration cannot repeat it")
    return [(layers[number], found) for number, found in calls.items()]


def _hidden_of(call: _Call) -> Tensor:
    args, kwargs = call
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor):
        raise InputError("a layer is called without hidden states: sequential calibration cannot repeat it")
    return hidden


def _with_hidden(call: _Call, hidden: Tensor) -> _Call:
    args, kwargs = call
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden}


def _run(site: FFNSite, call: _Call, hidden: Tensor) -> Tensor:
    args, kwargs = _with_hidden(call, hidden)
    output = site.layer(*args, **kwargs)
    found = output[0] if isinstance(output, tuple) else output
    assert isinstance(found, Tensor)
    return found


def _streamed(architecture: Architecture, site: FFNSite, call: _Call, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's output, and the `(batch, length, d)` residual stream with the FFN's outputs just added to it."""
    with _normalised(architecture, site) as entered:
        output = _run(site, call, hidden)
    # In chunks of the sequence, where the FFN runs in chunks. Without a normalisation behind it: the layer's output.
    return output, torch.cat(entered, dim=1) if entered else output


@contextmanager
def _normalised(architecture: Architecture, site: FFNSite) -> Iterator[list[Tensor]]:
    """What enters the layer's first normalisation behind the FFN, if there is one, while the layer runs inside."""
    entered: list[Tensor] = []
    waiting: list[bool] = []

    def passed(_module: nn.Module, _args: tuple[Any, ...], _y: Tensor) -> None:
        waiting.append(True)

    def enter(_module: nn.Module, args: tuple[Any, ...]) -> None:
        if waiting:
            entered.append(args[0])
            waiting.clear()

    norms = [module for module in site.layer.modules() if "norm" in type(module).__name__.lower()]
    handles = [architecture.projection(site, "w_out").register_forward_hook(passed)]
    handles += [norm.register_forward_pre_hook(enter) for norm in norms]
    try:
        yield entered
    finally:
        for handle in handles:
            handle.remove()


def _statistics(
    architecture: Architecture,
    site: FFNSite,
    calls: Sequence[_Call],
    states: Sequence[Tensor],
    wanted: Sequence[Tensor],
    batches: Sequence[Batch],
    sample: RowSample,
) -> FFNStatistics:
    """Statistics of the FFN at `site` on `states`, its targets those that lead to the streams `wanted`."""
    collector = Collector(sample)
    seen: list[tuple[Tensor, Taps]] = []
    with tapped(architecture, [site], lambda _number, mask, taps: seen.append((mask, taps))) as taps:
        for call, hidden, stream, batch in zip(calls, states, wanted, batches, strict=True):
            taps.start(batch)
            _, present = _streamed(architecture, site, call, hidden)
            taps.finish()
            mask, found = seen.pop()
            chosen = mask.to(found.x.device)
            y = found.y[chosen]
            working = torch.promote_types(y.dtype, torch.float32)
            # The layer may have another form than what the FFN sees: as many rows, in the same order.
            its, streams = by_sequence({"wanted": [stream], "present": [present]}, batch, site.path)
            exact, bent = (streams[name][its.to(y.device)].to(working) for name in ("wanted", "present"))
            target = y.to(working) + (exact - bent)
            collector.add(mask, found.x[chosen], found.hidden[chosen], target.to(y.dtype))
    return collector.finish()
