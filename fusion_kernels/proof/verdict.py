"""`Verdict`: what a check has found, as it is kept in a file."""

from __future__ import annotations

import dataclasses
import datetime
import time
from dataclasses import dataclass
from typing import Any

#: All cases hold; one does not; none could be judged, for a reason that may pass.
PROVED, FAILED, UNKNOWN = "proved", "failed", "unknown"
#: Seconds after which what could not be judged is tried again. The ranks of one job start within them.
FRESH = 3600.0


@dataclass(frozen=True)
class Verdict:
    """What is known of a backend's kernels on a device.

    Attributes:
        outcome: :data:`PROVED`, :data:`FAILED` or :data:`UNKNOWN`.
        why: in one line what speaks against the kernels; None where they are proved.
        cases: how many were run.
        seconds: that it took.
        on: name of the device.
        at: when, in seconds since the epoch.
    """

    outcome: str
    why: str | None
    cases: int
    seconds: float
    on: str
    at: float

    @classmethod
    def of(cls, outcome: str, why: str | None, cases: int = 0, seconds: float = 0.0, on: str = "") -> Verdict:
        """One of now."""
        return cls(outcome, why, cases, round(seconds, 1), on, time.time())

    @classmethod
    def read(cls, entry: Any) -> Verdict | None:
        """The verdict of an entry of a file; None where there is none that still counts."""
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(entry, dict) or entry.keys() != names:
            return None
        found = cls(**entry)
        sound = found.outcome == PROVED if found.why is None else found.outcome in (FAILED, UNKNOWN)
        if not sound or (found.outcome == UNKNOWN and time.time() - found.at > FRESH):
            return None
        return found

    @property
    def text(self) -> str:
        """In one line, for people."""
        day = datetime.datetime.fromtimestamp(self.at, datetime.timezone.utc).date()
        if self.why is None:
            return f"proved {day} on {self.on} in {self.seconds:.0f} s"
        return f"{'failed' if self.outcome == FAILED else 'not judged'} {day}: {self.why}"
