"""What errors of an FFN's outputs do to the model, against perturbing every output in turn; and its use in tuning."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bundles import random_bundle, statistics_of
from families import FAMILIES, tiny_model, token_batch
from mlp_fusion import InputError, fuse
from mlp_fusion.calibration import collect, output_sensitivities, refit, sensitivity, train_locally
from mlp_fusion.neurons import NeuronBundle
from mlp_fusion.reducing import pipeline
from mlp_fusion.running import excerpts
from mlp_fusion.running.batches import token_mask
from mlp_fusion.store.record import architecture_of

pytestmark = pytest.mark.slow

TEXT = [token_batch(seed=n, batch=6, length=8) for n in range(3)]
WHOLE = {name: torch.cat([batch[name] for batch in TEXT]) for name in TEXT[0]}


def _found(model: Any, text: Sequence[Any] = TEXT, seed: int = 0) -> list[Tensor]:
    architecture = architecture_of(model.config)
    found = output_sensitivities(model, architecture, architecture.sites(model), text, seed=seed)
    return [each.factor for each in found]


def _masked_states(model: Any, batch: Any) -> Tensor:
    """`(sequences, length * hidden)`, 0 where there is no token."""
    states: Tensor = model.base_model(**batch).last_hidden_state * token_mask(batch).unsqueeze(-1)
    return states.flatten(1)


@torch.no_grad()
def _masked_predictions(model: Any) -> Callable[[Any, Any], Tensor]:
    """Logits in units in which squares of small changes are twice the divergence of predictions, where tokens are."""
    root = model(**WHOLE).logits.softmax(dim=-1).sqrt()

    def predictions(model: Any, batch: Any) -> Tensor:
        logits = model(**batch).logits
        about = root * (logits - (root.square() * logits).sum(dim=-1, keepdim=True))
        masked: Tensor = about * token_mask(batch).unsqueeze(-1)
        return masked.flatten(1)

    return predictions


@torch.no_grad()
def _by_perturbing(
    model: Any, layer: int, step: float = 1e-5, outputs: Callable[[Any, Any], Tensor] = _masked_states
) -> Tensor:
    """Mean over tokens of `J^T J`, every column of every J a difference quotient."""
    architecture = architecture_of(model.config)
    projection = architecture.projection(architecture.sites(model)[layer], "w_out")
    added = torch.zeros(())
    hook = projection.register_forward_hook(lambda _module, _args, y: y + added)
    d = architecture.read(architecture.sites(model)[layer]).w_out.shape[-1]
    mask, total = token_mask(WHOLE), torch.zeros(d, d, dtype=torch.float64)
    for position in range(mask.shape[1]):
        columns = []
        for entry in range(d):
            sides = []
            for sign in (1.0, -1.0):
                added = torch.zeros(*mask.shape, d, dtype=torch.float64)
                added[:, position, entry] = sign * step
                sides.append(outputs(model, WHOLE))
            columns.append((sides[0] - sides[1]) / (2.0 * step))
        jacobian = torch.stack(columns, dim=-1)[mask[:, position]]
        total += torch.einsum("sod,soe->de", jacobian, jacobian)
    hook.remove()
    return total / mask.sum()


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_sensitivities_are_those_of_perturbed_outputs(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With next to nothing of the identity, averaged over probes, which are random."""
    monkeypatch.setattr(sensitivity, "_IDENTITY", 1e-4)
    model = tiny_model(family, dtype=torch.float64)
    exact = _by_perturbing(model, 1)
    exact *= len(exact) / exact.trace()
    probes = [_found(model, seed=seed)[1].double() for seed in range(60)]
    mean = torch.stack([factor @ factor.T for factor in probes]).mean(dim=0)
    assert torch.linalg.norm(mean - exact) < 0.08 * torch.linalg.norm(exact)
    # What there is to be found is well away from "all alike".
    assert torch.linalg.norm(torch.eye(len(exact)) - exact) > 0.3 * torch.linalg.norm(exact)
    assert all(torch.equal(factor, factor.tril()) for factor in probes)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_sensitivities_of_language_models_are_those_of_their_predictions(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "_IDENTITY", 1e-4)
    monkeypatch.setattr(sensitivity, "_LOGITS", 7)
    model = tiny_model(family, task="CausalLM", dtype=torch.float64)
    exact = _by_perturbing(model, 1, outputs=_masked_predictions(model))
    exact *= len(exact) / exact.trace()
    probes = [_found(model, seed=seed)[1].double() for seed in range(60)]
    mean = torch.stack([factor @ factor.T for factor in probes]).mean(dim=0)
    assert torch.linalg.norm(mean - exact) < 0.12 * torch.linalg.norm(exact)
    states = _by_perturbing(model, 1)
    states *= len(states) / states.trace()
    assert torch.linalg.norm(states - exact) > 0.3 * torch.linalg.norm(exact), "the hidden states say something else"


