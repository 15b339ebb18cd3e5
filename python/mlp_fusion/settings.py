"""The options of every verb: one record each, whose fields carry default, bounds and help.

A record checks itself, is kept in reports, and is what the command line's options and the verbs' signatures and
docstrings are made from. An option is added by adding a field. Nothing here imports torch: mistakes are answered at
once.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import re
import textwrap
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar

from mlp_fusion.choices import (
    AUTOMATIC,
    AUTOMATIC_METHOD,
    AUTOMATIC_STEPS,
    CALIBRATION_SENTENCES,
    KEEP_WIDTH,
    METHODS,
    NEED_TEXT,
    OPTIMIZER_KERNELS,
    PLAIN_METHOD,
)
from mlp_fusion.errors import InputError
from mlp_fusion.selection import Layers, Width, is_automatic, parameterization_for

Function = TypeVar("Function", bound=Callable[..., Any])
Record = TypeVar("Record", bound="Settings")


@dataclass(frozen=True)
class Option:
    """What a field knows of its option beyond name, type and default.

    Attributes:
        help: one line or two; what the command line prints.
        least, most: bounds, both allowed.
        above, below: bounds, neither allowed.
        choices: the words that are allowed.
        flag: on the command line, where the name with dashes would not do.
        metavar: what stands for the value there.
        default_help: what the default comes to, where None stands for it.
        none: on the command line, the word for None.
        hint: what else errors say.
        recorded: it says what is done, and not how or where.
    """

    help: str
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    flag: str | None = None
    metavar: str | None = None
    default_help: str | None = None
    none: str | None = None
    hint: str = ""
    recorded: bool = True

    def wanted(self, kind: type) -> str:
        """The values that are allowed, in words."""
        if self.choices:
            words = [*self.choices, *([self.none] if self.none else [])]
            return f"use {', '.join(words[:-1])} or {words[-1]}{self.hint}"
        if kind in (bool, dict):
            return "give True or False" if kind is bool else "give a dictionary"
        noun = "an integer" if kind is int else "a number"
        if self.least is not None and self.most is not None:
            return f"give {noun} from {_shown(self.least)} to {_shown(self.most)}"
        if self.least is not None:
            return f"give {noun} from {_shown(self.least)} on"
        if self.above is not None and self.below is not None:
            return f"give {noun} strictly between {_shown(self.above)} and {_shown(self.below)}"
        return f"give {noun} above {_shown(self.above)}" if self.above is not None else f"give {noun}"

    def allows(self, value: Any) -> bool:
        """Whether a value of the right type lies within the bounds."""
        if self.choices:
            return value in self.choices
        if not isinstance(value, (int, float)):
            return True
        return (
            (isinstance(value, int) or math.isfinite(value))
            and (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )


def _shown(bound: float | None) -> str:
    for power in (32, 63):
        if bound == 2**power - 1:
            return f"2**{power} - 1"
    return f"{bound:g}" if bound is not None else ""


def option(help: str, default: Any = MISSING, **more: Any) -> Any:
    """A field of a record; `more` as in :class:`Option`."""
    return dataclasses.field(default=default, metadata={"option": Option(help, **more)})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A verb's options."""

    def check(self) -> None:
        """Raise InputError for an option of a wrong type or out of its bounds, or what another one rules out."""
        for field in fields(type(self)):
            value = getattr(self, field.name)
            if not (field.optional and value is None) and not field.allows(value):
                raise InputError(f"{field.name} {value!r}: {field.option.wanted(field.kind)}")

    def recorded(self) -> dict[str, Any]:
        """The options that say what is done, as plain JSON types."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(type(self)) if field.option.recorded}


@dataclass(frozen=True)
class Field:
    """A field of a record, as the checks and the command line see it.

    Attributes:
        name, default, option: its name, its default (`MISSING` where it must be given), and the rest.
        kind: its type; `object` for what the record checks by itself.
        optional: None is allowed.
    """

    name: str
    default: Any
    kind: type
    optional: bool
    option: Option

    def allows(self, value: Any) -> bool:
        """Whether `value` has the field's type and lies within its bounds."""
        if self.kind is object:
            return True
        if isinstance(value, bool) or self.kind is bool:
            return isinstance(value, bool) and self.kind is bool
        return isinstance(value, Real if self.kind is float else self.kind) and self.option.allows(value)


