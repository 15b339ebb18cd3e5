"""`compress`: a checkpoint in, a fused checkpoint out."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mlp_fusion.errors import InputError, named
from mlp_fusion.families import Architecture
from mlp_fusion.measure import FFNRow, FusionReport
from mlp_fusion.measure.embeddings import compare_embeddings, embed
from mlp_fusion.measure.report import CalibrationRecord
from mlp_fusion.reducing.chosen import check_finite
from mlp_fusion.reducing.learning import SAMPLE_ROWS
from mlp_fusion.reducing.pipeline import Progress
from mlp_fusion.running.batches import Batch, token_mask
from mlp_fusion.running.drawing import text_refusal
from mlp_fusion.running.runner import ordinary, resolve_device
from mlp_fusion.running.sentences import most_positions, read_sentences
from mlp_fusion.running.synthetic import WRITTEN, synthetic_kind
from mlp_fusion.selection import Layers, Width
from mlp_fusion.settings import CompressSettings, make, takes
from mlp_fusion.store.coverage import check_written, meta_model
from mlp_fusion.store.folding import fold_state_dict
from mlp_fusion.store.naming import Place, places
from mlp_fusion.store.output import appears_when_complete, check_output, journal_of, output_path, staging_of, taken
from mlp_fusion.store.quantised import quantisation
from mlp_fusion.store.record import (
    DTYPE_KEY,
    REFERENCE_FILE,
    REPORT_FILE,
    architecture_of,
    side_path,
)
from mlp_fusion.store.reference import compute_dtype, load_checkpoint, reference_outputs
from mlp_fusion.store.scale import write_scales
from mlp_fusion.store.source import companion_files, local_folder, read_config
from mlp_fusion.store.tokenizers import tokenize
from mlp_fusion.store.weights import COMPUTING, read_tensors, safetensors_name
from mlp_fusion.store.writing import copy_companions, save_converted, write_config, write_weights
from mlp_fusion.streaming.journal import left_behind, widths_left
from mlp_fusion.streaming.run import Stream, prepare
from mlp_fusion.verbs.fuse import fuse
from mlp_fusion.verbs.plan import FusionPlan, plan


@takes(CompressSettings)
@ordinary()
def compress(
    path: str | Path,
    out: str | Path,
    width: Width | str,
    layers: Layers = None,
    method: str = CompressSettings.method,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> FusionReport:
    """Fuse a checkpoint's FFNs and write the result as a plain checkpoint.

    The output holds the same tensors as the input, narrower; the input's own config with its widths changed; the
    tokenizer and other small files; a model card; and, in the subfolder `mlp_fusion`, the scale that `restore` needs,
    the report, and the outputs that `verify` compares with. It appears under its name only when it is complete. A model
    of any size is streamed from disk to disk, see the guide to large checkpoints; there are no outputs to compare then.

    Args:
        path: a local folder or a hub name.
        out: folder to make; must not exist, or be empty, unless `force` replaces a checkpoint that stands there.
        width, layers, method: as in :func:`mlp_fusion.fuse`.
        progress: as in :func:`mlp_fusion.fuse`.
        options: the other fields of :class:`mlp_fusion.settings.CompressSettings`.

    Returns:
        The report of `fuse`, with the cosines of sentence embeddings where the model has a tokenizer.

    Raises:
        InputError: as `plan`, or the output folder is not empty or another run's, the text cannot be read, there is no
            such device, or the model cannot run or is not finite. Nothing is written; what a
            streamed run has done stays, to go on with.

    Examples:
        >>> report = mlp_fusion.compress("all-MiniLM-L6-v2", "small", width=0.25, calibration="sentences.txt")
        >>> report.parameters_after < report.parameters_before, report.embeddings.mean <= 1
        (True, True)
        >>> mlp_fusion.verify("small").passed
        True
    """
    settings = make(CompressSettings, {"width": width, "layers": layers, "method": method, **options}, "compress")
    run = _Run.checked(path, output_path(out), settings)
    out, planned, learnt = run.out, run.planned, run.learnt
    with taken(out, resume=settings.resume and run.streamed, force=settings.force):
        if not run.finished:
            check_output(out, replace=run.replace)
        if run.streamed:
            with ExitStack() as held:
                return _stream(run, held, progress)
        source = _open(run.folder, settings.dtype, run.device)
        chosen = [ffn.layer for ffn in planned.ffns if ffn.chosen]
        sites = [site for site in source.architecture.sites(source.model) if site.index in chosen]
        refusal = text_refusal(source.model, source.architecture, sites)
        if settings.synthetic and not source.head and synthetic_kind(source.model, refusal) == WRITTEN:
            raise InputError(f"{run.folder} lacks weights of the head that text is written with: pass calibration")
        # What the end needs is tried before the work.
        reference_outputs(source.model, settings.seed, head=source.head, text=refusal is None)
        batches = _tokenized(source, refusal, run.sentences, settings.text)
        learning = None if learnt is None else _tokenized(source, refusal, learnt, settings.calibration)
        originals = None if batches is None else embed(source.model, batches)
        fusing = {**vars(settings.fusing()), "layers": chosen}
        report = fuse(source.model, sample=batches, calibration=learning, progress=progress, **fusing)
        if settings.budget is not None:
            planned = plan(path, {row.layer: row.neurons_after for row in report.rows}, layers, only=settings.only)
        changes: dict[str, Any] = {}
        if batches is not None and originals is not None:
            changes["embeddings"] = compare_embeddings(embed(source.model, batches), originals)
            changes["sample"] = "the package's sentences" if settings.text is None else Path(settings.text).name
        # Of quantised weights, bytes are those of the 16 bits that they are read and written in.
        if source.widened and quantisation(source.config) is None:
            changes.update(bytes_before=planned.bytes_before, bytes_after=planned.bytes_after)
        report = dataclasses.replace(report, **changes)
        reference = reference_outputs(source.model, settings.seed, head=source.head, text=refusal is None)
        _write(out, source, chosen, planned, report, reference, replace=settings.force)
    return report


@dataclass(frozen=True)
class _Run:
    """A compression of which everything is checked that can be before the work.

    Attributes:
        folder, out, settings: from where, to where, and how.
        replace: whether what stands at `out` goes.
        finished: whether an unfinished run has done everything but its end.
        streamed, resumed: whether it goes from disk to disk, and goes on there.
        device: where it runs.
        sentences, learnt: what errors are measured on and what is calibrated on, if anything.
        planned: what becomes of the FFNs.
    """

    folder: Path
    out: Path
    settings: CompressSettings
    replace: bool
    finished: bool
    streamed: bool
    resumed: bool
    device: torch.device
    sentences: list[str]
    learnt: list[str] | None
    planned: FusionPlan

    @staticmethod
    def checked(path: str | Path, out: Path, settings: CompressSettings) -> _Run:
        """All of it.

        Raises:
            InputError: as :func:`compress`.
        """
        replace, finished = settings.force, False
        resumed = settings.resume and journal_of(out).exists()
        if resumed:
            replace, complete = left_behind(journal_of(out))
            finished = complete and not staging_of(out).exists()
        if not finished:
            check_output(out, replace=replace)
        elif not out.is_dir():
            raise InputError(f"{journal_of(out)} says that {out} was written, and it is gone: start again with --force")
        device = resolve_device(settings.device)
        sentences = read_sentences(_file(settings.text))
        settings.check()
        learnt = None
        if settings.calibration is not None:
            learnt = read_sentences(_file(settings.calibration), limit=settings.calibration_sentences)
        planned = plan(
            path, settings.width, settings.layers,
            budget=settings.budget, only=settings.only, multiple=settings.multiple,
        )  # fmt: skip
        folder = local_folder(path)
        if folder.resolve() in out.parents:
            raise InputError(f"{out} lies inside {folder}: choose a folder elsewhere")
        companion_files(folder)  # what it refuses, it refuses before the work
        # Only streamed runs have a journal.
        streamed = resumed or _is_streamed(settings, planned)
        if settings.engine != "local" and not streamed:
            raise InputError(f"engine {settings.engine} does streamed runs: pass stream (--stream)")
        unweighed = [ffn.path for ffn in planned.ffns if ffn.chosen and (ffn.routed or not ffn.loaded)]
        if streamed and settings.budget is not None and unweighed:
            raise InputError(
                f"{unweighed[0]}: width auto in a streamed run is for dense FFNs of layers that run: choose those "
                "(only, layers), or give a width"
            )
        return _Run(folder, out, settings, replace, finished, streamed, resumed, device, sentences, learnt, planned)


def rehearse(path: str | Path, out: str | Path, settings: CompressSettings) -> FusionPlan:
    """What :func:`compress` would do, after everything that it checks before the work; nothing is written.

    Raises:
        InputError: as :func:`compress`, for what is found out without the model's weights.
    """
    return _Run.checked(path, output_path(out), settings).planned


def _is_streamed(settings: CompressSettings, planned: FusionPlan) -> bool:
    """Whether a run goes from disk to disk.

    Raises:
        InputError: it has to, and was asked for something else.
    """
    if settings.stream:
        return True
    whole = any(asked is not None for asked in (settings.text, settings.budget, settings.synthetic))
    dropped = [ffn.path for ffn in planned.ffns if not ffn.loaded]
    if dropped and (whole or settings.stream is False):
        raise InputError(
            f"{dropped[0]} is of a layer that transformers does not load, and that only a streamed run can narrow: "
            "use stream, or take the layer out of the checkpoint"
        )
    if settings.stream is None and not whole:
        return bool(dropped) or planned.bytes_before > _memory() / 3
    return False


def _memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _stream(run: _Run, held: ExitStack, progress: Progress | None) -> FusionReport:
    """Compress from disk to disk; `held` is left when that is done."""
    started = time.perf_counter()
    folder, settings = run.folder, run.settings
    config = read_config(folder)
    text = None
    if run.learnt is not None:
        text = tokenize(folder, run.learnt, most_positions(config))
        if text is None:
            raise InputError(f"{folder} has no tokenizer to read {settings.calibration} with: add its files")
    stream, planned = _prepared(run, text, held, progress)
    tokens = sum(int(token_mask(batch).sum()) for batch in text or ())

    def reported(rows: list[FFNRow]) -> FusionReport:
        used = stream.work.settings
        return FusionReport(
            model_type=planned.model_type,
            settings=used,
            parameterization=used.parameterization,
            sample="nothing, as the model was not run" if text is None else "the calibration text, which was fitted to",
            sample_rows=0 if text is None else SAMPLE_ROWS,
            parameters_before=planned.parameters_before,
            parameters_after=planned.parameters_after,
            bytes_before=planned.bytes_before,
            bytes_after=sum(shard.nbytes for shard in stream.work.shards),
            seconds=time.perf_counter() - started,
            rows=rows,
            calibration=None if text is None else CalibrationRecord(tokens, None),
            streamed=True,
        )

    def finish(staging: Path, rows: list[FFNRow]) -> None:
        check_written(staging)
        copy_companions(folder, staging)
        _write_report(staging, planned, reported(rows))

    rows = stream.run(run.out, finish, engine=settings.engine, replace=run.replace, progress=progress)
    return reported(rows)


def _prepared(
    run: _Run, text: Sequence[Batch] | None, held: ExitStack, progress: Progress | None
) -> tuple[Stream, FusionPlan]:
    """A streamed run and what becomes of the FFNs, with the widths that a budget leads to."""
    settings = run.settings

    def prepared(planned: FusionPlan) -> Stream:
        widths = {ffn.layer: ffn.neurons_after for ffn in planned.ffns if ffn.loaded}
        each = [widths[number] for number in range(len(widths))]
        return prepare(run.folder, settings.fusing(), each, run.device, settings.dtype, text)

    stream, surveyed = prepared(run.planned), None
    if settings.budget is None:
        return stream, run.planned
    if run.resumed:
        widths = widths_left(journal_of(run.out))
        if widths.keys() != {ffn.layer for ffn in run.planned.ffns if ffn.chosen}:
            return stream, run.planned  # it is to go on with a run of another kind, which is refused
    else:
        try:
            surveyed = Path(held.enter_context(TemporaryDirectory()))
        except OSError as error:
            raise InputError(f"no folder for temporary files ({named(error)}): name one by TMPDIR") from error
        widths = stream.widths(surveyed, progress)
    planned = plan(run.planned.name, widths, settings.layers, only=settings.only)
    return dataclasses.replace(prepared(planned), budgeted=widths, surveyed=surveyed), planned


def _file(name: str | Path | None) -> Path | None:
    if name is not None and not isinstance(name, (str, Path)):
        raise InputError(f"a {type(name).__name__} of text: compress reads files, use fuse for batches and sentences")
    return None if name is None else Path(name).expanduser()


@dataclass(frozen=True)
class _Source:
    """A checkpoint and its model.

    Attributes:
        folder: where it lies.
        config: as it is on disk.
        architecture: its family's.
        model: loaded, on its device.
        head: whether every weight of the model is in the checkpoint.
        dtype: what the model runs in.
        widened: tensors are stored in others as well.
        placed: name of a tensor on disk -> its place in the model.
    """

    folder: Path
    config: Any
    architecture: Architecture
    model: Any
    head: bool
    dtype: torch.dtype
    widened: bool
    placed: Mapping[str, Place]


def _open(folder: Path, dtype: str | None, device: torch.device) -> _Source:
    config, tensors = read_config(folder), read_tensors(folder)
    architecture = architecture_of(config)
    placed = places(meta_model(config), tensors)
    ffns = {name for name, place in placed.items() if architecture.locate(place.parameter) is not None}
    method = quantisation(config)
    plain = {name: t for name, t in tensors.items() if method is None or (t.dtype in COMPUTING and t.dtype != "F32")}
    working = compute_dtype(ffns, plain, dtype)
    model, head = _load(folder, config, working)
    check_finite(model)
    widened = {tensor.dtype for tensor in tensors.values() if tensor.parameter} != {safetensors_name(working)}
    return _Source(folder, config, architecture, model.to(device), head, working, widened, placed)


def _tokenized(
    source: _Source, refusal: str | None, texts: list[str], file: str | Path | None
) -> list[Batch] | None:  # fmt: skip
    """Batches of the texts in `file`; None where the package's own are meant and there is a reason against text."""
    if refusal is not None:
        if file is not None:
            raise InputError(f"{source.folder}: {refusal}")
        return None
    batches = tokenize(source.folder, texts, most_positions(source.config))
    if batches is None and file is not None:
        raise InputError(f"{source.folder} has no tokenizer to read {file} with: add its files, or leave out the text")
    return batches


