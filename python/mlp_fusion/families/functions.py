"""Which function lies between the input projections of an FFN and its output projection, found by comparing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mlp_fusion.families.catalogue import ACTIVATIONS
from mlp_fusion.families.sites import Clamp, Function
from mlp_fusion.families.trace import Probe, Product, set_all
from mlp_fusion.modules.stored import take_half

_MOST_CONSTANTS = 40
#: Halves of a projection that holds gate and up: (gate, up).
FUSED = (("first", "second"), ("even", "odd"), ("second", "first"), ("odd", "even"))
#: Two projections, one for each: in the order of the products, or the other way round.
PAIRS = ((0, 1), (1, 0))


@dataclass(frozen=True)
class Identified:
    """A function, and what of the input projections enters where.

    Attributes:
        function: what was found.
        act: the activation itself, the module's own where it has no name here; None where it is not known.
        halves: of one projection that holds gate and up: which half is which, `(gate, up)`.
        order: of two projections: which is which, `(gate, up)`.
        bias: a bias that is added outside the product, by name.
    """

    function: Function
    act: Callable[[Tensor], Tensor] | None
    halves: tuple[str, str] | None = None
    order: tuple[int, int] | None = None
    bias: str | None = None

    def hidden(self, values: Sequence[Tensor]) -> Tensor:
        """What the output projection multiplies, `(rows, N)`, from what the input projections return, `(rows, N)` or
        `(rows, 2 N)` each.
        """
        function = self.function
        if function.form == "plain":
            return self._activate(values[0]) * function.factor
        gate, up = self._gate_and_up(values)
        clamp = function.clamp
        if clamp is not None:
            up = up.clamp(-clamp.limit, clamp.limit)
            if clamp.gate in ("above", "both"):
                gate = gate.clamp(-clamp.limit if clamp.gate == "both" else None, clamp.limit)
        gate = self._activate(gate)
        if clamp is not None and clamp.gate == "after":
            gate = gate.clamp(max=clamp.limit)
        return gate * (up + function.up_offset) * function.factor

    def _activate(self, values: Tensor) -> Tensor:
        assert self.act is not None
        try:
            result = self.act(values)
        except Exception:  # noqa: BLE001  (one of the module's own, which may want whatever; then it is not this one)
            return torch.full_like(values, float("nan"))
        fits = isinstance(result, Tensor) and result.shape == values.shape
        return result if fits else torch.full_like(values, float("nan"))

    def _gate_and_up(self, values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        if self.order is not None:
            return values[self.order[0]], values[self.order[1]]
        assert self.halves is not None
        gate, up = (take_half(values[0], half, -1) for half in self.halves)
        return gate, up


def own_activations(module: nn.Module) -> dict[str, Callable[[Tensor], Tensor]]:
    """What a module holds that may be an activation, by class: submodules without matrices, and functions."""
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    for part in module.modules():
        for value in vars(part).values():
            if callable(value) and not isinstance(value, (nn.Module, type)) and hasattr(value, "__name__"):
                found.setdefault(value.__name__, value)
        small = not list(part.children()) and all(p.dim() < 2 for p in part.parameters())
        if part is not module and small and not isinstance(part, (nn.Dropout, nn.Identity, nn.LayerNorm)):
            found.setdefault(type(part).__name__, part)
    return found


def constants(module: nn.Module) -> list[float]:
    """Numbers that a module holds: candidates for a clamp."""
    found = {
        float(number)
        for part in module.modules()
        for value in vars(part).values()
        for number in (value if isinstance(value, (list, tuple)) else [value])
        if type(number) in (int, float) and 0 < number < 500
    }
    return sorted(found)[:_MOST_CONSTANTS]


class _Comparison:
    """The function between the products `inputs` and `output`, at small and at large arguments."""

    def __init__(self, probe: Probe, inputs: list[Product], output: Product) -> None:
        self.probe, self.inputs, self.output = probe, inputs, output
        g = torch.Generator().manual_seed(3)
        self.n_rows = inputs[0].rows(inputs[0].y).shape[0]
        self.small = [torch.randn(self.n_rows, e.n_out, generator=g) for e in inputs]
        self.large = [12 * torch.randn(self.n_rows, e.n_out, generator=g) for e in inputs]
        self.hidden_small, self.hidden_large = self.hidden(self.small), self.hidden(self.large)

    def hidden(self, values: list[Tensor]) -> Tensor:
        overrides = {e.index: set_all(v) for e, v in zip(self.inputs, values, strict=True)}
        products, _ = self.probe.run(overrides)
        return self.output.rows(products[self.output.index].x)

    @property
    def plain(self) -> bool:
        return sum(e.n_out for e in self.inputs) == self.output.n_in


def identify(
    probe: Probe, inputs: list[Product], output: Product, biases: Sequence[tuple[str, Tensor]]
) -> Identified | None:
    """Name the function between the products `inputs` (one, or a gate and an up) and `output`.

    Args:
        probe: the module.
        inputs, output: products of its run without overrides.
        biases: what may be added outside the input product: biases of stacks of experts.

    Returns:
        The function; without a name where none fits; None where the hidden states depend on more than the products
        `inputs`, so that no function of them lies between.
    """
    comparison = _Comparison(probe, inputs, output)
    for name, bias in [(None, None), *biases]:
        small, large = (
            [values if bias is None else values + bias for values in arguments]
            for arguments in (comparison.small, comparison.large)
        )
        for guess in _guesses(probe.module, comparison.plain, len(inputs)):
            if not _close(guess.hidden(small), comparison.hidden_small):
                continue
            guess = dataclasses.replace(guess, bias=name)
            if _close(guess.hidden(large), comparison.hidden_large):
                return guess
            clamped = _clamped(guess, large, comparison)
            if clamped is not None:
                return clamped
    return _scaled(comparison) or _unnamed(comparison)


def _close(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)


def _guesses(module: nn.Module, plain: bool, n_inputs: int) -> Iterator[Identified]:
    """Forms and activations, those with a name first."""
    named = [(name, None, act) for name, act in ACTIVATIONS.items()]
    own = [(None, name, act) for name, act in own_activations(module).items()]
    for name, owner, act in [*named, *own]:
        if plain:
            yield Identified(Function("plain", name, owner), act)
            continue
        for offset in (0.0, 1.0):
            function = Function("gated", name, owner, up_offset=offset)
            if n_inputs == 2:
                for order in PAIRS:
                    yield Identified(function, act, order=order)
            else:
                for halves in FUSED:
                    yield Identified(function, act, halves=halves)


def _clamped(guess: Identified, large: list[Tensor], comparison: _Comparison) -> Identified | None:
    """A guess that is right for small arguments only, with the clamp that makes it right for large ones."""
    if guess.function.form == "plain":
        return None
    for limit in constants(comparison.probe.module):
        for gate in ("above", "after", "none", "both"):
            clamped = dataclasses.replace(guess.function, clamp=Clamp(limit, gate))
            trial = dataclasses.replace(guess, function=clamped)
            if _close(trial.hidden(large), comparison.hidden_large):
                return trial
    return None


def _scaled(comparison: _Comparison) -> Identified | None:
    """The function with a constant factor behind it."""
    for guess in _guesses(comparison.probe.module, comparison.plain, len(comparison.inputs)):
        found = guess.hidden(comparison.small)
        factor = _ratio(found, comparison.hidden_small)
        if factor is not None and _close(factor * guess.hidden(comparison.large), comparison.hidden_large):
            return dataclasses.replace(guess, function=dataclasses.replace(guess.function, factor=round(factor, 6)))
    return None


def _ratio(found: Tensor, wanted: Tensor) -> float | None:
    large = found.abs() > 1e-2
    if found.shape != wanted.shape or not bool(large.any()) or not bool(torch.isfinite(found).all()):
        return None
    ratios = wanted[large] / found[large]
    middle = float(ratios.median())
    same = bool(((ratios - middle).abs() < 1e-3 * abs(middle)).all())
    return middle if same and abs(middle) > 1e-6 else None


def _unnamed(comparison: _Comparison) -> Identified | None:
    """Whatever it is, if it is a function of the products' outputs: equal arguments give equal hidden states.

    Those may differ from neuron to neuron (learnt activations) or from token to token (a factor per token), but not
    both: then something else enters, such as the values of an attention.
    """
    rows = comparison.n_rows
    curve = torch.linspace(-2, 2, 7)
    for value in curve.tolist():
        hidden = comparison.hidden([torch.full((rows, e.n_out), value) for e in comparison.inputs])
        by_neuron, by_token = (hidden - hidden[:1]).abs().max(), (hidden - hidden[:, :1]).abs().max()
        if not min(float(by_neuron), float(by_token)) < 1e-4:
            return None
    if comparison.plain:
        return Identified(Function("plain", None), None)
    function = Function("gated", None)
    if len(comparison.inputs) == 2:
        return Identified(function, None, order=PAIRS[0])
    return Identified(function, None, halves=_halves_by_influence(comparison))


def _halves_by_influence(comparison: _Comparison) -> tuple[str, str]:
    """Which half is next to which: change the second output and see whether the first or the second neuron follows."""
    values = comparison.small[0].clone()
    values[:, 1] += 1
    changed = (comparison.hidden([values]) - comparison.hidden_small).abs().amax(dim=0)
    return FUSED[1] if int(changed.argmax()) == 0 else FUSED[0]
