"""Products whose epilogue is the activation, or its derivative: of one MLP, or of experts over sorted tokens.

Tensors of tokens are (T, n) with contiguous rows of any stride, in float16, bfloat16 or float32; weights and biases are
of the same dtype, weights as in `torch.nn.Linear` with any strides. Results are new and contiguous. All sums are in
float32, in an order that depends on shapes and the GPU alone. Activations are named as in `fusion_kernels.activations`
and are taken of the hidden values as rounded to the dtype: a saved and a recomputed z give the same bits.

With `experts`, which says who owns which rows of every tensor of tokens, weights are (E, ...) and biases (E, h). Rows
that no expert owns are not written. All products of a pass are given the same `ExpertTiles`. `rows` (int64), as many as
experts have rows, says which row of x or dy each of theirs is, where these do not lie as they are owned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusion_kernels.gates import PLAIN, Gate
from fusion_kernels.gpu import on_boundary
from fusion_kernels.mlp import _triton_linear as kernels
from fusion_kernels.mlp import _triton_pointwise as pointwise_kernels
from fusion_kernels.mlp import triton_heuristics
from fusion_kernels.mlp.triton_heuristics import TileConfig
from fusion_kernels.mlp.triton_launch import (
    ceil_div,
    contiguous,
    gate_of,
    gpu,
    input_precision,
    kind,
    row_stride,
    start,
)
from fusion_kernels.mlp.triton_pointwise import column_sums
from fusion_kernels.mlp.triton_tiles import ExpertTiles


def linear_act(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    activation: str,
    *,
    save_z: bool,
    experts: ExpertTiles | None = None,
    rows: Tensor | None = None,
    config: TileConfig | None = None,
) -> tuple[Tensor | None, Tensor]:
    """z = x w1ᵀ + b1 if `save_z`, else None, and activation(z); w1 is (h, d)."""
    run = _Product.of(x, (w1.mT,), experts, config)
    z = run.empty() if save_z else None
    a = run.empty()
    run.start(
        kernels._linear_act_kernel,
        x_ptr=x,
        rows_ptr=rows,
        x_stride=row_stride(x),
        w_ptr=w1,
        x2_ptr=None,
        w2_ptr=None,
        bias_ptr=contiguous(b1),
        z_ptr=z,
        a_ptr=a,
        places_ptr=None,
        ACTIVATION=activation,
    )
    return z, a


def grouped_linear(
    x: Tensor,
    w: Tensor,
    experts: ExpertTiles,
    bias: Tensor | None = None,
    *,
    second: tuple[Tensor, Tensor] | None = None,
    places: Tensor | None = None,
    config: TileConfig | None = None,
) -> Tensor:
    """x w + bias for every expert's rows, w (E, k, n) of any strides: `weight.mT` for the product of a Linear layer.

    Args:
        second: another (x, w) of the same shapes and strides, whose product is added before the result is rounded.
        places: int64, a permutation of all rows: which row of the result each is. Those of no expert are zeros then.
    """
    x2, w2 = second if second is not None else (None, None)
    run = _Product.of(x, (w, x2, w2), experts, config)
    y = run.empty() if places is None else run.empty().zero_()
    if second is not None and (second[0].stride() != x.stride() or second[1].stride() != w.stride()):
        raise ValueError("both pairs must have the same strides: call .contiguous() on x and w of both")
    run.start(
        kernels._linear_act_kernel,
        x_ptr=x,
        rows_ptr=None,
        x_stride=row_stride(x),
        w_ptr=w,
        x2_ptr=x2,
        w2_ptr=w2,
        bias_ptr=contiguous(bias),
        z_ptr=None,
        a_ptr=y,
        places_ptr=places,
        ACTIVATION="none",
    )
    return y


def linear_act_backward(
    dy: Tensor,
    w2s: Tensor,
    z: Tensor,
    activation: str,
    *,
    need_a: bool,
    need_db1: bool,
    experts: ExpertTiles | None = None,
    rows: Tensor | None = None,
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dz = (dy w2s) * activation'(z), activation(z) if `need_a`, and the column sums of dz in float32 if `need_db1`.

    w2s is (d_out, h), z is (T, h).
    """
    run = _Product.of(dy, (w2s, z), experts, config, least=triton_heuristics.TRAINED)
    dz, a, partial = run.empty(), run.empty() if need_a else None, run.partial() if need_db1 else None
    run.start(
        kernels._linear_act_backward_kernel,
        dy_ptr=dy,
        rows_ptr=rows,
        dy_stride=row_stride(dy),
        w_ptr=w2s,
        z_ptr=z,
        z_stride=row_stride(z),
        dz_ptr=dz,
        a_ptr=a,
        partial_ptr=partial,
        ACTIVATION=activation,
    )
    return dz, a, run.total(partial)


