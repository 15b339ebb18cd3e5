"""`FusionReport`: what was fused and what it cost, for people (`table`) and for programs (`to_dict`)."""

from __future__ import annotations

import dataclasses
import io
import math
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from mlp_fusion.choices import OPTIMIZER_KERNELS
from mlp_fusion.settings import FuseSettings

#: Kernel -> whose steps see it, as columns have it.
_COLUMNS = {"gd": "SGD", "sign": "Adam"}
#: Of the report as JSON.
FORMAT_VERSION = 2


@dataclass(frozen=True)
class FFNRow:
    """One fused FFN.

    Attributes:
        layer: layer index.
        path: the layer's path in the model.
        neurons_before, neurons_after: widths.
        output_error: relative Frobenius error of the FFN's outputs.
        ntk_error: kernel (`gd`, `sign`) -> part (`total`, `w_in`, `b_in`, `w_out`) -> relative Frobenius error.
        largest_cluster, singletons, empty_clusters: how the neurons were grouped; None for methods without clusters.
        status: `ok`, or what went less than well (`max_iter`; `few_distinct`, fewer different neurons than clusters).
        seconds: wall-clock time of the method; FFNs worked on side by side share theirs equally.
        correction_seconds: of refit, local tuning and kernel matching; FFNs tuned side by side share that equally.
        ridge: regularisation that the refit chose on held-out calibration rows; None without a refit.
        held_out_error: relative error of the outputs on those rows, of the fit to the others.
        largest_scale: largest entry of the scale, which matching may have changed; None where there is no scale.
        cluster_sizes: pairs of a cluster size and the number of clusters of that size, by rising size; None for methods
            without clusters, and in reports of earlier versions.
        ntk_spectrum: kernel -> `before`, `after` -> leading eigenvalues, see `FFNErrors.spectrum`; None in reports of
            earlier versions.
        by_weights: numbers of experts that too few tokens of the calibration text have reached to learn from; None
            where there was no text, of dense FFNs, and in reports of earlier versions.
        trained: whether it was trained locally, which takes two tokens for each input; None where that was not asked
            for, and in reports of earlier versions.
        clustered_by: the backend that k-means ran on; None for methods without clusters, and in reports of earlier
            versions.

    Examples:
        >>> from transformers import AutoModel
        >>> report = mlp_fusion.fuse(AutoModel.from_pretrained("all-MiniLM-L6-v2"), width=0.25)
        >>> row = report.rows[0]
        >>> row.path, row.neurons_after / row.neurons_before, row.output_error > 0
        ('encoder.layer.0', 0.25, True)
    """

    layer: int
    path: str
    neurons_before: int
    neurons_after: int
    output_error: float
    ntk_error: dict[str, dict[str, float]]
    largest_cluster: int | None
    singletons: int | None
    empty_clusters: int | None
    status: str
    seconds: float
    correction_seconds: float = 0.0
    ridge: float | None = None
    held_out_error: float | None = None
    largest_scale: float | None = None
    cluster_sizes: list[list[int]] | None = None
    ntk_spectrum: dict[str, dict[str, list[float]]] | None = None
    by_weights: list[int] | None = None
    trained: bool | None = None
    clustered_by: str | None = None


@dataclass(frozen=True)
class EmbeddingSimilarity:
    """Cosine of mean-pooled last hidden states, compressed model to original, over `sentences` (parts of) texts."""

    mean: float
    minimum: float
    sentences: int


@dataclass(frozen=True)
class CalibrationRecord:
    """What a fusion learnt from.

    Attributes:
        tokens: token positions of the calibration text.
        seconds: of the runs that gathered the statistics and, for tuning, the sensitivities; None where statistics were
            gathered layer by layer.
        synthetic: what stood in for text, in words; None where there was text.
    """

    tokens: int
    seconds: float | None
    synthetic: str | None = None


