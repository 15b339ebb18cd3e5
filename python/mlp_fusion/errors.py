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


class SkippableError(InputError):
    """A model does not allow a step; what takes it by default can do without, and says so."""


def one_line(error: BaseException, most: int = 200) -> str:
    """What an error says, on one line of at most `most` characters; its class's name where it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def named(error: BaseException, most: int = 200) -> str:
    """:func:`one_line` behind the name of the error's class."""
    return f"{type(error).__name__}: {one_line(error, most)}"
