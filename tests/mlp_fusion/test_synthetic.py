"""Calibration without text: what a model writes itself, and random inputs for those that write nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import checkpoints as ck
import mlp_fusion
from commands import Run
from families import WIDTH, tiny_model
from mlp_fusion import InputError
from mlp_fusion.measure import relative_error
from mlp_fusion.reducing.chosen import find_ffns
from mlp_fusion.running import synthetic
from mlp_fusion.running.drawing import text_refusal
from mlp_fusion.running.synthetic import RANDOM_INPUTS, RANDOM_TOKENS, WRITTEN, synthetic_batches, synthetic_kind

LANGUAGE = {"task": "CausalLM"}


def kind_of(model: Any) -> str:
    return synthetic_kind(model, text_refusal(model, *find_ffns(model)))


def text_of(model: Any, tokens: int, seed: int = 0) -> Tensor:
    """All sequences that the model writes, `(sequences, length)`."""
    batches = synthetic_batches(model, WRITTEN, tokens, seed=seed)
    assert all(bool((batch["attention_mask"] == 1).all()) for batch in batches)
    return torch.cat([batch["input_ids"] for batch in batches])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_language_model_samples_its_own_distribution(family: str) -> None:
    """Each second token as often as the model says, whatever its own config would have `generate` do."""
    places = "n_positions" if family == "gpt2" else "max_position_embeddings"
    extra = {"bos_token_id": 0, "eos_token_id": 2, places: 4}  # two of which may be taken
    model: Any = tiny_model(family, **LANGUAGE, **extra)
    model.generation_config.update(top_k=1, temperature=0.1, repetition_penalty=3.0, num_beams=2, min_new_tokens=1)
    count = 4096
    text = text_of(model, 2 * count)
    assert text.shape == (count, 2)
    assert bool((text[:, 0] == 0).all())
    with torch.no_grad():
        likely = model(input_ids=torch.tensor([[0]])).logits[0, -1].double().softmax(dim=0)
    found = text[:, 1].bincount(minlength=len(likely)).double() / count
    deviation = (likely * (1 - likely) / count).sqrt()
    assert likely.max() < 0.9, "the model is not sure of anything"
    assert float(((found - likely).abs() - 6 * deviation).max()) <= 1 / count


def test_what_ends_a_text_is_a_token_like_others() -> None:
    model: Any = tiny_model("llama", **LANGUAGE)
    text = text_of(model, 3800)
    assert text.shape == (100, 38)
    assert bool((text[:, 1:-1] == 2).any()), "no text has ended, so that nothing is shown"


def test_sequences_are_no_longer_than_asked_for_or_than_the_model_reads() -> None:
    model = tiny_model("llama", **LANGUAGE)
    assert text_of(model, 12).shape == (1, 12)
    assert text_of(model, 1).shape == (1, 1)
    assert text_of(model, 41).shape == (2, 38), "40, but that some models count from their padding id on"
    assert text_of(tiny_model("llama", **LANGUAGE, max_position_embeddings=2048), 129).shape == (2, 128)
    # A decoder that states its positions under another name, and one that counts them from 2 on.
    whisper = transformers.WhisperConfig(
        vocab_size=97, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32,
        max_target_positions=20, pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=0,
        suppress_tokens=[], begin_suppress_tokens=[],
    )  # fmt: skip
    for decoder in (transformers.WhisperForCausalLM(whisper), tiny_model("roberta", **LANGUAGE, is_decoder=True)):
        text = text_of(decoder.eval(), 100)
        assert text.shape[1] == {"whisper": 18, "roberta": 38}[decoder.config.model_type]
        with torch.no_grad():
            assert decoder(input_ids=text).logits.isfinite().all()


def test_more_than_is_written_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of a second turn are others than those of the first."""
    monkeypatch.setattr(synthetic, "_TOGETHER", 3)
    text = text_of(tiny_model("llama", **LANGUAGE), 8 * 38)
    assert text.shape == (8, 38)
    assert len(text.unique(dim=0)) == 8


