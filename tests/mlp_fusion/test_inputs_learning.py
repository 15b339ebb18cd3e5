"""What is learnt, measured and recorded from batches of every kind of input."""

from __future__ import annotations

import copy
import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from many_inputs import KINDS, ffns, processed, text, tiny
from safetensors.torch import load_file, save_file
from torch import Tensor

from bundles import random_bundle, statistics_of
from mlp_fusion import InputError, fuse
from mlp_fusion.calibration import collect, output_sensitivities, sensitivity
from mlp_fusion.calibration.text import calibration_batches
from mlp_fusion.families import FFNSite
from mlp_fusion.measure.embeddings import embed
from mlp_fusion.measure.models import _first_samples, pooled
from mlp_fusion.methods import Reduction
from mlp_fusion.reducing.curves import hidden_state_changes
from mlp_fusion.reducing.learning import learn
from mlp_fusion.reducing.pipeline import Recipe, ReducedFFN, reduce_ffns
from mlp_fusion.reducing.sequential import reduce_sequentially
from mlp_fusion.running import excerpts
from mlp_fusion.running.batches import main_input, take_batches
from mlp_fusion.running.drawing import random_batch
from mlp_fusion.running.sampling import RowPlan, RowSample
from mlp_fusion.running.taps import capture_activations
from mlp_fusion.settings import FuseSettings, make
from mlp_fusion.store.reference import model_outputs, reference_outputs, split_reference

MODELS = [kind for kind in KINDS if "'" not in kind]


def batches_of(kind: str, count: int = 3) -> list[dict[str, Tensor]]:
    """Batches of three samples, with a text for decoders that read nothing else."""
    found = []
    for seed in range(count):
        [batch] = take_batches(processed(kind, seed), 1, main=main_input(tiny(kind)))
        decoded = (
            {f"decoder_{k}": v for k, v in text(seed, (3, 4, 1), 4).items()} if kind in ("whisper", "bart") else {}
        )
        found.append({**batch, **decoded})
    return found


# --- rows that are kept ----------------------------------------------------------------------------------------------


def test_each_tower_keeps_rows_of_its_own_and_text_those_it_always_had() -> None:
    model, batches = tiny("clip"), batches_of("clip")
    architecture, sites = ffns("clip", model)
    everything = capture_activations(model, architecture, sites, batches, rows=10_000, seed=3)
    some = capture_activations(model, architecture, sites, batches, rows=11, seed=3)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert [len(rows.x) for rows in everything] == [tokens, tokens, 45, 45]
    chosen = torch.randperm(tokens, generator=torch.Generator().manual_seed(3))[:11].sort().values
    for rows, whole in zip(some[:2], everything[:2], strict=True):
        assert torch.equal(rows.x, whole.x[chosen])
        assert torch.equal(rows.y, whole.y[chosen])
    places = [(everything[2].x == row).all(1).nonzero()[0].item() for row in some[2].x]
    assert len(set(places)) == 11
    assert places == sorted(places)
    assert torch.equal(some[3].y, everything[3].y[places])
    other = capture_activations(model, architecture, sites, batches, rows=11, seed=4)
    assert not torch.equal(other[2].x, some[2].x)


@pytest.mark.parametrize("sizes", [[3, 0, 4], [1] * 30, [40], [9, 1, 9, 1]])
def test_rows_that_are_no_tokens_are_kept_equally_often(sizes: list[int]) -> None:
    total, capacity = sum(sizes), 6
    kept = torch.zeros(total)
    for seed in range(400):
        sample = RowSample(RowPlan([{"pixel_values": torch.ones(2, 2)}] * len(sizes), seed), capacity)
        for part in torch.arange(total).split(sizes):
            sample.add(torch.ones(1, len(part), dtype=torch.bool), part, -part)
        [[present, negative], sequence] = sample.finish()
        assert len(present) == min(capacity, total)
        assert present.tolist() == sorted(set(present.tolist()))
        assert torch.equal(negative, -present)
        assert torch.equal(sequence, torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[present])
        kept[present] += 1
    expected = 400 * min(capacity, total) / total
    assert float((kept - expected).abs().max()) <= 5 * expected**0.5


