"""What bench/gpu.py is to show, and whether it has: one entry for each bar and line, at the end of every run.

The numbers are those of the file; a bar of which there is none says so, and why where that is known. A bar that is
missed is no failure: speed is measured here, never asserted. This module imports neither torch nor the packages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gpu_running import FOUND_WITH

#: Times that k-means is faster than the fastest peer, whose inertia it may exceed by this share: labels differ in ties.
FASTER, SAME_INERTIA = 2.0, 1e-3
#: Times that a training step of a small FFN of so many inputs is faster than that of compiled layers.
OVER_COMPILED, INPUTS = 1.12, 768
#: Share of its floor that the fastest form of a small FFN reaches.
OF_THE_FLOOR = 0.85
#: Seconds of a layer of experts of Mixtral's shape.
LAYER_SECONDS = 1.5
#: How names of peers begin in lines of k-means, and what is the project's own in lines of small FFNs.
KMEANS_PEERS, OWN = ("torch", "flash-kmeans"), ("torch", "cublas", "epilogue", "epilogue, other tile")
COMPILED = "compile"

Stages = Mapping[str, Mapping[str, Mapping[str, Any]]]


def bars(stages: Stages, failures: Stages) -> list[dict[str, Any]]:
    """Every bar by line: what was found, and whether it holds; None where nothing was measured.

    Args:
        stages: results by stage and line.
        failures: the same of what has none.
    """
    every = (
        ("kmeans", ": modes", f"at least {FASTER:g} times as fast as the fastest peer at equal inertia", _beside_peers),
        ("kmeans", ": whole layer", f"a layer of experts in less than {LAYER_SECONDS:g} s", _seconds),
        ("mlp", ": training step", f"a step at most that of compiled layers / {OVER_COMPILED:g}", _beside_compiled),
        ("mlp", ": forward", f"{OF_THE_FLOOR:.0%} of the floor", _of_the_floor),
        ("mlp", ": training step", f"{OF_THE_FLOOR:.0%} of the floor", _of_the_floor),
    )
    found: list[dict[str, Any]] = []
    for stage, ending, bar, judge in every:
        entries = []
        for line, result in _lines(stages, failures, stage, ending):
            unknown = {"holds": None, "found": f"not measured: {_why(result)}"}
            judged = judge(result) if "ms" in result else unknown
            if judged is not None:
                mark = {name: value for name, value in result.items() if name == FOUND_WITH}
                entries.append({"line": f"{stage}: {line}", "bar": bar, **judged, **mark})
        nothing = {"line": f"{stage}{ending}", "bar": bar, "holds": None, "found": "not measured: not reached"}
        found += entries or [nothing]
    return found


def in_words(entry: Mapping[str, Any]) -> str:
    """One line for the terminal."""
    outcome = {True: "HOLDS", False: "MISSED", None: "UNKNOWN"}[entry["holds"]]
    mark = ", by other kernels" if FOUND_WITH in entry else ""
    return f"{outcome}: {entry['line']}: {entry['bar']}: {entry['found']}{mark}"


def over_compiled(ms: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """How many times as long compiled layers take as each of the project's own forms; empty if either is missing."""
    if COMPILED not in ms:
        return {}
    return {name: ms[COMPILED]["median"] / ms[name]["median"] for name in OWN if name in ms}


def _lines(stages: Stages, failures: Stages, stage: str, ending: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Lines that end so, with results before failures."""
    for line, result in {**failures.get(stage, {}), **stages.get(stage, {})}.items():
        if line.endswith(ending):
            yield line, result


def _why(result: Mapping[str, Any]) -> str:
    return str(result.get("skipped") or result.get("failed") or f"{result.get('type')}: {result.get('message')}")


def _beside_peers(result: Mapping[str, Any]) -> dict[str, Any]:
    ms, inertia = result["ms"], result["inertia"]
    peers = [name for name in ms if name.startswith(KMEANS_PEERS)]
    if not peers:
        return {"holds": None, "found": "no peer was timed"}
    peer = min(peers, key=lambda name: ms[name]["median"])
    able = [name for name in ms if name not in peers and inertia[name] <= inertia[peer] * (1 + SAME_INERTIA)]
    if not able:
        return {"holds": False, "found": f"nothing ends at the inertia of {peer}, {inertia[peer]:.4f}"}
    own = min(able, key=lambda name: ms[name]["median"])
    times = ms[peer]["median"] / ms[own]["median"]
    said = f"{own} {times:.2f} times as fast as {peer}, inertia {inertia[own]:.4f} and {inertia[peer]:.4f}"
    return {"holds": times >= FASTER, "value": times, "found": said}


def _seconds(result: Mapping[str, Any]) -> dict[str, Any]:
    name, row = min(result["ms"].items(), key=lambda item: item[1]["median"])
    seconds = row["median"] / 1e3
    return {"holds": seconds < LAYER_SECONDS, "value": seconds, "found": f"{name} {seconds:.2f} s"}


def _beside_compiled(result: Mapping[str, Any]) -> dict[str, Any] | None:
    if result["d"] != INPUTS:
        return None
    times = over_compiled(result["ms"])
    if not times:
        return {"holds": None, "found": "compiled layers or all of ours were not timed"}
    own = max(times, key=times.__getitem__)
    found = f"compiled layers take {times[own]:.2f} times as long as {own}"
    return {"holds": times[own] >= OVER_COMPILED, "value": times[own], "found": found}


def _of_the_floor(result: Mapping[str, Any]) -> dict[str, Any]:
    shares = {name: share for name, share in result["share of the floor"].items() if name in OWN}
    if not shares:
        return {"holds": None, "found": "none of ours was timed"}
    own = max(shares, key=shares.__getitem__)
    return {"holds": shares[own] >= OF_THE_FLOOR, "value": shares[own], "found": f"{own} reaches {shares[own]:.0%}"}
