"""Experts dropped from Mixture-of-Experts models, for comparison: by REAP's score, and MoNE's constants in their place.

REAP (Cerebras, arXiv 2510.13999) drops the experts whose outputs, weighed by the router, are the smallest over the
tokens that reach them. MoNE (arXiv 2507.00390) puts the mean of its outputs in the place of an expert that is rarely
used or whose outputs vary little. Both work on blocks as those of Mixtral and Qwen3-MoE, whose experts are stacked, and
as those of Switch Transformers, whose experts are modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: Names under which configs state how many experts there are.
EXPERT_KEYS = ("num_local_experts", "num_experts")


@dataclass
class ExpertStatistics:
    """What the experts of one block do with the tokens that reach them.

    Attributes:
        tokens: how many reach each expert, `[E]`.
        saliency: REAP's: mean over them of the router's weight times the norm of the output, `[E]`; 0 for no tokens.
        mean: of the outputs, not weighed, `[E, D]`.
        deviation: root of the outputs' total variance, `[E]`.
    """

    tokens: Tensor
    saliency: Tensor
    mean: Tensor
    deviation: Tensor

    @property
    def redundancy(self) -> Tensor:
        """MoNE's score: how often an expert is used, times how much its outputs vary."""
        return self.tokens / self.tokens.sum() * self.deviation


def moe_blocks(model: nn.Module) -> list[Any]:
    """The blocks of a router and experts, in the order of the model."""
    return [module for module in model.modules() if hasattr(module, "experts") and router_of(module) is not None]


def router_of(block: Any) -> Any:
    """The router of a block; None for what is no block."""
    return getattr(block, "gate", getattr(block, "router", None))


def is_stacked(experts: Any) -> bool:
    """Whether the experts are slices of tensors, rather than modules."""
    return not isinstance(experts, nn.ModuleDict)


