"""A sample of what goes into and comes out of each FFN while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mlp_fusion.errors import InputError
from mlp_fusion.families import Architecture, FFNSite
from mlp_fusion.neurons import NeuronBundle

Batch = Mapping[str, Tensor]
#: Called as `visit(site number, token mask (batch, length), taps)`; see :func:`stream_activations`.
Visitor = Callable[[int, Tensor, "Taps"], None]

#: Rows are drawn from so many times as many tokens: enough to mix sentences, and an end to endless samples.
POOL = 64


@dataclass(frozen=True, eq=False)
class Activations:
    """Rows of one FFN: inputs `x (T, d)` and the model's own outputs `y (T, d_out)`, in the model's dtype."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True, eq=False)
class Taps:
    """What passes through one FFN on one batch, padding included, in the model's dtype and on its device.

    Attributes:
        x: `(batch, length, d)` inputs.
        hidden: `(batch, length, N)` what the output projection gets: the activations, gated where the FFN is.
        y: `(batch, length, d_out)` outputs of the output projection.
    """

    x: Tensor
    hidden: Tensor
    y: Tensor


def random_batch(model: nn.Module, *, seed: int, batch: int = 8, length: int = 64) -> dict[str, Tensor]:
    """Uniformly drawn token ids `(batch, length)` for `model`, for when there is no text at hand."""
    config: Any = model.config
    positions = getattr(config, "max_position_embeddings", None) or length
    # RoBERTa counts positions from its padding id on, so that a few of the table's rows are never reached.
    length = min(length, max(1, int(positions) - 2))
    chunk = getattr(config, "chunk_size_feed_forward", 0) or 1
    length = max(chunk, length - length % chunk)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, int(config.vocab_size), (batch, length), generator=generator)
    pad = getattr(config, "pad_token_id", None)
    if pad is not None:
        ids[ids == pad] = (int(pad) + 1) % int(config.vocab_size)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def take_batches(sample: Batch | Iterable[Batch], tokens: int, name: str = "sample") -> list[dict[str, Tensor]]:
    """Batches from one batch or an iterable of them, until they hold `tokens` tokens, with their padding at the end.

    `name` is what the caller calls them.

    Raises:
        InputError: there is none, a batch is not a mapping of tensors with `input_ids`, or no token is left unmasked.
    """
    # A tokenizer's BatchEncoding is a UserDict: a mapping by behaviour, not by type.
    batches: Iterable[Any] = [sample] if hasattr(sample, "keys") else sample
    if not hasattr(batches, "__iter__"):
        raise InputError(f"{name} is {batches!r}: give a batch, or an iterable of batches, as a tokenizer returns them")
    taken: list[dict[str, Tensor]] = []
    seen = 0
    for batch in batches:
        if not hasattr(batch, "keys") or not isinstance(batch.get("input_ids"), Tensor):
            raise InputError(
                f'a batch of {name} must map input_ids to a tensor, as a tokenizer with return_tensors="pt"'
            )
        if batch["input_ids"].numel() == 0:
            continue  # a text without tokens
        # Labels are a head's business, and text columns nobody's; extra leading dimensions (choices) are flattened.
        tensors = {k: v for k, v in batch.items() if isinstance(v, Tensor) and v.ndim >= 2 and k != "labels"}
        taken.append(padded_behind({k: v.reshape(-1, v.shape[-1]) for k, v in tensors.items()}))
        seen += int(token_mask(taken[-1]).sum())
        if seen >= tokens:
            break
    if not taken:
        raise InputError(f"{name} needs at least one batch: a mapping with input_ids, as a tokenizer returns it")
    if seen == 0:
        raise InputError(f"{name} has no token: every attention mask is zero")
    return taken


def padded_behind(batch: Batch) -> dict[str, Tensor]:
    """`batch` with its sequences moved to the front of their rows, where padding stands before them.

    Models with absolute positions count them from the first column on, padding included: behind padding, every token
    would get the position, and with it the hidden states, of another one.
    """
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if mask is None or mask.shape != ids.shape or bool(mask[:, :1].all()):
        return dict(batch)
    # Of a row without any token, all is padding: argmax is 0, and it stays.
    start = mask.bool().int().argmax(dim=1, keepdim=True)
    columns = (torch.arange(ids.shape[1], device=mask.device) + start) % ids.shape[1]

    def moved(tensor: Tensor) -> Tensor:
        # Positions may come once for all sequences.
        if tensor.shape not in (ids.shape, (1, ids.shape[1])):
            return tensor
        return tensor.expand(ids.shape).gather(1, columns.to(tensor.device))

    return {name: moved(tensor) for name, tensor in batch.items()}