def _write(
    out: Path,
    source: _Source,
    chosen: list[int],
    planned: FusionPlan,
    report: FusionReport,
    reference: dict[str, Tensor],
    *,
    replace: bool,
) -> None:
    plain, scales = fold_state_dict(source.model, source.architecture, source.model.state_dict())
    fused = _fused_tensors(source, plain, chosen)
    with _reported(out), appears_when_complete(out, replace=replace) as staging:
        if any(place.converted for place in source.placed.values()):
            save_converted(source.model, plain, staging)
        else:
            write_weights(source.folder, staging, fused)
        write_config(source.folder, staging, source.model.config)
        check_written(staging)
        copy_companions(source.folder, staging)
        write_scales(staging, scales)
        metadata = {DTYPE_KEY: str(source.dtype).removeprefix("torch.")}
        save_file(reference, side_path(staging, REFERENCE_FILE), metadata=metadata)
        _write_report(staging, planned, report)


@contextmanager
def _reported(out: Path) -> Iterator[None]:
    """Raise InputError where a disk fails, a full one among others."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        cause = getattr(error, "strerror", None) or named(error)
        raise InputError(f"{out}: {cause}: once that is mended, start again") from error


def _load(folder: Path, config: Any, dtype: torch.dtype) -> tuple[Any, bool]:
    """The model in `dtype`, and whether every one of its weights is in the checkpoint."""
    model, info = load_checkpoint(folder, config, dtype)
    if info["mismatched_keys"]:
        name, stored, stated = min(info["mismatched_keys"])
        raise InputError(f"{folder}: {name} is {tuple(stored)}, but config.json makes it {tuple(stated)}")
    # Heads and poolers may be drawn anew; what runs in front of FFNs must not be.
    base = model.base_model
    prefix = "" if base is model else f"{model.base_model_prefix}."
    needed = {f"{prefix}{name}" for name, _ in base.named_parameters() if not name.startswith("pooler.")}
    lost = sorted(needed & set(info["missing_keys"]))
    if lost:
        raise InputError(f"{folder}: {lost[0]} is missing: the checkpoint is incomplete")
    return model, not info["missing_keys"]


def _fused_tensors(source: _Source, plain: Mapping[str, Tensor], chosen: list[int]) -> dict[str, Tensor]:
    """Name on disk -> the folded tensor of the model that it becomes, for the fused FFNs."""
    sites = {
        (site.path, site.kind.path, site.kind.scale): site.index for site in source.architecture.sites(source.model)
    }
    found = {}
    for name, place in source.placed.items():
        located = source.architecture.locate(place.parameter)
        if located is not None and sites[located[1], located[0].path, located[0].scale] in chosen:
            found[name] = plain[place.parameter]
    return found


def _write_report(folder: Path, planned: FusionPlan, report: FusionReport) -> None:
    described = json.dumps(report.to_dict(), indent=2, allow_nan=False)
    side_path(folder, REPORT_FILE).write_text(described + "\n", encoding="utf-8")
    _write_card(folder, planned, report)


def _write_card(folder: Path, planned: FusionPlan, report: FusionReport) -> None:
    data = ModelCardData(
        base_model=None if Path(planned.name).expanduser().is_dir() else planned.name,
        library_name="transformers",
        tags=["mlp-fusion"],
    )
    body = (
        f"# Fused {planned.model_type}\n\nFeed-forward layers shrunk by `mlp-fusion` (method `{report.method}`, seed "
        f"{report.settings.seed}). Fine-tune before use. Loads in {planned.loads_in}.\n\n```\n{report.table()}\n```\n\n"
        "To go on training with the parameterization that it was fused for: load it, then "
        "`mlp_fusion.restore(model, folder)`.\n"
    )
    (folder / "README.md").write_text(
        str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")), encoding="utf-8"
    )  # fmt: skip
