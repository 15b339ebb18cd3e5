"""Batches of every kind of input: text, images, sounds and both, in encoders, decoders and towers."""

from __future__ import annotations

import inspect
from collections import UserDict
from typing import Any

import pytest
import torch
import transformers
from many_inputs import IMAGE_TOKEN, KINDS, ffns, processed, text, tiny
from torch import Tensor

from mlp_fusion import InputError
from mlp_fusion.families import FFNSite
from mlp_fusion.running.batches import main_input, padded_behind, samples, take_batches, takes_text, token_mask
from mlp_fusion.running.drawing import random_batch
from mlp_fusion.running.positions import counted
from mlp_fusion.running.runner import Runner
from mlp_fusion.running.taps import capture_activations

#: Inputs with random entries.
DRAWN = ("input_ids", "decoder_input_ids", "pixel_values", "input_values", "input_features")
MODELS = [kind for kind in KINDS if "'" not in kind]


def without_cache(model: Any) -> dict[str, bool]:
    """The argument with which a `Runner` calls a model that has it: with a cache, attention may round differently."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def watched(model: Any, module: str, batch: Any) -> Tensor:
    """What goes into a module while the model's base runs: all its calls, one behind the other."""
    seen: list[Tensor] = []
    handle = model.get_submodule(module).register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with torch.no_grad():
        model.base_model(**batch, **without_cache(model.base_model))
    handle.remove()
    return torch.cat(seen)


def first(site: FFNSite) -> str:
    """Path of the module that an FFN's inputs go into."""
    return f"{site.path}.{site.kind.projection('w_in').parameter.removesuffix('.weight')}"


# --- running ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_every_model_runs_on_a_random_batch(kind: str) -> None:
    model = tiny(kind)
    batch = random_batch(model, seed=3, batch=4, length=12)
    assert all(
        torch.equal(batch[name], value) for name, value in random_batch(model, seed=3, batch=4, length=12).items()
    )
    other = random_batch(model, seed=4, batch=4, length=12)
    assert not any(torch.equal(batch[n], value) for n, value in other.items() if n in DRAWN)
    # The same call to the last argument: with another mask attention may round differently.
    decoders = {f"decoder_{name}": value for name, value in batch.items()} if kind in ("t5", "bart") else {}
    own = {**batch, **decoders, **without_cache(model)}
    with torch.no_grad(), Runner(model) as runner:
        outputs = runner.whole(batch)
        expected = model(**own)
        name = next(n for n in ("logits", "logits_per_image", "last_hidden_state") if n in expected)
        assert torch.equal(outputs[name], expected[name])
    # Every FFN has something to do.
    for part in (kind, f"{kind}'s text"):
        if part in KINDS and kind not in ("xlnet",):
            architecture, sites = ffns(part, model)
            rows = capture_activations(model, architecture, sites, batch, rows=10_000, seed=0)
            assert all(len(found.x) >= 4 for found in rows)


def test_sounds_are_drawn_short_and_images_few_where_they_are_large() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.Wav2Vec2BertConfig(**sizes, feature_projection_input_dim=16)
    # The config speaks of 10,000 frames.
    drawn = random_batch(transformers.Wav2Vec2BertModel(config), seed=0, batch=2)
    assert drawn["input_features"].shape == (2, 200, 16)
    # 600 patches' worth of numbers each, where 8 texts of 64 tokens were asked for.
    large = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=224, patch_size=32))
    assert random_batch(large, seed=0)["pixel_values"].shape == (2, 3, 224, 224)
    assert random_batch(large, seed=0, batch=1)["pixel_values"].shape == (1, 3, 224, 224)