def test_ffns_of_which_nothing_counts() -> None:
    model = tiny("bart")
    architecture, sites = ffns("bart", model)
    nothing = {"decoder_input_ids": torch.ones(3, 4, dtype=torch.long), "decoder_attention_mask": torch.zeros(3, 4)}
    with pytest.raises(InputError, match="every mask of an FFN's positions is zero"):
        collect(model, architecture, sites, [{**text(0, (5, 7, 2), 7), **nothing}], seed=0)


@pytest.mark.parametrize("kind", ["whisper", "bart", "clip", "wav2vec2", "vit", "xlnet", "albert"])
def test_statistics_are_those_of_all_rows_that_count(kind: str) -> None:
    model = tiny(kind).double()
    architecture, sites = ffns(kind, model)
    batches = batches_of(kind)
    found = collect(model, architecture, sites, iter(batches), seed=0)
    everything = capture_activations(model, architecture, sites, batches, rows=10_000, seed=0)
    for site, s, rows in zip(sites, found, everything, strict=True):
        ones = torch.cat([rows.x, torch.ones_like(rows.x[:, :1])], 1)
        assert s.tokens == len(rows.x)
        assert torch.equal(s.x, rows.x)
        assert torch.equal(s.y, rows.y)
        torch.testing.assert_close(s.input_moment, ones.T @ ones / len(ones))
        # Three samples a batch; layers that share an FFN see each of them again.
        again = 3 if kind == "albert" else 1
        assert s.sequence.unique().tolist() == list(range(9 * again)), site.path
        assert bool((s.sequence.diff() >= 0).all())


# --- sensitivities, widths, sequence ---------------------------------------------------------------------------------


def naive_sensitivity(model: Any, output: str, batch: Any, states: Any, mask: Tensor | None, seed: int) -> Tensor:
    """L by one probe, as the definition has it."""
    kept: list[Tensor] = []

    def keep(_module: Any, _args: Any, y: Tensor) -> Tensor:
        kept.append(y.detach().requires_grad_())
        return kept[-1]

    handle = model.get_submodule(output).register_forward_hook(keep)
    hidden = states(model(**batch))
    handle.remove()
    probe = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(seed)).to(hidden)
    counted = torch.ones(hidden.shape[:-1]) if mask is None else mask
    [g] = torch.autograd.grad((hidden * probe * counted.unsqueeze(-1)).sum(), kept)
    return g.flatten(0, 1)


def test_sensitivities_of_images_and_of_encoders() -> None:
    vit = tiny("vit").double().vit
    architecture, _ = ffns("vit", tiny("vit"))
    sites = architecture.sites(vit)
    batch = {"pixel_values": processed("vit")["pixel_values"].double()}
    found = output_sensitivities(vit, architecture, sites, [batch], seed=5)
    for n in range(2):
        g = naive_sensitivity(vit, f"layers.{n}.mlp.fc2", batch, lambda o: o.last_hidden_state, None, 5)
        torch.testing.assert_close(found[n].factor, sensitivity._factor(g.T @ g), rtol=1e-3, atol=1e-5)
    bart = tiny("bart").double()
    architecture, sites = ffns("bart", bart)
    # As long as one another: the path tells whose mask it is.
    own, other = text(0, (5, 7, 2), 7), text(1, (3, 4, 7), 7)
    batch = {**own, **{f"decoder_{name}": value for name, value in other.items()}}
    found = output_sensitivities(bart, architecture, sites, [batch], seed=5)
    decoded = other["attention_mask"].double()
    for n, (path, mask) in enumerate([("encoder", own), ("encoder", own), ("decoder", other), ("decoder", other)]):
        g = naive_sensitivity(bart, f"{path}.layers.{n % 2}.fc2", batch, lambda o: o.last_hidden_state, decoded, 5)
        g = g[mask["attention_mask"].flatten().bool()]
        torch.testing.assert_close(found[n].factor, sensitivity._factor(g.T @ g), rtol=1e-3, atol=1e-5)


