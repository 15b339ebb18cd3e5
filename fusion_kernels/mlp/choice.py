"""Which backend `"auto"` is for an operator on blocks, on a GPU: what was measured there, among what is proved there.

Measurements of the user's own device are in the file that verdicts are in (`fusion_kernels.proof`); those that ship
with the package, by name of the GPU, in `measured/`. A shape that has been called three times with 1,024 tokens or more
is measured at the next call that may take a second, once for every power of two of tokens.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from operator import index
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusion_kernels import proof
from fusion_kernels.ffn import FFN
from fusion_kernels.gpu import device_guard
from fusion_kernels.library import Operator
from fusion_kernels.mlp import heuristics, measuring
from fusion_kernels.mlp.heuristics import Shape
from fusion_kernels.mlp.types import rows_of_call
from fusion_kernels.proof.cache import Cache, CacheUnusableError, NoTurnError
from fusion_kernels.proof.key import facts

SHIPPED = Path(__file__).parent / "measured"
#: Calls of a shape before it is worth a measurement, and tokens of each.
CALLS, TOKENS = 3, 1024
#: Others multiply float32 without tensor cores: no kernel has anything to win there.
DTYPES = (torch.float16, torch.bfloat16)

#: By the operator's name.
CHOICES: dict[str, Choice] = {}
_ONE_AT_A_TIME = threading.RLock()
_HERE = threading.local()


@dataclass
class _Known:
    """Of one subject on one device: what was measured, and how often what has not been was asked for."""

    rows: list[tuple[int, str]] = field(default_factory=list)
    calls: dict[int, int] = field(default_factory=dict)
    closed: set[int] = field(default_factory=set)

    def add(self, tokens: int, backend: str) -> None:
        self.closed.add(tokens)
        self.rows = sorted([*((t, b) for t, b in self.rows if t != tokens), (tokens, backend)])


class Choice:
    """Which backend an operator's `"auto"` is on a GPU.

    Attributes:
        default: (x, ffn) -> what runs without measurements: torch's own operations, whose speed is known.
        rivals: backends that may be faster.
        waiting: backends that wait for the device.
        clock: times candidates.
    """

    def __init__(
        self, default: Callable[[Tensor, FFN], str], rivals: tuple[str, ...], waiting: tuple[str, ...] = ()
    ) -> None:
        self.default, self.rivals, self.waiting = default, rivals, waiting
        self.clock: measuring.Clock = measuring.device_clock
        self._known: dict[tuple[Any, ...], _Known] = {}

    def attach(self, operator: Operator, pairs: Callable[[str], measuring.Pair]) -> None:
        """Say whose choice it is.

        Args:
            pairs: forward and backward of a backend by its name.
        """
        self.operator, self._pairs = operator, pairs
        CHOICES[operator.name] = self

    def forget(self) -> None:
        """Let this process read, or measure, anew what it goes by."""
        self._known.clear()

    def __call__(self, rows: tuple[Tensor, ...], ffn: FFN, level: int) -> str:
        """The backend of a call; one that has been asked for often enough is measured first, where that may be.

        Args:
            rows: x, and what the operator takes behind it.
        """
        x = rows[0]
        default = self.default(x, ffn)
        how = proof.mode()
        if how == "off" or x.dtype not in DTYPES:
            return default
        known, tokens = self._of(x, ffn, level), rows_of_call(rows)
        if how != "proved" and tokens >= TOKENS and self._is_due(known, heuristics.bucket(tokens)):
            self._learn(known, rows, ffn, level)
        return self._allowed(heuristics.path(known.rows, tokens, default), default, x.device)

    def traced(self, rows: tuple[Tensor, ...], ffn: FFN, level: int) -> str:
        """The backend of a call that a compiler traces, by what is known already.

        The number of rows is looked at only where the choice depends on it.
        """
        x, default = rows[0], self.default(rows[0], ffn)
        # Any of these may be a symbol to a compiler: the choice, which depends on them, is that of their values.
        *experts, h, d, d_out, level = [index(n) for n in (*ffn.w_in.shape, ffn.w_out.shape[-1], level)]
        shape = (d, h, d_out, ffn.gated, level, experts[0] if experts else None)
        known = _known_rows(self.operator.name, x.device, x.dtype, *shape, ffn.activation, default)
        return heuristics.path(list(known), rows_of_call(rows), default) if known else default

    def known_rows(
        self, device: torch.device, dtype: torch.dtype, shape: Shape, activation: str, default: str
    ) -> list[tuple[int, str]]:
        """What is taken from how many tokens on, by what is known already: without neighbours that are the same."""
        if proof.mode() == "off" or dtype not in DTYPES:
            return []
        rows: list[tuple[int, str]] = []
        for tokens, backend in self._read(device, dtype, shape, activation).rows:
            named = self.operator.backend(backend)
            usable = backend == default or (
                named.refuses(device, None) is None and (named.proof is None or named.proof.reason(device) is None)
            )
            taken = backend if usable else default
            if taken != (rows[-1][1] if rows else default):
                rows.append((tokens, taken))
        return rows

    def measure(self, rows: tuple[Tensor, ...], ffn: FFN, level: int) -> dict[str, Any]:
        """Measure a call's shape now, whatever is known, and keep the answer.

        Raises:
            NoTurnError, CacheUnusableError: as `Cache.turn` does.
            torch.OutOfMemoryError: the device has no room for it.
        """
        x, cache = rows[0], Cache(facts(proof.indexed(rows[0].device)))
        tokens, able = heuristics.bucket(rows_of_call(rows)), self._able(x.device)
        with _ONE_AT_A_TIME, cache.turn(proof.PATIENCE):
            entry = self._measured(rows, ffn, level, able)
            cache.put("measured", _named(x.dtype, _shape(tokens, ffn, level), ffn.activation), entry)
        self._of(x, ffn, level).add(tokens, entry["backend"])
        return entry

    def _allowed(self, backend: str, default: str, device: torch.device) -> str:
        """That backend, if it can run on the device and is proved there."""
        if backend == default:
            return default
        return default if self.operator.backend(backend).declines(device, None) else backend

    def _of(self, x: Tensor, ffn: FFN, level: int) -> _Known:
        sizes = (*ffn.w_in.shape, ffn.w_out.shape[-1])
        place = (x.device, x.dtype, sizes, ffn.gated, ffn.activation, level < 2)
        if place not in self._known:
            self._known[place] = self._read(x.device, x.dtype, _shape(0, ffn, level), ffn.activation)
        return self._known[place]

    def _read(self, device: torch.device, dtype: torch.dtype, shape: Shape, activation: str) -> _Known:
        """What files say: the user's own before those that ship."""
        about = facts(proof.indexed(device))
        known, known_as = _Known(), heuristics.subject(dtype, shape, activation)
        names = {backend.name for backend in self.operator.backends}
        for entries in (_shipped(about["device"]), Cache(about).section("measured")):
            for tokens, backend in _rows_of(entries, known_as, names):
                known.add(tokens, backend)
        return known

    def _is_due(self, known: _Known, tokens: int) -> bool:
        if tokens in known.closed:
            return False
        known.calls[tokens] = known.calls.get(tokens, 0) + 1
        undisturbed = torch._C._len_torch_dispatch_stack() == 0 and proof.may_stop_here()
        # Not within a step that is timed, of experts whose blocks choose, too.
        return known.calls[tokens] > CALLS and undisturbed and not getattr(_HERE, "measures", False)

    def _learn(self, known: _Known, rows: tuple[Tensor, ...], ffn: FFN, level: int) -> None:
        """Measure, or wait for another process that does; what hinders it is said once."""
        x, tokens = rows[0], heuristics.bucket(rows_of_call(rows))
        known.closed.add(tokens)
        name = _named(x.dtype, _shape(tokens, ffn, level), ffn.activation)
        try:
            cache, able = Cache(facts(proof.indexed(x.device))), self._able(x.device)
            with _ONE_AT_A_TIME, cache.turn(proof.PATIENCE):
                entry: Any = cache.section("measured").get(name)
                if not _is_answer(entry, {backend.name for backend in self.operator.backends}):
                    entry = self._measured(rows, ffn, level, able)
                    cache.put("measured", name, entry)
            known.add(tokens, entry["backend"])
        except (NoTurnError, CacheUnusableError, torch.OutOfMemoryError) as error:
            proof.tell_once(f"{name} is not measured: {' '.join(str(error).split())}")

    def _able(self, device: torch.device) -> list[str]:
        """The rivals that can run on the device and are proved there.

        What is not is proved for this answer, which takes its turn with the file: nobody may ask who has the turn.
        """
        return [name for name in self.rivals if self.operator.backend(name).declines(device, None) is None]

    def _measured(self, rows: tuple[Tensor, ...], ffn: FFN, level: int, able: list[str]) -> dict[str, Any]:
        x, *others = rows
        default = self.default(x, ffn)
        synthetic = measuring.synthetic(x.shape[0], x)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False), device_guard(x), _measures_here():
            pairs = {name: self._pairs(name) for name in (default, *able)}
            rows, block = (synthetic, *others), ffn.map(Tensor.detach)
            return asdict(measuring.contest(pairs, rows, block, level, self.clock, self.waiting))


