"""A streamed run: prepared from headers alone, done task by task, resumable, and finished under its own name."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

import mlp_fusion
from mlp_fusion.choices import METHODS
from mlp_fusion.errors import InputError, named
from mlp_fusion.families import Architecture
from mlp_fusion.families.exchange import check_form
from mlp_fusion.measure import FFNRow
from mlp_fusion.neurons import UNNAMED
from mlp_fusion.reducing.pipeline import Progress
from mlp_fusion.reducing.rows import together
from mlp_fusion.running.batches import Batch
from mlp_fusion.settings import FuseSettings
from mlp_fusion.store.coverage import dropped_layers, gap, meta_model
from mlp_fusion.store.disk import DiskFFN, disk_ffns
from mlp_fusion.store.naming import Conversion
from mlp_fusion.store.output import appears_when_complete, journal_of, staging_of
from mlp_fusion.store.record import check_config, fused_config
from mlp_fusion.store.reference import compute_dtype, wide_patterns
from mlp_fusion.store.scale import SCALE_FILE
from mlp_fusion.store.shards import Shard
from mlp_fusion.store.source import read_headers
from mlp_fusion.store.tensors import Tensors
from mlp_fusion.store.weights import TensorInfo, find_weights
from mlp_fusion.store.writing import write_config, write_index
from mlp_fusion.streaming.calibrated import Calibrated
from mlp_fusion.streaming.engines import ENGINES
from mlp_fusion.streaming.journal import Journal, files_as_they_are, fingerprint
from mlp_fusion.streaming.sensing import Gradients
from mlp_fusion.streaming.surveying import Survey
from mlp_fusion.streaming.tasks import Task, shards_of, tasks_of
from mlp_fusion.streaming.work import Member, Work

#: In the folder that is written, while it is: the hidden states that the next layer gets.
_STATES = ".states"


@dataclass(frozen=True)
class Stream:
    """A run, prepared.

    Attributes:
        work: what is to be done, by anyone.
        tasks: all of them.
        changed: the config of what is written.
        architecture: of the model.
        text: what it is calibrated on, or None.
        may_skip: as of :class:`Calibrated`.
        budgeted: what the chosen FFNs were given of a budget, by their numbers; a run that goes on keeps it.
        surveyed: a folder with the gradients of a survey, which are taken from there.
    """

    work: Work
    tasks: list[Task]
    changed: Any
    architecture: Architecture
    text: Sequence[Batch] | None = None
    may_skip: bool = False
    budgeted: Mapping[int, int] = field(default_factory=dict)
    surveyed: Path | None = None

    def widths(self, folder: Path, progress: Progress | None = None) -> dict[int, int]:
        """What each FFN gets of the budget, by their numbers.

        Args:
            folder: for the gradients, see `surveyed`.
            progress: called with what is done, of twice the FFNs.

        Raises:
            InputError: as :meth:`Survey.widths`, or a disk fails.
        """
        settings = self.work.settings
        assert self.text is not None
        assert settings.budget is not None
        survey = Survey(self.work, self.architecture, self.text, _gradients_in(folder))
        total = 2 * len(settings.layers)  # type: ignore[arg-type]

        def done(share: float) -> None:
            if progress is not None:
                progress(int(share * total), total)

        try:
            return survey.widths(settings.budget, done)
        except OSError as error:
            place, cause = error.filename or folder, error.strerror or named(error)
            remedy = "once that is mended, start again (gradients go where TMPDIR says)"
            raise InputError(f"{place}: {cause}: {remedy}") from error

    def run(
        self,
        out: Path,
        finish: Callable[[Path, list[FFNRow]], None],
        *,
        engine: str,
        replace: bool,
        progress: Progress | None = None,
    ) -> list[FFNRow]:
        """Do what is left to do, and give the result its name.

        To be called with `out` taken.

        Args:
            out: folder to make.
            finish: called with the folder that becomes it, and the report's rows, when all weights are written.
            engine: one of :data:`mlp_fusion.streaming.engines.ENGINES`.
            replace: a checkpoint that was fused by this program may stand there.
            progress: called with FFNs and experts done, of all; those at whose outputs gradients are taken count twice.

        Raises:
            InputError: the unfinished run was another one, a tensor cannot be used, or a disk fails. What is done
                stays.
        """
        journal = Journal(journal_of(out), self._fingerprints(), replace=replace, widths=self.budgeted)
        try:
            return self._written(journal, out, finish, engine=engine, replace=replace, progress=progress)
        except OSError as error:
            place, cause = error.filename or out.parent, error.strerror or named(error)
            remedy = "--resume goes on" if journal.file.exists() else "start again"
            raise InputError(f"{place}: {cause}: once that is mended, {remedy}") from error

    def _written(
        self,
        journal: Journal,
        out: Path,
        finish: Callable[[Path, list[FFNRow]], None],
        *,
        engine: str,
        replace: bool,
        progress: Progress | None,
    ) -> list[FFNRow]:
        """As :meth:`run`; OSError where a disk fails."""
        if journal.file.exists():
            journal.resume()
        if journal.complete and not staging_of(out).exists():
            # Only the journal was left to be cleared away.
            journal.file.unlink()
            return self._rows(journal)
        with appears_when_complete(out, keep=True, replace=replace) as staging:
            work = dataclasses.replace(self.work, target=staging)
            if not journal.complete:
                self._make_files(work, journal)
                try:
                    self._do(work, journal, engine, progress)
                except InputError:
                    if not journal.done:
                        journal.file.unlink()  # nothing to go on with
                    raise
                rows = self._rows(journal)
                write_index(work.source, staging, work.weights_out)
                write_config(work.source, staging, self.changed)
                finish(staging, rows)
                journal.close()
        journal.file.unlink(missing_ok=True)
        return self._rows(journal)

    def _make_files(self, work: Work, journal: Journal) -> None:
        """Make the files to write, or see that they are there."""
        if journal.file.exists():
            work.weights_out.check()
            work.scales_out.check()
            return
        work.weights_out.create()
        work.scales_out.create()
        journal.begin()

    def _do(self, work: Work, journal: Journal, engine: str, progress: Progress | None) -> None:
        total, sensed = sum(part.count for task in self.tasks for part in task.parts), 0

        def finished(task: str, rows: list[Member]) -> None:
            journal.add(task, rows)
            if progress is not None:
                progress(sensed + sum(map(len, journal.done.values())), total)

        def sensing(share: float) -> None:
            if progress is not None:
                progress(int(share * sensed), total)

        if self.text is not None:
            states = work.target / _STATES
            gradients = _gradients_in(work.target)
            if self.surveyed is not None:
                Gradients(_gradients_in(self.surveyed), work.device).move(gradients)
            sequential = bool(work.settings.sequential)
            run = Calibrated(work, self.architecture, self.text, sequential, states, gradients, self.may_skip)
            chosen = set(work.settings.layers or ())  # type: ignore[arg-type]
            sensed = len(run.sensed)
            total += sensed + sum(max(f.kind.experts, 1) for f in work.ffns if f.loaded and f.index in chosen)
            run.run(set(journal.done), finished, sensing)
            for left_over in work.target.glob(f"{_STATES}*"):
                left_over.unlink()
        left = [task for task in self.tasks if task.name not in journal.done]
        ENGINES[engine](work, left, lambda task, rows: finished(task.name, rows))

    def _rows(self, journal: Journal) -> list[FFNRow]:
        """The report's rows: the experts of a stack in one."""
        found = [pair for rows_of in journal.done.values() for pair in rows_of]
        rows = []
        for number, members in itertools.groupby(sorted(found, key=lambda pair: pair[0]), key=lambda pair: pair[0]):
            several = list(members)
            each, seen = [row for _, row, _ in several], [count for _, _, count in several]
            ffn = self.work.ffns[number]
            rows.append(together(each, seen) if ffn.kind.experts else each[0])
        return rows

    def _fingerprints(self) -> dict[str, str]:
        work = self.work
        on_a_gpu = work.device.type == "cuda"
        files = [*find_weights(work.source).files, work.source / "config.json"]
        return {
            "source": fingerprint({"files": files_as_they_are(files)}),
            "recipe": fingerprint(
                {
                    "settings": vars(work.settings),
                    "widths": list(work.widths),
                    "dtype": str(work.dtype),
                    "device": torch.cuda.get_device_name(work.device) if on_a_gpu else work.device.type,
                }
            ),
            "text": fingerprint({"text": [batch["input_ids"].tolist() for batch in self.text or ()]}),
            "version": fingerprint(
                {
                    "versions": [mlp_fusion.__version__, torch.__version__, transformers.__version__],
                    "tasks": [task.name for task in self.tasks],
                }
            ),
        }


