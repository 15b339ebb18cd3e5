"""Tangent kernels of two whole models side by side: FFN by FFN and part by part, and of the network's outputs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fusion_kernels import ntk_compare
from fusion_kernels.ntk import Kernel
from mlp_fusion.errors import InputError
from mlp_fusion.families import Architecture, FFNSite
from mlp_fusion.measure.errors import ffn_parts, relative_error
from mlp_fusion.measure.report import finite
from mlp_fusion.running.batches import POOL, Batch, batches_of, has_other_inputs, samples
from mlp_fusion.running.runner import Runner
from mlp_fusion.running.taps import capture_activations
from mlp_fusion.store.record import architecture_of

#: `(model, batch) -> (samples, outputs)`: which outputs of the network count in its kernel.
Outputs = Callable[[nn.Module, Batch], Tensor]

#: Bytes of gradients that the network's kernel keeps at a time.
GRADIENT_BYTES = 1 << 30


@dataclass(frozen=True)
class KernelRow:
    """One part of one FFN in both models.

    Attributes:
        layer: layer index.
        path: the layer's path in the model.
        part: `total`, `w_in` (with the gate), `b_in` or `w_out`.
        relative_error: |B - A|_F / |A|_F of the kernels A of the original and B of the other, summed over outputs.
        standard_error: of it, where columns of the kernels were drawn; else 0.
        cosine, alignment: <A, B> / (|A| |B|), and the same of the centred kernels (linear CKA).
        trace: of A and of B.
        eigenvalues: the largest of A and of B, descending; none for the sign kernel.
    """

    layer: int
    path: str
    part: str
    relative_error: float
    standard_error: float
    cosine: float
    alignment: float
    trace: tuple[float, float]
    eigenvalues: tuple[list[float], list[float]]


@dataclass(frozen=True)
class NetworkKernel:
    """The kernel of the network's outputs with respect to all parameters of its FFNs, on a few samples.

    Attributes:
        samples: N; the kernel is (N, N).
        outputs: how many outputs the kernel was summed over: all, or as many as were drawn, scaled to the sum of all.
        relative_error, cosine, alignment, trace: as in `KernelRow`.
    """

    samples: int
    outputs: int
    relative_error: float
    cosine: float
    alignment: float
    trace: tuple[float, float]


@dataclass(frozen=True)
class ModelComparison:
    """What :func:`compare_models` found; `rows` token positions went into the FFNs' kernels."""

    kernel: str
    rows: int
    ffns: list[KernelRow]
    network: NetworkKernel | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, null for numbers that are not finite."""
        result: dict[str, Any] = finite(dataclasses.asdict(self))
        return result


def compare_models(
    original: nn.Module,
    other: nn.Module,
    sample: Batch | Iterable[Batch],
    *,
    rows: int = 2048,
    kernel: Kernel = "gd",
    samples: int = 16,
    outputs: Outputs | None = None,
    drawn_outputs: int = 8,
    seed: int = 0,
) -> ModelComparison:
    """Compare the tangent kernels of a model and of what became of it.

    Every FFN is compared on the inputs that it gets in the original: its kernel with respect to its own parameters, in
    the parameterization of its module, in tiles (memory grows with `rows`, time with its square). The network's kernel
    is with respect to the parameters of all FFNs together; its gradients take at most `GRADIENT_BYTES` at a time.

    Args:
        original, other: Hugging Face models of one architecture, fused or not, on one device.
        sample: batches from a tokenizer.
        rows: token positions that the FFNs' kernels are measured on.
        kernel: `"gd"` for gradient descent, `"sign"` for sign descent, to which Adam is close.
        samples: sequences that the network's kernel is measured on, the first ones; 0 for no such kernel. Where the
            sample has fewer, the result says how many.
        outputs: what the network's outputs are; mean-pooled last hidden states when None.
        drawn_outputs: that many of them are drawn when there are more, the same ones in both models.
        seed: of the drawn positions and outputs.

    Raises:
        InputError: unknown architecture, models that do not match, or a sample that they cannot run on.
        ValueError: a count that is too small.

    Examples:
        >>> from transformers import AutoModel
        >>> from mlp_fusion.measure import compare_models
        >>> original, fused = (AutoModel.from_pretrained("all-MiniLM-L6-v2") for _ in range(2))
        >>> _ = mlp_fusion.fuse(fused, width=0.5)
        >>> found = compare_models(original, fused, {"input_ids": torch.arange(3, 9)[None]}, samples=0)
        >>> [row.relative_error > 0 for row in found.ffns[:2]]
        [True, True]
    """
    for name, value, least in (("rows", rows, 1), ("samples", samples, 0), ("drawn_outputs", drawn_outputs, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    architecture, pairs = _matching_sites(original, other)
    # As many as the rows are drawn from, for the network's kernel as well.
    batches = batches_of(original, sample, POOL * rows)
    activations = capture_activations(
        original, architecture, [site for site, _ in pairs], batches, rows=rows, seed=seed
    )  # fmt: skip
    found = []
    for (site, counterpart), inputs in zip(pairs, activations, strict=True):
        blocks = [architecture.read(one) for one in (site, counterpart)]
        x = inputs.x.to(torch.promote_types(inputs.x.dtype, torch.float32))
        parts = ffn_parts(blocks[0])
        every = tuple(name for names in parts.values() for name in names)
        for part, names in {"total": every, **parts}.items():
            c = ntk_compare(blocks[0], blocks[1], x, params=names, kernel=kernel, seed=seed)
            spectra = c.eigenvalues[0].tolist(), c.eigenvalues[1].tolist()
            found.append(
                KernelRow(
                    site.index, site.path, part, c.relative_error, c.standard_error, c.cosine, c.alignment, c.trace,
                    spectra,
                )
            )  # fmt: skip
    network = None
    if samples > 0:
        taken = _first_samples(batches, samples)
        network = _compare_networks(architecture, pairs, (original, other), taken, kernel, drawn_outputs, outputs, seed)
    return ModelComparison(kernel, len(activations[0].x), found, network)


def _matching_sites(original: nn.Module, other: nn.Module) -> tuple[Architecture, list[tuple[FFNSite, FFNSite]]]:
    types = [getattr(getattr(model, "config", None), "model_type", None) for model in (original, other)]
    if types[0] is None or types[0] != types[1]:
        raise InputError(f"the models are a {types[0]!r} and a {types[1]!r}: compare two models of one architecture")
    architecture = architecture_of(original.config)
    sites = [architecture.sites(model) for model in (original, other)]
    if not sites[0] or len(sites[0]) != len(sites[1]):
        raise InputError(f"the models have {len(sites[0])} and {len(sites[1])} FFNs: compare a model with its own copy")
    for pair in zip(*sites, strict=True):
        first, second = (architecture.read(site).w_in[0] for site in pair)
        for what in ("dtype", "device"):
            if getattr(first, what) != getattr(second, what):
                raise InputError(
                    f"{pair[0].path} is {getattr(first, what)} in one model and {getattr(second, what)} in the other: "
                    "convert one of them"
                )
        if first.shape[1] != second.shape[1]:
            raise InputError(
                f"{pair[0].path} has {first.shape[1]} inputs in one model and {second.shape[1]} in the other: "
                "compare a model with its own copy"
            )
    return architecture, list(zip(*sites, strict=True))


def pooled(model: nn.Module, batch: Batch) -> Tensor:
    """(samples, hidden): means of the last hidden states over each sequence's tokens, or whatever positions it has."""
    with Runner(model) as runner:
        found = runner.counted_states(batch)
    means = []
    for states, counted in found:
        hidden, mask = states.flatten(1, -2), counted.flatten(1).to(states.device)
        if "attention_mask" not in batch and bool(mask.all()):
            means.append(hidden.mean(1))
            continue
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        means.append((hidden * weight).sum(1) / weight.sum(1).clamp(min=1))
    return torch.cat(means, dim=1)


