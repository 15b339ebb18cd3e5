"""Inputs on which a model runs, found by trying guesses and mending them by what errors say."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import itertools
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from guesses import LEAST_ID, MOST_ID, Inputs, guesses, numbers
from torch import Tensor, nn
from transformers import PreTrainedModel

#: How many guesses are tried, and what infinite outputs count as: masked ones.
_GUESSES, _INFINITE = 120, 1e4
#: How often a guess is mended by what an error says.
_REPAIRS = 5
#: Errors that name a size that was given and one that was wanted, and which groups those are.
_SIZES_IN_ERRORS = (
    (r"mat1 and mat2 shapes cannot be multiplied \(\d+x(\d+) and (\d+)x\d+\)", (1, 2)),
    (r"to have (\d+) channels, but got (\d+) channels", (2, 1)),
    (r"Given normalized_shape=\[(\d+)\].*got input of size\[[\d, ]*?(\d+)\]", (2, 1)),
    (r"Input height \((\d+)\) doesn't match model \((\d+)\)", (1, 2)),
    (r"image size \((\d+)\*\d+\) doesn't match model \((\d+)\*", (1, 2)),
)


@dataclass(frozen=True)
class Probe:
    """A part of a model that runs, and inputs on which it does.

    Attributes:
        path: of the part; empty for the whole model.
        inputs: keyword arguments.
        reached: paths of the modules that ran, of those that were wanted.
    """

    path: str
    inputs: Inputs
    reached: frozenset[str]


@torch.no_grad()
def find_probes(model: PreTrainedModel, wanted: set[str], seconds: float = 8.0) -> tuple[list[Probe], list[str]]:
    """Probes of a model that together reach the modules at the paths `wanted`, as far as guesses go.

    The whole model counts first; parts with a `forward` of their own follow where it leaves modules out.

    Returns:
        The probes, and messages of the last guesses that failed.
    """
    problems: list[str] = []
    probes: list[Probe] = []
    until = time.perf_counter() + seconds
    left = set(wanted)
    parts = [("", model), *((p, m) for p, m in model.named_modules() if p and isinstance(m, PreTrainedModel))]
    for path, part in parts:
        inside = {name for name in left if not path or name == path or name.startswith(f"{path}.")}
        if not inside:
            continue
        best = _best(part, path, inside, problems, until)
        if best is not None:
            probes.append(best)
            left -= best.reached
    return probes, list(dict.fromkeys(problems))[:8]


def _best(part: Any, path: str, wanted: set[str], problems: list[str], until: float) -> Probe | None:
    best: Probe | None = None
    # Caches of some layers are not made for others; and nothing of them is compared.
    plain = {"use_cache": False} if "use_cache" in inspect.signature(part.forward).parameters else {}
    for guess in itertools.islice(guesses(part), _GUESSES):
        inputs = {**guess, **plain}
        found = _tried(part, path, inputs, wanted, problems)
        if found is not None and (best is None or len(found.reached) > len(best.reached)):
            best = found
            if best.reached >= wanted:
                break
        if time.perf_counter() > until:
            break
    return best


def _tried(part: Any, path: str, inputs: Inputs, wanted: set[str], problems: list[str]) -> Probe | None:
    """The probe, if the part runs on `inputs`, perhaps after as many tokens for images are put in as it asks for."""
    for _ in range(_REPAIRS):
        message = ""
        with _watching(part, path, wanted) as reached, _asking(part) as asked:
            try:
                outputs = tensors(part(**copy.deepcopy(inputs)))
            except Exception as error:  # noqa: BLE001  (a guess that the model does not take)
                message = " ".join(str(error).split())
                problems.append(f"{type(error).__name__}: {message[:160]} ({', '.join(inputs)})")
            else:
                if outputs and not any(bool(t.isnan().any()) for t in outputs.values()):
                    return Probe(path, inputs, frozenset(reached))
                problems.append("no output, or one that is not finite")
                return None
        if not asked and (counted := re.search(r"tokens do not match.*features:? (\d+)", message)):
            asked = {message.split()[0].lower(): int(counted[1])}
        changed = _with_placeholders(part.config, inputs, asked) or _resized(inputs, message)
        if changed is None:
            return None
        inputs = changed
    return None


def _resized(inputs: Inputs, message: str) -> Inputs | None:
    """Inputs with another size of one axis, where an error names the size that was wanted, or None."""
    for text, (had, wants) in _SIZES_IN_ERRORS:
        found = re.search(text, message)
        if found is None:
            continue
        old, new = int(found[had]), int(found[wants])
        for name, value in inputs.items():
            if not isinstance(value, Tensor) or not value.is_floating_point() or old == new:
                continue
            for axis in reversed(range(value.dim())):
                size = value.shape[axis]
                # Some models take the first entries off: numbers of a patch's row and column.
                if size in (old, old + 2) and size + new - old > 0:
                    shape = [*value.shape]
                    shape[axis] = size + new - old
                    return {**inputs, name: torch.randn(shape, generator=torch.Generator().manual_seed(3))}
    return None


@contextlib.contextmanager
def _watching(part: nn.Module, path: str, wanted: set[str]) -> Iterator[set[str]]:
    """Paths of wanted modules that run, or of which a child runs: some are layers of which only methods are called.

    What runs on no rows at all (an FFN of sounds, on text) has not run.
    """
    reached: set[str] = set()

    def note(owners: set[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if not given or any(value.numel() for value in given):
            reached.update(owners)

    handles = []
    for name, module in part.named_modules():
        full = f"{path}.{name}".strip(".")
        owners = {w for w in wanted if full == w or full.startswith(f"{w}.")}
        if owners:
            noting = functools.partial(note, owners)
            handles.append(
                module.register_forward_pre_hook(lambda _, *given, noting=noting: noting(*given), with_kwargs=True)
            )
    try:
        yield reached
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _asking(part: nn.Module) -> Iterator[dict[str, int]]:
    """How many placeholder tokens a model wants in its text, by what they stand for; seen where it checks them."""
    asked: dict[str, int] = {}
    wrapped = []
    for module in part.modules():
        checks = getattr(module, "get_placeholder_mask", None)
        if checks is None:
            continue
        signature = inspect.signature(checks)

        def noting(*args: Any, checks: Any = checks, signature: Any = signature, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            width = given["inputs_embeds"].shape[-1] if isinstance(given.get("inputs_embeds"), Tensor) else 0
            for name, value in given.items():
                if name.endswith("features") and isinstance(value, Tensor) and width:
                    asked[name.removesuffix("_features")] = value.numel() // width
            return checks(*args, **kwargs)

        module.get_placeholder_mask = noting
        wrapped.append(module)
    try:
        yield asked
    finally:
        for module in wrapped:
            del module.get_placeholder_mask


def _with_placeholders(config: Any, inputs: Inputs, asked: Mapping[str, int]) -> Inputs | None:
    """Inputs with the tokens that are asked for, or None where nothing would change."""
    ids = inputs.get("input_ids")
    if ids is None or not asked:
        return None
    placed: list[int] = []
    for kind, count in asked.items():
        token = next(numbers(config, f"{kind}_token_id", f"{kind}_token_index"), None)
        if token is None:
            return None
        placed += [token] * count
    text = [t for t in ids[0].tolist() if LEAST_ID <= t < MOST_ID]
    new = torch.tensor([[*text[:4], *placed, *text[4:]]])
    if torch.equal(new, ids):
        return None
    return {**inputs, "input_ids": new, **_beside_text(inputs, new, placed)}


def _beside_text(inputs: Inputs, ids: Tensor, placed: list[int]) -> Inputs:
    kinds = (ids[..., None] == torch.tensor(sorted(set(placed)))).any(-1).long()
    return {name: kinds for name in ("mm_token_type_ids", "token_type_ids") if name in inputs}


def tensors(outputs: Any, prefix: str = "") -> dict[str, Tensor]:
    """All floating-point tensors of a model's outputs by name, but for caches; what is masked by infinity is large."""
    if isinstance(outputs, Tensor):
        if not outputs.is_floating_point() or not outputs.numel():
            return {}
        return {prefix or "output": outputs.float().clamp(-_INFINITE, _INFINITE)}
    if isinstance(outputs, Mapping):
        items = list(outputs.items())
    elif isinstance(outputs, (tuple, list)):
        items = list(enumerate(outputs))
    else:
        return {}
    found: dict[str, Tensor] = {}
    for key, value in items:
        if "past_key_values" not in str(key) and "cache" not in str(key):
            found |= tensors(value, f"{prefix}.{key}".strip("."))
    return found
