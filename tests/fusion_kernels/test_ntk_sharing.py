"""Tangent kernels of blocks whose parts share parameters are refused: they would be those of untied parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

from fusion_kernels.ffn import FFN
from fusion_kernels.gates import PLAIN
from fusion_kernels.ntk import (
    cpu_backend,
    cuda_backend,
    gradient_dots,
    gradient_gram,
    gradient_norms,
    jvp,
    ntk_compare,
    ntk_gram,
    ntk_operator,
    ntk_vp,
    reference,
    torch_backend,
    trace_ntk_vp,
    types,
    vjp,
)
from fusion_kernels.ntk.operators import NTK_GRADIENT_GRAM, NTK_GRADIENT_NORMS, NTK_VP
from fusion_kernels.ntk.sharing import overlap, repeats_itself
from fusion_kernels.ntk.types import Differentiated
from mlp_fusion.errors import InputError
from mlp_fusion.modules import FusedGLU, FusedMLP


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(w_in: Tensor, w_out: Tensor, **others: Tensor | None) -> FFN:
    return FFN(w_in, w_out, "gelu", **others)  # type: ignore[arg-type]


X, V = randn(4, 5), randn(4, 5, seed=1)
S, C = randn(2, 3, 5, seed=2), randn(2, 3, 5, seed=3)

#: Every public function, of one block.
FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "ntk_gram": lambda b: ntk_gram(b, X),
    "full": lambda b: ntk_gram(b, X, reduce="full"),
    "ntk_vp": lambda b: ntk_vp(b, X, V),
    "trace_ntk_vp": lambda b: trace_ntk_vp(b, X, V),
    "ntk_operator": lambda b: ntk_operator(b, X),
    "jvp": lambda b: jvp(b, X, {"w_in": b.as_bundle().w_in}),
    "vjp": lambda b: vjp(b, X, V),
    "ntk_compare": lambda b: ntk_compare(untied(), b, X, eigenvalues=0),
    "gradient_gram": lambda b: gradient_gram(b, S, C),
    "gradient_norms": lambda b: gradient_norms(b, S, C),
    "gradient_dots": lambda b: gradient_dots(b, S, C, {"w_out": b.as_bundle().w_out}),
}


def untied() -> FFN:
    return plain(randn(1, 6, 5), randn(1, 6, 5, seed=4), b_in=randn(1, 6, seed=5))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_refuses_a_weight_in_two_places(name: str) -> None:
    FUNCTIONS[name](untied())
    w = randn(1, 6, 5)
    with pytest.raises(ValueError, match="w_in and w_out of the block share memory: a tangent kernel takes every part"):
        FUNCTIONS[name](plain(w, w))


def shared() -> Iterator[tuple[str, FFN, str]]:
    w, square = randn(1, 6, 5), randn(6, 6)
    yield "gate is up", plain(w, randn(1, 6, 5, seed=1), w_gate=w), "w_in and w_gate"
    yield "transposed", plain(square[None], square.t()[None]), "w_in and w_out"
    yield "overlapping rows", plain(square[None, :4, :5], square[None, 2:, :5]), "w_in and w_out"
    b = randn(1, 6)
    yield "biases", plain(w, randn(1, 6, 5, seed=1), w_gate=w + 1, b_in=b, b_gate=b), "b_in and b_gate"
    yield "bias and weight", plain(w[..., :5], randn(1, 6, 5, seed=1), b_in=w[..., 0]), "w_in and b_in"
    yield "bias and scale", plain(w, randn(1, 6, 5, seed=1), b_in=b, scale=b), "b_in and scale"
    yield "output bias", plain(w, randn(1, 6, 5, seed=1), b_in=b, b_out=b[:, :5]), "b_in and b_out"
    leaf = randn(1, 6, 5).requires_grad_()
    yield "computed", plain(2 * leaf, leaf.exp()), "w_in and w_out of the block are computed from one parameter"
    yield "expanded", plain(w[:, :1].expand(1, 6, 5), randn(1, 6, 5, seed=1)), "w_in repeats its own memory"


@pytest.mark.parametrize(("block", "message"), [pytest.param(b, m, id=name) for name, b, m in shared()])
def test_any_way_of_sharing_is_refused(block: FFN, message: str) -> None:
    x = randn(3, block.w_in.shape[2])
    with pytest.raises(ValueError, match=message):
        ntk_gram(block, x)
    # By copies it is the block of the same values; without those parts nothing is shared that counts.
    parts = {name: t.detach().clone() for name, t in vars(block).items() if isinstance(t, Tensor)}
    copied = replace(block, **parts)
    assert bool(ntk_gram(copied, x).isfinite().all())


def test_parts_that_are_not_differentiated_by_may_be_shared() -> None:
    w = randn(1, 6, 5)
    gated = plain(w, randn(1, 6, 5, seed=1), w_gate=w)
    expected = plain(w, gated.w_out, w_gate=w.clone())
    assert torch.equal(ntk_gram(gated, X, params="w_out"), ntk_gram(expected, X, params="w_out"))
    with pytest.raises(ValueError, match="w_in and w_gate"):
        ntk_gram(gated, X, params="w_in")
    assert torch.equal(jvp(gated, X, {"w_out": w}), jvp(expected, X, {"w_out": w}))


def test_parts_of_one_storage_that_do_not_overlap_are_no_obstacle() -> None:
    # Gate and up beside each other, and interleaved row by row, as checkpoints and serving engines keep them.
    both = randn(1, 12, 5)
    w_out = randn(1, 6, 5, seed=1)
    for w_gate, w_in in (both.chunk(2, dim=1), (both[:, ::2], both[:, 1::2])):
        block = plain(w_in, w_out, w_gate=w_gate)
        copied = plain(w_in.clone(), w_out, w_gate=w_gate.clone())
        torch.testing.assert_close(ntk_gram(block, X), ntk_gram(copied, X))
    assert not overlap(both[:, ::2], both[:, 1::2])
    assert overlap(both[:, ::2], both[:, 2:3])
    assert not repeats_itself(both[:, ::2].mT)
    assert repeats_itself(torch.zeros(4).as_strided((2, 3), (1, 1)))


def tied_modules() -> Iterator[tuple[str, nn.Module]]:
    plain = FusedMLP.from_mlp(nn.Linear(5, 5), nn.Linear(5, 5))
    plain.fc2.weight = plain.fc1.weight
    yield "same parameter", plain
    viewed = FusedMLP.from_mlp(nn.Linear(5, 6), nn.Linear(6, 5))
    viewed.fc2.weight = nn.Parameter(viewed.fc1.weight.data.t())
    yield "transposed view", viewed
    gated = FusedGLU.from_mlp(nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 5))
    gated.gate.weight = gated.up.weight
    yield "gate is up", gated
    biases = FusedGLU.from_mlp(nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 5))
    biases.gate.bias = biases.up.bias
    yield "one bias", biases


@pytest.mark.parametrize("module", [pytest.param(m, id=name) for name, m in tied_modules()])
def test_fused_modules_with_tied_projections_are_refused(module: Any) -> None:
    with pytest.raises(ValueError, match="share memory"):
        ntk_gram(module, X.float())
    untied_values = module.as_bundle()
    copies = {name: t.clone() for name, t in vars(untied_values).items() if isinstance(t, Tensor)}
    assert ntk_gram(replace(untied_values, **copies), X.float()).shape == (4, 4)


class Copies(nn.Module):
    """A module that gives copies of its weights: where they come from, the tensors do not tell."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)

    def as_bundle(self) -> FFN:
        return plain(self.fc1.weight.detach().clone()[None], self.fc2.weight.detach().t().clone()[None])


