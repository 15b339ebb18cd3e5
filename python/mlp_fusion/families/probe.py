"""Find the FFNs of one module by what it computes, and prove each by rebuilding its output from parameters alone."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mlp_fusion.errors import named
from mlp_fusion.families.calls import ways_to_call
from mlp_fusion.families.functions import Identified, identify
from mlp_fusion.families.trace import Probe, Product, influence
from mlp_fusion.modules.stored import Projection

#: Relative error up to which a rebuilt output is the module's own; what is wrong errs by a few percent at least.
LARGEST_ERROR = 1e-5
_IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


@dataclass
class Found:
    """Products of a module between which an elementwise function lies.

    Attributes:
        inputs, output: the products.
        identified: the function between them.
        transposed: of each product, inputs first: the parameter lies as (in, out).
        error: of the rebuilt output, or None where it could not be rebuilt.
        experts: of the whole experts module, by implementation.
        output_bias: a bias of the output that is added outside the product.
        own_module: input and output of the module are those of the FFN.
        call: how the module was called.
    """

    inputs: list[Product]
    output: Product
    identified: Identified
    transposed: list[bool] = field(default_factory=list)
    error: float | None = None
    experts: dict[str, float] = field(default_factory=dict)
    output_bias: str | None = None
    own_module: bool = False
    call: str = ""

    @property
    def names(self) -> list[str]:
        return [*(product.parameter for product in self.inputs), self.output.parameter]

    @property
    def proved(self) -> bool:
        errors = [self.error, *self.experts.values()]
        return all(error is not None and error < LARGEST_ERROR for error in errors)


class Log:
    """What was seen and was no FFN: reasons by parameter, the first counts."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}
        self.problem: str | None = None
        #: Pairs of matrices with the shapes of an FFN between which channels are mixed.
        self.mixed: set[tuple[str, str]] = set()

    def add(self, reason: str, *parameters: str) -> None:
        for parameter in parameters:
            self.reasons.setdefault(parameter, reason)


def is_experts(module: nn.Module) -> bool:
    """Whether a module follows transformers' experts interface: stacks of experts, called with their routing."""
    return hasattr(module, "has_gate") and hasattr(module, "is_transposed")


def _routed(module: nn.Module) -> bool:
    """Whether an experts module adds up its experts' outputs as they are, so that all of it can be rebuilt."""
    return is_experts(module) and not getattr(module, "has_post_expert_norm", False)


def probe_module(
    module: nn.Module, taken: set[str], log: Log, wanted: set[str] | None = None, recorded: Any = None
) -> list[Found]:
    """The FFNs of a module with real weights.

    Args:
        module: as `building.materialise` makes it.
        taken: parameters that belong to FFNs found before.
        log: gets what was none.
        wanted: parameters that should belong to some; parts of the module are called by themselves for what is left.
        recorded: arguments that the module was called with, `(args, kwargs)`, where it cannot be called alone.
    """
    found: list[Found] = []
    taken, ran = set(taken), False
    for way in ways_to_call(module, is_experts(module), recorded):
        done = not (wanted or set()) - taken if found else False
        if done or (ran and not way.partly):
            continue
        probe = Probe(module, way.call, way.x, way.how, way.arguments)
        try:
            products, out = probe.run()
        except Exception as error:  # noqa: BLE001  (guessed arguments: whatever a module says to them)
            log.problem = log.problem or named(error)
            continue
        if len(products) < 2:
            continue
        ran = ran or not way.partly
        new = analyse(probe, products, out, taken, log)
        found += new
        taken |= {name for one in new for name in one.names}
    return found


def analyse(probe: Probe, products: list[Product], out: Any, taken: set[str], log: Log) -> list[Found]:
    """The FFNs among the products of one call."""
    found = []
    for index, inputs in sorted(_joined(probe, products, taken, log).items()):
        output = products[index]
        names = [*(product.parameter for product in inputs), output.parameter]
        if len(inputs) > 2 or sum(e.n_out for e in inputs) not in (output.n_in, 2 * output.n_in):
            log.add("more than a gate and an up projection lead into one product", *names)
            continue
        if any(product.x.shape != inputs[0].x.shape or not torch.equal(product.x, inputs[0].x) for product in inputs):
            log.add("the projections that lead into one product do not read the same input", *names)
            continue
        identified = identify(probe, inputs, output, _biases_outside(probe, inputs))
        if identified is None:
            log.add("something else enters between the projections", *names)
            continue
        one = Found(inputs, output, identified, call=probe.how)
        if all(product.pointwise for product in (*inputs, output)):
            prove(probe, one)
            if _routed(probe.module) and identified.act is not None and one.error is not None and len(inputs) == 1:
                prove_experts(probe, one)
        one.own_module = bool(one.experts) or _is_own(probe, inputs[0], output, out)
        found.append(one)
    return found


