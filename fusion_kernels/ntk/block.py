"""A feed-forward block as the tangent-kernel functions take it: its neurons, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from fusion_kernels.activations import get_activation
from fusion_kernels.library import check_name
from fusion_kernels.ntk.sharing import check_untied

Kernel = Literal["gd", "sign"]

#: The parts of a block, in the order in which they are always named.
PARTS = ("w_in", "b_in", "w_gate", "b_gate", "w_out", "b_out")
#: Of these, the ones with an axis of neurons.
_NEURONS = ("w_in", "w_gate", "b_in", "b_gate", "w_out", "scale")


class Bundle(Protocol):
    """A feed-forward block as its neurons; B is 1 wherever an NTK is asked for.

    With p the scale (1 where it is None) and a its exponent, the block computes

        plain   y = sum_j p_j^(1-a)  phi((w_in_j.x + b_in_j) / p_j^a) w_out_j + b_out
        gated   y = sum_j p_j^(1-2a) phi((w_gate_j.x + b_gate_j) / p_j^a) (w_in_j.x + b_in_j) w_out_j + b_out

    so that a = 0 is the explicit multiplication by the cluster sizes p and a = 1/2 the square-root split.

    Attributes:
        w_in: (B, neurons, d); the up projection of a gated block.
        w_gate: (B, neurons, d), or None for a plain block.
        b_in, b_gate: (B, neurons) or None.
        w_out: (B, neurons, outputs).
        b_out: (B, outputs) or None.
        scale: (B, neurons) or None, of a floating-point or integer dtype.
        scale_exponent: a.
        activation: name of phi in `fusion_kernels.activations`.
    """

    @property
    def w_in(self) -> Tensor: ...
    @property
    def w_gate(self) -> Tensor | None: ...
    @property
    def b_in(self) -> Tensor | None: ...
    @property
    def b_gate(self) -> Tensor | None: ...
    @property
    def w_out(self) -> Tensor: ...
    @property
    def b_out(self) -> Tensor | None: ...
    @property
    def scale(self) -> Tensor | None: ...
    @property
    def scale_exponent(self) -> float: ...
    @property
    def activation(self) -> str: ...


class Block(Protocol):
    """Anything that can be seen as a `Bundle`.

    A block may also offer `trainable_parts() -> tuple[str, ...]`: the parts that count in its NTK unless the caller
    names others.
    """

    def as_bundle(self) -> Bundle: ...


def bundle_of(block: Block) -> Bundle:
    """The block's tensors.

    Raises:
        TypeError: it is nothing that has them.
    """
    if not hasattr(block, "as_bundle"):
        raise TypeError(
            f"block is a {type(block).__name__}: give what has as_bundle(), a mlp_fusion.NeuronBundle, FusedMLP or "
            "FusedGLU (FusedMLP.from_mlp makes one of two linear layers)"
        )
    return block.as_bundle()


@dataclass(frozen=True)
class Prepared:
    """One block and the rows it is asked about: detached, checked, in one dtype, without the batch dimension.

    Attributes:
        rows: name -> (N, d).
        tensors: part (or `"scale"`) -> tensor, for those that the block has; without the neurons of scale 0 where the
            exponent is not 0.
        kept: (neurons,) bool, the neurons that are in `tensors`; None for all.
        parts: the parts to differentiate by.
        metric: (neurons,) or None.
    """

    rows: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor]
    kept: Tensor | None
    exponent: float
    activation: str
    parts: list[str]
    metric: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors["w_in"].dtype

    @property
    def outputs(self) -> int:
        """O, how many outputs the block has."""
        return self.tensors["w_out"].shape[1]

    def arguments(self) -> tuple[Tensor | None, ...]:
        """The block's tensors in the order of the operators' schemas."""
        return tuple(self.tensors.get(name) for name in ("w_in", "w_gate", "b_in", "b_gate", "w_out", "scale"))

    def described(self) -> tuple[Tensor | float | str | None, ...]:
        """These tensors, a and the activation, as every operator takes them behind its rows."""
        return (*self.arguments(), self.exponent, self.activation)


def check_kernel(kernel: str) -> None:
    """Raise ValueError unless `kernel` is one of `Kernel`."""
    check_name("kernel", kernel, get_args(Kernel))


def all_finite(t: Tensor) -> bool:
    """Whether no value of `t` is infinite or NaN."""
    # One pass that allocates nothing; both NaN and infinities survive it.
    return not t.numel() or bool(torch.stack(t.aminmax()).isfinite().all())


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with a value that is infinite or NaN; all are of one dtype and device."""
    # All at once: where they lie on a GPU, every answer waits for it.
    extremes = [extreme for t in tensors.values() if t.numel() for extreme in t.aminmax()]
    if not extremes or bool(torch.stack(extremes).isfinite().all()):
        return None
    return next(name for name, t in tensors.items() if not all_finite(t))


