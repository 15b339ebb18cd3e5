"""Matrix product operators against their definition, their bounds and the published counts; MPO as a method of peft."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from companion_models import IDS, attached, classifier, logits
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AlbertConfig, AlbertModel, AutoModelForCausalLM, GPT2Config

import mlp_fusion
from mlp_fusion import InputError, MpoConfig, mpo_decompose
from mlp_fusion.companions import mpo, operators
from mlp_fusion.companions.mpo import MpoLayer
from mlp_fusion.companions.operators import (
    MatrixProductOperator,
    applying_cost,
    chain_apply,
    chain_matrix,
    choose_shapes,
    rebuilding_cost,
    rebuilding_is_cheaper,
)

#: Rows, columns, and their factors.
CASES: list[tuple[tuple[int, int], Any]] = [
    ((24, 36), ((2, 3, 4), (3, 4, 3))),
    ((17, 123), None),
    ((1, 7), ((1, 1), (1, 7))),
    ((64, 20), ((2, 2, 2, 2, 4), (1, 5, 2, 2, 1))),
    ((10, 9), ((3, 4), (3, 4))),
    ((5, 6), ((5,), (6,))),
    # Two tensors and more on a side, with nothing to sum over beside the centre.
    ((6, 6), ((2, 1, 3, 1), (2, 1, 3, 1))),
    ((6, 6), ((2, 1, 1, 1, 3), (2, 1, 1, 1, 3))),
    ((24, 36), ((2, 2, 3, 1, 2), (1, 3, 2, 3, 2))),
    ((48, 30), ((2, 3, 2, 2, 1, 2), (2, 1, 3, 1, 5, 1))),
]
#: What float32 may be off by, as a share of the matrix's norm; float64, as it is.
OFF = {torch.float32: 2e-6, torch.float64: 1e-10}


def matrix(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def defined(chain: MatrixProductOperator) -> Tensor:
    """The matrix entry by entry, as the definition has it."""
    rows, columns = chain.shapes
    whole = torch.zeros(math.prod(rows), math.prod(columns), dtype=torch.float64)
    for r, i in enumerate(itertools.product(*map(range, rows))):
        for c, j in enumerate(itertools.product(*map(range, columns))):
            product = torch.ones(1, 1, dtype=torch.float64)
            for t, a, b in zip(chain.tensors, i, j, strict=True):
                product = product @ t[:, a, b].double()
            whole[r, c] = product[0, 0]
    return whole[: chain.shape[0], : chain.shape[1]]


def unfolding(weight: Tensor, chain: MatrixProductOperator, bond: int) -> Tensor:
    """The matrix between the first indices, up to behind `bond`, and the rest."""
    rows, columns = chain.shapes
    padded = torch.zeros(math.prod(rows), math.prod(columns), dtype=torch.float64)
    padded[: len(weight), : weight.shape[1]] = weight
    order = [axis for k in range(len(rows)) for axis in (k, len(rows) + k)]
    first = math.prod(i * j for i, j in zip(rows[: bond + 1], columns[: bond + 1], strict=True))
    return padded.reshape(*rows, *columns).permute(order).reshape(first, -1)


@pytest.mark.parametrize("dtype", OFF)
@pytest.mark.parametrize(("shape", "shapes"), CASES)
def test_a_chain_is_its_matrix(shape: tuple[int, int], shapes: Any, dtype: torch.dtype) -> None:
    weight = matrix(shape).to(dtype)
    chain = mpo_decompose(weight, shapes, length=3)
    assert {t.dtype for t in chain.tensors} == {dtype}
    assert all(t.is_contiguous() for t in chain.tensors)
    assert float((chain.matrix() - weight).norm()) <= OFF[dtype] * float(weight.norm())
    off = OFF[dtype] if dtype == torch.float64 else OFF[dtype] * float(weight.norm())
    if weight.numel() < 1000:
        torch.testing.assert_close(defined(chain), weight.double(), rtol=0.0, atol=off)
    small = chain.truncated(2)
    if weight.numel() < 1000:
        torch.testing.assert_close(small.matrix().double(), defined(small), rtol=0.0, atol=off)
    x = matrix((5, shape[1]), seed=1).to(dtype)
    y, through = x @ small.matrix().mT, chain_apply(small.tensors, x, shape[0])
    if dtype == torch.float64:
        torch.testing.assert_close(through, y)
    else:
        torch.testing.assert_close(through, y, rtol=0.0, atol=1e-5 * float(y.norm()))


@pytest.mark.parametrize("dtype", OFF)
@pytest.mark.parametrize(("shape", "shapes"), CASES)
def test_bonds_stand_in_the_bases_of_their_singular_vectors(
    shape: tuple[int, int], shapes: Any, dtype: torch.dtype
) -> None:
    weight = matrix(shape).to(dtype)
    chain = mpo_decompose(weight, shapes, length=3)
    single = dtype == torch.float32
    for bond, spectrum in enumerate(chain.spectra):
        values = torch.linalg.svdvals(unfolding(weight.double(), chain, bond))
        off = 1e-7 * float(values[0]) if single else 1e-10
        torch.testing.assert_close(spectrum, values[: len(spectrum)], rtol=1e-9, atol=off)
        assert float(values[len(spectrum) :].sum()) < 1e-10
        shares = values.square() / values.square().sum()
        entropy = -(shares * shares.clamp(min=1e-300).log()).sum()
        torch.testing.assert_close(chain.entropies()[bond], entropy, **({"rtol": 0.0, "atol": 1e-6} if single else {}))
    for t in chain.tensors[: chain.central]:
        side = t.flatten(0, 2)
        torch.testing.assert_close(side.mT @ side, torch.eye(t.shape[3], dtype=t.dtype))
    for t in chain.tensors[chain.central + 1 :]:
        side = t.flatten(1)
        torch.testing.assert_close(side @ side.mT, torch.eye(len(t), dtype=t.dtype))


#: Factors of a matrix of 24 x 36, and bonds of all sizes.
BONDS: list[tuple[Any, tuple[tuple[int, ...], ...]]] = [
    (((2, 3, 4), (3, 4, 3)), ((1, 2, 4, 6), (1, 3, 9, 12))),
    (((2, 1, 6, 2, 1), (3, 1, 2, 2, 3)), ((1, 2, 6), (1, 3, 6), (1, 5, 12), (1, 2, 3))),
]


@pytest.mark.parametrize("dtype", OFF)
@pytest.mark.parametrize(("shapes", "sizes"), BONDS)
@pytest.mark.parametrize("seed", range(4))
def test_truncations_are_slices_and_keep_their_bound(seed: int, shapes: Any, sizes: Any, dtype: torch.dtype) -> None:
    weight = matrix((24, 36), seed)
    if seed == 3:  # of rank 2, with bonds that are all but empty
        weight = weight[:, :2] @ weight[:2]
    weight = weight.to(dtype)
    chain = mpo_decompose(weight, shapes)
    off = 1e-10 if dtype == torch.float64 else OFF[dtype] * float(weight.norm())
    for bonds in itertools.product(*sizes):
        small = chain.truncated(bonds)
        assert small.bonds == bonds
        ends = [1, *bonds, 1]
        for t, whole, before, after in zip(small.tensors, chain.tensors, ends, ends[1:], strict=False):
            assert torch.equal(t, whole[:before, :, :, :after])
        error = float((small.matrix() - weight).norm())
        assert error <= chain.error_bound(bonds) + off
        # No chain of these bonds is nearer than the best of one bond alone.
        assert error >= float(chain.discarded(bonds).max()) - off
        assert chain.truncated(12).truncated(bonds).error_bound(bonds) == chain.error_bound(bonds)
    assert chain.truncated(99).bonds == chain.bonds
    assert chain.error_bound(99) == 0.0


def test_autocast_and_fast_products_do_not_reach_a_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = matrix((24, 36)).float()
    expected = mpo_decompose(weight, ((2, 3, 4), (3, 4, 3)))
    asked: list[str] = []
    product = operators._product
    monkeypatch.setattr(
        operators, "_product", lambda m: (asked.append(torch.backends.mkldnn.matmul.fp32_precision), product(m))[1]
    )
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = mpo_decompose(weight.requires_grad_(), ((2, 3, 4), (3, 4, 3)))
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    assert asked == ["ieee", "ieee"]
    assert all(torch.equal(*pair) for pair in zip(found.tensors, expected.tensors, strict=True))


def test_a_zero_matrix_and_low_precision() -> None:
    chain = mpo_decompose(torch.zeros(6, 4), ((2, 3), (2, 2)))
    assert float(chain.matrix().abs().max()) == 0.0
    assert chain.entropies().tolist() == [0.0]
    weight = matrix((24, 36)).bfloat16()
    chain = mpo_decompose(weight, ((2, 3, 4), (3, 4, 3)))
    assert {t.dtype for t in chain.tensors} == {torch.float32}
    torch.testing.assert_close(chain.matrix(), weight.float())


def test_single_precision_is_as_good_as_it_can_be() -> None:
    weight = matrix((64, 96))
    weight = (weight[:, :3] @ weight[:3] + 1e-3 * weight).float()
    shapes = ((4, 4, 4), (4, 6, 4))
    chain, exact = mpo_decompose(weight, shapes), mpo_decompose(weight.double(), shapes)
    assert float((chain.matrix() - weight).norm()) <= 1e-6 * float(weight.norm())
    for own, true in zip(chain.spectra, exact.spectra, strict=True):
        torch.testing.assert_close(own, true, rtol=1e-7, atol=1e-7 * float(true[0]))
    for bonds in (1, 3, 9):
        errors = [float((c.truncated(bonds).matrix() - weight).norm()) for c in (chain, exact)]
        assert errors[0] == pytest.approx(errors[1], rel=1e-5)


def test_the_published_counts_of_albert_base() -> None:
    """Of the tensors that are trained: 936,148, and of the model: 11,683,584."""
    attention = ((3, 4, 4, 4, 4), (4, 4, 4, 4, 3))
    of = {
        ((30000, 128), ((5, 10, 10, 10, 6), (2, 2, 4, 4, 2))): (1, 270_644),
        ((768, 768), attention): (4, 74_016),
        ((768, 3072), ((3, 4, 4, 4, 4), (4, 4, 8, 6, 4))): (2, 184_720),
    }
    total = 0
    for (shape, shapes), (times, small) in of.items():
        sides = [i * j for i, j in zip(*shapes, strict=True)]
        ends = [min(math.prod(sides[:k]), math.prod(sides[k:])) for k in range(6)]
        each = [ends[k] * sides[k] * ends[k + 1] for k in range(5)]
        assert each[2] == shape[0] * shape[1]
        assert sum(each) - each[2] == small
        total += times * small
    assert total == 936_148
    with torch.device("meta"):
        albert = AlbertModel(AlbertConfig(hidden_size=768, num_attention_heads=12, intermediate_size=3072))
    assert albert.num_parameters() == 11_683_584
    chain = mpo_decompose(matrix((768, 768)).float(), attention)
    assert chain.numel - chain.tensors[2].numel() == 74_016


def test_shapes_are_even_and_pad_little() -> None:
    for rows, columns in ((768, 768), (576, 1536), (30522, 384), (17, 123), (1, 1537), (509, 1)):
        shapes = choose_shapes(rows, columns)
        for size, factors in zip((rows, columns), shapes, strict=True):
            assert size <= math.prod(factors) <= 1.02 * size
            assert max(factors) == factors[2]
    assert choose_shapes(768, 768) == ((3, 4, 4, 4, 4), (4, 4, 4, 4, 3))
    assert choose_shapes(30720, 1, length=2) == ((160, 192), (1, 1))


@pytest.mark.parametrize("bonds", [1, 2, 99])
def test_costs_are_those_of_the_products(bonds: int) -> None:
    chain = mpo_decompose(matrix((24, 36)), ((2, 3, 4), (3, 4, 3))).truncated(bonds)
    with FlopCounterMode(display=False) as counter:
        chain.matrix()
    # The products by the identity at both ends are counted as made.
    assert counter.get_total_flops() == 2 * rebuilding_cost(chain.shapes, chain.bonds)
    with FlopCounterMode(display=False) as counter:
        chain_apply(chain.tensors, matrix((5, 36)), 24)
    assert counter.get_total_flops() == 2 * 5 * applying_cost(chain.shapes, chain.bonds)
    assert rebuilding_is_cheaper(10**6, (24, 36), chain.shapes, chain.bonds) == (bonds > 2)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: mpo_decompose(torch.zeros(3)), "only matrices"),
        (lambda: mpo_decompose(torch.zeros(0, 3)), "only matrices"),
        (lambda: mpo_decompose(torch.zeros(3, 3, dtype=torch.int64)), "only matrices"),
        (lambda: mpo_decompose(torch.full((3, 3), math.nan)), "infinite numbers or NaN"),
        (lambda: mpo_decompose(torch.ones(4, 4), ((2, 2), (2, 1))), "too small"),
        (lambda: mpo_decompose(torch.ones(4, 4), ((2, 2), (4,))), "as many factors"),
        (lambda: mpo_decompose(torch.ones(4, 4)).truncated(0), "sizes of 1 or more"),
        (lambda: mpo_decompose(torch.ones(4, 4)).error_bound([1, 2]), "give 4 sizes"),
        (lambda: MpoConfig(bonds=0), "1 or more"),
        (lambda: MpoConfig(length=1), "2 tensors or more"),
        (lambda: get_peft_model(classifier(), MpoConfig(target_modules=["LayerNorm"])), "linear layers and embeddings"),
    ],
)
def test_bad_input(call: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()


# --- as a method of peft ---------------------------------------------------------------------------------------------


def layers(model: Any) -> list[MpoLayer]:
    return [module for module in model.modules() if isinstance(module, MpoLayer)]


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_it_starts_as_the_model_and_trains_the_small_tensors(fused: bool) -> None:
    model = classifier()
    if fused:
        mlp_fusion.fuse(model, 16)
    made = get_peft_model(copy.deepcopy(model), MpoConfig()).eval()
    torch.testing.assert_close(logits(made), logits(model), rtol=1e-4, atol=1e-5)
    trained = {name for name, parameter in made.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".mpo_" in name and ".mpo_2." not in name for name in trained)
    whole = get_peft_model(copy.deepcopy(model), MpoConfig(train_central=True))
    assert any(".mpo_2." in name for name, parameter in whole.named_parameters() if parameter.requires_grad)
    with made.disable_adapter():
        assert torch.equal(logits(made), logits(model))


@pytest.mark.parametrize("train_central", [False, True])
def test_gradients_are_those_of_the_product(train_central: bool) -> None:
    made = get_peft_model(classifier().double(), MpoConfig(bonds=5, train_central=train_central))
    made(IDS).logits.square().sum().backward()
    own = {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}
    for parameter in made.parameters():
        parameter.grad = None
    for layer in layers(made):
        # Through every tensor, by torch's own rules.
        layer.matrix = lambda adapter, layer=layer: chain_matrix(layer.chain(adapter), layer._shape())  # type: ignore[method-assign]
    made(IDS).logits.square().sum().backward()
    expected = {name: p.grad for name, p in made.named_parameters() if p.grad is not None}
    assert own.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(own[name], gradient)


def test_the_matrix_is_made_once_until_something_changes() -> None:
    made = get_peft_model(classifier(), MpoConfig(target_modules=["query"]))
    layer = layers(made)[0]
    first = layer.matrix("default")
    whole = layer._made["default"].whole
    second = layer.matrix("default")
    assert layer._made["default"].whole is whole
    (first.sum() + second.sum()).backward()  # as a layer that runs twice in a step
    twice = layer.mpo_0["default"].grad.clone()
    layer.mpo_0["default"].grad = None
    layer.matrix("default").sum().backward()
    torch.testing.assert_close(twice, 2.0 * layer.mpo_0["default"].grad)
    with torch.no_grad():
        layer.mpo_0["default"].mul_(2.0)
    torch.testing.assert_close(layer.matrix("default"), 2.0 * first)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_of_optimisers_are_seen(fused: bool) -> None:
    """Also those that do not count as changes of a tensor."""
    made = get_peft_model(classifier(), MpoConfig(target_modules=["query"]))
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=1e-2, fused=fused)
    for _ in range(2):
        made(IDS).logits.sum().backward()
        optimizer.step()
        for layer in layers(made):
            expected = chain_matrix(layer.chain("default"), layer._shape())
            torch.testing.assert_close(layer.matrix("default"), expected)


@pytest.mark.parametrize("through", [False, True], ids=["matrix", "tensors"])
def test_both_ways_compute_the_same(through: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = GPT2Config(vocab_size=90, n_embd=24, n_layer=1, n_head=2, n_positions=16)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(InputError, match="output layer's weight too"):
        get_peft_model(copy.deepcopy(model), MpoConfig(target_modules=["wte"]))
    made = get_peft_model(copy.deepcopy(model), MpoConfig(bonds=4)).eval()
    monkeypatch.setattr(mpo, "rebuilding_is_cheaper", lambda *_, **__: not through)
    found = logits(made)
    merged = made.merge_and_unload()
    assert not layers(merged)
    assert type(merged.transformer.h[0].mlp.c_fc) is type(model.transformer.h[0].mlp.c_fc)
    torch.testing.assert_close(logits(merged), found, rtol=1e-4, atol=1e-5)
    assert float((found - logits(model)).abs().max()) > 1e-3


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
@pytest.mark.parametrize("way", ["matrix", "tensors", pytest.param("compiled", marks=pytest.mark.slow)])
def test_it_trains_under_autocast(way: str, inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the backward where trainers call it, outside, as well."""
    monkeypatch.setattr(mpo, "rebuilding_is_cheaper", lambda *_, **__: way != "tensors")
    made = get_peft_model(classifier(num_hidden_layers=1), MpoConfig(bonds=6, train_central=True)).eval()
    made(IDS).logits.square().sum().backward()
    wanted = {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}
    whole = layers(made)[-1]._made.get("default")
    made.zero_grad()
    run = torch.compile(made, backend="aot_eager") if way == "compiled" else made
    with torch.autocast("cpu", torch.bfloat16):
        seen = layers(made)[-1](torch.ones(2, 3, 32))
        loss = run(IDS).logits.float().square().sum()
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    assert seen.dtype == torch.bfloat16  # as of any linear layer there
    for name, p in made.named_parameters():
        if name in wanted:
            assert p.grad is not None
            # A key's chain has a small gradient, made of rounding in the end.
            off = 0.1 * float(wanted[name].norm()) + 1e-3
            assert float((p.grad - wanted[name]).norm()) < off, name
    if way == "matrix":
        # The product is made once, in the chain's own dtype, whether autocast is on or off.
        assert whole is not None
        assert whole.whole.dtype == torch.float32
        assert layers(made)[-1]._made["default"] is whole