def linear_glu(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    activation: str,
    *,
    save_z: bool,
    gating: Gate = PLAIN,
    experts: ExpertTiles | None = None,
    rows: Tensor | None = None,
    config: TileConfig | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """zg = x w_gateᵀ + b_gate and zu = x w_upᵀ + b_up if `save_z`, else None, and activation(zg) * zu.

    w_gate and w_up are (h, d); where their strides differ they are copied. `gating` says within which limits.
    """
    if w_gate.stride() != w_up.stride():
        w_gate, w_up = w_gate.contiguous(), w_up.contiguous()
    run = _Product.of(x, (w_gate.mT, w_up), experts, config, wide=True)
    zg, zu = (run.empty(), run.empty()) if save_z else (None, None)
    a = run.empty()
    run.start(
        kernels._linear_glu_kernel,
        x_ptr=x,
        rows_ptr=rows,
        x_stride=row_stride(x),
        gate_ptr=w_gate,
        up_ptr=w_up,
        gate_bias_ptr=contiguous(b_gate),
        up_bias_ptr=contiguous(b_up),
        zg_ptr=zg,
        zu_ptr=zu,
        a_ptr=a,
        ACTIVATION=activation,
        GATE=gate_of(gating, x.dtype),
    )
    return zg, zu, a


def linear_glu_backward(
    dy: Tensor,
    wd_s: Tensor,
    zg: Tensor,
    zu: Tensor,
    activation: str,
    *,
    need_a: bool,
    need_db: bool,
    gating: Gate = PLAIN,
    experts: ExpertTiles | None = None,
    rows: Tensor | None = None,
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """dzg = da * zu * activation'(zg), dzu = da * activation(zg), a = activation(zg) * zu, sums of dzg and of dzu.

    da = dy wd_s with wd_s (d_out, h); zg and zu are (T, h). All is within the limits of `gating`. a is None unless
    `need_a`; the column sums (float32) are None unless `need_db`.
    """
    run = _Product.of(dy, (wd_s, zg, zu), experts, config, wide=True, least=triton_heuristics.TRAINED)
    dzg, dzu, a = run.empty(), run.empty(), run.empty() if need_a else None
    gate, up = (run.partial(), run.partial()) if need_db else (None, None)
    run.start(
        kernels._linear_glu_backward_kernel,
        dy_ptr=dy,
        rows_ptr=rows,
        dy_stride=row_stride(dy),
        w_ptr=wd_s,
        zg_ptr=zg,
        zu_ptr=zu,
        dzg_ptr=dzg,
        dzu_ptr=dzu,
        a_ptr=a,
        gate_partial_ptr=gate,
        up_partial_ptr=up,
        zg_stride=row_stride(zg),
        zu_stride=row_stride(zu),
        ACTIVATION=activation,
        GATE=gate_of(gating, dy.dtype),
    )
    return dzg, dzu, a, run.total(gate), run.total(up)


def grouped_weight_gradient(
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    *,
    a_rows: Tensor | None = None,
    b_rows: Tensor | None = None,
    dtype: torch.dtype | None = None,
    config: TileConfig | None = None,
) -> Tensor:
    """aᵀb (E, m, n) over the rows of every expert, a (T, m), b (T, n), in `dtype` (by default theirs).

    Every entry is one sum over the tokens in their order; experts without rows get zeros. `a_rows` and `b_rows` are for
    a and b what `rows` is for x.
    """
    E, m, n = offsets.shape[0] - 1, a.shape[1], b.shape[1]
    precision = kind(a.dtype)
    if config is None:
        aligned = on_boundary(a, b) and _aligned(row_stride(a), row_stride(b))
        config = triton_heuristics.tile_config(
            m, n, triton_heuristics.TOKENS, precision, gpu(a.device), aligned=aligned, problems=E
        )
    out = torch.empty(E, m, n, dtype=dtype or a.dtype, device=a.device)
    start(
        pointwise_kernels._expert_gradient_kernel,
        E * ceil_div(m, config.BM) * ceil_div(n, config.BN),
        a,
        a_ptr=a,
        a_rows_ptr=a_rows,
        b_ptr=b,
        b_rows_ptr=b_rows,
        out_ptr=out,
        offsets_ptr=offsets,
        M=m,
        N=n,
        a_stride=row_stride(a),
        b_stride=row_stride(b),
        PRECISION=input_precision(precision),
        EVEN_M=m % config.BM == 0,
        EVEN_N=n % config.BN == 0,
        BM=config.BM,
        BN=config.BN,
        BK=config.BK,
        num_warps=config.num_warps,
        # Where rows are looked up the compiler divides the stages between two loads, of which one waits for the other.
        num_stages=config.num_stages if a_rows is None and b_rows is None else 2 * config.num_stages - 1,
    )
    return out


@dataclass(frozen=True)
class _Product:
    """Tiles of a product x (T, K) · w (K, N), or w (E, K, N), and what every kernel is told of it."""

    x: Tensor
    experts: ExpertTiles | None
    T: int
    N: int
    tiles_m: int
    programs: int
    arguments: dict[str, Any]

    @classmethod
    def of(
        cls,
        x: Tensor,
        others: Sequence[Tensor | None],
        experts: ExpertTiles | None,
        config: TileConfig | None,
        *,
        wide: bool = False,
        least: int = 1,
    ) -> _Product:
        """Of x and the first of `others`, which the kernel reads beside it.

        Args:
            least: rows that the tile is chosen for at least.
        """
        w = others[0]
        assert w is not None
        K, N = x.shape[1], w.shape[-1]
        T, E = (x.shape[0], 1) if experts is None else (experts.rows, experts.experts)
        precision = kind(x.dtype)
        strides = (0 if experts is None else w.stride(0), w.stride(-1), w.stride(-2))
        if config is None:
            aligned = on_boundary(x, *others) and _aligned(K, N, row_stride(x), *(s for s in strides if s != 1))
            rows = max(least, ceil_div(T, max(1, E)))
            config = triton_heuristics.tile_config(
                rows, N, K, precision, gpu(x.device), wide=wide, aligned=aligned, problems=E
            )
        tiles_m = ceil_div(T, config.BM) if experts is None else experts.count(config.BM)
        arguments = {
            "map_ptr": None if experts is None else experts.map(config.BM),
            "T": T,
            "N": N,
            "K": K,
            "tiles_m": tiles_m,
            **dict(zip(("w_stride_e", "w_stride_n", "w_stride_k"), strides, strict=True)),
            "PRECISION": input_precision(precision),
            "EVEN_N": N % config.BN == 0,
            "EVEN_K": K % config.BK == 0,
            "BM": config.BM,
            "BN": config.BN,
            "BK": config.BK,
            "GROUP": config.GROUP,
            "PARTS": config.parts,
            "maxnreg": config.registers(precision, gpu(x.device), wide),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }
        return cls(x, experts, T, N, tiles_m, tiles_m * ceil_div(N, config.BN), arguments)

    def start(self, kernel: Any, **own: Any) -> None:
        """Launch a kernel on the tiles of this product; `own` is what it is told beside `arguments`."""
        start(kernel, self.programs, self.x, **self.arguments, **own)

    def empty(self) -> Tensor:
        """(T, N) of x's dtype."""
        return torch.empty(self.T, self.N, dtype=self.x.dtype, device=self.x.device)

    def partial(self) -> Tensor:
        """(tiles_m, N) float32, for the sums of every row of tiles."""
        return torch.empty(self.tiles_m, self.N, dtype=torch.float32, device=self.x.device)

    def total(self, partial: Tensor | None) -> Tensor | None:
        """Sums of what the kernel left in `partial`."""
        if partial is None:
            return None
        if self.experts is None:
            return column_sums(partial)
        return column_sums(partial, self.experts.offsets, self.arguments["BM"])


def _aligned(*sizes: int) -> bool:
    return all(size % 16 == 0 for size in sizes)
