"""What is known of the kernels on this machine's GPUs: check them, measure them, forget about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table

from fusion_kernels import gpu, library, proof
from fusion_kernels.activations import ACTIVATIONS
from fusion_kernels.ffn import FFN
from fusion_kernels.mlp.operators import MLP
from fusion_kernels.proof import cache
from mlp_fusion.errors import InputError
from mlp_fusion.measure.report import render


@dataclass(frozen=True)
class Answer:
    """A table for people, and the same for programs.

    Attributes:
        rows: what was found out, each by name.
        passed: whether nothing speaks against the kernels.
    """

    rows: list[dict[str, Any]]
    passed: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"passed": self.passed, "rows": self.rows}

    def table(self) -> str:
        """The rows side by side; a line where there are none."""
        if not self.rows:
            return "nothing is there"
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in self.rows[0]:
            table.add_column(name)
        for row in self.rows:
            table.add_row(*(_words(value) for value in row.values()))
        return render(table)


def check_kernels() -> Answer:
    """Run the proofs of all kernels on every GPU, whatever is known, and keep the verdicts.

    Raises:
        InputError: there is no GPU that kernels run on, or verdicts cannot be kept.
    """
    rows = []
    for device in devices():
        for name, kernels in library.proofs(device).items():
            assert isinstance(kernels, proof.Proof)
            try:
                verdict = kernels.check(device)
            except (cache.NoTurnError, cache.CacheUnusableError) as error:
                raise InputError(str(error)) from None
            rows.append({"device": str(device), "kernels": name, "verdict": verdict.text})
    return Answer(rows, passed=all(row["verdict"].startswith("proved") for row in rows))


def tune_block(tokens: int, d: int, neurons: int, *, dtype: str, activation: str, gated: bool, trained: bool) -> Answer:
    """Measure which backend of small FFNs is fastest for a shape on every GPU, and keep the answers.

    Raises:
        InputError: an option does not fit, there is no GPU that kernels run on, or answers cannot be kept.
    """
    if min(tokens, d, neurons) < 1:
        raise InputError("--tokens, --inputs and --neurons are counts: give at least 1")
    if activation not in ACTIVATIONS:
        raise InputError(f"unknown --activation {activation!r}: use one of {', '.join(ACTIVATIONS)}")
    rows = []
    for device in devices():
        x, ffn = _block(tokens, d, neurons, getattr(torch, dtype), activation, gated, device)
        try:
            entry = MLP.choice.measure((x,), ffn, 1 if trained else 2)
        except (cache.NoTurnError, cache.CacheUnusableError, torch.OutOfMemoryError) as error:
            raise InputError(" ".join(str(error).split())) from None
        found = {"fastest": entry["backend"], "ms": entry["ms"], "refused": entry["refused"]}
        rows.append({"device": str(device), **found})
    return Answer(rows)


def forget_all() -> Answer:
    """Remove what was found out about GPUs, on all that this user has used."""
    return Answer([{"removed": str(path)} for path in cache.forget()])


def states() -> list[dict[str, str]]:
    """Of every GPU that kernels run on: the file about it, and its state."""
    found = []
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        if gpu.no_gpu(device) is None:
            found.append({"device": str(device), "switch": proof.mode(), **proof.described(device)})
    return found


def devices() -> list[torch.device]:
    """The GPUs that kernels run on.

    Raises:
        InputError: there are none; the message says why.
    """
    found = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    found = [device for device in found if gpu.why_not(device) is None]
    if not found:
        raise InputError(f"there is no GPU that the kernels run on: {gpu.why_not()}")
    return found


def _block(
    tokens: int, d: int, neurons: int, dtype: torch.dtype, activation: str, gated: bool, device: torch.device
) -> tuple[torch.Tensor, FFN]:
    g = torch.Generator().manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(*size, generator=g)).to(device, dtype)

    first, second = normal(neurons, d, scale=d**-0.5), normal(d, neurons, scale=neurons**-0.5)
    gate = normal(neurons, d, scale=d**-0.5) if gated else None
    # Plain FFNs have biases, gated ones have none.
    b_in, b_out = (None, None) if gated else (normal(neurons), normal(d))
    return normal(tokens, d), FFN.of_linears((first, second, gate, b_in, None, b_out, None), activation)


def _words(value: Any) -> str:
    return ", ".join(f"{name} {v}" for name, v in value.items()) or "-" if isinstance(value, dict) else str(value)
