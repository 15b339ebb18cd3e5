"""The divergence of attention maps, against its formula in float64, and what waits for its backward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from mlp_fusion.finetuning.attention_divergence import Scores, attention_divergence


def scores(batch: int, heads: int, tokens: int, size: int, seed: int, mask: Tensor | None = None) -> Scores:
    """Random ones whose queries and keys learn."""
    generator = torch.Generator().manual_seed(seed)
    query, key = (
        torch.randn(batch, heads, tokens, size, generator=generator, dtype=torch.float64).requires_grad_()
        for _ in range(2)
    )
    return Scores(query, key, 0.3 + 0.4 * seed, mask)


def maps(of: Scores) -> Tensor:
    """Attention probabilities, all at once."""
    found = of.scaling * torch.einsum("bhid,bhjd->bhij", of.query, of.key)
    if of.mask is not None:
        found = found.masked_fill(~of.mask, -1e30) if of.mask.dtype == torch.bool else found + of.mask
    return torch.softmax(found, dim=-1)


def formula(student: Scores, teacher: Scores, rows: Tensor | None = None) -> Tensor:
    """Written out, by the eager maps."""
    p, q = maps(teacher).detach(), maps(student)
    lost = p * (p.clamp_min(1e-300).log() - q.clamp_min(1e-300).log())
    return lost.mean() if rows is None else lost.transpose(1, 2)[rows].mean()


def padding(batch: int, tokens: int, kept: tuple[int, ...]) -> Tensor:
    """`(batch, tokens)`, True for the first `kept` of each row."""
    return torch.arange(tokens) < torch.tensor(kept).reshape(batch, 1)


CASES: dict[str, tuple[tuple[int, int, int], tuple[int, ...] | None]] = {
    "plain": ((3, 4, 5), None),
    "padded": ((3, 4, 5), (5, 2, 3)),
    "one token": ((2, 3, 1), None),
    "one head of one row": ((1, 1, 7), (4,)),
    "a row without a token": ((2, 2, 4), (4, 0)),
}


def case(name: str) -> tuple[Scores, Scores, Tensor | None]:
    (batch, heads, tokens), kept = CASES[name]
    rows = None if kept is None else padding(batch, tokens, kept)
    mask = None if rows is None else rows[:, None, None, :].expand(batch, 1, tokens, tokens)
    return scores(batch, heads, tokens, 6, 0, mask), scores(batch, heads, tokens, 4, 1, mask), rows


@pytest.mark.parametrize("entries", [1, 50, 75, 130, 10**6])
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_formula_in_parts_of_any_size(name: str, entries: int) -> None:
    student, teacher, rows = case(name)
    found = attention_divergence(student, teacher, rows, entries=entries)
    expected = formula(student, teacher, rows)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    ours, theirs = (torch.autograd.grad(3.0 * z, (student.query, student.key)) for z in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)
    assert teacher.query.grad is None


@pytest.mark.parametrize("name", ["one head of one row", "a row without a token"])
def test_gradients_are_those_of_differences(name: str) -> None:
    student, teacher, rows = case(name)

    def divergence(query: Tensor, key: Tensor) -> Tensor:
        return attention_divergence(dataclasses.replace(student, query=query, key=key), teacher, rows, entries=60)

    assert torch.autograd.gradcheck(divergence, (student.query, student.key))


def test_a_mask_may_be_added_and_may_differ_by_head() -> None:
    student, teacher, _ = case("plain")
    generator = torch.Generator().manual_seed(2)
    allowed = torch.rand(3, 4, 5, 5, generator=generator) < 0.7
    allowed |= torch.eye(5, dtype=torch.bool)
    added = torch.zeros(3, 4, 5, 5, dtype=torch.float64).masked_fill(~allowed, -torch.inf)
    expected = formula(*(dataclasses.replace(z, mask=allowed) for z in (student, teacher)))
    for mask in (allowed, added):
        for entries in (30, 10**6):
            pair = [dataclasses.replace(z, mask=mask) for z in (student, teacher)]
            torch.testing.assert_close(attention_divergence(*pair, entries=entries), expected, rtol=1e-12, atol=0.0)


def test_alike_models_do_not_diverge_and_nothing_is_kept_of_no_rows() -> None:
    student, _, _ = case("plain")
    same = attention_divergence(student, student)
    assert float(same.detach()) == 0.0
    assert all(float(g.abs().max()) < 1e-17 for g in torch.autograd.grad(same, (student.query, student.key)))
    none = attention_divergence(*case("plain")[:2], torch.zeros(3, 5, dtype=torch.bool))
    assert float(none.detach()) == 0.0


def test_narrow_dtypes_are_computed_in_float32() -> None:
    """Under autocast, too."""
    student, teacher, rows = case("padded")
    for dtype in (torch.bfloat16, torch.float16):
        half = [
            dataclasses.replace(
                z, query=z.query.detach().to(dtype).requires_grad_(), key=z.key.detach().to(dtype).requires_grad_()
            )
            for z in (student, teacher)
        ]
        exact = [
            dataclasses.replace(
                z, query=z.query.detach().double().requires_grad_(), key=z.key.detach().double().requires_grad_()
            )
            for z in half
        ]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = attention_divergence(*half, rows, entries=75)
        assert found.dtype == torch.float32
        expected = formula(*exact, rows)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
        scale = 2.0**16
        ours = torch.autograd.grad(scale * found, (half[0].query, half[0].key))
        theirs = torch.autograd.grad(scale * expected, (exact[0].query, exact[0].key))
        for one, other in zip(ours, theirs, strict=True):
            assert one.dtype == dtype
            # Rounded twice: where it waits, and at the end.
            bound = 4 * torch.finfo(dtype).eps * float(other.abs().max())
            torch.testing.assert_close(one.double(), other, rtol=0.0, atol=bound)


def test_what_waits_in_halves_is_not_yet_a_mean() -> None:
    """Entries of the mean's gradient lie below what float16 holds, until a scaled loss lifts them."""
    exact = [scores(8, 1, 512, 4, seed) for seed in (0, 1)]
    half = [Scores(z.query.detach().half().requires_grad_(), z.key.detach().half(), z.scaling) for z in exact]
    (wanted,) = torch.autograd.grad(2.0**16 * formula(*exact), exact[0].query)
    assert float(wanted.abs().mean()) / 2.0**16 < 2.0**-24
    (found,) = torch.autograd.grad(2.0**16 * attention_divergence(*half), half[0].query)
    torch.testing.assert_close(found.double(), wanted, rtol=0.0, atol=0.05 * float(wanted.abs().mean()))


