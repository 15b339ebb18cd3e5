"""Experts only, or dense FFNs only: together with what the config ties to them, and the same everywhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from moe_models import moe_model

import checkpoints as ck
import mlp_fusion
from mlp_fusion import InputError

pytestmark = pytest.mark.slow


def below(paths: list[str]) -> list[str]:
    """Paths from the number of the layer on."""
    return [re.sub(r"^.*?(\d)", r"\1", path) for path in paths]


@pytest.mark.parametrize(
    ("name", "experts", "dense"),
    [
        # One key states the widths of routed and shared experts.
        ("DeepseekV3Config", ["1.mlp.experts", "1.mlp.shared_experts"], ["0.mlp"]),
        ("Llama4TextConfig", ["1.feed_forward.experts", "1.feed_forward.shared_expert"], ["0.feed_forward"]),
        # They have keys of their own.
        ("Qwen2MoeConfig", ["1.mlp.experts"], ["0.mlp", "1.mlp.shared_expert"]),
        ("GraniteMoeSharedConfig", ["0.block_sparse_moe.experts", "1.block_sparse_moe.experts"],
         ["0.shared_mlp", "1.shared_mlp"]),
        # One key for experts and for the dense FFNs of other layers; experts are modules of their own.
        ("SwitchTransformersConfig", [f"1.layer.{n}.mlp.experts.expert_{e}" for n in (1, 2) for e in range(4)],
         ["0.layer.1.mlp", "0.layer.2.mlp"]),
    ],
)  # fmt: skip
def test_which_ffns_are_narrowed(name: str, experts: list[str], dense: list[str]) -> None:
    model = moe_model(name)
    for only, wanted in (("experts", experts), ("dense", dense)):
        planned = mlp_fusion.plan(model, 0.5, only=only)
        chosen = [ffn.path for ffn in planned.ffns if ffn.chosen]
        assert below(chosen) == wanted
        assert all((ffn.neurons_after < ffn.neurons_before) is ffn.chosen for ffn in planned.ffns)
        # What one key states, it goes on stating, and every program loads it.
        assert planned.uniform is (name != "SwitchTransformersConfig")


def test_the_same_in_memory_and_streamed(tmp_path: Path) -> None:
    moe_model("DeepseekV3Config").save_pretrained(tmp_path / "source")
    for stream in (False, True):
        report = mlp_fusion.compress(
            tmp_path / "source", tmp_path / str(stream), 0.5, only="experts", stream=stream, unmeasured=True
        )
        assert below([row.path for row in report.rows]) == ["1.mlp.experts", "1.mlp.shared_experts"]
        assert report.settings.only == "experts"
    memory, streamed = ck.tensors(tmp_path / "False"), ck.tensors(tmp_path / "True")
    assert all(torch.equal(memory[key], streamed[key]) for key in memory)
    assert streamed["model.layers.0.mlp.up_proj.weight"].shape[0] == 64
    assert ck.read_config(tmp_path / "True")["moe_intermediate_size"] == 16
    model = moe_model("DeepseekV3Config")
    assert len(mlp_fusion.fuse(model, 0.5, only="dense", layers="first:2", unmeasured=True).rows) == 1


def test_none_of_those_that_are_meant() -> None:
    model = moe_model("MixtralConfig")
    with pytest.raises(
        InputError, match=r"only dense: no FFN of the chosen layers is one, the first is model\.layers\.0"
    ):
        mlp_fusion.plan(model, 0.5, only="dense")
    with pytest.raises(InputError, match="only experts: no FFN of the chosen layers is one"):
        mlp_fusion.fuse(moe_model("DeepseekV3Config"), 0.5, only="experts", layers="0")
    with pytest.raises(InputError, match="only 'some': use experts or dense"):
        mlp_fusion.plan(model, 0.5, only="some")
