"""Everything that needs a GPU, in two runs of ten minutes at most together, of which nothing is lost.

    python bench/gpu.py [--only STAGE ...] [--resume] [--keep STAGE ...] [--model FOLDER ...] [--seconds 400]
                        [--out FILE]
    python bench/gpu.py --plan

The first run takes 400 seconds, the second what is left of the ten minutes: `--seconds 200 --resume` does what the
first had no time for. A machine that ends commands after 600 seconds so ends neither, and one that is lent for 15
minutes has some left to start in, and to run again what was mended.

From a bare checkout: neither this project nor its compiled libraries need be installed. `--plan` prints the stages and
their seconds, and needs no GPU. Every stage runs in a process of its own, and the file is written anew after every
line. At the end each bar is said to hold or not. What raises, crashes or never ends is kept under `failures`, and the
run goes on; the status is 1 then. `--resume` leaves out the lines that the file has already, if they are of the same
device, driver, torch, Triton and bytes of the kernels. Where kernels have been mended since, `--keep` names the stages
whose lines still hold: these stay, each with the digests that it was `found with`, and all others are found out anew.
Without either, a file that is there is renamed to `FILE.before`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from gpu_bars import bars, in_words
from gpu_running import FOUND_WITH, Record, Stage, outstanding, planned, run

#: Which device that is, and its ceilings; always.
DEVICE = Stage("device", 18, 120, "gpu_device", "what results depend on; rates of a large product and a large copy")
STAGES = (
    Stage(
        "compile", 72, 70, "gpu_compile", "every launch, by a process for each processor; the libraries", lasting=False
    ),
    Stage("proofs", 65, 45, "gpu_proofs", "every case of fusion_kernels.proof, and the verdicts that users get"),
    Stage("sanitizer", 50, 25, "gpu_sanitizer", "compute-sanitizer: memcheck and racecheck of small cases"),
    Stage("kmeans", 110, 40, "gpu_kmeans", "by step, by mode, beside Lloyd's iteration in torch and the CPU"),
    Stage("mlp", 100, 50, "gpu_mlp", "blocks beside eager and compiled layers; kernels by tile beside cuBLAS"),
    Stage("experts", 30, 20, "gpu_experts", "8 and 128 experts beside torch's grouped products"),
    Stage("ntk", 35, 20, "gpu_ntk", "tangent kernels: checks, then times beside torch"),
    Stage("whole", 60, 40, "gpu_whole", "compress on the GPU and the CPU; tokens per second in training"),
    Stage("profile", 20, 15, "gpu_profile", "torch.profiler: one call of k-means, one training step"),
    Stage("ncu", 35, 30, "gpu_ncu", "Nsight Compute on six kernels"),
)
#: Seconds of a run where none are said: of two, see above.
SECONDS = 400.0
#: Seconds that the first stage may take where nothing is in memory yet, without which there is no run, and for what is
#: left to do behind the last one.
BEGINNING, END = 120.0, 5.0
#: What may have changed under the lines of stages that are kept.
MENDED = ("kernels", "compiled sources")
_ASKED = "power.draw,clocks.sm,clocks.mem,temperature.gpu,pstate"


def nvidia_smi() -> dict[str, str]:
    """What the driver says of power and clocks, or why it says nothing."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {"skipped": "nvidia-smi is not on the PATH"}
    command = [tool, f"--query-gpu={_ASKED}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=END - 1, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"skipped": f"nvidia-smi: {error}"}
    if done.returncode != 0:
        return {"skipped": f"nvidia-smi ended with {done.returncode}: {' '.join((done.stdout + done.stderr).split())}"}
    values = (value.strip() for value in done.stdout.splitlines()[0].split(","))
    return dict(zip(_ASKED.split(","), values, strict=False))


def refuse(reason: str) -> NoReturn:
    """End with one line and status 1."""
    sys.exit(f"bench/gpu.py {reason}")


def device_facts(record: Record) -> dict[str, Any]:
    """What the device stage has found, without which there is no run."""
    if "facts" not in record.stages.get("device", {}):
        failures = [f"{row['type']}: {row['message']}" for row in record.failures["device"].values()]
        refuse(f"cannot ask for the device: {'; '.join(failures)}")
    facts = record.stages["device"]["facts"]
    if "why_not" in facts:
        refuse(f"needs a GPU that the Triton backend runs on: {facts['why_not']}")
    return facts["about"]


def kept_lines(path: Path, resume: bool, about: dict[str, Any], keep: Sequence[str] = ()) -> dict[str, Any] | None:
    """What the file has, to go on with; None, and an older file out of the way, where the run begins anew.

    Args:
        keep: stages whose lines are gone on with even if the kernels are others now.
    """
    before = path.with_name(f"{path.name}.before")
    if not path.exists():
        return None
    if not resume and not keep:
        path.replace(before)
        return None
    try:
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known = kept["about"]
    except (ValueError, KeyError) as error:
        refuse(f"--resume: {path} is no file of this script ({error}): name another one with --out")
    differ = sorted(name for name in {*known, *about} if known.get(name) != about.get(name))
    mended = set(differ) <= set(MENDED)
    if differ and not (mended and keep):
        instead = ", or the stages whose lines still hold with --keep" if mended else ""
        refuse(f"--resume: {path} is of another {', '.join(differ)}: name another file with --out{instead}")
    if differ:
        shutil.copy(path, before)  # it has lines that are not kept
        return _marked(kept, keep, {name: known.get(name) for name in differ})
    return kept


def _marked(kept: Mapping[str, Any], keep: Sequence[str], known: Mapping[str, Any]) -> dict[str, Any]:
    """The lines of these stages with what they were found with; of lines that were kept before, that was earlier."""

    def marked(line: Mapping[str, Any]) -> dict[str, Any]:
        return {**line, FOUND_WITH: {**known, **line.get(FOUND_WITH, {})}}

    def of_those(part: Mapping[str, Any]) -> dict[str, Any]:
        return {stage: found for stage, found in part.items() if stage in keep}

    found = {
        part: {
            stage: {name: marked(line) for name, line in lines.items()} for stage, lines in of_those(kept[part]).items()
        }
        for part in ("stages", "failures")
    }
    return {**found, "taken": of_those(kept.get("taken", {})), "models": kept.get("models")}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[stage.name for stage in STAGES], help="these stages")
    parser.add_argument("--resume", action="store_true", help="leave out the lines that the file has already")
    lasting = [stage.name for stage in STAGES if stage.lasting]
    parser.add_argument(
        "--keep", nargs="+", default=[], choices=lasting, metavar="STAGE",
        help="go on as by --resume though kernels have changed: what these stages have found still holds",
    )  # fmt: skip
    parser.add_argument("--model", type=Path, action="append", default=[], help="a checkpoint to compress; repeatable")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all of it")
    parser.add_argument("--out", type=Path, default=Path("bench/results/gpu.json"))
    parser.add_argument("--plan", action="store_true", help="print the stages and their seconds, and end")
    options = parser.parse_args()
    for folder in options.model:
        if not (folder / "config.json").is_file():
            parser.exit(1, f"bench/gpu.py --model: {folder} has no config.json: name the folder of a checkpoint\n")
    return options


