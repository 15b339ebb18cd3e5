"""Device code: dot products of columns that lie side by side."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T", "count"])
def _sampled_kernel(
    left_ptr, right_ptr, rows_ptr, columns_ptr, out_ptr, T, count, left_stride, right_stride, BE: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    """out (count,) = sum over t of left[rows, t] right[columns, t], BE entries a program, in float32.

    left (N, T) and right (d, T) have contiguous rows, `left_stride` and `right_stride` apart.
    """
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    there = e < count
    left = left_ptr + tl.load(rows_ptr + e, mask=there, other=0).to(tl.int64)[:, None] * left_stride
    right = right_ptr + tl.load(columns_ptr + e, mask=there, other=0).to(tl.int64)[:, None] * right_stride
    sums = tl.zeros((BE, BT), tl.float32)  # [BE, BT]
    for begin in range(0, T, BT):
        t = begin + tl.arange(0, BT)[None, :]
        mask = there[:, None] & (t < T)
        a = tl.load(left + t, mask=mask, other=0.0).to(tl.float32)
        sums += a * tl.load(right + t, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + e, tl.sum(sums, 1), mask=there)
