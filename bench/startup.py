"""Processor seconds until the command line and the package answer: `python bench/startup.py [--out FILE]`.

Medians of several processes each, user and system time together; importing torch is timed beside importing the package
with it, so that the difference is the package's own.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import BertConfig, BertModel

CLI = "import sys; sys.argv[1:] = {arguments!r}; from mlp_fusion.cli import main; main()"


def seconds(code: str, rounds: int) -> float:
    """Median processor seconds of a process that runs `code`."""
    taken = []
    for _ in range(rounds):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return round(statistics.median(taken), 3)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("build/startup.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = BertConfig(
            vocab_size=97, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
        )
        BertModel(config).save_pretrained(folder)
        runs = {
            "mlp-fusion --help": CLI.format(arguments=["--help"]),
            "mlp-fusion compress, a wrong width": CLI.format(arguments=["compress", "m", "out", "--width", "wide"]),
            "mlp-fusion plan": CLI.format(arguments=["plan", folder, "--width", "16"]),
            "import torch": "import torch",
            "import torch, mlp_fusion": "import torch, mlp_fusion",
            "import mlp_fusion": "import mlp_fusion",
            "from mlp_fusion import fuse": "from mlp_fusion import fuse",
        }
        found = {name: seconds(code, options.rounds) for name, code in runs.items()}
    for name, taken in found.items():
        print(f"{taken:7.3f} s  {name}")
    described = {"python": platform.python_version(), "torch": torch.__version__, "rounds": options.rounds}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**described, "processor seconds": found}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
