"""The command line: `mlp-fusion plan | compress | verify | finetune | squeeze | distill | report | families | ...`.

Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted. Errors are one line on standard error; with `--json`,
standard output holds one JSON object and nothing else.

Torch, transformers and all that stands on them are imported by the commands that need them, after their options have
been read: help and mistakes in the options are answered at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

import mlp_fusion
from mlp_fusion.bars import progress_bar, step_bar
from mlp_fusion.deferred import when_imported
from mlp_fusion.distilling import DistillSettings
from mlp_fusion.errors import InputError
from mlp_fusion.settings import (
    CompressSettings,
    Field,
    PlanSettings,
    Record,
    Settings,
    fields,
)
from mlp_fusion.squeezing import SqueezeSettings
from mlp_fusion.tuning import FinetuneSettings

Command = Callable[..., Any]
#: Signals on which a command cleans up and ends.
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_model = click.argument("model")
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")


class _InterruptedRunError(Exception):
    """A run was interrupted and can be resumed; the message says how."""


class _Width(click.ParamType):
    """A count, a share, or `auto`."""

    name = "width"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return parse_width(value) if isinstance(value, str) else value


def _options(record: type[Settings]) -> Callable[[Command], Command]:
    """One option of the command line for every field of `record`, in their order."""

    def add(command: Command) -> Command:
        for field in reversed([*fields(record)]):
            command = _option(field)(command)
        return command

    return add


def _option(field: Field) -> Callable[[Command], Command]:
    known, missing = field.option, field.default is dataclasses.MISSING
    name = known.flag or f"--{field.name.replace('_', '-')}"
    help_text = f"{known.help}  [default: {known.default_help}]" if known.default_help else known.help
    more: dict[str, Any] = {"help": help_text, "required": missing, "metavar": known.metavar}
    if field.kind is bool and not field.optional and not field.default:
        return click.option(name, field.name, is_flag=True, help=help_text)
    if field.kind is bool:
        name = f"{name}/--no-{name[2:]}"
    elif known.choices:
        more["type"] = click.Choice([*([known.none] if known.none else []), *known.choices])
    elif field.kind is dict:
        more |= {"type": str, "multiple": True}
    elif field.name == "width":
        more["type"] = _Width()
    else:
        more["type"] = field.kind if field.kind in (int, float) else str
    if not missing:
        more["default"] = known.none if field.default is None else field.default
        more["show_default"] = more["default"] is not None
    return click.option(name, field.name, **more)


def _named(option: str, words: Sequence[str]) -> dict[str, str] | None:
    """Values by name, of words `name=value`; None where there are none.

    Raises:
        InputError: a word is none.
    """
    for word in words:
        if not all(word.partition("=")):
            raise InputError(f"{option} {word!r}: give name=value")
    return {name.replace("-", "_"): value for name, _, value in (word.partition("=") for word in words)} or None


def _read(record: type[Record], values: dict[str, Any]) -> Record:
    """The record of what was typed.

    Raises:
        InputError: as its `check`.
    """
    said = {field.name: values[field.name] for field in fields(record)}
    said |= {field.name: _named(field.name, said[field.name]) for field in fields(record) if field.kind is dict}
    words = {field.name: field.option.none for field in fields(record)}
    settings = record(**{name: None if value == words[name] is not None else value for name, value in said.items()})
    settings.check()
    return settings


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(mlp_fusion.__version__)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Shrink the feed-forward layers (FFNs) of a Transformer in one shot.

    MODEL is a local checkpoint folder, or a name on the Hugging Face hub.
    """
    # `main` reads --debug itself: it also meets errors raised before a command starts.


@cli.command()
@_model
@_options(PlanSettings)
@_json
def plan(model: str, as_json: bool, **options: Any) -> None:
    """Say what compressing MODEL would do, from its config and tensor headers alone."""
    settings = _read(PlanSettings, options)
    _emit(mlp_fusion.plan(model, **vars(settings)), as_json)