def token_mask(batch: Batch) -> Tensor:
    """`(batch, length)` bool, on the CPU: which positions are tokens."""
    mask = batch.get("attention_mask")
    return (torch.ones_like(batch["input_ids"]) if mask is None else mask).bool().cpu()


@torch.no_grad()
def stream_activations(
    model: nn.Module,
    architecture: Architecture,
    sites: Sequence[FFNSite],
    batches: Sequence[Batch],
    visit: Visitor,
) -> None:
    """Run `model` once over `batches` and show `visit` what passes through every FFN in `sites`.

    Every FFN is visited once per batch, in the order in which the model runs them, and nothing is kept: at any time
    the tensors of one FFN on one batch are held. The model is put in evaluation mode for the run and back afterwards.

    Raises:
        InputError: the model cannot run on a batch, or an FFN did not run.
    """
    with evaluating(model), tapped(architecture, sites, visit) as taps:
        for batch in batches:
            taps.start(token_mask(batch))
            run_base(model, batch)
            taps.finish()


def run_base(model: nn.Module, batch: Batch, name: str = "the sample") -> Any:
    """Outputs of `model` without its head on `batch`, by their names; `name` is what the caller calls the text.

    The head has no FFN of ours, may ask for more than token ids, and makes the largest tensors of all.

    Raises:
        InputError: it cannot run on the batch.
    """
    base: Any = getattr(model, "base_model", model)
    device = next(model.parameters()).device
    embeddings = _vocabulary(base)
    largest, least = int(batch["input_ids"].max()), int(batch["input_ids"].min())
    if embeddings is not None and not 0 <= least <= largest < embeddings:
        raise InputError(
            f"{name} holds token {largest if least >= 0 else least}, the model knows 0 to {embeddings - 1}: "
            "tokenise it with the model's own tokenizer"
        )
    try:
        with naming_outputs(model):
            return base(**{k: v.to(device) for k, v in batch.items()})
    except InputError:
        raise
    except (ValueError, IndexError, TypeError, RuntimeError) as error:
        raise cannot_run(name, error) from error


def _vocabulary(base: Any) -> int | None:
    """How many tokens the model has embeddings of; None where it cannot say (a module around a model)."""
    try:
        return getattr(base.get_input_embeddings(), "num_embeddings", None)
    except (AttributeError, NotImplementedError):
        return None


@contextmanager
def naming_outputs(model: nn.Module) -> Iterator[None]:
    """Outputs by their names inside, where the model's config asks for tuples.

    An argument to that effect would not do: some models run their inner ones as the config says.
    """
    configs = {id(c): c for m in model.modules() if (c := m.__dict__.get("config")) is not None}
    changed = [config for config in configs.values() if getattr(config, "return_dict", True) is False]
    for config in changed:
        config.return_dict = True
    try:
        yield
    finally:
        for config in changed:
            config.return_dict = False


def cannot_run(name: str, error: Exception) -> InputError:
    """The error of a model that `error` keeps from running on what is called `name`."""
    reason = " ".join(str(error).split())[:200]
    return InputError(f"the model cannot run on {name} ({type(error).__name__}: {reason})")