@contextlib.contextmanager
def _measures_here() -> Iterator[None]:
    """Inside, this thread measures no other call."""
    _HERE.measures = True
    try:
        yield
    finally:
        _HERE.measures = False


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _known_rows(
    operator: str,
    device: torch.device,
    dtype: torch.dtype,
    d: int,
    h: int,
    d_out: int,
    gated: bool,
    level: int,
    experts: int | None,
    activation: str,
    default: str,
) -> tuple[tuple[int, str], ...]:
    """`Choice.known_rows`, once per trace: of constants, which is all that a compiler takes."""
    shape = Shape(0, d, h, d_out, gated, level, experts)
    return tuple(CHOICES[operator].known_rows(device, dtype, shape, activation, default))


def _shape(tokens: int, ffn: FFN, level: int) -> Shape:
    *experts, neurons, d = ffn.w_in.shape
    return Shape(tokens, d, neurons, ffn.w_out.shape[-1], ffn.gated, level, experts[0] if experts else None)


def _named(dtype: torch.dtype, shape: Shape, activation: str) -> str:
    """What an entry of a file is called."""
    return f"{heuristics.subject(dtype, shape, activation)}, {shape.tokens} tokens"


def _rows_of(entries: Mapping[str, Any], known_as: str, names: Collection[str]) -> list[tuple[int, str]]:
    """(tokens, backend) of the entries about a subject."""
    found = []
    for name, entry in entries.items():
        about = re.fullmatch(r"(.*), (\d+) tokens", name)
        if about is not None and about[1] == known_as and _is_answer(entry, names):
            found.append((int(about[2]), str(entry["backend"])))
    return sorted(found)


def _is_answer(entry: Any, names: Collection[str]) -> bool:
    return isinstance(entry, dict) and entry.get("backend") in names


@functools.cache
def _shipped(gpu: str) -> Mapping[str, Any]:
    """What ships about a GPU."""
    path = SHIPPED / f"{re.sub('[^A-Za-z0-9]+', '_', gpu)}.json"
    found: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))["measured"] if path.exists() else {}
    return found
