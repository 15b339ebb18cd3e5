"""What passes through the FFNs of one layer of a model that is not in memory, when the layer runs on its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mlp_fusion.calibration.statistics import FFNStatistics, adding_to, collector_of
from mlp_fusion.families import Architecture, FFNSite
from mlp_fusion.reducing.layers import Call, Layer, run_layer
from mlp_fusion.running.batches import Batch
from mlp_fusion.running.sampling import RowPlan
from mlp_fusion.running.taps import Visitor, tapped


@dataclass(frozen=True)
class Passing:
    """A layer that has its weights, and what it runs on.

    Attributes:
        architecture: of the model.
        layer: it.
        batches: the text.
        calls: what the layer is called with, per batch.
        hidden: the hidden states that it gets, per batch.
    """

    architecture: Architecture
    layer: Layer
    batches: Sequence[Batch]
    calls: Sequence[Call]
    hidden: Sequence[Tensor]

    def show(self, sites: Sequence[FFNSite], visit: Visitor) -> None:
        """Run the layer, and show what passes through some of its FFNs."""
        if not sites:
            return
        with tapped(self.architecture, sites, visit) as taps:
            for call, x, batch in zip(self.calls, self.hidden, self.batches, strict=True):
                taps.start(batch)
                run_layer(self.layer, call, x)
                taps.finish()

    def statistics(self, sites: Sequence[FFNSite], plan: RowPlan, rows: int | None) -> list[FFNStatistics]:
        """What passes through some FFNs; `plan` and `rows` as in :func:`mlp_fusion.calibration.collect`."""
        collectors = [collector_of(self.architecture, site, plan, rows) for site in sites]
        self.show(sites, adding_to(collectors))
        return [collector.finish() for collector in collectors]