def test_a_model_whose_config_asks_for_tuples_writes() -> None:
    plain, tuples = (tiny_model("llama", **LANGUAGE) for _ in range(2))
    tuples.config.return_dict = False
    assert torch.equal(text_of(tuples, 200), text_of(plain, 200))
    assert not tuples.config.return_dict


def test_without_a_token_to_begin_with_texts_begin_with_random_ones() -> None:
    model: Any = tiny_model("qwen2", **LANGUAGE, bos_token_id=None)
    first = text_of(model, 3000)[:, 0]
    assert len(first.unique()) > 30
    assert int(first.max()) < 97


def test_the_same_seed_writes_the_same_and_leaves_the_model_and_the_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model("llama", **LANGUAGE).train()
    own, before = model.generation_config, torch.get_rng_state()
    # Of GPUs that are not in use, not even a seed for later is set.
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda _seed: pytest.fail("a GPU's generator was seeded"))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    text = text_of(model, 400, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.default_generator.manual_seed(17)
    assert torch.equal(text_of(model, 400, seed=3), text)
    assert not torch.equal(text_of(model, 400, seed=4), text)
    assert model.generation_config is own
    assert model.training
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_model_that_fails_to_write_says_so_and_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model("llama", **LANGUAGE)
    own = model.generation_config

    def broken(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("no such cache")

    monkeypatch.setattr(model, "generate", broken)
    with pytest.raises(InputError, match=r"LlamaForCausalLM writes no text \(RuntimeError: no such cache\): pass cal"):
        synthetic_batches(model, WRITTEN, 400, seed=0)
    assert model.generation_config is own
    monkeypatch.setattr(model, "generate", lambda input_ids, **_: input_ids)
    with pytest.raises(InputError, match="writes no text: pass calibration"):
        synthetic_batches(model, WRITTEN, 400, seed=0)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_model_that_writes_nothing_gets_random_tokens(family: str) -> None:
    model = tiny_model(family, task="Model")
    assert kind_of(model) == RANDOM_TOKENS
    batches = synthetic_batches(model, RANDOM_TOKENS, 1000, seed=0)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(16, 32), (16, 32)]
    assert not torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
    again = synthetic_batches(model, RANDOM_TOKENS, 1000, seed=0)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again, strict=True))


def test_encoders_that_read_for_a_decoder_get_random_tokens() -> None:
    config = transformers.T5Config(
        vocab_size=97, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
    assert kind_of(model) == RANDOM_TOKENS
    batches = synthetic_batches(model, RANDOM_TOKENS, 600, seed=0)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(16, 30), (16, 30)]


def vit() -> Any:
    """A tiny model of images."""
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=WIDTH, image_size=32, patch_size=8
    )
    torch.manual_seed(0)
    return transformers.AutoModel.from_config(config).eval()


def test_models_of_images_get_random_ones() -> None:
    assert kind_of(vit()) == RANDOM_INPUTS
    batches = synthetic_batches(vit(), RANDOM_INPUTS, 300, seed=0)
    assert len(batches) > 1
    assert all(batch["pixel_values"].shape[1:] == (3, 32, 32) for batch in batches)
    assert not torch.equal(batches[0]["pixel_values"][0], batches[1]["pixel_values"][0])


def test_a_model_of_which_nothing_is_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = vit()

    def unfit(*_: Any, **__: Any) -> Tensor:
        raise UnboundLocalError("features")  # as Gemma 4 does without sounds

    monkeypatch.setattr(model, "forward", unfit)
    with pytest.raises(InputError, match="ViTModel takes nothing that can be drawn: pass calibration"):
        synthetic_batches(model, RANDOM_INPUTS, 300, seed=0)


