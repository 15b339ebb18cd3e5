"""Compressing from disk to disk with text to learn from: a layer in memory at a time, the bits of a model in memory."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_models import moe_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from streams import StoppedError, files, stop_after, with_tokenizer
from transformers.models.bart.modeling_bart import BartEncoder
from transformers.models.t5.modeling_t5 import T5Block

import checkpoints as ck
import mlp_fusion
from mlp_fusion import InputError
from mlp_fusion.errors import SkippableError
from mlp_fusion.streaming import layerwise, sensing

pytestmark = pytest.mark.slow

_SENTENCES = ["the cat sat on a mat", "a dog", "the big dog ran over the cat and the mat"] * 8


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("\n".join(_SENTENCES))
    return file


@pytest.mark.parametrize(
    ("name", "sequential", "dtype"),
    [
        # Layouts of FFNs are read before it matters how text is learnt from: each dense one has one of the two ways.
        ("Phi3Config", False, torch.bfloat16),
        ("Gemma3TextConfig", False, torch.bfloat16),
        ("OPTConfig", True, torch.float32),
        ("EsmConfig", True, torch.float32),
        # Experts, in modules of their own too, and encoders with decoders have both.
        *((name, False, torch.bfloat16) for name in ("Qwen3MoeConfig", "GptOssConfig", "BartConfig", "T5Config")),
        *((name, True, torch.float32) for name in ("GptOssConfig", "BartConfig", "T5Config")),
        *(("SwitchTransformersConfig", sequential, torch.float32) for sequential in (False, True)),
        ("Llama4TextConfig", False, torch.float32),
        ("Phi3Config", False, torch.float64),
        ("Qwen3MoeConfig", True, torch.float64),
    ],
)
def test_calibrated_the_same_bits_as_in_memory(
    name: str, sequential: bool, dtype: torch.dtype, tmp_path: Path, text: Path
) -> None:
    source = with_tokenizer(name, tmp_path / "source", dtype)
    reports = [
        mlp_fusion.compress(
            source, tmp_path / str(stream), 0.5, method="fusion", stream=stream, calibration=text, sequential=sequential
        )
        for stream in (False, True)
    ]  # fmt: skip
    memory, streamed = ck.tensors(tmp_path / "False"), ck.tensors(tmp_path / "True")
    assert memory.keys() == streamed.keys()
    assert all(torch.equal(memory[key], streamed[key]) for key in memory)
    scales = [load_file(tmp_path / folder / ck.SCALE) for folder in ("False", "True")]
    assert all(torch.equal(scales[0][key], scales[1][key]) for key in scales[0])
    for ours, theirs in zip(reports[1].rows, reports[0].rows, strict=True):
        assert (ours.path, ours.held_out_error, ours.ridge) == (theirs.path, theirs.held_out_error, theirs.ridge)
        # Of an expert in a module of its own that no token reaches, there is none.
        assert 0 < ours.output_error < 1.5 or (ours.by_weights and math.isnan(ours.output_error))
        assert ours.by_weights == theirs.by_weights
        assert ours.by_weights in (None, []) or "expert" in ours.path
    assert reports[1].calibration is not None
    assert reports[0].calibration is not None
    assert reports[1].calibration.tokens == reports[0].calibration.tokens


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("name", ["Phi3Config", "Qwen3MoeConfig", "SwitchTransformersConfig"])
def test_chosen_and_trained_as_in_memory(
    name: str, sequential: bool, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Enough of it, and no sentence twice, for an expert to be trained on its share.
    generator, words = torch.Generator().manual_seed(0), sorted({word for line in _SENTENCES for word in line.split()})
    drawn = torch.randint(len(words), (200, 12), generator=generator).tolist()
    text.write_text("\n".join(" ".join(words[n] for n in line) for line in drawn))
    source = with_tokenizer(name, tmp_path / "source")
    options: dict[str, Any] = {"method": "merge", "sequential": sequential, "calibration": text}
    made: dict[str, dict[str, torch.Tensor]] = {}
    for steps, stream in ((80, False), (80, True), (0, True)):
        out = tmp_path / f"{steps} {stream}"
        mlp_fusion.compress(source, out, 0.5, stream=stream, tune_steps=steps, **options)
        made[out.name] = ck.tensors(out)
    memory, streamed, untrained = made["80 False"], made["80 True"], made["0 True"]
    assert memory.keys() == streamed.keys()
    # A BLAS may round by where weights lie in memory, which a model in memory has as they lie in the file.
    differences = [float((memory[key] - streamed[key]).abs().max()) for key in memory]
    assert max(differences) < 1e-3
    assert any(float((untrained[key] - streamed[key]).abs().max()) > 1e-2 for key in memory)


def test_gradients_that_a_model_does_not_allow(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default goes without, and goes on without when it was stopped; what is asked for is refused."""
    asked: list[int] = []

    def failing(*_args: Any, **_options: Any) -> None:
        asked.append(1)
        raise SkippableError("gradients through the model fail")

    monkeypatch.setattr(sensing, "output_gradients", failing)
    source = with_tokenizer("Phi3Config", tmp_path / "source")
    options: dict[str, Any] = {"stream": True, "calibration": text}
    with pytest.warns(UserWarning, match="^all errors of outputs count alike: gradients"), pytest.raises(StoppedError):
        mlp_fusion.compress(source, tmp_path / "out", 0.5, progress=stop_after(1), **options)
    report = mlp_fusion.compress(source, tmp_path / "out", 0.5, resume=True, **options)
    assert (report.settings.method, len(asked)) == ("merge", 1)
    with pytest.raises(InputError, match=r"^gradients through the model fail"):
        mlp_fusion.compress(source, tmp_path / "named", 0.5, method="merge", **options)
    assert not (tmp_path / "named").exists()


