"""How neurons lie in parameters: every layout there and back, against indexing one neuron at a time."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from bundles import random_bundle
from mlp_fusion.modules.stored import (
    Projection,
    bundle_of,
    count_neurons,
    parameters_of,
    spread,
    take_half,
    tensors_of,
)
from mlp_fusion.neurons import NeuronBundle

D = 5
#: Layout -> the axes of a parameter in order: E experts, N neurons, C channels, K a kernel of one entry.
DENSE = {"linear": "NC", "conv1d of transformers": "CN", "convolution": "NCK", "image convolution": "NCKK"}
STACKS = {"experts first": "ENC", "transposed": "ECN", "experts last": "NCE", "one after another": "NC", "joined": "CN"}
HALVES = [("first", "second"), ("second", "first"), ("even", "odd"), ("odd", "even")]


def projection(layout: str, axes: str, name: str, role: str, part: str, bias: str | None) -> Projection:
    together = layout in ("one after another", "joined")
    expert = axes.index("N") if together else axes.index("E") if "E" in axes else None
    return Projection(name, role, part, axes.index("N"), expert, bias)


def rows(size: int, neurons: int, part: str) -> list[int]:
    """Where the neurons of a part lie among `size` rows, written out."""
    return {
        "whole": list(range(size)),
        "first": list(range(neurons)),
        "second": list(range(neurons, 2 * neurons)),
        "even": list(range(0, 2 * neurons, 2)),
        "odd": list(range(1, 2 * neurons, 2)),
    }[part]


def naive(parameter: Tensor, axes: str, layout: str, expert: int, row: int, size: int) -> Tensor:
    """The channels of one row of one expert, by indexing."""
    if layout in ("one after another", "joined"):
        row = expert * size + row
    index: list[Any] = [{"E": expert, "N": row, "C": slice(None), "K": 0}[axis] for axis in axes]
    return parameter[tuple(index)]


def filled(axes: str, layout: str, experts: int, size: int, channels: int) -> Tensor:
    together = layout in ("one after another", "joined")
    lengths = {"E": experts, "N": size * (experts if together else 1), "C": channels, "K": 1}
    return torch.randn([lengths[axis] for axis in axes], dtype=torch.float64)


def read_by_hand(
    tensors: dict[str, Tensor], projections: list[Projection], axes: str, layout: str, experts: int, neurons: int
) -> dict[str, Tensor]:
    """Role -> `(E, N, C)` and bias -> `(E, N)`, one neuron at a time."""
    found = {}
    for p in projections:
        size = 2 * neurons if p.part != "whole" else neurons
        places = rows(size, neurons, p.part)
        one = [[naive(tensors[p.parameter], axes, layout, e, row, size) for row in places] for e in range(experts)]
        found[p.role] = torch.stack([torch.stack(part) for part in one])
        if p.bias is not None and p.role != "w_out":
            biases = tensors[p.bias].reshape(experts, size)
            found[p.role.replace("w_", "b_")] = torch.stack([biases[:, row] for row in places], dim=1)
    return found


def stored(
    layout: str, axes: str, experts: int, neurons: int, halves: tuple[str, str] | None, bias: bool
) -> tuple[list[Projection], dict[str, Tensor]]:
    """Projections in a layout, with random tensors."""
    made = [projection(layout, axes, "down", "w_out", "whole", "down_bias" if bias else None)]
    tensors = {"down": filled(axes, layout, experts, neurons, D)}
    names = {"w_gate": "both", "w_in": "both"} if halves else {"w_in": "up"}
    for number, (role, name) in enumerate(names.items()):
        part = halves[number] if halves else "whole"
        made.append(projection(layout, axes, name, role, part, f"{name}_bias" if bias else None))
    name = "both" if halves else "up"
    size = 2 * neurons if halves else neurons
    tensors[name] = filled(axes, layout, experts, size, D)
    if bias:
        shape = (experts, size) if "E" in axes else (experts * size,)
        tensors[f"{name}_bias"] = torch.randn(shape, dtype=torch.float64)
        tensors["down_bias"] = torch.randn((experts, D) if "E" in axes else (experts * D,), dtype=torch.float64)
    return made, tensors


CASES = [
    *((layout, axes, 1) for layout, axes in DENSE.items()),
    *((layout, axes, experts) for (layout, axes), experts in itertools.product(STACKS.items(), (1, 3))),
]


@pytest.mark.parametrize("neurons", [1, 17, 123])
@pytest.mark.parametrize("halves", [None, *HALVES])
@pytest.mark.parametrize(("layout", "axes", "experts"), CASES)
def test_every_layout_there_and_back(
    layout: str, axes: str, experts: int, halves: tuple[str, str] | None, neurons: int
) -> None:
    for bias in (False, True):
        projections, tensors = stored(layout, axes, experts, neurons, halves, bias)
        bundle = bundle_of(tensors, projections, "gelu", experts=experts)
        assert (bundle.batch, bundle.width, bundle.gated) == (experts, neurons, halves is not None)
        expected = read_by_hand(tensors, projections, axes, layout, experts, neurons)
        for name, tensor in expected.items():
            assert torch.equal(getattr(bundle, name), tensor), name
        if bias:
            assert torch.equal(bundle.b_out, tensors["down_bias"].reshape(experts, D))
        for p in projections:
            assert count_neurons(tensors[p.parameter].shape, p, experts) == neurons
        assert set(parameters_of(projections)) == set(tensors)
        back = tensors_of(bundle, projections, tensors)
        assert back.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(back[name], tensor), name
            assert back[name].shape == tensor.shape
            assert back[name].is_contiguous()
            assert back[name].data_ptr() != tensor.data_ptr()


@pytest.mark.parametrize("halves", [None, *HALVES])
@pytest.mark.parametrize(("layout", "axes", "experts"), CASES)
def test_narrower_bundles_are_written_in_the_same_layout(
    layout: str, axes: str, experts: int, halves: tuple[str, str] | None
) -> None:
    projections, tensors = stored(layout, axes, experts, 17, halves, bias=True)
    wide = bundle_of(tensors, projections, "gelu", experts=experts)
    narrow = wide.with_vectors(wide.vectors()[:, [3, 0, 9]], None)
    written = tensors_of(narrow, projections, tensors)
    again = bundle_of(written, projections, "gelu", experts=experts)
    for name in NeuronBundle.__dataclass_fields__:
        value = getattr(narrow, name)
        if isinstance(value, Tensor):
            assert torch.equal(getattr(again, name), value), name
    by_hand = read_by_hand(written, projections, axes, layout, experts, 3)
    for name, tensor in by_hand.items():
        assert torch.equal(getattr(narrow, name), tensor), name


@pytest.mark.parametrize("neurons", [1, 17, 123])
@pytest.mark.parametrize("halves", [None, *HALVES])
@pytest.mark.parametrize(("layout", "axes", "experts"), CASES)
def test_factors_are_spread_over_their_neurons(
    layout: str, axes: str, experts: int, halves: tuple[str, str] | None, neurons: int
) -> None:
    projections, tensors = stored(layout, axes, experts, neurons, halves, bias=True)
    scale = torch.rand(experts, neurons, dtype=torch.float64) + 0.5
    given = scale[0] if experts == 1 and "E" not in axes else scale
    multiplied = {
        name: tensor if name == "down_bias" else tensor * spread(given, projections, name, tensor)
        for name, tensor in tensors.items()
    }
    assert all(multiplied[name].shape == tensor.shape for name, tensor in tensors.items())
    before = read_by_hand(tensors, projections, axes, layout, experts, neurons)
    for name, tensor in read_by_hand(multiplied, projections, axes, layout, experts, neurons).items():
        factor = scale if name.startswith("b_") else scale[..., None]
        torch.testing.assert_close(tensor, before[name] * factor)


def test_dense_layouts_are_read_without_a_copy() -> None:
    for layout, axes in {**DENSE, "experts first": "ENC", "transposed": "ECN"}.items():
        for halves in (None, ("first", "second")):
            experts = 3 if "E" in axes else 1
            projections, tensors = stored(layout, axes, experts, 17, halves, bias=False)
            bundle = bundle_of(tensors, projections, "gelu", experts=experts)
            held = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
            assert {t.untyped_storage().data_ptr() for t in (bundle.w_in, bundle.w_out)} <= held, layout


def test_a_scale_goes_along_and_keeps_what_it_is() -> None:
    projections, tensors = stored("linear", "NC", 1, 17, None, bias=False)
    counts = torch.randint(1, 9, (17,))
    bundle = bundle_of(tensors, projections, "gelu", scale=counts, scale_exponent=0.5)
    assert bundle.scale is not None
    assert (bundle.scale.shape, bundle.scale.dtype, bundle.scale_exponent) == ((1, 17), torch.float32, 0.5)
    assert torch.equal(bundle.scale[0], counts.float())
    assert bundle_of(tensors, projections, "gelu", scale_exponent=0.5).scale_exponent == 0.0
    double = bundle_of(tensors, projections, "gelu", scale=counts.double())
    assert double.scale is not None
    assert double.scale.dtype == torch.float64


def test_the_ffn_computes_what_the_module_does() -> None:
    layer = torch.nn.Linear(D, 34, dtype=torch.float64)
    down = torch.nn.Linear(17, 4, dtype=torch.float64)
    projections = [
        Projection("both.weight", "w_gate", "second", 0, bias="both.bias"),
        Projection("both.weight", "w_in", "first", 0, bias="both.bias"),
        Projection("down.weight", "w_out", "whole", 1, bias="down.bias"),
    ]
    tensors = {f"both.{n}": p for n, p in layer.named_parameters()}
    tensors |= {f"down.{n}": p for n, p in down.named_parameters()}
    x = torch.randn(3, D, dtype=torch.float64)
    up, gate = layer(x).chunk(2, -1)
    found = bundle_of(tensors, projections, "silu").forward(x)[0]
    torch.testing.assert_close(found, down(torch.nn.functional.silu(gate) * up))


def test_halves_of_an_axis() -> None:
    values = torch.arange(12).reshape(2, 6)
    assert take_half(values, "whole", 1) is values
    assert take_half(values, "first", 1).tolist() == [[0, 1, 2], [6, 7, 8]]
    assert take_half(values, "second", 1).tolist() == [[3, 4, 5], [9, 10, 11]]
    assert take_half(values, "even", 1).tolist() == [[0, 2, 4], [6, 8, 10]]
    assert take_half(values, "odd", 0).tolist() == [[6, 7, 8, 9, 10, 11]]


def test_a_bundle_of_another_form_is_an_error() -> None:
    projections, tensors = stored("linear", "NC", 1, 17, ("first", "second"), bias=False)
    plain = random_bundle(width=17, d=D, d_out=D, bias=False)
    with pytest.raises((TypeError, AttributeError)):
        tensors_of(plain, projections, tensors)
    gated = dataclasses.replace(plain, w_gate=plain.w_in)
    assert tensors_of(gated, projections, tensors)["both"].shape == (34, D)
