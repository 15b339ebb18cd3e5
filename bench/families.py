"""Every model type of transformers: are its FFNs found, proved, and moved by a key of its config?

`python bench/families.py [--types a,b] [--limit-seconds 120] [--again]`: default configs, with the arguments of
`mlp_fusion.families.catalogue` where one builds no model. Each type is a line of `build/families.jsonl` when it is
done, and a description in `build/families/`; what is there is not repeated. The summary is written at the end of every
run.
"""

from __future__ import annotations

import argparse
import collections
import json
import platform
import re
import signal
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from mlp_fusion.errors import InputError
from mlp_fusion.families.catalogue import default_config, model_types
from mlp_fusion.families.describe import describe
from mlp_fusion.families.sites import Description

DONE, FOLDER = Path("build/families.jsonl"), Path("build/families")


class TooLongError(BaseException):
    """A type took longer than it may; no `except Exception` within stops it."""


def _late(*_: Any) -> None:
    raise TooLongError


def one_type(model_type: str, limit: int) -> dict[str, Any]:
    """The line of a type; its description is written to `FOLDER`."""
    started = time.perf_counter()
    signal.signal(signal.SIGALRM, _late)
    signal.alarm(limit)
    line: dict[str, Any] = {"type": model_type}
    try:
        found = describe(default_config(model_type))
    except TooLongError:
        line |= {"status": "too long", "reason": f"more than {limit} s"}
    except InputError as error:
        nothing = "no model class" in str(error)
        line |= {"status": "no class" if nothing else "not built", "reason": str(error)}
    except Exception as error:  # noqa: BLE001  (a fault of discovery: it is counted, and the others are run)
        line |= {"status": "failed", "reason": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    else:
        signal.alarm(0)
        FOLDER.mkdir(parents=True, exist_ok=True)
        (FOLDER / f"{model_type}.json").write_text(json.dumps(found.to_dict()) + "\n", encoding="utf-8")
        line |= {"status": "built", **summarised(found)}
    finally:
        signal.alarm(0)
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


def recorded() -> dict[str, dict[str, Any]]:
    """Lines by type; the last one of a type counts."""
    if not DONE.is_file():
        return {}
    lines = (json.loads(line) for line in DONE.read_text(encoding="utf-8").splitlines())
    return {line["type"]: line for line in lines}


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


def write(out: Path, lines: list[dict[str, Any]]) -> None:
    """The summary: one line a type."""
    described = {
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        "counts": counts(lines),
    }  # fmt: skip
    rows = ",\n".join(json.dumps(line) for line in sorted(lines, key=lambda line: line["type"]))
    head = json.dumps(described)[:-1]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(f'{head}, "types": [\n{rows}\n]}}\n', encoding="utf-8")


def main() -> None:
    """Run what is missing, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--types", help="these only, whether done or not: a,b,c")
    parser.add_argument("--limit-seconds", type=int, default=120, help="longest time for a type")
    parser.add_argument(
        "--again", action="store_true", help="repeat types that failed, took too long or were not built"
    )
    parser.add_argument("--out", type=Path, default=Path("bench/results/families-cpu.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    done = recorded()
    keep = {kind for kind in ("failed", "too long", "not built") if options.again}
    wanted = options.types.split(",") if options.types else [
        name for name in model_types() if name not in done or done[name]["status"] in keep
    ]  # fmt: skip
    DONE.parent.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(wanted, 1):
        line = one_type(name, options.limit_seconds)
        with DONE.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{number}/{len(wanted)} {name}: {line['status']}, {line['seconds']} s", flush=True)
    lines = [line for name, line in recorded().items() if name in model_types()]
    write(options.out, lines)
    print(json.dumps(counts(lines), indent=1))


if __name__ == "__main__":
    main()