def fields(record: type[Settings]) -> Iterator[Field]:
    """The fields of a record, those of its bases first."""
    hints = typing.get_type_hints(record)
    for field in dataclasses.fields(record):
        arguments = set(typing.get_args(hints[field.name])) or {hints[field.name]}
        kinds = arguments - {type(None)}
        kind = (typing.get_origin(only := kinds.pop()) or only) if len(kinds) == 1 else object
        optional = type(None) in arguments
        yield Field(field.name, field.default, kind, optional, field.metadata["option"])


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): entry for key, entry in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value) if isinstance(value, Path) else [int(entry) for entry in value]


def make(record: type[Record], options: Mapping[str, Any], verb: str, named: Sequence[str] = ()) -> Record:
    """The record of a verb's options; `named` are the arguments that the verb has besides.

    Raises:
        TypeError: there is no such option, as for any other function.
    """
    known = [field.name for field in fields(record)]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *named], 1)
            meant = f"did you mean {near[0]!r}?" if near else f"it knows {', '.join(known)}"
            raise TypeError(f"{verb}() has no option {name!r}: {meant}")
    return record(**options)


def _described(field: Field) -> str:
    default = f" Default: {field.option.default_help}." if field.option.default_help else ""
    text = f"{field.name}: {field.option.help}{default}"
    return textwrap.fill(text, 112, initial_indent=" " * 4, subsequent_indent=" " * 8)


def takes(record: type[Settings]) -> Callable[[Function], Function]:
    """Let a function with `**options` show the fields of `record` in its signature, and in its docstring for them."""

    def show(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        named = {p.name for p in own}
        hints = typing.get_type_hints(record)
        shown = [field for field in fields(record) if field.name not in named]
        added = [
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, annotation=hints[field.name],
                default=inspect.Parameter.empty if field.default is MISSING else field.default,
            )
            for field in shown
        ]  # fmt: skip
        position = sum(p.kind is not p.KEYWORD_ONLY for p in own)
        together = [*own[:position], *added, *own[position:]]
        function.__signature__ = signature.replace(parameters=together)  # type: ignore[attr-defined]
        function.__doc__ = re.sub(
            r"^ +options: .*?(?=\n\S|\n\n)",
            "\n".join(_described(field) for field in shown).replace("\\", r"\\"),
            inspect.cleandoc(function.__doc__ or ""),
            flags=re.MULTILINE | re.DOTALL,
        )
        return function

    return show


@dataclass(frozen=True, kw_only=True)
class PlanSettings(Settings):
    """Which FFNs shrink, and to what width."""

    width: Width | str | dict[int, int] = option(
        "Neurons to keep per FFN: a count (768; a multiple of 8), a share (0.25; rounded to a multiple of 128), or "
        "auto, which spends the budget where the error falls most."
    )
    budget: float | None = option(
        "With width auto: the share of the FFNs' parameters to keep.", None, above=0.0, below=1.0
    )
    layers: Layers = option("all, 4-11, last:8, first:4, 0,2,5, or a pattern of paths such as decoder.*.", "all")
    only: str | None = option(
        "Of the layers: experts, with shared experts whose width the same config key states; or dense, all the others.",
        None, choices=("experts", "dense"), default_help="both",
    )  # fmt: skip
    multiple: int | None = option(
        "What widths are to be a multiple of: 256 for GGUF's k-quants, 128 times the ranks of tensor parallelism.",
        None, least=1, default_help="128 of shares of 1,024 neurons or more, else 8", metavar="N",
    )  # fmt: skip

    def check(self) -> None:
        """Raise InputError as :class:`Settings` does; the width is compared with each FFN's later."""
        if is_automatic(self.width, self.budget) and self.multiple is not None:
            raise InputError("width auto has multiples of its own: leave out multiple")
        super().check()


