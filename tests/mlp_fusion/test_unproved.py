"""Models in which something like an FFN is not proved: refused whole, and fused where proved FFNs are chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_configs import TINY
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModel, Llama4Config, Llama4ForConditionalGeneration
from tying import real_model, tie

import checkpoints as ck
import mlp_fusion
from mlp_fusion import InputError
from mlp_fusion.families.describe import describe
from mlp_fusion.families.discovered import discovered
from mlp_fusion.store.record import fusion_record

pytestmark = pytest.mark.slow

_PART = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_TEXT = {
    **_PART, "vocab_size": 97, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size_mlp": 96,
    "num_local_experts": 2, "interleave_moe_layer_step": 2, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
_VISION = {
    **_PART, "intermediate_size": 128, "image_size": 8, "patch_size": 4, "vision_output_dim": 16,
    "projector_input_dim": 16, "projector_output_dim": 16,
}  # fmt: skip


def tied(config: Any) -> Any:
    """A model whose FFNs that are proved hold every neuron twice."""
    model = real_model(config)
    tie(model, describe(config))
    return model


@pytest.fixture(scope="module")
def llama4() -> Any:
    """The key of the vision tower's FFNs moves an adapter's projection too."""
    return Llama4Config(text_config=_TEXT, vision_config=_VISION, image_token_index=5, boi_token_index=3,
                        eoi_token_index=4)  # fmt: skip


@pytest.fixture(scope="module")
def gemma3n() -> Any:
    """The first of four layers keeps the largest neurons only."""
    return CONFIG_MAPPING["gemma3n_text"](**TINY["gemma3n_text"])


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    ids = torch.randint(6, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    found: Tensor = model(input_ids=ids)[0]
    return found


@torch.no_grad()
def features(model: Any) -> Tensor:
    """What the vision tower makes of an image."""
    image = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found: Tensor = model.vision_model(image).last_hidden_state
    return found


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("layers", [None, "all"])
def test_the_whole_model_is_refused_and_the_error_says_what_can_be_chosen(layers: str | None, llama4: Any) -> None:
    model = real_model(llama4)
    for verb in (mlp_fusion.plan, mlp_fusion.fuse):
        with pytest.raises(InputError) as caught:
            verb(model, 0.5, layers=layers)
        message = str(caught.value)
        assert "vision_model.vision_adapter.mlp.fc1.weight belongs to no FFN that could be proved" in message
        assert "vision_model.model.layers.#.mlp) with layers: a pattern of paths, or '*' for all of them" in message
        assert "\n" not in message


def test_ffns_that_are_proved_can_be_chosen(llama4: Any, tmp_path: Path) -> None:
    """Their own keys state the widths; the tower stays as it is, in every bit."""
    model = tied(llama4)
    exact, tower = outputs(model), {name: p.clone() for name, p in model.vision_model.named_parameters()}
    model.save_pretrained(tmp_path / "source")
    ck.add_tokenizer(tmp_path / "source", pad_token="<pad>")
    planned = mlp_fusion.plan(tmp_path / "source", 0.5, layers="language_model.*")
    assert planned.uniform
    assert any(warning.startswith("left as it is: vision_model.vision_adapter") for warning in planned.warnings)

    mlp_fusion.fuse(model, 0.5, layers="language_model.*")
    assert (model.config.text_config.intermediate_size, model.config.text_config.intermediate_size_mlp) == (32, 48)
    assert model.config.vision_config.intermediate_size == 128
    assert "widths" not in fusion_record(model.config)  # type: ignore[operator]
    close(outputs(model), exact)

    mlp_fusion.compress(tmp_path / "source", tmp_path / "out", 0.5, layers="language_model.*")
    assert mlp_fusion.verify(tmp_path / "out").passed
    loaded: Any = Llama4ForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    close(outputs(loaded), exact)
    assert all(torch.equal(p, tower[name]) for name, p in loaded.vision_model.named_parameters())
    mlp_fusion.restore(loaded, tmp_path / "out")
    close(outputs(loaded), exact)


def test_a_key_that_moves_more_states_no_width(llama4: Any, tmp_path: Path) -> None:
    """The tower's widths stand in the record: the key would narrow the adapter as well."""
    model = tied(llama4)
    exact, adapter = features(model), model.vision_model.vision_adapter.mlp.fc1.weight.clone()
    mlp_fusion.fuse(model, 0.5, layers="*", unmeasured=True)
    assert model.config.vision_config.intermediate_size == 128
    record: Any = fusion_record(model.config)
    assert record["widths"] == {f"vision_model.model.layers.{n}.mlp": 64 for n in (0, 1)}
    close(features(model), exact)
    model.save_pretrained(tmp_path)
    loaded: Any = Llama4ForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert loaded.vision_model.model.layers[0].mlp.fc1.weight.shape == (64, 32)
    assert torch.equal(loaded.vision_model.vision_adapter.mlp.fc1.weight, adapter)
    close(features(loaded), exact)
    close(outputs(loaded), outputs(model))


def test_layers_of_one_path_of_which_some_are_proved(gemma3n: Any, tmp_path: Path) -> None:
    model = tied(gemma3n)
    exact = outputs(model)
    first = model.layers[0].mlp.up_proj.weight.clone()
    report = mlp_fusion.fuse(model, 0.5, layers="*")
    assert [row.path for row in report.rows] == [f"layers.{n}.mlp" for n in (1, 2, 3)]
    close(outputs(model), exact)
    model.save_pretrained(tmp_path)
    loaded: Any = AutoModel.from_pretrained(tmp_path).eval()
    widths = [layer.mlp.up_proj.weight.shape[0] for layer in loaded.layers]
    assert widths == [96, 48, 48, 48]
    assert torch.equal(loaded.layers[0].mlp.up_proj.weight, first)
    close(outputs(loaded), exact)
    mlp_fusion.restore(loaded, tmp_path)
    close(outputs(loaded), exact)


def test_ffns_with_something_beside_them_that_has_their_width_cannot_be_chosen() -> None:
    """I-BERT saves integer copies of its weights in the projections."""
    small = dict.fromkeys(("hidden_size", "intermediate_size"), 32)
    config = CONFIG_MAPPING["ibert"](vocab_size=40, num_hidden_layers=2, num_attention_heads=2, **small)
    with pytest.raises(InputError, match=r"^ibert: .*integer copy of weights .*, which is not supported: "):
        discovered(config)
    # It is proved, and would be narrowed without them.
    assert len(describe(config).sites) == 1