def kept(compute: Callable[[], Tensor]) -> int:
    """Bytes that a computation saves for its backward pass."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = compute()
    assert result.requires_grad
    return sum(sizes.values())


def test_nothing_of_the_size_of_a_map_waits_for_the_backward_pass() -> None:
    batch, heads, tokens, size = 2, 3, 64, 4
    student, teacher = (scores(batch, heads, tokens, size, seed) for seed in (0, 1))
    head, one_map = 8 * batch * heads * tokens * size, 8 * batch * heads * tokens * tokens
    assert kept(lambda: attention_divergence(student, teacher)) == 2 * head + 8
    assert kept(lambda: formula(student, teacher)) > 3 * one_map


def test_without_gradients_none_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, rows = case("padded")
    still = dataclasses.replace(student, query=student.query.detach(), key=student.key.detach())
    with monkeypatch.context() as patch:
        patch.delattr(torch, "zeros_like")
        found = attention_divergence(still, teacher, rows)
    assert not found.requires_grad
    torch.testing.assert_close(found, formula(student, teacher, rows).detach(), rtol=1e-12, atol=0.0)


def test_it_is_differentiated_once() -> None:
    student, teacher, _ = case("plain")
    with pytest.raises(RuntimeError, match="differentiated once: leave out create_graph"):
        torch.autograd.grad(attention_divergence(student, teacher), student.query, create_graph=True)


def test_other_shapes_are_refused() -> None:
    student: Any = scores(2, 3, 4, 5, 0)
    for other in (scores(2, 2, 4, 5, 1), scores(2, 3, 5, 5, 1), scores(1, 3, 4, 5, 1)):
        with pytest.raises(ValueError, match="queries and keys of"):
            attention_divergence(student, other)
