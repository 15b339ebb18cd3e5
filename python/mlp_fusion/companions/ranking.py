"""Which values of a model PaFi trains: those of the smallest scores, over all tensors at once or in each by itself."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from mlp_fusion.errors import InputError
from mlp_fusion.modules import Scaled

#: How the tensors are ranked, and by what.
RANKINGS, CRITERIA = ("global", "matrix"), ("magnitude", "fisher")
#: float32 numbers that are not negative are ordered as their bits are; these are looked at in two halves.
_HALF = 16
_BUCKETS = 1 << _HALF


@dataclass(frozen=True, eq=False)
class Candidate:
    """A tensor that values may be chosen of.

    Attributes:
        module: name of the module that owns it.
        own: its name there.
        tensor: itself.
        offset: values of the parameters before it in its module.
        padding: of embeddings, the row that no gradient reaches; None where there is none.
    """

    module: str
    own: str
    tensor: Tensor
    offset: int = 0
    padding: int | None = None

    @property
    def name(self) -> str:
        return f"{self.module}.{self.own}"

    def eligible(self) -> Tensor:
        """Flat bool: which values may be chosen. Exact zeros are not: they are what masks and padding leave."""
        found = self.tensor.detach() != 0
        if self.padding is not None:
            found[self.padding] = False
        return found.flatten()


def candidates(model: nn.Module, config: Any, wanted: Callable[[str], bool]) -> list[Candidate]:
    """The tensors that a `PafiConfig` lets values be chosen of, in the order of the model's modules.

    Tensors that several modules share are left out: they cannot be changed in one of them alone.

    Raises:
        InputError: there is none, one is not in memory, or embeddings are asked for that the output layer shares.
    """
    tables = {id(m.weight): name for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    owners: dict[int, int] = {}
    for _, module in modules_of(model):
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    found = []
    for name, module in modules_of(model):
        if not name or not wanted(name):
            continue
        end = 0
        for own, parameter in module.named_parameters(recurse=False):
            offset, end = end, end + parameter.numel()
            table = id(parameter) in tables
            if not (config.embeddings if table else _asked_for(module, own, parameter, config)):
                continue
            if owners[id(parameter)] > 1:
                if table:
                    raise InputError(f"{name}.{own} is shared with the output layer: choose without embeddings")
                continue
            if parameter.is_meta:
                raise InputError(f"{name}.{own} is on the meta device (offloaded): load the model into memory first")
            padding = getattr(module, "padding_idx", None) if table else None
            found.append(Candidate(name, own, parameter, offset, padding))
    if not found:
        raise InputError("none of the modules has parameters to choose from: see target_modules, biases and norms")
    return found


def modules_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules by name, what an adapter wraps under the name of the whole; without what trains whole."""
    skipped: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(skipped or "\0"):
            continue
        if isinstance(module, AuxiliaryTrainingWrapper):
            skipped += (f"{name}.",)
        elif isinstance(module, BaseTunerLayer):
            skipped += (f"{name}.",)
            yield name, module.get_base_layer()
        else:
            yield name, module


def _asked_for(module: nn.Module, own: str, parameter: Tensor, config: Any) -> bool:
    if isinstance(module, Scaled) and own == "scale":
        return False  # it belongs to the fusion, and has a form of its own on disk
    if "norm" in type(module).__name__.lower():
        return bool(config.norms)
    return bool(config.biases) if parameter.ndim == 1 else True


def base_hash(found: Sequence[Candidate]) -> str:
    """Of the names and very bits of the tensors: a rule chooses the same values of these alone."""
    digest = hashlib.blake2b(digest_size=16)
    for candidate in found:
        tensor = candidate.tensor.detach().cpu().contiguous()
        digest.update(f"{candidate.name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def choose(
    found: Sequence[Candidate], budget: int | float, ranking: str, scores: Mapping[str, Tensor] | None = None
) -> list[Tensor]:
    """Flat int64 indices, ascending, of the values to train of every candidate.

    Args:
        found: the candidates.
        budget: how many values, or which share of all of them.
        ranking: `global` (the smallest scores of all) or `matrix` (the smallest of each tensor, in proportion).
        scores: name of a candidate -> its scores; None for magnitudes.

    Raises:
        InputError: the budget is more than there is to choose, or chooses nothing.
    """
    total, eligible = sum(c.tensor.numel() for c in found), [c.eligible() for c in found]
    there = sum(int(e.sum()) for e in eligible)
    count = budget if isinstance(budget, int) else int(budget * total)
    if count > there:
        raise InputError(f"budget {budget} is {count:,} values, the chosen tensors have {there:,}: lower it")

    def score(number: int) -> Tensor:
        c = found[number]
        return (c.tensor.detach().abs() if scores is None else scores[c.name]).float().flatten()

    if ranking == "matrix":
        shares = _shares([c.tensor.numel() for c in found], budget)
        picked = []
        for number, (k, may) in enumerate(zip(shares, eligible, strict=True)):
            own = score(number).masked_fill(~may, torch.inf)
            picked.append(own.topk(min(k, int(may.sum())), largest=False).indices.sort().values)
    else:
        picked = _smallest(score, eligible, count)
    if not any(len(indices) for indices in picked):
        raise InputError(f"budget {budget} of {total:,} values chooses none: raise it")
    return picked


def _shares(sizes: Sequence[int], budget: int | float) -> list[int]:
    """How many values of each tensor: the same share of each, and of a count what is left to the largest remainders."""
    if not isinstance(budget, int):
        return [int(budget * n) for n in sizes]
    exact = [budget * n / sum(sizes) for n in sizes]
    shares = [math.floor(x) for x in exact]
    order = sorted(range(len(sizes)), key=lambda i: shares[i] - exact[i])
    for i in order[: budget - sum(shares)]:
        shares[i] += 1
    return shares


def _smallest(score: Callable[[int], Tensor], eligible: Sequence[Tensor], count: int) -> list[Tensor]:
    """Indices of the `count` smallest scores of all; of equals the first, in the order of tensors.

    One tensor's scores at a time are in memory: the bits of the largest that is chosen are found by counting.
    """

    def bits(i: int) -> Tensor:
        return score(i)[eligible[i]].view(torch.int32)

    every = range(len(eligible))
    high, below = _bucket((bits(i) >> _HALF for i in every), count)
    halves = ((own & (_BUCKETS - 1))[own >> _HALF == high] for own in map(bits, every))
    low, smaller = _bucket(halves, count - below)
    threshold, ties = (high << _HALF) | low, count - below - smaller
    picked = []
    for i, may in enumerate(eligible):
        own = bits(i)
        equal = (own == threshold).nonzero().squeeze(1)[:ties]
        ties -= len(equal)
        chosen = torch.cat([(own < threshold).nonzero().squeeze(1), equal])
        picked.append(may.nonzero().squeeze(1)[chosen].sort().values)
    return picked


def _bucket(parts: Iterable[Tensor], count: int) -> tuple[int, int]:
    """Of integers in [0, 2^16), the one that is in place `count` of their order, and how many are smaller."""
    counts = torch.zeros(_BUCKETS, dtype=torch.int64)
    for part in parts:
        counts += part.bincount(minlength=_BUCKETS).cpu()
    up_to = counts.cumsum(0)
    bucket = int(torch.searchsorted(up_to, max(count, 1)).clamp(max=_BUCKETS - 1))
    return bucket, int(up_to[bucket] - counts[bucket])