def _first_samples(batches: Sequence[Batch], wanted: int) -> list[dict[str, Tensor]]:
    """Single samples; sequences without their padding where that is at the end."""
    found: list[dict[str, Tensor]] = []
    for batch in batches:
        text = "input_ids" in batch and not has_other_inputs(batch)
        count = len(batch["input_ids"]) if text else samples(batch)
        if count is None and len(batch["input_ids"]) > 1:
            raise InputError("images and texts of a batch cannot be told apart by samples: give batches of one sample")
        for i in range(count or 1):
            one = {name: value if count is None else value[i : i + 1] for name, value in batch.items()}
            mask = one.get("attention_mask")
            if text and mask is not None and bool(mask.any()):
                length = int(mask[0].nonzero().max()) + 1
                width = mask.shape[1]
                one = {k: value[:, :length] if value.shape[1] == width else value for k, value in one.items()}
            found.append(one)
            if len(found) == wanted:
                return found
    return found


def _compare_networks(
    architecture: Architecture,
    pairs: Sequence[tuple[FFNSite, FFNSite]],
    models: tuple[nn.Module, nn.Module],
    samples: list[dict[str, Tensor]],
    kernel: Kernel,
    drawn: int,
    outputs: Outputs | None,
    seed: int,
) -> NetworkKernel:
    (a, taken), (b, _) = (
        _network_kernel(model, _ffn_parameters(architecture, [pair[side] for pair in pairs]), samples, kernel,
                        drawn, outputs or pooled, seed)
        for side, model in enumerate(models)
    )  # fmt: skip
    centre = torch.eye(len(a), dtype=a.dtype) - 1.0 / len(a)
    return NetworkKernel(
        samples=len(samples),
        outputs=taken,
        relative_error=relative_error(b, a),
        cosine=_cosine(a, b),
        alignment=_cosine(centre @ a @ centre, centre @ b @ centre),
        trace=(float(a.trace()), float(b.trace())),
    )


