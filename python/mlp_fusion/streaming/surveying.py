"""Widths of a model that is not in memory, by a budget: what it loses by each FFN, found layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mlp_fusion.calibration.sensitivity import SENSED_TOKENS
from mlp_fusion.calibration.statistics import take_calibration
from mlp_fusion.families import Architecture
from mlp_fusion.reducing.curves import elimination_curve
from mlp_fusion.reducing.layers import Layer, hidden_of, run_layer
from mlp_fusion.reducing.widths import Choice, allocate_widths
from mlp_fusion.running.batches import Batch
from mlp_fusion.running.excerpts import excerpts
from mlp_fusion.running.sampling import RowPlan
from mlp_fusion.streaming.layerwise import LayerwiseModel
from mlp_fusion.streaming.passing import Passing
from mlp_fusion.streaming.sensing import Gradients
from mlp_fusion.streaming.work import Work


@dataclass(frozen=True)
class Survey:
    """The run over the layers that widths of dense FFNs are found by: those of a model in memory.

    Memory: that of a run, with the hidden states of the text that gradients are taken on besides.

    Attributes:
        work: where FFNs lie; those that get a width are the chosen ones of its settings.
        architecture: of the model.
        batches: the calibration text.
        gradients: what files of gradients are called; they are left there.
    """

    work: Work
    architecture: Architecture
    batches: Sequence[Batch]
    gradients: Path

    @torch.no_grad()
    def widths(self, budget: float, progress: Callable[[float], None]) -> dict[int, int]:
        """Number of an FFN -> the neurons that it keeps of a budget of parameters.

        Args:
            budget: the share that all keep together.
            progress: called with the share that is done.

        Raises:
            InputError: the model cannot be run layer by layer, or not on the text, or allows no gradients.
        """
        w = self.work
        model = LayerwiseModel(w.source, w.config, w.dtype, w.device)
        batches = take_calibration(model.model, list(self.batches))
        every = self.architecture.sites(model.model)
        sites = [site for site in every if site.index in w.settings.layers]  # type: ignore[operator]
        stacks = model.stacks(every, batches[0], [site.index for site in sites])
        found = Gradients(self.gradients, w.device)
        found.gather(
            model, stacks, self.architecture, sites, batches,
            seed=w.settings.seed, may_skip=False, progress=lambda share: progress(share / 2),
        )  # fmt: skip
        curves = self._curves(model, stacks, batches, found, lambda done: progress((1 + done / len(sites)) / 2))
        each = [curves[site.index] for site in sites]
        widths = allocate_widths(each, [[number] for number in range(len(sites))], budget)
        return {site.index: width for site, width in zip(sites, widths, strict=True)}

    def _curves(
        self,
        model: LayerwiseModel,
        stacks: Sequence[Sequence[Layer]],
        batches: Sequence[Batch],
        gradients: Gradients,
        progress: Callable[[int], None],
    ) -> dict[int, list[Choice]]:
        """Number of an FFN -> its losses by width."""
        looked = list(excerpts(model.model, batches, SENSED_TOKENS))
        both, count = [*batches, *looked], len(batches)
        curves: dict[int, list[Choice]] = {}
        ends: list[list[torch.Tensor]] = []
        for stack in stacks:
            calls = model.record(stacks, both, ends)
            hidden = [hidden_of(call) for call in calls[0]]
            for layer, own in zip(stack, calls, strict=True):
                with model.loaded(layer), model.checked(layer, stack):
                    text = Passing(self.architecture, layer, batches, own[:count], hidden[:count])
                    judged = Passing(self.architecture, layer, looked, own[count:], hidden[count:])
                    self._of_layer(layer, text, judged, gradients, curves)
                    progress(len(curves))
                    if len(curves) == len(self.work.settings.layers):  # type: ignore[arg-type]
                        return curves
                    hidden = [run_layer(layer, call, x) for call, x in zip(own, hidden, strict=True)]
            ends.append(hidden)
        return curves

    def _of_layer(
        self, layer: Layer, text: Passing, judged: Passing, gradients: Gradients, curves: dict[int, list[Choice]]
    ) -> None:
        settings = self.work.settings
        plans = [RowPlan(each.batches, settings.seed) for each in (text, judged)]
        for site in layer.sites:
            if site.index not in settings.layers:  # type: ignore[operator]
                continue
            sensitivity = gradients.sensitivity(site)
            assert sensitivity is not None
            known = text.statistics([site], plans[0], settings.calibration_rows)
            seen = judged.statistics([site], plans[1], len(sensitivity.sizes))  # all there are
            original = self.architecture.read(site)
            curves[site.index] = elimination_curve(original, known[0], seen[0], sensitivity, seed=settings.seed)