def not_finite(what: str, dtype: torch.dtype) -> InputError:
    """The error of a model whose `what` overflow, or hold NaN, in `dtype`."""
    remedy = "run it in float32 (load it so; compress: --dtype float32)" if dtype.itemsize < 4 else "mend its weights"
    return InputError(f"{what} hold NaN or Inf in {str(dtype).removeprefix('torch.')}: {remedy}")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every module's own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def tapped(architecture: Architecture, sites: Sequence[FFNSite], visit: Visitor) -> Iterator[TapStore]:
    """Show `visit` what passes through the FFNs in `sites` while the modules run inside; see :class:`TapStore`."""
    taps = TapStore(visit, len(sites))
    handles = []
    for number, site in enumerate(sites):
        w_in, w_out = (architecture.projection(site, role) for role in ("w_in", "w_out"))
        handles.append(w_in.register_forward_pre_hook(taps.before("x", number)))
        handles.append(w_out.register_forward_pre_hook(taps.before("hidden", number)))
        handles.append(w_out.register_forward_hook(taps.after("y", number)))
    try:
        yield taps
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaced(architecture: Architecture, site: FFNSite, bundle: NeuronBundle) -> Iterator[None]:
    """While inside, the FFN at `site` outputs what `bundle` (B = 1) does; its own weights are left alone."""
    pending: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        pending.append(args[0])

    def replace(_module: nn.Module, _args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        x = pending.pop()
        return bundle.forward(x.reshape(-1, x.shape[-1]).to(bundle.w_in.dtype))[0].reshape(y.shape).to(y.dtype)

    handles = [
        architecture.projection(site, "w_in").register_forward_pre_hook(keep),
        architecture.projection(site, "w_out").register_forward_hook(replace),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class TapStore:
    """Collects the calls of one FFN at a time; `start` every batch and `finish` it.

    A model that chunks its FFN (`chunk_size_feed_forward`) calls it several times, along the sequence: an FFN is
    complete when another one begins, or the batch ends.
    """

    def __init__(self, visit: Visitor, sites: int) -> None:
        self._visit, self._sites = visit, sites
        self._current: int | None = None
        self._parts: dict[str, list[Tensor]] = {}
        self._mask = torch.empty(0)
        self._seen = 0

    def start(self, mask: Tensor) -> None:
        """Begin a batch with the `(batch, length)` token mask."""
        self._mask, self._seen, self._current = mask, 0, None

    def before(self, name: str, number: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, args: self._add(name, number, args[0])

    def after(self, name: str, number: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda _module, _args, y: self._add(name, number, y)

    def finish(self) -> None:
        """End the batch.

        Raises:
            InputError: an FFN did not run.
        """
        self._flush()
        if self._seen != self._sites:
            raise InputError("an FFN did not run on the sample: the model skips it")

    def _add(self, name: str, number: int, tensor: Tensor) -> None:
        if number != self._current:
            self._flush()
            self._current, self._parts = number, {"x": [], "hidden": [], "y": []}
        self._parts[name].append(tensor)

    def _flush(self) -> None:
        if self._current is None:
            return
        if not all(self._parts.values()):
            raise InputError("an FFN did not run on the sample: the model skips it")
        batch = len(self._mask)
        joined = {k: torch.cat([p.reshape(batch, -1, p.shape[-1]) for p in v], 1) for k, v in self._parts.items()}
        self._visit(self._current, self._mask, Taps(**joined))
        self._current, self._parts = None, {}
        self._seen += 1


def capture_activations(
    model: nn.Module,
    architecture: Architecture,
    sites: Sequence[FFNSite],
    sample: Batch | Iterable[Batch],
    *,
    rows: int,
    seed: int,
) -> list[Activations]:
    """Run `model` over `sample` and keep up to `rows` token positions of every FFN in `sites`.

    The same positions are kept at every FFN, drawn uniformly from those that the attention masks leave. Memory: `rows`
    rows per FFN and one batch's activations. The model is put in evaluation mode for the run and back afterwards.

    Returns:
        One `Activations` per site, in their order.

    Raises:
        InputError: the sample has no token, or an FFN did not run, or overflows.
    """
    batches = take_batches(sample, POOL * rows)
    total = sum(int(token_mask(b).sum()) for b in batches)
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:rows]] = True
    kept: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in sites]
    starts = [0] * len(sites)

    def keep(number: int, mask: Tensor, taps: Taps) -> None:
        count = int(mask.sum())
        positions = torch.zeros_like(mask)
        positions[mask] = chosen[starts[number] : starts[number] + count]
        starts[number] += count
        for store, rows_of in zip(kept[number], (taps.x, taps.y), strict=True):
            store.append(rows_of[positions.to(rows_of.device)].clone())

    stream_activations(model, architecture, sites, batches, keep)
    found = [Activations(torch.cat(xs), torch.cat(ys)) for xs, ys in kept]
    for site, rows_of in zip(sites, found, strict=True):
        if not bool(rows_of.x.isfinite().all() and rows_of.y.isfinite().all()):
            raise not_finite(f"{site.path}: this FFN's inputs or outputs", rows_of.y.dtype)
    return found
