"""The folder that is written: one run at a time, all or nothing, whatever kind of folder it is."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import checkpoints as ck
import mlp_fusion
from mlp_fusion import InputError, cli
from mlp_fusion.store import output as output_module
from mlp_fusion.store.output import appears_when_complete, check_output, taken
from mlp_fusion.verbs import compress as compress_module

pytestmark = pytest.mark.slow

TWO = [{"text": "the cat", "label": 0}, {"text": "a cat sat", "label": 1}]


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def fill(out: Path, *names: str, also: str | None = None) -> None:
    """Fill `out` with files of these names; `also` is made by somebody else in the meantime."""
    with taken(out), appears_when_complete(out) as staging:
        for name in names:
            (staging / name).write_text("ours")
        if also is not None:
            (out / also).write_text("theirs")


@pytest.fixture
def mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is a mount point: nothing can be renamed over it."""
    out = tmp_path / "volume"
    out.mkdir()
    rename = Path.rename

    def renamed(self: Path, target: Any) -> Path:
        if Path(target) == out:
            raise OSError(errno.EBUSY, "Device or resource busy", str(out))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    return out


def test_a_mount_point_is_filled(source: Path, fused: Path, mounted: Path) -> None:
    (mounted / "lost+found").mkdir()
    mlp_fusion.compress(source, mounted, 16)
    (mounted / "lost+found").rmdir()
    assert tree(mounted) == tree(fused)
    assert tree(mounted.parent) == ["volume", *(f"volume/{path}" for path in tree(fused))]
    assert mlp_fusion.verify(mounted).passed


def test_the_working_folder_is_filled(source: Path, fused: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    mlp_fusion.compress(source, ".", 16)
    assert tree(Path.cwd()) == tree(fused)


def test_a_folder_keeps_its_permissions(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o750)
    mlp_fusion.compress(source, tmp_path / "out", 16)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("moves", [0, 2])
def test_an_interrupted_move_leaves_the_mount_point_empty(moves: int, mounted: Path, monkeypatch: Any) -> None:
    rename, done = Path.rename, []

    def interrupted(self: Path, target: Any) -> Path:
        if len(done) == moves:
            raise KeyboardInterrupt
        done.append(target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fill(mounted, "config.json", "a", "z")
    assert len(done) == moves
    assert all(Path(target).name != "config.json" for target in done)
    assert tree(mounted) == []


def test_a_mount_point_filled_in_the_meantime_is_left_alone(mounted: Path) -> None:
    with pytest.raises(InputError, match="is not empty"):
        fill(mounted, "config.json", also="config.json")
    assert (mounted / "config.json").read_text() == "theirs"
    assert tree(mounted) == ["config.json"]


def test_a_folder_that_cannot_be_written_to_is_met_at_the_start(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "out")
    with pytest.raises(InputError, match=f"{tmp_path / 'out'} cannot be written to"):
        check_output(tmp_path / "out")
    # The folder above need not be writable.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) == tmp_path / "out")
    check_output(tmp_path / "out")
    with taken(tmp_path / "out"):
        assert tree(tmp_path) == ["out", "out/.mlp_fusion.lock"]
    assert tree(tmp_path) == ["out"]


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "x" * 250])
def test_names_that_no_folder_can_have(name: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="choose another") as caught:
        mlp_fusion.compress(source, tmp_path / name, 16)
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == []


# --- two runs --------------------------------------------------------------------------------------------------------


def second_compress(source: Path, out: Path) -> None:
    mlp_fusion.compress(source, out, 16)


