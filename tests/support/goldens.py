"""Digests of all that `fuse` and `compress` give on tiny models: what a change that should change nothing is held to.

    python tests/support/goldens.py record FILE    # before the change
    python tests/support/goldens.py check FILE     # after it, on the same machine

Bits differ between processors and releases of torch, so the file is not committed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

import mlp_fusion
from checkpoints import add_tokenizer
from families import FAMILIES, tiny_model, token_batch

TEXT = [token_batch(seed=n, batch=6, length=12) for n in range(4)]
#: How a model is told about its data.
DATA: dict[str, dict[str, Any]] = {
    "no data": {},
    "calibrated": {"calibration": TEXT, "match": "auto"},
    "sequential": {"calibration": TEXT, "sequential": True},
    "tuned": {"calibration": TEXT, "tune_steps": 3},
}
#: Beyond the product of families, optimisers and data: every method and what else changes the road that is taken.
OTHERS: dict[str, dict[str, Any]] = {
    "published": {"method": "published"},
    "cluster": {"method": "cluster"},
    "prune": {"method": "prune"},
    "prune, calibrated": {"method": "prune", "calibration": TEXT},
    "select": {"method": "select", "calibration": TEXT},
    "sketch": {"method": "sketch"},
    "mmd": {"method": "mmd"},
    "mmd, calibrated": {"method": "mmd", "calibration": TEXT},
    "no refit": {"calibration": TEXT, "refit": False},
    "budget": {"width": "auto", "budget": 0.5, "calibration": TEXT},
    "budget, sequential and tuned": {
        "width": "auto",
        "budget": 0.5,
        "calibration": TEXT,
        "sequential": True,
        "tune_steps": 3,
    },
    "some layers": {"layers": "last:2"},
    "sample": {"sample": TEXT[:1], "seed": 3},
}


def digest(*parts: bytes) -> str:
    """A short hash of `parts`."""
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def of_folder(folder: Path) -> str:
    """A hash of every file below `folder`; of reports, that they are there."""
    parts: list[bytes] = []
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = file.read_bytes()
        if file.name in ("report.json", "README.md"):  # which tell the time
            content = b""
        elif file.suffix == ".safetensors" and file.parent != folder:
            content = digest(*(part for item in sorted(load_file(file).items()) for part in _bytes(*item))).encode()
        elif file.suffix == ".json":
            content = json.dumps(json.loads(content), sort_keys=True).encode()
        parts += [str(file.relative_to(folder)).encode(), content]
    return digest(*parts)


def _bytes(name: str, tensor: torch.Tensor) -> tuple[bytes, bytes, bytes]:
    return name.encode(), str(tensor.dtype).encode(), tensor.contiguous().view(torch.uint8).numpy().tobytes()


def fused(family: str, **options: Any) -> str:
    """The state and the config of a tiny model after `fuse`, and the errors that it reports."""
    model = tiny_model(family)
    report = mlp_fusion.fuse(model, options.pop("width", 24), **options)
    errors = [(row.path, row.neurons_after, row.output_error, row.ntk_error, row.status) for row in report.rows]
    parts = [json.dumps(known, sort_keys=True).encode() for known in (model.config.to_dict(), errors)]
    for item in model.state_dict().items():
        parts += _bytes(*item)
    return digest(*parts)


def compressed(family: str, *, calibrated: bool, **options: Any) -> str:
    """The folder that `compress` writes for a tiny checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        source, out, text = (Path(folder) / name for name in ("source", "out", "text.txt"))
        tiny_model(family).save_pretrained(source)
        if calibrated:
            add_tokenizer(source, pad_token="<pad>")
            text.write_text("the cat sat\na cat\nthe a sat sat cat\n" * 20, encoding="utf-8")
            options["calibration"] = text
        mlp_fusion.compress(source, out, 24, **options)
        return of_folder(out)


def goldens() -> Iterator[tuple[str, str]]:
    """Name and digest of everything, in a fixed order."""
    optimizers: tuple[str | None, ...] = ("adamw", "sgd", None)
    for family, optimizer, (name, data) in itertools.product(sorted(FAMILIES), optimizers, DATA.items()):
        if optimizer is None:
            data = {key: value for key, value in data.items() if key != "match"}
        yield f"fuse {family}, {optimizer}, {name}", fused(family, optimizer=optimizer, **data)
        data = {key: value for key, value in data.items() if key != "calibration"}
        found = compressed(family, calibrated=name != "no data", optimizer=optimizer, **data)
        yield f"compress {family}, {optimizer}, {name}", found
    for family, (name, options) in itertools.product(("bert", "llama"), OTHERS.items()):
        yield f"fuse {family}, {name}", fused(family, **options)


def main() -> None:
    """Record or check."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    task, file = sys.argv[1], Path(sys.argv[2])
    found = dict(goldens())
    if task == "record":
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return
    wanted = json.loads(file.read_text(encoding="utf-8"))
    changed = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
    sys.exit("\n".join(["changed:", *changed]) if changed else 0)


if __name__ == "__main__":
    main()