@cli.command()
@_model
@click.argument("out", type=click.Path(path_type=Path))
@_options(CompressSettings)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Check everything that can be, say what would be done, as plan does, and write nothing.",
)
@_json
def compress(model: str, out: Path, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Fuse the FFNs of MODEL and write a plain checkpoint to OUT, which must not exist or be empty."""
    settings = _read(CompressSettings, options)
    if dry_run:
        from mlp_fusion.verbs.compress import rehearse

        _emit(rehearse(model, out, settings), as_json)
        return
    with progress_bar() as bar:
        task = bar.add_task("fusing", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        try:
            report = mlp_fusion.compress(model, out, **vars(settings), progress=show)
        except KeyboardInterrupt as interrupted:
            if _can_go_on(out):
                message = "interrupted; the same command with --resume (in place of --force) goes on"
                raise _InterruptedRunError(message) from interrupted
            raise
    _emit(report, as_json)
    if not as_json:
        click.echo(f"written: {out}")


def _can_go_on(out: Path) -> bool:
    """Whether an interrupted run has left what it can go on with."""
    from mlp_fusion.store.output import journal_of, output_path

    return journal_of(output_path(out)).exists()


@cli.command()
@click.argument("out")
@click.option("--against", metavar="MODEL", help="The source: compare its tensors, too.")
@_json
def verify(out: str, against: str | None, as_json: bool) -> None:
    """Reload what compress wrote to OUT and compare it with what was in memory when it was written.

    What was streamed from disk to disk is compared with its config and, with --against, with its source; nobody has its
    outputs, and whether fused weights are the right ones is not seen.
    """
    result = mlp_fusion.verify(out, against)
    _emit(result, as_json)
    if not result.passed:
        raise SystemExit(1)


@cli.command()
@_model
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--train",
    required=True,
    type=click.Path(path_type=Path),
    help=".tsv, .csv or .jsonl with a label column (or text<TAB>label a line); for lm also plain text.",
)
@click.option("--eval", "evaluation", type=click.Path(path_type=Path), help="The same, to measure on after each epoch.")
@click.option("--text-column", "columns", multiple=True, help="Name of the text's column; twice for pairs of texts.")
@click.option("--original", help="The unfused model: fit the fused layers to its hidden states first.")
@click.option("--teacher", help="A model trained on the task: learn from its logits as well.")
@_options(FinetuneSettings)
@_json
def finetune(
    model: str,
    out: Path,
    train: Path,
    evaluation: Path | None,
    columns: tuple[str, ...],
    original: str | None,
    teacher: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Train MODEL, fused or not, on a task and write the result to OUT."""
    settings = _read(FinetuneSettings, options)
    _train(
        out,
        as_json,
        lambda show: mlp_fusion.finetune(
            model, out, train, evaluation, columns=columns or None, original=original, teacher=teacher, progress=show,
            **vars(settings),
        ),
    )  # fmt: skip


def _train(out: Path, as_json: bool, run: Callable[[Any], Any]) -> None:
    """Run a training that torchrun may have started several times, and say what came of it."""
    # The first of several processes speaks for all.
    silent = int(os.environ.get("RANK", "0")) > 0
    with step_bar(silent=silent) as show:
        try:
            report = run(show)
        except KeyboardInterrupt as error:
            from mlp_fusion.finetuning.session import is_unfinished

            if is_unfinished(out):
                message = f"interrupted; --resume goes on from the last checkpoint in {out}"
                raise _InterruptedRunError(message) from error
            raise
    _part()
    if silent:
        return
    _emit(report, as_json)
    if not as_json:
        click.echo(f"written: {out}")


@cli.command()
@click.argument("teacher")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--text",
    required=True,
    type=click.Path(path_type=Path),
    help="Text to learn on: plain, or .tsv, .csv or .jsonl with a column of texts.",
)
@click.option("--eval", "evaluation", type=click.Path(path_type=Path), help="The same, to measure on after each epoch.")
@click.option("--text-column", "columns", multiple=True, help="Name of the text's column.")
@_options(DistillSettings)
@_json
def distill(
    teacher: str,
    out: Path,
    text: Path,
    evaluation: Path | None,
    columns: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Distil TEACHER, an encoder, into a MiniALBERT with one shared layer, and write it to OUT."""
    settings = _read(DistillSettings, options)
    _train(
        out,
        as_json,
        lambda show: mlp_fusion.distill(
            teacher, out, text, evaluation, columns=columns or None, progress=show, **vars(settings)
        ),
    )


@cli.command()
@_model
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--train", required=True, type=click.Path(path_type=Path), help="As finetune takes it.")
@click.option(
    "--eval", "evaluation", required=True, type=click.Path(path_type=Path), help="The same, to measure every round on."
)
@click.option("--text-column", "columns", multiple=True, help="Name of the text's column; twice for pairs of texts.")
@_options(SqueezeSettings)
@_json
def squeeze(
    model: str, out: Path, train: Path, evaluation: Path, columns: tuple[str, ...], as_json: bool, **options: Any
) -> None:
    """Cut the bonds of MODEL's matrices as chains of tensors round by round, tuning in between, and write to OUT."""
    settings = _read(SqueezeSettings, options)
    with step_bar() as show:
        try:
            report = mlp_fusion.squeeze(
                model, out, train, evaluation, columns=columns or None, progress=show, **vars(settings)
            )
        except KeyboardInterrupt as error:
            if out.exists():
                raise _InterruptedRunError(f"interrupted; --resume goes on with the rounds in {out}") from error
            raise
    _emit(report, as_json)
    if not as_json:
        click.echo(f"written: {out}")


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="The page to write.  [default: FOLDER/report.html]")
@click.option("--title", help="Title of the page.")
@_json
def report(folder: Path, out: Path | None, title: str | None, as_json: bool) -> None:
    """Write a page, and its numbers as JSON beside it, about the results in FOLDER.

    FOLDER holds fused checkpoints, fine-tuning runs, students and squeezed models, up to two levels down, or is one.
    """
    from mlp_fusion.verbs.report import write_report

    _emit(write_report(folder, out, title=title), as_json)


