"""Mixture-of-Experts models of every layout from disk to disk: the bits of a run in memory, loadable anywhere."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from moe_models import MOE_MODELS, moe_model
from safetensors.torch import load_file

import checkpoints as ck
import mlp_fusion
from mlp_fusion import InputError

pytestmark = pytest.mark.slow

#: Loads what it is told by its lines, and writes logits; another process, which knows nothing of this package.
_PLAIN = """
import sys, torch, transformers
torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
for line in sys.stdin:
    folder, inputs, outputs = line.split()
    auto = transformers.AutoConfig.from_pretrained(folder).is_encoder_decoder
    auto = transformers.AutoModelForSeq2SeqLM if auto else transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    with torch.no_grad():
        torch.save(model.eval()(**torch.load(inputs)).logits, outputs)
    print(*(key for key, found in info.items() if found), *(n for n in sys.modules if n.startswith("mlp_fusion")))
    sys.stdout.flush()
"""


@pytest.fixture(scope="module")
def plain() -> Iterator[Any]:
    """Has a checkpoint run by transformers alone: what loading it complains of, and logits."""
    process = subprocess.Popen([sys.executable, "-c", _PLAIN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None

    def run(folder: Path, batch: dict[str, torch.Tensor]) -> tuple[str, torch.Tensor]:
        torch.save(batch, folder.parent / "inputs")
        print(folder, folder.parent / "inputs", folder.parent / "logits", file=process.stdin, flush=True)
        line = process.stdout.readline()  # type: ignore[union-attr]
        assert line, "the process has ended"
        return line.strip(), torch.load(folder.parent / "logits")

    yield run
    process.communicate()


@pytest.mark.parametrize("name", MOE_MODELS)
def test_the_bits_of_a_run_in_memory_and_loaded_without_this_package(name: str, plain: Any, tmp_path: Path) -> None:
    model = moe_model(name)
    model.save_pretrained(tmp_path / "source", max_shard_size="100KB")
    for stream in (False, True):
        mlp_fusion.compress(tmp_path / "source", tmp_path / str(stream), 0.5, stream=stream, unmeasured=True)
    memory, streamed = ck.tensors(tmp_path / "False"), ck.tensors(tmp_path / "True")
    assert memory.keys() == streamed.keys()
    assert all(torch.equal(memory[key], streamed[key]) for key in memory)
    scales = [load_file(tmp_path / folder / ck.SCALE) for folder in ("False", "True")]
    assert scales[0].keys() == scales[1].keys()
    assert all(torch.equal(scales[0][key], scales[1][key]) for key in scales[0])

    ids = torch.arange(3, 19).reshape(2, 8)
    batch = {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}
    with torch.no_grad():
        before = model(**batch).logits
        mlp_fusion.fuse(model, 0.5, unmeasured=True)
        fused = model(**batch).logits
    complaints, found = plain(tmp_path / "True", batch)
    assert complaints == ""
    torch.testing.assert_close(found, fused, rtol=1e-4, atol=1e-4 * float(fused.abs().max()))
    assert float((found - before).abs().max()) > 0.01 * float(before.abs().max())  # narrower, and seen in the outputs


def test_experts_of_two_widths_that_lie_in_one_list(tmp_path: Path) -> None:
    """Of text and of images: half of the list is one stack in memory, half the other."""
    text = {
        "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "num_key_value_heads": 2, "moe_intermediate_size": [64, 32], "moe_num_experts": 4, "moe_k": 2,
        "moe_num_shared_experts": 1, "mlp_layer_types": ["dense", "sparse"], "pad_token_id": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 4, "intermediate_size": 64, "patch_size": 4}
    torch.manual_seed(0)
    config = transformers.Ernie4_5_VLMoeConfig(text_config=text, vision_config=vision)
    model = transformers.Ernie4_5_VLMoeModel(config)
    model.save_pretrained(tmp_path / "source")
    name = "layers.1.mlp.experts.{}.down_proj.weight"
    shapes = {key: tuple(tensor.shape) for key, tensor in ck.tensors(tmp_path / "source").items()}
    assert [shapes[name.format(number)] for number in (3, 4)] == [(32, 64), (32, 32)]
    mlp_fusion.compress(tmp_path / "source", tmp_path / "streamed", 0.5, stream=True)
    mlp_fusion.fuse(model, 0.5, unmeasured=True)
    model.save_pretrained(tmp_path / "memory")
    memory, streamed = ck.tensors(tmp_path / "memory"), ck.tensors(tmp_path / "streamed")
    assert [tuple(streamed[name.format(number)].shape) for number in (3, 4)] == [(32, 32), (32, 16)]
    assert memory.keys() == streamed.keys()
    assert all(torch.equal(memory[key], streamed[key]) for key in memory)
    assert mlp_fusion.verify(tmp_path / "streamed", tmp_path / "source").passed


def test_experts_without_an_output_are_refused_with_a_tensor_of_theirs(tmp_path: Path) -> None:
    config = transformers.LongcatFlashConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=4, num_layers=2, num_attention_heads=4, ffn_hidden_size=64,
        expert_ffn_hidden_size=32, n_routed_experts=4, zero_expert_num=2, moe_topk=2, q_lora_rank=8, kv_lora_rank=8,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, head_dim=8, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LongcatFlashForCausalLM(config).save_pretrained(tmp_path / "source")
    with pytest.raises(InputError, match=r"experts\.4\.gate_proj\.weight is a part of 0 FFNs: load the model, fuse it"):
        mlp_fusion.compress(tmp_path / "source", tmp_path / "out", 0.5, stream=True)
