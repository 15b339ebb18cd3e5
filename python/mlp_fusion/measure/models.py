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
from mlp_fusion.architectures import Architecture, FFNSite, get_architecture
from mlp_fusion.errors import InputError
from mlp_fusion.measure.activations import Batch, capture_activations, take_batches
from mlp_fusion.measure.errors import ffn_parts, relative_error

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
        directions: draws of random signs over the outputs; their mean estimates the sum of the kernel over outputs.
        relative_error, cosine, alignment, trace: as in `KernelRow`.
    """

    samples: int
    directions: int
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
        """Plain JSON types."""
        return dataclasses.asdict(self)


def compare_models(
    original: nn.Module,
    other: nn.Module,
    sample: Batch | Iterable[Batch],
    *,
    rows: int = 2048,
    kernel: Kernel = "gd",
    samples: int = 16,
    directions: int = 4,
    outputs: Outputs | None = None,
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
        samples: sequences of the first batches that the network's kernel is measured on; 0 for no such kernel.
        directions: see `NetworkKernel`.
        outputs: what the network's outputs are; mean-pooled last hidden states when None.
        seed: of the drawn positions and directions.

    Raises:
        InputError: unknown architecture, models that do not match, or a sample that they cannot run on.
    """
    architecture, pairs = _matching_sites(original, other)
    batches = take_batches(sample, max(rows, 1))
    activations = capture_activations(
        original, architecture, [site for site, _ in pairs], batches, rows=rows, seed=seed
    )  # fmt: skip
    found = []
    for (site, counterpart), inputs in zip(pairs, activations, strict=True):
        blocks = [architecture.read(s, m.config) for s, m in ((site, original), (counterpart, other))]
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
        network = _compare_networks(architecture, pairs, (original, other), taken, kernel, directions, outputs, seed)
    return ModelComparison(kernel, len(activations[0].x), found, network)


def _matching_sites(original: nn.Module, other: nn.Module) -> tuple[Architecture, list[tuple[FFNSite, FFNSite]]]:
    types = [getattr(getattr(model, "config", None), "model_type", None) for model in (original, other)]
    if types[0] is None or types[0] != types[1]:
        raise InputError(f"the models are a {types[0]!r} and a {types[1]!r}: compare two models of one architecture")
    architecture = get_architecture(types[0])
    sites = [architecture.sites(model) for model in (original, other)]
    if not sites[0] or len(sites[0]) != len(sites[1]):
        raise InputError(f"the models have {len(sites[0])} and {len(sites[1])} FFNs: compare a model with its own copy")
    return architecture, list(zip(*sites, strict=True))


def pooled(model: nn.Module, batch: Batch) -> Tensor:
    """(samples, hidden): means of the last hidden states over each sequence's tokens."""
    base: Any = getattr(model, "base_model", model)
    hidden: Tensor = base(**batch).last_hidden_state
    mask = batch.get("attention_mask")
    if mask is None:
        return hidden.mean(1)
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)


def _first_samples(batches: Sequence[Batch], samples: int) -> list[dict[str, Tensor]]:
    """Single sequences, without their padding where that is at the end."""
    found: list[dict[str, Tensor]] = []
    for batch in batches:
        for i in range(len(batch["input_ids"])):
            one = {name: value[i : i + 1] for name, value in batch.items()}
            mask = one.get("attention_mask")
            if mask is not None and bool(mask.any()):
                length = int(mask[0].nonzero().max()) + 1
                one = {name: value[:, :length] for name, value in one.items()}
            found.append(one)
            if len(found) == samples:
                return found
    return found


def _compare_networks(
    architecture: Architecture,
    pairs: Sequence[tuple[FFNSite, FFNSite]],
    models: tuple[nn.Module, nn.Module],
    samples: list[dict[str, Tensor]],
    kernel: Kernel,
    directions: int,
    outputs: Outputs | None,
    seed: int,
) -> NetworkKernel:
    a, b = (
        _network_kernel(model, _ffn_parameters(architecture, [pair[side] for pair in pairs]), samples, kernel,
                        directions, outputs or pooled, seed)
        for side, model in enumerate(models)
    )  # fmt: skip
    centre = torch.eye(len(a), dtype=a.dtype) - 1.0 / len(a)
    return NetworkKernel(
        samples=len(samples),
        directions=directions,
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
        for role in architecture.projections:
            found.extend(architecture.projection(site, role).parameters())
        fused = architecture.fused(site)
        if fused is not None and isinstance(fused.scale, nn.Parameter):
            found.append(fused.scale)
    return found


def _network_kernel(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    samples: Sequence[dict[str, Tensor]],
    kernel: Kernel,
    directions: int,
    outputs: Outputs,
    seed: int,
) -> Tensor:
    """(N, N) float64 on the CPU: the kernel summed over outputs, estimated by random signs over them."""
    device = next(model.parameters()).device
    required = [p.requires_grad for p in parameters]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    total = torch.zeros(len(samples), len(samples), dtype=torch.float64)
    try:
        for p in parameters:
            p.requires_grad_(True)
        for group in _groups(parameters, len(samples)):
            generator = torch.Generator().manual_seed(seed)
            for _ in range(directions):
                signs: Tensor | None = None
                rows = []
                for sample in samples:
                    y = outputs(model, {name: value.to(device) for name, value in sample.items()}).float()
                    if signs is None:
                        signs = torch.randint(0, 2, y.shape[1:], generator=generator).mul_(2).sub_(1).to(y)
                    gradients = torch.autograd.grad((y[0] * signs).sum(), group)
                    rows.append(torch.cat([g.float().flatten() for g in gradients]))
                jacobian = torch.stack(rows)
                other = jacobian.sign() if kernel == "sign" else jacobian
                total += (jacobian @ other.T).double().cpu()
    finally:
        for p, flag in zip(parameters, required, strict=True):
            p.requires_grad_(flag)
        for module, training in modes.items():
            module.training = training
    return total / directions


def _groups(parameters: Sequence[nn.Parameter], samples: int) -> list[list[nn.Parameter]]:
    """Parameters whose gradients for all samples are kept together."""
    groups: list[list[nn.Parameter]] = []
    size = math.inf
    for p in parameters:
        size += 8 * samples * p.numel()  # the stacked copy, too
        if size > GRADIENT_BYTES:
            groups.append([])
            size = 8.0 * samples * p.numel()
        groups[-1].append(p)
    return groups
