"""`mlp-fusion` run in a process of its own, and what a command leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as one JSON object, by the letter of the standard, and nothing else."""

        def refuse(constant: str) -> NoReturn:
            raise AssertionError(f"{constant} is no JSON")

        data = json.loads(self.out, parse_constant=refuse)
        assert isinstance(data, dict)
        return data

    @property
    def error(self) -> str:
        """The one line on standard error, standard output being empty."""
        assert self.out == ""
        assert "Traceback" not in self.err
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        return lines[0]


def run_for_real(*arguments: object, **environment: str) -> Outcome:
    """Run the installed `mlp-fusion` in a process of its own, cut off from the hub."""
    program = shutil.which("mlp-fusion", path=str(Path(sys.executable).parent))
    assert program is not None
    done = subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    return Outcome(done.returncode, done.stdout, done.stderr)


def run_twice_at_once(folder: Path, *arguments: object) -> Outcome:
    """Run `mlp-fusion` in two processes that train together; `folder` is for what starts them."""
    main = folder / "main.py"
    main.write_text("from mlp_fusion.cli import main; main()", encoding="utf-8")
    launched = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(main)]
    done = subprocess.run(
        [*launched, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )  # fmt: skip
    return Outcome(done.returncode, done.stdout, done.stderr)


#: `mlp-fusion` with arguments.
Run = Callable[..., Outcome]
