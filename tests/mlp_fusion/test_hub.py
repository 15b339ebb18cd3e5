"""Models named rather than given as a folder: the hub's answers are stood in for, the reading of them is not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import checkpoints as ck
import mlp_fusion
from mlp_fusion import InputError
from mlp_fusion.checkpoint import source as source_module

NAME = "someone/model"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint that the stand-in for the hub serves under `NAME`."""
    folder = ck.save_tiny(tmp_path / "hub")
    local = source_module.read_headers(folder)

    def metadata(name: str) -> Any:
        assert name == NAME
        tensors = {k: SimpleNamespace(shape=list(t.shape), dtype=t.dtype) for k, t in local.tensors.items()}
        return SimpleNamespace(files_metadata={"model.safetensors": SimpleNamespace(tensors=tensors)})

    def download(name: str, allow_patterns: list[str]) -> str:
        assert name == NAME
        assert "*.safetensors" in allow_patterns
        assert not any("bin" in pattern for pattern in allow_patterns)
        return str(folder)

    read = source_module.read_config
    monkeypatch.setattr(source_module, "get_safetensors_metadata", metadata)
    monkeypatch.setattr(source_module, "snapshot_download", download)
    monkeypatch.setattr(source_module, "read_config", lambda name: read(folder if name == NAME else name))
    return folder


def test_plan_by_name_is_the_plan_of_the_folder(hub: Path) -> None:
    by_name, by_folder = mlp_fusion.plan(NAME, 16), mlp_fusion.plan(hub, 16)
    assert {**by_name.to_dict(), "name": ""} == {**by_folder.to_dict(), "name": ""}


def test_compress_by_name(hub: Path, tmp_path: Path) -> None:
    mlp_fusion.compress(NAME, tmp_path / "out", 16)
    assert mlp_fusion.verify(tmp_path / "out").passed
    assert f"base_model: {NAME}" in (tmp_path / "out" / "README.md").read_text()


def test_output_inside_the_source_is_refused(hub: Path) -> None:
    with pytest.raises(InputError, match="lies inside"):
        mlp_fusion.compress(hub, hub / "smaller", 16)
    assert not (hub / "smaller").exists()


def test_names_that_fail(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_safetensors(name: str) -> Any:
        raise source_module.NotASafetensorsRepoError("none")

    def unreachable(name: str, **_: Any) -> Any:
        raise OSError("no route")

    monkeypatch.setattr(source_module, "get_safetensors_metadata", no_safetensors)
    with pytest.raises(InputError, match="pickles are refused"):
        mlp_fusion.plan(NAME, 16)
    monkeypatch.setattr(source_module, "get_safetensors_metadata", unreachable)
    with pytest.raises(InputError, match=r"neither a folder here nor reachable on the hub \(no route\)"):
        mlp_fusion.plan(NAME, 16)
    monkeypatch.setattr(source_module, "snapshot_download", unreachable)
    with pytest.raises(InputError, match="neither a folder here nor reachable"):
        source_module.local_folder(NAME)
