"""Feed-forward blocks of few neurons, plain and gated, forward and backward: `fused_mlp` and `fused_glu_mlp`.

After fusion the hidden layer is narrow, and what decides is how often its activations cross the memory. Both functions
are one operator each way (`fusion_kernels::mlp`, `fusion_kernels::mlp_backward`), one node under `torch.compile` unless
torch's own operations are the choice. The reference in `fusion_kernels.mlp.reference` specifies what every backend
computes and holds the formulas.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusion_kernels import gpu, native, transforms
from fusion_kernels.activations import ACTIVATIONS
from fusion_kernels.ffn import FFN
from fusion_kernels.gates import PLAIN, Gate
from fusion_kernels.mlp import cpu_backend, gpu_backend, reference_backend, torch_backend
from fusion_kernels.mlp import reference as reference
from fusion_kernels.mlp.checks import FLOATS, SCALES, check_options, check_tensors
from fusion_kernels.mlp.folding import with_one_factor
from fusion_kernels.mlp.operators import MLP, Inlined, Stored, without_autocast
from fusion_kernels.pinning import Pin
from fusion_kernels.proof import Proof

__all__ = ["fused_glu_mlp", "fused_mlp", "mlp_backend", "split_gate_up"]

_composed = without_autocast(reference.mlp)

MLP.register(
    "cpu", cpu_backend.forward, cpu_backend.backward, ("cpu",), lambda _: native.UNAVAILABLE, output=cpu_backend.output
)
MLP.register(
    "torch", reference_backend.forward, torch_backend.backward, ("cpu", "cuda"), inlined=Inlined(reference.mlp)
)
MLP.register("reference", reference_backend.forward, reference_backend.backward, ("cpu", "cuda"))
# Behind the others: by name, or where `choice` has them proved and measured to be faster.
_PROOF = Proof("mlp triton", "fusion_kernels.mlp.gpu_cases:blocks")
for _name, _forward, _backward in (
    ("cublas", gpu_backend.cublas_forward, gpu_backend.cublas_backward),
    ("epilogue", gpu_backend.epilogue_forward, gpu_backend.epilogue_backward),
):
    MLP.register(_name, *with_one_factor(_forward, _backward), ("cuda",), gpu.why_not, proof=_PROOF)
_resident = with_one_factor(gpu_backend.resident_forward, gpu_backend.epilogue_backward)
MLP.register("resident", *_resident, ("cuda",), gpu_backend.resident_why_not)

#: The process-wide choice of a backend of :func:`fused_mlp` and :func:`fused_glu_mlp`: `with mlp_backend("torch"):`.
mlp_backend = Pin(MLP.forward_operator)


def fused_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    scale: Tensor | None = None,
    activation: str = "gelu",
    checkpoint_level: int = 1,
    *,
    backend: str = "auto",
) -> Tensor:
    """Return y = (phi(x w1ᵀ + b1) * scale) w2ᵀ + b2, a feed-forward block with the size-scaling vector.

    The computation runs in the dtype of x, under autocast in autocast's, with float32 accumulation in the products (and
    float64 for float64). Weights of another dtype, such as float32 masters, are cast once per call. On a GPU the scale
    is folded into w2 in that cast, on a CPU it is part of the pass that computes the activation; its gradient comes
    from the product that gives w2's. Gradients have the dtype of what they belong to; tensors that do not require grad
    cost nothing in the backward.

    First derivatives run through the operator. Second and higher ones (`create_graph=True`) are right too, in plain
    torch. Under `torch.func` transforms and forward-mode AD the block runs as the composition of torch's operations
    that specifies it (`fusion_kernels.mlp.reference`): every transform works, without what the backends save.

    Args:
        x: (..., d) float16, bfloat16, float32 or float64, any number of tokens, contiguous or not.
        w1: (h, d), as in `torch.nn.Linear`, any h and d.
        b1: (h,) or None.
        w2: (d_out, h).
        b2: (d_out,) or None.
        scale: (h,) of a floating-point or integer dtype, or None for ones; differentiable where floating. Or (2, h),
            whose second row multiplies what goes into phi: phi(scale[1] * (x w1ᵀ + b1)) * scale[0].
        activation: phi, one of `gelu` (exact, by erf), `gelu_tanh`, `quick_gelu` (z sigmoid(1.702 z)), `relu`, `relu2`
            (squared ReLU), `silu`.
        checkpoint_level: which hidden tensors (tokens, h) are kept for the backward besides x: 0 the pre-activations
            and the activations; 1 the pre-activations; 2 none, at the price of computing the first product again.
            Nothing is kept where no gradient is needed.
        backend: `"auto"` for the process-wide pin (see :func:`mlp_backend`) or, without one, the best that is known
            to work here; or a name to insist on: `"cpu"` (compiled, tokens in chunks), `"torch"` (torch's operations),
            `"reference"`, and on CUDA `"cublas"`, `"epilogue"`, `"resident"` (forward that saves nothing only).

    Returns:
        (..., d_out) in the dtype of the computation, contiguous.

    Raises:
        ValueError: a shape, dtype, device, activation, level or backend that does not fit; the message names it.
        BackendUnavailableError: `backend` cannot run here.

    Source: Wei et al., "NTK-approximating MLP Fusion for Efficient Language Model Fine-tuning", 2023, arXiv 2307.08941,
    for the scale between activation and output projection.

    Examples:
        >>> x, w1, w2 = torch.randn(5, 8), torch.randn(16, 8), torch.randn(4, 16)
        >>> sizes = torch.arange(1, 17)
        >>> y = fusion_kernels.fused_mlp(x, w1, None, w2, None, sizes)
        >>> torch.allclose(y, (torch.nn.functional.gelu(x @ w1.T) * sizes) @ w2.T, atol=1e-3)
        True
    """
    stored = (w1, w2, None, b1, None, b2, scale)
    if not _fits(x, stored, activation, checkpoint_level):
        _check(x, stored, activation, checkpoint_level, {"w_in": "w1", "b_in": "b1", "w_out": "w2", "b_out": "b2"})
    return _run(x, stored, activation, PLAIN, checkpoint_level, backend)


def fused_glu_mlp(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    scale: Tensor | None = None,
    activation: str = "silu",
    checkpoint_level: int = 1,
    *,
    gating: Gate = PLAIN,
    backend: str = "auto",
) -> Tensor:
    """Return y = (phi(x w_gateᵀ + b_gate) * (x w_upᵀ + b_up) * scale) w_downᵀ + b_down, a gated feed-forward block.

    SwiGLU with `silu`, GeGLU with `gelu` or `gelu_tanh`, ReGLU with `relu` (Shazeer 2020, arXiv 2002.05202). What is
    said of :func:`fused_mlp` holds here. Limits of gate and up, and an offset of up, are those of `gating`.

    Args:
        x: (..., d).
        w_gate: (h, d); the halves of one stored tensor come from :func:`split_gate_up`.
        w_up: (h, d).
        w_down: (d_out, h).
        b_gate: (h,) or None.
        b_up: (h,) or None.
        b_down: (d_out,) or None.
        scale: (h,) or None; or (2, h), whose second row multiplies what goes into phi, which is the gate, and up as
            well where `gating` has limits or an offset.
        activation: phi.
        checkpoint_level: as in :func:`fused_mlp`; level 0 keeps three hidden tensors, level 1 two.
        gating: limits and offset, see :class:`Gate`; none by default.
        backend: as in :func:`fused_mlp`.

    Returns:
        (..., d_out) in the dtype of the computation, contiguous.

    Raises:
        ValueError: a shape, dtype, device, activation, level or backend that does not fit; the message names it.
        BackendUnavailableError: `backend` cannot run here.

    Examples:
        >>> x, w_down = torch.randn(5, 8), torch.randn(4, 16)
        >>> w_gate, w_up = torch.randn(16, 8), torch.randn(16, 8)
        >>> y = fusion_kernels.fused_glu_mlp(x, w_gate, w_up, w_down)
        >>> torch.allclose(y, (torch.nn.functional.silu(x @ w_gate.T) * (x @ w_up.T)) @ w_down.T, atol=1e-3)
        True
    """
    stored = (w_up, w_down, w_gate, b_up, b_gate, b_down, scale)
    if not _fits(x, stored, activation, checkpoint_level):
        names = {"w_in": "w_up", "b_in": "b_up", "w_out": "w_down", "b_out": "b_down"}
        _check(x, stored, activation, checkpoint_level, names)
    return _run(x, stored, activation, gating, checkpoint_level, backend)


def split_gate_up(weight: Tensor, layout: str = "concatenated") -> tuple[Tensor, Tensor]:
    """Return the gate and the up projection of a tensor that holds both, as views.

    The operators read the views where they lie, without copies, and their gradients meet in one tensor.

    Args:
        weight: (2 h, ...): a weight (2 h, d) or a bias (2 h,).
        layout: `"concatenated"` for all gate rows before all up rows (Phi-3, most fused SwiGLU layers), `"interleaved"`
            for gate and up rows in turn (gpt-oss).

    Returns:
        (gate, up), each (h, ...).

    Raises:
        ValueError: an odd number of rows, or an unknown layout.

    Examples:
        >>> both = torch.arange(12).reshape(6, 2)
        >>> gate, up = fusion_kernels.split_gate_up(both)
        >>> torch.equal(gate, both[:3]), torch.equal(up, both[3:])
        (True, True)
        >>> gate, up = fusion_kernels.split_gate_up(both, "interleaved")
        >>> torch.equal(gate, both[0::2]), torch.equal(up, both[1::2])
        (True, True)
    """
    if weight.ndim == 0 or weight.shape[0] % 2:
        raise ValueError(f"weight must have an even number of rows, gate and up: got {tuple(weight.shape)}")
    h = weight.shape[0] // 2
    if layout == "concatenated":
        gate, up = weight.unflatten(0, (2, h)).unbind(0)
    elif layout == "interleaved":
        gate, up = weight.unflatten(0, (h, 2)).unbind(1)
    else:
        raise ValueError(f"unknown layout {layout!r}: use concatenated or interleaved")
    return gate, up


def _run(x: Tensor, stored: Stored, activation: str, gating: Gate, checkpoint_level: int, backend: str) -> Tensor:
    """The block by the operator or, where that cannot be differentiated as is asked, by its specification."""
    if torch._C._is_any_autocast_enabled():
        device_type = x.device.type
        if torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device_type))
    if backend == "auto":
        backend = mlp_backend.name
    trains = torch.is_grad_enabled() and _requires_grad(x, *stored)
    if transforms.active():
        return _composed(x, FFN.of_linears(stored, activation, gating))
    # Level 2 asks for no more than y, so that nothing is made to be saved where no gradient is needed.
    level = checkpoint_level if trains else 2
    ndim = x.ndim
    if ndim == 2:
        return MLP.run(x, stored, activation, gating, level, backend, trains=trains)
    leading = x.shape[:-1]
    rows = x.reshape(math.prod(leading), x.shape[-1])
    y = MLP.run(rows, stored, activation, gating, level, backend, trains=trains)
    return y.reshape((*leading, y.shape[1]))


def _requires_grad(*tensors: Tensor | None) -> bool:
    for t in tensors:  # noqa: SIM110 - a generator takes as long as all else here
        if t is not None and t.requires_grad:
            return True
    return False


def _fits(x: Tensor, stored: Stored, activation: str, checkpoint_level: int) -> bool:
    """Whether all is as it usually is, in a few microseconds; what is not is for `_check` to judge."""
    w_in, w_out, w_gate, b_in, b_gate, b_out, scale = stored
    if w_in is None or w_out is None or w_in.ndim != 2 or w_out.ndim != 2 or x.ndim == 0:
        return False
    dtype, device, (h, d), d_out = w_in.dtype, x.device, w_in.shape, w_out.shape[0]
    return (
        activation in ACTIVATIONS
        and checkpoint_level in (0, 1, 2)
        and x.dtype in FLOATS
        and dtype in FLOATS
        and x.shape[-1] == d
        and w_out.shape[1] == h
        and w_in.device == device
        and w_out.device == device
        and w_out.dtype == dtype
        and (w_gate is None or (w_gate.shape == (h, d) and w_gate.dtype == dtype and w_gate.device == device))
        and (b_in is None or (b_in.shape == (h,) and b_in.dtype == dtype and b_in.device == device))
        and (b_gate is None or (b_gate.shape == (h,) and b_gate.dtype == dtype and b_gate.device == device))
        and (b_out is None or (b_out.shape == (d_out,) and b_out.dtype == dtype and b_out.device == device))
        and (scale is None or (scale.shape in ((h,), (2, h)) and scale.dtype in SCALES and scale.device == device))
    )


def _check(x: Tensor, stored: Stored, activation: str, checkpoint_level: int, names: dict[str, str]) -> None:
    """Raise a ValueError that names what does not fit, as `names` has it for the caller."""
    check_options(x, activation, checkpoint_level)
    for field, t in zip(("w_in", "w_out"), stored, strict=False):
        if t is None or t.ndim != 2:
            raise ValueError(f"{names[field]} must be a matrix, got {None if t is None else tuple(t.shape)}")
    ffn = FFN.of_linears(stored, activation)
    d = ffn.w_in.shape[1]
    if x.ndim == 0 or x.shape[-1] != d:
        raise ValueError(f"x must be (..., {d}) for this {names['w_in']}, got {tuple(x.shape)}")
    check_tensors(x, ffn, names, both_factors=True)
