"""Stages of bench/gpu.py: each in a process of its own, its findings kept line by line, none of them fatal.

A stage is a module with `lines(told)`, which yields names and what finds out about them. Its process says over a pipe
which line it begins and what came of it; the one that waits writes the file anew after every line. A line that raises
is a failure, and the stage goes on. One that leaves the device unusable, ends its process or never ends is a failure
too, and a new process goes on with the lines behind it. So nothing that a kernel does takes away what is known already.

Stages have shares of the time. What one leaves goes to the next; one past its share begins no further line, and is
ended :data:`GRACE` seconds later. This module imports neither torch nor the packages: they need not be installed.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
#: What Python runs in the process of a stage: the other half of this file.
CHILD = [str(Path(__file__))]
#: Seconds that an open line may go on after its stage's share, out of the shares of those that follow.
GRACE = 10.0
#: How a process ends whose device has become unusable; and how long it has had to say its last words, in seconds.
UNUSABLE, LAST_WORDS = 23, 2.0

#: Under this a line says which digests it was found with, where these are not those of the file.
FOUND_WITH = "found with"
#: Under this it is kept which lines of a stage there was no time for.
LEFT_OUT = "left out for lack of time"

Work = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Stage:
    """
    Attributes:
        name: what its lines stand under.
        seconds: its share of the run, the start of its process included.
        line_seconds: after which a line, or what its process does between two, is given up.
        module: imported by its process, which calls its `lines`.
        about: what it finds out, in a few words.
        lasting: whether its lines hold in a later run; else that does them again.
    """

    name: str
    seconds: float
    line_seconds: float
    module: str
    about: str
    lasting: bool = True


@dataclass(frozen=True)
class Told:
    """What a stage is told.

    Attributes:
        options: of the command line.
        found: lines that are known already, by stage and name.
        until: when its share ends, by `time.monotonic`.
    """

    options: Mapping[str, Any]
    found: Mapping[str, Mapping[str, Any]]
    until: float

    def left(self) -> float:
        """Seconds until then."""
        return self.until - time.monotonic()


class Record:
    """What is found out, and the file that it is kept in, from :meth:`keep` on.

    Attributes:
        stages: result by stage and line. A result with `skipped` says why there is none; one with `failed` what speaks
            against what was found; one with :data:`FOUND_WITH` was found by an earlier run with other kernels.
        failures: by stage and line, type and message. What has no line of its own is under the stage's name.
        notes: everything else, by name.
    """

    def __init__(self) -> None:
        self.path: Path | None = None
        self.notes: dict[str, Any] = {}
        self.stages: dict[str, dict[str, dict[str, Any]]] = {}
        self.failures: dict[str, dict[str, dict[str, Any]]] = {}

    def keep(self, path: Path) -> None:
        """Write the file now, and anew after every line."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.write()

    def adopt(self, kept: Mapping[str, Any], again: Sequence[Stage]) -> None:
        """Take over what an earlier run has found; but what it failed at or skipped is to be tried `again`."""
        tried = {stage.name: stage.lasting for stage in again}
        for stage, lines in kept["failures"].items():
            if stage not in tried:
                self.failures[stage] = dict(lines)
        for stage, lines in kept["stages"].items():
            for line, result in lines.items():
                lasts = stage not in tried or (tried[stage] and "skipped" not in result)
                if lasts and line not in self.stages.get(stage, {}):
                    self.add(stage, line, result)
        self.note("taken", {**kept.get("taken", {}), **self.notes.get("taken", {})})

    def add(self, stage: str, line: str, result: dict[str, Any]) -> None:
        """Keep a line."""
        self.stages.setdefault(stage, {})[line] = result
        if "failed" in result:
            found_with = {name: value for name, value in result.items() if name == FOUND_WITH}
            self.fail(stage, line, "Failed", result["failed"], found_with)
        self.write()

    def fail(self, stage: str, line: str, kind: str, message: str, found_with: Mapping[str, Any] | None = None) -> None:
        """Keep a failure."""
        self.failures.setdefault(stage, {})[line] = {"type": kind, "message": message, **(found_with or {})}
        self.write()

    def note(self, name: str, value: Any) -> None:
        """Keep something that is no line."""
        self.notes[name] = value
        self.write()

    def settled(self, stage: str) -> list[str]:
        """Lines of which something is known."""
        known = dict.fromkeys([*self.stages.get(stage, {}), *self.failures.get(stage, {})])
        return [line for line in known if line != stage]

    def write(self) -> None:
        """Replace the file as a whole: whoever reads it, or stops the run, finds the last complete one."""
        if self.path is None:
            return
        whole = {**self.notes, "stages": self.stages, "failures": self.failures}
        new = self.path.with_name(f"{self.path.name}.{os.getpid()}.new")
        new.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        new.replace(self.path)


