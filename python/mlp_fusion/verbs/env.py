"""`env`: versions, devices, and which backend each operator uses here."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

import mlp_fusion
from fusion_kernels import backends
from mlp_fusion.verbs.gpu import states


def environment() -> dict[str, Any]:
    """Versions, devices and backends, as plain JSON types."""
    # As they run: a build of torch for CUDA may be installed under a version that does not name it.
    versions: dict[str, str] = {
        "python": platform.python_version(), "mlp-fusion": mlp_fusion.__version__, "torch": torch.__version__
    }  # fmt: skip
    for package in ("triton", "transformers", "safetensors", "numpy", "accelerate", "peft"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    versions["cuda"] = torch.version.cuda or "none (CPU build of torch)"
    devices = [f"cpu, {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        devices.append(f"cuda:{index}, {properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB")
    return {"versions": versions, "devices": devices, "backends": backends(), "gpu_kernels": states()}


def lines(report: dict[str, Any]) -> list[str]:
    """The same for people: a name and what is known of it in each."""
    rows = [*report["versions"].items(), *(("device", device) for device in report["devices"])]
    rows += [(name, _grouped(row)) for name, row in report["backends"].items()]
    rows += [("GPU kernels", ", ".join(f"{k}: {v}" for k, v in row.items())) for row in report["gpu_kernels"]]
    width = max(len(name) for name, _ in rows)
    return [f"{name:{width}} {value}" for name, value in rows]


def _grouped(row: dict[str, str]) -> str:
    """What is known of an operator, backends that are missing for the same reason together."""
    found: dict[str, list[str]] = {}
    for key, value in row.items():
        name, missing, _ = key.partition(" unavailable")
        said = f"unavailable: {value}" if missing else f"{key}: {value}"
        found.setdefault(said, []).extend([name] if missing else [])
    return "; ".join(f"{', '.join(names)} {said}".strip() for said, names in found.items())
