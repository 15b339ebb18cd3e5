"""Every launch of the Triton kernel of sampled products, compiled by `triton_aot`.

As a script (`python triton_aot_sparse.py 80,90`, in a process without TRITON_INTERPRET) it writes JSON, as `triton_aot`
does.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from unittest import mock

import torch
from triton_aot import Launch, keep, of_launches, recorder

DTYPES = (torch.float32, torch.bfloat16)


def sampled_launches() -> Iterable[Launch]:
    """Every distinct launch, for tokens that fill whole loads and some that do not; nothing is run."""
    from fusion_kernels.sparse import triton_backend

    launches: dict[str, Launch] = {}
    with mock.patch.object(triton_backend, "launch", recorder(launches)):
        for dtype in DTYPES:
            for T in (4096, 123):
                g, x = torch.zeros(T, 48, dtype=dtype), torch.zeros(T, 16, dtype=dtype)
                at = torch.zeros(77, dtype=torch.int32)
                triton_backend.sampled_product(g, x, at, at)
    return launches.values()


def main() -> None:
    """Write lists of `Resources` by capability, for those of the command line."""
    found = {capability: of_launches(sampled_launches(), capability) for capability in map(int, sys.argv[1].split(","))}
    keep()
    sys.stdout.write(json.dumps(found, default=str))


if __name__ == "__main__":
    main()