def test_series_of_numbers_are_drawn_and_observed() -> None:
    sizes = {"d_model": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "ffn_dim": 32}
    model = transformers.PatchTSTModel(transformers.PatchTSTConfig(**sizes, num_input_channels=3, context_length=24))
    drawn = random_batch(model, seed=0, batch=2)
    assert drawn["past_values"].shape == (2, 24, 3)
    assert drawn["past_values"].std() > 0.5
    assert bool((drawn["past_observed_mask"] == 1).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_images_get_the_models_dtype(dtype: torch.dtype) -> None:
    model = tiny("wav2vec2").to(dtype)
    batch = random_batch(model, seed=0, batch=2)
    assert batch["input_values"].dtype == torch.float32
    with torch.no_grad(), Runner(model) as runner:
        expected = model.base_model(batch["input_values"].to(dtype)).last_hidden_state
        assert torch.equal(runner.hidden_states(batch), expected)


@pytest.mark.parametrize("kind", MODELS)
def test_a_processors_batch_loses_its_labels_and_nothing_else(kind: str) -> None:
    model, batch = tiny(kind), processed(kind)
    [taken] = take_batches(iter([batch, batch]), 1, main=main_input(model))
    assert set(taken) == set(batch) - {"labels", "names"}
    for name in set(taken) & {"pixel_values", "input_values", "input_features"}:
        assert torch.equal(taken[name], batch[name])
    if kind == "whisper":
        taken["decoder_input_ids"] = text(0, (4, 4, 4), 4)["input_ids"]
    with torch.no_grad(), Runner(model) as runner:
        for states, mask in runner.counted_states(taken):
            assert states.shape[:-1] == mask.shape


def test_images_beside_text_keep_their_numbers_per_sample() -> None:
    batch = {**processed("llava"), "lengths": torch.tensor([1, 2, 3]), "label": torch.zeros(3)}
    [taken] = take_batches(batch, 1)
    assert set(taken) == {"input_ids", "attention_mask", "pixel_values", "lengths"}
    # The texts were padded in front.
    assert taken["attention_mask"].tolist() == [[1] * 9, [1] * 7 + [0] * 2, [1] * 8 + [0]]
    assert torch.equal(taken["input_ids"][1, :7], batch["input_ids"][1, 2:])
    [choices] = take_batches({"input_ids": torch.ones(2, 3, 5), "boxes": torch.ones(2, 3, 5, 4)}, 1)
    assert {name: tuple(value.shape) for name, value in choices.items()} == {"input_ids": (6, 5), "boxes": (6, 5, 4)}
    [choices] = take_batches({"input_ids": torch.ones(2, 3, 5), "mc_token_ids": torch.ones(2, 3)}, 1)
    assert choices["mc_token_ids"].shape == (2, 3)


def test_a_decoders_text_moves_by_its_own_mask() -> None:
    own, other = text(0, (3, 5), 5, "left"), text(1, (5, 2), 5, "left")
    batch = {**own, **{f"decoder_{name}": value for name, value in other.items()}}
    moved = padded_behind(batch)
    assert list(moved) == list(batch)
    for name, value in {**padded_behind(own), **{f"decoder_{k}": v for k, v in padded_behind(other).items()}}.items():
        assert torch.equal(moved[name], value)
    unmasked = padded_behind({**own, "decoder_input_ids": other["input_ids"]})
    assert torch.equal(unmasked["decoder_input_ids"], other["input_ids"])


def test_several_ids_of_one_position_are_no_choices() -> None:
    ids = torch.arange(2 * 5 * 3).reshape(2, 5, 3)
    mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    [taken] = take_batches({"input_ids": ids, "attention_mask": mask, "boxes": ids + 1}, 1, codebooks=3)
    assert torch.equal(taken["input_ids"][0], ids[0])
    # What was padded in front is padded behind, with all of a position's ids.
    assert torch.equal(taken["input_ids"][1, :3], ids[1, 2:])
    assert torch.equal(taken["boxes"], taken["input_ids"] + 1)
    assert token_mask(taken).tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    assert token_mask({"input_ids": ids}).shape == (2, 5)


def test_models_that_text_alone_is_enough_for() -> None:
    assert [kind for kind in MODELS if takes_text(tiny(kind))] == ["t5", "bart", "xlnet", "albert"]


def test_endless_images_come_to_an_end() -> None:
    def images() -> Any:
        while True:
            yield {"pixel_values": torch.zeros(2, 3, 16, 16)}

    # 768 numbers an image: three patches, as far as anyone can say without the model.
    assert len(take_batches(images(), 60, main="pixel_values")) == 10


def test_samples_that_cannot_be_told_apart() -> None:
    assert samples(random_batch(tiny("vit"), seed=0, batch=5)) == 5
    assert samples(text(0, (3, 2), 4)) == 2
    assert samples({"pixel_values": torch.zeros(8, 12), "image_grid_thw": torch.ones(2, 3)}) is None
    assert samples({**text(0, (3, 2), 4), "pixel_values": torch.zeros(2, 3, 4, 4)}) is None


# --- which rows count ------------------------------------------------------------------------------------------------

OWN, OTHER = text(0, (5, 7, 2), 7), text(1, (3, 4, 1), 4)
#: A decoder's text beside the encoder's: of another length; of the same one, with another mask; without a mask.
DECODERS = {
    "shorter": OTHER,
    "as long": text(1, (3, 7, 6), 7),
    "unmasked": {"input_ids": OTHER["input_ids"]},
    "as long and unmasked": {"input_ids": text(1, (7, 7, 7), 7)["input_ids"]},
}


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("decoder", [*DECODERS, "none"])
def test_encoder_and_decoder_have_rows_of_their_own(kind: str, decoder: str) -> None:
    model = tiny(kind)
    architecture, sites = ffns(kind, model)
    given = DECODERS.get(decoder, {})
    batch = {**OWN, **{f"decoder_{name}": value for name, value in given.items()}}
    # Without a text of its own the decoder reads the encoder's.
    full = {**{f"decoder_{name}": value for name, value in OWN.items()}, **batch} if not given else batch
    masks = [full["attention_mask"], full.get("decoder_attention_mask", torch.ones_like(full["decoder_input_ids"]))]
    found = capture_activations(model, architecture, sites, batch, rows=10_000, seed=0)
    for site, rows, mask in zip(sites, found, [masks[0]] * 2 + [masks[1]] * 2, strict=True):
        x = watched(model, first(site), full)
        assert torch.equal(rows.x, x[mask.bool()])


def test_of_sounds_and_images_everything_counts_and_of_a_decoder_its_text() -> None:
    decoded = {f"decoder_{name}": value for name, value in OTHER.items()}
    for kind in ("whisper", "wav2vec2", "vit"):
        model = tiny(kind)
        architecture, sites = ffns(kind, model)
        batch = {
            **take_batches(processed(kind), 1, main=main_input(model))[0],
            **(decoded if kind == "whisper" else {}),
        }
        found = capture_activations(model, architecture, sites, batch, rows=10_000, seed=0)
        for site, rows in zip(sites, found, strict=True):
            x = watched(model, first(site), batch)
            expected = x[OTHER["attention_mask"].bool()] if "decoder" in site.path else x.flatten(0, 1)
            assert torch.equal(rows.x, expected)


def test_towers_see_text_and_images() -> None:
    model, batch = tiny("clip"), take_batches(processed("clip"), 1)[0]
    # As many tokens as an image has patches: the path tells them apart.
    batch = {**batch, **text(0, (5, 4, 2), 5)}
    architecture, sites = ffns("clip", model)
    found = capture_activations(model, architecture, sites, batch, rows=10_000, seed=0)
    for site, rows in zip(sites, found, strict=True):
        x = watched(model, first(site), batch)
        assert x.shape[:2] == (3, 5)
        masked = x[batch["attention_mask"].bool()] if "text" in site.path else x.flatten(0, 1)
        assert torch.equal(rows.x, masked)


def test_a_model_of_images_and_text_padded_in_front() -> None:
    model = tiny("llava")
    [batch] = take_batches(processed("llava"), 1)
    assert int((batch["input_ids"] == IMAGE_TOKEN).sum()) == 12
    for kind in ("llava", "llava's text"):
        architecture, sites = ffns(kind, model)
        # A vision tower of which no hidden state beyond its last but one is read still runs whole.
        found = capture_activations(model, architecture, sites, processed(kind), rows=10_000, seed=0)
        for site, rows in zip(sites, found, strict=True):
            x = watched(model, first(site), batch)
            assert torch.equal(rows.x, x[batch["attention_mask"].bool()] if "text" in kind else x.flatten(0, 1))


def test_patches_of_all_images_in_one_row() -> None:
    model = tiny("qwen2_vl")
    architecture, sites = ffns("qwen2_vl", model)
    [batch] = take_batches(processed("qwen2_vl"), 1)
    found = capture_activations(model, architecture, sites, batch, rows=10_000, seed=0)
    for site, rows in zip(sites, found, strict=True):
        x = watched(model, first(site), batch)
        assert x.shape == (32, 32)
        assert torch.equal(rows.x, x)
    drawn = random_batch(model, seed=0, batch=3, length=10)
    assert torch.equal(drawn["mm_token_type_ids"], (drawn["input_ids"] == IMAGE_TOKEN).long())
    assert drawn["mm_token_type_ids"].sum(1).tolist() == [4, 4]


def test_a_sequence_in_front_and_layers_that_share_their_ffn() -> None:
    model = tiny("xlnet")
    architecture, sites = ffns("xlnet", model)
    found = capture_activations(model, architecture, sites, OWN, rows=10_000, seed=0)
    x = watched(model, "layer.1.ff.layer_1", OWN)
    assert x.shape[:2] == (7, 3)
    assert torch.equal(found[1].x, x.transpose(0, 1)[OWN["attention_mask"].bool()])
    model = tiny("albert")
    architecture, sites = ffns("albert", model)
    [rows] = capture_activations(model, architecture, sites, OWN, rows=10_000, seed=0)
    x = watched(model, f"{sites[0].path}.ffn", OWN)
    assert torch.equal(rows.x, x[OWN["attention_mask"].bool().repeat(3, 1)])


def test_which_mask_is_an_ffns() -> None:
    own, other = OWN["attention_mask"].bool(), OTHER["attention_mask"].bool()
    batch = {**OWN, **{f"decoder_{name}": value for name, value in OTHER.items()}}

    def rows(shape: tuple[int, ...], path: str) -> Tensor:
        return counted(torch.zeros(*shape, 2), batch, path)

    for shape in ((3, 7), (21,), (1, 21), (7, 3)):
        assert torch.equal(rows(shape, "layers.0"), own)
        assert torch.equal(rows(shape, "model.encoder.layers.0"), own)
    for shape in ((3, 4), (12,), (4, 3)):
        assert torch.equal(rows(shape, "layers.0"), other)
        assert torch.equal(rows(shape, "model.text_decoder.layers.0"), other)
    # What the other side's mask would fit, and what none does.
    for shape, path in (((3, 4), "encoder.layers.0"), ((3, 7), "decoder.layers.0"), ((3, 7), "vision_tower.layers.0")):
        assert torch.equal(rows(shape, path), torch.ones(shape, dtype=torch.bool))
    assert torch.equal(rows((5,), "layers.0"), torch.ones(1, 5, dtype=torch.bool))
    assert torch.equal(rows((2, 3, 7), "layers.0"), torch.ones(2, 3, 7, dtype=torch.bool))
    # The decoder of a model without an encoder, and a mask of frames.
    assert torch.equal(counted(torch.zeros(3, 7, 2), OWN, "model.decoder.layers.0"), own)
    frames = {"input_features": torch.zeros(3, 7, 8), "attention_mask": OWN["attention_mask"]}
    assert torch.equal(counted(torch.zeros(3, 7, 2), frames, "encoder.layers.0"), own)


# --- errors ----------------------------------------------------------------------------------------------------------


def refusal(call: Any) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_wrong_batches_are_refused_on_one_line() -> None:
    vit, whisper, llava = tiny("vit"), tiny("whisper"), tiny("llava")
    architecture, sites = ffns("vit", vit)

    def captured(batch: Any) -> Any:
        return lambda: capture_activations(vit, architecture, sites, batch, rows=9, seed=0)

    for batch in (OWN, UserDict(labels=torch.ones(2, 2)), {"pixel_values": [1, 2]}):
        assert refusal(captured(batch)).startswith(
            "a batch of sample must map pixel_values to a tensor, as the model's"
        )
    assert refusal(captured([])).startswith(
        "sample needs at least one batch: a mapping with pixel_values, as the model's"
    )
    assert "pixel_values in a batch of sample is (5,): give a row" in refusal(captured({"pixel_values": torch.ones(5)}))
    assert refusal(captured({"pixel_values": torch.ones(1, 3, 9, 9)})).startswith(
        "the model cannot run on the sample ("
    )

    def ran(model: Any, batch: Any) -> Any:
        return lambda: Runner(model).base(batch)

    message = refusal(ran(whisper, {"input_features": torch.zeros(1, 8, 40)}))
    assert message.startswith(
        "the sample has no decoder_input_ids, and the decoder cannot read input_features: add them"
    )
    assert "cannot run" in refusal(ran(tiny("clip"), {"pixel_values": torch.zeros(1, 3, 16, 16)}))
    [batch] = take_batches(processed("llava"), 1)
    batch["input_ids"][0, 0] = 60
    assert "holds token 60, the model knows 0 to 59" in refusal(ran(llava, batch))
    assert "2 towers side by side" in refusal(lambda: Runner(tiny("clip")).hidden_states(processed_clip()))


def processed_clip() -> dict[str, Tensor]:
    return take_batches(processed("clip"), 1)[0]


def test_placeholders_may_lie_beyond_the_vocabulary() -> None:
    model = tiny("llava", image_token_index=60)
    [batch] = take_batches(processed("llava"), 1)
    batch["input_ids"][batch["input_ids"] == IMAGE_TOKEN] = 60
    with torch.no_grad(), Runner(model) as runner:
        runner._check_vocabulary(model.base_model, batch)
        assert "holds token 60" in refusal(
            lambda: runner._check_vocabulary(model.base_model, {**batch, "pixel_values": 0})
        )


def test_a_model_whose_inputs_nobody_can_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("vit")
    monkeypatch.setattr(type(model), "main_input_name", "flattened_patches")
    monkeypatch.setattr(type(model), "forward", lambda self, flattened_patches: None)
    message = refusal(lambda: random_batch(model, seed=0))
    assert message.startswith(
        "ViTForImageClassification: what it takes besides flattened_patches cannot be guessed: give"
    )
    # A batch without the images would leave out their FFNs.
    model = tiny("llava")
    monkeypatch.setattr(type(model), "get_image_features", lambda self, pixel_values: torch.zeros(1, 1, 3))
    assert "give sample" in refusal(lambda: random_batch(model, seed=0))