def main() -> int:
    """Run the stages, and print and keep their lines; returns the status."""
    began = time.monotonic()
    options = arguments()
    chosen = [stage for stage in STAGES if options.only is None or stage.name in options.only]
    plan = planned([DEVICE, *chosen], options.seconds - END)
    if options.plan:
        for stage, seconds in plan:
            print(f"{seconds:6.1f} s  {stage.name:10s} {stage.about}")
        print(f"{sum(seconds for _, seconds in plan):6.1f} s  in all")
        return 0
    # What ends the script by a signal lets it end its processes first.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    def say(line: str) -> None:
        print(f"[{time.monotonic() - began:5.1f} s] {line}", flush=True)

    first: list[str] = []
    with tempfile.TemporaryDirectory(prefix="mlp-fusion-gpu-", ignore_cleanup_errors=True) as scratch:
        # Verdicts of this run only, and of nobody else's.
        os.environ["MLP_FUSION_CACHE"] = scratch
        told: dict[str, Any] = {"scratch": scratch, "models": [str(folder.resolve()) for folder in options.model]}
        record = Record()
        run([DEVICE], record, told, BEGINNING, first.append)
        about = device_facts(record)
        say("; ".join(first))
        kept = kept_lines(options.out, options.resume, about, options.keep)
        if kept is not None:
            record.adopt(kept, chosen)
            chosen = outstanding(chosen, kept) if kept.get("models") == told["models"] else chosen
            plan = planned([DEVICE, *chosen], options.seconds - END)
        told["stages"] = [stage.name for stage in chosen]
        record.note("about", about)
        record.note("models", told["models"])
        record.note("plan", {stage.name: round(seconds, 1) for stage, seconds in plan})
        record.note("nvidia-smi", {"at the beginning": nvidia_smi()})
        record.keep(options.out)
        run(chosen, record, told, options.seconds - END - (time.monotonic() - began), say)
        record.note("nvidia-smi", {**record.notes["nvidia-smi"], "at the end": nvidia_smi()})
        record.note("bars", bars(record.stages, record.failures))
    for entry in record.notes["bars"]:
        say(in_words(entry))
    failed = [f"{stage}: {line}" for stage, lines in record.failures.items() for line in lines]
    say(f"written: {options.out}; {len(failed)} failures{''.join(f'{chr(10)}  {name}' for name in failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
