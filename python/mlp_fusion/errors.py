"""Errors that the caller can mend: one line that names the cause and the remedy."""

from __future__ import annotations


class InputError(ValueError):
    """The model, checkpoint or options handed in cannot be worked on as they are; nothing was changed or written.

    Examples:
        >>> try:
        ...     mlp_fusion.plan("roberta-base", width=7)
        ... except mlp_fusion.InputError as error:
        ...     print(error)
        width 7 is not a multiple of 8...
    """