def test_a_head_that_is_not_all_there_is_to_logits_is_not_taken_for_one() -> None:
    """Gemma 2 bounds its logits: its hidden states are what counts."""
    plain, bounded = (tiny_model("gemma2", task=task) for task in ("Model", "CausalLM"))
    bounded.model.load_state_dict(plain.state_dict())
    assert all(torch.equal(*pair) for pair in zip(_found(plain), _found(bounded), strict=True))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_model_is_left_alone(family: str) -> None:
    model = tiny_model(family)
    model.train()
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        factors = _found(model)
    assert model.training
    assert not frozen.requires_grad
    assert all(p.requires_grad and p.grad is None for p in model.parameters() if p is not frozen)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    for factor in factors:
        weight = factor.double() @ factor.double().T
        assert float(weight.diagonal().mean()) == pytest.approx(1.0, rel=1e-5)
        assert float(torch.linalg.eigvalsh(weight)[0]) > 0.0999
    assert all(torch.equal(*pair) for pair in zip(factors, _found(model), strict=True))


def test_chunks_layers_and_padding_make_no_difference() -> None:
    plain = _found(tiny_model("bert", dtype=torch.float64))
    chunked = _found(tiny_model("bert", dtype=torch.float64, chunk_size_feed_forward=4))
    for one, other in zip(plain, chunked, strict=True):
        torch.testing.assert_close(one, other)
    model: Any = tiny_model("bert", dtype=torch.float64)
    architecture = architecture_of(model.config)
    [alone] = output_sensitivities(model, architecture, architecture.sites(model)[1:2], TEXT, seed=0)
    torch.testing.assert_close(alone.factor, plain[1])
    # Ids behind the padding are not looked at.
    other = [{**b, "input_ids": torch.where(token_mask(b), b["input_ids"], 5)} for b in TEXT]
    for one, two in zip(plain, _found(model, other), strict=True):
        torch.testing.assert_close(one, two)