def environment() -> dict[str, str]:
    """Of processes that import the packages: those of this checkout, installed or not."""
    folders = [str(ROOT), str(ROOT / "python"), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders)), "PYTHONUNBUFFERED": "1"}


def planned(stages: Sequence[Stage], seconds: float) -> list[tuple[Stage, float]]:
    """Stages with their shares of so many seconds."""
    whole = sum(stage.seconds for stage in stages)
    return [(stage, stage.seconds * seconds / whole) for stage in stages]


def outstanding(stages: Sequence[Stage], kept: Mapping[str, Any]) -> list[Stage]:
    """The stages of which an earlier run has left something to do, so that no other one gets a share or a process."""

    def over(stage: Stage) -> bool:
        lines, taken = kept["stages"].get(stage.name, {}), kept.get("taken", {}).get(stage.name)
        again = kept["failures"].get(stage.name, {}).keys() - lines.keys()
        skipped = any("skipped" in line for line in lines.values())
        return taken is not None and not taken[LEFT_OUT] and not again and not skipped

    lasting = [stage for stage in stages if stage.lasting]
    left = [stage for stage in lasting if not over(stage)]
    # What does not last is done for the others.
    return [stage for stage in stages if stage in left or (not stage.lasting and (left or not lasting))]


def run(
    stages: Sequence[Stage],
    record: Record,
    options: Mapping[str, Any],
    seconds: float,
    say: Callable[[str], None],
) -> None:
    """Run the stages one after the other, `seconds` at most all together."""
    began = share_ends = time.monotonic()
    for stage, share in planned(stages, seconds):
        share_ends += share
        started = time.monotonic()
        ends = min(share_ends + GRACE, began + seconds)
        left_out = _Run(stage, record, options, share_ends, ends, say).to_the_end()
        taken = {"seconds": round(time.monotonic() - started, 1), LEFT_OUT: left_out}
        record.note("taken", {**record.notes.get("taken", {}), stage.name: taken})


