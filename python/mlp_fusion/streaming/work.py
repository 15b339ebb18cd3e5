"""One task of a streamed run, in the three steps that overlap: reading, reducing, writing."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mlp_fusion.families import FFNSite
from mlp_fusion.measure import FFNRow
from mlp_fusion.modules.stored import bundle_of, tensors_of
from mlp_fusion.neurons import NeuronBundle
from mlp_fusion.reducing.pipeline import Recipe, ReducedFFN, reduce_ffns
from mlp_fusion.reducing.rows import fused_row
from mlp_fusion.running.taps import Activations
from mlp_fusion.settings import FuseSettings
from mlp_fusion.store.disk import DiskFFN
from mlp_fusion.store.reference import stays_wide
from mlp_fusion.store.scale import Rescaling
from mlp_fusion.store.shards import Shard, Shards
from mlp_fusion.store.tensors import Tensors, read_into
from mlp_fusion.streaming.tasks import Part, Task

#: Of neuron vectors that a method works on side by side: memory of blocks of this size is used again, and need not be
#: cleared by the system each time. Other threads do other tasks.
_BATCH_BYTES = 24 * 2**20
#: Bytes that are copied at once.
_COPIED = 16 * 2**20

#: Name, values, and where on the first axis they begin.
Written = tuple[str, Tensor, int]
#: Number of the FFN, its row of the report or an expert's, and how many positions its errors were measured on.
Member = tuple[int, FFNRow, int]


@dataclass(frozen=True)
class Outcome:
    """What became of a task.

    Attributes:
        weights, scales: to write.
        rows: of the report, of every expert by itself.
    """

    weights: list[Written]
    scales: list[Written]
    rows: list[Member]


@dataclass(frozen=True)
class Work:
    """What it takes to do any task of a run, in this process or another one.

    Attributes:
        source: folder of the checkpoint.
        config: of the source.
        target: folder of the shards.
        shards, scales: the files to write; of the weights, and of the scales.
        ffns: that lie in the source.
        widths: of each, afterwards.
        settings: resolved.
        dtype: that a model of the checkpoint runs in; fused weights are rounded to it, as they are in memory.
        wide: patterns of parameters that transformers keeps in float32 then.
        device: that FFNs are reduced on.
    """

    source: Path
    config: Any
    target: Path
    shards: Sequence[Shard]
    scales: Sequence[Shard]
    ffns: Sequence[DiskFFN]
    widths: Sequence[int]
    settings: FuseSettings
    dtype: torch.dtype
    device: torch.device
    wide: tuple[str, ...] = ()

    @cached_property
    def _tensors(self) -> Tensors:
        return Tensors(self.source, self.config)

    @cached_property
    def weights_out(self) -> Shards:
        """Where weights are written to."""
        return Shards(self.target, self.shards)

    @cached_property
    def scales_out(self) -> Shards:
        """Where scales are written to."""
        return Shards(self.target, self.scales)

    def on(self, device: torch.device) -> Work:
        """The same on another device; headers, and what is known of the files to write, are shared."""
        for once in ("_tensors", "weights_out", "scales_out", "_scale_names"):
            getattr(self, once)  # copied when it is known
        other = copy.copy(self)
        object.__setattr__(other, "device", device)
        return other

    def read(self, task: Task) -> list[dict[str, Tensor]]:
        """The tensors of each part; what is only copied is read when it is written.

        Raises:
            InputError: one is not finite.
        """
        return [{name: self._read(part, name) for name in part.piece.names} for part in task.parts]

    def _read(self, part: Part, name: str) -> Tensor:
        return self._tensors.read_finite(name, *part.rows(self._tensors[name].shape))

    @torch.no_grad()
    def reduce(self, task: Task, read: Sequence[Mapping[str, Tensor]]) -> Outcome:
        """Reduce the FFNs of a task, side by side."""
        if not task.parts:
            return Outcome([], [], [])
        wholes = [self._bundle(part, tensors) for part, tensors in zip(task.parts, read, strict=True)]
        bundles = [whole.select(number) for whole in wholes for number in range(whole.batch)]
        widths = [self.widths[part.ffn] for part in task.parts for _ in range(part.count)]
        size = _BATCH_BYTES if self.device.type == "cpu" else None
        found = reduce_ffns(Recipe.of(self.settings), bundles, widths, None, batch_bytes=size)
        outcome = Outcome([], [], [])
        for part in task.parts:
            own, found = found[: part.count], found[part.count :]
            originals, bundles = bundles[: part.count], bundles[part.count :]
            self.gather(outcome, part, own)
            outcome.rows.extend(
                (part.ffn, self._row(part, number, original, ffn), 0)
                for number, (original, ffn) in enumerate(zip(originals, own, strict=True))
            )
        return outcome

    def _bundle(self, part: Part, tensors: Mapping[str, Tensor]) -> NeuronBundle:
        kind = self.ffns[part.ffn].kind
        moved = {name: tensor.to(self.device, self.dtype) for name, tensor in tensors.items()}
        return bundle_of(moved, part.piece.projections, kind.name, gating=kind.gating, experts=part.count)

    def gather(self, outcome: Outcome, part: Part, found: Sequence[ReducedFFN]) -> None:
        """Add the weights and scales of a part, as a model that was fused in memory would be saved."""
        ffn = self.ffns[part.ffn]
        kind = dataclasses.replace(ffn.kind, projections=part.piece.projections)
        form = self.settings.parameterization
        kept = {
            name
            for own, there in zip(ffn.kind.projections, part.piece.projections, strict=True)
            for below, name in zip(own.tensors, there.tensors, strict=True)
            if stays_wide(f"{ffn.path}.{below}", self.wide)
        }
        forms = [one.bundle.parameterized(form) for one in found]
        if not kept:  # rounded first: half as much to lay out
            forms = [one.to(dtype=self.dtype) for one in forms]
        bundle = forms[0] if len(forms) == 1 else NeuronBundle.stack(forms)
        new = tensors_of(bundle, kind.projections, self._like(part))
        state = {n: tensor.to(torch.float32 if n in kept else self.dtype) for n, tensor in new.items()}
        if bundle.scale is not None:
            Rescaling.to_plain(kind, "", form).apply(state, bundle.scale)
            name = f"{ffn.path}.{ffn.kind.scale}"
            if name in self._scale_names:
                scale = bundle.scale if ffn.kind.experts else bundle.scale[0]
                outcome.scales.append((name, scale, part.expert if ffn.kind.experts else 0))
        for name, tensor in state.items():
            outcome.weights.append((name, tensor, self._first(part, name)))

    def _like(self, part: Part) -> dict[str, Tensor]:
        """Tensors without values, of the shapes of a part's in the source."""
        found = {}
        for name in part.piece.names:
            shape = self._tensors[name].shape
            _, count = part.rows(shape)
            found[name] = torch.empty(shape if count is None else (count, *shape[1:]), device="meta")
        return found

    @cached_property
    def _scale_names(self) -> frozenset[str]:
        return frozenset(name for shard in self.scales for name in shard.tensors)

    def _first(self, part: Part, name: str) -> int:
        """Where on the first axis of a tensor to write a part begins."""
        return part.rows(self.weights_out[name].shape)[0]

    def _row(self, part: Part, number: int, original: NeuronBundle, found: ReducedFFN) -> FFNRow:
        ffn = self.ffns[part.ffn]
        expert = part.expert + number if ffn.kind.experts else None
        site = FFNSite(ffn.index, ffn.path, nn.Module(), ffn.kind, expert)
        nothing = original.w_in.new_zeros(0, original.w_in.shape[2])
        rows = Activations(nothing, original.w_out.new_zeros(0, original.w_out.shape[2]))
        return fused_row(site, original, found, self.settings.parameterization, rows)

    def write(self, task: Task, outcome: Outcome) -> list[Path]:
        """Write what a task has come to, or what it copies.

        Returns:
            The files that were written to.
        """
        files = [self.weights_out.write(name, tensor, first) for name, tensor, first in outcome.weights]
        files += [self.scales_out.write(name, tensor, first) for name, tensor, first in outcome.scales]
        for name in task.copies:
            files.append(self._copy(name))
        return files

    def _copy(self, name: str) -> Path:
        """Write a tensor as it is; one that is quantised, as it is read."""
        plain = self._tensors[name]
        if not plain.copied:
            return self.weights_out.write(name, self._tensors.read(name))
        buffer = bytearray(min(_COPIED, plain.values.nbytes))
        for start in range(0, plain.values.nbytes, _COPIED):
            part = memoryview(buffer)[: min(_COPIED, plain.values.nbytes - start)]
            read_into(plain.values.file, plain.values.start + start, part)
            self.weights_out.put(name, part, start)
        return self.weights_out[name].file
