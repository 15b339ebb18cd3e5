"""Every model type with FFNs: a small real model is halved without an error, saved, loaded plain, restored, trained.

`python bench/families_roundtrip.py [--types a,b] [--limit-seconds 120] [--again] [--without STATUS,...]`: small configs
are made from the default ones, and neurons are made equal, so that merging them must not change any output: see
`tests/support/round_trips.py`. Each type is a line of `build/families_roundtrip.jsonl` when it is done; what is there
is not repeated, and the steps that made a good small config are taken from there. The summary is written at the end of
every run.
"""

from __future__ import annotations

import collections
import json
import re
import time
from pathlib import Path
from typing import Any

import transformers
from census import TooLongError, limited, parser, recorded, walk, write
from support import round_trips

from mlp_fusion.errors import InputError
from mlp_fusion.families import building
from mlp_fusion.verbs.families import layout

DONE = Path("build/families_roundtrip.jsonl")
FOUND = Path("bench/results/families-cpu.json")
#: What may become of a type, best first.
STATUS = ("done", "in memory only", "refused", "not run", "no small config", "failed", "too long")


def one_type(model_type: str, limit: int, before: dict[str, Any] | None) -> dict[str, Any]:
    """The line of a type.

    Args:
        model_type: of transformers.
        limit: seconds.
        before: its last line, if any.
    """
    started = time.perf_counter()
    trips = round_trips()
    line: dict[str, Any] = {"type": model_type}
    good = before is not None and "config" in before and before.get("whole") and before["even"]
    known = before["config"] if before is not None and good else None
    trip = None
    try:
        with limited(limit), building.undisturbed():
            trip = trips.prepare(model_type, known and trips.steps_of(known))
            line |= prepared(trip)
            trips.round_trip(trip, mistakes=1)
            line |= {"status": "done"} if trip.probes else {"status": "not run", "reason": trip.problems[-1:]}
    except TooLongError:
        line |= {"status": "too long", "reason": f"more than {limit} s"}
    except Exception as error:  # noqa: BLE001  (it is counted, and the others are run)
        line |= said(error, trip)
    if trip is not None:
        line |= {"stages": trip.done, "figures": trip.figures}
    return {**line, "seconds": round(time.perf_counter() - started, 2)}


def prepared(trip: Any) -> dict[str, Any]:
    """What is kept of a type before anything is fused."""
    return {
        "config": trip.small.record(),
        "kinds": dict(collections.Counter(site.kind for site in trip.description.sites)),
        "layouts": sorted({layout_of(site) for site in trip.description.sites}),
        "complete": trip.description.complete,
        "unproved": list(trip.unproved),
        "keyed": trip.description.keyed,
        "even": trip.even,
        "whole": trip.whole,
        "ffns": len(trip.paths),
        "reached": len(trip.reached),
        "run": {probe.path: sorted(probe.inputs) for probe in trip.probes},
        "not reached": sorted(trip.paths - trip.reached)[:3],
        "problems": trip.problems if trip.paths > trip.reached else [],
    }


def layout_of(site: Any) -> str:
    """How an FFN lies in its parameters, in a few words."""
    transposed = any(p.neuron_axis != (p.role == "w_out") for p in site.projections if p.expert_axis is None)
    return ", ".join([site.kind, layout(site), *(["transposed"] if transposed else [])])


def said(error: Exception, trip: Any) -> dict[str, Any]:
    """Status and reason of a type that did not come through."""
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if not isinstance(error, InputError):
        return {"status": "failed", "reason": reason}
    reason = reason.removeprefix("InputError: ")
    if trip is None:
        status = "refused" if "is not supported" in str(error) else "no small config"
        return {"status": status, "reason": reason}
    return {"status": "in memory only" if "fused" in trip.done else "refused", "reason": reason}


def bearing() -> list[str]:
    """The types whose FFNs `bench/families.py` has found."""
    found = json.loads(FOUND.read_text(encoding="utf-8"))["types"]
    return [line["type"] for line in found if line.get("kinds")]


def counts(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of the page about families."""
    status = collections.Counter(line["status"] for line in lines)
    ready = [line for line in lines if "config" in line]
    run = [line for line in ready if line["run"]]
    reasons: dict[str, collections.Counter[str]] = {}
    for line in lines:
        if line["status"] != "done":
            reasons.setdefault(line["status"], collections.Counter())[kind_of(line)] += 1
    return {
        "with FFNs": len(bearing()),
        "types": len(lines),
        "small models": len(ready),
        "run": len(run),
        "run whole": sum("" in line["run"] for line in run),
        "every FFN run": sum(line["reached"] == line["ffns"] for line in run),
        "status": {name: status[name] for name in STATUS if status[name]},
        "done": {kind: sum(kind in line["kinds"] for line in lines if line["status"] == "done")
                 for kind in ("dense", "experts", "shared")},
        "done but for what is not proved": sum(
            bool(line.get("unproved")) for line in lines if line["status"] == "done"
        ),
        "with a mistake unnoticed": sum(
            unnoticed_mistake(line) for line in lines if line["status"] == "done"
        ),
        "largest difference": {
            name: max((line["figures"][name] for line in lines if line["status"] == "done"), default=None)
            for name in ("in memory", "parameters", "loaded", "restored")
        },
        "reasons": {name: dict(found.most_common()) for name, found in reasons.items()},
    }  # fmt: skip


def unnoticed_mistake(line: dict[str, Any]) -> bool:
    """Whether a description with a mistake changed no output."""
    return any(how.startswith("unnoticed") for how in line["figures"].get("controls", {}).values())


def kind_of(line: dict[str, Any]) -> str:
    """A reason without what differs from model to model."""
    known = {"not run": "no guess at its inputs is taken", "too long": "it takes longer than it may"}
    if line["status"] in known:
        return known[line["status"]]
    reason = str(line["reason"]).removeprefix(f"{line['type']}: ").split(": `mlp-fusion")[0]
    reason = re.sub(r"[\w.#\[\]]*\.[\w.#]+", "PATH", reason).removeprefix("PATH: ")
    reason = re.sub(r"^\w+: what it takes besides \w+", "what it takes besides its main input", reason)
    return re.sub(r"\d[\d,.e+-]*", "N", reason)[:160]


def main() -> None:
    """Run what is missing, print and write."""
    options = parser(__doc__, 120, "bench/results/families-roundtrip-cpu.json")
    options.add_argument("--again", action="store_true", help="repeat all types that are not done")
    options.add_argument("--without", default="", help="with --again: but for those of these statuses: a,b")
    asked = options.parse_args()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    done = recorded(DONE)
    left = {"done", *asked.without.split(",")} if asked.again else set(STATUS)
    wanted = asked.types.split(",") if asked.types else [
        name for name in bearing() if name not in done or done[name]["status"] not in left
    ]  # fmt: skip
    lines = walk(DONE, wanted, lambda name: one_type(name, asked.limit_seconds, done.get(name)))
    write(asked.out, counts(lines), [
        line if line["status"] == "done" else {**line, "kind": kind_of(line)} for line in lines
    ])  # fmt: skip
    print(json.dumps(counts(lines), indent=1))


if __name__ == "__main__":
    main()
