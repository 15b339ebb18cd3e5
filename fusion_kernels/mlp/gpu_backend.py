"""The block on CUDA by the Triton kernels, imported when they are first used: this module needs neither of the two.

`cublas` puts one pointwise kernel between BLAS products, `epilogue` computes the activation (backward: its derivative,
the activation once more and the bias's gradient) inside the product that feeds it, and `resident` runs a forward that
saves nothing in one kernel whose hidden tile stays on the chip. The products without an epilogue are always BLAS'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from fusion_kernels.mlp.operators import Gradients, Outputs, saved
from fusion_kernels.mlp.torch_backend import gradients
from fusion_kernels.reference.mlp import fold_scale, project


def cublas_forward(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    scale: Tensor | None,
    activation: str,
    checkpoint_level: int,
    backend: str,
) -> Outputs:
    """See `fusion_kernels.mlp.operators`."""
    from fusion_kernels.mlp import triton_pointwise as kernels

    z = project(x, w_in, b_in)
    g = None if w_gate is None else project(x, w_gate, b_gate)
    a = kernels.act_forward(z, activation) if g is None else kernels.glu_act_forward(g, z, activation)
    return saved(_output(a, w_out, b_out, scale), z, g, a, checkpoint_level)


def epilogue_forward(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    scale: Tensor | None,
    activation: str,
    checkpoint_level: int,
    backend: str,
) -> Outputs:
    """See `fusion_kernels.mlp.operators`."""
    from fusion_kernels.mlp import triton_linear as kernels

    rows, keep = _rows(x), checkpoint_level < 2
    g: Tensor | None = None
    if w_gate is None:
        z, a = kernels.linear_act(rows, _cast(w_in, x), _bias(b_in, x), activation, save_z=keep)
    else:
        g, z, a = kernels.linear_glu(
            rows, _cast(w_gate, x), _cast(w_in, x), _bias(b_gate, x), _bias(b_in, x), activation, save_z=keep
        )
    return saved(_output(a, w_out, b_out, scale), a if z is None else z, g, a, checkpoint_level)


def resident_forward(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    scale: Tensor | None,
    activation: str,
    checkpoint_level: int,
    backend: str,
) -> Outputs:
    """See `fusion_kernels.mlp.operators`.

    Raises:
        ValueError: hidden tensors are to be saved, or the hidden layer is too wide for the chip.
    """
    from fusion_kernels.mlp import triton_resident as kernels

    if checkpoint_level < 2:
        raise ValueError(
            f"backend 'resident' never has the hidden tensors that checkpoint_level={checkpoint_level} saves: use "
            "checkpoint_level=2, torch.no_grad() or backend 'epilogue'"
        )
    rows, out, b_in, b_out = _rows(x), fold_scale(w_out, scale, x.dtype), _bias(b_in, x), _bias(b_out, x)
    if w_gate is None:
        y = kernels.mlp_resident(rows, _cast(w_in, x), b_in, _rows(out), b_out, activation)
    else:
        y = kernels.glu_resident(
            rows, _cast(w_gate, x), _cast(w_in, x), _bias(b_gate, x), b_in, _rows(out), b_out, activation
        )
    return y, y.new_empty((0,)), y.new_empty((0,)), y.new_empty((0,))


def cublas_backward(*arguments: Any) -> Gradients:
    """See `fusion_kernels.mlp.operators`."""
    from fusion_kernels.mlp import triton_pointwise as kernels

    def plain(dy: Tensor, w: Tensor, z: Tensor, activation: str, need_a: bool, need_db: bool) -> tuple[Any, ...]:
        return *kernels.act_backward(dy @ w, z, activation, need_a), None

    def gated(
        dy: Tensor, w: Tensor, g: Tensor, z: Tensor, activation: str, need_a: bool, need_db: bool
    ) -> tuple[Any, ...]:
        return *kernels.glu_act_backward(dy @ w, g, z, activation, need_a), None, None

    return _backward(plain, gated, *arguments)


def epilogue_backward(*arguments: Any) -> Gradients:
    """See `fusion_kernels.mlp.operators`."""
    from fusion_kernels.mlp import triton_linear as kernels

    def plain(dy: Tensor, w: Tensor, z: Tensor, activation: str, need_a: bool, need_db: bool) -> tuple[Any, ...]:
        return kernels.linear_act_backward(_rows(dy), _rows(w), z, activation, need_a=need_a, need_db1=need_db)

    def gated(
        dy: Tensor, w: Tensor, g: Tensor, z: Tensor, activation: str, need_a: bool, need_db: bool
    ) -> tuple[Any, ...]:
        return kernels.linear_glu_backward(_rows(dy), _rows(w), g, z, activation, need_a=need_a, need_db=need_db)

    return _backward(plain, gated, *arguments)


def _backward(
    plain: Any,
    gated: Any,
    dy: Tensor,
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    scale: Tensor | None,
    z: Tensor,
    g: Tensor,
    a: Tensor,
    activation: str,
    checkpoint_level: int,
    backend: str,
    needs: Sequence[bool],
) -> Gradients:
    """The backward of which `plain` or `gated` does the step from dy to the pre-activations."""
    if checkpoint_level == 2:
        z = project(x, w_in, b_in)
        g = g if w_gate is None else project(x, w_gate, b_gate)
    need_a = checkpoint_level != 0 and (needs[5] or needs[7])
    dz = dg = db_in = db_gate = again = None
    if any(needs[:5]) or need_a:
        w, need_db = fold_scale(w_out, scale, x.dtype), needs[2] or needs[4]
        if w_gate is None:
            dz, again, db_in = plain(dy, w, z, activation, need_a, need_db)
        else:
            dg, dz, again, db_gate, db_in = gated(dy, w, g, z, activation, need_a, need_db)
    a = a if again is None else again
    return gradients(
        dy, x, w_in, b_in, w_gate, b_gate, w_out, b_out, scale, dz, dg, a, needs, db_in=db_in, db_gate=db_gate
    )


def _output(a: Tensor, w_out: Tensor, b_out: Tensor | None, scale: Tensor | None) -> Tensor:
    return F.linear(a, fold_scale(w_out, scale, a.dtype), _bias(b_out, a))


def _rows(t: Tensor) -> Tensor:
    """`t` with neighbouring entries in each row, as the kernels read it."""
    return t if t.shape[1] <= 1 or t.stride(1) == 1 else t.contiguous()


def _cast(w: Tensor, x: Tensor) -> Tensor:
    return _rows(w.to(x.dtype))


def _bias(b: Tensor | None, x: Tensor) -> Tensor | None:
    return None if b is None else b.to(x.dtype)