def routing(experts: Any, hidden: Tensor, selected: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens reach which expert and with what weight, both `[N, E]`, of what `experts` is called with.

    Stacked experts are given indices `[N, k]`, modules a mask `[N, 1, E]`.
    """
    if not is_stacked(experts):
        mask = selected[:, 0].bool()
        return mask, mask * weights
    mask = torch.zeros(len(hidden), experts.num_experts, dtype=torch.bool).scatter_(1, selected, True)
    return mask, torch.zeros(mask.shape, dtype=weights.dtype).scatter_(1, selected, weights)


def expert_output(experts: Any, index: int, hidden: Tensor) -> Tensor:
    """What one expert makes of `hidden`, `[N, D]`, before the router weighs it."""
    if not is_stacked(experts):
        return experts[f"expert_{index}"](hidden)
    return experts(hidden, torch.full((len(hidden), 1), index), hidden.new_ones(len(hidden), 1))


@torch.no_grad()
def expert_statistics(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> list[ExpertStatistics]:
    """Run the model over `batches`, which hold no padding, and gather what its experts do, block by block."""
    blocks = moe_blocks(model)
    sums: list[list[Tensor]] = [[] for _ in blocks]
    handles = []
    busy = False

    def gather(place: int, experts: Any, arguments: tuple[Tensor, Tensor, Tensor]) -> None:
        nonlocal busy
        if busy:  # Stacked experts are called again for one expert's outputs.
            return
        busy = True
        hidden = arguments[0]
        mask, weights = routing(experts, *arguments)
        found = []
        for index in range(mask.shape[1]):
            chosen = mask[:, index]
            out = expert_output(experts, index, hidden[chosen]).double() if chosen.any() else hidden[:0].double()
            norms = out.norm(dim=1)
            weighed = (weights[chosen, index].double() * norms).sum()
            found.append(torch.cat([torch.stack([chosen.sum().double(), weighed, (norms**2).sum()]), out.sum(0)]))
        sums[place].append(torch.stack(found))
        busy = False

    for place, block in enumerate(blocks):
        hook = lambda module, arguments, place=place: gather(place, module, arguments)  # noqa: E731
        handles.append(block.experts.register_forward_pre_hook(hook))
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            model(**batch)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return [_statistics(torch.stack(parts).sum(0)) for parts in sums]


def _statistics(total: Tensor) -> ExpertStatistics:
    tokens, weighed, squares = total[:, :3].unbind(1)
    count = tokens.clamp(min=1)
    mean = total[:, 3:] / count.unsqueeze(1)
    variance = (squares - count * (mean**2).sum(1)).clamp(min=0) / (tokens - 1).clamp(min=1)
    return ExpertStatistics(tokens, weighed / count, mean, variance.sqrt())


def highest(scores: Tensor, count: int) -> list[int]:
    """The indices of the `count` highest scores, ascending."""
    return sorted(scores.topk(count).indices.tolist())


@torch.no_grad()
def drop_experts(model: Any, kept: Sequence[Sequence[int]]) -> None:
    """Leave only the experts `kept`, as many in each block, and their rows of the routers, as REAP does."""
    for block, indices in zip(moe_blocks(model), kept, strict=True):
        router = router_of(block)
        _keep(block.experts, indices)
        holder = router if isinstance(getattr(router, "weight", None), nn.Parameter) else router.classifier
        for name in ("weight", "bias"):
            if getattr(holder, name, None) is not None:
                setattr(holder, name, nn.Parameter(getattr(holder, name)[list(indices)].clone()))
        router.num_experts = len(indices)
        for module in (router, block):
            if hasattr(module, "top_k"):
                module.top_k = min(module.top_k, len(indices))
    # The loss that balances experts counts them by what the model and its config say.
    for owner in (model, model.config):
        for key in EXPERT_KEYS:
            if hasattr(owner, key):
                setattr(owner, key, len(kept[0]))
        if hasattr(owner, "num_experts_per_tok"):
            owner.num_experts_per_tok = min(owner.num_experts_per_tok, len(kept[0]))


def _keep(experts: Any, kept: Sequence[int]) -> None:
    """Leave only these experts, in this order."""
    if is_stacked(experts):
        for name, weight in list(experts.named_parameters(recurse=False)):
            setattr(experts, name, nn.Parameter(weight[list(kept)].clone()))
    else:
        modules = [experts[f"expert_{index}"] for index in kept]
        experts.clear()
        experts.update({f"expert_{place}": module for place, module in enumerate(modules)})
    experts.num_experts = len(kept)


class ConstantExperts(nn.Module):
    """Experts of which some answer with a constant; the router stays as it is.

    Args:
        experts: of a block; only those kept stay in it.
        kept: which ones.
        means: outputs of all experts, `[E, D]`, from which the others take their constants.
    """

    def __init__(self, experts: Any, kept: Sequence[int], means: Tensor) -> None:
        super().__init__()
        dropped = [index for index in range(len(means)) if index not in kept]
        place = torch.zeros(len(means), dtype=torch.long)
        place[list(kept)] = torch.arange(len(kept))
        self.kept, self.dropped, self.stacked = list(kept), dropped, is_stacked(experts)
        self.num_experts = len(means)
        _keep(experts, kept)
        self.experts = experts
        self.constants = nn.Parameter(means[dropped].to(next(experts.parameters()).dtype).clone())
        self.register_buffer("place", place, persistent=False)

    def forward(self, hidden: Tensor, selected: Tensor, weights: Tensor) -> Tensor:
        if not self.stacked:
            mask = selected[:, 0].to(weights.dtype)
            y = self.experts(hidden, selected[..., self.kept], weights)
            return y + (mask[:, self.dropped] * weights) @ self.constants
        dense = torch.zeros(len(hidden), self.num_experts, dtype=weights.dtype).scatter(1, selected, weights)
        is_kept = torch.isin(selected, torch.tensor(self.kept))
        # A constant's place is that of some expert, with a weight of nothing.
        y = self.experts(hidden, self.place[selected], weights * is_kept)
        return y + dense[:, self.dropped] @ self.constants


@torch.no_grad()
def constant_experts(model: Any, kept: Sequence[Sequence[int]], statistics: Sequence[ExpertStatistics]) -> None:
    """Put the mean of its outputs in the place of every expert that is not `kept`, as MoNE does."""
    for block, indices, known in zip(moe_blocks(model), kept, statistics, strict=True):
        block.experts = ConstantExperts(block.experts, indices, known.mean)
