"""Imports point one way: every floor of the house uses only those below it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import fusion_kernels
import mlp_fusion

#: `mlp_fusion`, in order of processing. A folder or file imports itself and what stands before it.
PRODUCT = (
    "errors", "deferred", "choices", "neurons", "selection", "settings", "tuning", "squeezing", "distilling", "modules",
    "minialbert", "families", "running", "store", "measure", "calibration", "methods", "reducing", "streaming",
    "companions", "finetuning", "report", "verbs", "bars", "cli", "__main__",
)  # fmt: skip
#: `fusion_kernels`, likewise; the operators that use another one's functions come after it.
KERNELS = (
    "gpu", "native", "library", "proof", "pinning", "transforms", "activations", "gates", "ffn",
    "kmeans", "mlp", "experts", "ntk", "sparse", "hadamard",
)  # fmt: skip
_ROOTS = {
    "mlp_fusion": (Path(mlp_fusion.__file__).parent, PRODUCT),
    "fusion_kernels": (Path(fusion_kernels.__file__).parent, KERNELS),
}


def imports(source: str) -> Iterator[str]:
    """Dotted names of everything that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def upward(package: str, floors: tuple[str, ...], floor: str, source: str) -> list[str]:
    """Imports of a file on `floor` that lead to a floor above it, or out of the package to one that may not be used."""
    allowed = floors[: floors.index(floor) + 1]
    found = []
    for name in imports(source):
        top, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if top == package:
            wrong = target in floors and target not in allowed
        else:
            wrong = package == "fusion_kernels" and top in ("mlp_fusion", "transformers")
        if wrong:
            found.append(name)
    return found


@pytest.mark.parametrize("package", sorted(_ROOTS))
def test_no_import_leads_upwards(package: str) -> None:
    root, floors = _ROOTS[package]
    found = {}
    for file in sorted(root.rglob("*.py")):
        floor = file.relative_to(root).parts[0].removesuffix(".py")
        if floor == "__init__":
            continue  # the public names, from every floor
        assert floor in floors, f"{file}: say in this test which floor {floor!r} is"
        if wrong := upward(package, floors, floor, file.read_text(encoding="utf-8")):
            found[str(file.relative_to(root))] = wrong
    assert not found


@pytest.mark.parametrize(
    ("package", "floor", "source", "wrong"),
    [
        ("mlp_fusion", "store", "from mlp_fusion.running import runner\nimport torch", []),
        ("mlp_fusion", "running", "def f():\n    from mlp_fusion.store.source import read", ["store.source.read"]),
        ("mlp_fusion", "methods", "import mlp_fusion.verbs.fuse", ["verbs.fuse"]),
        ("fusion_kernels", "kmeans", "from fusion_kernels import ntk", ["ntk"]),
    ],
)
def test_an_import_upwards_is_seen(package: str, floor: str, source: str, wrong: list[str]) -> None:
    floors = _ROOTS[package][1]
    assert upward(package, floors, floor, source) == [f"{package}.{name}" for name in wrong]


def test_the_kernels_know_nothing_of_the_product() -> None:
    assert upward("fusion_kernels", KERNELS, "ntk", "import transformers\nimport mlp_fusion.neurons") == [
        "transformers",
        "mlp_fusion.neurons",
    ]
