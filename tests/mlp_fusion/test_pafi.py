"""PaFi: which values are chosen, that these alone train, by right gradients, and on what base they may be loaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from companion_models import IDS, attached, classifier, logits
from moe_models import moe_model
from peft import PeftModel, SupertuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

import checkpoints as ck
import mlp_fusion
from families import token_batch
from mlp_fusion import InputError, PafiConfig
from mlp_fusion.companions import sparse
from mlp_fusion.companions.fisher import fisher_scores
from mlp_fusion.companions.pafi import PafiLayer
from mlp_fusion.companions.ranking import candidates


def layers(model: Any) -> dict[str, PafiLayer]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, PafiLayer)
    }


def chosen(model: Any, adapter: str = "default") -> dict[str, Tensor]:
    """Name of a parameter of the base -> which of its values are chosen, as a mask."""
    found = {}
    for name, layer in layers(model).items():
        for own, (_, at) in layer.places(adapter).items():
            mask = torch.zeros(layer.base_layer.get_parameter(own).shape, dtype=torch.bool)
            found[f"{name}.{own}"] = mask.index_put(at, torch.tensor(True))
    return found


def everything(model: nn.Module) -> dict[str, Tensor]:
    """What may be chosen by default: no embeddings, no zeros."""
    return {n: p.detach() for n, p in model.named_parameters() if "embeddings." not in n or "LayerNorm" in n}


def test_in_each_matrix_it_chooses_what_supertuning_does() -> None:
    model = classifier()
    config = PafiConfig(budget=0.02, ranking="matrix", biases=False, norms=False, target_modules=["dense", "query"])
    masks = chosen(get_peft_model(copy.deepcopy(model), config))
    peer = get_peft_model(
        copy.deepcopy(model),
        SupertuningConfig(target_modules=["dense", "query"], sparsity=1 - 0.02, select_top=False),
    )
    theirs = {name: module for name, module in peer.named_modules() if hasattr(module, "supertuning_indices")}
    assert len(masks) == len(theirs)
    for name, module in theirs.items():
        own = masks[name.removeprefix("base_model.model.") + ".weight"]
        indices = module.supertuning_indices["default"].long()
        assert torch.equal(own.flatten().nonzero().squeeze(1), indices.sort().values)


@pytest.mark.parametrize("budget", [1, 700, 0.03])
def test_over_all_tensors_it_chooses_the_smallest(budget: int | float) -> None:
    model = classifier()
    made = get_peft_model(copy.deepcopy(model), PafiConfig(budget=budget))
    masks, tensors = chosen(made), everything(model)
    count = budget if isinstance(budget, int) else int(budget * sum(t.numel() for t in tensors.values()))
    assert sum(int(mask.sum()) for mask in masks.values()) == count
    scores = torch.cat([t.abs().flatten() for t in tensors.values()])
    worst = scores[scores > 0].sort().values[count - 1]
    assert all(bool((tensors[name].abs()[mask] <= worst).all()) for name, mask in masks.items())
    assert sum(p.numel() for p in made.parameters() if p.requires_grad) == count


def test_of_equal_values_the_first_are_chosen_and_zeros_never() -> None:
    model = classifier()
    for parameter in everything(model).values():
        parameter.fill_(0.25)
    first, second = (model.bert.encoder.layer[i].attention.self.query.weight.data for i in (0, 1))
    first[0, :5], second[3, 4] = 0.0, 0.125
    made = get_peft_model(model, PafiConfig(budget=9, target_modules=["query"], biases=False))
    masks = list(chosen(made).values())
    assert masks[0].flatten().nonzero().squeeze(1).tolist() == list(range(5, 13))
    assert masks[1].nonzero().tolist() == [[3, 4]]


def test_padding_and_new_heads_are_not_chosen_and_heads_train() -> None:
    model = classifier()
    table = model.bert.embeddings.word_embeddings
    table.weight.data[table.padding_idx] = 1e-9
    model.classifier.weight.data.fill_(1e-9)
    config = PafiConfig(budget=0.05, embeddings=True, modules_to_save=["classifier"])
    made = get_peft_model(model, config)
    masks = chosen(made)
    assert not masks["bert.embeddings.word_embeddings.weight"][table.padding_idx].any()
    assert masks["bert.embeddings.word_embeddings.weight"].any()
    assert not any("classifier" in name for name in masks)
    assert any("classifier" in n for n, p in made.named_parameters() if p.requires_grad)


@pytest.mark.parametrize(("left_out", "kind"), [("biases", "dense.bias"), ("norms", "LayerNorm")])
def test_kinds_that_are_left_out(left_out: str, kind: str) -> None:
    with_it, without = (
        chosen(get_peft_model(classifier(), PafiConfig(budget=0.5, ranking="matrix", **options)))
        for options in ({}, {left_out: False})
    )
    assert any(kind in name for name in with_it)
    assert not any(kind in name for name in without)


def gradients(made: Any, ids: Tensor = IDS) -> dict[str, Tensor]:
    """Of the values, in their places of each parameter."""
    made.zero_grad()
    made(ids).logits.square().sum().backward()
    found = {}
    for name, layer in layers(made).items():
        for own, (part, at) in layer.places("default").items():
            gradient = layer.pafi_values["default"].grad
            assert gradient is not None
            base = layer.base_layer.get_parameter(own)
            assert base.grad is None
            found[f"{name}.{own}"] = torch.zeros(base.shape).index_put(at, gradient[part].float())
    return found


def gpt2() -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=90, n_positions=16))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0.0, 0.02)
    return model.eval()


@pytest.mark.parametrize("plain", [True, False], ids=["in place", "composed"])
@pytest.mark.parametrize("make", [classifier, gpt2])
def test_gradients_are_those_of_the_whole_parameters(make: Any, plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In projections of either layout, biases, norms and embeddings; with values that are not those of the start."""
    if not plain:
        monkeypatch.setattr(PafiLayer, "_plain", lambda _: False)
    model = make()
    config = PafiConfig(budget=0.1, ranking="matrix", embeddings=make is classifier)
    made = attached(model, config, size=0.05)
    found, masks = gradients(made), chosen(made)
    assert len({name.rpartition(".")[2] for name in found}) == 2
    merged = copy.deepcopy(made).merge_and_unload()
    merged.requires_grad_(True)
    merged(IDS).logits.square().sum().backward()
    wanted = {name: parameter.grad for name, parameter in merged.named_parameters()}
    for name, own in found.items():
        expected = torch.where(masks[name], wanted[name], 0.0)
        torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()) + 1e-9)


