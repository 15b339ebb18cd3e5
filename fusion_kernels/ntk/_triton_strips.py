"""Device code: sums over strips of two tangent kernels, in float64 and in an order that no launch changes."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["M", "N", "first", "apart"])
def _ntk_strip_kernel(
    a_ptr, b_ptr, sums_ptr, rows_ptr, columns_ptr, M, N, first, apart, SYMMETRIC: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Add up a and b (M, N), contiguous strips that begin with row `first`; one program per BN columns.

    Program p adds <a, a>, <a, b>, <b, b> and |a - b|^2 over its columns to sums (programs, 4), the sums of its columns
    to columns (2, apart), and stores those of its part of every row in rows (programs, 2, M). SYMMETRIC: entries above
    the diagonal are not read; those below it count twice, and alone go to columns.
    """
    p = tl.program_id(0)
    c = p * BN + tl.arange(0, BN)
    none = tl.zeros((BN,), tl.float64)
    aa, ab, bb, dd, of_a, of_b = none, none, none, none, none, none
    for step in range(0, M, BM):
        r = step + tl.arange(0, BM)
        mask = (r < M)[:, None] & (c < N)[None, :]
        below = mask
        if SYMMETRIC:
            below = mask & (c[None, :] < first + r[:, None])
            mask = mask & (c[None, :] <= first + r[:, None])
        at = r.to(tl.int64)[:, None] * N + c[None, :]
        a = tl.load(a_ptr + at, mask=mask, other=0.0).to(tl.float64)
        b = tl.load(b_ptr + at, mask=mask, other=0.0).to(tl.float64)
        to = rows_ptr + p * 2 * M.to(tl.int64) + r
        tl.store(to, tl.sum(a, axis=1), mask=r < M)
        tl.store(to + M, tl.sum(b, axis=1), mask=r < M)
        difference = a - b
        if SYMMETRIC:
            twice = tl.where(below, 2.0, 1.0).to(tl.float64)
            aa += tl.sum(a * a * twice, axis=0)
            ab += tl.sum(a * b * twice, axis=0)
            bb += tl.sum(b * b * twice, axis=0)
            dd += tl.sum(difference * difference * twice, axis=0)
            a = tl.where(below, a, 0.0)
            b = tl.where(below, b, 0.0)
        else:
            aa += tl.sum(a * a, axis=0)
            ab += tl.sum(a * b, axis=0)
            bb += tl.sum(b * b, axis=0)
            dd += tl.sum(difference * difference, axis=0)
        of_a += tl.sum(a, axis=0)
        of_b += tl.sum(b, axis=0)
    mine = sums_ptr + 4 * p
    tl.store(mine, tl.load(mine) + tl.sum(aa, axis=0))
    tl.store(mine + 1, tl.load(mine + 1) + tl.sum(ab, axis=0))
    tl.store(mine + 2, tl.load(mine + 2) + tl.sum(bb, axis=0))
    tl.store(mine + 3, tl.load(mine + 3) + tl.sum(dd, axis=0))
    own = columns_ptr + c
    tl.store(own, tl.load(own, mask=c < N, other=0.0) + of_a, mask=c < N)
    tl.store(own + apart, tl.load(own + apart, mask=c < N, other=0.0) + of_b, mask=c < N)
