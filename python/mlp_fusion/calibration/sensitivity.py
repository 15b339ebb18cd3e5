"""How much an error of a feed-forward layer's (FFN's) outputs does to what the model puts out.

Not every direction of an FFN's outputs matters alike: later layers amplify some, and normalise others away. To first
order, an error e of the outputs at one token changes the last hidden states h of all tokens by

    sum over tokens s of |J_s e|^2 = e^T M e,        M = sum_s J_s^T J_s,        J_s = d h_s / d y

and M, averaged over tokens, needs no Jacobian: with u standard normal, g the gradient of <u, h> with respect to y has
E[g g^T] = M. One backward pass serves all FFNs.

Of a language model whose logits are W h, changes count by what they do to its predictions p: the Kullback-Leibler
divergence from p is, to second order, half of e^T (sum_s J_s^T W^T (diag p - p p^T) W J_s) e. Its u is W^T (p - i) with
i one of the tokens, drawn by p.

Source: random probes as in Hutchinson's trace estimator (1990); the mean of outer products of gradients under labels
that the model draws is the output factor of K-FAC (Martens & Grosse 2015).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mlp_fusion.calibration.statistics import take_calibration
from mlp_fusion.errors import InputError, SkippableError, named
from mlp_fusion.families import Architecture, FFNSite
from mlp_fusion.running.batches import Batch, token_mask
from mlp_fusion.running.excerpts import cuttable, excerpts, window_of
from mlp_fusion.running.positions import by_sequence
from mlp_fusion.running.runner import Runner, not_finite
from mlp_fusion.running.taps import channels_last

#: Positions that gradients are taken at: those of `excerpts(model, calibration, SENSED_TOKENS)`.
SENSED_TOKENS = 4096
#: Tokens whose predictions are held at a time.
_LOGITS = 256
_WITHOUT = "use a method that asks for none, such as fusion, without tune_steps and width auto"
#: Share of the identity: directions in which the few probes say next to nothing must not be free.
_IDENTITY = 0.1


@dataclass(frozen=True, eq=False)
class OutputSensitivity:
    """What errors of an FFN's outputs do to the model.

    Attributes:
        factor: `(d_out, d_out)` float32, lower triangular, L with `L L^T = M`, scaled to a mean eigenvalue of 1 and
            mixed with a tenth of the identity; on the device of the FFN. `|e L|^2` is what an error does in the mean.
        sizes: `(T,)` float32, root mean squares of the gradients at the tokens that were looked at, in order: `|s e
            L|^2` is, about, what an error does at one of them. They are estimates, from one probe.
    """

    factor: Tensor
    sizes: Tensor


class GradientSums:
    """Adds up gradients at the outputs of an FFN."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._sizes: list[Tensor] = []

    def add(self, gradients: Tensor) -> None:
        """Add `(T, d_out)`."""
        rows = gradients.float()
        product = (rows.T @ rows).double()
        self._sizes.append(rows.square().mean(dim=1).sqrt())
        self._total = product if self._total is None else self._total.add_(product)

    def finish(self) -> OutputSensitivity:
        """What they come to; there have to be some."""
        assert self._total is not None
        return OutputSensitivity(_factor(self._total), torch.cat(self._sizes))


def output_sensitivities(
    model: nn.Module,
    architecture: Architecture,
    sites: Sequence[FFNSite],
    calibration: Batch | Iterable[Batch],
    *,
    seed: int,
) -> list[OutputSensitivity]:
    """Per FFN in `sites`, what an error of its outputs does to the model.

    To the predictions of a language model with a linear head, to the last hidden states of any other. About 4,096
    tokens are looked at, of sequences spread evenly over the text, the first 512 of each.

    Memory: the activations of a forward pass over at most 1,024 positions, and `12 d_out^2` bytes per FFN. Time: a
    forward and a backward pass over those tokens. The model's parameters are not touched and get no gradients.

    Args:
        model: an unfused model.
        architecture, sites: its architecture and the FFNs wanted.
        calibration: as in :func:`mlp_fusion.calibration.collect`.
        seed: of the probes.

    Raises:
        InputError: there is no batch or no token, the model cannot run on one, skips an FFN, or cannot be
            differentiated, or its gradients are not finite.
    """
    sums = [GradientSums() for _ in sites]

    def visit(number: int, gradients: Tensor) -> None:
        sums[number].add(gradients)

    output_gradients(model, architecture, sites, calibration, visit, seed=seed)
    return [each.finish() for each in sums]


def warn_unweighed(error: SkippableError) -> None:
    """Say that errors of outputs are not weighed by what they do to the model, and why."""
    warnings.warn(f"all errors of outputs count alike: {error}", stacklevel=5)