def test_autocast_does_not_round_the_product_or_its_gradient() -> None:
    layer = layers(get_peft_model(classifier(), MpoConfig(target_modules=["query"], train_central=True)))[0]
    central, weights = layer.mpo_2["default"], matrix((32, 32)).float()
    wanted = layer.matrix("default").detach().clone()
    [gradient] = torch.autograd.grad((weights * layer.matrix("default")).sum(), [central])
    layer._made.clear()
    with torch.autocast("cpu", torch.bfloat16):
        found = layer.matrix("default")
        [own] = torch.autograd.grad((weights * found).sum(), [central])
    assert torch.equal(found, wanted)
    assert torch.equal(own, gradient)


def test_what_is_stored_loads_without_the_original(tmp_path: Path) -> None:
    made = attached(classifier(), MpoConfig(bonds=6, modules_to_save=["classifier"]))
    made.save_pretrained(tmp_path)
    other = classifier()
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if any(f"{part}.weight" in name for part in ("query", "key", "value", "dense", "embeddings")):
                parameter.fill_(7.0)
    # Norms and biases are the base model's; the matrices are the chain's.
    base = classifier()
    for parameter, original in zip(other.parameters(), base.parameters(), strict=True):
        if parameter.ndim == 1:
            parameter.data = original.data.clone()
    loaded = PeftModel.from_pretrained(other, tmp_path).eval()
    assert torch.equal(logits(loaded), logits(made))
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for name, t in stored.items() if "mpo_" in name) == sum(
        t.numel() for layer in layers(made) for t in layer.chain("default")
    )
    config = MpoConfig.from_pretrained(str(tmp_path))
    config.inference_mode = False
    with pytest.raises(InputError, match="whose tensors are not loaded"):
        logits(get_peft_model(classifier(), config))


