"""bench/synthetic.py: what it writes is what transformers reads, with nothing missing and nothing left over."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

from mlp_fusion.store.quantised import reading_options

BENCH = Path(__file__).parents[1] / "bench"
#: Entries of every config that make it small; the rest of each is its own.
_SMALL: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
_NARROW: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {"head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
    "mixtral-8x7b": {"intermediate_size": 96, "num_local_experts": 4},
    "deepseek-v3": {
        "moe_intermediate_size": 32, "intermediate_size": 96, "n_routed_experts": 8, "n_group": 2, "topk_group": 1,
        "num_experts_per_tok": 2, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 16,
        "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    },
    "gpt-oss-20b": {"head_dim": 16, "intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def synthetic() -> Iterator[ModuleType]:
    """bench/synthetic.py, imported as Python does when it is run."""
    sys.path.insert(0, str(BENCH))
    try:
        yield importlib.import_module("synthetic")
    finally:
        sys.path.remove(str(BENCH))


def narrow(synthetic: ModuleType, layout: str, **options: Any) -> dict[str, Any]:
    """The config of a small checkpoint of the layout, with three layers."""
    return synthetic.configured(layout, 3, {**_SMALL, **_NARROW[layout]}, **options)


def test_every_layout_is_tried(synthetic: ModuleType) -> None:
    assert set(synthetic.LAYOUTS) == set(_NARROW)


@pytest.mark.parametrize(
    ("layout", "form"),
    [
        ("qwen3-30b-a3b", {}),
        ("mixtral-8x7b", {}),
        ("deepseek-v3", {}),
        ("deepseek-v3", {"quantised": True}),
        ("deepseek-v3", {"mtp": True}),
        ("gpt-oss-20b", {}),
        ("gpt-oss-20b", {"quantised": True}),
    ],
)
def test_transformers_reads_every_tensor(
    synthetic: ModuleType, tmp_path: Path, layout: str, form: dict[str, bool]
) -> None:
    config = narrow(synthetic, layout, **form)
    total = synthetic.write_checkpoint(layout, tmp_path, config, shard_bytes=50_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert shards == [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    assert len(shards) > 2
    assert index["metadata"]["total_size"] == total
    for shard in shards:
        with safe_open(tmp_path / shard, "pt") as file:
            assert {name for name, place in index["weight_map"].items() if place == shard} == set(file.keys())

    options = reading_options(transformers.AutoConfig.from_pretrained(tmp_path))
    model, found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, **options)
    # The model has no place for the layer behind its last one, which only drafting reads.
    ignored = {name for name in found["unexpected_keys"] if name.startswith("model.layers.3.")}
    assert bool(ignored) == form.get("mtp", False)
    found["unexpected_keys"] -= ignored
    assert not any(found.values()), found
    assert {parameter.dtype for parameter in model.parameters()} <= {torch.bfloat16, torch.float32}
    with torch.no_grad():
        logits = model(input_ids=torch.arange(8)[None], use_cache=False).logits
    assert bool(logits.isfinite().all())


def test_weights_are_drawn_by_name_and_unlike_each_other(synthetic: ModuleType, tmp_path: Path) -> None:
    config = narrow(synthetic, "qwen3-30b-a3b")
    for name, size in (("one", 10**9), ("many", 50_000)):
        synthetic.write_checkpoint("qwen3-30b-a3b", tmp_path / name, config, shard_bytes=size)

    def read(folder: Path) -> dict[str, torch.Tensor]:
        found = {}
        for path in folder.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                found.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        return found

    one, many = read(tmp_path / "one"), read(tmp_path / "many")
    assert all(torch.equal(tensor, many[name]) for name, tensor in one.items())
    experts = torch.stack([t.float().flatten() for name, t in one.items() if "experts" in name and "up_proj" in name])
    correlations = torch.corrcoef(experts).fill_diagonal_(0).abs()
    assert float(correlations.max()) < 0.2
    assert 0.018 < float(experts.std()) < 0.022


def test_what_cannot_be_written_is_said_before(
    synthetic: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = narrow(synthetic, "mixtral-8x7b")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"needs 0\.\d GB, and 0\.0 GB are free"):
        synthetic.write_checkpoint("mixtral-8x7b", tmp_path / "out", config)
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("b", encoding="utf-8")
    with pytest.raises(FileExistsError, match="not empty"):
        synthetic.write_checkpoint("mixtral-8x7b", tmp_path / "full", config)
    for layout, options, words in (
        ("mixtral-8x7b", {"quantised": True}, "published in bfloat16"),
        ("mixtral-8x7b", {"mtp": True}, "no layers for multi-token"),
        ("mixtral-8x7b", {"changes": {"width": 3}}, "has no width"),
        ("mixtral-8x7b", {"layers": 0}, "at least one"),
    ):
        with pytest.raises(ValueError, match=words):
            synthetic.configured(layout, **options)


def test_the_published_sizes(synthetic: ModuleType) -> None:
    """Parameters of the published models, in billions, and the layers of DeepSeek's that are dense."""
    for layout, billions in (("qwen3-30b-a3b", 30.53), ("mixtral-8x7b", 46.70), ("gpt-oss-20b", 20.91)):
        config = synthetic.configured(layout)
        parameters = sum(tensor.nbytes // 2 for tensor in synthetic.tensors_of(layout, config))
        assert parameters / 1e9 == pytest.approx(billions, abs=0.01)
    config = synthetic.configured("deepseek-v3")
    assert sum(t.nbytes // 2 for t in synthetic.tensors_of("deepseek-v3", config)) / 1e9 == pytest.approx(671.0, abs=1)
    assert synthetic.configured("deepseek-v3", 2)["first_k_dense_replace"] == 1