@dataclass(frozen=True)
class FusionReport:
    """The outcome of :func:`mlp_fusion.fuse`.

    Attributes:
        model_type: the architecture's name.
        settings: how it was done, with nothing left to be decided (`layers` are the ones that were chosen).
        parameterization: the form that the fused FFNs have.
        sample: what the errors were measured on, in words.
        sample_rows: token positions the errors were measured on.
        parameters_before, parameters_after: of the whole model.
        bytes_before, bytes_after: of its parameters in their dtypes.
        seconds: wall-clock time of the whole call.
        rows: one per fused FFN.
        embeddings: set by `compress` when it had sentences to compare.
        calibration: None without calibration text.
        streamed: whether the model was never in memory as a whole.

    Examples:
        >>> from transformers import AutoModel
        >>> report = mlp_fusion.fuse(AutoModel.from_pretrained("all-MiniLM-L6-v2"), width=0.25)
        >>> report.method, report.parameterization
        ('fusion', 'scaled')
        >>> mlp_fusion.FusionReport.from_dict(report.to_dict()) == report
        True
    """

    model_type: str
    settings: FuseSettings
    parameterization: str
    sample: str
    sample_rows: int
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    seconds: float
    rows: list[FFNRow] = field(default_factory=list)
    embeddings: EmbeddingSimilarity | None = None
    calibration: CalibrationRecord | None = None
    streamed: bool = False
    format: int = FORMAT_VERSION

    @property
    def method(self) -> str:
        """Name of the compression method."""
        return self.settings.method

    @property
    def optimizer(self) -> str | None:
        """What the model was fused for; None for inference."""
        return self.settings.optimizer

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, null for numbers that are not finite; the inverse of :meth:`from_dict`."""
        parts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        parts["settings"] = self.settings.recorded()
        parts["rows"] = [dataclasses.asdict(row) for row in self.rows]
        for name in ("embeddings", "calibration"):
            parts[name] = None if parts[name] is None else dataclasses.asdict(parts[name])
        result: dict[str, Any] = finite(parts)
        return result

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> FusionReport:
        """Rebuild a report that `to_dict` made."""
        rows = []
        for row in data["rows"]:
            errors = {kernel: _measured(parts, *parts) for kernel, parts in row["ntk_error"].items()}
            rows.append(FFNRow(**{**_measured(row, "output_error"), "ntk_error": errors}))
        known = data["embeddings"]
        embeddings = None if known is None else EmbeddingSimilarity(**_measured(known, "mean", "minimum"))
        known = data["calibration"]
        calibration = None if known is None else CalibrationRecord(**known)
        settings = FuseSettings(**data["settings"])
        parts = {"settings": settings, "rows": rows, "embeddings": embeddings, "calibration": calibration}
        return cls(**{**data, **parts})

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """The report as text: a row per FFN, and the totals under it."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("FFN")
        kernels = (f"NTK error\n{_COLUMNS[kernel]}" for kernel in ("gd", "sign"))
        for title in ("neurons", "output\nerror", *kernels, "largest\ncluster"):
            table.add_column(title, justify="right")
        for title in ("singletons", "seconds"):
            table.add_column(title, justify="right")
        for row in self.rows:
            table.add_row(
                row.path,
                f"{row.neurons_before} → {row.neurons_after}",
                _number(row.output_error, ".3f"),
                _number(row.ntk_error["gd"]["total"], ".3g"),
                _number(row.ntk_error["sign"]["total"], ".3g"),
                _count(row.largest_cluster),
                _count(row.singletons),
                f"{row.seconds:.2f}",
            )
        return "\n".join([render(table), *self._totals()])

    def learnt(self) -> str | None:
        """What was learnt from text, in words; None without text."""
        if self.calibration is None:
            return None
        s = self.settings
        done = [f"calibrated on {self.calibration.tokens:,} {self.calibration.synthetic or 'tokens'}"]
        done += ["layer after layer"] if s.sequential else []
        done += ["outputs refitted"] if s.refit else []
        done += [self._tuned(s.tune_steps)] if s.tune_steps else []
        done += [f"{s.match} kernel matched"] if s.match is not None else []
        done += [f"widths for {s.budget:.0%} of the parameters"] if s.budget is not None else []
        return ", ".join(done)

    def _tuned(self, steps: int) -> str:
        """What came of local training, in words."""
        asked = [row for row in self.rows if row.trained is not None]
        trained = sum(bool(row.trained) for row in asked)
        if asked and not trained:
            return "too few tokens to tune"
        some = f" ({trained} of {len(asked)} FFNs)" if trained < len(asked) else ""
        return f"tuned for {steps:,} steps{some}"

    def _totals(self) -> list[str]:
        lines = [
            _change("parameters", f"{self.parameters_before:,}", f"{self.parameters_after:,}", self._share()),
            _change("bytes", format_bytes(self.bytes_before), format_bytes(self.bytes_after), self._share(of="bytes")),
        ]
        if self.embeddings is not None:
            e = self.embeddings
            lines.append(
                f"cosine of {e.sentences} sentence embeddings to the original's: "
                f"mean {e.mean:.3f}, smallest {e.minimum:.3f}"
            )
        learnt = self.learnt()
        instead = "" if self.streamed else ", or on synthetic tokens where there is no text,"
        lines.append(learnt or f"reduced by weights alone: calibrated{instead} it keeps more")
        lines.append(f"method {self.method}")
        form = f"parameterization {self.parameterization}"
        if self.optimizer is not None:
            form += f" (for {self.optimizer})"
        kernel = self.settings.match or OPTIMIZER_KERNELS.get(self.parameterization)
        if kernel in _COLUMNS:
            form += f", which is to keep {_COLUMNS[kernel]}'s tangent kernel: the other's error is of no account"
        if all(row.largest_scale is None for row in self.rows):
            form = "no neuron has a scale"
        if self.sample_rows:
            form = f"errors: relative Frobenius, {self.sample_rows} token positions of {self.sample}; {form}"
        lines.append(form)
        clustered = sorted({row.clustered_by for row in self.rows if row.clustered_by})
        lines += [f"clustered by k-means on the backend {', '.join(clustered)}"] if clustered else []
        alone = [f"{row.path}: {', '.join(map(str, row.by_weights))}" for row in self.rows if row.by_weights]
        if alone:
            lines.append(f"experts that few tokens reached, reduced by their weights alone: {'; '.join(alone)}")
        troubled = [f"{row.path}: {row.status}" for row in self.rows if row.status != "ok"]
        return lines + ([f"note: {'; '.join(troubled)}"] if troubled else [])

    def _share(self, of: str = "parameters") -> float:
        return float(getattr(self, f"{of}_after") / max(1, getattr(self, f"{of}_before")))


def finite(value: Any) -> Any:
    """`value` with null for every number that JSON cannot hold (infinite, not a number)."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _measured(record: dict[str, Any], *keys: str) -> dict[str, Any]:
    """`record` with NaN where one of `keys` is null, for what JSON cannot hold."""
    return {**record, **{key: math.nan for key in keys if record[key] is None}}


def _change(name: str, before: str, after: str, share: float) -> str:
    return f"{name}: {before} → {after} ({share:.1%})"


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _count(value: int | None) -> str:
    return "-" if value is None else str(value)


def format_bytes(count: int) -> str:
    """Bytes in binary units, as people read them."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def render(table: Table) -> str:
    """A rich table as plain text, wide enough for its content."""
    buffer = io.StringIO()
    Console(file=buffer, width=160, no_color=True).print(table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()).strip("\n")
