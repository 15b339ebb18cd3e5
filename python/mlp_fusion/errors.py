"""Errors that the caller can mend: one line that names the cause and the remedy."""

from __future__ import annotations


class InputError(ValueError):
    """The model, checkpoint or options handed in cannot be worked on as they are; nothing was changed or written."""
