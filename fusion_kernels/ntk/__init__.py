"""The empirical neural tangent kernel of a feed-forward block, without Jacobians."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from fusion_kernels.activations import get_activation
from fusion_kernels.library import Backend, operator
from fusion_kernels.reference import ntk as reference

__all__ = ["Block", "Bundle", "Kernel", "ntk_gram"]

Kernel = Literal["gd", "sign"]

_PARTS = ("w_in", "b_in", "w_gate", "b_gate", "w_out", "b_out")


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


def _fake(x1: Tensor, x2: Tensor | None, *_: object) -> Tensor:
    return x1.new_empty(x1.shape[0], (x1 if x2 is None else x2).shape[0])


_NTK_GRAM = operator(
    "ntk_gram",
    "(Tensor x1, Tensor? x2, Tensor w_in, Tensor? w_gate, Tensor? b_in, Tensor? b_gate, Tensor w_out, Tensor? scale, "
    "float scale_exponent, str activation, str[] params, str kernel) -> Tensor",
    _fake,
)
_NTK_GRAM.register(Backend("reference", reference.ntk_gram, ("cpu", "cuda")))


def _checked(bundle: Bundle, x1: Tensor, x2: Tensor | None) -> dict[str, Tensor]:
    """Return the tensors of the call by name, detached, in the dtype of the computation and without B.

    Raises:
        ValueError: see `ntk_gram`.
    """
    if bundle.w_in.ndim != 3 or bundle.w_out.ndim != 3:
        raise ValueError(
            f"w_in and w_out must have three dimensions, (1, neurons, d) and (1, neurons, outputs): "
            f"got {tuple(bundle.w_in.shape)} and {tuple(bundle.w_out.shape)}"
        )
    batch, neurons, d = bundle.w_in.shape
    if batch != 1:
        raise ValueError(f"ntk_gram takes one block at a time: w_in has a batch of {batch}, select one of them")
    given = {"x1": x1, "x2": x2, **{name: getattr(bundle, name) for name in (*_PARTS, "scale")}}
    tensors = {name: t.detach() for name, t in given.items() if t is not None}
    if "b_gate" in tensors and "w_gate" not in tensors:
        raise ValueError("b_gate is there without w_gate")

    outputs = bundle.w_out.shape[2]
    shapes = {
        "w_in": (1, neurons, d),
        "w_gate": (1, neurons, d),
        "b_in": (1, neurons),
        "b_gate": (1, neurons),
        "w_out": (1, neurons, outputs),
        "b_out": (1, outputs),
        "scale": (1, neurons),
    }
    dtype = torch.float32
    for name, t in tensors.items():
        if name in ("x1", "x2"):
            if t.ndim != 2 or t.shape[1] != d:
                raise ValueError(f"{name} must be (N, {d}) for this block, got {tuple(t.shape)}")
        elif tuple(t.shape) != shapes[name]:
            raise ValueError(f"{name} must be {shapes[name]}, got {tuple(t.shape)}")
        if t.device != x1.device:
            raise ValueError(f"{name} is on {t.device}, x1 is on {x1.device}")
        if name == "scale":  # cluster sizes may be integers; they do not decide the dtype
            continue
        if not t.is_floating_point():
            raise ValueError(f"{name} must have a floating-point dtype, got {t.dtype}")
        dtype = torch.promote_types(dtype, t.dtype)

    tensors = {name: (t if name in ("x1", "x2") else t[0]).to(dtype) for name, t in tensors.items()}
    for name, t in tensors.items():
        if not bool(t.isfinite().all()):
            raise ValueError(f"{name} has values that are not finite")
    if bundle.scale_exponent != 0 and "scale" in tensors:
        p = tensors["scale"]
        if bool((p < 0).any()):
            raise ValueError(f"scale must not be negative where its exponent is not 0 (it is {bundle.scale_exponent})")
        if bool((p == 0).any()):
            # An empty cluster is a silent neuron: no output, no gradient. Powers of its scale would be infinite.
            names = [name for name in ("w_in", "w_gate", "b_in", "b_gate", "w_out", "scale") if name in tensors]
            tensors.update({name: tensors[name][p > 0] for name in names})
    return tensors


def _parts(block: Block, params: str | Sequence[str] | None, present: Sequence[str]) -> list[str]:
    """Return the parts to count, in the order of `_PARTS`.

    Raises:
        ValueError: an unknown part, one that is not `present`, or none at all.
    """
    if params is None:
        trainable_parts = getattr(block, "trainable_parts", None)
        params = present if trainable_parts is None else trainable_parts()
    wanted = (params,) if isinstance(params, str) else tuple(params)
    for part in wanted:
        if part not in _PARTS:
            raise ValueError(f"unknown part {part!r}: use some of {', '.join(_PARTS)}")
        if part not in present:
            raise ValueError(f"this block has no {part}: its parts are {', '.join(present)}")
    if not wanted:
        raise ValueError(f"no part to differentiate by: unfreeze one or name it in params, of {', '.join(present)}")
    return [part for part in _PARTS if part in wanted]


def ntk_gram(
    block: Block,
    x1: Tensor,
    x2: Tensor | None = None,
    reduce: Literal["trace"] = "trace",
    *,
    params: str | Sequence[str] | None = None,
    kernel: Kernel = "gd",
    backend: str = "auto",
) -> Tensor:
    """Return the empirical neural tangent kernel of a feed-forward block between two sets of inputs.

    With F_o the outputs and theta the parameters as the block stores them,

        gd      K(x, x') = sum_o sum_theta dF_o(x)/dtheta dF_o(x')/dtheta           what a step of gradient descent sees
        sign    K(x, x') = sum_o sum_theta dF_o(x)/dtheta sign(dF_o(x')/dtheta)     what a step of sign descent or Adam
                                                                                    sees; sign(0) = 0; not symmetric

    both in closed form, at the cost of products of (N, d) and (N, neurons) matrices and of the memory of a few
    (N1, N2) and (N, neurons) ones. The kernel is a sum over parts: the share of some is what `params` gives with only
    those. How it depends on where a fused block keeps its cluster sizes is the subject of MLP Fusion.

    Args:
        block: a `NeuronBundle`, a `FusedMLP` or whatever has `as_bundle()`; its batch dimension must be 1.
        x1: (N1, d) float16, bfloat16, float32 or float64; N1 may be 0. The product is computed in the widest dtype
            among the inputs and the block, at least float32.
        x2: (N2, d), or None for `x1`.
        reduce: `"trace"`, the sum (not the mean) over outputs.
        params: the parts to differentiate by, one or several of `w_in`, `b_in`, `w_out`, `b_out`, and in a gated block
            `w_gate`, `b_gate` (`w_in`, `b_in` are then the up projection). By default the block's `trainable_parts()`,
            or all it has where it does not offer them. The scale is never one of them.
        kernel: `"gd"` or `"sign"`.
        backend: `"auto"`, or the name of one to insist on.

    Returns:
        (N1, N2) float32 or float64, on the inputs' device. For `"gd"` without `x2` it is exactly symmetric, and
        positive semidefinite up to rounding. It is computed on detached tensors: nothing can be differentiated through
        it.

    Raises:
        ValueError: a shape, dtype, device, part, kernel, reduction, activation or backend that does not fit, a batch of
            blocks, an empty choice of parts, a negative scale whose exponent is not 0, or a tensor with values that
            are not finite; the message names it.
        BackendUnavailableError: `backend` cannot run here.

    Sources: Jacot et al., "Neural Tangent Kernel: Convergence and Generalization in Neural Networks", 2018, arXiv
    1806.07572; Wei et al., "NTK-approximating MLP Fusion for Efficient Language Model Fine-tuning", 2023, arXiv
    2307.08941.
    """
    if reduce != "trace":
        raise ValueError(f"unknown reduction {reduce!r}: use 'trace'")
    if kernel not in get_args(Kernel):
        raise ValueError(f"unknown kernel {kernel!r}: use one of {', '.join(get_args(Kernel))}")
    chosen = _NTK_GRAM.select(backend, x1.device)
    bundle = block.as_bundle()
    get_activation(bundle.activation)
    tensors = _checked(bundle, x1, x2)
    parts = _parts(block, params, [part for part in _PARTS if part in tensors])
    function = _NTK_GRAM.overload if backend == "auto" else chosen.function
    names = ("x1", "x2", "w_in", "w_gate", "b_in", "b_gate", "w_out", "scale")
    exponent = float(bundle.scale_exponent)
    return function(*(tensors.get(name) for name in names), exponent, bundle.activation, parts, kernel)
