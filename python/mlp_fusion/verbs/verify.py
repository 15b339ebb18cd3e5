"""`verify`: does a fused checkpoint reload to what was saved?"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mlp_fusion.errors import InputError
from mlp_fusion.measure import relative_error
from mlp_fusion.measure.report import render
from mlp_fusion.neurons import all_finite
from mlp_fusion.store.coverage import claimed_tensors, ffn_tensors, meta_model
from mlp_fusion.store.record import DTYPE_KEY, FUSION_KEY, REFERENCE_FILE, REPORT_FILE, architecture_of, fusion_record
from mlp_fusion.store.reference import compute_dtype, load_checkpoint, model_outputs, reference_outputs, split_reference
from mlp_fusion.store.restoring import scaled_sites
from mlp_fusion.store.source import Headers, local_folder, read_headers
from mlp_fusion.store.weights import COMPUTING, find_weights, opened
from mlp_fusion.streaming import checking


@dataclass(frozen=True)
class Check:
    """One check: its name, whether it passed, and what was seen."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Verification:
    """The outcome of :func:`verify`; `passed` when every check is.

    Examples:
        >>> _ = mlp_fusion.compress("all-MiniLM-L6-v2", "small", width=0.25)
        >>> found = mlp_fusion.verify("small")
        >>> [check.name for check in found.checks]
        ['shapes', 'finite', 'loads', 'outputs', 'scale']
        >>> found.passed
        True
    """

    checkpoint: str
    checks: list[Check]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**dataclasses.asdict(self), "passed": self.passed}

    def table(self) -> str:
        """The checks as text."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for title in ("check", "result", "seen"):
            table.add_column(title)
        for check in self.checks:
            table.add_row(check.name, "ok" if check.passed else "FAILED", check.detail)
        return f"{self.checkpoint}\n{render(table)}"


def verify(out: str | Path, against: nn.Module | str | Path | None = None) -> Verification:
    """Reload a fused checkpoint through transformers and compare it with what was in memory when it was written.

    One that was streamed from disk to disk is of any size, and no model of it has ever run: its tensors are compared
    with what its config says, without loading it, and with those of its source.

    Args:
        out: the checkpoint's folder.
        against: the fused model in memory; None: the outputs that `compress` recorded, which a streamed checkpoint has
            none of. Or the folder of the source, which is compared tensor by tensor besides.

    Returns:
        The checks: shapes as config and record state them, every tensor finite, a clean load, equal outputs (relative
        Frobenius difference at most 0.3 sqrt(eps) of the dtype: folding rounds once more than the explicit scale), and
        a side file from which `restore` can take the scale. Against a source: tensors that are no fused FFN's are the
        same in every bit. Where no outputs are recorded, some fused FFNs put out numbers on random inputs; how far off
        those are is said, no test.

    Raises:
        InputError: not a fused checkpoint, or unreadable, or nothing to compare with.

    Examples:
        >>> from transformers import AutoModel
        >>> model = AutoModel.from_pretrained("all-MiniLM-L6-v2")
        >>> _ = mlp_fusion.fuse(model, width=0.25)
        >>> model.save_pretrained("fused")
        >>> mlp_fusion.verify("fused", against=model).passed
        True
    """
    folder = Path(out).expanduser()
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    headers = read_headers(folder)
    record = fusion_record(headers.config)
    if record is None:
        raise InputError(f"{folder}: not a fused checkpoint: config.json has no {FUSION_KEY!r} entry")
    source, against = (Path(against).expanduser(), None) if isinstance(against, (str, Path)) else (None, against)
    is_recorded = (folder / REFERENCE_FILE).is_file()
    if against is None and not is_recorded and (source is not None or _was_streamed(folder)):
        return _verified_on_disk(folder, record, headers, source)
    recorded, dtype = _read_reference(folder) if against is None else (None, None)
    ffns = ffn_tensors(headers.config, headers.tensors)
    working = compute_dtype(ffns, headers.tensors, dtype)
    model, info = load_checkpoint(folder, headers.config, working)
    expected = recorded or reference_outputs(against, seed=0, head=not info["missing_keys"])
    checks = [
        _check_shapes(headers, record),
        _check_finite(folder),
        _check_loading(headers.config, info),
        _check_outputs(expected, model, headers),
        _check_scale(folder, record, model),
    ]
    if source is not None and all(check.passed for check in checks[:3]):
        pair = checking.Checkpoint(folder), checking.Checkpoint(local_folder(source))
        checks.append(Check("unchanged", *checking.unchanged(*pair)))
    return Verification(str(folder), checks)


def _was_streamed(folder: Path) -> bool:
    """Whether a checkpoint's report says why no outputs are recorded."""
    try:
        report = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(report, dict) and report.get("streamed") is True


