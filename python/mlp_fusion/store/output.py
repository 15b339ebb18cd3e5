"""The folder that is written: taken by one run at a time, filled all or nothing, and cleared of what a killed run left.

While a run works, `.NAME.lock` stands beside the folder NAME and is locked by its process, so that a lock file which a
killed process has left means nothing. What is written stands in `.NAME.partial` beside it, and gets its name at the
end. A folder that exists (it may be a mount point, which cannot be exchanged, or lie where nothing can be made) is
filled from a hidden folder inside it instead. A run that can be resumed keeps a journal beside what it has written:
where there is one, nothing is cleared unasked.

A folder of such a name may be somebody else's. It is ours, and cleared, if the lock file that a killed run has left
states its name and inode, or if a journal lies beside it, that is one by its first line.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlp_fusion.errors import InputError
from mlp_fusion.store.record import FUSION_KEY, REPORT_FILE, SIDE_FOLDER
from mlp_fusion.store.source import companion_files

#: Where they lie inside the folder itself.
_LOCK, _PARTIAL, _JOURNAL = ".mlp_fusion.lock", ".mlp_fusion.partial", ".mlp_fusion.journal"
#: No content of a folder: ours, and what every new file system has at its top.
_NOTHING = {_LOCK, _PARTIAL, _JOURNAL, f"{_JOURNAL}.new", "lost+found"}


def output_path(out: str | Path) -> Path:
    """The absolute path of the folder to write.

    Raises:
        InputError: no folder can have that name.
    """
    try:
        path = Path(out).expanduser().resolve()
        path.exists()
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{str(out)[:100]!r} can be no folder's name ({error}): choose another".replace("\n", " ")
        ) from error
    return path


def check_output(out: Path, *, replace: bool = False) -> None:
    """Raise InputError unless `out` can be made, is an empty folder that can be filled, or may be replaced.

    Args:
        out: the folder.
        replace: a checkpoint that was fused by this program may stand there.
    """
    for path in (out, *out.parents):
        if path.exists() and not path.is_dir():
            raise InputError(f"{path} is a file: choose another folder")
    if out.is_dir() and not _is_empty_folder(out):
        if not replace:
            remedy = "choose another folder, empty it, or force (--force) if mlp-fusion wrote it"
            raise InputError(f"{out} exists and is not empty: {remedy}")
        if not _is_ours(out):
            raise InputError(f"{out} is no checkpoint that was fused by this program: it is not replaced, remove it")
        if (strange := _strange(out)) is not None:
            raise InputError(f"{strange} would be lost: it is nothing that this program writes, move it elsewhere")
        if _stays(out):
            raise InputError(
                f"{out} cannot be replaced where it is (a mount point, or no right to its parent): empty it"
            )
    place = next(path for path in (out, *out.parents) if path.is_dir())
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"{place} cannot be written to: choose another folder")


def _is_ours(folder: Path) -> bool:
    """Whether a folder holds a checkpoint that this program has written."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    record = content.get(FUSION_KEY) if isinstance(content, dict) else None
    return isinstance(record, dict) and "format" in record and (folder / REPORT_FILE).is_file()


def _strange(folder: Path) -> Path | None:
    """Something in a checkpoint that is no part of one."""
    known = {file.parts[0] for file in companion_files(folder)} | {SIDE_FOLDER, "config.json", "README.md"} | _NOTHING
    weights = (".safetensors", ".safetensors.index.json")
    return next((p for p in sorted(folder.iterdir()) if p.name not in known and not p.name.endswith(weights)), None)


def _stays(out: Path) -> bool:
    """Whether a folder cannot be exchanged for another one."""
    return os.path.ismount(out) or not os.access(out.parent, os.W_OK)


def _places(out: Path) -> tuple[tuple[Path, Path], tuple[Path, Path]]:
    """Where what is written may stand, and its journal: beside the folder, and inside it."""
    beside = out.parent / f".{out.name}.partial", out.parent / f".{out.name}.journal"
    return beside, (out / _PARTIAL, out / _JOURNAL)


def _place(out: Path) -> tuple[Path, Path]:
    """Where a run left something to go on with, or else where one works."""
    beside, inside = _places(out)
    for place in (beside, inside):
        if place[1].exists():
            return place
    return inside if _is_empty_folder(out) else beside


def staging_of(out: Path) -> Path:
    """The folder that becomes `out`, or that it is filled from."""
    return _place(out)[0]


def journal_of(out: Path) -> Path:
    """The journal of a run that can be resumed."""
    return _place(out)[1]


def _is_empty_folder(out: Path) -> bool:
    """Whether a folder is there to be filled; one that has a journal is being filled."""
    return out.is_dir() and ((out / _JOURNAL).exists() or all(path.name in _NOTHING for path in out.iterdir()))


def _lock_of(out: Path) -> Path:
    """The file that a run locks."""
    inside = out.is_dir() and _stays(out)
    return out / _LOCK if inside else out.parent / f".{out.name}.lock"


