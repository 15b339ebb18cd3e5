"""The stages of bench/gpu.py, line by line, with the CPU in the place of a GPU: what a device is asked for runs.

Nothing of this says that results or times are right on a GPU; it says that no line ends for a reason of its own.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

ROOT = Path(__file__).parents[1]
FOLDERS = [ROOT / "bench", ROOT / "tests" / "support", ROOT / "python", ROOT]


@functools.cache
def lines(*stages: str) -> dict[str, dict[str, Any]]:
    """What each line of the stages comes to, by stage and line, in a process of its own: this one may compile."""
    folders = os.pathsep.join(map(str, FOLDERS))
    environment = {**os.environ, "PYTHONPATH": folders, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "support" / "gpu_stand_in.py"), *stages]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, Any]] = {}
    for message in (json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"stage"')):
        assert "failure" not in message, f"{message['stage']}: {message['line']}: {message['failure']}"
        found.setdefault(message["stage"], {})[message["line"]] = message["result"]
    return found


def test_kmeans() -> None:
    found = lines("gpu_kmeans")["gpu_kmeans"]
    steps, modes = found["bert: steps"], found["bert: modes"]
    assert set(steps["ms"]) == {
        "Gram", "seeding", "Lloyd", "Hartigan", "means and inertia", "whether float32 is enough", "settling",
    }  # fmt: skip
    assert set(steps["us per pass"]) == {"Lloyd", "Hartigan"}
    assert steps["passes"]["Hartigan"] > 0
    assert {"default", "lloyd", "given"} < set(modes["inertia"])
    assert set(modes["ms"]) == set(modes["inertia"])
    assert "share of the floor" in found["nearest centroids"]
    assert set(found["mixtral: whole layer"]["ms"]) == {"default"}
    on_the_cpu = found["bert: on the CPU"]
    assert "skipped" in on_the_cpu or on_the_cpu["inertia, device over CPU"] == pytest.approx(1, rel=1e-5)


def test_blocks_experts_and_tangent_kernels() -> None:
    found = lines("gpu_mlp", "gpu_experts", "gpu_ntk", "gpu_profile")
    for name, line in found["gpu_mlp"].items():
        assert "failed" not in line, name
        if "forward" in name or "step" in name:
            assert {"eager", "compile", "torch", "cublas", "epilogue", "epilogue, other tile"} <= set(line["ms"]), name
            assert set(line["times eager"]) == set(line["ms"]) - {"eager"}
            assert set(line["compile over"]) == {"torch", "cublas", "epilogue", "epilogue, other tile"}
            assert "; compile over torch " in line["brief"]
        elif "tiles" in name:
            assert {"forward", "backward"} <= set(line)
        else:
            assert set(line["ms"]) == {"torch", "cublas", "epilogue"}
    assert all(set(line["ms"]) == {"grouped_mm", "triton"} for line in found["gpu_experts"].values())
    of_each = ("{}: against float64", "{}: streams and devices", "{}: comparisons", "{}: more than 2^32 values")
    assert set(found["gpu_ntk"]) == {
        "9 inputs: times", *(line.format(k) for line in of_each for k in ("triton", "cuda")),
    }  # fmt: skip
    assert not any("skipped" in line for line in found["gpu_ntk"].values())
    times, precisions = found["gpu_ntk"]["9 inputs: times"], ("highest", "tf32x3", "bf16x3", "bf16")
    assert {f"{k} {p}" for k in ("triton", "cuda") for p in precisions} < set(times["ms"])
    assert set(times["tiles"]) == {"triton", "cuda"}
    assert all(len(line["table"]) > 5 for line in found["gpu_profile"].values())


def test_the_device_and_the_whole_product() -> None:
    found = lines("gpu_device", "gpu_whole")
    assert {"device", "kernels", "torch", "triton"} <= set(found["gpu_device"]["facts"]["about"])
    assert set(found["gpu_device"]["rates"]) == {"bf16_flops", "copy_bytes", "brief"}
    training, compressed = found["gpu_whole"]["training"], found["gpu_whole"]["compress llama"]
    assert {f"FusedMLP, {name}" for name in ("auto", "torch", "cublas", "epilogue")} < set(training["ms"])
    assert {"device, first", "device"} <= set(compressed["seconds"])


def test_what_is_compiled_ahead_and_what_tools_watch() -> None:
    found = lines("calls")["calls"]
    families = {name.split(" ")[0] for name in found["ahead"]["calls"]}
    some = found["ahead"]["calls of"]
    assert {name.split(" ")[0] for name in some["experts"]} == {"experts"}
    assert {name.split(" ")[0] for name in some["ncu"]} == {"kmeans", "mlp"}
    assert some["compile"] == found["ahead"]["calls"]
    proofs = {f"{name}-proof" for name in ("kmeans", "mlp", "experts", "sparse", "hadamard", "ntk")}
    assert families == {"kmeans", "mlp", "experts", "ntk", "whole", *proofs}
    assert {"mlp", "small-mlp", "small-experts", "small-resident", "small-ntk", "small-ntk-cuda"} < set(found)
    assert {"small-sparse", "small-hadamard", "small-ntk-sums"} < set(found)


def test_what_a_round_and_a_seed_wait_for(tmp_path: Path) -> None:
    """As launched and compiled now: a third of what they waited for at first, and no fence for the whole device."""
    out = tmp_path / "latency.json"
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = {**clean, "PYTHONPATH": os.pathsep.join(map(str, FOLDERS)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "bench" / "gpu_latency.py"), "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    stored = json.loads((ROOT / "bench" / "results" / "gpu-latency.json").read_text(encoding="utf-8"))
    for found in (json.loads(out.read_text(encoding="utf-8")), stored):
        assert found["problem"] == {"points": 3072, "clusters": 768, "dtype": "float32", "capability": 90}
        steps = found["dependent steps"]
        assert 3 * steps["now"]["mean"] <= steps["first"]["mean"]
        assert 3 * steps["now"]["of a seed"] <= steps["first"]["of a seed"]
        assert len(found["code"]["now"]) == found["launches"]["of a round"] + found["launches"]["of all seeds"] == 6
        assert all(code["barriers"] > 0 == code["fences"] for code in found["code"]["now"].values())
        # The blocks that are launched now are those of the stored figures.
        assert steps["now"]["form"] == stored["dependent steps"]["now"]["form"]
