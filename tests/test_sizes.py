"""Files and functions stay of a size that can be read at one sitting."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import fusion_kernels
import mlp_fusion

MOST_LINES, MOST_OF_A_FUNCTION = 500, 50
#: A longer function says in its docstring why it is one piece, with these words.
REASON = "In one piece"
ROOT = Path(__file__).parent.parent
SOURCES = (Path(fusion_kernels.__file__).parent, Path(mlp_fusion.__file__).parent, ROOT / "csrc")
OTHERS = (ROOT / "tests", ROOT / "bench", ROOT / "docs" / "scripts", ROOT / "examples")


def files(*folders: Path) -> list[Path]:
    """Every source file below `folders`."""
    kinds = {".py", ".cpp", ".h", ".cu"}
    return sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in kinds)


def long_functions(source: str) -> Iterator[tuple[str, int]]:
    """Functions with more lines of code than are allowed, without signature, docstring, comments and blank lines."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        documentation = ast.get_docstring(node)
        body = node.body[1:] if documentation is not None else node.body
        if not body or REASON in (documentation or ""):
            continue
        code = [line for line in lines[body[0].lineno - 1 : node.end_lineno] if line.strip()]
        size = sum(not line.lstrip().startswith("#") for line in code)
        if size > MOST_OF_A_FUNCTION:
            yield node.name, size


def test_no_file_is_too_long() -> None:
    sizes = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files(*SOURCES, *OTHERS)}
    assert {str(path): size for path, size in sizes.items() if size > MOST_LINES} == {}


def test_no_function_is_too_long() -> None:
    found = {
        f"{path}:{name}": size
        for path in files(*SOURCES)
        if path.suffix == ".py"
        for name, size in long_functions(path.read_text(encoding="utf-8"))
    }
    assert found == {}


@pytest.mark.parametrize(
    ("documentation", "lines", "found"),
    [('"""Short."""', 50, []), ('"""Long."""', 51, [("f", 51)]), ('"""In one piece, for a reason."""', 51, [])],
)
def test_long_functions_are_seen(documentation: str, lines: int, found: list[tuple[str, int]]) -> None:
    body = "\n".join(["    # why", *("    x = 1\n" for _ in range(lines))])
    assert [*long_functions(f"def f():\n    {documentation}\n{body}")] == found