def test_a_pass_without_it_in_between_does_not_change_gradients() -> None:
    """As where the model is its own reference."""
    made = attached(classifier(), PafiConfig(budget=0.2), size=0.2)
    wanted = gradients(made)
    made.zero_grad()
    loss = made(IDS).logits.square().sum()
    with made.disable_adapter(), torch.no_grad():
        made(IDS)
    loss.backward()
    for name, layer in layers(made).items():
        for own, (part, at) in layer.places("default").items():
            gradient = layer.pafi_values["default"].grad
            assert gradient is not None
            torch.testing.assert_close(wanted[f"{name}.{own}"][at], gradient[part])


def test_values_that_changed_before_the_backward_are_said() -> None:
    made = attached(classifier(), PafiConfig(budget=0.1))
    loss = made(IDS).logits.sum()
    with torch.no_grad():
        for layer in layers(made).values():
            layer.pafi_values["default"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_two_passes_before_one_backward() -> None:
    made = attached(classifier(), PafiConfig(budget=0.1))
    separate = [gradients(made, ids) for ids in (IDS, IDS.flip(1))]
    made.zero_grad()
    loss = made(IDS).logits.square().sum() + made(IDS.flip(1)).logits.square().sum()
    loss.backward()
    for name, layer in layers(made).items():
        for own, (part, at) in layer.places("default").items():
            gradient = layer.pafi_values["default"].grad
            assert gradient is not None
            both = separate[0][f"{name}.{own}"][at] + separate[1][f"{name}.{own}"][at]
            torch.testing.assert_close(gradient[part], both, rtol=1e-4, atol=1e-6)


def test_weight_decay_moves_nothing_else() -> None:
    model = classifier()
    made = get_peft_model(copy.deepcopy(model), PafiConfig(budget=0.05)).train()
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for _ in range(3):
        made(IDS).logits.square().sum().backward()
        optimizer.step()
    masks, merged = chosen(made), made.merge_and_unload()
    before, moved = dict(model.named_parameters()), 0
    for name, parameter in merged.named_parameters():
        mask = masks.get(name, torch.zeros_like(parameter, dtype=torch.bool))
        assert torch.equal(parameter[~mask], before[name][~mask])
        moved += int((parameter[mask] != before[name][mask]).sum())
    assert moved == sum(int(mask.sum()) for mask in masks.values())


def test_state_dicts_hold_the_base_as_it_was() -> None:
    model = classifier()
    made = attached(model, PafiConfig(budget=0.2))
    logits(made)
    state, wanted = made.state_dict(), dict(model.named_parameters())
    for name, parameter in wanted.items():
        stored = [state[n] for n in state if n.replace(".base_layer", "") == f"base_model.model.{name}"]
        assert torch.equal(stored[0], parameter)


def test_in_bfloat16_values_are_kept_in_float32_and_the_bits_come_back() -> None:
    model = classifier().bfloat16()
    made = attached(model, PafiConfig(budget=0.1), size=0.01)
    assert {p.dtype for p in made.parameters() if p.requires_grad} == {torch.float32}
    gradients(made)
    left, wanted = made.unload(), dict(model.named_parameters())
    assert all(torch.equal(parameter, wanted[name]) for name, parameter in left.named_parameters())


def test_what_is_moved_or_loaded_anew_leaves_no_values_behind() -> None:
    model = classifier()
    made = attached(model, PafiConfig(budget=0.1), size=0.05)
    logits(made)
    for layer in layers(made).values():
        layer.pafi_indices["default"].sub_(1).clamp_(min=0)
    made.double()
    left, wanted = made.unload(), dict(model.named_parameters())
    assert all(torch.equal(parameter, wanted[name].double()) for name, parameter in left.named_parameters())


def test_autocast_runs_and_differentiates_in_its_dtype() -> None:
    made = attached(classifier(), PafiConfig(budget=0.1, ranking="matrix"), size=0.05)
    wanted = gradients(made)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(made)
    for name, own in found.items():
        # A key's bias, for one, has no gradient but what rounding makes.
        torch.testing.assert_close(own, wanted[name], rtol=0.2, atol=0.1 * float(wanted[name].abs().max()) + 1e-6)


def test_two_adapters_beside_each_other_and_together() -> None:
    model = classifier()
    made = attached(model, PafiConfig(budget=0.1, ranking="matrix"))
    one = logits(made)
    made.add_adapter("other", PafiConfig(budget=0.1, ranking="matrix"))
    assert all(torch.equal(m, chosen(made)[n]) for n, m in chosen(made, "other").items())
    assert torch.equal(logits(made), one)
    made.set_adapter("other")
    assert torch.equal(logits(made), logits(model))
    made.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(logits(made), one)


def test_no_projection_forms_a_dense_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []

    def noted(g: Tensor, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        counted.append(len(rows))
        return torch.zeros(len(rows))

    monkeypatch.setattr(sparse, "sampled_product", noted)
    made = attached(classifier(), PafiConfig(budget=0.1, ranking="matrix", biases=False, norms=False))
    gradients(made)
    assert sum(counted) == sum(p.numel() for p in made.parameters() if p.requires_grad)


@pytest.mark.parametrize("save_indices", [True, False])
def test_what_a_checkpoint_holds(save_indices: bool, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = classifier()
    made = attached(model, PafiConfig(budget=500, save_indices=save_indices))
    made.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    kinds = {name.rpartition(".")[2]: 0 for name in tensors}
    for name, tensor in tensors.items():
        kinds[name.rpartition(".")[2]] += tensor.numel()
    assert kinds == ({"pafi_values": 500, "pafi_indices": 500} if save_indices else {"pafi_values": 500})


def test_without_indices_another_base_is_refused_and_with_them_it_may_differ(tmp_path: Path) -> None:
    model, other = classifier(), classifier()
    with torch.no_grad():
        other.bert.encoder.layer[1].output.dense.weight[3, 4] += 1e-3
    for name, save_indices in (("ruled", False), ("stored", True)):
        attached(model, PafiConfig(budget=500, save_indices=save_indices)).save_pretrained(tmp_path / name)
    with pytest.raises(InputError, match="chosen of another model's: load the base"):
        PeftModel.from_pretrained(copy.deepcopy(other), tmp_path / "ruled")
    again = PeftModel.from_pretrained(copy.deepcopy(other), tmp_path / "stored")
    reference = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "stored")
    assert all(torch.equal(m, chosen(again)[n]) for n, m in chosen(reference).items())


def test_a_stored_adapters_config_does_not_begin_a_new_one(tmp_path: Path) -> None:
    attached(classifier(), PafiConfig(budget=50)).save_pretrained(tmp_path)
    made = get_peft_model(classifier(), PafiConfig.from_pretrained(tmp_path))
    with pytest.raises(InputError, match="indices are not loaded"):
        logits(made)


def test_fisher_chooses_by_gradients_on_a_text(tmp_path: Path) -> None:
    folder = ck.add_tokenizer(ck.save_tiny(tmp_path / "gpt2", "gpt2"), pad_token="<pad>")
    text = tmp_path / "text.txt"
    text.write_text("one two three\nfour five\ntwo two one five four\n", encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = PafiConfig(budget=0.1, criterion="fisher", text=str(text), ranking="matrix")
    masks = chosen(get_peft_model(copy.deepcopy(model), config))
    by_size = chosen(get_peft_model(copy.deepcopy(model), PafiConfig(budget=0.1, ranking="matrix")))
    assert any(not torch.equal(mask, by_size[name]) for name, mask in masks.items())


def test_fisher_scores_are_mean_squares_of_the_gradients_of_sequences(tmp_path: Path) -> None:
    folder = ck.add_tokenizer(ck.save_tiny(tmp_path / "gpt2", "gpt2"), pad_token="<pad>")
    text = tmp_path / "text.txt"
    text.write_text("one two three\nfour five\n", encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = candidates(model, PafiConfig(), lambda name: name.endswith("c_fc"))
    scores = fisher_scores(model, found, str(text))
    assert all(parameter.requires_grad for parameter in model.parameters())
    tokenizer, sums = AutoTokenizer.from_pretrained(folder), torch.zeros(())
    weight = model.transformer.h[0].mlp.c_fc.weight
    for line in text.read_text(encoding="utf-8").splitlines():
        ids = tokenizer(line, return_tensors="pt")["input_ids"]
        loss = model.eval()(ids, labels=ids).loss * (ids.shape[1] - 1)
        sums = sums + torch.autograd.grad(loss, weight)[0].square()
    torch.testing.assert_close(scores["transformer.h.0.mlp.c_fc.weight"], sums / 2, rtol=1e-3, atol=1e-9)


REFUSED = [
    ({"budget": 0}, "budget is 0: give a count"),
    ({"budget": 1.5}, "budget is 1.5: give a count"),
    ({"budget": 10_000_000}, r"budget 10000000 is 10,000,000 values, the chosen tensors have"),
    ({"budget": 1e-9}, "chooses none: raise it"),
    ({"ranking": "rows"}, "ranking is 'rows': choose global or matrix"),
    ({"criterion": "random"}, "criterion is 'random': choose magnitude or fisher"),
    ({"criterion": "fisher"}, "criterion fisher needs text"),
    ({"criterion": "fisher", "text": "x", "save_indices": False}, "criterion fisher needs save_indices"),
    ({"target_modules": ["nonsense"]}, "none of the modules has parameters to choose from"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_cannot_be_is_refused_in_a_line(options: dict[str, Any], message: str) -> None:
    model = classifier()
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(InputError, match=message) as caught:
        get_peft_model(model, PafiConfig(**options))
    assert "\n" not in str(caught.value)
    assert [name for name, _ in model.named_parameters()] == names


def test_embeddings_that_the_output_layer_shares_are_refused() -> None:
    with pytest.raises(InputError, match="shared with the output layer: choose without embeddings"):
        get_peft_model(gpt2(), PafiConfig(embeddings=True))


def test_quantised_weights_are_refused() -> None:
    model = classifier()
    dense = model.bert.encoder.layer[0].output.dense
    dense.weight = nn.Parameter(dense.weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(InputError, match="is quantised"):
        get_peft_model(model, PafiConfig())


@pytest.mark.slow
def test_compiled_it_computes_and_learns_the_same() -> None:
    made = attached(classifier(), PafiConfig(budget=0.1, ranking="matrix"), size=0.05)
    wanted = gradients(made)
    compiled = torch.compile(made, backend="aot_eager")
    made.zero_grad()
    compiled(IDS).logits.square().sum().backward()
    for name, layer in layers(made).items():
        for own, (part, at) in layer.places("default").items():
            gradient = layer.pafi_values["default"].grad
            assert gradient is not None
            torch.testing.assert_close(gradient[part], wanted[f"{name}.{own}"][at], rtol=1e-3, atol=1e-5)


def test_a_model_with_it_is_pickled_as_a_whole(tmp_path: Path) -> None:
    made = attached(classifier(), PafiConfig(budget=0.1))
    torch.save(made, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits(again), logits(made))


def test_stacks_of_experts_take_part() -> None:
    """A module with parameters and no weight, whose pass is its own: composed, and with gradients through it."""
    model = moe_model("MixtralConfig").eval()
    made = attached(model, PafiConfig(budget=0.05, ranking="matrix"), size=0.05)
    assert any(name.endswith("experts.down_proj") for name in chosen(made))
    batch = token_batch()
    with torch.no_grad():
        with_it = made(**batch).logits
    made(**batch).logits.square().sum().backward()
    assert all(p.grad is not None for p in made.parameters() if p.requires_grad)
    left = copy.deepcopy(made).unload()
    assert all(torch.equal(p, dict(model.named_parameters())[n]) for n, p in left.named_parameters())
    with torch.no_grad():
        torch.testing.assert_close(made.merge_and_unload()(**batch).logits, with_it, rtol=1e-4, atol=1e-5)


def test_fused_modules_train_in_place_of_plain_ones() -> None:
    model = classifier()
    mlp_fusion.fuse(model, 16)
    made = attached(model, PafiConfig(budget=0.1, ranking="matrix"), size=0.05)
    assert not any(name.endswith(".scale") for name in chosen(made))
    assert any(".intermediate." in name or "fc1" in name for name in chosen(made)), list(chosen(made))
    gradients(made)