@contextmanager
def taken(out: Path, *, resume: bool = False, force: bool = False) -> Iterator[None]:
    """Keep other runs out of `out`, which need not exist, and remove what a run that was killed left unfinished.

    Args:
        out: the folder.
        resume: keep what such a run has left, if it can be resumed.
        force: remove it even so.

    Raises:
        InputError: another run is writing to it, no lock can be made there, or what was left can be resumed and neither
            was asked for.
    """
    lock = _lock_of(out)
    made = [parent for parent in lock.parents if not parent.exists()]
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = _locked(lock, out)
        try:
            _bring_back(out)
            journal = journal_of(out)
            if journal.exists():
                read_journal(journal)
                if not resume and not force:
                    raise InputError(
                        f"an unfinished run has left {journal}: go on with --resume, or start again with --force"
                    )
            if force or not journal.exists():
                _remove_leftovers(out, lock)
            yield
        finally:
            # While it is held: whoever opens it from now on makes a new one.
            lock.unlink(missing_ok=True)
            os.close(handle)
    finally:
        for parent in made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()


def _locked(lock: Path, out: Path) -> int:
    """An open, locked file at `lock`."""
    while True:
        try:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise InputError(f"{lock} cannot be made ({error.strerror}): choose another folder") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise InputError(f"another run is writing to {out}: wait for it, or choose another folder") from error
        except OSError as error:
            os.close(handle)
            raise InputError(f"{lock} cannot be locked ({error.strerror}): choose a folder on a local disk") from error
        if _is_at(handle, lock):
            return handle
        os.close(handle)  # of a run that has just ended and removed it


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _remove_leftovers(out: Path, lock: Path) -> None:
    """Remove what a run that was killed has left of what it wrote.

    Raises:
        InputError: a folder or a file of such a name is none that this program has made.
    """
    for staging, journal in _places(out):
        ours = journal.exists() and bool(read_journal(journal))
        if staging.is_dir() and not staging.is_symlink() and (ours or lock.read_bytes() == _mark(staging)):
            shutil.rmtree(staging)
        elif staging.is_dir() and not any(staging.iterdir()):
            staging.rmdir()  # killed before it was marked
        elif os.path.lexists(staging):
            raise InputError(f"{staging} is in the way, and none that this program has made: move it elsewhere")
        journal.unlink(missing_ok=True)


def _mark(staging: Path) -> bytes:
    """What a lock file holds while what is written stands in the folder `staging`."""
    return f"{staging.name} {staging.stat().st_ino}".encode()


def read_journal(file: Path) -> tuple[dict[str, Any], list[bytes]]:
    """The first line of a journal, as JSON, and its other lines; one that was cut short is left out.

    Raises:
        InputError: by its first line, it is no journal of this program.
    """
    lines = file.read_bytes().split(b"\n")[:-1]
    try:
        head = json.loads(lines[0])
        if not (isinstance(head["parts"], dict) and isinstance(head["replace"], bool)):
            raise ValueError
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"{file} is damaged, or no journal of this program: move it elsewhere") from error
    return head, lines[1:]


def _bring_back(out: Path) -> None:
    """Put a checkpoint back that was to be replaced when the run was killed; one that has been replaced goes."""
    old = _old(out)
    if not _is_ours(old):
        return
    if out.exists():
        shutil.rmtree(old)
    elif not journal_of(out).exists():
        old.rename(out)


def _old(out: Path) -> Path:
    """Where a checkpoint is for the moment in which another takes its place."""
    return out.parent / f".{out.name}.mlp_fusion_replaced"


@contextmanager
def appears_when_complete(out: Path, *, keep: bool = False, replace: bool = False) -> Iterator[Path]:
    """A folder to write into, whose content is that of `out` at the end, or vanishes on any error or interrupt.

    To be called with `out` taken.

    Args:
        out: the folder.
        keep: where there is a journal, what is written stays on errors, to go on with.
        replace: a checkpoint that was fused by this program may stand there, and gives way at the end.
    """
    staging = staging_of(out)
    filled = staging.parent == out
    moved: list[Path] = []
    try:
        staging.mkdir(exist_ok=journal_of(out).exists())
        _lock_of(out).write_bytes(_mark(staging))
        yield staging
        check_output(out, replace=replace)
        if filled:
            for path in staging.iterdir():
                if (out / path.name).exists():
                    raise InputError(f"{out / path.name} is in the way of what is to be written: move it elsewhere")
            # The config last: without it, nobody takes the folder for a checkpoint.
            for path in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):
                moved.append(out / path.name)
                path.rename(moved[-1])
            staging.rmdir()
        elif replace and out.is_dir() and any(out.iterdir()):
            out.rename(_old(out))
            staging.rename(out)
        else:
            # Replaces an empty folder in one step, and fails if one has been filled in the meantime.
            staging.rename(out)
        if _is_ours(_old(out)):
            shutil.rmtree(_old(out))
    except BaseException:
        for path in () if keep and journal_of(out).exists() else (*moved, staging):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        raise
