"""Models named rather than given as a folder: the hub's answers are stood in for, the reading of them is not."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from hub_server import serving
from moe_models import moe_model
from safetensors.torch import save_file

import checkpoints as ck
import mlp_fusion
from families import tiny_model
from mlp_fusion import InputError
from mlp_fusion.store import source as source_module
from mlp_fusion.verbs.families import find_ffns

pytestmark = pytest.mark.slow

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


def test_a_misspelt_model_type_is_said_to_be_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str, **_: Any) -> Any:
        raise OSError("no route")

    monkeypatch.setattr(source_module.AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(InputError, match=r"which `mlp-fusion families` lists; brt: no folder here.*no route") as caught:
        find_ffns("brt")
    assert "\n" not in str(caught.value)


# --- the cache, without a network ------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, and nothing reachable behind it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def cached(cache: Path, name: str, **options: Any) -> Path:
    """Put a model into the cache as the hub's library lays it out; its snapshot."""
    commit = hashlib.sha1(name.encode()).hexdigest()
    repository = cache / f"models--{name.replace('/', '--')}"
    original = ck.add_tokenizer(
        ck.save_tiny(repository / "original", **options), pad_token="<pad>", eos_token="</s>"
    )  # fmt: skip
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for file in original.iterdir():
        file.rename(repository / "blobs" / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return snapshot


@pytest.mark.parametrize("name", ["tiny", "someone/tiny"])
@pytest.mark.parametrize("offline", [True, False])
def test_what_is_in_the_cache_needs_no_network(
    name: str, offline: bool, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = cached(cache, name)
    if not offline:

        def no_route(*_: Any, **__: Any) -> Any:
            raise source_module.HfHubHTTPError.__bases__[0]("no route")

        for function in ("get_safetensors_metadata", "snapshot_download"):
            monkeypatch.setattr(source_module, function, no_route)
    expected = mlp_fusion.plan(snapshot, 16)
    assert mlp_fusion.plan(name, 16).to_dict() == {**expected.to_dict(), "name": name}
    mlp_fusion.compress(name, tmp_path / "out", 16)
    assert mlp_fusion.verify(tmp_path / "out").passed
    assert f"base_model: {name}" in (tmp_path / "out" / "README.md").read_text()


def test_a_model_loaded_by_its_name_finds_its_tokenizer(cache: Path, tmp_path: Path) -> None:
    cached(cache, "tiny")
    (tmp_path / "sentences.txt").write_text("the cat sat\na cat\n" * 8)
    model = transformers.AutoModelForSequenceClassification.from_pretrained("tiny")
    report = mlp_fusion.fuse(model, 16, calibration="sentences.txt")
    assert report.calibration is not None
    assert report.calibration.tokens == 8 * 5
    data = [{"text": "the cat", "label": 0}, {"text": "a cat sat", "label": 1}]
    options: dict[str, Any] = {"task": "classification", "epochs": 1.0, "device": "cpu"}
    mlp_fusion.finetune(model, tmp_path / "tuned", data, **options)
    mlp_fusion.finetune("tiny", tmp_path / "named", data, teacher=tmp_path / "tuned", original=None, **options)
    assert (tmp_path / "tuned" / "tokenizer.json").is_file()


def test_names_that_are_nowhere(cache: Path, tmp_path: Path) -> None:
    for command in (lambda: mlp_fusion.plan("someone/absent", 16), lambda: source_module.local_folder("absent")):
        with pytest.raises(InputError, match="reachable on the hub") as caught:
            command()
        assert "\n" not in str(caught.value)
    model = tiny_model("bert")
    for name, words in (("absent", "absent: its tokenizer cannot be loaded"), ("/gone", "not loaded from a folder")):
        model.name_or_path = name
        with pytest.raises(InputError, match=words):
            mlp_fusion.fuse(model, 16, calibration=["the cat"])


def test_half_a_model_in_the_cache_is_none(cache: Path) -> None:
    snapshot = cached(cache, "tiny")
    (snapshot / ck.WEIGHTS).unlink()
    with pytest.raises(InputError, match=r"no model\.safetensors and no"):
        mlp_fusion.plan("tiny", 16)


def test_shards_elsewhere_on_the_hub_are_refused(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = SimpleNamespace(files_metadata={"part1/model.safetensors": SimpleNamespace(tensors={})})
    monkeypatch.setattr(source_module, "get_safetensors_metadata", lambda name: content)
    with pytest.raises(InputError, match=r"shard 'part1/model\.safetensors' is no safetensors file beside the index"):
        mlp_fusion.plan(NAME, 16)


# --- a server that stands in for it ----------------------------------------------------------------------------------

_PLANS = """
import json, mlp_fusion, sys
for name in sys.argv[1:]:
    print(json.dumps(mlp_fusion.plan(name, 0.5).to_dict()))
"""


def _in_fp8(folder: Path) -> None:
    """Experts in FP8, with a factor for each block of 32 x 32."""
    written = {}
    for name, tensor in ck.tensors(folder).items():
        if ".experts." not in name:
            written[name] = tensor
            continue
        written[name] = tensor.to(torch.float8_e4m3fn)
        written[f"{name}_scale_inv"] = torch.ones(tensor.shape[0] // 32, tensor.shape[1] // 32)
    save_file(written, folder / ck.WEIGHTS, metadata={"format": "pt"})
    ck.edit_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [32, 32]})


def test_a_plan_reads_headers_from_the_hub_and_no_weights(tmp_path: Path) -> None:
    """One file, several shards, and FP8; the real client, against a server here."""
    words = {"vocab_size": 12_000}
    moe_model("MixtralConfig", **words).save_pretrained(tmp_path / "some" / "sharded", max_shard_size="400KB")
    moe_model("Qwen3MoeConfig", **words).save_pretrained(tmp_path / "some" / "fp8")
    _in_fp8(tmp_path / "some" / "fp8")
    moe_model("DeepseekV3Config", **words).save_pretrained(tmp_path / "some" / "whole")
    names = ["some/sharded", "some/fp8", "some/whole"]
    weights = {str(file.relative_to(tmp_path)): file.stat().st_size for file in tmp_path.rglob("*.safetensors")}
    assert len(weights) > 4
    home = tmp_path / "home"
    with serving(tmp_path) as hub:
        told = {
            "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
        }  # fmt: skip
        run = subprocess.run(
            [sys.executable, "-c", _PLANS, *names], env={**os.environ, **told}, capture_output=True, text=True
        )
    assert run.returncode == 0, run.stderr
    for line, name in zip(run.stdout.splitlines(), names, strict=True):
        found, expected = json.loads(line), mlp_fusion.plan(tmp_path / name, 0.5).to_dict()
        for estimated in ("name", "seconds", "peak_bytes"):
            del found[estimated], expected[estimated]
        assert found == json.loads(json.dumps(expected))
    # Of every file of weights its beginning, once, and it is not kept.
    assert {file for file in hub.sent if file.endswith(".safetensors")} == set(weights)
    assert all(hub.sent[file] <= 100_001 for file in weights)
    assert sum(weights.values()) > 8 * sum(hub.sent[file] for file in weights)
    assert not [file for file in home.rglob("*") if file.is_file() and file.stat().st_size > 50_000]