def _shapes(bundle: Bundle) -> dict[str, tuple[int, ...]]:
    """The shape that each tensor of the bundle must have.

    Raises:
        ValueError: `w_in` and `w_out` are not three-dimensional, or B is not 1.
    """
    if bundle.w_in.ndim != 3 or bundle.w_out.ndim != 3:
        raise ValueError(
            f"w_in and w_out must have three dimensions, (1, neurons, d) and (1, neurons, outputs): "
            f"got {tuple(bundle.w_in.shape)} and {tuple(bundle.w_out.shape)}"
        )
    batch, neurons, d = bundle.w_in.shape
    if batch != 1:
        raise ValueError(f"a tangent kernel is of one block: w_in has a batch of {batch}, select one of them")
    outputs = bundle.w_out.shape[2]
    return {
        "w_in": (1, neurons, d),
        "w_gate": (1, neurons, d),
        "b_in": (1, neurons),
        "b_gate": (1, neurons),
        "w_out": (1, neurons, outputs),
        "b_out": (1, outputs),
        "scale": (1, neurons),
    }


def prepare(
    block: Block,
    rows: Mapping[str, Tensor | None],
    params: str | Sequence[str] | None,
    metric: Tensor | None,
    others: Mapping[str, Tensor | None] | None = None,
) -> Prepared:
    """Check a call, and bring its tensors into the dtype of the computation.

    Args:
        rows: name -> (N, d) inputs, or None for those that are not given; the first is there.
        params, metric: as in `ntk_gram`.
        others: further tensors whose dtype, device and values are to be checked, and whose shapes are the caller's
            business; they are returned among the rows.

    Raises:
        ValueError: see `ntk_gram`.
    """
    bundle = bundle_of(block)
    get_activation(bundle.activation)
    shapes = _shapes(bundle)
    d = shapes["w_in"][2]
    given = {**rows, **(others or {}), **{name: getattr(bundle, name) for name in (*PARTS, "scale")}, "metric": metric}
    own = {name: t for name in (*PARTS, "scale") if (t := given[name]) is not None}
    parts = _parts(block, params, [part for part in PARTS if part in own])
    check_untied(block, own, parts)
    tensors = {name: t.detach() for name, t in given.items() if t is not None}
    if "b_gate" in tensors and "w_gate" not in tensors:
        raise ValueError("b_gate is there without w_gate")
    device = tensors[next(iter(rows))].device

    dtype = torch.float32
    for name, t in tensors.items():
        if name in rows:
            if t.ndim != 2 or t.shape[1] != d:
                raise ValueError(f"{name} must be (N, {d}) for this block, got {tuple(t.shape)}")
        elif name == "metric":
            if tuple(t.shape) != shapes["b_in"][1:]:
                raise ValueError(f"metric must be {shapes['b_in'][1:]}, one per neuron, got {tuple(t.shape)}")
        elif name in shapes and tuple(t.shape) != shapes[name]:
            raise ValueError(f"{name} must be {shapes[name]}, got {tuple(t.shape)}")
        if t.device != device:
            raise ValueError(f"{name} is on {t.device}, {next(iter(rows))} is on {device}")
        if name in ("scale", "metric"):  # may be integers (cluster sizes); they do not decide the dtype
            continue
        if not t.is_floating_point():
            raise ValueError(f"{name} must have a floating-point dtype, got {t.dtype}")
        dtype = torch.promote_types(dtype, t.dtype)

    tensors = {name: (t[0] if name in shapes else t).to(dtype) for name, t in tensors.items()}
    unfit = first_not_finite(tensors)
    if unfit is not None:
        raise ValueError(f"{unfit} has values that are not finite")
    weights = tensors.pop("metric", None)
    if weights is not None and bool((weights < 0).any()):
        raise ValueError("metric must not be negative")
    kept = None
    if bundle.scale_exponent != 0 and "scale" in tensors:
        p = tensors["scale"]
        if bool((p < 0).any()):
            raise ValueError(f"scale must not be negative where its exponent is not 0 (it is {bundle.scale_exponent})")
        if bool((p == 0).any()):
            # An empty cluster is a silent neuron: no output, no gradient. Powers of its scale would be infinite.
            kept = p > 0
            tensors.update({name: tensors[name][kept] for name in _NEURONS if name in tensors})
            weights = None if weights is None else weights[kept]
    own = {name: t for name, t in tensors.items() if name in shapes}
    return Prepared(
        {name: t for name, t in tensors.items() if name not in shapes},
        own,
        kept,
        float(bundle.scale_exponent),
        bundle.activation,
        parts,
        weights,
    )


def _parts(block: Block, params: str | Sequence[str] | None, present: Sequence[str]) -> list[str]:
    """Return the parts to count, in the order of `PARTS`.

    Raises:
        ValueError: an unknown part, one that is not `present`, or none at all.
    """
    if params is None:
        trainable_parts = getattr(block, "trainable_parts", None)
        params = present if trainable_parts is None else trainable_parts()
    wanted = (params,) if isinstance(params, str) else tuple(params)
    for part in wanted:
        if part not in PARTS:
            raise ValueError(f"unknown part {part!r}: use some of {', '.join(PARTS)}")
        if part not in present:
            raise ValueError(f"this block has no {part}: its parts are {', '.join(present)}")
    if not wanted:
        raise ValueError(f"no part to differentiate by: unfreeze one or name it in params, of {', '.join(present)}")
    return [part for part in PARTS if part in wanted]