@dataclass(frozen=True, kw_only=True)
class FuseSettings(PlanSettings):
    """How FFNs are shrunk."""

    method: str = option(
        f"auto, or one of {', '.join(METHODS)}. auto: with calibration {AUTOMATIC_METHOD}, tuned, and sequential where "
        f"no FFN is an expert; without, and where experts are streamed, {PLAIN_METHOD}.",
        AUTOMATIC,
    )
    optimizer: str | None = option(
        "What the model will be trained with (adamw, sgd, ...), or none for inference: picks the parameterization that "
        "keeps its training dynamics.",
        "adamw",
        none="none",
    )
    seed: int = option("The same seed gives the same model.", 0, least=0, most=2**63 - 1)
    calibration_sentences: int = option(
        "Calibrate on the first so many sentences of a file, a list or a dataset.", CALIBRATION_SENTENCES, least=1,
        metavar="N",
    )  # fmt: skip
    synthetic: int | None = option(
        "Where there is no text, calibrate on so many tokens that need none: what the model itself writes, or, if it "
        "writes nothing, random inputs. 16384 are good.",
        None, least=1, metavar="TOKENS",
    )  # fmt: skip
    calibration_rows: int | None = option(
        "Tokens whose inputs and outputs each FFN keeps to fit and to train on: 2 d numbers each, for all FFNs at once "
        "unless sequential.",
        None, least=1, metavar="N", default_help="16384, in 256 MiB at most",
    )  # fmt: skip
    refit: bool | None = option(
        "Fit output weights and bias of each reduced FFN to the original's outputs, by ridge regression.", None,
        default_help="with calibration",
    )  # fmt: skip
    match: str | None = option(
        "Match the tangent kernel that gradient descent (gd) or Adam (sign) sees; auto: that of the optimizer. Outputs "
        "stay as they are.",
        None, choices=("gd", "sign", "auto"), none="none",
    )  # fmt: skip
    tune_steps: int | None = option(
        "Adam steps by which each FFN learns the original's outputs on the calibration text, between two refits; a few "
        "hundred for a few hundred sentences.",
        None, least=0, flag="--tune", metavar="STEPS",
        default_help=f"{AUTOMATIC_STEPS} where method auto is {AUTOMATIC_METHOD}, else 0",
    )  # fmt: skip
    sequential: bool | None = option(
        "Calibrate each FFN on what the reduced ones before it produce.", None,
        default_help=f"where method auto is {AUTOMATIC_METHOD}, without experts",
    )  # fmt: skip
    unmeasured: bool = option(
        "Do not run the model: its FFNs are not compared with what was read of them, and their errors stay unknown.",
        False,
    )

    @property
    def weighs_outputs(self) -> bool:
        """Whether errors of outputs are weighed by what they do to the model, which its gradients tell; resolved."""
        tuned = bool(self.refit) and bool(self.tune_steps)
        return tuned or METHODS[self.method].weighs_outputs or self.budget is not None

    @property
    def may_skip(self) -> bool:
        """Whether that may be left out where the model does not allow it, since nobody has asked for it; as asked."""
        return self.method == AUTOMATIC and not self.tune_steps and self.budget is None

    @property
    def parameterization(self) -> Any:
        """The parameterization that suits the optimizer.

        Raises:
            InputError: unknown optimizer.
        """
        return parameterization_for(self.optimizer)

    def check(self, *, calibrated: bool | None = None) -> None:
        """Raise InputError as :class:`Settings` does, or for what needs calibration text where there is none.

        Args:
            calibrated: whether calibration text was given; None: not known yet.
        """
        self._check_method()
        super().check()
        if self.synthetic is not None:
            if calibrated:
                raise InputError("synthetic stands in for calibration text, and there is some: leave out one of them")
            if self.calibration_sentences != CALIBRATION_SENTENCES:
                raise InputError("calibration_sentences counts sentences of text: leave it out, or synthetic")
            calibrated = True
        if self.match is not None and self.parameterization == "folded":
            raise InputError("match needs an optimizer: a model for inference has no tangent kernel to match")
        if self.tune_steps and self.refit is False:
            raise InputError("tune_steps starts from a refit: leave refit to itself")
        if self.unmeasured and calibrated:
            raise InputError("calibration runs the model: leave out unmeasured")
        if calibrated is False and (wanting := self._wants_text()) is not None:
            raise InputError(f"{wanting} needs calibration text: {self._text_remedy}")

    def resolved(
        self, layers: list[int], *, calibrated: bool, named: bool = True, whole: bool = True, dense: bool = True
    ) -> FuseSettings:
        """The same with nothing left to be decided: `layers`, the method, and what options left to it come to.

        Args:
            layers: their numbers.
            calibrated: whether there is text.
            named: whether the function of all FFNs is known.
            whole: whether the model is in memory. A streamed run trains dense FFNs alone by itself: experts may be
                thousands.
            dense: whether none of them is an expert, of which the order of calibration matters little.

        Raises:
            InputError: what was asked for has to compute FFNs whose function is not `named`.
        """
        best = self.method == AUTOMATIC and calibrated and named and (whole or dense) and self.refit is not False
        plain = PLAIN_METHOD if self.method == AUTOMATIC else self.method
        # Of one FFN alone, none before it shrinks; and where it is shared, it has no one place in the sequence.
        sequential = best and dense and len(layers) > 1 if self.sequential is None else self.sequential
        steps = (AUTOMATIC_STEPS if best else 0) if self.tune_steps is None else self.tune_steps
        match = OPTIMIZER_KERNELS[self.parameterization] if self.match == "auto" else self.match
        refit = calibrated and named if self.refit is None else self.refit
        computed = refit or match is not None or self.budget is not None or sequential or METHODS[plain].computes
        if not named and computed:
            able = ", ".join(name for name, entry in METHODS.items() if entry.narrows and not entry.computes)
            raise InputError(
                "the function of the model's FFNs is not among those of the kernels: their neurons can be merged and "
                f"chosen by {able}, without refit, match, sequential and width auto"
            )
        return dataclasses.replace(
            self, layers=layers, method=AUTOMATIC_METHOD if best else plain, refit=refit, match=match,
            sequential=sequential, tune_steps=steps,
        )  # fmt: skip

    @property
    def _text_remedy(self) -> str:
        """What gives text to an option that needs some."""
        return "pass calibration (--calibration FILE), or synthetic"

    def _check_method(self) -> None:
        if self.method not in (AUTOMATIC, *METHODS):
            known = ", ".join((AUTOMATIC, *METHODS))
            raise InputError(f"unknown method {self.method!r}: use one of {known}")
        if self.method in KEEP_WIDTH:
            narrow = ", ".join(name for name in METHODS if name not in KEEP_WIDTH)
            raise InputError(
                f"method {self.method!r} keeps the width, so that no narrower model can hold it: use one of {narrow}"
            )
        parameterization_for(self.optimizer)

    def _wants_text(self) -> str | None:
        """An option that needs calibration text."""
        asked = {
            "refit": bool(self.refit),
            "match": self.match is not None,
            "tune_steps": bool(self.tune_steps),
            "sequential": bool(self.sequential),
            "width auto": self.budget is not None,
            "calibration_rows": self.calibration_rows is not None,
            "calibration_sentences": self.calibration_sentences != CALIBRATION_SENTENCES,
            f"method {self.method}": self.method in NEED_TEXT,
        }
        return next((name for name, wanted in asked.items() if wanted), None)