def _verified_on_disk(folder: Path, record: dict[str, Any], headers: Headers, against: Path | None) -> Verification:
    checks = [_check_shapes(headers, record), _check_finite(folder)]
    if all(check.passed for check in checks):
        found = checking.Checkpoint(folder)
        checks.append(Check("loads", *checking.loading(found)))
        if record["parameterization"] != "folded":
            checks.append(Check("scale", *checking.scales(found, folder, record["fused_layers"])))
        if against is not None:
            source = checking.Checkpoint(local_folder(against))
            checks.append(Check("unchanged", *checking.unchanged(found, source)))
            if checks[-1].passed:
                checks.append(Check("outputs", *checking.outputs(found, source)))
    return Verification(str(folder), checks)


def _read_reference(folder: Path) -> tuple[dict[str, Tensor], str | None]:
    """The outputs that `compress` recorded, and the dtype that the model ran in where it was not the weights' own."""
    file = folder / REFERENCE_FILE
    if not file.is_file():
        raise InputError(f"{file} is missing, only compress writes it: use mlp_fusion.verify(folder, against=model)")
    try:
        with safe_open(file, framework="pt") as handle:
            dtype = (handle.metadata() or {}).get(DTYPE_KEY)
            reference = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  (no mapping)
    except SafetensorError as error:
        raise InputError(f"{file}: damaged or cut short: compress again") from error
    return reference, dtype


def _check_shapes(headers: Headers, record: dict[str, Any]) -> Check:
    try:
        architecture, model = architecture_of(headers.config), meta_model(headers.config)
        claimed_tensors(headers, model, architecture, sites := architecture.sites(model))
    except InputError as error:
        return Check("shapes", False, str(error))
    if not sites:
        return Check("shapes", False, "no FFN found")
    return Check("shapes", True, f"{len(sites)} FFNs, {len(record['fused_layers'])} of them fused")


def _check_finite(folder: Path) -> Check:
    count = 0
    for file in find_weights(folder).files:
        with opened(file) as handle:
            for name in handle.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
                count += 1
                tensor = handle.get_tensor(name)
                if tensor.is_floating_point() and tensor.itemsize == 1:
                    tensor = tensor.float()  # of FP8, torch cannot say
                if tensor.is_floating_point() and not all_finite(tensor):
                    return Check("finite", False, f"{name} holds NaN or Inf")
    return Check("finite", True, f"{count} tensors")


def _check_loading(config: Any, info: dict[str, Any]) -> Check:
    architecture = architecture_of(config)
    mismatched = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"])
    missing = sorted(info["missing_keys"])
    if mismatched:
        return Check("loads", False, f"{mismatched[0]} has another shape than config.json says")
    lost = [name for name in missing if architecture.locate(name) is not None]
    if lost:
        return Check("loads", False, f"{lost[0]} is missing")
    # The original may lack weights of its own (a pooler that nobody trained); that is not this checkpoint's fault.
    return Check("loads", True, f"not in the checkpoint: {missing[0]}" if missing else "every weight found its place")


def _check_outputs(reference: dict[str, Tensor], model: Any, headers: Headers) -> Check:
    inputs, outputs = split_reference(reference)
    found = model_outputs(model, inputs, head="last_hidden_state" not in outputs)
    # The model in memory has not seen the rounding of the FFNs to the dtypes that they are stored in.
    ffns = ffn_tensors(headers.config, headers.tensors)
    stored = [COMPUTING[headers.tensors[name].dtype] for name in ffns if headers.tensors[name].floating]
    limit = 0.3 * max(torch.finfo(dtype).eps for dtype in (model.dtype, *stored)) ** 0.5
    details = []
    for kind, expected in sorted(outputs.items()):
        if kind not in found or found[kind].shape != expected.shape:
            shape = tuple(found[kind].shape) if kind in found else "missing"
            return Check("outputs", False, f"{kind} is {shape}, in memory it was {tuple(expected.shape)}")
        details.append((relative_error(found[kind], expected), kind.replace("_", " ")))
    # NaN, which compares with nothing, is the worst.
    error, kind = max(details, key=lambda pair: (pair[0] != pair[0], pair[0]))
    seen = f"relative difference of {kind} {error:.1e} to the model in memory (limit {limit:.1e})"
    return Check("outputs", error <= limit, seen)


def _check_scale(folder: Path, record: dict[str, Any], model: Any) -> Check:
    if record["parameterization"] == "folded":
        return Check("scale", True, "folded for good: there is nothing to restore")
    try:
        found = scaled_sites(model, folder, record["parameterization"])
    except InputError as error:
        return Check("scale", False, str(error))
    largest = max(float(scale.max()) for _, scale, _ in found)
    return Check("scale", True, f"of {len(found)} FFNs, the largest {largest:g}")
