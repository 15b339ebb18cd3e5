"""`env`: versions, devices, and which backend each operator uses here."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from fusion_kernels import backends
from mlp_fusion.verbs.gpu import states


def environment() -> dict[str, Any]:
    """Versions, devices and backends, as plain JSON types."""
    versions: dict[str, str] = {"python": platform.python_version()}
    for package in ("mlp-fusion", "torch", "triton", "transformers", "safetensors", "numpy", "accelerate", "peft"):
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