def second_finetune(source: Path, out: Path) -> None:
    mlp_fusion.finetune(source, out, TWO, task="classification", device="cpu")


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("second", [second_compress, second_finetune])
def test_a_second_run_fails_at_once(
    second: Callable[[Path, Path], None], exists: bool, source: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    out, messages = tmp_path / "out", []
    if exists:
        out.mkdir()

    def meanwhile(done: int, _total: int) -> None:
        if not messages:
            with monkeypatch.context() as patch:
                # It must not even load the model.
                patch.setattr(compress_module, "_load", None)
                patch.setattr("mlp_fusion.finetuning.run.load_student", None)
                with pytest.raises(InputError) as caught:
                    second(source, out)
            messages.append(str(caught.value))

    mlp_fusion.compress(source, out, 16, progress=meanwhile)
    assert messages == [f"another run is writing to {out}: wait for it, or choose another folder"]
    assert mlp_fusion.verify(out).passed
    assert tree(tmp_path)[0] == "out"


def test_runs_beside_one_another_do_not_meet(source: Path, tmp_path: Path) -> None:
    with taken(tmp_path / "one"):
        mlp_fusion.compress(source, tmp_path / "other", 16)
    assert mlp_fusion.verify(tmp_path / "other").passed


def test_a_lock_that_was_removed_while_it_was_waited_for(tmp_path: Path, monkeypatch: Any) -> None:
    """A run ends between another one's opening its lock and locking it: the other makes a new one."""
    lock, flock, opened = tmp_path / ".out.lock", fcntl.flock, []

    def ends(handle: int, how: int) -> None:
        if not opened:
            lock.unlink()
        opened.append(handle)
        flock(handle, how)

    monkeypatch.setattr(output_module.fcntl, "flock", ends)
    with taken(tmp_path / "out"):
        assert len(opened) == 2
        assert lock.is_file()
    assert tree(tmp_path) == []


# --- after a kill ----------------------------------------------------------------------------------------------------


def killed(out: Path, lock: Path) -> None:
    """Leave what a process leaves that is killed while it writes."""
    if not os.fork():
        try:
            with taken(out), appears_when_complete(out) as staging:
                (staging / ck.WEIGHTS).write_bytes(b"half")
                os._exit(0)
        finally:
            os._exit(1)
    os.wait()
    assert lock.is_file()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_what_a_killed_run_left_is_removed(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.v1"
    others = [".out.partial", ".outxv1.partial", ".out.v1.mine.partial", ".out.v10.partial", ".out.v1.0123abcd.partial"]
    for name in others:
        (tmp_path / name).mkdir()
        (tmp_path / name / ck.WEIGHTS).write_bytes(b"half")
    killed(out, tmp_path / ".out.v1.lock")
    assert tree(tmp_path / ".out.v1.partial") == [ck.WEIGHTS]
    mlp_fusion.compress(source, out, 16)
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "out.v1"])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_what_a_killed_run_left_in_a_mount_point_is_removed(source: Path, fused: Path, mounted: Path) -> None:
    killed(mounted, mounted / ".mlp_fusion.lock")
    assert (mounted / ".mlp_fusion.partial" / ck.WEIGHTS).is_file()
    mlp_fusion.compress(source, mounted, 16)
    assert tree(mounted) == tree(fused)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("killed_before", [False, True])
def test_a_folder_of_somebody_else_of_such_a_name(
    killed_before: bool, stream: bool, source: Path, tmp_path: Path
) -> None:
    out, theirs = tmp_path / "out", tmp_path / ".out.partial"
    if killed_before:
        killed(out, tmp_path / ".out.lock")
        theirs.rename(tmp_path / "elsewhere")
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(InputError, match=r"\.out\.partial is in the way, and none that this program has made"):
            mlp_fusion.compress(source, out, 16, stream=stream, force=force)
    assert tree(theirs) == ["thesis.txt"]
    (theirs / "thesis.txt").unlink()
    mlp_fusion.compress(source, out, 16, stream=stream)  # nothing is lost
    assert mlp_fusion.verify(out).passed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_clean_up(
    number: signal.Signals, source: Path, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)}

    def end(*_: Any) -> None:
        assert (tmp_path / ".out.partial").is_dir()
        try:
            os.kill(os.getpid(), number)
        finally:
            # They come in twos: the second finds nobody listening.
            os.kill(os.getpid(), number)

    monkeypatch.setattr(compress_module, "_write_card", end)
    monkeypatch.setattr(sys, "argv", ["mlp-fusion", "compress", str(source), str(tmp_path / "out"), "--width", "16"])
    try:
        for n in before:  # whoever runs the tests may ignore them, as nohup does
            signal.signal(n, signal.SIG_DFL)
        with pytest.raises(SystemExit) as exit_:
            cli.main()
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
    assert exit_.value.code == 130
    assert "interrupted; nothing was written" in capsys.readouterr().err
    assert tree(tmp_path) == []


def test_nohup_is_heeded(source: Path, monkeypatch: Any) -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.setattr(sys, "argv", ["mlp-fusion", "plan", str(source), "--width", "16", "--json"])
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        cli.main()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
