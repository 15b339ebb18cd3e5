"""How much an error of a feed-forward layer's (FFN's) outputs does to the model's last hidden states.

Not every direction of an FFN's outputs matters alike: later layers amplify some, and normalise others away. To first
order, an error e of the outputs at one token changes the last hidden states h of all tokens by

    sum over tokens s of |J_s e|^2 = e^T M e,        M = sum_s J_s^T J_s,        J_s = d h_s / d y

and M, averaged over tokens, needs no Jacobian: with u standard normal, g the gradient of <u, h> with respect to y has
E[g g^T] = M. One backward pass serves all FFNs.

Source: random probes as in Hutchinson's trace estimator (1990); the same mean of outer products of gradients is the
output factor of K-FAC (Martens & Grosse 2015), there of the training loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mlp_fusion.architectures import Architecture, FFNSite
from mlp_fusion.errors import InputError
from mlp_fusion.measure.activations import Batch, evaluating, token_mask

#: Tokens that gradients are taken at, positions of one run at most, and of one sequence.
_TOKENS, _RUN, _SEQUENCE = 4096, 1024, 512
#: Share of the identity: directions in which the few probes say next to nothing must not be free.
_IDENTITY = 0.1


def output_sensitivities(
    model: nn.Module,
    architecture: Architecture,
    sites: Sequence[FFNSite],
    batches: Sequence[Batch],
    *,
    seed: int,
) -> list[Tensor]:
    """Per FFN in `sites`, L with `|e L|^2` what an error e of its outputs does to the last hidden states, in the mean.

    M is scaled to a mean eigenvalue of 1 and mixed with a tenth of the identity. About 4,096 tokens are looked at,
    from batches spread evenly over those given; long sequences count with their first 512.

    Memory: the activations of a forward pass over at most 1,024 positions, and `12 d_out^2` bytes per FFN. Time: a
    forward and a backward pass over those tokens. The model's parameters are not touched and get no gradients.

    Returns:
        `(d_out, d_out)` float32 each, lower triangular with `L L^T = M`, on the model's device.

    Raises:
        InputError: the model cannot run on a batch, cannot be differentiated, or its gradients are not finite.
    """
    outputs: list[list[Tensor]] = [[] for _ in sites]
    sums: list[Tensor | None] = [None] * len(sites)
    generator = torch.Generator().manual_seed(seed)
    base: Any = getattr(model, "base_model", model)
    device = next(model.parameters()).device
    with evaluating(model), _frozen(model), _caught(architecture, sites, outputs), torch.enable_grad():
        for batch in _probes(batches, chunk=getattr(model.config, "chunk_size_feed_forward", 0) or 1):
            try:
                hidden = base(**{k: v.to(device) for k, v in batch.items()}).last_hidden_state
                mask = token_mask(batch).to(device)
                probe = torch.randn(hidden.shape, generator=generator).to(hidden) * mask.unsqueeze(-1)
                gradients = iter(torch.autograd.grad((hidden * probe).sum(), [y for ys in outputs for y in ys]))
            except (ValueError, IndexError, TypeError, RuntimeError) as error:
                reason = " ".join(str(error).split())[:200]
                raise InputError(
                    f"tuning needs gradients through the model, which fails ({type(error).__name__}: {reason})"
                ) from error
            for number, ys in enumerate(outputs):
                # In chunks along the sequence, where the FFN runs in chunks.
                parts = [next(gradients).float().reshape(len(mask), -1, y.shape[-1]) for y in ys]
                rows = torch.cat(parts, dim=1)[mask]
                product = (rows.T @ rows).double()
                known = sums[number]
                sums[number] = product if known is None else known.add_(product)
                ys.clear()
    if any(total is None for total in sums):
        raise InputError("an FFN did not run on the calibration text: the model skips it")
    return [_factor(total) for total in sums if total is not None]


def _factor(total: Tensor) -> Tensor:
    """`L` of the sum of outer products; of the identity where that is 0."""
    size = total.diagonal().mean()
    if not bool(size.isfinite()):
        raise InputError(f"gradients through the model overflow {total.dtype}: load it in float32 or bfloat16 to tune")
    identity = torch.eye(len(total), dtype=total.dtype, device=total.device)
    mixed = identity if float(size) == 0.0 else total * ((1.0 - _IDENTITY) / size) + _IDENTITY * identity
    return torch.linalg.cholesky(mixed).float()


def _probes(batches: Sequence[Batch], chunk: int) -> Iterator[dict[str, Tensor]]:
    """Parts of the batches, at most 1,024 positions each where a sequence allows, with about 4,096 tokens in all."""
    tokens = sum(int(token_mask(batch).sum()) for batch in batches)
    size = _SEQUENCE - _SEQUENCE % chunk if chunk <= _SEQUENCE else chunk
    left = _TOKENS
    for batch in batches[:: -(-tokens // _TOKENS)]:
        length = batch["input_ids"].shape[-1]
        sequences = max(1, _RUN // min(length, size))
        for first in range(0, len(batch["input_ids"]), sequences):
            part = {k: v[first : first + sequences] for k, v in batch.items()}
            mask = token_mask(part)
            if length > size:
                # Where padding comes first, from the first token on.
                start = min(int(mask.any(dim=0).int().argmax()), length - size)
                part = {k: v[:, start : start + size] for k, v in part.items()}
                mask = token_mask(part)
            if left <= 0:
                return
            left -= int(mask.sum())
            yield part


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for gradients inside: autograd then keeps only what those of the outputs need."""
    asking = [p for p in model.parameters() if p.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_()


@contextmanager
def _caught(architecture: Architecture, sites: Sequence[FFNSite], outputs: list[list[Tensor]]) -> Iterator[None]:
    """Inside, `outputs` gets what every FFN puts out, with a place in the graph."""

    def catch(into: list[Tensor]) -> Any:
        def hook(_module: nn.Module, _args: tuple[Any, ...], y: Tensor) -> Tensor:
            into.append(y if y.requires_grad else y.detach().requires_grad_())
            return into[-1]

        return hook

    handles = [
        architecture.projection(site, "w_out").register_forward_hook(catch(into))
        for site, into in zip(sites, outputs, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
