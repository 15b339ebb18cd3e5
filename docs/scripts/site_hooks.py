"""Generated parts of pages, and what happens while the site is built.

    python docs/scripts/site_hooks.py

writes tables of results and of methods into the pages, where they stand for whoever reads them as plain files:

    <!-- generated: NAME -->
    ...
    <!-- end of NAME -->

A line `<!-- generated: NAME -->` without an end is filled when the site is built: options and the command line, which
are on pages that take their text from docstrings.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import companion_tables
import option_tables
import recovery_tables
import results_tables
from command_page import command_line

DOCS = Path(__file__).parents[1]
GENERATED = {
    **results_tables.TABLES,
    **recovery_tables.TABLES,
    **companion_tables.TABLES,
    **option_tables.TABLES,
    "command-line": command_line,
}
_KEPT = re.compile(r"^<!-- generated: ([\w-]+) -->\n(.*?)^<!-- end of \1 -->$", flags=re.MULTILINE | re.DOTALL)
_PLACE = re.compile(r"^<!-- generated: ([\w-]+) -->$", flags=re.MULTILINE)
#: `:func:`~package.module.name`` in docstrings, as the page shows it.
_ROLE = re.compile(r":(?:func|class|mod|meth|attr|data):<code>~?([\w.]+)</code>")


def refreshed(markdown: str) -> str:
    """`markdown` with the parts that pages keep made anew.

    Raises:
        KeyError: nothing of such a name is generated.
    """
    return _KEPT.sub(lambda found: _kept(found[1]), markdown)


def _kept(name: str) -> str:
    return f"<!-- generated: {name} -->\n\n{GENERATED[name]()}\n\n<!-- end of {name} -->"


def with_generated(markdown: str) -> str:
    """`markdown` with every generated part, and without the marks.

    Raises:
        KeyError: nothing of such a name is generated.
    """
    for marks in (_KEPT, _PLACE):
        markdown = marks.sub(lambda found: GENERATED[found[1]](), markdown)
    return markdown


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for each page before it is rendered."""
    return with_generated(markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Called by mkdocs for each rendered page."""
    return _ROLE.sub(r"<code>\1</code>", html)


def main() -> None:
    """Refresh all pages, and name those that changed."""
    for page in sorted(DOCS.rglob("*.md")):
        before = page.read_text(encoding="utf-8")
        after = refreshed(before)
        if after != before:
            page.write_text(after, encoding="utf-8")
            sys.stdout.write(f"{page.relative_to(DOCS)}\n")


if __name__ == "__main__":
    main()