def test_progress_goes_on_while_gradients_are_taken(tmp_path: Path, text: Path) -> None:
    source = with_tokenizer("Phi3Config", tmp_path / "source")
    seen: list[tuple[int, int, bool]] = []

    def progress(done: int, total: int) -> None:
        seen.append((done, total, bool(list(tmp_path.glob("*/*gradients.all")))))

    options: dict[str, Any] = {"stream": True, "calibration": text, "method": "merge", "tune_steps": 2}
    report = mlp_fusion.compress(source, tmp_path / "out", 0.5, progress=progress, **options)
    ffns, counts = len(report.rows), [done for done, _, _ in seen]
    assert counts == sorted(counts)
    assert {total for _, total, _ in seen} == {counts[-1]}
    first = [written for _, _, written in seen].index(True)
    assert set(counts[:first]) == set(range(ffns + 1)), "from nothing to all, layer by layer"
    assert counts[first] == ffns + 1


def test_gradients_that_were_not_written_are_taken_again(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fills up while they are written, and a run that ends before all are there."""
    source = with_tokenizer("Phi3Config", tmp_path / "source")
    options: dict[str, Any] = {"stream": True, "calibration": text}
    mlp_fusion.compress(source, tmp_path / "whole", 0.5, **options)
    with monkeypatch.context() as full:

        def refuse(*_args: Any, **_options: Any) -> None:
            raise SafetensorError("No space left on device")

        full.setattr(sensing, "save_file", refuse)
        with pytest.raises(InputError, match="No space left on device"):
            mlp_fusion.compress(source, tmp_path / "out", 0.5, **options)
    with monkeypatch.context() as cut:
        cut.setattr(sensing, "flush", lambda _files: (_ for _ in ()).throw(StoppedError))
        with pytest.raises(StoppedError):
            mlp_fusion.compress(source, tmp_path / "out", 0.5, resume=True, **options)
    mlp_fusion.compress(source, tmp_path / "out", 0.5, resume=True, **options)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_few_sentences_are_warned_of(tmp_path: Path) -> None:
    source, text = with_tokenizer("Phi3Config", tmp_path / "source"), tmp_path / "text.txt"
    text.write_text(_SENTENCES[0])
    with pytest.warns(UserWarning, match=r"^6 tokens of calibration text are fewer than 2 for each of 32 inputs"):
        mlp_fusion.compress(source, tmp_path / "out", 0.5, stream=True, calibration=text)


def test_tokens_that_the_model_does_not_know_are_named(tmp_path: Path, text: Path) -> None:
    source = tmp_path / "source"
    model: Any = moe_model("Qwen3MoeConfig")
    model.resize_token_embeddings(4)
    model.save_pretrained(source)
    ck.add_tokenizer(source, pad_token="<pad>")
    with pytest.raises(InputError, match=r"the calibration text holds token \d+, the model knows 0 to 3"):
        mlp_fusion.compress(source, tmp_path / "out", 0.5, stream=True, calibration=text)


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize(
    ("name", "then", "more"),
    [
        ("Qwen3MoeConfig", 1, {}),
        ("T5Config", 3, {}),
        ("T5Config", 4, {}),
        ("Phi3Config", 1, {"method": "merge", "tune_steps": 3}),
    ],
)
def test_a_calibrated_run_goes_on(
    name: str,
    then: int,
    more: dict[str, Any],
    sequential: bool,
    tmp_path: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = with_tokenizer(name, tmp_path / "source")
    options: dict[str, Any] = {"stream": True, "calibration": text, "sequential": sequential, **more}
    whole = mlp_fusion.compress(source, tmp_path / "whole", 0.5, **options)
    ahead = len(whole.rows) if more else 0  # gradients at each
    with pytest.raises(StoppedError):
        mlp_fusion.compress(source, tmp_path / "out", 0.5, progress=stop_after(1, ahead), **options)
    # Other text, other hidden states.
    text.write_text("\n".join(_SENTENCES[:3]))
    with pytest.raises(InputError, match="the unfinished run had another text"):
        mlp_fusion.compress(source, tmp_path / "out", 0.5, resume=True, **options)
    text.write_text("\n".join(_SENTENCES))
    with pytest.raises(StoppedError):
        # A journal that is ahead of the hidden states: the layer is done again. Then, at the decoder's beginning.
        mlp_fusion.compress(source, tmp_path / "out", 0.5, resume=True, progress=stop_after(then, ahead), **options)
    mlp_fusion.compress(source, tmp_path / "out", 0.5, resume=True, **options)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source", "text.txt", "whole"]


@pytest.mark.parametrize(("name", "once"), [("Qwen3MoeConfig", True), ("Phi3Config", False)])
def test_only_one_layer_is_in_memory(
    name: str, once: bool, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where gradients are taken, for which layers are read more than once."""
    source = with_tokenizer(name, tmp_path / "source")
    seen: list[int] = []
    loaded = layerwise.LayerwiseModel.loaded

    @contextlib.contextmanager
    def watched(self: Any, layer: Any) -> Iterator[None]:
        with loaded(self, layer):
            real = {
                name.split(".")[2] for name, p in self.model.named_parameters() if ".layers." in name and not p.is_meta
            }
            seen.append(len(real))
            yield

    monkeypatch.setattr(layerwise.LayerwiseModel, "loaded", watched)
    mlp_fusion.compress(source, tmp_path / "out", 0.5, stream=True, calibration=text)
    assert set(seen) == {1}
    assert (len(seen) == 2) == once


def test_text_without_a_tokenizer(tmp_path: Path, text: Path) -> None:
    bare = with_tokenizer("T5Config", tmp_path / "bare")
    for file in bare.glob("*token*"):
        file.unlink()
    with pytest.raises(InputError, match="has no tokenizer to read"):
        mlp_fusion.compress(bare, tmp_path / "other", 0.5, stream=True, calibration=text)


def test_layers_that_cannot_be_run_one_by_one(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = with_tokenizer("AlbertConfig", tmp_path / "shared")
    with pytest.raises(InputError, match="its layers do not feed one another from the first to the last"):
        mlp_fusion.compress(shared, tmp_path / "out", 0.5, stream=True, calibration=text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shared", "text.txt"]  # nothing to go on with
    source = with_tokenizer("T5Config", tmp_path / "source")
    own = T5Block.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        hidden, bias, *others = own(self, *args, **kwargs)
        return (hidden, bias + hidden.mean(), *others)

    monkeypatch.setattr(T5Block, "forward", forward)
    with pytest.raises(
        InputError, match=r"encoder\.block\.1 puts out more than hidden states, so that layers cannot be"
    ):
        mlp_fusion.compress(source, tmp_path / "out", 0.5, stream=True, calibration=text)


def test_a_decoder_that_stands_in_front_of_its_encoder(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its layers would be shown what an encoder makes that has not run."""
    source = with_tokenizer("BartConfig", tmp_path / "source")
    stacks = layerwise.LayerwiseModel.stacks
    monkeypatch.setattr(layerwise.LayerwiseModel, "stacks", lambda *args: stacks(*args)[::-1])
    with pytest.raises(InputError, match="its layers do not feed one another"):
        mlp_fusion.compress(source, tmp_path / "out", 0.5, stream=True, calibration=text)


def test_a_decoder_that_attends_to_more_than_the_encoder_ends_with(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = with_tokenizer("BartConfig", tmp_path / "source")
    own = BartEncoder.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen: list[Any] = []
        handle = self.layers[0].register_forward_hook(lambda _module, _args, output: seen.append(output))
        found = own(self, *args, **kwargs)
        handle.remove()
        skipped = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
        found.last_hidden_state = found.last_hidden_state + skipped
        return found

    monkeypatch.setattr(BartEncoder, "forward", forward)
    with pytest.raises(InputError, match="its layers do not feed one another"):
        mlp_fusion.compress(source, tmp_path / "out", 0.5, stream=True, calibration=text)
