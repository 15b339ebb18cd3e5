"""What surrounds a call of `fuse`: default dtypes, autocast, inference mode, modules around the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import checkpoints as ck
from families import tiny_model, token_batch
from mlp_fusion import compress, fuse
from mlp_fusion.reducing.chosen import inner_model

BATCH = token_batch()
LONG = {"input_ids": torch.randint(3, 97, (16, 24), generator=torch.Generator().manual_seed(1))}


@contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def fused(inside: AbstractContextManager[Any] | None = None, **options: Any) -> Any:
    """A model that was fused inside of something."""
    model = tiny_model("llama", task="CausalLM")
    if inside is None:
        fuse(model, 32, **options)
        return model
    with inside:
        # Tensors of inference mode are made inside, as by a tokenizer.
        known = options.pop("calibration", None)
        options |= {} if known is None else {"calibration": [{"input_ids": known[0]["input_ids"].clone()}]}
        fuse(model, 32, **options)
    return model


AROUND: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "float64": lambda: default(torch.float64),
    "bfloat16": lambda: default(torch.bfloat16),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
}


@pytest.mark.parametrize("options", [{}, {"calibration": [LONG]}, {"calibration": [LONG], "method": "fusion"}])
@pytest.mark.parametrize("around", list(AROUND))
def test_what_surrounds_the_call_changes_no_bit(around: str, options: dict[str, Any]) -> None:
    expected = fused(**options).state_dict()
    model = fused(AROUND[around](), **options)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name
    model.train()
    model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("around", ["float64", "autocast", "inference"])
def test_what_surrounds_compress_changes_no_bit(around: str, stream: bool, tmp_path: Path) -> None:
    source = ck.save_tiny(tmp_path / "source", "llama", task="CausalLM", vocab_size=8)
    ck.add_tokenizer(source, pad_token="<pad>")
    text = tmp_path / "text.txt"
    text.write_text("a b c d\n" * 40, encoding="utf-8")
    options: dict[str, Any] = {"calibration": text, "method": "merge", "tune_steps": 2, "stream": stream}
    compress(source, tmp_path / "plain", 16, **options)
    with AROUND[around]():
        compress(source, tmp_path / "around", 16, **options)
    written = [load_file(tmp_path / name / "model.safetensors") for name in ("plain", "around")]
    assert written[0].keys() == written[1].keys()
    assert all(torch.equal(tensor, written[1][name]) for name, tensor in written[0].items())


class Around(nn.Module):
    """Called with a mapping, as a SentenceTransformer is, and without an argument that says what is in it."""

    def __init__(self, model: Any, *, own: bool) -> None:
        super().__init__()
        self.model = model
        if own:
            self.config = model.config

    def __getattr__(self, name: str) -> Any:
        return self.model.config if name == "config" else super().__getattr__(name)

    def forward(self, features: dict[str, Tensor], **_: Any) -> Tensor:
        return self.model(**features).last_hidden_state.mean(dim=1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("own", [False, True])
def test_a_module_around_a_model_has_the_model_in_it_fused(own: bool) -> None:
    inside = tiny_model("bert", task="Model")
    around = Around(tiny_model("bert", task="Model"), own=own)
    reports = [fuse(model, 16, calibration=[LONG], sample=BATCH) for model in (inside, around)]
    assert [row.output_error for row in reports[0].rows] == [row.output_error for row in reports[1].rows]
    torch.testing.assert_close(around(dict(BATCH)), inside(**BATCH).last_hidden_state.mean(dim=1), rtol=0, atol=0)
    assert around.config.intermediate_size == around.model.config.intermediate_size == 16


def test_a_module_that_passes_everything_on_is_fused_itself() -> None:
    class Passing(Around):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.model(*args, **kwargs)

    around = Passing(tiny_model("bert", task="Model"), own=True)
    assert inner_model(around) is around
    assert inner_model(Around(around.model, own=True)) is around.model
