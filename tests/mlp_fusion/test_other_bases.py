"""Stored adapters that are loaded onto another model than their own: refused in a line, and nothing is changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from companion_models import attached, classifier, logits
from peft import PeftModel

import mlp_fusion
from mlp_fusion import InputError, MpoConfig, PafiConfig
from mlp_fusion.companions.making import make_config

CONFIGS = {
    "pafi": lambda: PafiConfig(budget=0.05),
    "pafi-dense": lambda: PafiConfig(budget=40, target_modules=["dense"], biases=False),
    "mpo": lambda: MpoConfig(),
    "mpo-8": lambda: MpoConfig(bonds=8, embeddings=False),
}
#: Width of the base that adapters are trained on: with its neighbour below it is factored alike.
WIDTH = 128


def fused() -> Any:
    model = classifier(intermediate_size=WIDTH)
    mlp_fusion.fuse(model, 0.5, method="fusion")
    return model


OTHERS = {
    "narrow": lambda: classifier(intermediate_size=WIDTH // 2),
    "one less": lambda: classifier(intermediate_size=WIDTH - 1),
    "wide": lambda: classifier(intermediate_size=WIDTH + 16),
    "fused": fused,
    "shallow": lambda: classifier(intermediate_size=WIDTH, num_hidden_layers=1),
}


@pytest.fixture(params=CONFIGS)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A tuned model, stored in the test's folder."""
    model = attached(classifier(intermediate_size=WIDTH), CONFIGS[request.param](), size=0.1)
    model.save_pretrained(tmp_path)
    return model


def forget_shapes(folder: Path) -> None:
    """As adapters were stored once."""
    file = folder / "adapter_config.json"
    stored = json.loads(file.read_text(encoding="utf-8"))
    assert stored.pop("shapes")
    file.write_text(json.dumps(stored), encoding="utf-8")


@pytest.mark.parametrize("other", OTHERS)
def test_another_base_is_refused_before_anything_is_changed(made: Any, other: str, tmp_path: Path) -> None:
    model = OTHERS[other]()
    before, names = logits(model), [name for name, _ in model.named_modules()]
    with pytest.raises(InputError, match="load the base that it was trained on") as caught:
        PeftModel.from_pretrained(model, tmp_path)
    assert "\n" not in str(caught.value)
    assert names == [name for name, _ in model.named_modules()]
    assert torch.equal(logits(model), before)


def test_beside_another_adapter_as_well(made: Any, tmp_path: Path) -> None:
    for width in (WIDTH, WIDTH // 2):
        model = attached(classifier(intermediate_size=width), type(made.peft_config["default"])())
        if width == WIDTH:
            model.load_adapter(tmp_path, "stored")
            model.set_adapter("stored")
            assert torch.equal(logits(model), logits(made))
        else:
            with pytest.raises(InputError, match="load the base that it was trained on"):
                model.load_adapter(tmp_path, "stored")
            assert list(model.peft_config) == ["default"]


def test_without_shapes_it_loads_and_what_cannot_fit_is_refused(made: Any, tmp_path: Path) -> None:
    forget_shapes(tmp_path)
    again = PeftModel.from_pretrained(classifier(intermediate_size=WIDTH), tmp_path).eval()
    assert torch.equal(logits(again), logits(made))
    again.save_pretrained(tmp_path / "again")
    forget_shapes(tmp_path / "again")  # they are stored now
    with pytest.raises(InputError, match=r"load the base that (it was|they were) trained on"):
        logits(PeftModel.from_pretrained(classifier(intermediate_size=WIDTH // 2), tmp_path))


@pytest.mark.parametrize("made", ["mpo", "mpo-8"], indirect=True)
def test_a_chain_without_shapes_is_refused_where_it_would_be_cut_or_too_small(made: Any, tmp_path: Path) -> None:
    forget_shapes(tmp_path)
    for other in (WIDTH // 2, WIDTH + 16):
        with pytest.raises(InputError, match=r"the stored chain of \S+ is of \d+ x \d+, which does not make"):
            PeftModel.from_pretrained(classifier(intermediate_size=other), tmp_path)


@pytest.mark.parametrize(("method", "name"), [("pafi", "shapes"), ("mpo", "shapes"), ("mpo", "chains")])
def test_what_is_filled_in_is_no_option(method: str, name: str) -> None:
    with pytest.raises(InputError, match=f"{method} has no option '{name}'"):
        make_config(method, {name: "{}"})