class _Run:
    """One stage, in as many processes as it takes."""

    def __init__(
        self,
        stage: Stage,
        record: Record,
        options: Mapping[str, Any],
        until: float,
        ends: float,
        say: Callable[[str], None],
    ) -> None:
        self.stage, self.record, self.options, self.say = stage, record, options, say
        self.until, self.ends = until, ends
        self.left_out: list[str] = []

    def to_the_end(self) -> list[str]:
        """Returns the lines that there was no time for."""
        while time.monotonic() < self.until:
            before = self.record.settled(self.stage.name)
            complete = self._process(before)
            # A process that ends before its first line would end so again.
            if complete or self.record.settled(self.stage.name) == before:
                return self.left_out
        return self.left_out or ["whatever was not begun"]

    def _process(self, skip: list[str]) -> bool:
        """Let one process do the lines that are not to be skipped; returns whether it came to the end of them."""
        reading, writing = os.pipe()
        request = {
            "module": self.stage.module, "fd": writing, "skip": skip, "until": self.until,
            "options": dict(self.options), "found": self.record.stages,
        }  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, *CHILD], pass_fds=[writing], env=environment(), start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        os.close(writing)
        try:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it has ended: that shows where its lines are waited for
                process.stdin.write(json.dumps(request).encode())
                process.stdin.close()
            return self._listen(process, reading, _LastWords(process))
        finally:
            os.close(reading)
            _end(process)

    def _listen(self, process: subprocess.Popen[bytes], reading: int, words: _LastWords) -> bool:
        buffered, open_line, begun = b"", None, time.monotonic()
        while True:
            limit = min(self.ends, begun + self.stage.line_seconds)
            ready, _, _ = select.select([reading, *words.open], [], [], max(0.0, limit - time.monotonic()))
            if words.open and words.open[0] in ready:
                words.read()
            if reading not in ready:
                if time.monotonic() < limit:
                    continue
                self._fail(open_line, "TimeoutError", f"did not end within {time.monotonic() - begun:.0f} s")
                return False
            chunk = os.read(reading, 1 << 16)
            if not chunk:
                return self._ended(process, open_line, words)
            *whole, buffered = (buffered + chunk).split(b"\n")
            for message in map(json.loads, whole):
                if "begin" in message:
                    open_line, begun = message["begin"], time.monotonic()
                elif "end" in message:
                    self.left_out = message["end"]
                    return True
                else:
                    self._settle(message)
                    open_line, begun = None, time.monotonic()

    def _ended(self, process: subprocess.Popen[bytes], open_line: str | None, words: _LastWords) -> bool:
        """Of a process that has said no end: False, and a failure unless it ended because its device is unusable."""
        said, status = words.last(), process.wait()
        if status != UNUSABLE or open_line is not None:
            self._fail(open_line, "ProcessEnded", f"its process ended with status {status}: {said}")
        return False

    def _settle(self, message: dict[str, Any]) -> None:
        line = message["line"]
        if "failure" in message:
            self._fail(line, *message["failure"])
            return
        result = message["result"]
        brief = result.pop("brief", None)
        self.record.add(self.stage.name, line, {**result, "seconds": message["seconds"]})
        self._say(line, brief or json.dumps(result)[:240])

    def _fail(self, line: str | None, kind: str, message: str) -> None:
        self.record.fail(self.stage.name, line or self.stage.name, kind, message)
        self._say(line or "the stage itself", f"FAILED: {kind}: {message}"[:600])

    def _say(self, line: str, words: str) -> None:
        self.say(f"{self.stage.name}: {line}: {words}")


class _LastWords:
    """What a process says beside its lines: kept for the case that it ends, so that the terminal shows lines only.

    Attributes:
        open: the pipe, until nothing more comes.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        self.open, self.kept = [process.stdout.fileno()], b""

    def read(self) -> None:
        """Read what is there."""
        said = os.read(self.open[0], 1 << 16)
        self.kept = (self.kept + said)[-4000:]
        if not said:
            self.open.clear()

    def last(self) -> str:
        """The end of it, in one line."""
        until = time.monotonic() + LAST_WORDS
        while self.open and time.monotonic() < until and select.select(self.open, [], [], 0.1)[0]:
            self.read()
        return " | ".join(self.kept.decode(errors="replace").strip().splitlines()[-4:]) or "nothing was said"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it has started; one that the driver does not let go of is not waited for."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(LAST_WORDS)
    assert process.stdout is not None
    process.stdout.close()


# --- the other process -----------------------------------------------------------------------------------------------


def serve(request: dict[str, Any]) -> int:
    """Do the lines of a stage, and say what becomes of them; returns the status to end with."""
    with os.fdopen(request["fd"], "w", encoding="utf-8", buffering=1) as pipe:

        def say(**message: Any) -> None:
            pipe.write(json.dumps(message) + "\n")

        told = Told(request["options"], request["found"], request["until"])
        lines: Iterable[tuple[str, Work]] = importlib.import_module(request["module"]).lines(told)
        left_out = []
        for name, work in lines:
            if name in request["skip"]:
                continue
            if told.left() <= 0:
                left_out.append(name)
                continue
            say(begin=name)
            began = time.monotonic()
            try:
                result = work()
                text = json.dumps({"line": name, "result": result, "seconds": round(time.monotonic() - began, 2)})
            except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever it is, it is what the line comes to
                message = " ".join(str(error).split())[:2000]
                say(line=name, failure=[type(error).__name__, message])
                if not _device_lives():
                    return UNUSABLE
            else:
                pipe.write(text + "\n")
        say(end=left_out)
    return 0


def _device_lives() -> bool:
    """Whether CUDA still answers, where it has been asked at all: after an illegal access it never does again."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(serve(json.load(sys.stdin)))
