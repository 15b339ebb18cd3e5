"""What is left of streamed runs that were stopped, and what becomes of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from streams import StoppedError, files, sharded_mixtral, stop_after

import checkpoints as ck
import mlp_fusion
from mlp_fusion import InputError
from mlp_fusion.streaming import tasks
from mlp_fusion.streaming.work import Work

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts in several shards, with a tokenizer."""
    return sharded_mixtral(tmp_path_factory.mktemp("mixtral") / "source", 3)


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "TASK_BYTES", 60_000)


def stopped(source: Path, out: Path, after: int, **options: Any) -> None:
    with pytest.raises(StoppedError):
        mlp_fusion.compress(source, out, 0.5, stream=True, progress=stop_after(after), **options)


def _lost(staging: Path) -> None:
    shutil.rmtree(staging)


def _one_lost(staging: Path) -> None:
    sorted(staging.glob("*.safetensors"))[2].unlink()


def _cut(staging: Path) -> None:
    file = sorted(staging.glob("*.safetensors"))[2]
    file.write_bytes(file.read_bytes()[:3000])


def _scales_lost(staging: Path) -> None:
    (staging / ck.SCALE).unlink()


@pytest.mark.parametrize("damage", [_lost, _one_lost, _cut, _scales_lost])
def test_a_journal_without_its_files_is_not_believed(
    damage: Callable[[Path], None], source: Path, tmp_path: Path
) -> None:
    stopped(source, tmp_path / "out", 4)
    damage(tmp_path / ".out.partial")
    with pytest.raises(InputError, match="of the unfinished run, is missing or damaged: start again with --force"):
        mlp_fusion.compress(source, tmp_path / "out", 0.5, stream=True, resume=True)
    mlp_fusion.compress(source, tmp_path / "out", 0.5, stream=True, force=True)
    assert mlp_fusion.verify(tmp_path / "out", source).passed


def test_a_folder_made_in_the_meantime_does_not_hide_an_unfinished_run(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    mlp_fusion.compress(source, tmp_path / "whole", 0.5, stream=True)
    stopped(source, out, 4)
    out.mkdir()
    with pytest.raises(InputError, match="an unfinished run has left"):
        mlp_fusion.compress(source, out, 0.5, stream=True)
    mlp_fusion.compress(source, out, 0.5, resume=True)  # what can be resumed was streamed
    assert files(out) == files(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_the_dtype_belongs_to_the_recipe(source: Path, tmp_path: Path) -> None:
    stopped(source, tmp_path / "out", 4)
    with pytest.raises(InputError, match="the unfinished run had another recipe"):
        mlp_fusion.compress(source, tmp_path / "out", 0.5, stream=True, resume=True, dtype="float32")


def test_hidden_states_of_another_run_are_not_used(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(["the cat sat on a mat", "a big dog ran over the mat"] * 12))
    learning: dict[str, Any] = {"calibration": text}
    mlp_fusion.compress(source, tmp_path / "whole", 0.5, stream=True, **learning)
    assert mlp_fusion.verify(tmp_path / "whole", source).passed
    assert mlp_fusion.verify(tmp_path / "whole").passed
    stopped(source, tmp_path / "out", 2, method="prune", **learning)
    stopped(source, tmp_path / "out", 1, force=True, **learning)
    states = next((tmp_path / ".out.partial").glob(".states*"), None)
    if states is not None:
        states.write_bytes(states.read_bytes()[:100])  # one that cannot be read counts for nothing
    mlp_fusion.compress(source, tmp_path / "out", 0.5, resume=True, **learning)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_what_is_no_part_of_a_checkpoint_is_not_replaced(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    mlp_fusion.compress(source, out, 0.25, stream=True)
    ck.copy(source, out / "original")
    for stream in (False, True):
        with pytest.raises(InputError, match=r"out/original would be lost: it is nothing that this program writes"):
            mlp_fusion.compress(out / "original", out, 0.5, stream=stream, force=True)
    assert (out / "original" / "config.json").is_file()


def test_a_checkpoint_that_was_being_replaced_comes_back(source: Path, tmp_path: Path) -> None:
    """Killed between the two renames, in memory: the old one has its name again, and nothing is lost unasked."""
    out = tmp_path / "out"
    mlp_fusion.compress(source, out, 0.25, stream=True)
    before = files(out)
    out.rename(tmp_path / ".out.mlp_fusion_replaced")
    with pytest.raises(InputError, match="exists and is not empty"):
        mlp_fusion.compress(source, out, 0.5, stream=True)
    assert files(out) == before


def test_files_of_somebody_else_are_in_the_way(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    stopped(source, out, 4)
    (out / "README.md").write_text("mine")
    with pytest.raises(InputError, match=r"out/README\.md is in the way of what is to be written"):
        mlp_fusion.compress(source, out, 0.5, stream=True, resume=True)
    (out / "README.md").rename(tmp_path / "README.md")
    mlp_fusion.compress(source, out, 0.5, stream=True, resume=True)
    assert mlp_fusion.verify(out, source).passed


def test_a_mount_point_is_not_replaced(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    mlp_fusion.compress(source, out, 0.25, stream=True)
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == out)
    with pytest.raises(InputError, match="out cannot be replaced"):
        mlp_fusion.compress(source, out, 0.5, stream=True, force=True)


def test_weights_that_were_never_written_are_seen(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    mlp_fusion.compress(source, out, 0.5, stream=True)
    ck.put_scales(out, {name: torch.zeros_like(scale) for name, scale in ck.scales(out).items()})
    assert not mlp_fusion.verify(out).passed


def test_folders_of_somebody_else_beside_the_output_stay(source: Path, tmp_path: Path) -> None:
    for name in (".out.old", ".out.mlp_fusion_replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("mine")
    mlp_fusion.compress(source, tmp_path / "out", 0.25, stream=True)
    assert (tmp_path / ".out.old" / "thesis.txt").read_text() == "mine"
    assert (tmp_path / ".out.mlp_fusion_replaced" / "thesis.txt").read_text() == "mine"


def test_products_are_exact_in_all_threads_and_the_setting_comes_back(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting: Any = torch.backends.mkldnn.matmul
    before, seen = setting.fp32_precision, []
    reduce = Work.reduce

    def watched(self: Work, *args: Any) -> Any:
        seen.append(setting.fp32_precision)
        return reduce(self, *args)

    monkeypatch.setattr(Work, "reduce", watched)
    setting.fp32_precision = "bf16"
    try:
        mlp_fusion.compress(source, tmp_path / "out", 0.5, stream=True)
        assert set(seen) == {"ieee"}
        assert setting.fp32_precision == "bf16"
    finally:
        setting.fp32_precision = before
