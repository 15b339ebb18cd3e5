"""Fused models whose weights are not all here: offloaded by accelerate, on the meta device, or quantised afterwards."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

import checkpoints as ck
from families import FAMILIES, tiny_model, token_batch
from mlp_fusion import InputError, fuse, restore
from mlp_fusion.modules import FusedFFN

pytestmark = pytest.mark.slow

BATCH = token_batch()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**BATCH).logits
    return found


def fused(family: str, optimizer: str = "adamw") -> Any:
    model = tiny_model(family)
    fuse(model, 16, optimizer=optimizer, sample=BATCH)
    return model.eval()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_fused_models_run_offloaded(family: str, tmp_path: Path) -> None:
    model = fused(family)
    expected = logits(model)
    for buffers in (False, True):
        other = copy.deepcopy(model)
        cpu_offload(other, execution_device=torch.device("cpu"), offload_buffers=buffers)
        torch.testing.assert_close(logits(other), expected, rtol=1e-5, atol=1e-5)
        other = copy.deepcopy(model)
        disk_offload(other, str(tmp_path / str(buffers)), execution_device=torch.device("cpu"), offload_buffers=buffers)
        torch.testing.assert_close(logits(other), expected, rtol=1e-5, atol=1e-5)


def layers_of(model: Any) -> str:
    return next(name for name, module in model.named_modules() if isinstance(module, nn.ModuleList))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("place", ["disk", "cpu", "hooks"])
def test_offloaded_layers_are_saved_folded(family: str, optimizer: str, place: str, tmp_path: Path) -> None:
    model = fused(family, optimizer)
    expected = logits(model)
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if place == "hooks":
        cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    else:
        layers = layers_of(model)
        leaves = [n for n, m in model.named_modules() if not n.startswith(layers) and not list(m.children()) and n]
        devices = {**dict.fromkeys(leaves, "cpu"), f"{layers}.0": "cpu", f"{layers}.1": place, f"{layers}.2": place}
        dispatch_model(
            model, devices, main_device="cpu", offload_dir=str(tmp_path / "weights"), force_hooks=True,
            offload_buffers=True,
        )  # fmt: skip
    if place != "cpu":
        assert any(tensor.is_meta for tensor in model.state_dict().values())
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    restore(loaded, tmp_path / "saved")
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    scales = ck.scales(tmp_path / "saved")
    assert len(scales) == 3
    assert all(torch.equal(scale, own[name]) for name, scale in scales.items())
    remove_hook_from_submodules(model)
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())


def test_weights_that_are_nowhere_are_asked_for(tmp_path: Path) -> None:
    model = fused("llama").to("meta")
    with pytest.raises(InputError, match="on the meta device, and nothing says where"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    module = next(m for m in model.modules() if isinstance(m, FusedFFN))
    with pytest.raises(InputError, match="on the meta device"):
        module.merge_scale()
    with pytest.raises(InputError, match="on the meta device"):
        fuse(tiny_model("llama").to("meta"), 16)


def test_quantised_after_the_fusion(tmp_path: Path) -> None:
    model = fused("llama")
    dense = model.model.layers[1].mlp.down_proj
    whole = dense.weight
    dense.weight = nn.Parameter(whole.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(InputError, match=r"down_proj\.weight is torch\.float8_e4m3fn, quantised after the fusion"):
        model.save_pretrained(tmp_path / "saved")
    dense.weight = nn.Parameter(whole.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(InputError, match=r"down_proj\.weight is torch\.int8, quantised after the fusion"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
