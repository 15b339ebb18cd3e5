"""Every launch of the Triton kernels of the MLP, as the host functions choose them, compiled by `triton_aot`.

As a script (`python triton_aot_mlp.py 80,90`, in a process without TRITON_INTERPRET) it writes JSON, as `triton_aot`
does.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from unittest import mock

import torch
from torch import Tensor
from triton_aot import Launch, keep, of_launches, recorder

from fusion_kernels import Gate

#: Tokens, inputs, neurons: a decoding step, few and many tokens of a small model, larger ones, and rows that are not
#: aligned.
SHAPES = [
    (8, 768, 192), (1024, 768, 192), (65536, 768, 192), (65536, 2048, 512), (65536, 4096, 1024), (8192, 123, 50),
]  # fmt: skip

#: Limits on both sides have the most to compute.
LIMITED = Gate(7.0, "both", 1.0)


def mlp_launches(capability: int) -> Iterable[Launch]:
    """Every distinct launch for SHAPES in bfloat16, some in float32 with and without TF32; nothing is run."""
    from fusion_kernels.mlp import triton_heuristics, triton_launch, triton_linear, triton_resident

    launches: dict[str, Launch] = {}
    gpu = triton_heuristics.gpu_of(capability)
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(triton_launch, "launch", recorder(launches)))
        for module in (triton_linear, triton_resident):
            patches.enter_context(mock.patch.object(module, "gpu", return_value=gpu))
        for shape in SHAPES:
            _block(*shape, torch.bfloat16)
        for d, h in ((768, 192), (123, 50)):
            _experts(8192, d, h, 8, torch.bfloat16)
        for kind in (triton_heuristics.TF32, triton_heuristics.IEEE):
            patches.enter_context(mock.patch.object(triton_linear, "kind", return_value=kind))
            _block(8192, 768, 192, torch.float32)
            if kind == triton_heuristics.TF32:
                _experts(8192, 768, 192, 8, torch.float32)
    return launches.values()


def _block(T: int, d: int, h: int, dtype: torch.dtype) -> None:
    from fusion_kernels.mlp import triton_heuristics, triton_linear, triton_pointwise, triton_resident

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, w, out, b, z = new(T, d), new(h, d), new(d, h), new(h), new(T, h)
    # gelu has the most to compute.
    triton_linear.linear_act(x, w, b, "gelu", save_z=True)
    triton_linear.linear_act_backward(x, out, z, "gelu", need_a=True, need_db1=True)
    triton_linear.linear_glu(x, w, w, b, b, "gelu", save_z=True)
    triton_linear.linear_glu_backward(x, out, z, z, "gelu", need_a=True, need_db=True)
    triton_linear.linear_glu(x, w, w, b, b, "gelu", gating=LIMITED, save_z=True)
    triton_linear.linear_glu_backward(x, out, z, z, "gelu", gating=LIMITED, need_a=True, need_db=True)
    triton_pointwise.act_forward(z, "gelu")
    triton_pointwise.act_backward(z, z, "gelu", True)
    triton_pointwise.glu_act_backward(z, z, z, "gelu", True)
    triton_pointwise.glu_act_backward(z, z, z, "gelu", True, LIMITED)
    if dtype != torch.float32:
        aligned = d % 16 == 0
        gpu = triton_resident.gpu(x.device)
        if triton_heuristics.resident_config(T, h, triton_heuristics.HALF, gpu, False, aligned):
            triton_resident.mlp_resident(x, w, b, out, new(d), "gelu")
        if triton_heuristics.resident_config(T, h, triton_heuristics.HALF, gpu, True, aligned):
            triton_resident.glu_resident(x, w, w, b, b, out, new(d), "gelu")
            triton_resident.glu_resident(x, w, w, b, b, out, new(d), "gelu", gating=LIMITED)


def _experts(T: int, d: int, h: int, E: int, dtype: torch.dtype) -> None:
    from fusion_kernels.mlp import triton_linear, triton_pointwise
    from fusion_kernels.mlp.triton_tiles import ExpertTiles

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    offsets = torch.empty(E + 1, dtype=torch.int32, device="meta")
    owners, order = ExpertTiles(offsets, T), torch.empty(T, dtype=torch.int64, device="meta")
    x, w, out, b, z = new(T, d), new(E, h, d), new(E, d, h), new(E, h), new(T, h)
    triton_linear.linear_act(x, w, b, "gelu", save_z=True, experts=owners, rows=order)
    triton_linear.linear_act_backward(x, out, z, "gelu", need_a=True, need_db1=True, experts=owners, rows=order)
    triton_linear.linear_glu(x, w, w, None, None, "silu", save_z=True, experts=owners, rows=order)
    triton_linear.linear_glu_backward(x, out, z, z, "silu", need_a=True, need_db=False, experts=owners, rows=order)
    triton_linear.grouped_linear(z, out.mT, owners, places=order)
    triton_linear.grouped_linear(z, w, owners, second=(z, w), places=order)
    triton_linear.grouped_weight_gradient(z, x, offsets, b_rows=order)
    triton_linear.grouped_weight_gradient(x, z, offsets, a_rows=order)
    triton_pointwise.column_sums(x, offsets, rows=order)


def main() -> None:
    """Write lists of `Resources` by capability, for those of the command line."""
    capabilities = map(int, sys.argv[1].split(","))
    found = {capability: of_launches(mlp_launches(capability), capability) for capability in capabilities}
    keep()
    sys.stdout.write(json.dumps(found, default=str))


if __name__ == "__main__":
    main()
