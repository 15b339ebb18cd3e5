"""Every model type of transformers: are its FFNs found, proved, and moved by a key of its config?

`python bench/families.py [--types a,b] [--limit-seconds 120] [--again]`: default configs, with the arguments of
`mlp_fusion.families.catalogue` where one builds no model. Each type is a line of `build/families.jsonl` when it is
done, and a description in `build/families/`; what is there is not repeated. The summary is written at the end of every
run.
"""

from __future__ import annotations

import collections
import json
import re
import time
from pathlib import Path
from typing import Any

from census import TooLongError, limited, parser, recorded, walk, write

from mlp_fusion.errors import InputError
from mlp_fusion.families.catalogue import default_config, model_types
from mlp_fusion.families.describe import describe
from mlp_fusion.families.sites import Description

DONE, FOLDER = Path("build/families.jsonl"), Path("build/families")


def one_type(model_type: str, limit: int) -> dict[str, Any]:
    """The line of a type; its description is written to `FOLDER`."""
    started = time.perf_counter()
    line: dict[str, Any] = {"type": model_type}
    try:
        with limited(limit):
            found = describe(default_config(model_type))
    except TooLongError:
        line |= {"status": "too long", "reason": f"more than {limit} s"}
    except InputError as error:
        nothing = "no model class" in str(error)
        line |= {"status": "no class" if nothing else "not built", "reason": str(error)}
    except Exception as error:  # noqa: BLE001  (a fault of discovery: it is counted, and the others are run)
        line |= {"status": "failed", "reason": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    else:
        FOLDER.mkdir(parents=True, exist_ok=True)
        (FOLDER / f"{model_type}.json").write_text(json.dumps(found.to_dict()) + "\n", encoding="utf-8")
        line |= {"status": "built", **summarised(found)}
    return {**line, "seconds": round(time.perf_counter() - started, 2)}


def summarised(found: Description) -> dict[str, Any]:
    """What is kept of a description in the summary."""
    sites = found.sites
    return {
        "kinds": dict(collections.Counter(site.kind for site in sites)),
        "layers": sum(len(site.instances) for site in sites),
        "keyed": sum(site.unsaved is None for site in sites),
        "unnamed": sum(site.function.activation is None for site in sites),
        "refused": {refusal.parameter: refusal.reason for refusal in found.refused},
        "unsaved": sorted({site.unsaved for site in sites if site.unsaved is not None}),
        "set apart": len(found.set_apart),
        "complete": found.complete,
    }


def counts(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of the page about families."""
    built = [line for line in lines if line["status"] == "built"]
    bearing = [line for line in built if line["kinds"]]
    kinds: collections.Counter[str] = collections.Counter()
    for line in bearing:
        kinds.update(line["kinds"])
    complete = [line for line in bearing if line["complete"]]
    seconds = sorted(line["seconds"] for line in built)
    return {
        "types": len(lines),
        "status": dict(collections.Counter(line["status"] for line in lines)),
        "with FFNs": len(bearing),
        "kinds": dict(kinds),
        "layers": sum(line["layers"] for line in bearing),
        "unnamed kinds": sum(line["unnamed"] for line in bearing),
        "complete": len(complete),
        "complete and keyed": sum(line["keyed"] == sum(line["kinds"].values()) for line in complete),
        "refused": sum(bool(line["refused"]) for line in built),
        "seconds": {
            "median": seconds[len(seconds) // 2] if seconds else None,
            "90 %": seconds[len(seconds) * 9 // 10] if seconds else None,
            "most": seconds[-1] if seconds else None,
        },
        "reasons": dict(collections.Counter(kind for line in built for kind in sorted(_kinds(line))).most_common()),
    }


def _kinds(line: dict[str, Any]) -> set[str]:
    """Kinds of reasons, without what differs from model to model."""
    return {re.sub(r"\d[\d,.e+-]*", "N", reason).split(": ")[0] for reason in line["refused"].values()}


def main() -> None:
    """Run what is missing, print and write."""
    options = parser(__doc__, 120, "bench/results/families-cpu.json")
    options.add_argument(
        "--again", action="store_true", help="repeat types that failed, took too long or were not built"
    )
    asked = options.parse_args()
    done = recorded(DONE)
    keep = {kind for kind in ("failed", "too long", "not built") if asked.again}
    wanted = asked.types.split(",") if asked.types else [
        name for name in model_types() if name not in done or done[name]["status"] in keep
    ]  # fmt: skip
    lines = walk(DONE, wanted, lambda name: one_type(name, asked.limit_seconds))
    write(asked.out, counts(lines), lines)
    print(json.dumps(counts(lines), indent=1))


if __name__ == "__main__":
    main()
