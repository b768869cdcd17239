"""Writes ``docs/cli.md``, the reference of the command ``hicache``, from its help: ``make api``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click

from hicache_core.cli.main import cli

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"

HEAD = """# Command line

`hicache COMMAND --help` prints the same. `make api` writes this page from the commands.

Unless a command says otherwise, its exit status is 0 if it did what it was asked, 1 if it did and
found something wrong, or if a server refuses or does not answer, 2 if it could not be done: a wrong
option, an unreachable store, a broken plugin, and 3 if the backend has no such ability
([table](stores.md#exit-status)). `hicache --debug COMMAND` shows the traceback of an error.

| command | what it does |
|---|---|
"""


def commands(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    """Every command below a group, by its full name.

    Args:
        group: where to look.
        path: how the group is called.
    """
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def _options(command: click.Command, context: click.Context) -> Iterator[str]:
    for one in command.get_params(context):
        record = one.get_help_record(context) if isinstance(one, click.Option) else None
        if record is not None and "--help" not in one.opts:
            flags, text = (part.replace("|", "\\|") for part in record)
            yield f"| `{flags}` | {text} |"


def entry(path: str, command: click.Command) -> str:
    """One command: how it is called, what it does, its options.

    Args:
        path: how it is called.
        command: what is called.
    """
    context = click.Context(command, info_name=path, max_content_width=100)
    usage = " ".join([path, *command.collect_usage_pieces(context)])
    text = re.sub(r"(?m)^\x08\n", "", command.help or "").strip()
    lines = [f"## `{path}`\n", f"```text\n{usage}\n```\n", f"{text}\n"]
    options = list(_options(command, context))
    if options:
        lines += ["| option | meaning |\n|---|---|\n" + "\n".join(options) + "\n"]
    return "\n".join(lines)


def page() -> str:
    """The whole page."""
    found = list(commands(cli, "hicache"))
    rows = (
        f"| [`{path}`](#{_anchor(path)}) | {one.get_short_help_str(200)} |" for path, one in found
    )
    return HEAD + "\n".join(rows) + "\n\n" + "\n".join(entry(*one) for one in found)


def _anchor(path: str) -> str:
    return path.replace(" ", "-")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
