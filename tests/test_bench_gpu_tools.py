"""The tools that bench/gpu.py lets watch its kernels: what they say is understood, what they watch, how they end."""

from __future__ import annotations

import importlib
import os
import time
from pathlib import Path

import pytest
import torch

from fusion_kernels.kmeans import gpu_cases as of_kmeans


def test_what_the_sanitizer_says_is_understood(importable: None) -> None:
    judged = importlib.import_module("gpu_sanitizer").judged
    assert judged(0, "========= ERROR SUMMARY: 0 errors\n") == {"outcome": "clean"}
    hazards = "========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n"
    assert judged(86, hazards)["outcome"] == "2 errors"
    assert judged(None, "loading") == {"outcome": "too slow", "said": "loading"}
    # What ends well without having counted has not looked.
    assert judged(0, "Target application returned an error") == {
        "outcome": "status 0", "said": "Target application returned an error",
    }  # fmt: skip


def test_what_nsight_compute_says_is_understood(importable: None) -> None:
    launches = importlib.import_module("gpu_ncu").launches
    page = [
        "==PROF== Connected to process 5", "a line of the call",
        '"ID","Kernel Name","dram__throughput.avg.pct_of_peak_sustained_elapsed","gpu__time_duration.sum","device__id"',
        '"","","%","us",""', '"0","_gram_kernel","12.5","85.1","0"', '"1","_gram_kernel","","85.3","0"',
    ]  # fmt: skip
    assert launches("\n".join(page)) == [
        {
            "kernel": "_gram_kernel", "dram__throughput.avg.pct_of_peak_sustained_elapsed": "12.5 %",
            "gpu__time_duration.sum": "85.1 us",
        },
        {"kernel": "_gram_kernel", "gpu__time_duration.sum": "85.3 us"},
    ]  # fmt: skip
    assert launches("==ERROR== The user does not have permission") == launches("\n".join(page[:4])) == []


def test_small_cases_of_every_kind_are_watched(importable: None) -> None:
    kind = importlib.import_module("gpu_watched")._kind
    assert kind("65 float64 points in 16 clusters, k-means++, lloyd") != kind("520 float32 points in 130 clusters")
    assert kind("cublas, gated, torch.bfloat16, 300 x 768 x 192") == kind(
        "cublas, gated, torch.float16, 300 x 256 x 192"
    )
    assert kind("cublas, gated, torch.bfloat16, 1 x 1 x 1") != kind("cublas, plain, torch.bfloat16, 1 x 1 x 1")


def test_what_the_sanitizer_watches_is_of_every_operator_and_larger_than_one(importable: None) -> None:
    watched, sanitizer = (importlib.import_module(f"gpu_{name}") for name in ("watched", "sanitizer"))
    cases = of_kmeans.triton(torch.device("cpu"))
    names = [case.name for case in watched.one_of_each(cases, watched._kind)]
    assert [name for name in names if "nearest" in name] == ["nearest of 70 centroids in torch.float32, 700 x 123"]
    assert {watched._kind(case.name) for case in cases} == {watched._kind(name) for name in names}
    assert set(sanitizer.calls()) >= {"small-sparse", "small-hadamard"}
    assert set(sanitizer.calls()) <= set(watched.CALLS)


def test_a_tool_that_does_not_end_is_ended_with_all_that_it_has_started(
    importable: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = importlib.import_module("gpu_watched")
    endless = tmp_path / "endless"
    endless.write_text(f"#!/bin/sh\nsleep 600 &\necho $! > {tmp_path}/child\necho said\nwait\n", encoding="utf-8")
    endless.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert watched.tool("endless") == str(endless)
    assert watched.tool("no-such-tool") is None
    assert watched.watch([str(endless)], "kmeans", 3.0) == (None, "said\n")
    child = int((tmp_path / "child").read_text(encoding="utf-8"))
    state, until = Path(f"/proc/{child}/stat"), time.monotonic() + 20
    # Whoever takes over orphans may leave a zombie.
    while state.exists() and state.read_text(encoding="utf-8").split()[2] != "Z":
        assert time.monotonic() < until, "what the tool has started goes on"
