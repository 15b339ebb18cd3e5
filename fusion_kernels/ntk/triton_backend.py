"""Tangent kernels on NVIDIA GPUs, in Triton: the tiles of `_triton_tiles.py`, the sums of `_triton_strips.py`.

Operands are made by torch's operations, rounded or split as the precision says. A tile of the kernel is then computed
by one program, all products together: memory beyond the result is that of the operands and of some of their pieces, of
the size of the inputs and the hidden values. The same call has the same bits. Kernels with an axis of outputs are
products by torch altogether (`outputs.py`).

Precisions are those of `fusion_kernels.ntk.types`. Triton is imported when it is first called.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fusion_kernels import gpu
from fusion_kernels.ffn import FFN
from fusion_kernels.gates import Clamp, Gate
from fusion_kernels.gpu import capability, device_guard, launch, shared_memory
from fusion_kernels.library import check_name
from fusion_kernels.ntk import reference as reference
from fusion_kernels.ntk import triton_heuristics
from fusion_kernels.ntk.outputs import outputs_gram
from fusion_kernels.ntk.passes import Products, left_and_right
from fusion_kernels.ntk.strips import COLUMNS, precision_of, sums_by_strips
from fusion_kernels.ntk.types import Differentiated, check_names

# The names that this backend knows: it takes none for another, and refuses a new one until that stands here.
_KERNELS, _REDUCTIONS = ("gd", "sign"), ("trace", "full", "diagonal", "vector")
_PRECISIONS = ("highest", "tf32x3", "bf16x3", "bf16")


def why_not(device: torch.device | None = None) -> str | None:
    """In one line why the backend cannot run on the device, or on any if None; None if it can."""
    return gpu.why_not(device, frozenset({"ntk_tile"}))


def ntk_gram(
    x1: Tensor,
    x2: Tensor | None,
    ffn: FFN,
    params: Sequence[str],
    kernel: str,
    reduce: str = "trace",
    direction: Tensor | None = None,
    metric: Tensor | None = None,
    precision: str = "highest",
    block_size: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return the kernel; arguments and result as in `fusion_kernels.ntk.reference.ntk_gram`.

    Args:
        precision: `"highest"`; for the trace or a vector in float32 also `"tf32x3"`, `"bf16x3"` or `"bf16"`.
        block_size: rows at a time where there is an axis of outputs; of no meaning otherwise.
    """
    check_names(kernel, reduce, direction, _KERNELS, _REDUCTIONS)
    check_name("precision", precision, _PRECISIONS if x1.dtype == torch.float32 else _PRECISIONS[:1])
    if reduce in ("full", "diagonal"):
        return outputs_gram(x1, x2, ffn, params, kernel, reduce, metric, block_size, out)
    if out is None:
        out = x1.new_empty(len(x1), len(x1 if x2 is None else x2))
    if out.numel() == 0:
        return out
    is_symmetric = x2 is None and kernel == "gd"
    with device_guard(x1):
        for one, other, how in left_and_right(operand, x1, x2, ffn, params, metric, kernel, direction, precision):
            tiles(one, other, how, is_symmetric, precision, out, max(out.shape))
    return out