def _joined(probe: Probe, products: list[Product], taken: set[str], log: Log) -> dict[int, list[Product]]:
    """Index of a product -> those whose outputs lead into its input one by one."""
    joined: dict[int, list[Product]] = collections.defaultdict(list)
    mixed: list[tuple[Product, Product]] = []
    gathered: set[int] = set()
    first: dict[str, int | None] = {}
    for source in products:
        if source.parameter in taken or not source.rows(source.y).shape[0]:
            continue
        if first.setdefault(source.parameter, source.expert) != source.expert:
            continue  # one expert stands for all of its stack
        if not source.pointwise:
            log.add("a convolution: a neuron sees several positions", source.parameter)
            continue
        followers = influence(probe, products, source, min(3, source.n_out - 1))
        if followers is None:
            log.add("which products are computed depends on values", source.parameter)
            continue
        for index, (rows, columns) in sorted(followers.items()):
            target = products[index]
            if target.parameter in taken or any(earlier < index for earlier in followers):
                continue  # reached through another product
            if len(rows) > 1:
                gathered.add(index)  # keys and values too, of which there may be fewer than queries
            if source.n_out not in (target.n_in, 2 * target.n_in):
                log.add(f"its {source.n_out} outputs lead into {target.n_in} inputs", source.parameter)
            elif len(rows) == len(columns) == 1:
                joined[index].append(source)
            else:
                if len(rows) == 1 and source.n_in == target.n_out < target.n_in:
                    mixed.append((source, target))
                what = "channels (a norm, a top-k or a sum)" if len(rows) == 1 else "positions"
                log.add(f"what lies between it and the next projection mixes {what}", source.parameter)
                log.add(f"what lies between it and the projection before mixes {what}", target.parameter)
    # What gathers from several positions is an attention, whose queries reach their own position alone. Its values may
    # go through a convolution.
    for source in products if mixed else ():
        if not source.pointwise:
            followers = influence(probe, products, source, 0) or {}
            gathered |= {index for index, (rows, _) in followers.items() if len(rows) > 1}
    log.mixed |= {(a.parameter, b.parameter) for a, b in mixed if b.index not in gathered}
    return joined


def _biases_outside(probe: Probe, inputs: list[Product]) -> list[tuple[str, Tensor]]:
    """Biases of a stack of experts, those of the expert that was traced."""
    if len(inputs) != 1 or (inputs[0].expert is None and not is_experts(probe.module)):
        return []
    expert = inputs[0].expert or 0
    return [
        (name, parameter[expert])
        for name, parameter in probe.parameters.items()
        if parameter.dim() == 2 and "bias" in name and parameter.shape[-1] == inputs[0].n_out
    ]


def _is_own(probe: Probe, first: Product, output: Product, out: Any) -> bool:
    result = out[0] if isinstance(out, (tuple, list)) else out
    if not isinstance(result, Tensor) or result.numel() != output.y.numel():
        return False
    same = torch.allclose(result.reshape(output.y.shape), output.y, atol=1e-5)
    return same and first.x.numel() == probe.x.numel() and torch.equal(first.x.reshape(-1), probe.x.reshape(-1))


# --- the proof --------------------------------------------------------------------------------------------------------


def prove(probe: Probe, found: Found) -> None:
    """Rebuild the FFN's output from its parameters, and note its relative error and how the parameters lie.

    Where the function is unknown, what the projections return is rebuilt instead, each from what it is given.
    """
    identified, output = found.identified, found.output
    values, errors = [], []
    for product in found.inputs:
        value, transposed = multiply(probe, product, product.rows(product.x))
        found.transposed.append(transposed)
        if value is None:
            return
        errors.append(relative(value, product.rows(product.y)))
        if identified.bias is not None:
            bias = probe.parameters[identified.bias]
            value = value + (bias[product.expert] if bias.dim() == 2 and product.expert is not None else bias)
        values.append(value)
    hidden = output.rows(output.x) if identified.act is None else identified.hidden(values)
    result, transposed = multiply(probe, output, hidden)
    found.transposed.append(transposed)
    if result is not None:
        found.error = max(relative(result, output.rows(output.y)), *errors)