def _gradients_in(folder: Path) -> Path:
    """What files of gradients are called in a folder."""
    return folder / f"{_STATES}.gradients"


def prepare(
    folder: Path,
    settings: FuseSettings,
    widths: Sequence[int],
    device: torch.device,
    dtype: str | None,
    text: Sequence[Batch] | None = None,
) -> Stream:
    """Find out from headers what is to be done.

    Args:
        folder: the checkpoint.
        settings: as asked for.
        widths: of all FFNs of the model, by their numbers.
        device: that FFNs are reduced on.
        dtype: that weights are rounded to, as for :func:`mlp_fusion.store.reference.compute_dtype`.
        text: to learn from; the model is run on it, layer by layer.

    Raises:
        InputError: the checkpoint cannot be streamed.
    """
    headers = read_headers(folder)
    architecture = check_config(headers.config, stored=True)
    model = meta_model(headers.config)
    sites = architecture.sites(model)
    tensors = Tensors(folder, headers.config)
    ffns = disk_ffns(model, architecture, sites, tensors.shapes)
    lost = gap(model, Conversion(model).made(tensors.shapes))
    if lost is not None:
        raise InputError(f"{folder}: {lost} is missing: the checkpoint is incomplete")
    ffns += dropped_layers(headers, model, architecture, sites)
    chosen = sorted(site.index for site in sites if widths[site.index] < site.kind.width)
    named = all(sites[index].kind.name != UNNAMED for index in chosen)
    may_skip = settings.may_skip
    settings = dataclasses.replace(settings, unmeasured=text is None)
    dense = not any(sites[index].is_routed for index in chosen)
    settings = settings.resolved(chosen, calibrated=text is not None, named=named, whole=False, dense=dense)
    scales = METHODS[settings.method].scales
    for index in chosen if scales else ():
        check_form(sites[index], settings.parameterization)
    form = settings.parameterization if scales else "folded"
    changed = fused_config(model, architecture, sites, widths, method=settings.method, parameterization=form)
    each = [widths[ffn.index] for ffn in ffns]
    stored = {name: TensorInfo(p.shape, p.values.dtype) for name, p in tensors.items() if p.copied}
    names = {name for ffn in ffns for name in ffn.names}
    working = compute_dtype(names, stored, dtype)
    work = Work(
        source=folder,
        config=headers.config,
        target=folder,
        shards=shards_of(tensors, ffns, each),
        scales=_scales(ffns, each) if form != "folded" else [],
        ffns=ffns,
        widths=each,
        settings=settings,
        dtype=working,
        device=device,
        wide=wide_patterns(model, working),
    )
    learning = () if text is None else {number for number, ffn in enumerate(ffns) if ffn.loaded}
    return Stream(work, tasks_of(tensors, ffns, each, learning), changed, architecture, text, may_skip)


def _scales(ffns: Sequence[DiskFFN], widths: Sequence[int]) -> list[Shard]:
    """The side file of the scales of FFNs that transformers loads."""
    found = {
        f"{ffn.path}.{ffn.kind.scale}": (torch.float32, (ffn.kind.experts, width) if ffn.kind.experts else (width,))
        for ffn, width in zip(ffns, widths, strict=True)
        if ffn.loaded and width < ffn.kind.width
    }
    return [Shard(SCALE_FILE, found, {"format": "pt"})] if found else []