def test_what_the_model_writes_over_is_seen_as_it_was() -> None:
    """Some (Falcon) add to an FFN's outputs in place."""
    found = []
    for in_place in (False, True):
        model: Any = tiny_model("llama", dtype=torch.float64)
        factors = torch.linspace(0.5, 2.0, model.config.hidden_size, dtype=torch.float64)

        def changed(_module: Any, _args: Any, y: Tensor, own: Tensor = factors, over: bool = in_place) -> Tensor:
            return y.mul_(own) if over else y * own

        for layer in model.model.layers:
            layer.mlp.register_forward_hook(changed)
        found.append(_found(model))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_sizes_are_those_of_the_rows_that_excerpts_have(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the gradient is cut off, sizes are 0; the others stand where `collect` has what the FFN saw there."""
    model: Any = tiny_model(family, dtype=torch.float64)
    architecture = architecture_of(model.config)
    site = architecture.sites(model)[-1]
    seen: list[Tensor] = []
    wanted: list[Tensor] = []

    def probe(_head: Any, hidden: Tensor, generator: torch.Generator) -> Tensor:
        chosen = torch.rand(hidden.shape[:-1], generator=generator) < 0.3
        batch = next(windows)
        wanted.append(seen[-1][chosen & token_mask(batch)])
        return torch.randn(hidden.shape, generator=generator).to(hidden) * chosen.unsqueeze(-1)

    monkeypatch.setattr(excerpts, "_RUN", 16)
    looked_at = list(excerpts.excerpts(model, TEXT, sensitivity.SENSED_TOKENS))
    windows = iter(looked_at)
    assert len(looked_at) > len(TEXT)
    [known] = collect(model, architecture, [site], looked_at, seed=0)
    monkeypatch.setattr(sensitivity, "_probe", probe)
    handle = architecture.projection(site, "w_in").register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    [found] = output_sensitivities(model, architecture, [site], TEXT, seed=3)
    handle.remove()
    assert len(found.sizes) == len(known.x) == sum(int(token_mask(batch).sum()) for batch in TEXT)
    assert 0 < int((found.sizes > 0).sum()) < len(found.sizes)
    torch.testing.assert_close(known.x[found.sizes > 0], torch.cat(wanted))


def test_what_is_looked_at_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    def probed(batches: list[Any], chunk: int = 1) -> list[Any]:
        model: Any = SimpleNamespace(config=SimpleNamespace(chunk_size_feed_forward=chunk))
        return list(excerpts.excerpts(model, batches, 60))

    ids = torch.arange(2 * 40).reshape(2, 40)
    for name, value in {"_RUN": 24, "_SEQUENCE": 12}.items():
        monkeypatch.setattr(excerpts, name, value)
    # Two long sequences: the first 12 positions of both, side by side.
    [part] = probed([{"input_ids": ids}])
    assert torch.equal(part["input_ids"], ids[:, :12])
    # From the first token of each on; the length stays a multiple of the chunks that the model's FFNs run in.
    mask = torch.ones(2, 40, dtype=torch.int64)
    mask[0, :20] = 0
    mask[1, :30] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": torch.arange(40).unsqueeze(0)}
    [part] = probed([batch])
    assert torch.equal(part["input_ids"], torch.stack([ids[0, 20:32], ids[1, 28:]]))
    assert torch.equal(part["attention_mask"], torch.stack([mask[0, 20:32], mask[1, 28:]]))
    assert torch.equal(part["position_ids"], torch.stack([torch.arange(20, 32), torch.arange(28, 40)]))
    [part] = probed([batch], chunk=5)
    assert part["input_ids"].shape == (2, 10)
    # Behind the tokens, padding is left out, and sequences without any token are.
    mask = torch.zeros(5, 40, dtype=torch.int64)
    mask[1:, :3] = 1
    [part] = probed([{"input_ids": torch.arange(5 * 40).reshape(5, 40), "attention_mask": mask}])
    assert part["input_ids"][:, 0].tolist() == [40, 80, 120, 160]
    assert part["attention_mask"].shape == (4, 3)
    # Of a large batch some, in parts; of many batches some, from first to last.
    parts = probed([{"input_ids": torch.arange(30).unsqueeze(1).expand(30, 6)}])
    assert torch.cat([p["input_ids"][:, 0] for p in parts]).tolist() == list(range(0, 30, 3))
    assert [len(p["input_ids"]) for p in parts] == [4, 4, 2]
    parts = probed([{"input_ids": torch.full((3, 8), n)} for n in range(10)])
    assert [int(p["input_ids"][0, 0]) for p in parts] == [0, 1, 2, 4, 5, 6, 8, 9]


def test_texts_of_several_batches_are_looked_at_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(excerpts, "_RUN", 24)
    model: Any = SimpleNamespace(config=SimpleNamespace())

    def batch(first: int, rows: int, length: int, **more: Tensor) -> dict[str, Tensor]:
        ids = first + torch.arange(rows * length).reshape(rows, length)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}

    parts = list(excerpts.excerpts(model, [batch(10, 1, 4), batch(20, 2, 6), batch(50, 2, 3)], 99))
    assert [part["input_ids"].shape for part in parts] == [(3, 6), (2, 3)]
    assert parts[0]["input_ids"][:, 0].tolist() == [10, 20, 26]
    assert parts[0]["attention_mask"].sum(dim=1).tolist() == [4, 6, 6]
    # What no mask leaves out, or has positions of its own, stays as it is.
    positions = {"position_ids": torch.arange(4).unsqueeze(0)}
    assert len(list(excerpts.excerpts(model, [batch(10, 1, 4, **positions), batch(20, 1, 4, **positions)], 99))) == 2
    bare = [{"input_ids": batch(first, 1, 4)["input_ids"]} for first in (10, 20)]
    assert len(list(excerpts.excerpts(model, bare, 99))) == 2


def test_models_without_gradients_are_refused() -> None:
    class Cut(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach()

    class Burst(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = 1.0 * x
            if y.requires_grad:
                y.register_hook(lambda gradient: gradient * torch.inf)
            return y

    model: Any = tiny_model("llama")
    model.model.norm = nn.Sequential(model.model.norm, Cut())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=r"gradients through the model fail .*such as fusion, without tune_steps"):
        fuse(model, 16, calibration=TEXT, tune_steps=2)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for dtype, remedy in (
        (torch.float16, "float16: load it in float32"),
        (torch.float32, "float32: use a method that"),
    ):
        model = tiny_model("gpt2", dtype=dtype)
        model.transformer.ln_f = nn.Sequential(model.transformer.ln_f, Burst())
        with pytest.raises(InputError, match=f"not finite in {remedy}"):
            _found(model)
    model = tiny_model("bert")
    model.base_model.encoder.layer = model.base_model.encoder.layer[:2]
    architecture = architecture_of(model.config)
    skipped = architecture.sites(tiny_model("bert"))[2:]
    with pytest.raises(InputError, match=r"^an FFN did not run"):
        output_sensitivities(model, architecture, [*architecture.sites(model), *skipped], TEXT, seed=0)
    with pytest.raises(InputError, match="at least one batch"):
        _found(tiny_model("bert"), [])


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_models_of_every_setting_can_be_tuned(family: str) -> None:
    """In evaluation mode and frozen, with checkpointing, tuples for outputs, and a cache; text batch by batch."""
    expected = _found(tiny_model(family))
    for model in (
        tiny_model(family).requires_grad_(False),
        tiny_model(family, return_dict=False),
        tiny_model(family, use_cache=True),
    ):
        assert all(torch.equal(*pair) for pair in zip(_found(model), expected, strict=True))
    model = tiny_model(family)
    model.gradient_checkpointing_enable()
    model.train()
    for found, wanted in zip(_found(model), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    one, again = (_found(tiny_model(family), text) for text in (WHOLE, iter([WHOLE])))
    assert all(torch.equal(*pair) for pair in zip(one, again, strict=True))
    positions = {**WHOLE, "position_ids": torch.arange(8).unsqueeze(0)}
    for found, wanted in zip(_found(tiny_model(family), [positions]), one, strict=True):
        torch.testing.assert_close(found, wanted)
    half = _found(tiny_model(family, dtype=torch.bfloat16))
    for found, wanted in zip(half, expected, strict=True):
        assert float(torch.linalg.norm(found - wanted) / torch.linalg.norm(wanted)) < 0.1


def test_tuning_heeds_what_matters() -> None:
    original = random_bundle(width=40)
    x = torch.randn(400, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    known = statistics_of(original, x)
    reduced = refit(original.reduce(torch.arange(40).unsqueeze(0) % 8), known).bundle
    d_out = known.y.shape[1]
    first = torch.eye(d_out, dtype=torch.float64)
    first[0, 0], first[2, 0] = 30.0, 3.0
    weighed = dataclasses.replace(known, sensitivity=first)

    def errors(bundle: NeuronBundle) -> Tensor:
        difference: Tensor = bundle.forward(x)[0] - known.y
        return difference.square().sum(dim=0)

    plain, found = (train_locally(reduced, [s], steps=150, seed=0) for s in (known, weighed))
    assert errors(found.bundle)[0] < 0.7 * errors(plain.bundle)[0]
    assert errors(found.bundle)[1:].sum() > errors(plain.bundle)[1:].sum()
    weights = known.row_weights().unsqueeze(1)
    expected = torch.linalg.norm((found.bundle.forward(x)[0] - known.y) * weights @ first)
    size = torch.linalg.norm(known.y * weights @ first)
    assert float(found.after[0]) == pytest.approx(float(expected / size))
    # Weighing all alike changes nothing, and FFNs side by side have each their own.
    alike = dataclasses.replace(known, sensitivity=torch.eye(d_out))
    torch.testing.assert_close(train_locally(reduced, [alike], steps=150, seed=0).bundle.w_in, plain.bundle.w_in)
    both = train_locally(NeuronBundle.stack([reduced, reduced]), [alike, weighed], steps=150, seed=0)
    torch.testing.assert_close(both.bundle.select(0).w_in, plain.bundle.w_in)
    torch.testing.assert_close(both.bundle.select(1).w_in, found.bundle.w_in)
    with pytest.raises(ValueError, match="give it to all"):
        train_locally(NeuronBundle.stack([reduced, reduced]), [known, weighed], steps=1, seed=0)


@pytest.mark.parametrize("sequential", [False, True])
def test_fuse_tunes_every_ffn_by_its_own_sensitivity(sequential: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor | None] = []
    whole = pipeline.train_locally

    originals: list[Tensor] = []

    def recorded(reduced: NeuronBundle, statistics: Sequence[Any], **options: Any) -> Any:
        seen.extend(known.sensitivity for known in statistics)
        originals.extend(options["originals"].w_in)
        return whole(reduced, statistics, **options)

    monkeypatch.setattr(pipeline, "train_locally", recorded)
    model = tiny_model("bert")
    expected = _found(copy.deepcopy(model), seed=3)
    architecture = architecture_of(model.config)
    whole_ffns = [architecture.read(site).w_in[0].clone() for site in architecture.sites(model)]
    done: list[tuple[int, int]] = []
    fuse(
        model, 16, calibration=TEXT, tune_steps=4, sequential=sequential, seed=3,
        progress=lambda *now: done.append(now),
    )  # fmt: skip
    assert len(seen) == 3
    for found, wanted in zip(seen, expected, strict=True):
        assert found is not None
        assert torch.equal(found, wanted)
    assert all(torch.equal(*pair) for pair in zip(originals, whole_ffns, strict=True)), "what mixtures are asked of"
    assert done == sorted(done)
    assert done[-1] == (15, 15)


@pytest.mark.parametrize(("method", "asked"), [("merge", True), ("prune", False)])
def test_merge_alone_asks_for_sensitivities_without_tuning(
    method: str, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    get = pipeline.get_method

    def recorded(name: str) -> Any:
        found = get(name)

        def reduce(bundle: NeuronBundle, width: int, *, seed: int, statistics: Any = None) -> Any:
            seen.extend(known.sensitivity is not None for known in statistics)
            return found.reduce(bundle, width, seed=seed, statistics=statistics)

        return dataclasses.replace(found, reduce=reduce)

    monkeypatch.setattr(pipeline, "get_method", recorded)
    fuse(tiny_model("bert"), 16, method=method, calibration=TEXT)
    assert seen == [asked] * 3
