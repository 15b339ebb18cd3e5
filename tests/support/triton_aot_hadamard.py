"""Every launch of the Triton kernels of transforms and Fastfood, compiled by `triton_aot`.

As a script (`python triton_aot_hadamard.py 80,90`, in a process without TRITON_INTERPRET) it writes JSON, as
`triton_aot` does.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from unittest import mock

import torch
from triton_aot import Launch, keep, of_launches, recorder

#: Entries of theta and of P theta: all within a tile, and in passes over near and distant bits. In float64, whose
#: tiles are as large, the first.
PAIRS = {torch.float32: [(200, 768), (20_000, 768 * 3072)], torch.float64: [(200, 768)]}


def hadamard_launches() -> Iterable[Launch]:
    """Every distinct launch for PAIRS, and for transforms of as many entries; nothing is run."""
    from fusion_kernels.hadamard import triton_backend

    launches: dict[str, Launch] = {}
    with mock.patch.object(triton_backend, "launch", recorder(launches)):
        for dtype, pairs in PAIRS.items():
            for length, size in pairs:
                triton_backend.hadamard(torch.empty(1, 1 << (size - 1).bit_length(), dtype=dtype, device="meta"))
                triton_backend.fastfood(torch.empty(1, length, dtype=dtype, device="meta"), size, 0)
                triton_backend.fastfood_transposed(torch.empty(1, size, dtype=dtype, device="meta"), length, 0)
    return launches.values()


def main() -> None:
    """Write lists of `Resources` by capability, for those of the command line."""
    capabilities = map(int, sys.argv[1].split(","))
    found = {capability: of_launches(hadamard_launches(), capability) for capability in capabilities}
    keep()
    sys.stdout.write(json.dumps(found, default=str))


if __name__ == "__main__":
    main()
