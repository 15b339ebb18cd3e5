"""Every model type with FFNs that runs whole: a small real model is halved by what no method and text come to.

`python bench/families_calibrated.py [--types a,b] [--limit-seconds 60]`: small models and their inputs are those of
`families_roundtrip.py`, from its results. Each type is a line of `build/families_calibrated.jsonl` when it is done;
what is there is not repeated. The summary is written at the end of every run.
"""

from __future__ import annotations

import collections
import json
import time
import warnings
from pathlib import Path
from typing import Any

import transformers
from census import TooLongError, limited, parser, recorded, walk, write
from support import round_trips

import mlp_fusion
from mlp_fusion.errors import InputError
from mlp_fusion.families import building

DONE = Path("build/families_calibrated.jsonl")
KNOWN = Path("bench/results/families-roundtrip-cpu.json")
#: How warnings of what the default goes without begin, and what that is.
WITHOUT = {"all errors of outputs count alike": "gradients", "all FFNs are calibrated at once": "sequence"}
#: How often a model sees its input: text for two FFNs to be told apart by.
REPEATS = 3


def one_type(model_type: str, config: dict[str, Any], limit: int) -> dict[str, Any]:
    """The line of a type.

    Args:
        model_type: of transformers.
        config: the steps that make a small one of it.
        limit: seconds.
    """
    started, trips, trip = time.perf_counter(), round_trips(), None
    line: dict[str, Any] = {"type": model_type, "status": "done"}
    try:
        with limited(limit), building.undisturbed(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trip = trips.prepare(model_type, trips.steps_of(config))
            if trip.sample is None:
                raise InputError("no guess at its inputs is taken")
            layers = "*" if trip.unproved else None
            text = [dict(trip.sample)] * REPEATS
            report = mlp_fusion.fuse(trip.model, 0.5, layers=layers, calibration=text)
        said = {str(warning.message).split(":")[0] for warning in caught}
        line |= {"method": report.settings.method, "without": sorted(WITHOUT[how] for how in said & WITHOUT.keys())}
    except TooLongError:
        line |= {"status": "too long"}
    except InputError as error:
        status = "no small model" if trip is None or trip.sample is None else "refused"
        line |= {"status": status, "reason": " ".join(str(error).split())[:300]}
    except Exception as error:  # noqa: BLE001  (it is counted, and the others are run)
        line |= {"status": "failed", "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return {**line, "seconds": round(time.perf_counter() - started, 2)}


def counts(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Types by what became of them, and those that went without something."""
    done = [line for line in lines if line["status"] == "done"]
    return {
        "types": len(lines),
        "status": dict(collections.Counter(line["status"] for line in lines)),
        "without": dict(collections.Counter(what for line in done for what in line["without"])),
    }


def main() -> None:
    """Run what is missing, print and write."""
    asked = parser(__doc__, 60, "bench/results/families-calibrated-cpu.json").parse_args()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    known = json.loads(KNOWN.read_text(encoding="utf-8"))["types"]
    configs = {line["type"]: line["config"] for line in known if line.get("whole") and "config" in line}
    done = recorded(DONE)
    wanted = asked.types.split(",") if asked.types else [name for name in configs if name not in done]
    lines = walk(DONE, wanted, lambda name: one_type(name, configs[name], asked.limit_seconds))
    write(asked.out, counts(lines), lines)
    print(json.dumps(counts(lines), indent=1))


if __name__ == "__main__":
    main()