def _cosine(a: Tensor, b: Tensor) -> float:
    norms = float(a.norm() * b.norm())
    return float((a * b).sum()) / norms if norms > 0 else math.nan


def _ffn_parameters(architecture: Architecture, sites: Sequence[FFNSite]) -> list[nn.Parameter]:
    found: list[nn.Parameter] = []
    for site in sites:
        found.extend(site.module.get_parameter(name) for name in site.kind.parameters)
        fused = architecture.fused(site)
        if fused is not None and isinstance(fused.scale, nn.Parameter):
            found.append(fused.scale)
    return found


def _network_kernel(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    samples: Sequence[dict[str, Tensor]],
    kernel: Kernel,
    drawn: int,
    outputs: Outputs,
    seed: int,
) -> tuple[Tensor, int]:
    """(N, N) float64 on the CPU: the kernel summed over outputs, or estimated from `drawn` of them; and how many.

    Single outputs rather than random directions: for the sign kernel, which is not bilinear, those would be biased.
    """
    device = next(model.parameters()).device
    required = [p.requires_grad for p in parameters]
    total = torch.zeros(len(samples), len(samples), dtype=torch.float64)
    chosen: list[int] = []
    weight = 1.0
    try:
        for p in parameters:
            p.requires_grad_(True)
        with Runner(model):
            for group in _groups(parameters, len(samples) * drawn):
                rows: list[list[Tensor]] = []
                for sample in samples:
                    with torch.enable_grad():
                        y = outputs(model, {name: value.to(device) for name, value in sample.items()})[0].unbind()
                    if not chosen:
                        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
                        chosen = sorted(order[:drawn].tolist())
                        weight = len(y) / len(chosen)
                    rows.append([_flat_gradient(y[o], group, last=o == chosen[-1]) for o in chosen])
                for of_output in zip(*rows, strict=True):
                    jacobian = torch.stack(of_output)
                    other = jacobian.sign() if kernel == "sign" else jacobian
                    total += (jacobian @ other.T).double().cpu()
    finally:
        for p, flag in zip(parameters, required, strict=True):
            p.requires_grad_(flag)
    return total * weight, len(chosen)


def _flat_gradient(y: Tensor, parameters: Sequence[nn.Parameter], *, last: bool) -> Tensor:
    """Of a scalar, with zeros for parameters that it does not depend on, in float32 or better."""
    gradients = torch.autograd.grad(y, parameters, retain_graph=not last, allow_unused=True)
    flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    return torch.cat([g.to(torch.promote_types(g.dtype, torch.float32)).flatten() for g in flat])


def _groups(parameters: Sequence[nn.Parameter], gradients: int) -> list[list[nn.Parameter]]:
    """Parameters of which `gradients` gradients each are kept together."""
    groups: list[list[nn.Parameter]] = []
    size = math.inf
    for p in parameters:
        size += 8 * gradients * p.numel()  # the stacked copy, too
        if size > GRADIENT_BYTES:
            groups.append([])
            size = 8.0 * gradients * p.numel()
        groups[-1].append(p)
    return groups