@dataclass(frozen=True, kw_only=True)
class CompressSettings(FuseSettings):
    """How a checkpoint is compressed."""

    text: str | Path | None = option(
        "Sentences to measure the errors on, one a line or in a .tsv, .csv or .jsonl.", None, metavar="FILE",
        default_help="the package's own", recorded=False,
    )  # fmt: skip
    calibration: str | Path | None = option(
        "The same of sentences to learn from: better clusters and refitted outputs. A few hundred suffice; measure on "
        "others.",
        None, metavar="FILE", recorded=False,
    )  # fmt: skip
    device: str = option("auto, cpu, cuda or cuda:N.", "auto", recorded=False)
    dtype: str | None = option(
        "What the model runs in: auto (that of its tensors), or float32 or another that is wider, say where it "
        "overflows in its own. Tensors are written in the dtype of the source's in any case.",
        "auto", recorded=False,
    )  # fmt: skip
    stream: bool | None = option(
        "From disk to disk, a few FFNs in memory at a time, or with calibration a layer: any size.", None,
        default_help="for weights of more than a third of the memory", recorded=False,
    )  # fmt: skip
    engine: str = option(
        "Who does a streamed run: local (this process, on all GPUs that are alike unless device names one) or ray.",
        "local", choices=("local", "ray"), recorded=False
    )  # fmt: skip
    resume: bool = option(
        "Go on with an unfinished streamed run of OUT, if there is one.", False, recorded=False
    )  # fmt: skip
    force: bool = option(
        "Start again, and replace OUT if it is a checkpoint that mlp-fusion wrote.", False, recorded=False
    )  # fmt: skip

    def check(self, *, calibrated: bool | None = None) -> None:
        """Raise InputError as :class:`FuseSettings` does, or for what a streamed run cannot do."""
        super().check(calibrated=self.calibration is not None if calibrated is None else calibrated)
        if self.resume and self.force:
            raise InputError("resume goes on with a run and force starts it again: choose one")
        whole = {"text": self.text is not None, "synthetic": self.synthetic is not None}
        if self.stream and (given := [name for name, asked in whole.items() if asked]):
            raise InputError(f"a streamed run has no whole model: leave out {' and '.join(given)}, or stream")
        text = "calibration" if self.calibration is not None else "synthetic" if self.synthetic is not None else None
        if self.engine != "local" and text is not None:
            raise InputError(f"engine {self.engine} carries no hidden states: leave out {text}, or use local")

    @property
    def _text_remedy(self) -> str:
        return "pass calibration (--calibration FILE)" if self.stream else super()._text_remedy

    def fusing(self) -> FuseSettings:
        """What of it is the fusion's."""
        return FuseSettings(**{field.name: getattr(self, field.name) for field in fields(FuseSettings)})
