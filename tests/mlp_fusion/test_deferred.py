"""What waits for an import: it runs once, after the module, and leaves no trace on it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from mlp_fusion import deferred


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "waited_for.py").write_text("VALUE = 3\n", encoding="utf-8")
    (tmp_path / "broken_one.py").write_text("raise RuntimeError('of its own')\n", encoding="utf-8")
    finders = list(sys.meta_path)
    yield
    sys.meta_path[:] = finders
    for name in ("waited_for", "broken_one"):
        sys.modules.pop(name, None)


def test_an_action_runs_once_the_module_is_there() -> None:
    seen: list[int] = []
    deferred.when_imported(lambda name: name == "waited_for", lambda module: seen.append(module.VALUE))
    assert seen == []
    spec = importlib.util.find_spec("waited_for")
    assert spec is not None
    assert spec.loader.get_source("waited_for") == "VALUE = 3\n"  # type: ignore[union-attr]
    module = importlib.import_module("waited_for")
    assert seen == [3]
    assert importlib.import_module("waited_for") is module
    assert seen == [3]
    assert type(module.__loader__).__name__ == "SourceFileLoader"
    assert module.__spec__ is not None
    assert module.__spec__.loader is module.__loader__


def test_what_is_imported_already_does_not_wait() -> None:
    importlib.import_module("waited_for")
    seen: list[str] = []
    deferred.when_imported(lambda name: name == "waited_for", lambda module: seen.append(module.__name__))
    assert seen == ["waited_for"]


def test_a_module_that_cannot_be_imported_raises_its_own_error() -> None:
    seen: list[ModuleType] = []
    deferred.when_imported(lambda name: name in ("broken_one", "not_there"), seen.append)
    with pytest.raises(RuntimeError, match="of its own"):
        importlib.import_module("broken_one")
    with pytest.raises(ModuleNotFoundError, match="not_there"):
        importlib.import_module("not_there")
    assert seen == []


def test_names_are_imported_when_they_are_asked_for() -> None:
    import mlp_fusion

    get = deferred.on_demand("mlp_fusion", {"InputError": "errors"})
    assert get("InputError") is mlp_fusion.InputError
    with pytest.raises(AttributeError, match="module 'mlp_fusion' has no attribute 'nonsense'"):
        get("nonsense")
    assert set(mlp_fusion.__all__) <= set(dir(mlp_fusion))
