"""`fuse`: shrink the FFNs of a loaded model in place."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mlp_fusion.architectures import Architecture, FFNSite
from mlp_fusion.checkpoint.folding import unfold_on_load
from mlp_fusion.checkpoint.metadata import check_config, fused_config, replace_config
from mlp_fusion.errors import InputError
from mlp_fusion.measure import FFNRow, FusionReport, capture_activations, ffn_errors, random_batch, relative_error
from mlp_fusion.measure.activations import Activations, Batch
from mlp_fusion.methods import Method, Reduction, get_method
from mlp_fusion.neurons import NeuronBundle
from mlp_fusion.selection import Layers, Width, parameterization_for, resolve_layers, resolve_width

#: Called as `progress(done, total)` with FFNs.
Progress = Callable[[int, int], None]

#: Token positions that errors are measured on; the kernels need this many squared numbers.
SAMPLE_ROWS = 512
#: Bytes of neuron vectors that a method works on side by side.
BATCH_BYTES = 256 * 2**20
#: An entry's forward pass must agree with the model's own to this many units of rounding, and to this share at most.
_SELF_TEST_ULPS, _SELF_TEST_SHARE = 64, 0.05


def fuse(
    model: nn.Module,
    width: Width,
    layers: Layers = None,
    method: str = "fusion",
    *,
    optimizer: str | None = "adamw",
    seed: int = 0,
    sample: Batch | Iterable[Batch] | None = None,
    progress: Progress | None = None,
) -> FusionReport:
    """Shrink the FFNs of a loaded Hugging Face model, in place.

    The model then trains like any other, in a bare loop or in `transformers.Trainer`; `save_pretrained` writes a plain
    checkpoint. Build the optimiser after this call: the FFNs' parameters are new.

    Args:
        model: a `PreTrainedModel` of a supported architecture, in memory, unquantised, without adapters.
        width: neurons to keep in each FFN: a count (`768`) or a share (`0.25`), the share rounded to a multiple that
            engines can serve.
        layers: which layers: None or `"all"`, a range, a list, or a text such as `"4-11"` or `"last:8"`.
        method: name of the compression method.
        optimizer: what the model will be trained with; picks the parameterization that keeps its training dynamics:
            explicit scale for Adam-like ones, split scale for SGD-like ones, None folds the scale (inference).
        seed: of the method, of the sample's rows and of the sample itself where none is given.
        sample: batches that the reported errors are measured on, as a tokenizer returns them. None: random token ids,
            which run the real layers but are not real text.
        progress: called as `progress(done, total)` while FFNs are worked on.

    Returns:
        A `FusionReport` with a row per FFN.

    Raises:
        InputError: the model or an option cannot be worked on; the model is then as it was.
    """
    started = time.perf_counter()
    architecture, sites = find_ffns(model)
    config: Any = model.config
    parameterization = parameterization_for(optimizer)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise InputError(f"seed {seed!r}: give an integer from 0 to 2**63 - 1")
    reducer = get_method(method)
    indices = set(resolve_layers(layers, [site.index for site in sites]))
    chosen = [site for site in sites if site.index in indices]
    originals = [architecture.read(site, config) for site in chosen]
    widths = [resolve_width(width, bundle.width) for bundle in originals]
    _check_finite(model)
    before = count_parameters(model)

    batches = random_batch(model, seed=seed) if sample is None else sample
    activations = capture_activations(model, architecture, chosen, batches, rows=SAMPLE_ROWS, seed=seed)
    for site, bundle, rows in zip(chosen, originals, activations, strict=True):
        _self_test(architecture, site, bundle, rows)

    reduced = _reduce(reducer, originals, widths, seed, progress)
    report_rows = [
        _row(site, original, reduction, parameterization, seconds, sampled)
        for site, original, (reduction, seconds), sampled in zip(chosen, originals, reduced, activations, strict=True)
    ]
    after_widths = {site.index: architecture.neurons(site) for site in sites}
    after_widths.update({site.index: k for site, k in zip(chosen, widths, strict=True)})
    changed = fused_config(
        config, architecture, after_widths, sorted(indices), method=method, form=parameterization
    )  # fmt: skip
    # Everything that can go wrong has gone right: only now is the model touched.
    for site, (reduction, _) in zip(chosen, reduced, strict=True):
        architecture.install(site, reduction.bundle, parameterization)
    replace_config(model, changed)
    unfold_on_load(model, architecture)
    after = count_parameters(model)
    return FusionReport(
        model_type=config.model_type,
        method=method,
        optimizer=optimizer,
        parameterization=parameterization,
        seed=seed,
        sample="random token ids" if sample is None else "the given sample",
        sample_rows=len(activations[0].x),
        parameters_before=before[0],
        parameters_after=after[0],
        bytes_before=before[1],
        bytes_after=after[1],
        seconds=time.perf_counter() - started,
        rows=report_rows,
    )


def find_ffns(model: nn.Module) -> tuple[Architecture, list[FFNSite]]:
    """The architecture of `model` and its unfused FFNs.

    Raises:
        InputError: not a Hugging Face model, one that `check_config` refuses, or no FFN found.
    """
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if not model_type:
        raise InputError(f"{type(model).__name__} has no config.model_type: give a Hugging Face model")
    architecture = check_config(config)
    sites = architecture.sites(model)
    if not sites:
        raise InputError(f"no FFN found in {type(model).__name__} where the {model_type!r} architecture has them")
    layers = config.num_hidden_layers
    if [site.index for site in sites] != list(range(layers)):
        raise InputError(f"the model has {len(sites)} FFNs, its config says {layers} layers: mend the config")
    if any("base_layer" in name for name, _ in model.named_modules()):
        raise InputError("the model carries adapters: merge adapters into the weights first (merge_and_unload)")
    return architecture, sites


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Number and bytes of the model's parameters; tied ones count once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters)


def _check_finite(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and parameter.is_floating_point() and not bool(parameter.isfinite().all()):
            raise InputError(f"{name} holds NaN or Inf: the checkpoint is damaged")


def _self_test(architecture: Architecture, site: FFNSite, bundle: NeuronBundle, rows: Activations) -> None:
    """Compare the bundle with the model's own FFN on real inputs: a wrong entry must not pass unnoticed."""
    bundle = _working_precision(bundle)
    exact = bundle.forward(rows.x.to(bundle.w_in.dtype))[0]
    error = relative_error(rows.y, exact)
    epsilon = torch.finfo(rows.y.dtype).eps
    if rows.y.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        # TF32 or bfloat16 products under a float32 name.
        epsilon = torch.finfo(torch.bfloat16).eps
    limit = min(_SELF_TEST_ULPS * epsilon, _SELF_TEST_SHARE)
    if not error <= limit:
        raise InputError(
            f"{site.path}: this FFN does not compute what the {architecture.model_types[0]!r} architecture says "
            f"(relative difference {error:.1e}): its code or its activation is not the standard one"
        )


