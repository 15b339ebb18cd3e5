"""Products whose epilogue is the activation, or its derivative: of one MLP, or of experts over sorted tokens.

Tensors of tokens are (T, n) with contiguous rows of any stride, in float16, bfloat16 or float32; weights and biases are
of the same dtype, weights as in `torch.nn.Linear` with any strides. Results are new and contiguous. All sums are in
float32, in an order that depends on shapes and the GPU alone. Activations are named as in `fusion_kernels.activations`
and are taken of the hidden values as rounded to the dtype: a saved and a recomputed z give the same bits.

With `offsets` (E + 1,) int32 on the device, weights are (E, ...) and biases (E, h), and expert e owns the rows
`offsets[e]` to `offsets[e + 1]` of every tensor of tokens. The host does not read the offsets, and experts without rows
are fine. Rows that no expert owns are not written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusion_kernels.mlp import _triton_linear as kernels
from fusion_kernels.mlp import _triton_pointwise as pointwise_kernels
from fusion_kernels.mlp import triton_heuristics
from fusion_kernels.mlp.triton_heuristics import TileConfig
from fusion_kernels.mlp.triton_launch import ceil_div, gpu, kind, row_stride, start
from fusion_kernels.mlp.triton_pointwise import column_sums


def linear_act(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    activation: str,
    *,
    save_z: bool,
    offsets: Tensor | None = None,
    config: TileConfig | None = None,
) -> tuple[Tensor | None, Tensor]:
    """z = x w1ᵀ + b1 if `save_z`, else None, and activation(z); w1 is (h, d)."""
    run = _Product.of(x, w1.mT, offsets, config)
    z = run.empty() if save_z else None
    a = run.empty()
    start(
        kernels._linear_act_kernel, run.programs, x, w1, None, None, _contiguous(b1), z, a, *run.arguments,
        ACTIVATION=activation, **run.options,
    )  # fmt: skip
    return z, a


def grouped_linear(
    x: Tensor,
    w: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    *,
    second: tuple[Tensor, Tensor] | None = None,
    config: TileConfig | None = None,
) -> Tensor:
    """x w + bias for every expert's rows, w (E, k, n) of any strides: `weight.mT` for the product of a Linear layer.

    Args:
        second: another (x, w) of the same shapes and strides, whose product is added before the result is rounded.
    """
    run = _Product.of(x, w, offsets, config)
    y = run.empty()
    x2, w2 = second if second is not None else (None, None)
    if second is not None and (second[0].stride() != x.stride() or second[1].stride() != w.stride()):
        raise ValueError("both pairs must have the same strides: call .contiguous() on x and w of both")
    start(
        kernels._linear_act_kernel, run.programs, x, w, x2, w2, _contiguous(bias), None, y, *run.arguments,
        ACTIVATION="none", **run.options,
    )  # fmt: skip
    return y


def linear_act_backward(
    dy: Tensor,
    w2s: Tensor,
    z: Tensor,
    activation: str,
    *,
    need_a: bool,
    need_db1: bool,
    offsets: Tensor | None = None,
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dz = (dy w2s) * activation'(z), activation(z) if `need_a`, and the column sums of dz in float32 if `need_db1`.

    w2s is (d_out, h), z is (T, h).
    """
    run = _Product.of(dy, w2s, offsets, config)
    dz, a, partial = run.empty(), run.empty() if need_a else None, run.partial() if need_db1 else None
    start(
        kernels._linear_act_backward_kernel, run.programs, dy, w2s, z, dz, a, partial, *run.arguments, row_stride(z),
        ACTIVATION=activation, **run.options,
    )  # fmt: skip
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
    offsets: Tensor | None = None,
    config: TileConfig | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """zg = x w_gateᵀ + b_gate and zu = x w_upᵀ + b_up if `save_z`, else None, and activation(zg) * zu.

    w_gate and w_up are (h, d); where their strides differ they are copied.
    """
    if w_gate.stride() != w_up.stride():
        w_gate, w_up = w_gate.contiguous(), w_up.contiguous()
    run = _Product.of(x, w_gate.mT, offsets, config, wide=True)
    zg, zu = (run.empty(), run.empty()) if save_z else (None, None)
    a = run.empty()
    start(
        kernels._linear_glu_kernel, run.programs, x, w_gate, w_up, _contiguous(b_gate), _contiguous(b_up), zg, zu, a,
        *run.arguments, ACTIVATION=activation, **run.options,
    )  # fmt: skip
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
    offsets: Tensor | None = None,
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """dzg = da * zu * activation'(zg), dzu = da * activation(zg), a = activation(zg) * zu, sums of dzg and of dzu.

    da = dy wd_s with wd_s (d_out, h); zg and zu are (T, h). a is None unless `need_a`; the column sums (float32) are
    None unless `need_db`.
    """
    run = _Product.of(dy, wd_s, offsets, config, wide=True)
    dzg, dzu, a = run.empty(), run.empty(), run.empty() if need_a else None
    gate, up = (run.partial(), run.partial()) if need_db else (None, None)
    start(
        kernels._linear_glu_backward_kernel, run.programs, dy, wd_s, zg, zu, dzg, dzu, a, gate, up,
        *run.arguments, row_stride(zg), row_stride(zu), ACTIVATION=activation, **run.options,
    )  # fmt: skip
    return dzg, dzu, a, run.total(gate), run.total(up)


