"""What happens while the site is built: generated parts go into pages, and references in docstrings become readable."""

from __future__ import annotations

import re
from typing import Any

import companion_tables
import option_tables
import recovery_tables
import results_tables
from command_page import command_line

GENERATED = {
    **results_tables.TABLES,
    **recovery_tables.TABLES,
    **companion_tables.TABLES,
    **option_tables.TABLES,
    "command-line": command_line,
}
_PLACE = re.compile(r"^<!-- generated: ([\w-]+) -->$", flags=re.MULTILINE)
#: `:func:`~package.module.name`` in docstrings, as the page shows it.
_ROLE = re.compile(r":(?:func|class|mod|meth|attr|data):<code>~?([\w.]+)</code>")


def with_generated(markdown: str) -> str:
    """`markdown` with every `<!-- generated: NAME -->` replaced.

    Raises:
        KeyError: nothing of that name is generated.
    """
    return _PLACE.sub(lambda found: GENERATED[found[1]](), markdown)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for each page before it is rendered."""
    return with_generated(markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Called by mkdocs for each rendered page."""
    return _ROLE.sub(r"<code>\1</code>", html)
