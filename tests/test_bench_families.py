"""The walk over all model types with text: what a line says of a type."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import mlp_fusion
from mlp_fusion import InputError

pytestmark = [pytest.mark.usefixtures("importable"), pytest.mark.slow]


@pytest.fixture(scope="module")
def walk(importable: None) -> ModuleType:
    return importlib.import_module("families_calibrated")


@pytest.fixture(scope="module")
def configs(walk: ModuleType) -> dict[str, Any]:
    types = json.loads((Path(__file__).parents[1] / walk.KNOWN).read_text(encoding="utf-8"))["types"]
    return {line["type"]: line["config"] for line in types if "config" in line}


def test_lines(walk: ModuleType, configs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [walk.one_type(name, configs[name], 60) for name in ("bert", "lxmert", "mobilebert")]
    assert [line["without"] for line in lines] == [[], ["gradients"], ["sequence"]]
    assert all((line["status"], line["method"]) == ("done", "merge") for line in lines)
    for error, status in ((InputError("no"), "refused"), (KeyError("x"), "failed"), (walk.TooLongError(), "too long")):

        def fuse(*_args: Any, _error: BaseException = error, **_options: Any) -> None:
            raise _error

        monkeypatch.setattr(mlp_fusion, "fuse", fuse)
        lines.append(walk.one_type("bert", configs["bert"], 60))
        assert lines[-1]["status"] == status

    def prepare(*_args: Any) -> None:
        raise InputError("timm is not there")

    monkeypatch.setattr(walk, "round_trips", lambda: SimpleNamespace(prepare=prepare, steps_of=dict))
    lines.append(walk.one_type("bert", configs["bert"], 60))
    assert lines[-1]["status"] == "no small model"
    found = walk.counts(lines)
    assert found["status"] == {"done": 3, "refused": 1, "failed": 1, "too long": 1, "no small model": 1}
    assert (found["types"], found["without"]) == (7, {"gradients": 1, "sequence": 1})