@cli.command()
@click.argument("name", required=False)
@_json
def families(name: str | None, as_json: bool) -> None:
    """Say which FFNs are found in NAME, how they were proved, and what is refused and why.

    NAME is a folder, a model type such as bert, whose default config is used, or a name on the Hugging Face hub. No
    weight is read. Without NAME, the model types are listed.
    """
    from mlp_fusion.verbs.families import find_ffns, list_model_types

    _emit(list_model_types() if name is None else find_ffns(name), as_json)


@cli.group()
def gpu() -> None:
    """Check and measure the kernels on this machine's GPUs, or forget what was found out."""


@gpu.command()
@_json
def check(as_json: bool) -> None:
    """Run the proofs of all kernels on every GPU again, and keep the verdicts."""
    from mlp_fusion.verbs.gpu import check_kernels

    found = check_kernels()
    _emit(found, as_json)
    if not found.passed:
        raise SystemExit(1)


@gpu.command()
@click.option("--tokens", type=int, required=True, help="Rows of the FFN's input.")
@click.option("--inputs", type=int, required=True, help="Columns of the FFN's input, and of its output.")
@click.option("--neurons", type=int, required=True, help="Width of the hidden layer.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16"]), default="bfloat16", show_default=True)
@click.option("--activation", default="gelu", show_default=True, help="As in fused_mlp.")
@click.option("--gated", is_flag=True, help="With a gate projection.")
@click.option("--experts", type=int, help="So many FFNs side by side, as in a Mixture-of-Experts layer.")
@click.option("--top-k", type=int, default=1, show_default=True, help="Experts that each token goes to.")
@click.option("--forward", is_flag=True, help="The forward alone, as without gradients.")
@_json
def tune(dtype: str, activation: str, forward: bool, as_json: bool, **shape: Any) -> None:
    """Measure which backend of small FFNs, or of experts, is fastest for a shape on every GPU, and keep the answer."""
    from mlp_fusion.verbs.gpu import TunedShape, tune_block

    _emit(tune_block(TunedShape(**shape), dtype=dtype, activation=activation, trained=not forward), as_json)


@gpu.command()
@_json
def forget(as_json: bool) -> None:
    """Remove all verdicts and measurements of GPUs."""
    from mlp_fusion.verbs.gpu import forget_all

    _emit(forget_all(), as_json)


@cli.command()
@_json
def env(as_json: bool) -> None:
    """Versions, devices, and which backend each operator uses here and why."""
    from mlp_fusion.verbs.env import environment, lines

    report = environment()
    if as_json:
        click.echo(json.dumps(report, allow_nan=False))
        return
    click.echo("\n".join(lines(report)))


def parse_width(text: str) -> int | float | str:
    """`"768"` is a count, `"0.25"` a share, `"auto"` itself.

    Raises:
        InputError: neither.
    """
    if text == "auto":
        return text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise InputError(f"--width {text!r}: give a count such as 768 or a share such as 0.25, or auto")


@functools.cache
def _hush() -> None:
    """Silence other people's progress bars and advice: they would drown the one table that was asked for."""

    def hush(logging_of_transformers: Any) -> None:
        logging_of_transformers.disable_progress_bar()
        logging_of_transformers.set_verbosity_error()

    when_imported(lambda name: name == "transformers.utils.logging", hush)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def _emit(result: Any, as_json: bool) -> None:
    click.echo(json.dumps(result.to_dict(), allow_nan=False) if as_json else result.table())


def _part() -> None:
    """End the group of processes, if there is one, before any of them ends: the peer of one that is gone may abort."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def main() -> None:
    """Run the command line; the entry point of `mlp-fusion`."""
    _hush()
    warnings.showwarning = _warn
    # A job that is ended by its scheduler, or whose terminal is closed, cleans up like one that is interrupted by hand.
    for number in _ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _interrupt)
    try:
        cli(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(error.exit_code)
    except click.ClickException as error:
        _fail(f"{' '.join(error.format_message().split())} (--help lists the options)", error.exit_code)
    except _InterruptedRunError as error:
        _fail(str(error), 130)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted; nothing was written", 130)
    except Exception as error:  # noqa: BLE001  (reported below, and with its traceback when asked for)
        # Whatever went wrong, the reader gets one line; the traceback is one option away.
        if "--debug" in sys.argv[1:]:
            traceback.print_exc()
        message = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, InputError):
            _fail(message, 2)
        _fail(f"{type(error).__name__}: {message} (--debug shows where)", 1)


def _interrupt(_number: int, _frame: Any) -> NoReturn:
    # They often come in twos, and the second must not interrupt the cleaning up. (Of one that is on its way already,
    # Python would print an error if it were to be ignored.)
    for number in _ENDING:
        signal.signal(number, lambda *_: None)
    raise KeyboardInterrupt


def _warn(message: Warning | str, *_place: Any, **_more: Any) -> None:
    """One line, as of an error: where in the program a warning comes from is of no use to its reader."""
    with contextlib.suppress(OSError):  # nobody reads it: no reason to end
        click.echo(f"mlp-fusion: warning: {' '.join(str(message).split())}", err=True)


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"mlp-fusion: {message}", err=True)
    sys.exit(code)
