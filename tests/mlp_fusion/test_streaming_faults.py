"""Damaged sources and failing disks, while streamed: one line says what to do, and nothing is lost or half-written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from streams import files, sharded_mixtral
from torch import Tensor

import checkpoints as ck
import mlp_fusion
from mlp_fusion import InputError
from mlp_fusion.store import shards as shards_module
from mlp_fusion.streaming import tasks

pytestmark = pytest.mark.slow

_EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
_INDEX = "model.safetensors.index.json"

#: Damages a copy of the source.
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts in several shards, with a tokenizer."""
    return sharded_mixtral(tmp_path_factory.mktemp("mixtral") / "source", 2)


@pytest.fixture
def source(mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to damage, worked on in several tasks."""
    monkeypatch.setattr(tasks, "TASK_BYTES", 60_000)
    return ck.copy(mixtral, tmp_path / "source")


def holder(folder: Path, name: str = _EXPERT) -> Path:
    """The shard with a tensor."""
    shard: str = json.loads((folder / _INDEX).read_text())["weight_map"][name]
    return folder / shard


def change(folder: Path, name: str, new: Callable[[Tensor], Tensor]) -> None:
    file = holder(folder, name)
    held = load_file(file)
    save_file(held | {name: new(held[name])}, file, metadata={"format": "pt"})


def map_to(folder: Path, name: str, shard: str) -> None:
    index = json.loads((folder / _INDEX).read_text())
    index["weight_map"][name] = shard
    (folder / _INDEX).write_text(json.dumps(index))


def refused(source: Path, out: Path, **options: Any) -> str:
    """The one line that a run ends with; nothing has appeared under its name, and the source is as it was."""
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in source.iterdir() if path.exists()}
    with pytest.raises(InputError) as caught:
        mlp_fusion.compress(source, out, 0.5, stream=True, **options)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in source.iterdir() if path.exists()} == before
    assert not out.exists()
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- the source ------------------------------------------------------------------------------------------------------


def _gone(folder: Path) -> None:
    holder(folder).unlink()


def _cut(folder: Path) -> None:
    os.truncate(holder(folder), holder(folder).stat().st_size - 4)


def _cut_in_the_header(folder: Path) -> None:
    os.truncate(holder(folder), 20)


def _other_bytes(folder: Path) -> None:
    data = holder(folder).read_bytes()
    holder(folder).write_bytes(data[:8] + b"\xff" * 40 + data[48:])


def _endless_header(folder: Path) -> None:
    data = holder(folder).read_bytes()
    holder(folder).write_bytes(b"\xff" * 7 + b"\x00" + data[8:])


def _in_two_shards(folder: Path) -> None:
    other = holder(folder, "lm_head.weight")
    save_file(load_file(other) | {_EXPERT: load_file(holder(folder))[_EXPERT]}, other, metadata={"format": "pt"})


def _twice_in_a_header(folder: Path) -> None:
    data = holder(folder).read_bytes()
    length = int.from_bytes(data[:8], "little")
    entry = json.dumps({_EXPERT: json.loads(data[8 : 8 + length])[_EXPERT]})[1:-1].encode()
    text = data[8 : 8 + length].rstrip()[:-1] + b"," + entry + b"}"
    text += b" " * (-len(text) % 8)
    holder(folder).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def _integers(folder: Path) -> None:
    change(folder, _EXPERT, lambda t: t.to(torch.int8))


def _without_factors(folder: Path) -> None:
    change(folder, _EXPERT, lambda t: t.to(torch.float8_e4m3fn))


def _nan(folder: Path) -> None:
    change(folder, _EXPERT, lambda t: t.index_fill(1, torch.tensor([5]), torch.nan))


def _infinite(folder: Path) -> None:
    change(folder, _EXPERT.replace("w1", "w2"), lambda t: t.index_fill(1, torch.tensor([5]), torch.inf))


def _uneven(folder: Path) -> None:
    change(folder, _EXPERT, lambda t: t[:-8].contiguous())


def _take_out(folder: Path, name: str) -> None:
    file = holder(folder, name)
    save_file({k: t for k, t in load_file(file).items() if k != name}, file, metadata={"format": "pt"})
    index = json.loads((folder / _INDEX).read_text())
    del index["weight_map"][name]
    (folder / _INDEX).write_text(json.dumps(index))


def _expert_gone(folder: Path) -> None:
    _take_out(folder, _EXPERT)


def _attention_gone(folder: Path) -> None:
    _take_out(folder, "model.layers.1.self_attn.q_proj.weight")


def _above(folder: Path) -> None:
    holder(folder).rename(folder.parent / "x.safetensors")
    map_to(folder, _EXPERT, "../x.safetensors")


def _absolute(folder: Path) -> None:
    map_to(folder, _EXPERT, str(holder(folder).resolve()))


def _link_to_nothing(folder: Path) -> None:
    file = holder(folder)
    file.unlink()
    file.symlink_to(folder.parent / "nowhere.safetensors")


def _no_json(folder: Path) -> None:
    (folder / _INDEX).write_text("{")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_gone, "is missing, though model.safetensors.index.json names it: fetch it again"),
        (_link_to_nothing, "is missing, though model.safetensors.index.json names it: fetch it again"),
        (_cut, "damaged or cut short"),
        (_cut_in_the_header, "damaged or cut short"),
        (_other_bytes, "damaged or cut short"),
        (_endless_header, "damaged or cut short"),
        (_in_two_shards, f"tensor {_EXPERT} is in "),
        (_twice_in_a_header, f"{_EXPERT} is in its header twice"),
        (_integers, f"{_EXPERT} is stored as I8: start from the unquantised checkpoint"),
        (_without_factors, f"{_EXPERT} is stored as F8_E4M3: start from the unquantised checkpoint"),
        (_nan, f"{_EXPERT} holds NaN or Inf: the checkpoint is damaged"),
        (_infinite, f"{_EXPERT.replace('w1', 'w2')} holds NaN or Inf: the checkpoint is damaged"),
        (_uneven, f"{_EXPERT} is (56, 64), and its likes are (64, 64): the checkpoint is damaged"),
        (_expert_gone, f"expert 2 has no tensor beside {_EXPERT.replace('2.w1', '0.w1')}: the checkpoint is damaged"),
        (_attention_gone, "model.layers.1.self_attn.q_proj.weight is missing: the checkpoint is incomplete"),
        (_above, "shard '../x.safetensors' is no safetensors file beside the index"),
        (_absolute, "is no safetensors file beside the index"),
        (_no_json, "not a safetensors index"),
    ],
)  # fmt: skip
def test_damaged_sources(damage: Damage, words: str, source: Path, tmp_path: Path) -> None:
    damage(source)
    assert words in refused(source, tmp_path / "out")
    assert not [path.name for path in tmp_path.iterdir() if path.suffix == ".lock"]


def test_a_source_that_becomes_shorter_while_it_is_read(source: Path, tmp_path: Path) -> None:
    def cut(done: int, _total: int) -> None:
        _cut_in_the_header(source)

    with pytest.raises(InputError, match="has become shorter while it was read: fetch it again"):
        mlp_fusion.compress(source, tmp_path / "out", 0.5, stream=True, progress=cut)
    assert not (tmp_path / "out").exists()


def test_an_ffn_of_several_floating_point_dtypes_is_read_as_the_widest(source: Path, tmp_path: Path) -> None:
    change(source, _EXPERT, lambda t: t.float())
    for stream in (False, True):
        mlp_fusion.compress(source, tmp_path / str(stream), 0.5, stream=stream, unmeasured=True)
    memory, streamed = ck.tensors(tmp_path / "False"), ck.tensors(tmp_path / "True")
    assert all(torch.equal(memory[name].to(streamed[name].dtype), streamed[name]) for name in memory)
    assert streamed[_EXPERT].dtype == torch.float32


@pytest.mark.parametrize("learnt", [False, True])
def test_nan_in_an_expert_is_named_with_text_too(learnt: bool, source: Path, tmp_path: Path) -> None:
    _nan(source)
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on a mat\n" * 20)
    message = refused(source, tmp_path / "out", **({"calibration": text} if learnt else {}))
    assert message == f"{_EXPERT} holds NaN or Inf: the checkpoint is damaged"


def test_shards_that_are_links_stay_what_they_are(source: Path, tmp_path: Path) -> None:
    """As in the cache of the hub's library: they are read, and what is written are files."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for file in list(source.iterdir()):
        file.rename(blobs / file.name)
        file.symlink_to(Path("../blobs") / file.name)
    before = files(blobs)
    mlp_fusion.compress(source, tmp_path / "out", 0.5, stream=True)
    assert files(blobs) == before
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


# --- the target ------------------------------------------------------------------------------------------------------


def test_a_full_disk_before_the_work(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs(tmp_path)
    monkeypatch.setattr(shards_module.os, "statvfs", lambda _path: os.statvfs_result((*real[:4], 3, *real[5:])))
    message = refused(source, tmp_path / "out")
    assert "GB are free: make room, or choose another disk" in message


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fails_in_the_middle(
    number: int, call: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, calls = getattr(os, call), []

    def fails(*args: Any) -> Any:
        calls.append(args)
        if len(calls) >= 7:
            raise OSError(number, os.strerror(number))
        return own(*args)

    with monkeypatch.context() as patch:
        patch.setattr(shards_module.os, call, fails)
        message = refused(source, tmp_path / "out")
    assert os.strerror(number) in message
    assert message.endswith("once that is mended, --resume goes on")
    mlp_fusion.compress(source, tmp_path / "out", 0.5, stream=True, resume=True)
    assert mlp_fusion.verify(tmp_path / "out", source).passed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert calls


def test_a_target_that_is_read_only(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    target.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != target)
    assert refused(source, target / "out") == f"{target} cannot be written to: choose another folder"
    assert not list(target.iterdir())


def test_another_process_on_the_same_output(source: Path, tmp_path: Path) -> None:
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / ".out.lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdin is not None
    assert other.stdout is not None
    try:
        assert other.stdout.readline()
        message = refused(source, tmp_path / "out")
        assert message == f"another run is writing to {tmp_path / 'out'}: wait for it, or choose another folder"
        assert not (tmp_path / ".out.partial").exists()
    finally:
        other.communicate(b"\n")
    mlp_fusion.compress(source, tmp_path / "out", 0.5, stream=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