def test_sensitivities_of_towers_and_of_what_nobody_reads() -> None:
    clip, batches = tiny("clip"), batches_of("clip")
    architecture, sites = ffns("clip", clip)
    found = output_sensitivities(clip, architecture, sites, batches, seed=0)
    # A tower's last FFN stands before a residual stream that is read as it is: all but alike, and not quite.
    assert all(not torch.equal(each.factor, torch.eye(32)) for each in found)
    llava = tiny("llava")
    architecture, sites = ffns("llava", llava)
    first, last = output_sensitivities(llava, architecture, sites, [dict(b) for b in batches_of("llava")], seed=0)
    # The last but one of the vision tower's hidden states is what the text model gets.
    assert torch.equal(last.factor, torch.eye(32))
    assert float((first.factor - torch.eye(32)).norm()) > 0.5


@pytest.mark.parametrize("kind", ["whisper", "bart", "clip", "wav2vec2", "vit", "xlnet", "albert"])
def test_sizes_stand_in_the_order_of_the_rows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs in the place of their gradients: sizes are then those of the outputs that `collect` keeps."""
    model = tiny(kind).double()
    architecture, sites = ffns(kind, model)
    batches = batches_of(kind)
    looked_at = list(excerpts.excerpts(model, batches, sensitivity.SENSED_TOKENS))
    monkeypatch.setattr(torch.autograd, "grad", lambda _loss, wanted, **_: [y.detach() for y in wanted])
    found = output_sensitivities(model, architecture, sites, batches, seed=0)
    rows = max(len(each.sizes) for each in found)
    for known, each in zip(collect(model, architecture, sites, looked_at, seed=0, rows=rows), found, strict=True):
        torch.testing.assert_close(each.sizes, known.y.square().mean(dim=1).sqrt().float())


@pytest.mark.parametrize("kind", ["bart", "clip", "t5"])
def test_widths_by_a_budget_where_ffns_see_different_rows(kind: str) -> None:
    model, batches = copy.deepcopy(tiny(kind)), batches_of(kind)
    report = fuse(model, "auto", method="fusion", budget=0.5, calibration=batches, optimizer=None)
    before, after = (sum(getattr(row, name) for row in report.rows) for name in ("neurons_before", "neurons_after"))
    assert 0.4 * before < after <= 0.5 * before


def test_samples_are_looked_at_whole_and_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(excerpts, "_RUN", 6)
    model: Any = SimpleNamespace(config=None)
    images = [{"pixel_values": torch.full((3, 3, 16, 16), float(n))} for n in range(4)]
    parts = list(excerpts.excerpts(model, images, 9))
    assert [len(part["pixel_values"]) for part in parts] == [1, 1, 1]  # of 36 positions, 9: every fourth of 12 samples
    assert [float(part["pixel_values"][0, 0, 0, 0]) for part in parts] == [0.0, 1.0, 2.0]
    both = [{**text(n, (5, 5), 5), "pixel_values": torch.full((1, 3, 4, 4), float(n))} for n in range(4)]
    parts = list(excerpts.excerpts(model, both, 9))
    assert [float(part["pixel_values"][0, 0, 0, 0]) for part in parts] == [0.0]
    assert torch.equal(parts[0]["input_ids"], both[0]["input_ids"])


def test_the_effect_of_an_ffn_on_both_towers() -> None:
    model, batches = tiny("clip"), batches_of("clip", 1)
    architecture, sites = ffns("clip", model)
    zero = architecture.read(sites[3])
    zero = dataclasses.replace(zero, w_out=zero.w_out * 0.0)
    with torch.no_grad():
        [change] = hidden_state_changes(model, architecture, sites[3:], batches, [zero])
        before = model(**batches[0])
        kept = model.vision_model.encoder.layers[1].mlp.fc2.weight.clone()
        model.vision_model.encoder.layers[1].mlp.fc2.weight.zero_()
        after = model(**batches[0])
        model.vision_model.encoder.layers[1].mlp.fc2.weight.copy_(kept)
    mask = batches[0]["attention_mask"].bool()
    rows = [
        torch.cat([o.text_model_output[0][mask].flatten(), o.vision_model_output[0].flatten()]) for o in (before, after)
    ]
    assert change == pytest.approx(float(((rows[1] - rows[0]).norm() / rows[0].norm()) ** 2), rel=1e-4)


def layer_of(site: FFNSite) -> int:
    return int(re.findall(r"\d+", site.path)[-1])


@pytest.mark.parametrize("kind", ["vit", "bart", "whisper"])
def test_sequential_calibration_goes_on_in_the_decoder(kind: str) -> None:
    model, batches = tiny(kind), batches_of(kind)
    architecture, _ = ffns(kind, model)
    sites = architecture.sites(model)
    plain = collect(model, architecture, sites, batches, seed=0)
    changed: list[int] = []

    def reduce(number: int, statistics: Any) -> ReducedFFN:
        bundle = architecture.read(sites[number])
        if layer_of(sites[number]) == 0:  # the first layers are made to put out next to nothing
            bundle = dataclasses.replace(bundle, w_out=bundle.w_out * 1e-3)
        same = torch.equal(statistics.x, plain[number].x)
        if not same:
            changed.append(number)
        else:
            torch.testing.assert_close(statistics.y, plain[number].y, rtol=1e-4, atol=1e-4)
        assert len(statistics.x) == len(plain[number].x)
        return ReducedFFN(Reduction.plain(bundle), 0.0)

    found = reduce_sequentially(model, architecture, sites, batches, reduce, seed=0)
    assert [ffn.bundle.width for ffn in found] == [site.neurons for site in sites]
    # What comes behind a layer that was changed: all of a decoder, which attends to the encoder.
    assert sorted(changed) == [n for n, site in enumerate(sites) if layer_of(site) == 1 or "decoder" in site.path]


def test_ffns_of_one_shape_and_other_rows_are_tuned_apart() -> None:
    bundles = [random_bundle(width=12, d=5, d_out=5, batch=1, seed=n) for n in range(3)]
    known = [statistics_of(b, torch.randn(n, 5).to(b.w_in), 10) for b, n in zip(bundles, (60, 60, 90), strict=True)]
    settings = make(FuseSettings, {"width": 4, "tune_steps": 3, "refit": True}, "fuse").resolved([0], calibrated=True)
    recipe = Recipe.of(settings)
    together = reduce_ffns(recipe, bundles, [4, 4, 4], known)
    alone = reduce_ffns(recipe, bundles[2:], [4], known[2:])
    torch.testing.assert_close(together[2].bundle.w_out, alone[0].bundle.w_out)


@pytest.mark.parametrize("sequential", [False, True])
def test_how_much_was_learnt_from(sequential: bool) -> None:
    for kind, positions in (("vit", 45), ("bart", 42)):
        model, batches = tiny(kind), batches_of(kind)
        architecture, sites = ffns(kind, model)
        options = {"width": 16, "sequential": sequential, "tune_steps": 0 if sequential else 2}
        settings = make(FuseSettings, options, "fuse").resolved([0, 1], calibrated=True)
        originals = [architecture.read(site) for site in sites]
        chosen: Any = SimpleNamespace(model=model, architecture=architecture, sites=sites, originals=originals)
        learnt = learn(chosen, settings, batches, None)
        record = learnt.record()
        assert record is not None
        assert record.tokens == positions
        assert [len(a.x) for a in learnt.activations] == ([45] * 2 if kind == "vit" else [42] * 2 + [24] * 2)
        drawn = learn(chosen, make(FuseSettings, {"width": 16}, "fuse").resolved([0, 1], calibrated=False), None, None)
        assert drawn.sample == ("random inputs" if kind == "vit" else "random token ids")
    model = tiny("clip")
    architecture, sites = ffns("clip", model)
    chosen = SimpleNamespace(model=model, architecture=architecture, sites=sites)
    drawn = learn(chosen, make(FuseSettings, {"width": 16}, "fuse").resolved([0, 1], calibrated=False), None, None)
    assert drawn.sample == "random inputs"


def test_datasets_with_columns_of_images() -> None:
    class Dataset(list[Any]):
        column_names = ("pixel_values", "label")

    images = torch.randn(4, 3, 16, 16)
    rows = Dataset({"pixel_values": image.tolist(), "label": 1} for image in images)
    found: Any = calibration_batches(rows, tiny("vit"))
    assert [set(batch) for batch in found] == [{"pixel_values"}] * 4
    torch.testing.assert_close(torch.cat([batch["pixel_values"] for batch in found]), images)
    batches = batches_of("vit")
    assert calibration_batches(batches, tiny("vit")) is batches
    with pytest.raises(InputError, match="the model reads no text: pass batches of pixel_values, as its processor"):
        calibration_batches(["a sentence"], tiny("vit"))


# --- measured and recorded -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_embeddings_are_means_over_what_counts() -> None:
    model, [batch] = tiny("vit"), batches_of("vit", 1)
    torch.testing.assert_close(embed(model, [batch]), model.vit(**batch).last_hidden_state.mean(1))
    torch.testing.assert_close(pooled(model, batch), model.vit(**batch).last_hidden_state.mean(1))
    model = tiny("bart")
    batch = {**text(0, (5, 7, 2), 7), **{f"decoder_{k}": v for k, v in text(1, (3, 4, 7), 7).items()}}
    states, mask = model(**batch).last_hidden_state, batch["decoder_attention_mask"].unsqueeze(-1)
    for found in (embed(model, [batch]), pooled(model, batch)):
        torch.testing.assert_close(found, (states * mask).sum(1) / mask.sum(1))
    model, [batch] = tiny("clip"), batches_of("clip", 1)
    out, mask = model(**batch), batch["attention_mask"].unsqueeze(-1)
    texts = (out.text_model_output.last_hidden_state * mask).sum(1) / mask.sum(1)
    both = torch.cat([texts, out.vision_model_output.last_hidden_state.mean(1)], 1)
    torch.testing.assert_close(embed(model, [batch]), both)
    with pytest.raises(InputError, match="a batch has 3 and 2 samples: give as many of each"):
        embed(model, [{**batch, "pixel_values": batch["pixel_values"][:2]}])


def test_single_samples() -> None:
    [batch] = batches_of("whisper", 1)
    ones = _first_samples([batch, batch], 5)
    assert len(ones) == 5
    for n, one in enumerate(ones):
        assert all(torch.equal(one[name], batch[name][n % 3 : n % 3 + 1]) for name in batch)
    [one] = _first_samples([text(0, (5, 7, 2), 7)], 1)
    assert one["input_ids"].shape == (1, 5)
    [batch] = batches_of("llava", 1)
    with pytest.raises(InputError, match="give batches of one sample"):
        _first_samples([batch], 2)
    [one] = _first_samples([{name: value[:1] for name, value in batch.items()}], 2)
    assert torch.equal(one["input_ids"], batch["input_ids"][:1])


@pytest.mark.parametrize("kind", MODELS)
def test_a_reference_holds_the_inputs_that_were_used(kind: str, tmp_path: Path) -> None:
    model = tiny(kind)
    save_file(reference_outputs(model, 7, head=True), tmp_path / "reference.safetensors")
    inputs, outputs = split_reference(load_file(tmp_path / "reference.safetensors"))
    drawn = random_batch(model, seed=7, batch=1, length=16)
    is_text = set(drawn) == {"input_ids", "attention_mask"}
    assert set(inputs) == ({"input_ids"} if is_text else set(drawn))
    assert all(torch.equal(value, drawn[name]) for name, value in inputs.items())
    again = model_outputs(model, inputs, head=True)
    assert set(again) == set(outputs)
    assert all(torch.equal(value, outputs[name]) for name, value in again.items())
    with torch.no_grad():
        name, parameter = next(
            (n, p) for n, p in model.named_parameters() if "layers.0" in n or "layer.0" in n or "groups" in n
        )
        parameter.mul_(1.5).add_(0.1)
    changed = model_outputs(model, inputs, head=True)
    assert not all(torch.equal(value, outputs[n]) for n, value in changed.items()), name


def test_references_of_token_ids_alone_are_read_as_before() -> None:
    model = tiny("t5")
    ids = text(0, (6,), 6)["input_ids"]
    file = {"input_ids": ids, **model_outputs(model, ids, head=True)}
    inputs, outputs = split_reference(file)
    assert set(inputs) == {"input_ids"}
    assert set(outputs) == {"logits"}
    assert torch.equal(model_outputs(model, inputs, head=True)["logits"], file["logits"])
    # Outputs may have the names of inputs.
    inputs, outputs = split_reference({"inputs.pixel_values": ids, "input_ids": ids, "pixel_values": ids + 1})
    assert set(inputs) == {"pixel_values"}
    assert torch.equal(outputs["pixel_values"], ids + 1)