def grouped_weight_gradient(
    a: Tensor, b: Tensor, offsets: Tensor, *, dtype: torch.dtype | None = None, config: TileConfig | None = None
) -> Tensor:
    """aᵀb (E, m, n) over the rows of every expert, a (T, m), b (T, n), in `dtype` (by default theirs).

    Every entry is one sum over the tokens in their order; experts without rows get zeros.
    """
    E, m, n = offsets.shape[0] - 1, a.shape[1], b.shape[1]
    precision = kind(a.dtype)
    if config is None:
        config = triton_heuristics.tile_config(m, n, precision, gpu(a.device), problems=E)
    out = torch.empty(E, m, n, dtype=dtype or a.dtype, device=a.device)
    start(
        pointwise_kernels._expert_gradient_kernel, E * ceil_div(m, config.BM) * ceil_div(n, config.BN), a, b, out,
        offsets, m, n, row_stride(a), row_stride(b), PRECISION=_input_precision(precision),
        EVEN_M=m % config.BM == 0, EVEN_N=n % config.BN == 0, BM=config.BM, BN=config.BN, BK=config.BK,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out


@dataclass(frozen=True)
class _Product:
    """Tiles of a product x (T, K) · w (K, N), or w (E, K, N), and what every kernel is told of it."""

    x: Tensor
    offsets: Tensor | None
    N: int
    tiles_m: int
    programs: int
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @classmethod
    def of(
        cls, x: Tensor, w: Tensor, offsets: Tensor | None, config: TileConfig | None, *, wide: bool = False
    ) -> _Product:
        (T, K), N = x.shape, w.shape[-1]
        E = 1 if offsets is None else offsets.shape[0] - 1
        precision = kind(x.dtype)
        strides = (0 if offsets is None else w.stride(0), w.stride(-1), w.stride(-2))
        if config is None:
            aligned = _aligned(K, N, row_stride(x), *(s for s in strides if s != 1))
            config = triton_heuristics.tile_config(
                ceil_div(T, E), N, precision, gpu(x.device), wide=wide, aligned=aligned, problems=E
            )
        tiles_m = ceil_div(T, config.BM) if offsets is None else T // config.BM + min(E, T)
        options = {
            "PRECISION": _input_precision(precision), "EVEN_N": N % config.BN == 0, "EVEN_K": K % config.BK == 0,
            "BM": config.BM, "BN": config.BN, "BK": config.BK, "GROUP": config.GROUP, "BE": 1 << (E - 1).bit_length(),
            "PARTS": config.parts,
            "num_warps": config.num_warps, "num_stages": config.num_stages,
        }  # fmt: skip
        arguments = (offsets, T, N, K, E, tiles_m, row_stride(x), *strides)
        return cls(x, offsets, N, tiles_m, tiles_m * ceil_div(N, config.BN), arguments, options)

    def empty(self) -> Tensor:
        """(T, N) of x's dtype."""
        return torch.empty(self.x.shape[0], self.N, dtype=self.x.dtype, device=self.x.device)

    def partial(self) -> Tensor:
        """(tiles_m, N) float32, for the sums of every row of tiles."""
        return torch.empty(self.tiles_m, self.N, dtype=torch.float32, device=self.x.device)

    def total(self, partial: Tensor | None) -> Tensor | None:
        """Sums of what the kernel left in `partial`."""
        return None if partial is None else column_sums(partial, self.offsets, self.options["BM"])


def _input_precision(precision: str) -> str:
    return "tf32" if precision == triton_heuristics.TF32 else "ieee"


def _aligned(*sizes: int) -> bool:
    return all(size % 16 == 0 for size in sizes)


def _contiguous(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()
