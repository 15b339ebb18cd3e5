"""What stands around FFNs in a model: code behind their projections, configs that parts share, exported programs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_models import moe_model
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPVisionConfig
from transformers.models.llama.modeling_llama import LlamaMLP

import checkpoints as ck
from families import tiny_model, token_batch
from mlp_fusion import FusedGLU, FusedMLP, InputError, fuse

BATCH = token_batch()


class Longer(LlamaMLP):
    """Goes on behind its output projection."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.behind = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.behind(x)


def longer(mlp: Any, config: Any) -> Any:
    other = Longer(config)
    other.load_state_dict({**other.state_dict(), **mlp.state_dict()})
    return other


def hooked(mlp: Any, _config: Any) -> Any:
    mlp.register_forward_hook(lambda _module, _args, y: 1.5 * y)
    return mlp


def replaced(mlp: Any, _config: Any) -> Any:
    own = mlp.forward
    mlp.forward = lambda x: own(x) + x
    return mlp


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("change", [longer, hooked, replaced])
def test_an_ffn_that_goes_on_behind_its_projection_is_refused(change: Any, calibrated: bool) -> None:
    model = tiny_model("llama", task="CausalLM")
    model.model.layers[1].mlp = change(model.model.layers[1].mlp, model.config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model(**BATCH).logits
    with pytest.raises(InputError, match=r"layers\.1\.mlp: this FFN's module changes what its output projection"):
        fuse(model, 0.5, **({"calibration": [BATCH]} if calibrated else {}))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(**BATCH).logits, expected)
    fuse(model, 0.5, layers="*.0.mlp")
    assert isinstance(model.model.layers[0].mlp, FusedGLU)


@pytest.mark.parametrize("calibrated", [False, True])
def test_experts_that_go_on_behind_their_sum_are_refused(calibrated: bool) -> None:
    model = moe_model("MixtralConfig")
    experts = model.model.layers[1].mlp.experts

    class More(type(experts)):  # type: ignore[misc]
        def forward(self, x: Tensor, *routing: Tensor) -> Tensor:
            return 0.5 * super().forward(x, *routing) + x  # type: ignore[no-any-return]

    own, experts.__class__ = type(experts), More
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.experts: this FFN's module changes what"):
        fuse(model, 0.5, **({"calibration": [BATCH]} if calibrated else {}))
    experts.__class__ = own
    fuse(model, 0.5)


def test_experts_whose_activation_is_a_plain_function_are_none_of_these() -> None:
    model = moe_model("MixtralConfig")
    for layer in model.model.layers:
        del layer.mlp.experts.act_fn
        layer.mlp.experts.act_fn = torch.nn.functional.silu
    fuse(model, 0.5)


def test_a_hook_that_only_looks_is_no_reason_to_refuse() -> None:
    model, seen = tiny_model("llama", task="CausalLM"), []
    model.model.layers[1].mlp.register_forward_hook(lambda _module, _args, y: seen.append(y.shape))
    fuse(model, 0.5)
    assert seen


def clip() -> Any:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = CLIPTextConfig(**shape, vocab_size=99, max_position_embeddings=24, eos_token_id=1)
    vision = CLIPVisionConfig(**shape, image_size=16, patch_size=8)
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)).eval()


def test_parts_of_a_model_still_share_its_config(tmp_path: Path) -> None:
    model = clip()
    inner = model.config.text_config
    parts = [name for name, module in model.named_modules() if module.__dict__.get("config") is inner]
    fuse(model, 24, layers="text_model.*")
    # FFNs that are replaced had it too.
    left = [module.config for module in map(model.get_submodule, parts) if hasattr(module, "config")]
    assert left
    assert all(config is model.config.text_config for config in left)
    assert model.config.text_config.intermediate_size == 24
    assert model.config.vision_config.intermediate_size == 48
    model.text_model.save_pretrained(tmp_path)
    again = CLIPTextModel.from_pretrained(tmp_path).eval()
    ids = torch.arange(2, 14)[None]
    torch.testing.assert_close(again(ids).pooler_output, model.text_model(ids).pooler_output)


@pytest.mark.parametrize("form", ["folded", "scaled", "split"])
@pytest.mark.parametrize("gated", [False, True])
def test_onnx_gets_operations_of_torch_alone(gated: bool, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fc1, gate, fc2, scale = nn.Linear(6, 7), nn.Linear(6, 7), nn.Linear(7, 5), torch.arange(1.0, 8.0)
    ffn = (
        FusedGLU.from_mlp(gate, fc1, fc2, scale=scale, parameterization=form)
        if gated
        else FusedMLP.from_mlp(fc1, fc2, scale=scale, parameterization=form)
    )
    x = torch.randn(64, 6)
    for exporting in (False, True):
        monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda exporting=exporting: exporting)
        program = torch.export.export(ffn.eval(), (x,), strict=False)
        own = [node for node in program.graph.nodes if "fusion_kernels" in str(node.target)]
        assert bool(own) != exporting
        torch.testing.assert_close(program.module()(x), ffn(x))


def test_no_standard_error_is_no_reason_to_fail(tmp_path: Path) -> None:
    source, out = ck.save_tiny(tmp_path / "source", "llama", task="CausalLM"), tmp_path / "out"
    closed = "import os, sys; os.close(2); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    command = ["-m", "mlp_fusion", "compress", str(source), str(out), "--width", "0.5"]
    done = subprocess.run([sys.executable, "-c", closed, *command], stdout=subprocess.PIPE, check=False)
    assert done.returncode == 0, done.stdout
    assert (out / "config.json").is_file()
