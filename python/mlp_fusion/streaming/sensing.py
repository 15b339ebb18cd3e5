"""Gradients at the outputs of FFNs of a model that is not in memory, kept on disk until the FFNs are reduced.

What they come to in a model in memory, one `(d_out, d_out)` factor per FFN, would be as large as a model. Here the
gradients themselves lie in files, and an FFN's factor is made of them when it is its turn: the same bits.
"""

from __future__ import annotations

import errno
import itertools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mlp_fusion.calibration import GradientSums, OutputSensitivity, output_gradients
from mlp_fusion.calibration.sensitivity import SENSED_TOKENS, warn_unweighed
from mlp_fusion.errors import SkippableError
from mlp_fusion.families import Architecture, FFNSite
from mlp_fusion.reducing.layers import Layer
from mlp_fusion.running.batches import Batch
from mlp_fusion.running.excerpts import excerpts
from mlp_fusion.store.shards import flush
from mlp_fusion.streaming.layerwise import LayerwiseModel


@dataclass(frozen=True)
class Gradients:
    """The gradients of a run.

    Attributes:
        files: what the files are called, but for their endings; they lie where a run that goes on finds them.
        device: that sensitivities are wanted on.
    """

    files: Path
    device: torch.device

    @property
    def _there(self) -> Path:
        """A file that is there when all others are."""
        return self.files.with_name(f"{self.files.name}.all")

    def _excerpt(self, number: int) -> Path:
        return self.files.with_name(f"{self.files.name}.{number}")

    def gather(
        self,
        model: LayerwiseModel,
        stacks: Sequence[Sequence[Layer]],
        architecture: Architecture,
        sites: Sequence[FFNSite],
        batches: Sequence[Batch],
        *,
        seed: int,
        may_skip: bool,
        progress: Callable[[float], None],
    ) -> None:
        """Take them at the outputs of `sites`, unless that has been done.

        Memory: of one layer with its activations, and the outputs of all `sites` and their gradients at 1,024
        positions. Time: for every 1,024 of the 4,096 positions the layers are read twice, and run forward twice and
        backward.

        Args:
            may_skip: where the model does not allow it, do without, with a warning.
            progress: called with the share that is done, whenever a layer has run.

        Raises:
            InputError: as :func:`mlp_fusion.calibration.output_sensitivities`.
            OSError: they cannot be written.
        """
        if self._there.exists():
            return
        held: dict[str, Tensor] = {}
        written: list[Path] = []

        def visit(number: int, gradients: Tensor) -> None:
            held[str(sites[number].index)] = gradients.cpu().contiguous()
            if number + 1 == len(sites):
                written.append(self._excerpt(len(written)))
                write_tensors(held, written[-1])
                held.clear()

        # What cannot be run layer by layer is refused before that takes its time.
        model.record(stacks, batches[:1], [])
        # Forward, and again for the backward pass, of each excerpt.
        runs = 2 * sum(map(len, stacks)) * sum(1 for _ in excerpts(model.model, batches, SENSED_TOKENS))
        ran = itertools.count(1)
        try:
            with model.whole(stacks, lambda: progress(min(1.0, next(ran) / runs))) as whole:
                output_gradients(whole, architecture, sites, batches, visit, seed=seed)
        except SkippableError as error:
            if not may_skip:
                raise
            warn_unweighed(error)
            written.clear()
        flush(written)
        self._close(len(written))

    def move(self, files: Path) -> None:
        """Call the files something else, maybe in another folder; nothing where they are not all there.

        Raises:
            OSError: they cannot be written there.
        """
        if not self._there.exists():
            return
        moved = Gradients(files, self.device)
        for number in range(self._count()):
            shutil.move(self._excerpt(number), moved._excerpt(number))
            flush([moved._excerpt(number)])
        moved._close(self._count())
        self._there.unlink()

    def _close(self, count: int) -> None:
        """Note that there are gradients of so many excerpts: in a file that gets its name when it is whole."""
        unfinished = self._there.with_name(f"{self._there.name}.new")
        unfinished.write_text(str(count), encoding="utf-8")
        flush([unfinished])
        unfinished.rename(self._there)

    def _count(self) -> int:
        """How many excerpts gradients were taken on; 0 where the model did not allow any."""
        return int(self._there.read_text(encoding="utf-8"))

    def sensitivity(self, site: FFNSite) -> OutputSensitivity | None:
        """What they come to at the outputs of an FFN; None where the model did not allow any."""
        sums, count = GradientSums(), self._count()
        for number in range(count):
            with safe_open(self._excerpt(number), framework="pt") as file:
                sums.add(file.get_tensor(str(site.index)).to(self.device))
        return sums.finish() if count else None


def write_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a file of safetensors.

    Raises:
        OSError: it cannot be written, a full disk among other things.
    """
    try:
        save_file(dict(tensors), file, metadata=metadata)
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(file)) from error
