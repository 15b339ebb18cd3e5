"""Everything that needs a GPU, in one run of less than ten minutes: first whether it is right, then how long it takes.

    python bench/gpu.py [--parts kmeans mlp ntk] [--shapes bert ...] [--budget 200] [--out bench/results/gpu.json]

The part `ntk` needs the CUDA library: `MLP_FUSION_BUILD=cuda python setup.py build_ext --inplace`.
Nothing of a part is timed if one of its checks fails. Times are medians between device events. The part `mlp` times the
kernels by tile; `bench/fused_mlp.py --device cuda` compares whole blocks with their peers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import gpu_kmeans
import gpu_mlp
import gpu_ntk
import torch
from gpu_timing import ceilings

from fusion_kernels import backends, gpu, native

PARTS = ("kmeans", "mlp", "ntk")


def main() -> None:
    """Check, measure, print and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shapes", nargs="+", choices=sorted(gpu_kmeans.SHAPES), default=list(gpu_kmeans.SHAPES))
    parser.add_argument("--budget", type=float, default=200.0, help="seconds for the MLP's tiles")
    parser.add_argument("--out", type=Path, default=Path("bench/results/gpu.json"))
    options = parser.parse_args()
    if gpu.why_not() is not None:
        parser.exit(1, f"bench/gpu.py needs a GPU that the Triton backend runs on: {gpu.why_not()}\n")
    import triton

    properties = torch.cuda.get_device_properties("cuda")
    found: dict[str, Any] = {
        "machine": {"gpu": properties.name, "memory": properties.total_memory},
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda},
        "backends": backends(),
    }
    with torch.no_grad():
        found["ceilings"] = rates = ceilings()
        if "kmeans" in options.parts:
            checks = gpu_kmeans.check()
            print("k-means is right:", json.dumps(checks))
            found["kmeans"] = {"checks": checks, "results": gpu_kmeans.run(rates, options.shapes)}
        if "mlp" in options.parts:
            errors = gpu_mlp.check_mlp()
            print("MLP kernels are right:", json.dumps(errors))
            found["mlp"] = {"error_over_torchs": errors, "tiles": gpu_mlp.sweep(options.budget)}
        if "ntk" in options.parts:
            reason = native.cuda_unavailable()
            if reason is not None:
                parser.exit(1, f"the CUDA library is not there: {reason} (MLP_FUSION_BUILD=cuda builds it)\n")
            errors = gpu_ntk.check()
            print("tangent kernels are right:", json.dumps(errors))
            found["ntk"] = {"checks": errors, "results": gpu_ntk.run(rates)}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