def multiply(probe: Probe, product: Product, x: Tensor) -> tuple[Tensor | None, bool]:
    """`x`, (positions, in), times a product's parameter, with its bias; and whether the parameter lies as (in, out)."""
    parameter = probe.parameters[product.parameter]
    if parameter.dim() == 3 and product.weight.dim() == 3 and product.operation in ("bmm", "baddbmm", "matmul"):
        if product.x.dim() != 3 or product.x.shape[0] != parameter.shape[0] or product.axis != -1:
            return None, False
        as_stored = product.weight.stride() == parameter.stride()
        stack = x.reshape(parameter.shape[0], -1, product.n_in)
        return torch.bmm(stack, parameter if as_stored else parameter.mT).reshape(-1, product.n_out), as_stored
    weight: Tensor = parameter
    if product.expert is not None:
        rows = product.weight.numel() // parameter.shape[-1]
        weight = parameter.reshape(-1, rows, parameter.shape[-1])[product.expert]
    if product.operation == "conv" and product.pointwise:
        weight = weight.reshape(weight.shape[:2])
    if weight.dim() != 2 or product.n_in not in weight.shape:
        return None, False
    if weight.shape[0] == weight.shape[1]:  # no shape tells; the strides tell whether it was used as it is stored
        transposed = product.operation in ("addmm", "matmul") and product.weight.stride() == weight.stride()
    else:
        transposed = tuple(weight.shape) == (product.n_in, product.n_out)
    result = x @ (weight if transposed else weight.t())
    return (result + probe.parameters[product.bias] if product.bias else result), transposed


def prove_experts(probe: Probe, found: Found) -> None:
    """Rebuild the output of a whole experts module with its routing, beside each implementation of the interface."""
    x, (index, weights) = probe.x, probe.arguments
    module: Any = probe.module
    rows, parameters = found.output, probe.parameters
    w_in, w_out = parameters[found.inputs[0].parameter], parameters[rows.parameter]
    bias = None if found.identified.bias is None else parameters[found.identified.bias]
    outside = f"{rows.parameter}_bias"
    found.output_bias = outside if outside in parameters else None
    wanted = torch.zeros_like(x)
    for token in range(x.shape[0]):
        for expert, weight in zip(index[token].tolist(), weights[token], strict=True):
            value = x[token : token + 1] @ (w_in[expert] if found.transposed[0] else w_in[expert].t())
            hidden = found.identified.hidden([value if bias is None else value + bias[expert]])
            result = hidden @ (w_out[expert] if found.transposed[1] else w_out[expert].t())
            if found.output_bias is not None:
                result = result + parameters[outside][expert]
            wanted[token] += weight * result[0]
    for implementation in _IMPLEMENTATIONS:
        module.config._experts_implementation = implementation
        try:
            with torch.no_grad():
                found.experts[implementation] = relative(module(x, index, weights), wanted)
        except Exception:  # noqa: BLE001  (not every implementation runs on every processor and shape)
            continue
        finally:
            module.config._experts_implementation = "eager"


def relative(found: Tensor, wanted: Tensor) -> float:
    """Relative Frobenius error; infinite for NaN."""
    error = float((found - wanted).norm() / wanted.norm().clamp(min=1e-12))
    return error if error == error else float("inf")


# --- as it lies in memory ---------------------------------------------------------------------------------------------


def projections(probe_parameters: Mapping[str, Tensor], found: Found) -> tuple[Projection, ...]:
    """The projections of a find, gate first, output last."""
    made = []
    for number, product in enumerate(found.inputs):
        made += [
            _projection(probe_parameters, found, number, product, role, part)
            for role, part in _roles(found.identified, number)
        ]
    order = {"w_gate": 0, "w_in": 1}
    made.sort(key=lambda projection: order[projection.role])
    last = len(found.inputs)
    return (*made, _projection(probe_parameters, found, last, found.output, "w_out", "whole"))


def _roles(identified: Identified, number: int) -> list[tuple[str, str]]:
    if identified.function.form == "plain":
        return [("w_in", "whole")]
    if identified.order is not None:
        return [("w_gate" if identified.order[0] == number else "w_in", "whole")]
    assert identified.halves is not None
    return list(zip(("w_gate", "w_in"), identified.halves, strict=True))


def _projection(
    parameters: Mapping[str, Tensor], found: Found, number: int, product: Product, role: str, part: str
) -> Projection:
    parameter = parameters[product.parameter]
    out = role == "w_out"
    # A matrix is (out, in), or (in, out) where transposed; the neurons are the outputs of w_in and the inputs of w_out.
    rows, columns = (0, 1) if product.operation == "conv" else (parameter.dim() - 2, parameter.dim() - 1)
    neurons = columns if out != found.transposed[number] else rows
    stacked = None
    if parameter.dim() == 3 and product.operation != "conv":
        stacked = 0
    elif product.expert is not None:
        stacked = rows  # experts one after another
    outside = found.output_bias if out else found.identified.bias
    return Projection(product.parameter, role, part, neurons, stacked, product.bias or outside)