def test_tensors_of_inference_mode_are_compared_by_their_numbers() -> None:
    """They have no versions."""
    with torch.inference_mode():
        made = get_peft_model(classifier(), MpoConfig(bonds=4)).eval()
        before = logits(made)
        layers(made)[0].chain("default")[2].mul_(2)
        assert not torch.equal(logits(made), before)


def test_a_chain_that_is_multiplied_out_has_numeric_gradients() -> None:
    layer = MpoLayer(nn.Linear(6, 4).double())
    layer.update_layer(
        "one", mpo_decompose(matrix((4, 6)), length=3).tensors, train_central=True, awaited=False
    )  # fmt: skip
    tensors = layer.chain("one")

    def whole(*values: Tensor) -> Tensor:
        for tensor, value in zip(tensors, values, strict=True):
            tensor.data.copy_(value)  # what trains is compared by its numbers
        left, central, right = operators.chain_sides(values)
        half = left @ central.flatten(1)
        made = half.reshape(-1, len(right)) @ right
        return mpo._Rebuild.apply(left, central, right, half.detach(), made.detach())

    assert torch.autograd.gradcheck(whole, [t.detach().clone().requires_grad_() for t in tensors])
    layer.matrix("one").square().sum().backward()
    direct = [t.detach().clone().requires_grad_() for t in tensors]
    chain_matrix(direct, (4, 6)).square().sum().backward()
    for tensor, other in zip(tensors, direct, strict=True):
        torch.testing.assert_close(tensor.grad, other.grad)


