"""What is known of the kernels on this machine's GPUs: check them, measure them, forget about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table

from fusion_kernels import gpu, library, proof
from fusion_kernels.activations import ACTIVATIONS
from fusion_kernels.experts.operators import EXPERTS, by_expert
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


@dataclass(frozen=True)
class TunedShape:
    """A call to measure.

    Attributes:
        tokens: rows of the input.
        inputs: its columns, and those of the output.
        neurons: of each FFN.
        gated: whether there is a gate projection.
        experts: FFNs side by side; None for one.
        top_k: experts that each token goes to.
    """

    tokens: int
    inputs: int
    neurons: int
    gated: bool = False
    experts: int | None = None
    top_k: int = 1

    def check(self) -> None:
        """Raise InputError where a number is none of its kind."""
        if min(self.tokens, self.inputs, self.neurons, self.top_k, self.experts or 1) < 1 or self.experts == 0:
            raise InputError("--tokens, --inputs, --neurons, --experts and --top-k are counts: give at least 1")
        if self.top_k > (self.experts or 1):
            raise InputError(f"--top-k {self.top_k} are more experts than there are: give --experts, at least as many")


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


def tune_block(shape: TunedShape, *, dtype: str, activation: str, trained: bool) -> Answer:
    """Measure which backend of small FFNs, or of experts, is fastest for a shape on every GPU, and keep the answers.

    Raises:
        InputError: an option does not fit, there is no GPU that kernels run on, or answers cannot be kept.
    """
    shape.check()
    if activation not in ACTIVATIONS:
        raise InputError(f"unknown --activation {activation!r}: use one of {', '.join(ACTIVATIONS)}")
    rows = []
    for device in devices():
        given, ffn = _call(shape, getattr(torch, dtype), activation, device)
        choice = (MLP if shape.experts is None else EXPERTS).choice
        try:
            entry = choice.measure(given, ffn, 1 if trained else 2)
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


def _call(
    shape: TunedShape, dtype: torch.dtype, activation: str, device: torch.device
) -> tuple[tuple[torch.Tensor, ...], FFN]:
    """What an operator takes beside the block, and the block: random numbers, and choices that are spread evenly."""
    g = torch.Generator().manual_seed(0)
    d, h, several = shape.inputs, shape.neurons, () if shape.experts is None else (shape.experts,)

    def normal(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(*size, generator=g)).to(device, dtype)

    first, second = normal(*several, h, d, scale=d**-0.5), normal(*several, d, h, scale=h**-0.5)
    gate = normal(*several, h, d, scale=d**-0.5) if shape.gated else None
    # Plain FFNs have biases, gated ones have none.
    b_in, b_out = (None, None) if shape.gated else (normal(*several, h), normal(*several, d))
    x, ffn = normal(shape.tokens, d), FFN.of_linears((first, second, gate, b_in, None, b_out, None), activation)
    if shape.experts is None:
        return (x,), ffn
    chosen = torch.rand(shape.tokens, shape.experts, generator=g).topk(shape.top_k).indices
    return (x, *by_expert(chosen.to(device), shape.experts)), ffn


def _words(value: Any) -> str:
    return ", ".join(f"{name} {v}" for name, v in value.items()) or "-" if isinstance(value, dict) else str(value)
