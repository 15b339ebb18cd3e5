"""The block on CUDA by the Triton kernels, imported when they are first used: this module needs neither of the two.

`cublas` puts one pointwise kernel between BLAS products, `epilogue` computes the activation (backward: its derivative,
the activation once more and the bias's gradient) inside the product that feeds it, and `resident` runs a forward that
saves nothing in one kernel whose hidden tile stays on the chip. The products without an epilogue are always BLAS'.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusion_kernels import gpu
from fusion_kernels.ffn import FFN
from fusion_kernels.library import BackendUnavailableError
from fusion_kernels.mlp.folding import fold_scale
from fusion_kernels.mlp.operators import saved
from fusion_kernels.mlp.reference import project
from fusion_kernels.mlp.torch_backend import gradients, needs_inside
from fusion_kernels.mlp.types import Gradients, Needs, Outputs, Saved


def cublas_forward(x: Tensor, ffn: FFN, checkpoint_level: int) -> Outputs:
    """See `fusion_kernels.mlp.operators`."""
    from fusion_kernels.mlp import triton_pointwise as kernels

    z = project(x, ffn.w_in, ffn.b_in)
    g = None if ffn.w_gate is None else project(x, ffn.w_gate, ffn.b_gate)
    if g is None:
        a = kernels.act_forward(z, ffn.activation)
    else:
        a = kernels.glu_act_forward(g, z, ffn.activation, ffn.gating)
    return saved(_output(a, ffn), z, g, a, checkpoint_level)


def epilogue_forward(x: Tensor, ffn: FFN, checkpoint_level: int) -> Outputs:
    """See `fusion_kernels.mlp.operators`."""
    from fusion_kernels.mlp import triton_linear as kernels

    rows, keep = _rows(x), checkpoint_level < 2
    w_in, b_in, activation = _cast(ffn.w_in, x), _bias(ffn.b_in, x), ffn.activation
    g: Tensor | None = None
    if ffn.w_gate is None:
        z, a = kernels.linear_act(rows, w_in, b_in, activation, save_z=keep)
    else:
        w_gate, b_gate = _cast(ffn.w_gate, x), _bias(ffn.b_gate, x)
        g, z, a = kernels.linear_glu(rows, w_gate, w_in, b_gate, b_in, activation, gating=ffn.gating, save_z=keep)
    return saved(_output(a, ffn), a if z is None else z, g, a, checkpoint_level)


def resident_why_not(device: torch.device | None = None) -> str | None:
    """In one line why `resident` cannot run on the device, or on any if None; None if it can."""
    return gpu.why_not(device, frozenset({"resident"}))


def resident_forward(x: Tensor, ffn: FFN, checkpoint_level: int) -> Outputs:
    """See `fusion_kernels.mlp.operators`.

    Raises:
        ValueError: hidden tensors are to be saved, or the hidden layer is too wide for the chip.
        BackendUnavailableError: Triton is known to compile it wrongly for the device of x.
    """
    reason = resident_why_not(x.device) if x.is_cuda else None
    if reason is not None:
        raise BackendUnavailableError(f"mlp: backend 'resident' on {x.device}: {reason}")
    from fusion_kernels.mlp import triton_resident as kernels

    if checkpoint_level < 2:
        raise ValueError(
            f"backend 'resident' never has the hidden tensors that checkpoint_level={checkpoint_level} saves: use "
            "checkpoint_level=2, torch.no_grad() or backend 'epilogue'"
        )
    rows, w_in, b_in = _rows(x), _cast(ffn.w_in, x), _bias(ffn.b_in, x)
    output = _rows(_folded(ffn, x)), _bias(ffn.b_out, x), ffn.activation
    if ffn.w_gate is None:
        y = kernels.mlp_resident(rows, w_in, b_in, *output)
    else:
        w_gate, b_gate = _cast(ffn.w_gate, x), _bias(ffn.b_gate, x)
        y = kernels.glu_resident(rows, w_gate, w_in, b_gate, b_in, *output, gating=ffn.gating)
    return y, y.new_empty((0,)), y.new_empty((0,)), y.new_empty((0,))


def cublas_backward(dy: Tensor, x: Tensor, ffn: FFN, kept: Saved, checkpoint_level: int, needs: Needs) -> Gradients:
    """See `fusion_kernels.mlp.operators`."""
    from fusion_kernels.mlp import triton_pointwise as kernels

    def plain(dy: Tensor, w: Tensor, z: Tensor, activation: str, need_a: bool, need_db: bool) -> tuple[Any, ...]:
        return *kernels.act_backward(dy @ w, z, activation, need_a), None

    def gated(
        dy: Tensor, w: Tensor, g: Tensor, z: Tensor, activation: str, need_a: bool, need_db: bool
    ) -> tuple[Any, ...]:
        return *kernels.glu_act_backward(dy @ w, g, z, activation, need_a, ffn.gating), None, None

    return _backward(plain, gated, dy, x, ffn, kept, checkpoint_level, needs)


def epilogue_backward(dy: Tensor, x: Tensor, ffn: FFN, kept: Saved, checkpoint_level: int, needs: Needs) -> Gradients:
    """See `fusion_kernels.mlp.operators`."""
    from fusion_kernels.mlp import triton_linear as kernels

    def plain(dy: Tensor, w: Tensor, z: Tensor, activation: str, need_a: bool, need_db: bool) -> tuple[Any, ...]:
        return kernels.linear_act_backward(_rows(dy), _rows(w), z, activation, need_a=need_a, need_db1=need_db)

    def gated(
        dy: Tensor, w: Tensor, g: Tensor, z: Tensor, activation: str, need_a: bool, need_db: bool
    ) -> tuple[Any, ...]:
        return kernels.linear_glu_backward(
            _rows(dy), _rows(w), g, z, activation, gating=ffn.gating, need_a=need_a, need_db=need_db
        )

    return _backward(plain, gated, dy, x, ffn, kept, checkpoint_level, needs)


def _backward(
    plain: Callable[..., tuple[Any, ...]],
    gated: Callable[..., tuple[Any, ...]],
    dy: Tensor,
    x: Tensor,
    ffn: FFN,
    kept: Saved,
    checkpoint_level: int,
    needs: Needs,
) -> Gradients:
    """The backward of which `plain` or `gated` does the step from dy to the pre-activations."""
    z, g, a = kept
    if checkpoint_level == 2:
        z = project(x, ffn.w_in, ffn.b_in)
        g = g if ffn.w_gate is None else project(x, ffn.w_gate, ffn.b_gate)
    need_a = checkpoint_level != 0 and (needs.w_out or needs.scale)
    dz = dg = db_in = db_gate = again = None
    if needs_inside(needs) or need_a:
        w, need_db = _folded(ffn, x), needs.b_in or needs.b_gate
        if ffn.w_gate is None:
            dz, again, db_in = plain(dy, w, z, ffn.activation, need_a, need_db)
        else:
            dg, dz, again, db_gate, db_in = gated(dy, w, g, z, ffn.activation, need_a, need_db)
    return gradients(dy, x, ffn, dz, dg, a if again is None else again, needs, db_in=db_in, db_gate=db_gate)


def _output(a: Tensor, ffn: FFN) -> Tensor:
    return project(a, _folded(ffn, a), ffn.b_out)


def _folded(ffn: FFN, x: Tensor) -> Tensor:
    """diag(p) W_out in the dtype of x, as products take it: (d_out, N)."""
    return fold_scale(ffn.w_out, ffn.scale, x.dtype).mT


def _rows(t: Tensor) -> Tensor:
    """`t` with neighbouring entries in each row, as the kernels read it."""
    return t if t.shape[1] <= 1 or t.stride(1) == 1 else t.contiguous()


def _cast(w: Tensor, x: Tensor) -> Tensor:
    return _rows(w.to(x.dtype))


def _bias(b: Tensor | None, x: Tensor) -> Tensor | None:
    return None if b is None else b.to(x.dtype)