@pytest.mark.parametrize("kind", ["writes", "reads", "sees"])
def test_fusing_by_it_is_better_than_by_weights_alone(kind: str) -> None:
    """On inputs of the same kind that were not learnt from: outputs of the model at its end."""

    def fresh() -> Any:
        if kind == "sees":
            return vit()
        return tiny_model("llama", **LANGUAGE) if kind == "writes" else tiny_model("bert", task="Model")

    held_out = synthetic_batches(fresh(), kind_of(fresh()), 400, seed=99)

    def final(model: Any) -> Tensor:
        with torch.no_grad():
            return torch.cat([model.base_model(**batch).last_hidden_state.flatten(0, 1) for batch in held_out])

    exact, errors = final(fresh()), {}
    for tokens in (None, 4096):
        model = fresh()
        report = mlp_fusion.fuse(model, WIDTH // 2, synthetic=tokens, optimizer=None)
        errors[tokens] = relative_error(final(model), exact)
    assert errors[4096] < 0.75 * errors[None]
    assert report.sample == "synthetic inputs, which were fitted to"
    assert report.settings.method == "merge"
    kind = {"writes": "tokens that the model wrote", "reads": "random tokens", "sees": "positions of random inputs"}[
        kind
    ]
    assert (report.learnt() or "").startswith(f"calibrated on {report.calibration.tokens:,} {kind}, layer after layer")


def test_the_command_writes_a_checkpoint_by_it(run: Run, tmp_path: Path) -> None:
    source = ck.save_tiny(tmp_path / "source", "llama", **LANGUAGE)
    out = tmp_path / "out"
    found = run("compress", source, out, "--width", 32, "--synthetic", 2000, "--json").json
    assert found["settings"]["synthetic"] == 2000
    assert found["calibration"]["tokens"] == 53 * 38
    assert mlp_fusion.verify(out).passed
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(source)
    mlp_fusion.fuse(model, 32, synthetic=2000)
    written = ck.tensors(out)
    assert all(torch.equal(value, written[name]) for name, value in model.state_dict().items() if name in written)
    assert "down_proj" in " ".join(written)


def test_nothing_is_written_with_a_head_that_is_not_there(tmp_path: Path) -> None:
    source = ck.save_tiny(tmp_path / "source", "llama", **LANGUAGE)
    ck.edit_tensors(source, lambda held: {name: value for name, value in held.items() if name != "lm_head.weight"})
    with pytest.raises(
        InputError, match="source lacks weights of the head that text is written with: pass calibration"
    ):
        mlp_fusion.compress(source, tmp_path / "out", 32, synthetic=2000)
    assert not (tmp_path / "out").exists()


def test_a_head_that_is_not_there_is_drawn_the_same_each_time(tmp_path: Path) -> None:
    """What local training weighs errors by depends on it."""
    source = ck.save_tiny(tmp_path / "source", "llama", **LANGUAGE)
    ck.add_tokenizer(source, pad_token="<pad>")
    ck.edit_tensors(source, lambda held: {name: value for name, value in held.items() if name != "lm_head.weight"})
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on a mat\n" * 40)
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        mlp_fusion.compress(source, tmp_path / str(seed), 32, calibration=text)
        assert torch.equal(torch.get_rng_state(), before)
    first, second = ck.tensors(tmp_path / "1"), ck.tensors(tmp_path / "2")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"synthetic": 0}, "synthetic 0: give an integer from 1 on"),
        ({"synthetic": 9, "calibration": ["the cat sat"]}, "stands in for calibration text, and there is some"),
        ({"synthetic": 9, "calibration_sentences": 9}, "calibration_sentences counts sentences of text"),
        ({"synthetic": 9, "unmeasured": True}, "calibration runs the model"),
        ({"refit": True}, r"refit needs calibration text: pass calibration \(--calibration FILE\), or synthetic"),
    ],
)
def test_what_does_not_go_with_it(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        mlp_fusion.fuse(tiny_model("llama", **LANGUAGE), 16, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"synthetic": 9}, "a streamed run has no whole model: leave out synthetic, or stream"),
        ({"synthetic": 9, "engine": "ray", "stream": None}, "engine ray carries no hidden states: leave out synthetic"),
        ({"refit": True}, r"refit needs calibration text: pass calibration \(--calibration FILE\)$"),
    ],
)
def test_streamed_runs_have_no_model_to_write(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = ck.save_tiny(tmp_path / "source", "llama", **LANGUAGE)
    with pytest.raises(InputError, match=message):
        mlp_fusion.compress(source, tmp_path / "out", 16, **{"stream": True, **options})
    assert not (tmp_path / "out").exists()