def ntk_sums(
    x1: Tensor,
    x2: Tensor | None,
    a: Differentiated,
    b: Differentiated,
    kernel: str,
    direction: Tensor | None = None,
    block_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums over two kernels; arguments and result as in `fusion_kernels.ntk.reference.ntk_sums`.

    By strips: see `strips.py`.
    """
    check_name("kernel", kernel, _KERNELS)
    precision = precision_of(x1.dtype)
    most = max(len(x1), 0 if x2 is None else len(x2))
    with device_guard(x1):
        return sums_by_strips(
            x1, x2, a, b, kernel, direction, block_size, operand=operand,
            tiles=lambda one, other, how, out: tiles(one, other, how, False, precision, out, most), add=_add_strips,
        )  # fmt: skip


def _add_strips(a: Tensor, b: Tensor, first: int, symmetric: bool, sums: Tensor, rows: Tensor, columns: Tensor) -> None:
    """What `sums_by_strips` asks of `add`."""
    from fusion_kernels.ntk import _triton_strips as kernels

    M, N = a.shape
    programs = -(-N // COLUMNS)
    # A part of every row from each program, which are added up in order.
    parts = rows.new_empty(programs, 2, M)
    launch(
        kernels._ntk_strip_kernel,
        programs,
        a_ptr=a,
        b_ptr=b,
        sums_ptr=sums,
        rows_ptr=parts,
        columns_ptr=columns,
        M=M,
        N=N,
        first=first,
        apart=columns.stride(0),
        SYMMETRIC=symmetric,
        BM=8,
        BN=COLUMNS,
        num_warps=8,
    )
    rows += parts.sum(0)


def operand(
    x: Tensor,
    z: Tensor,
    g: Tensor | None,
    shrink: Tensor | None,
    of_hidden: Tensor,
    of_in: Tensor,
    of_gate: Tensor | None,
    activation: str,
    limit: float | None,
    clamp: Clamp,
    up_offset: float,
    signs: bool,
    inputs: bool,
    slopes_in: bool,
    slopes_gate: bool,
    hidden: bool,
    precision: str,
) -> Tensor:
    """One side of the products: (planes, n, columns), whatever of inputs | slopes | hidden values is asked for.

    Args:
        x: (n, d), and the others as `fusion_kernels.ntk.passes.left_and_right` passes them.

    Returns:
        Each range of columns padded with zeros to a multiple of `triton_heuristics.COLUMNS`; in bfloat16 for its
        precisions, else in the dtype. The second plane of two is what rounding the first one left, rounded.
    """
    if shrink is not None:
        z, g = z * shrink, None if g is None else g * shrink
    value, slopes = reference.of_arguments(activation, Gate(limit, clamp, up_offset), z, g)

    def ranges() -> Iterator[Tensor]:
        if inputs:
            yield x
        if slopes_in:
            yield slopes["in"] * of_in
        if slopes_gate and of_gate is not None:
            yield slopes["gate"] * of_gate
        if hidden:
            yield value * of_hidden

    widths = [x.shape[1]] * inputs + [z.shape[1]] * (slopes_in + slopes_gate + hidden)
    columns = sum(map(triton_heuristics.padded, widths))
    dtype = torch.bfloat16 if precision.startswith("bf16") else x.dtype
    planes = x.new_zeros(2 if precision.endswith("x3") else 1, len(x), columns, dtype=dtype)
    begin = 0
    for width, values in zip(widths, ranges(), strict=True):
        _round_to(planes[:, :, begin : begin + width], values.sign() if signs else values, precision)
        begin += triton_heuristics.padded(width)
    return planes


def _round_to(planes: Tensor, values: Tensor, precision: str) -> None:
    """planes (1 or 2, n, columns) = values (n, columns) as `precision` stores them."""
    planes[0] = _to_tf32(values) if precision == "tf32x3" else values
    if len(planes) == 2:
        # Nothing is left of what is not finite, or becomes so: infinity less infinity would be NaN.
        rest = torch.where(planes[0].isfinite(), values - planes[0], 0.0)
        planes[1] = _to_tf32(rest) if precision == "tf32x3" else rest


def _to_tf32(values: Tensor) -> Tensor:
    """The values of TF32, 11 significant bits, nearest to those of float32, ties to even; NaN stays NaN."""
    bits = values.contiguous().view(torch.int32)
    rounded = ((bits + (0xFFF + ((bits >> 13) & 1))) & ~0x1FFF).view(torch.float32)
    # The carry of a NaN of all ones would run into its sign.
    return torch.where(values.isnan(), values, rounded)


def tiles(
    left: Tensor, right: Tensor, how: Products, symmetric: bool, precision: str, out: Tensor, rows_of_all: int
) -> None:
    """out (n1, n2) = the kernel of two operands, or that added to it.

    By the tile of a kernel of `rows_of_all` rows or columns: then an entry has the same bits in a strip of it.
    """
    from fusion_kernels.ntk import _triton_tiles as kernels

    M, N = out.shape
    major, shared = capability(out.device)[0], shared_memory(out.device)
    config = triton_heuristics.tile_config(rows_of_all, precision, out.dtype, how.accumulate, shared, major)
    rows, columns = (-(-n // edge) for n, edge in zip((M, N), config.tile, strict=True))
    of_neurons = triton_heuristics.padded(how.neurons)
    launch(
        kernels._ntk_tile_kernel,
        rows * (rows + 1) // 2 if symmetric else rows * columns,
        left_ptr=left,
        right_ptr=right,
        # By a pointer, since a number would be rounded to float32.
        constant_ptr=out.new_full((1,), how.constant),
        out_ptr=out,
        M=M,
        N=N,
        inputs=triton_heuristics.padded(how.inputs),
        slopes=how.slopes * of_neurons,
        hidden=how.hidden * of_neurons,
        left_plane=left.stride(0),
        right_plane=right.stride(0),
        # That of a single row means nothing, and may be anything.
        stride=N if M == 1 else out.stride(0),
        bias=how.bias,
        ACCUMULATE=how.accumulate,
        SYMMETRIC=symmetric,
        PLANES=len(left),
        PRECISION="tf32" if precision == "tf32x3" else "ieee",
        BM=config.tile[0],
        BN=config.tile[1],
        BD=config.depth,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