def output_gradients(
    model: nn.Module,
    architecture: Architecture,
    sites: Sequence[FFNSite],
    calibration: Batch | Iterable[Batch],
    visit: Callable[[int, Tensor], None],
    *,
    seed: int,
) -> None:
    """The gradients that :func:`output_sensitivities` is about, excerpt by excerpt.

    Args:
        model, architecture, sites, calibration, seed: as there.
        visit: called with the number of an FFN and its `(T, d_out)` gradients, for each excerpt with all FFNs in order.

    Raises:
        InputError: as there.
    """
    batches = take_calibration(model, calibration)
    outputs: list[list[Tensor]] = [[] for _ in sites]
    generator = torch.Generator().manual_seed(seed)

    def forget() -> None:
        for ys in outputs:
            ys.clear()

    # Attention's fused backward passes add up in no fixed order on a GPU.
    exact = sdpa_kernel(SDPBackend.MATH)
    runner = Runner(model, "the calibration text")
    runner.again = forget
    with runner, _frozen(model):
        head = _head(runner, batches)
    with runner, _frozen(model), _caught(architecture, sites, outputs), torch.enable_grad(), exact:
        for batch in excerpts(model, batches, SENSED_TOKENS):
            try:
                states = runner.counted_states(batch)
                if not all(bool(hidden[mask.to(hidden.device)].isfinite().all()) for hidden, mask in states):
                    raise not_finite("on the calibration text, the model's inputs or outputs", states[0][0].dtype)
                if not all(outputs):
                    raise SkippableError("an FFN did not run on the calibration text: the model skips it")
                probed = (
                    hidden * _probe(head, hidden, generator) * mask.unsqueeze(-1).to(hidden) for hidden, mask in states
                )
                loss = torch.stack([part.sum() for part in probed]).sum()
                # Nothing of an FFN whose outputs no state depends on (the last of a tower that is read before it).
                wanted = [y for ys in outputs for y in ys]
                counts = [len(ys) for ys in outputs]
                gradients = iter(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True))
            except (ValueError, IndexError, TypeError, RuntimeError) as error:
                found = _failed(error)
                if found is error:
                    raise
                raise found from error
            # A layer that runs again for its backward pass has put out more since.
            for number, count in enumerate(counts):
                last = architecture.projection(sites[number], "w_out")
                own = {"gradients": [channels_last(last, next(gradients)) for _ in range(count)]}
                mask, laid = by_sequence(own, batch, sites[number].path)
                rows = laid["gradients"][mask.to(laid["gradients"].device)]
                _check_finite(rows)
                visit(number, rows)
                outputs[number].clear()


@torch.no_grad()
def _head(runner: Runner, batches: Sequence[Batch]) -> nn.Linear | None:
    """What makes logits of the last hidden states, if that is a linear layer and nothing else does anything to them."""
    head = getattr(runner.model, "get_output_embeddings", lambda: None)()
    if type(head) is not nn.Linear or not cuttable(batches[0]):
        return None
    mask = token_mask(batches[0])[:1]
    window = window_of(batches[0], torch.zeros(1, dtype=torch.int64), mask.int().argmax(dim=1), min(8, mask.shape[1]))
    outputs = runner.whole(window)
    if not isinstance(outputs, Mapping):
        return None
    logits, (states, *others) = outputs.get("logits"), runner.final_states(window)
    if logits is None or others or logits.shape[:-1] != states.shape[:-1] or states.shape[-1] != head.in_features:
        return None
    expected = head(states)
    if expected.shape != logits.shape:
        return None
    tolerance = 64 * torch.finfo(expected.dtype).eps * float(expected.abs().max())
    return head if bool(((expected - logits).abs() <= tolerance).all()) else None


@torch.no_grad()
def _probe(head: nn.Linear | None, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """u of the module's docstring, for last hidden states `(batch, ..., d)`: drawn on the CPU, whatever the device."""
    if head is None:
        return torch.randn(hidden.shape, generator=generator, dtype=torch.float32).to(hidden)
    probes = hidden.new_empty(hidden.shape)
    for own, rows in zip(probes.flatten(0, -2).split(_LOGITS), hidden.flatten(0, -2).split(_LOGITS), strict=True):
        p = head(rows).softmax(dim=-1, dtype=torch.promote_types(hidden.dtype, torch.float32))
        below = torch.rand(len(p), 1, generator=generator, dtype=torch.float64).to(p)
        drawn = torch.searchsorted(p.cumsum(dim=-1), below).clamp(max=p.shape[1] - 1)
        own.copy_(p.to(hidden.dtype) @ head.weight - head.weight[drawn.squeeze(1)])
    return probes


def _failed(error: Exception) -> Exception:
    """What is said of an error: the model's own, which it has not had without gradients, or one of the input."""
    cause = error.__cause__ if isinstance(error, InputError) else error
    if isinstance(cause, torch.OutOfMemoryError):
        # What a run comes to must not depend on what else is in memory.
        return InputError(f"gradients through the model need more memory than there is ({named(cause)}): {_WITHOUT}")
    if isinstance(error, InputError) and not isinstance(cause, RuntimeError):
        return error
    return SkippableError(f"gradients through the model fail ({named(cause or error)}): {_WITHOUT}")


def _check_finite(gradients: Tensor) -> None:
    if not bool(gradients.isfinite().all()):
        remedy = "load it in float32 or bfloat16" if gradients.dtype == torch.float16 else _WITHOUT
        raise SkippableError(f"gradients through the model are not finite in {str(gradients.dtype)[6:]}: {remedy}")


def _factor(total: Tensor) -> Tensor:
    """`L` of the sum of outer products; of the identity where that is 0."""
    size = total.diagonal().mean()
    identity = torch.eye(len(total), dtype=total.dtype, device=total.device)
    mixed = identity if float(size) == 0.0 else total * ((1.0 - _IDENTITY) / size) + _IDENTITY * identity
    return torch.linalg.cholesky(mixed).float()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for gradients inside: autograd then keeps only what those of the outputs need."""
    # Parameters of inference mode are left alone: autograd raises its own error when it meets them.
    asking = [p for p in model.parameters() if p.requires_grad and not p.is_inference()]
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
            # A copy goes on: some models add to what an FFN has put out in place.
            return into[-1].clone()

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
