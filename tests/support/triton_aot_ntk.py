"""Every launch of the Triton kernel of tangent kernels, as its host chooses it, compiled by `triton_aot`.

As a script (`python triton_aot_ntk.py 80,90`, in a process without TRITON_INTERPRET) it writes JSON, as `triton_aot`
does.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from ffn_blocks import make_bundle
from triton_aot import Launch, keep, of_launches, recorder, shared_memory

#: Inputs and neurons of a real layer.
WIDTH = (768, 192)
#: Rows of both sides, and parts: many with themselves and with others, in two passes; few. As odd as the kernel takes
#: them to be.
CALLS = [
    (4097, None, ("w_in", "b_gate", "w_out")), (4097, 1001, ("w_in", "b_gate", "w_out")),
    (63, None, ("w_in", "w_gate", "w_out")),
]  # fmt: skip
PRECISIONS = [
    (torch.float32, "bf16x3"), (torch.float32, "bf16"), (torch.float32, "tf32x3"), (torch.float32, "highest"),
    (torch.float64, "highest"),
]  # fmt: skip


def ntk_launches(capability: int) -> Iterable[Launch]:
    """Every distinct launch for CALLS in every precision; nothing is run."""
    from fusion_kernels.ntk import triton_backend

    launches: dict[str, Launch] = {}
    with ntk_host(capability), mock.patch.object(triton_backend, "launch", recorder(launches)):
        for dtype, precision in PRECISIONS:
            for rows, others, params in CALLS:
                tangent_kernel(rows, others, *WIDTH, params, dtype, precision)
        for dtype in (torch.float32, torch.float64):
            for others in (None, 1001):
                compared(4097, others, *WIDTH, dtype)
    return launches.values()


def tangent_kernel(
    rows: int, others: int | None, d: int, h: int, params: tuple[str, ...], dtype: torch.dtype, precision: str
) -> None:
    """What the host does for a kernel of a gated block, of whose tensors there are only the shapes."""
    from fusion_kernels.ntk import triton_backend

    ffn = make_bundle(d, h, 3, gated=True).at(0).map(lambda t: t.to("meta", dtype))
    x1, x2 = (None if n is None else torch.empty(n, d, dtype=dtype, device="meta") for n in (rows, others))
    assert x1 is not None
    triton_backend.ntk_gram(x1, x2, ffn, params, "gd", precision=precision)


def compared(rows: int, others: int | None, d: int, h: int, dtype: torch.dtype) -> None:
    """What the host does for the sums over the kernels of two blocks, likewise."""
    from fusion_kernels.ntk import triton_backend
    from fusion_kernels.ntk.types import Differentiated

    ffn = make_bundle(d, h, 3).at(0).map(lambda t: t.to("meta", dtype))
    x1, x2 = (None if n is None else torch.empty(n, d, dtype=dtype, device="meta") for n in (rows, others))
    assert x1 is not None
    block = Differentiated(ffn, ("w_in", "b_in", "w_out"), None)
    triton_backend.ntk_sums(x1, x2, block, block, "gd", block_size=rows)


@contextmanager
def ntk_host(capability: int) -> Iterator[None]:
    """The host of tangent kernels, as it chooses tiles for a GPU that is not here."""
    from fusion_kernels.ntk import triton_backend

    much = shared_memory(capability)
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(triton_backend, "shared_memory", return_value=much))
        patches.enter_context(mock.patch.object(triton_backend, "capability", return_value=divmod(capability, 10)))
        yield


def main() -> None:
    """Write lists of `Resources` by capability, for those of the command line."""
    capabilities = map(int, sys.argv[1].split(","))
    found = {capability: of_launches(ntk_launches(capability), capability) for capability in capabilities}
    keep()
    sys.stdout.write(json.dumps(found, default=str))


if __name__ == "__main__":
    main()
