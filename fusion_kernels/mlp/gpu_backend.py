"""The block on CUDA by the Triton kernels, imported when they are first used: this module needs neither of the two.

`cublas` puts one pointwise kernel between BLAS products, `epilogue` computes the activation (backward: its derivative,
the activation once more and the bias's gradient) inside the product that feeds it, and `resident` runs a forward that
saves nothing in one kernel whose hidden tile stays on the chip. The products without an epilogue are always BLAS'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fusion_kernels.mlp.operators import Gradients, Outputs, Saved, saved
from fusion_kernels.mlp.reference import Block, fold_scale, project
from fusion_kernels.mlp.torch_backend import gradients


def cublas_forward(x: Tensor, block: Block, checkpoint_level: int) -> Outputs:
    """See `fusion_kernels.mlp.operators`."""
    from fusion_kernels.mlp import triton_pointwise as kernels

    z = project(x, block.w_in, block.b_in)
    g = None if block.w_gate is None else project(x, block.w_gate, block.b_gate)
    a = kernels.act_forward(z, block.activation) if g is None else kernels.glu_act_forward(g, z, block.activation)
    return saved(_output(a, block), z, g, a, checkpoint_level)


def epilogue_forward(x: Tensor, block: Block, checkpoint_level: int) -> Outputs:
    """See `fusion_kernels.mlp.operators`."""
    from fusion_kernels.mlp import triton_linear as kernels

    rows, keep = _rows(x), checkpoint_level < 2
    w_in, b_in, activation = _cast(block.w_in, x), _bias(block.b_in, x), block.activation
    g: Tensor | None = None
    if block.w_gate is None:
        z, a = kernels.linear_act(rows, w_in, b_in, activation, save_z=keep)
    else:
        w_gate, b_gate = _cast(block.w_gate, x), _bias(block.b_gate, x)
        g, z, a = kernels.linear_glu(rows, w_gate, w_in, b_gate, b_in, activation, save_z=keep)
    return saved(_output(a, block), a if z is None else z, g, a, checkpoint_level)


def resident_forward(x: Tensor, block: Block, checkpoint_level: int) -> Outputs:
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
    rows, w_in, b_in = _rows(x), _cast(block.w_in, x), _bias(block.b_in, x)
    output = _rows(fold_scale(block.w_out, block.scale, x.dtype)), _bias(block.b_out, x), block.activation
    if block.w_gate is None:
        y = kernels.mlp_resident(rows, w_in, b_in, *output)
    else:
        y = kernels.glu_resident(rows, _cast(block.w_gate, x), w_in, _bias(block.b_gate, x), b_in, *output)
    return y, y.new_empty((0,)), y.new_empty((0,)), y.new_empty((0,))


def cublas_backward(
    dy: Tensor, x: Tensor, block: Block, kept: Saved, checkpoint_level: int, needs: Sequence[bool]
) -> Gradients:
    """See `fusion_kernels.mlp.operators`."""
    from fusion_kernels.mlp import triton_pointwise as kernels

    def plain(dy: Tensor, w: Tensor, z: Tensor, activation: str, need_a: bool, need_db: bool) -> tuple[Any, ...]:
        return *kernels.act_backward(dy @ w, z, activation, need_a), None

    def gated(
        dy: Tensor, w: Tensor, g: Tensor, z: Tensor, activation: str, need_a: bool, need_db: bool
    ) -> tuple[Any, ...]:
        return *kernels.glu_act_backward(dy @ w, g, z, activation, need_a), None, None

    return _backward(plain, gated, dy, x, block, kept, checkpoint_level, needs)


def epilogue_backward(
    dy: Tensor, x: Tensor, block: Block, kept: Saved, checkpoint_level: int, needs: Sequence[bool]
) -> Gradients:
    """See `fusion_kernels.mlp.operators`."""
    from fusion_kernels.mlp import triton_linear as kernels

    def plain(dy: Tensor, w: Tensor, z: Tensor, activation: str, need_a: bool, need_db: bool) -> tuple[Any, ...]:
        return kernels.linear_act_backward(_rows(dy), _rows(w), z, activation, need_a=need_a, need_db1=need_db)

    def gated(
        dy: Tensor, w: Tensor, g: Tensor, z: Tensor, activation: str, need_a: bool, need_db: bool
    ) -> tuple[Any, ...]:
        return kernels.linear_glu_backward(_rows(dy), _rows(w), g, z, activation, need_a=need_a, need_db=need_db)

    return _backward(plain, gated, dy, x, block, kept, checkpoint_level, needs)


def _backward(
    plain: Callable[..., tuple[Any, ...]],
    gated: Callable[..., tuple[Any, ...]],
    dy: Tensor,
    x: Tensor,
    block: Block,
    kept: Saved,
    checkpoint_level: int,
    needs: Sequence[bool],
) -> Gradients:
    """The backward of which `plain` or `gated` does the step from dy to the pre-activations."""
    z, g, a = kept
    if checkpoint_level == 2:
        z = project(x, block.w_in, block.b_in)
        g = g if block.w_gate is None else project(x, block.w_gate, block.b_gate)
    need_a = checkpoint_level != 0 and (needs[5] or needs[7])
    dz = dg = db_in = db_gate = again = None
    if any(needs[:5]) or need_a:
        w, need_db = fold_scale(block.w_out, block.scale, x.dtype), needs[2] or needs[4]
        if block.w_gate is None:
            dz, again, db_in = plain(dy, w, z, block.activation, need_a, need_db)
        else:
            dg, dz, again, db_gate, db_in = gated(dy, w, g, z, block.activation, need_a, need_db)
    return gradients(dy, x, block, dz, dg, a if again is None else again, needs, db_in=db_in, db_gate=db_gate)


def _output(a: Tensor, block: Block) -> Tensor:
    return project(a, fold_scale(block.w_out, block.scale, a.dtype), block.b_out)


def _rows(t: Tensor) -> Tensor:
    """`t` with neighbouring entries in each row, as the kernels read it."""
    return t if t.shape[1] <= 1 or t.stride(1) == 1 else t.contiguous()


def _cast(w: Tensor, x: Tensor) -> Tensor:
    return _rows(w.to(x.dtype))


def _bias(b: Tensor | None, x: Tensor) -> Tensor | None:
    return None if b is None else b.to(x.dtype)
