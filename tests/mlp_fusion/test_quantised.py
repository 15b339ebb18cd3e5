"""Quantised originals: read as plain weights, reduced, and written under the names of the unquantised original."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import mlp_fusion
from mlp_fusion import InputError
from mlp_fusion.store import tensors
from mlp_fusion.store.quantised import plain_names

_BLOCK = 32
_SMALL: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "vocab_size": 97, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
}  # fmt: skip


def _model(name: str, **extra: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**_SMALL, **extra})
    return getattr(transformers, f"{name}ForCausalLM")(config).to(torch.bfloat16).eval()


def _quantised(tensors: dict[str, Tensor], wanted: Any) -> dict[str, Tensor]:
    """Matrices that are `wanted` by name, in FP8 with a factor for each block."""
    written = {}
    for name, weight in tensors.items():
        if weight.ndim != 2 or not wanted(name):
            written[name] = weight
            continue
        blocks = weight.float().unflatten(0, (-1, _BLOCK)).unflatten(2, (-1, _BLOCK))
        factors = blocks.abs().amax((1, 3)) / 448
        values = blocks / factors[:, None, :, None]
        written[name] = values.flatten(0, 1).flatten(1, 2).to(torch.float8_e4m3fn)
        written[f"{name}_scale_inv"] = factors
    return written


def _store(folder: Path, model: Any, tensors: dict[str, Tensor], quantisation: dict[str, Any]) -> Path:
    model.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantisation}))
    return folder


def _fp8(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    tensors = _quantised(load_file(folder / "model.safetensors"), lambda name: "proj" in name)
    told = {"quant_method": "fp8", "weight_block_size": [_BLOCK, _BLOCK], "activation_scheme": "dynamic", "fmt": "e4m3"}
    return _store(folder, model, tensors, told)


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("Llama", {"intermediate_size": 128}),
        (
            "Qwen3Moe",
            {"intermediate_size": 128, "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2},
        ),
    ],
)
def test_fp8_checkpoints_become_plain_ones_under_their_own_names(tmp_path: Path, name: str, extra: Any) -> None:
    model = _model(name, **extra)
    model.save_pretrained(tmp_path / "plain")
    names = set(load_file(tmp_path / "plain" / "model.safetensors"))
    source = _fp8(tmp_path / "fp8", model)
    report = mlp_fusion.compress(source, tmp_path / "out", 0.5)
    assert mlp_fusion.verify(tmp_path / "out").passed
    planned = mlp_fusion.plan(source, 0.5)  # factors are no parameters
    assert planned.parameters_before == report.parameters_before == sum(p.numel() for p in model.parameters())
    assert planned.parameters_after == report.parameters_after
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert set(written) == names
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert {row.neurons_after for row in report.rows} == {row.neurons_before // 2 for row in report.rows}
    # What is not of an FFN is what FP8 says, as a product of values and factors.
    key = "model.layers.1.self_attn.q_proj.weight"
    stored = load_file(source / "model.safetensors")
    factors = stored[f"{key}_scale_inv"].repeat_interleave(_BLOCK, 0).repeat_interleave(_BLOCK, 1)
    assert torch.equal(written[key], (stored[key].float() * factors).to(torch.bfloat16))


def test_mxfp4_experts_are_read_and_written_in_16_bits(tmp_path: Path) -> None:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["sliding_attention", "full_attention"]}
    model = _model("GptOss", intermediate_size=64, **experts)
    model.save_pretrained(tmp_path / "mxfp4")
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, weight in load_file(tmp_path / "mxfp4" / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            tensors[name] = weight
            continue
        count, inputs, outputs = weight.shape
        shape = (count, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        tensors[f"{name}_scales"] = torch.randint(118, 124, shape, dtype=torch.uint8, generator=generator)
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    source = _store(tmp_path / "mxfp4", model, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": kept})
    planned = mlp_fusion.plan(source, 0.5)
    assert "quantised (mxfp4)" in planned.warnings[-1]
    assert planned.parameters_before == sum(p.numel() for p in model.parameters())
    report = mlp_fusion.compress(source, tmp_path / "out", 0.5)
    assert (planned.parameters_before, planned.parameters_after) == (report.parameters_before, report.parameters_after)
    assert mlp_fusion.verify(tmp_path / "out").passed
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written["model.layers.1.mlp.experts.gate_up_proj"].shape == (4, 64, 64)
    assert not any(name.endswith(("_blocks", "_scales")) for name in written)


def test_methods_that_cannot_be_read_as_plain_weights_are_refused(tmp_path: Path) -> None:
    model = _model("Llama", intermediate_size=128)
    model.save_pretrained(tmp_path / "source")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    source = _store(tmp_path / "source", model, tensors, {"quant_method": "gptq", "bits": 4})
    with pytest.raises(
        InputError, match=r"quantised \(gptq\): start from the unquantised checkpoint, or one in fp8 or"
    ):
        mlp_fusion.plan(source, 0.5)


def test_parts_of_a_quantised_tensor_go_by_its_own_name() -> None:
    def config(method: str) -> Any:
        return transformers.LlamaConfig(quantization_config={"quant_method": method})

    names = ["a.weight", "a.weight_scale_inv", "b.bias"]
    assert list(plain_names(config("fp8"), names).values()) == ["a.weight", "a.weight", "b.bias"]
    names = ["e.down_proj_blocks", "e.down_proj_scales", "e.down_proj_bias"]
    assert list(plain_names(config("mxfp4"), names).values()) == ["e.down_proj", "e.down_proj", "e.down_proj_bias"]
    assert plain_names(transformers.LlamaConfig(), names) == {name: name for name in names}


@pytest.mark.parametrize(
    ("factors", "shape", "block"),
    [
        (torch.float32, (192, 100), (128, 64)),  # the last blocks are cut off
        (torch.uint8, (64, 64), (32, 32)),
        (torch.float8_e8m0fnu, (64, 96), (32, 32)),
    ],
)
def test_blocks_and_their_factors(factors: torch.dtype, shape: tuple[int, int], block: tuple[int, int]) -> None:
    g = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=g).to(torch.float8_e4m3fn)
    grid = [-(-n // size) for n, size in zip(shape, block, strict=True)]
    exponents = torch.randint(-4, 4, grid, generator=g)
    true = torch.exp2(exponents.float())
    stored = (exponents + 127).to(torch.uint8)
    stored = true if factors == torch.float32 else stored if factors == torch.uint8 else stored.view(factors)
    found = tensors._from_blocks(values, stored, block, torch.float32)
    for row, column in ((0, 0), (shape[0] - 1, shape[1] - 1), (block[0] - 1, block[1]), (block[0], 0)):
        if row < shape[0] and column < shape[1]:
            expected = values[row, column].float() * true[row // block[0], column // block[1]]
            assert found[row, column] == expected


def test_fp8_without_factors_is_refused(tmp_path: Path) -> None:
    source = _fp8(tmp_path / "source", _model("Llama", intermediate_size=128))
    held = load_file(source / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    del held[f"{name}_scale_inv"]
    save_file(held, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"{name} is stored in FP8, and what it is multiplied with is missing"):
        mlp_fusion.compress(source, tmp_path / "out", 0.5, stream=True)
