"""The page about the command line, made from the commands themselves when the site is built."""

from __future__ import annotations

import click

from mlp_fusion.cli import cli


def command_line() -> str:
    """Every command with its usage, its help and its options, in markdown."""
    top = click.Context(cli, info_name="mlp-fusion", **cli.context_settings)
    parts = [f"```text\n{_usage(cli, top)}\n```", _options(cli, top)]
    parts += _commands(cli, top)
    return "\n\n".join(part for part in parts if part)


def _commands(group: click.Group, parent: click.Context) -> list[str]:
    """The commands of a group, each followed by its own."""
    parts: list[str] = []
    for name in group.list_commands(parent):
        command = group.get_command(parent, name)
        assert command is not None
        context = click.Context(command, info_name=name, parent=parent, **command.context_settings)
        words = context.command_path.split()[1:]
        parts += [
            f"## {' '.join(words)} {{ #{'-'.join(words)} }}",
            f"```text\n{_usage(command, context)}\n```",
            _cell(command.help or "", lines=True),
            _options(command, context),
        ]
        if isinstance(command, click.Group):
            parts += _commands(command, context)
    return parts


def _usage(command: click.Command, context: click.Context) -> str:
    return " ".join([context.command_path, *command.collect_usage_pieces(context)])


def _options(command: click.Command, context: click.Context) -> str:
    options = [option for option in command.get_params(context) if isinstance(option, click.Option)]
    records = [record for option in options if (record := option.get_help_record(context)) is not None]
    if not records:
        return ""
    rows = "\n".join(f"| `{_cell(option)}` | {_plain(meaning)} |" for option, meaning in records)
    return f"| option | meaning |\n|---|---|\n{rows}"


def _cell(text: str, *, lines: bool = False) -> str:
    """Help text in one line of a table, or, with `lines`, in paragraphs."""
    escaped = text.replace("\b", "").replace("<", "&lt;")
    if lines:
        return "\n\n".join(" ".join(part.split()) for part in escaped.split("\n\n"))
    return " ".join(escaped.replace("|", r"\|").split())


def _plain(text: str) -> str:
    """Text in which brackets are no link."""
    return _cell(text).replace("[", r"\[").replace("]", r"\]")
