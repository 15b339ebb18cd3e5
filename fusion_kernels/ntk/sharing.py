"""Whether one parameter has several places in a block: the closed forms take every part for a parameter of its own."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized


def check_untied(block: object, tensors: Mapping[str, Tensor], parts: Collection[str]) -> None:
    """Refuse a block in which a part to differentiate by is, wholly or in part, also something else.

    Args:
        block: what the tensors are of; where it is a module, its parameters are looked at too.
        tensors: name -> tensor of the block, as it gives them.
        parts: of these names, what to differentiate by.

    Raises:
        ValueError: two tensors share memory or were computed from one parameter, one repeats its own memory, or the
            module has a parameter in two places or a weight that is computed from other parameters.
    """
    remedy = "a tangent kernel takes every part for a parameter of its own: give a block of copies, or other params"
    for name in parts:
        if repeats_itself(tensors[name]):
            raise ValueError(f"{name} repeats its own memory (strides {tensors[name].stride()}): {remedy}")
    origins = {name: set(_leaves(t)) for name, t in tensors.items()}
    for one, other in combinations(tensors, 2):
        if one not in parts and other not in parts:
            continue
        if overlap(tensors[one], tensors[other]):
            raise ValueError(f"{one} and {other} of the block share memory: {remedy}")
        if origins[one] & origins[other]:
            raise ValueError(f"{one} and {other} of the block are computed from one parameter: {remedy}")
    if isinstance(block, nn.Module):
        _check_module(block, tensors, remedy)


def _check_module(block: nn.Module, tensors: Mapping[str, Tensor], remedy: str) -> None:
    """Raise ValueError where tensors of the module are computed ones, of which its parameters cannot be told."""
    for name, module in block.named_modules():
        computed = next(_computed(module), None)
        if computed is not None:
            raise ValueError(f"{f'{name}.{computed}'.lstrip('.')} is computed from other parameters: {remedy}")
    places: dict[int, str] = {}
    for name, parameter in block.named_parameters(remove_duplicate=False):
        first = places.setdefault(id(parameter), name)
        if first != name and not any(same_storage(parameter, t) for t in tensors.values()):
            raise ValueError(f"{first} and {name} of the block are one parameter: {remedy}")


def _computed(module: nn.Module) -> Iterator[str]:
    """Names of tensors of a module that a parametrization, a weight norm or pruning computes when they are used."""
    if is_parametrized(module):
        yield from module.parametrizations  # type: ignore[misc]
    for name in module._parameters:
        stem = name.rpartition("_")[0]
        if isinstance(module.__dict__.get(stem), Tensor):
            yield stem


def _leaves(t: Tensor) -> Iterator[int]:
    """Ids of the parameters that a tensor was computed from."""
    waiting, seen = [t.grad_fn], set()
    if t.grad_fn is None and t.requires_grad:
        yield id(t)
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            yield id(variable)
        waiting += [following for following, _ in node.next_functions]


def same_storage(a: Tensor, b: Tensor) -> bool:
    """Whether both are views of one storage."""
    if a.layout != torch.strided or b.layout != torch.strided:
        return False
    return a.device == b.device and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() != 0


def _span(t: Tensor) -> tuple[int, int]:
    """The first byte of the storage that a tensor uses, and the one behind the last."""
    size = t.element_size()
    first = int(t.storage_offset())
    last = first + sum((n - 1) * int(stride) for n, stride in zip(t.shape, t.stride(), strict=True))
    return first * size, (last + 1) * size


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have an element in common; interleaved ones have none."""
    if not a.numel() or not b.numel() or not same_storage(a, b):
        return False
    (a_first, a_end), (b_first, b_end) = _span(a), _span(b)
    if a_end <= b_first or b_end <= a_first:
        return False
    if a.element_size() != b.element_size():
        return True
    # Marks on the elements that lie between: only where storages are shared, and then a byte for each.
    marks = torch.zeros(max(a_end, b_end) // a.element_size(), dtype=torch.bool)
    marks.as_strided(a.shape, a.stride(), a.storage_offset()).fill_(True)
    return bool(marks.as_strided(b.shape, b.stride(), b.storage_offset()).any())


def repeats_itself(t: Tensor) -> bool:
    """Whether several elements of a tensor are one in memory, as those of an expanded one are."""
    if t.layout != torch.strided or t.numel() < 2:
        return False
    # Rows of different lengths first: each must step over all that lies within it.
    axes = sorted((stride, n) for n, stride in zip(t.shape, t.stride(), strict=True) if n > 1)
    reach = 0
    for stride, n in axes:
        if stride <= reach:
            return True
        reach += stride * (n - 1)
    return False