def test_a_module_that_gives_copies_of_one_parameter_is_refused() -> None:
    block = Copies()
    ntk_gram(block, X.float())
    block.fc2.weight = block.fc1.weight
    with pytest.raises(ValueError, match=r"fc1\.weight and fc2\.weight of the block are one parameter"):
        ntk_gram(block, X.float())


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("norm", [parametrizations.weight_norm, weight_norm])
def test_weights_that_are_computed_are_refused(norm: Callable[[nn.Module], nn.Module]) -> None:
    block = Copies()
    norm(block.fc1)
    with pytest.raises(ValueError, match=r"fc1\.weight is computed from other parameters"):
        ntk_gram(block, X.float())
    fused = FusedMLP.from_mlp(nn.Linear(5, 6), nn.Linear(6, 5))
    norm(fused.fc1)
    with pytest.raises(InputError, match=r"not a plain torch\.nn\.Linear|is computed from weight_g, weight_v"):
        ntk_gram(fused, X.float())


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_operators_refuse_unknown_names(name: str) -> None:
    w, other, c = randn(6, 5), randn(6, 5, seed=1), randn(2, 3, 5)
    ffn = (*FFN(w, other, "gelu").tensors, 0.0, "gelu", *PLAIN.arguments)

    def of(op: Any) -> Any:
        return next(backend.function for backend in op.backends if backend.name == name)

    with pytest.raises(ValueError, match="unknown kernel 'adam': use one of gd, sign"):
        of(NTK_VP)(X, *ffn, V, ["w_in"], "adam", "full", None, None)
    with pytest.raises(ValueError, match="unknown reduction 'sum': use one of trace, full, vector"):
        of(NTK_VP)(X, *ffn, V, ["w_in"], "gd", "sum", None, None)
    # A product with a part of the kernel that is none: it was computed as the trace's.
    with pytest.raises(ValueError, match="unknown reduction 'diagonal'"):
        of(NTK_VP)(X, *ffn, V, ["w_in"], "gd", "diagonal", None, None)
    with pytest.raises(ValueError, match="reduction 'trace': pass a direction to 'vector' and to no other"):
        of(NTK_VP)(X, *ffn, V, ["w_in"], "gd", "trace", randn(5), None)
    for op in (NTK_GRADIENT_GRAM, NTK_GRADIENT_NORMS):
        with pytest.raises(ValueError, match="unknown form 'gost': use one of auto, ghost, direct"):
            of(op)(c, *ffn, c, ["w_in"], None, "gost")


