"""Sequential calibration: every FFN is calibrated on what the FFNs before it, already reduced, make of the text.

The model runs once, to catch what each layer is called with; then the layers run one by one on hidden states, each
with its own FFN to gather statistics and with the reduced one to make the next layer's input. The model is not changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from mlp_fusion.architectures import Architecture, FFNSite
from mlp_fusion.calibration.statistics import (
    CALIBRATION_TOKENS,
    Collector,
    FFNStatistics,
    StreamPlan,
    row_capacity,
)
from mlp_fusion.errors import InputError
from mlp_fusion.measure.activations import Batch, Taps, evaluating, replaced, take_batches, tapped, token_mask
from mlp_fusion.methods.pipeline import ReducedFFN

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
) -> list[ReducedFFN]:
    """Reduce the FFNs in `sites` one after the other; `reduce(number, statistics)` does one.

    Memory beside the model: the hidden states of all calibration tokens at one layer, and the statistics of one FFN
    (see :func:`mlp_fusion.calibration.collect`). Time: three runs of the model.

    Raises:
        InputError: the calibration text cannot be used, or a layer is called in a way that cannot be repeated.
    """
    batches = take_batches(calibration, CALIBRATION_TOKENS)
    inputs = architecture.read(sites[0], model.config).w_in
    plan = StreamPlan(batches, row_capacity(inputs.shape[-1], inputs.element_size()), seed)
    masks = [token_mask(batch) for batch in batches]
    first, last = sites[0].index, sites[-1].index
    between = [site for site in architecture.sites(model) if first <= site.index <= last]
    numbers = {site.index: number for number, site in enumerate(sites)}
    with evaluating(model):
        calls = _record(model, between, batches)
        states = [_hidden_of(call) for call in calls[0]]
        reduced: list[ReducedFFN] = []
        for site, site_calls in zip(between, calls, strict=True):
            if site.index not in numbers:
                states = [_run(site, call, x) for call, x in zip(site_calls, states, strict=True)]
                continue
            statistics = _statistics(architecture, site, site_calls, states, masks, plan)
            reduced.append(reduce(numbers[site.index], statistics))
            with replaced(architecture, site, reduced[-1].reduction.bundle):
                states = [_run(site, call, x) for call, x in zip(site_calls, states, strict=True)]
    return reduced


def _record(model: nn.Module, layers: Sequence[FFNSite], batches: Sequence[Batch]) -> list[list[_Call]]:
    """Per layer and batch, what the layer was called with; hidden states of the first layer only."""
    calls: list[list[_Call]] = [[] for _ in layers]

    def recorder(number: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # A cache would hold the first run's keys when the layer runs again.
            call = (
                tuple(None if isinstance(value, Cache) else value for value in args),
                {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()},
            )
            calls[number].append(call if number == 0 else _with_hidden(call, torch.empty(0)))

        return record

    handles = [
        site.layer.register_forward_pre_hook(recorder(number), with_kwargs=True) for number, site in enumerate(layers)
    ]
    device = next(model.parameters()).device
    base: Any = getattr(model, "base_model", model)
    try:
        for batch in batches:
            base(**{k: v.to(device) for k, v in batch.items()})
    except (ValueError, IndexError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"the model cannot run on the calibration text ({type(error).__name__}: {reason})") from error
    finally:
        for handle in handles:
            handle.remove()
    if any(len(found) != len(batches) for found in calls):
        raise InputError("a layer did not run once per batch: sequential calibration cannot repeat it")
    return calls


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


def _statistics(
    architecture: Architecture,
    site: FFNSite,
    calls: Sequence[_Call],
    states: Sequence[Tensor],
    masks: Sequence[Tensor],
    plan: StreamPlan,
) -> FFNStatistics:
    collector = Collector(plan.capacity)
    moves = iter(plan.moves)

    def visit(_number: int, mask: Tensor, taps: Taps) -> None:
        mask = mask.to(taps.x.device)
        collector.add(taps.x[mask], taps.hidden[mask], taps.y[mask], *next(moves))

    with tapped(architecture, [site], visit) as taps:
        for call, hidden, mask in zip(calls, states, masks, strict=True):
            taps.start(mask)
            _run(site, call, hidden)
            taps.finish()
    return collector.finish(plan.order, plan.sequence)
