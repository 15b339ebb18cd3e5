"""What no method and text come to on models that do not allow a step of it: they go without it, and say so."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import round_trips
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, MobileBertConfig, MobileBertModel, PoolFormerConfig, PoolFormerModel

from families import tiny_model, token_batch
from mlp_fusion import InputError, fuse
from mlp_fusion.calibration import output_gradients, sensitivity
from mlp_fusion.errors import SkippableError
from mlp_fusion.families import building
from mlp_fusion.reducing import learning
from mlp_fusion.store.record import architecture_of

pytestmark = pytest.mark.slow

TEXT = [token_batch(seed=n, batch=8, length=9) for n in range(3)]


def test_without_gradients_errors_count_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_args: Any, **_options: Any) -> None:
        raise SkippableError("gradients through the model fail")

    monkeypatch.setattr(learning, "output_sensitivities", failing)
    with pytest.warns(UserWarning, match="^all errors of outputs count alike: gradients through the model fail"):
        report = fuse(tiny_model("bert"), 16, calibration=TEXT)
    assert (report.settings.method, report.settings.sequential, report.settings.tune_steps) == ("merge", True, 80)
    named = {"width": 16, "method": "merge"}
    for asked in (named, {"width": "auto", "budget": 0.5}, {"width": 16, "tune_steps": 3}):
        with pytest.raises(InputError, match=r"^gradients through the model fail"):
            fuse(tiny_model("bert"), calibration=TEXT, **asked)  # type: ignore[arg-type]


class Stubborn(torch.nn.Module):
    """A norm that runs without gradients alone."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy().copy())


def test_a_model_that_fails_where_gradients_are_recorded() -> None:
    def model() -> Any:
        made: Any = tiny_model("llama")
        made.model.norm = torch.nn.Sequential(made.model.norm, Stubborn())
        return made

    with pytest.warns(UserWarning, match=r"^all errors of outputs count alike: gradients through the model fail"):
        fuse(model(), 16, calibration=TEXT)
    with pytest.raises(InputError, match=r"^gradients through the model fail"):
        fuse(model(), 16, calibration=TEXT, method="merge")


def test_memory_that_is_not_there_is_no_reason_to_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: Any, **_options: Any) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(torch.autograd, "grad", full)
    with pytest.raises(InputError, match="need more memory than there is"):
        fuse(tiny_model("bert"), 16, calibration=TEXT)


def mobilebert() -> MobileBertModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intra_bottleneck_size": 16, "embedding_size": 16, "intermediate_size": 32}
    config = MobileBertConfig(
        **sizes, vocab_size=97, num_hidden_layers=2, num_attention_heads=2, true_hidden_size=16, pad_token_id=0
    )
    return MobileBertModel(config).eval()


def test_layers_inside_one_another_are_calibrated_at_once() -> None:
    with pytest.warns(UserWarning, match=r"^all FFNs are calibrated at once: encoder\.layer\.0\.ffn\.0 is inside of"):
        report = fuse(mobilebert(), 16, calibration=TEXT)
    assert (report.settings.method, report.settings.sequential, report.settings.tune_steps) == ("merge", False, 80)
    with pytest.raises(InputError, match=r"is inside of encoder\.layer\.0, .* sequential=False"):
        fuse(mobilebert(), 16, calibration=TEXT, sequential=True)


def test_gradients_of_pointwise_convolutions_have_their_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    stages: dict[str, Any] = {
        "hidden_sizes": [8, 16], "depths": [1, 1], "patch_sizes": [3, 3], "strides": [2, 2], "padding": [1, 1],
        "num_encoder_blocks": 2, "mlp_ratio": 2.0,
    }  # fmt: skip
    model: Any = PoolFormerModel(PoolFormerConfig(**stages)).double().eval()
    architecture = architecture_of(model.config)
    sites = architecture.sites(model)
    batch = {"pixel_values": torch.randn(2, 3, 20, 12, dtype=torch.float64)}
    monkeypatch.setattr(sensitivity, "_probe", lambda _head, hidden, _generator: torch.ones_like(hidden))
    found: list[Tensor] = []
    output_gradients(model, architecture, sites, [batch], lambda _n, rows: found.append(rows), seed=0)
    outputs: list[Tensor] = []
    for site in sites:
        architecture.projection(site, "w_out").register_forward_hook(lambda _m, _args, y: outputs.append(y))
    wanted = torch.autograd.grad(model(**batch).last_hidden_state.sum(), outputs)
    for rows, gradient in zip(found, wanted, strict=True):
        torch.testing.assert_close(rows, gradient.movedim(1, -1).flatten(0, -2))


#: What each has that others have not, and whether it goes without something.
AWKWARD = {
    "blt_patcher": "a tuple for outputs",
    "bridgetower": "hidden states of towers side by side",
    "falcon": "an addition in place",
    "glm4v_moe_text": "shared experts of the shape of dense FFNs",
    "lxmert": "no hidden states",
    "mobilebert": "layers inside layers",
    "musicgen_melody_decoder": "codebooks",
    "openai-gpt": "a list for outputs of layers",
    "poolformer": "convolutions",
    "videomt": "layers that run twice",
}
WITHOUT = {"blt_patcher", "bridgetower", "lxmert", "mobilebert", "videomt"}


@pytest.mark.parametrize("name", sorted(AWKWARD))
def test_awkward_models_get_the_default(name: str) -> None:
    if name not in CONFIG_MAPPING:
        pytest.skip("transformers lacks it")
    results = Path(__file__).parents[2] / "bench" / "results" / "families-roundtrip-cpu.json"
    types = json.loads(results.read_text(encoding="utf-8"))["types"]
    [config] = [known["config"] for known in types if known["type"] == name]
    with building.undisturbed():
        trip = round_trips.prepare(name, round_trips.steps_of(config))
    assert trip.sample is not None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = fuse(trip.model, 0.5, calibration=[dict(trip.sample)] * 3)
    assert report.settings.method == "merge"
    said = [str(w.message) for w in caught if "all errors of outputs" in str(w.message) or "all FFNs" in str(w.message)]
    assert bool(said) == (name in WITHOUT)
    assert all(row.neurons_after < row.neurons_before for row in report.rows)