def test_the_kernel_operator_refuses_unknown_names() -> None:
    ffn = (*FFN(randn(6, 5), randn(6, 5, seed=1), "gelu").tensors, 0.0, "gelu", *PLAIN.arguments)
    op = torch.ops.fusion_kernels.ntk_gram
    for arguments, message in (
        (("adam",), "unknown kernel 'adam'"),
        (("gd", "sum"), "unknown reduction 'sum'"),
        (("gd", "vector"), "pass a direction to 'vector'"),
        (("gd", "trace", None, None, "half"), "unknown precision 'half'"),
    ):
        with pytest.raises(ValueError, match=message):
            op(X, None, *ffn, ["w_in"], *arguments)


@pytest.mark.parametrize("names", ["KERNELS", "REDUCTIONS", "VIAS"])
def test_a_new_name_is_computed_as_no_other(names: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that callers may give and a backend has not heard of: every backend of every operator refuses it."""
    for module in (types, torch_backend, reference, cpu_backend, cuda_backend):
        if hasattr(module, names):
            monkeypatch.setattr(module, names, (*getattr(module, names), "new"))
    ffn, c = FFN(randn(6, 5), randn(6, 5, seed=1), "gelu"), randn(2, 3, 5)
    blocks = (*ffn.tensors, 0.0, "gelu", *PLAIN.arguments)
    kernel, reduce = ("new", "trace") if names == "KERNELS" else ("gd", "new")
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
    if names == "VIAS":
        for op in (NTK_GRADIENT_GRAM, NTK_GRADIENT_NORMS):
            calls += [(backend.function, (c, *blocks, c, ["w_in"], None, "new")) for backend in op.backends]
    else:
        calls += [(b.function, (X, *blocks, V, ["w_in"], kernel, reduce, None, None)) for b in NTK_VP.backends]
        for module in (cpu_backend, cuda_backend, reference):
            calls.append((module.ntk_gram, (X, None, ffn, ["w_in"], kernel, reduce)))
    if names == "KERNELS":
        block = Differentiated(ffn, ["w_in"], None)
        for module in (cpu_backend, cuda_backend, reference):
            calls.append((module.ntk_sums, (X, None, block, block, "new")))
    for function, arguments in calls:
        with pytest.raises(ValueError, match=r"unknown .* 'new': use one of"):
            function(*arguments)
