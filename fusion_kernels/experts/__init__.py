"""The expert layers of Mixture-of-Experts models after fusion: `fused_experts`, the blocks of `fused_mlp` side by side.

The choices of all tokens are sorted by expert, and go through one operator each way (`fusion_kernels::experts`,
`fusion_kernels::experts_backward`), which takes the tokens as they are: what is kept for the backward has no copy of
them. Nothing here waits for a GPU to learn how many rows an expert has, unless the `loop` backend has to. Under
`torch.compile` the operator is one node, unless torch's grouped products of bfloat16 are the choice: these are inline.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusion_kernels import gpu, transforms
from fusion_kernels.experts import grouped_mm_backend, loop_backend, triton_backend
from fusion_kernels.experts import reference as reference
from fusion_kernels.experts.operators import EXPERTS, by_expert
from fusion_kernels.ffn import FFN
from fusion_kernels.gates import PLAIN, Gate
from fusion_kernels.mlp.checks import check_options, check_tensors
from fusion_kernels.mlp.operators import Inlined
from fusion_kernels.pinning import Pin
from fusion_kernels.proof import Proof

__all__ = ["experts_backend", "fused_experts"]

EXPERTS.register("loop", loop_backend.forward, loop_backend.backward, ("cpu", "cuda"))
EXPERTS.register(
    "grouped_mm",
    grouped_mm_backend.forward,
    grouped_mm_backend.backward,
    ("cpu", "cuda"),
    inlined=Inlined(grouped_mm_backend.composed, grouped_mm_backend.traceable),
)
# Behind the others: by name, or where it is proved and measured to be faster.
_PROOF = Proof("experts triton", "fusion_kernels.experts.gpu_cases:experts")
EXPERTS.register("triton", triton_backend.forward, triton_backend.backward, ("cuda",), gpu.why_not, proof=_PROOF)

#: The process-wide choice of a backend of :func:`fused_experts`: `with experts_backend("triton"):`.
experts_backend = Pin(EXPERTS.forward_operator)


def fused_experts(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    w_gate: Tensor | None = None,
    *,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    b_gate: Tensor | None = None,
    scale: Tensor | None = None,
    activation: str = "silu",
    gating: Gate = PLAIN,
    checkpoint_level: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Return y_t = sum_k weight_tk expert_(index_tk)(x_t), every expert a block as in `fused_mlp` or `fused_glu_mlp`.

    The result does not depend on the order in which experts are worked on, and has the same bits every time: every row
    is computed once and the k rows of a token are summed in their order. For the backward x is kept as it is, once for
    all k; where `top_k_weights` are trained, so are the k results of every token.

    Args:
        x: (T, d) tokens.
        top_k_index: (T, k) integer ids of each token's experts. Ids of E and above, and negative ones, stand for
            experts that live elsewhere: they contribute nothing.
        top_k_weights: (T, k) what each of them counts; differentiable.
        w_in: (E, h, d) input projections, of gated blocks the up projections.
        w_out: (E, d_out, h) output projections.
        w_gate: (E, h, d) gate projections, or None for plain blocks.
        b_in: (E, h) or None.
        b_out: (E, d_out) or None.
        b_gate: (E, h) or None.
        scale: (E, h) cluster sizes of fused neurons, or None for ones.
        activation: a name in `fusion_kernels.activations`.
        gating: limits and offset of gated blocks, see :class:`Gate`; none by default.
        checkpoint_level: what is kept for the backward, as in `fused_mlp`.
        backend: `"auto"` (or what :data:`experts_backend` pins), `"loop"` (expert by expert), `"grouped_mm"` (torch's
            grouped products: float32, bfloat16 or float16, sizes multiples of 16 bytes), or on CUDA `"triton"`
            (activations inside the products).

    Returns:
        (T, d_out) in the dtype of x, under autocast in autocast's.

    Raises:
        ValueError: a shape, dtype, activation or level that does not fit; the message names it.
        BackendUnavailableError: `backend` cannot run here.

    Source: Shazeer et al. 2017 (arXiv 1701.06538) for the layer; MLP Fusion (arXiv 2307.08941) for the scale.

    Examples:
        >>> x, w_in, w_out = torch.randn(6, 8), torch.randn(4, 16, 8), torch.randn(4, 8, 16)
        >>> index, weights = torch.tensor([[0, 2]] * 6), torch.full((6, 2), 0.5)
        >>> y = fusion_kernels.fused_experts(x, index, weights, w_in, w_out)
        >>> of_each = [torch.nn.functional.silu(x @ w_in[e].T) @ w_out[e].T for e in (0, 2)]
        >>> torch.allclose(y, 0.5 * (of_each[0] + of_each[1]), atol=1e-3)
        True
    """
    stored = (w_in, w_out, w_gate, b_in, b_gate, b_out, scale)
    check_options(x, activation, checkpoint_level)
    if w_in.ndim != 3 or w_out.ndim != 3:
        raise ValueError("w_in must be (experts, h, d) and w_out (experts, d_out, h)")
    ffn = FFN.of_linears(stored, activation, gating)
    _check(x, top_k_index, top_k_weights, ffn)
    if backend == "auto":
        backend = experts_backend.name
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    T, k = top_k_index.shape
    order, ends = by_expert(top_k_index, len(w_in))
    with torch.autocast(x.device.type, enabled=False):
        if transforms.active():
            y = reference.experts(x, order, ends, ffn)
        else:
            trains = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *ffn.named().values()))
            level = checkpoint_level if trains else 2
            y = EXPERTS.run(x, stored, activation, gating, level, backend, order, ends, trains=trains)
        return (y.unflatten(0, (T, k)) * top_k_weights.unsqueeze(2)).sum(1).to(x.dtype)


def _check(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, ffn: FFN) -> None:
    """Raise a ValueError that names what does not fit."""
    d = ffn.w_in.shape[2]
    if x.ndim != 2 or x.shape[1] != d:
        raise ValueError(f"x must be (tokens, {d}) for this w_in, got {tuple(x.shape)}")
    if top_k_index.ndim != 2 or len(top_k_index) != len(x) or top_k_index.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"top_k_index must be int32 or int64 ({len(x)}, k), got {top_k_index.dtype} {tuple(top_k_index.shape)}"
        )
    if top_k_weights.shape != top_k_index.shape:
        raise ValueError(f"top_k_weights must be {tuple(top_k_index.shape)}, got {tuple(top_k_weights.shape)}")
    check_tensors(x, ffn, {})
