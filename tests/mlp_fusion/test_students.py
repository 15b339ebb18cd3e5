"""Students that start from their teachers: what can be exact is, what does not fit is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AutoModelForMaskedLM,
    BertConfig,
    BertModel,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    GPT2LMHeadModel,
    ModernBertConfig,
    RobertaConfig,
)

from mlp_fusion import InputError, MiniAlbertConfig, MiniAlbertForMaskedLM
from mlp_fusion.finetuning.students import _least_squares, start_from

SIZES = {"vocab_size": 67, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
BERT = BertConfig(**SIZES, num_hidden_layers=4, max_position_embeddings=20)
IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])


def teacher_of(config: Any) -> Any:
    """A teacher all of whose parameters are away from where they start."""
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def student_of(**more: Any) -> Any:
    torch.manual_seed(1)
    sizes = {**SIZES, "embedding_size": 32, "max_position_embeddings": 18, "num_hidden_layers": 2, "adapter_size": 4}
    return MiniAlbertForMaskedLM(MiniAlbertConfig(**{**sizes, **more})).eval()


def alike(layers: Any) -> None:
    """Make all layers equal to the first."""
    for layer in layers[1:]:
        layer.load_state_dict(layers[0].state_dict())


def test_a_teacher_of_equal_layers_is_reproduced() -> None:
    teacher, student = teacher_of(BERT), student_of(adapter_size=0, num_hidden_layers=4)
    alike(teacher.bert.encoder.layer)
    start_from(student, teacher)
    wanted, found = teacher(IDS, output_hidden_states=True), student(IDS, output_hidden_states=True)
    for one, other in zip(found.hidden_states, wanted.hidden_states, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "config",
    [
        RobertaConfig(
            **SIZES, num_hidden_layers=2, max_position_embeddings=20, pad_token_id=1, type_vocab_size=1
        ),
        DistilBertConfig(
            vocab_size=67, dim=32, n_heads=2, hidden_dim=48, n_layers=2, max_position_embeddings=20
        ),
        ElectraConfig(**SIZES, num_hidden_layers=2, max_position_embeddings=20, embedding_size=16),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_teachers_of_berts_kind(config: Any) -> None:
    teacher = teacher_of(config)
    width = getattr(config, "embedding_size", 32)
    student = student_of(adapter_size=0, type_vocab_size=getattr(config, "type_vocab_size", 2), embedding_size=width)
    base = teacher.base_model
    alike(base.transformer.layer if config.model_type == "distilbert" else base.encoder.layer)
    start_from(student, teacher)
    wanted = teacher(IDS, output_hidden_states=True).hidden_states
    found = student(IDS, output_hidden_states=True).hidden_states
    torch.testing.assert_close(found[0], wanted[0])
    torch.testing.assert_close(found[-1], wanted[-1], rtol=1e-4, atol=1e-4)


def test_the_fused_ffn_is_a_layer_on_average() -> None:
    teacher, student = teacher_of(BERT), student_of(intermediate_size=4 * 48)
    start_from(student, teacher)
    layer, x = student.albert.encoder.layers[0], torch.randn(7, 32)
    each = [one.output.dense(one.intermediate(x)) for one in teacher.bert.encoder.layer]
    torch.testing.assert_close(layer.ff_chunk(x), torch.stack(each).mean(0), rtol=1e-4, atol=1e-4)
    norms = [one.output.LayerNorm.weight for one in teacher.bert.encoder.layer]
    torch.testing.assert_close(layer.full_layer_layer_norm.weight, torch.stack(norms).mean(0))
    middle = teacher.bert.encoder.layer[2].attention
    assert torch.equal(layer.attention.key.weight, middle.self.key.weight)
    assert torch.equal(layer.attention.dense.bias, middle.output.dense.bias)


def test_neurons_are_clustered_over_all_layers() -> None:
    teacher, student = teacher_of(BERT), student_of()
    alike(teacher.bert.encoder.layer)  # every neuron four times: 48 clusters hold them all
    start_from(student, teacher)
    x = torch.randn(7, 32)
    wanted = teacher.bert.encoder.layer[0]
    torch.testing.assert_close(
        student.albert.encoder.layers[0].ff_chunk(x), wanted.output.dense(wanted.intermediate(x)), rtol=1e-4, atol=1e-4
    )


def test_narrow_embeddings_are_near_and_the_projection_is_the_nearest() -> None:
    teacher = teacher_of(BERT)
    # Words on a few directions, as those of trained models nearly are, without what norms take away.
    basis = torch.linalg.qr(torch.randn(32, 12) - torch.randn(32, 12).mean(0))[0]
    for table in ("word", "position", "token_type"):
        weight = getattr(teacher.bert.embeddings, f"{table}_embeddings").weight
        weight.data = weight.data @ basis @ basis.T
    errors = {}
    wanted = teacher.bert.embeddings(IDS)
    for width in (4, 12, 16):
        student = student_of(embedding_size=width)
        start_from(student, teacher)
        found = student.albert.encoder.projection(student.albert.embeddings(IDS))
        errors[width] = float((found - wanted).detach().norm() / wanted.detach().norm())
    assert errors[16] <= 1.01 * errors[12] < 0.5 * errors[4]
    assert errors[12] < 0.2


def test_the_projection_is_that_of_least_squares() -> None:
    x, y = torch.randn(40, 5), torch.randn(40, 3)
    weight, bias = _least_squares(x, y)
    wanted = torch.linalg.lstsq(torch.cat([x, torch.ones(40, 1)], 1).double(), y.double()).solution
    torch.testing.assert_close(torch.cat([weight.T, bias[None]]), wanted, rtol=1e-5, atol=1e-6)


def test_adapters_begin_near_the_identity() -> None:
    teacher, student = teacher_of(BERT), student_of()
    for part in teacher.modules():
        if isinstance(part, nn.LayerNorm):
            part.weight.data *= 3
            part.bias.data += 1
    drawn = student_of().albert.encoder.layers[0].adapters[1]
    start_from(student, teacher)
    layer = student.albert.encoder.layers[0]
    for place, norm in (("attention", layer.full_layer_layer_norm), ("ffn", layer.attention.LayerNorm)):
        x = norm(torch.randn(50, 32)).detach()
        for adapters, low, high in ((layer.adapters[1], 0.0, 0.1), (drawn, 0.6, 1.0)):
            error = float((getattr(adapters, place)(x) - x).detach().norm() / x.norm())
            assert low <= error < high


def test_the_head_is_the_teachers() -> None:
    teacher, student = teacher_of(BERT), student_of()
    start_from(student, teacher)
    states = torch.randn(3, 32)
    torch.testing.assert_close(student.predictions(states), teacher.cls.predictions(states))


def test_an_encoder_alone_leaves_the_head_as_drawn() -> None:
    student = student_of()
    before = {name: p.clone() for name, p in student.predictions.named_parameters()}
    torch.manual_seed(0)
    start_from(student, BertModel(BERT))
    assert all(torch.equal(p, before[name]) for name, p in student.predictions.named_parameters())


def test_the_same_seed_gives_the_same_bits() -> None:
    teacher, one, other = teacher_of(BERT), student_of(embedding_size=8), student_of(embedding_size=8)
    start_from(one, teacher, seed=3)
    start_from(other, teacher, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"vocab_size": 68}, "the teacher has 67 words, the student 68"),
        ({"type_vocab_size": 1}, "2 kinds of tokens, the student 1"),
        ({"hidden_size": 16}, "as wide as the student's states"),
        ({"max_position_embeddings": 21}, "21 positions and embeddings of 32, the teacher 20 and 32"),
        ({"embedding_size": 33}, "18 positions and embeddings of 33"),
        ({"intermediate_size": 193}, "the teacher has 192 neurons, the student 193"),
        ({"hidden_act": "relu"}, "the student's relu"),
    ],
)
def test_students_that_do_not_fit_stay_as_they_are(more: dict[str, Any], message: str) -> None:
    student = student_of(**more)
    before = [p.clone() for p in student.parameters()]
    with pytest.raises(InputError, match=message):
        start_from(student, teacher_of(BERT))
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (GPT2LMHeadModel(GPT2Config(vocab_size=67, n_embd=32, n_layer=2, n_head=2)), "0 projections"),
        (
            AutoModelForMaskedLM.from_config(
                ModernBertConfig(**SIZES, num_hidden_layers=2, pad_token_id=0, eos_token_id=1, bos_token_id=2,
                                 cls_token_id=2, sep_token_id=1)
            ),
            "start at random",
        ),
        (
            AutoModelForMaskedLM.from_config(AlbertConfig(**SIZES, embedding_size=16, hidden_act="gelu")),
            "AlbertModel has embeddings of 16 numbers and the student states of 32, and no projection.*at random",
        ),
    ],
    ids=("gpt2", "modernbert", "albert"),
)  # fmt: skip
def test_other_kinds_of_teachers_are_refused(teacher: nn.Module, message: str) -> None:
    with pytest.raises(InputError, match=message):
        start_from(student_of(), teacher)
