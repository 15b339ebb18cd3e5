"""Kernels for GPUs prove themselves on the user's own machine before `backend="auto"` takes them.

Compilers for GPUs make silently wrong code for some devices, in releases that nobody has tested together. So each
backend brings a few small problems with bounds that hold whatever the order of sums (:class:`~.cases.Case`). They run
once per device, driver, compiler and form of the kernels, in a process of their own (`child.py`): a kernel that writes
where it may not, or never ends, harms nothing but that. The verdict lies in a file (`cache.py`) that all processes of a
user share. One of them checks, the others wait for it: all decide alike.

:class:`Proof` is what a backend is registered with. Without a verdict, and with one that is bad, `"auto"` goes on to
the next backend; asking for one by name runs it unproved.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import warnings
from dataclasses import dataclass

import torch

from fusion_kernels.library import check_name
from fusion_kernels.proof.cache import Cache, CacheUnusableError, NoTurnError
from fusion_kernels.proof.child import ask
from fusion_kernels.proof.key import facts
from fusion_kernels.proof.verdict import FAILED, UNKNOWN, Verdict

__all__ = ["MODES", "SWITCH", "Proof", "Verdict", "may_stop_here", "mode"]

#: The environment variable, and what it may be.
SWITCH = "FUSION_KERNELS_GPU"
#: `auto` proves, and measures where backends differ in speed alone; `proved` proves and never measures; `trust` takes
#: kernels unproved; `off` never takes them by itself.
MODES = ("auto", "off", "proved", "trust")

#: Seconds that the cases of one proof may take together, and that other processes wait for it. The longer wait is for
#: the one who checks: whoever gives up waiting decides otherwise than the rest.
LIMIT, PATIENCE = 120.0, 300.0

NOT_YET = "not checked yet: at the first call that is neither traced nor recorded, or by `mlp-fusion gpu check`"

_ONE_AT_A_TIME = threading.RLock()
#: What this process goes by, by name and device: it does not change its mind, whatever becomes of the file.
_DECIDED: dict[tuple[str, str, int | None], Verdict] = {}
_told: set[str] = set()


def mode() -> str:
    """What :data:`SWITCH` says; `auto` if nothing.

    Raises:
        ValueError: it is none of :data:`MODES`.
    """
    name = os.environ.get(SWITCH) or "auto"
    check_name(SWITCH, name, MODES)
    return name


def may_stop_here() -> bool:
    """Whether a call may take seconds for a check: not while a compiler traces or a CUDA graph is recorded."""
    if torch.compiler.is_compiling():
        return False
    # Asking about a stream would start CUDA where it has not been.
    return not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


def tell_once(words: str) -> None:
    """One warning per process."""
    if words not in _told:
        _told.add(words)
        warnings.warn(words, RuntimeWarning, stacklevel=3)


@dataclass(frozen=True)
class Proof:
    """Whether a backend's kernels compute what they should, on a device.

    Attributes:
        name: what the verdict is kept under: operator and backend.
        cases: `module:function` that returns the :class:`~.cases.Case` list of a device; imported by who runs them.
    """

    name: str
    cases: str

    def __call__(self, device: torch.device) -> str | None:
        """In one line why the backend is not to be taken unasked on the device, or None.

        What has not been checked is checked here, where a call may take so long.
        """
        how = mode()
        if how in ("off", "trust"):
            return self.reason(device)
        device = indexed(device)
        verdict = _DECIDED.get(self._place(device))
        if verdict is None:
            if not may_stop_here():
                return self.reason(device)
            verdict = self._decide(device)
        return verdict.why

    def reason(self, device: torch.device) -> str | None:
        """The same by what is known already."""
        how = mode()
        if how in ("off", "trust"):
            return f"{SWITCH}=off" if how == "off" else None
        verdict = self.known(device)
        return NOT_YET if verdict is None else verdict.why

    def known(self, device: torch.device) -> Verdict | None:
        """The verdict, if there is one already."""
        device = indexed(device)
        decided = _DECIDED.get(self._place(device))
        return self._kept(Cache(facts(device))) if decided is None else decided

    def state(self, device: torch.device) -> str:
        """In one line what is known already, for people."""
        how = mode()
        if how in ("off", "trust"):
            return f"{'not asked for' if how == 'off' else 'taken on trust'}: {SWITCH}={how}"
        verdict = self.known(device)
        return NOT_YET if verdict is None else verdict.text

    def check(self, device: torch.device, limit: float = LIMIT) -> Verdict:
        """Check again, whatever is known, and keep the verdict.

        Raises:
            NoTurnError: another process has been at it for :data:`PATIENCE` seconds.
            CacheUnusableError: verdicts cannot be written.
        """
        device = indexed(device)
        cache = Cache(facts(device))
        with _ONE_AT_A_TIME, cache.turn(PATIENCE):
            verdict = ask(self.cases, device, cache.key, limit)
            cache.put("proofs", self.name, dataclasses.asdict(verdict))
        _DECIDED[self._place(device)] = verdict
        return verdict

    def _place(self, device: torch.device) -> tuple[str, str, int | None]:
        return self.name, device.type, device.index

    def _kept(self, cache: Cache) -> Verdict | None:
        return Verdict.read(cache.section("proofs").get(self.name))

    def _decide(self, device: torch.device) -> Verdict:
        """The verdict that is there, or that of a check now; other threads and processes wait for it."""
        with _ONE_AT_A_TIME:
            place = self._place(device)
            if place in _DECIDED:
                return _DECIDED[place]
            cache = Cache(facts(device))
            verdict = self._kept(cache)
            if verdict is None:
                verdict = self._found(cache, device)
                if verdict.outcome == FAILED:
                    tell_once(f"GPU kernels are not used: {self.name}: {verdict.why}")
            _DECIDED[place] = verdict
            return verdict

    def _found(self, cache: Cache, device: torch.device) -> Verdict:
        try:
            with cache.turn(PATIENCE):
                kept = self._kept(cache)  # by who had the turn before
                if kept is not None:
                    return kept
                verdict = self._asked(cache, device)
                cache.put("proofs", self.name, dataclasses.asdict(verdict))
                return verdict
        except NoTurnError as error:
            return Verdict.of(UNKNOWN, str(error))
        except CacheUnusableError as error:
            tell_once(f"what is found out about GPU kernels is forgotten when this process ends: {error}")
            return self._asked(cache, device)

    def _asked(self, cache: Cache, device: torch.device) -> Verdict:
        tell_once(
            f"checking GPU kernels, once: seconds, or a minute where they are not compiled yet; {SWITCH}=off skips"
        )
        return ask(self.cases, device, cache.key, LIMIT)


def indexed(device: torch.device) -> torch.device:
    """The device with its index: the current one where none is said."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def forget_decisions() -> None:
    """Let this process read, or find out, anew what it goes by."""
    _DECIDED.clear()
    _told.clear()


def described(device: torch.device) -> dict[str, str]:
    """The file about the device, and what is in it: for people who look for it."""
    cache = Cache(facts(indexed(device)))
    return {"file": str(cache.path), "state": cache.state()}
