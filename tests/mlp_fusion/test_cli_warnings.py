"""What the command line makes of warnings."""

from __future__ import annotations

import subprocess
import sys


def test_warnings_are_single_lines() -> None:
    script = """
import sys, warnings
from mlp_fusion import cli
cli.cli = lambda **_: warnings.warn("few\\ntokens", stacklevel=2)
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == "mlp-fusion: warning: few tokens\n"


def test_a_warning_that_nobody_can_read_ends_nothing() -> None:
    script = """
import os, sys, warnings
from mlp_fusion import cli
read, write = os.pipe()
os.dup2(write, 2)
os.close(read), os.close(write)
cli.cli = lambda **_: (warnings.warn("few"), print("done"))
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "done\n"