def test_bonds_of_modules_that_are_not_there_and_of_no_number() -> None:
    pattern = {"encoder.layer.0.attention.self.query": [2, 3, 3, 1]}
    with pytest.raises(InputError, match=r"bond_pattern names encoder\.layer\.0\S+: the model has no such module"):
        get_peft_model(classifier(), MpoConfig(bond_pattern=pattern))
    with pytest.raises(InputError, match="bonds is True: give a size"):
        get_peft_model(classifier(), MpoConfig(bonds=True))


def test_bonds_by_module_and_two_adapters() -> None:
    model = classifier()
    pattern = {"bert.encoder.layer.0.attention.self.query": [2, 3, 3, 1]}
    made = get_peft_model(model, MpoConfig(bond_pattern=pattern, target_modules=["query"]))
    first, second = layers(made)
    assert [t.shape[3] for t in first.chain("default")[:-1]] == [2, 3, 3, 1]
    assert second.chain("default")[2].numel() >= second.base_layer.weight.numel()
    made.add_adapter("other", MpoConfig(target_modules=["query"]))
    made.base_model.set_adapter(["default", "other"])
    with pytest.raises(InputError, match="activate one of them"):
        logits(made)


def test_embeddings_and_layers_that_are_left_out() -> None:
    kinds = [type(layer.base_layer) for layer in layers(get_peft_model(classifier(), MpoConfig()))]
    assert nn.Embedding in kinds
    assert nn.Linear in kinds
    kinds = [type(layer.base_layer) for layer in layers(get_peft_model(classifier(), MpoConfig(embeddings=False)))]
    assert nn.Embedding not in kinds