def _working_precision(bundle: NeuronBundle) -> NeuronBundle:
    """float64 stays; anything lower is worked on in float32."""
    return bundle.to(dtype=torch.promote_types(bundle.w_in.dtype, torch.float32))


def _reduce(
    reducer: Method, bundles: Sequence[NeuronBundle], widths: Sequence[int], seed: int, progress: Progress | None
) -> list[tuple[Reduction, float]]:
    """Reduce FFNs of one shape side by side; a `(reduction of one, seconds)` per bundle, in their order."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for number, (bundle, width) in enumerate(zip(bundles, widths, strict=True)):
        groups.setdefault((bundle.layout, bundle.w_in.device, width), []).append(number)
    results: dict[int, tuple[Reduction, float]] = {}
    for members in groups.values():
        first = bundles[members[0]]
        problem_bytes = 4 * first.width * first.vectors().shape[-1]
        size = max(1, BATCH_BYTES // problem_bytes)
        for chunk in (members[i : i + size] for i in range(0, len(members), size)):
            started = time.perf_counter()
            stacked = _working_precision(NeuronBundle.stack([bundles[n] for n in chunk]))
            reduction = reducer(stacked, widths[chunk[0]], seed=seed)
            seconds = (time.perf_counter() - started) / len(chunk)
            for position, n in enumerate(chunk):
                results[n] = (_select(reduction, position), seconds)
            if progress is not None:
                progress(len(results), len(bundles))
    return [results[n] for n in range(len(bundles))]


def _select(reduction: Reduction, index: int) -> Reduction:
    def pick(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[index : index + 1]

    return Reduction(
        bundle=reduction.bundle.select(index),
        counts=pick(reduction.counts),
        inertia=pick(reduction.inertia),
        iterations=pick(reduction.iterations),
        status=(reduction.status[index],),
    )


def _row(
    site: FFNSite,
    original: NeuronBundle,
    reduction: Reduction,
    parameterization: str,
    seconds: float,
    sampled: Activations,
) -> FFNRow:
    fused = reduction.bundle.parameterized(parameterization)
    original = _working_precision(original)
    errors = ffn_errors(original, fused, sampled.x.to(original.w_in.dtype))
    counts = reduction.counts
    return FFNRow(
        layer=site.index,
        path=site.path,
        neurons_before=original.width,
        neurons_after=fused.width,
        output_error=errors.output,
        ntk_error=errors.ntk,
        largest_cluster=None if counts is None else int(counts.max()),
        singletons=None if counts is None else int((counts == 1).sum()),
        empty_clusters=None if counts is None else int((counts == 0).sum()),
        status=reduction.status[0],
        seconds=seconds,
    )
