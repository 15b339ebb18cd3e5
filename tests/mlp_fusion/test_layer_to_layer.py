"""Layer-to-layer distillation: each loss against its formula, how both models' insides are had, and masked text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerFast

import checkpoints as ck
from mlp_fusion import InputError, MiniAlbertConfig, MiniAlbertForMaskedLM
from mlp_fusion.finetuning.attention import NAME, record, recorded
from mlp_fusion.finetuning.layer_to_layer import (
    LayerToLayer,
    at_positions,
    hidden_distance,
    mapped_layers,
    masked_loss,
    output_divergence,
)
from mlp_fusion.finetuning.masking import MaskedText, masked_blocks
from mlp_fusion.running.rows import Rows

SHAPE: dict[str, Any] = {
    "vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 20, "pad_token_id": 1,
}  # fmt: skip
DISTILBERT = {"vocab_size": 23, "dim": 16, "n_layers": 4, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 20}
TEACHERS = {"Bert": SHAPE, "Roberta": SHAPE, "DistilBert": DISTILBERT, "Electra": SHAPE, "ModernBert": SHAPE}
WEIGHTS = {"mlm": 1.0, "attention": 3.0, "hidden": 3.0, "output": 5.0}


def teacher(kind: str = "Bert", **more: Any) -> Any:
    """A tiny one whose weights are large enough for its maps to differ from uniform ones."""
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(getattr(transformers, f"{kind}Config")(**{**TEACHERS[kind], **more}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8.0)
    return model


def student(**more: Any) -> MiniAlbertForMaskedLM:
    torch.manual_seed(1)
    shape = {**SHAPE, "num_hidden_layers": 2, "embedding_size": 6, "adapter_size": 4}
    return MiniAlbertForMaskedLM(MiniAlbertConfig(**{**shape, **more})).eval()


def batch() -> dict[str, Tensor]:
    """Two texts, the second padded, with three masked tokens."""
    ids = torch.randint(3, 23, (2, 7), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    labels = torch.full_like(ids, -100)
    labels[0, 1], labels[0, 5], labels[1, 2] = 3, 9, 20
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize(
    ("recursions", "layers", "expected"),
    [(6, 12, [2, 4, 6, 8, 10, 12]), (2, 3, [2, 3]), (3, 3, [1, 2, 3]), (1, 5, [5]), (4, 6, [2, 3, 5, 6])],
)
def test_recursions_learn_from_layers_evenly(recursions: int, layers: int, expected: list[int]) -> None:
    assert mapped_layers(recursions, layers) == expected
    assert expected == [math.ceil(i * layers / recursions) for i in range(1, recursions + 1)]


def test_more_recursions_than_layers_are_refused() -> None:
    with pytest.raises(InputError, match="5 recursions learn from a teacher of 4 layers: give 4 or fewer"):
        mapped_layers(5, 4)


@pytest.mark.parametrize("kind", TEACHERS)
def test_parts_are_their_formulas_with_eager_maps(kind: str) -> None:
    model, pupil, inputs = teacher(kind).eval(), student(), batch()
    known = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    said = {}
    for name, one in (("ours", pupil), ("theirs", model)):
        one.set_attn_implementation("eager")
        with torch.no_grad():
            said[name] = one(**known, output_attentions=True, output_hidden_states=True)
        one.set_attn_implementation("sdpa")
    ours, theirs = said["ours"], said["theirs"]
    kept, masked = inputs["attention_mask"].bool(), inputs["labels"] != -100
    attention = hidden = torch.zeros((), dtype=torch.float64)
    for n, layer in enumerate((2, 4)):
        p, q = theirs.attentions[layer - 1].double(), ours.attentions[n].double()
        lost = torch.where(p > 0, p * (p / q).log(), 0.0)
        attention = attention + lost.transpose(1, 2)[kept].mean()
        a, b = ours.hidden_states[n + 1][kept].double(), theirs.hidden_states[layer][kept].double()
        hidden = hidden + (1.0 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean()
    p, q = (torch.softmax(z.logits[masked].double(), -1) for z in (theirs, ours))
    expected = {
        "mlm": -q[range(3), inputs["labels"][masked]].log().mean(),
        "attention": attention,
        "hidden": hidden,
        "output": (p * (p / q).log()).sum(-1).mean(),
    }
    pairs = LayerToLayer(pupil, model, WEIGHTS)
    pairs.check(inputs)
    found = pairs.parts(pupil, inputs)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert float(value) > 1e-3, name
        torch.testing.assert_close(found[name].double(), value, rtol=2e-4, atol=1e-6)
    total = expected["mlm"] + 3 * (attention + hidden) + 5 * expected["output"]
    torch.testing.assert_close(pairs.total(found).double(), total, rtol=1e-4, atol=1e-6)
    pairs.total(found).backward()
    assert all(p.grad is not None for name, p in pupil.named_parameters() if "token_type" not in name)
    assert all(p.grad is None for p in model.parameters())


def test_of_no_masked_token_the_rest_remains() -> None:
    inputs = batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    pupil = student()
    pairs = LayerToLayer(pupil, teacher(), WEIGHTS)
    found = pairs.parts(pupil, inputs)
    assert float(found["mlm"].detach()) == float(found["output"].detach()) == 0.0
    pairs.total(found).backward()
    assert all(bool(p.grad.isfinite().all()) for p in pupil.parameters() if p.grad is not None)


def calls(model: nn.Module, names: dict[str, str]) -> Counter[str]:
    """How often modules of a model run, by what they are called here."""
    found: Counter[str] = Counter()
    for name, path in names.items():
        model.get_submodule(path).register_forward_hook(lambda *_, name=name: found.update([name]))
    return found


@pytest.mark.parametrize("without", ["mlm", "attention", "hidden", "output"])
def test_what_weighs_nothing_is_not_computed(without: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pupil, inputs = teacher(), student(), batch()
    whole = LayerToLayer(pupil, model, WEIGHTS).parts(pupil, inputs)
    model, pupil = teacher(), student()
    heads = calls(model, {"head": "cls"})
    asked: list[Any] = []
    model.bert.encoder.register_forward_pre_hook(lambda *_: asked.append(1))
    pairs = LayerToLayer(pupil, model, {**WEIGHTS, without: 0.0})
    for function in ("attention_divergence", "hidden_distance", "output_divergence", "masked_loss"):
        if {"mlm": "masked", "output": "output_"}.get(without, without) in function:
            monkeypatch.delattr(f"mlp_fusion.finetuning.layer_to_layer.{function}")
    found = pairs.parts(pupil, inputs)
    assert list(found) == [name for name in WEIGHTS if name != without]
    for name, value in found.items():
        torch.testing.assert_close(value, whole[name], rtol=1e-6, atol=1e-7)
    assert asked == [1]
    assert heads["head"] == (without != "output")
    assert (model.config._attn_implementation == "sdpa") == (without == "attention")


def test_without_a_teachers_part_it_is_not_run() -> None:
    model, pupil = teacher(), student()
    body = calls(model, {"body": "bert"})
    found = LayerToLayer(pupil, model, {"mlm": 1.0, "attention": 0.0, "hidden": 0.0, "output": 0.0}).parts(
        pupil, batch()
    )
    assert list(found) == ["mlm"]
    assert not body


def test_teachers_whose_insides_cannot_be_had_are_refused_with_the_remedy() -> None:
    plain = {**SHAPE, "type_vocab_size": 2}
    foreign = AutoModelForMaskedLM.from_config(transformers.MPNetConfig(**plain))
    pairs = LayerToLayer(student(), foreign, WEIGHTS)
    with pytest.raises(InputError, match=r"MPNetForMaskedLM: 0 attentions in 4 layers .*: give attention_weight=0"):
        pairs.check(batch())
    pairs = LayerToLayer(student(), foreign, {**WEIGHTS, "attention": 0.0})
    pairs.check(batch())
    for shape, part in (({"hidden_size": 24}, "hidden"), ({"num_attention_heads": 4}, "attention")):
        other = teacher(**shape)
        with pytest.raises(InputError, match=rf"in the teacher and \d+ in the student: give {part}_weight=0"):
            LayerToLayer(student(), other, WEIGHTS)
        LayerToLayer(student(), other, {**WEIGHTS, part: 0.0}).check(batch())


def test_heads_that_look_beyond_a_tokens_state_are_refused() -> None:
    class Mixing(nn.Module):
        def __init__(self, head: nn.Module) -> None:
            super().__init__()
            self.head = head

        def forward(self, states: Tensor) -> Tensor:
            result: Tensor = self.head(states - states.mean(1, keepdim=True))
            return result

    model = teacher()
    model.cls = Mixing(model.cls)
    pairs = LayerToLayer(student(), model, WEIGHTS)
    with pytest.raises(InputError, match=r"depends on other tokens' states: give output_weight=0"):
        pairs.check(batch())


def test_teachers_that_mask_otherwise_are_refused() -> None:
    model = teacher(is_decoder=True)
    record(model)
    ids = batch()["input_ids"]
    with recorded({0}) as recording:  # a causal mask is as good as any other
        model(input_ids=ids, attention_mask=batch()["attention_mask"])
    assert recording.scores[0].mask is not None
    with recorded({0}), pytest.raises(InputError, match="attends with is_causal: give attention_weight=0"):
        model(input_ids=ids)


@pytest.mark.parametrize("kind", TEACHERS)
def test_recorded_models_compute_what_they_did(kind: str) -> None:
    model, inputs = teacher(kind).eval(), batch()
    inputs.pop("labels")
    with torch.no_grad():
        before = model(**inputs).logits
        record(model)
        with recorded({1, 3}) as recording:
            after = model(**inputs).logits
        model(**inputs)
    assert torch.equal(before, after)
    assert recording.calls == 4, "and none outside"
    assert list(recording.scores) == [1, 3]
    assert recording.scores[1].query.shape == (2, 2, 7, 8)
    assert "_attn_implementation" not in model.config.to_dict()


def test_scores_have_the_scaling_that_attention_has() -> None:
    module, (query, key, value) = nn.Module(), torch.randn(3, 1, 2, 4, 16).unbind()
    attend = transformers.AttentionInterface()[NAME]
    with recorded({0, 1}) as recording:
        for scaling in (None, 0.7):
            attend(module, query, key, value, None, scaling=scaling, is_causal=False)
    assert [scores.scaling for scores in recording.scores.values()] == [0.25, 0.7]


def test_a_mean_over_one_token_is_that_tokens() -> None:
    logits, wanted = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    p, q = (torch.softmax(z, -1) for z in (wanted, logits))
    torch.testing.assert_close(output_divergence(logits, wanted), (p * (p / q).log()).sum())
    torch.testing.assert_close(masked_loss(logits, torch.tensor([1])), -q[0, 1].log())


def test_heads_see_the_positions_alone() -> None:
    pupil, inputs = student(), batch()
    seen: list[int] = []
    pupil.predictions.register_forward_hook(lambda _m, given, _o: seen.append(given[0].shape[1]))
    masked = torch.tensor([1, 5, 9])
    with torch.no_grad():
        whole = pupil(input_ids=inputs["input_ids"]).logits.flatten(0, 1)
        with at_positions(pupil, masked):
            found = pupil(input_ids=inputs["input_ids"]).logits
        assert pupil(input_ids=inputs["input_ids"]).logits.shape == (2, 7, 23)
    torch.testing.assert_close(found[0], whole[masked], rtol=1e-5, atol=1e-6)
    assert seen == [7, 3, 7]


def test_a_step_keeps_no_map_of_either_model() -> None:
    """Without dropout, for which torch on CPUs forms maps itself: of their size, only the mask that heads share."""
    inputs = batch()
    pupil, model = student(), teacher()
    pairs = LayerToLayer(pupil, model, WEIGHTS)

    def kept(compute: Callable[[], Tensor]) -> set[tuple[int, ...]]:
        shapes: set[tuple[int, ...]] = set()

        def pack(tensor: Tensor) -> Tensor:
            shapes.add(tuple(tensor.shape))
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            compute()
        return {shape for shape in shapes if shape[-2:] == (7, 7)}

    assert kept(lambda: pairs.total(pairs.parts(pupil, inputs))) <= {(2, 1, 7, 7)}
    pupil.set_attn_implementation("eager")
    known = {name: value for name, value in inputs.items() if name != "labels"}
    assert (2, 2, 7, 7) in kept(lambda: pupil(**known, output_attentions=True).attentions[0].sum())


def test_losses_of_half_precision_are_computed_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(2, 3, 50, generator=generator).bfloat16() for _ in range(2))
    mask = torch.tensor([[True, True, False], [True, False, False]])
    for found, exact in (
        (hidden_distance(one, other, mask), hidden_distance(one.double(), other.double(), mask)),
        (output_divergence(one[0], other[0]), output_divergence(one[0].double(), other[0].double())),
        (masked_loss(one[0], torch.tensor([1, 2, 3])), masked_loss(one[0].double(), torch.tensor([1, 2, 3]))),
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


# --- masked text -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(ck.add_masking_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_blocks_have_special_tokens_around_and_a_separator_between_texts(tokenizer: Any) -> None:
    rows = Rows("here", ["the cat", "a dog sat", "the <mask>"])
    ids, own = masked_blocks(rows, tokenizer, 7)
    # <s> the cat </s> a <unk> </s>, and of the rest, sat </s> the <mask> </s>, nothing is left out
    assert ids.tolist() == [[0, 4, 6, 2, 5, 3, 2], [0, 7, 2, 4, 8, 2, 2]]
    assert own.tolist() == [
        [False, True, True, False, True, True, False],
        [False, True, False, True, True, False, False],
    ]
    short, _ = masked_blocks(Rows("here", ["the cat"]), tokenizer, 128)
    assert short.tolist() == [[0, 4, 6, 2, 2]]
    with pytest.raises(InputError, match="2 tokens hold the tokenizer's 2 special ones alone"):
        masked_blocks(rows, tokenizer, 2)
    with pytest.raises(InputError, match="here: no token in it"):
        masked_blocks(Rows("here", [" "]), tokenizer, 9)


def test_masks_are_a_function_of_seed_epoch_and_block(tokenizer: Any) -> None:
    ids, own = masked_blocks(Rows("here", ["the cat sat a " * 400]), tokenizer, 64)
    text = MaskedText(ids, own, tokenizer, 0.15, 3, "text")
    torch.manual_seed(9)
    state = torch.get_rng_state()
    again = MaskedText(ids, own, tokenizer, 0.15, 3, "text")
    order = [5, 0, 30, 5]
    one, other = text.batch(order), again.batch(order[::-1])
    assert all(torch.equal(one[name], other[name].flip(0)) for name in one)
    assert torch.equal(torch.get_rng_state(), state)
    blocks = len(text)
    others = [text[5 + blocks], MaskedText(ids, own, tokenizer, 0.15, 4, "text")[5]]
    others.append(MaskedText(ids, own, tokenizer, 0.15, 3, "evaluation")[5])
    assert all(not torch.equal(one["labels"][0], row["labels"]) for row in others)


def test_the_share_is_masked_and_special_tokens_are_not(tokenizer: Any) -> None:
    ids, own = masked_blocks(Rows("here", ["the cat sat a " * 400]), tokenizer, 64)
    text = MaskedText(ids, own, tokenizer, 0.3, 0, "text")
    found = text.batch(range(4 * len(text)))
    labels, plain = found["labels"], ids.repeat(4, 1)
    masked = labels != -100
    assert torch.equal(labels[masked], plain[masked])
    assert torch.equal(found["input_ids"][~masked], plain[~masked])
    assert not bool((masked & ~own.repeat(4, 1)).any())
    # Of some 6,000 tokens, five standard deviations around 0.3, and around 0.8 of those masked.
    count = int(own.sum()) * 4
    assert abs(float(masked.sum()) / count - 0.3) < 5 * math.sqrt(0.3 * 0.7 / count)
    hidden = (found["input_ids"] == tokenizer.mask_token_id)[masked].double()
    # A random word is the mask token, too, once in nine times.
    assert abs(float(hidden.mean()) - 0.8 - 0.1 / 9) < 5 * math.sqrt(0.16 / len(hidden))


def test_tokenizers_without_a_mask_are_refused(tmp_path: Path) -> None:
    plain = PreTrainedTokenizerFast.from_pretrained(ck.add_tokenizer(tmp_path, pad_token="<pad>"))
    ids, own = masked_blocks(Rows("here", ["the cat"]), plain, 8)
    assert ids.tolist() == [[4, 6]]
    with pytest.raises(InputError, match="no mask token"):
        MaskedText(ids, own, plain, 0.15, 0, "text")
