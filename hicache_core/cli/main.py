"""The command ``hicache``: finds the subcommands, prints errors as one line."""

from __future__ import annotations

import contextlib
import importlib
import keyword
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click

from hicache_core.config.redact import masked_text
from hicache_core.config.sources import ENV_PREFIX, mistyped, nearest
from hicache_core.errors import HiCacheError

_SUMMARIES = Path(__file__).parent
_NOT_COMMANDS = frozenset(["__init__", "main"])


class LazyGroup(click.Group):
    """A group whose commands are the modules beside this one, each imported when it is called.

    A module ``new_backend.py`` is the command ``new-backend``, and ``import_.py`` is ``import``. It
    has a click command named ``command``; the first line of the module's docstring is the summary
    that ``hicache --help`` shows.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        # docstring inherited
        stems = {file.stem for file in _SUMMARIES.glob("*.py")} - _NOT_COMMANDS
        return sorted(command_of(stem) for stem in stems if not stem.startswith("_"))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        # docstring inherited
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f"hicache_core.cli.{module_of(cmd_name)}")
        command = module.command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        # docstring inherited
        names = self.list_commands(ctx)
        if args and not args[0].startswith("-") and args[0] not in names:
            hint = nearest(args[0], names) or f"; the commands are: {', '.join(names)}"
            ctx.fail(f"no such command {args[0]!r}{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # docstring inherited; summaries are read, not imported, so that help is quick
        rows = [(name, _summary(name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def command_of(stem: str) -> str:
    """The name of the command in the module ``stem``."""
    return stem.rstrip("_").replace("_", "-")


def module_of(name: str) -> str:
    """The name of the module, in this package, of the command ``name``."""
    stem = name.replace("-", "_")
    return f"{stem}_" if keyword.iskeyword(stem) else stem


def _summary(name: str) -> str:
    with (_SUMMARIES / f"{module_of(name)}.py").open(encoding="utf-8") as file:
        return file.readline().strip().strip('"').strip()


def _version() -> str:
    try:
        return version("hicache-core")
    except PackageNotFoundError:
        return "unknown (hicache-core is not installed)"


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(_version(), message="%(version)s")
def cli(*, debug: bool) -> None:  # noqa: ARG001 - main() looks for it by itself
    """HiCache: a prefix cache for LLM servers, in three tiers."""
    if any(name.startswith(ENV_PREFIX) for name in os.environ):
        # Only then: help stays quick.
        config = importlib.import_module("hicache_core.config.settings")
        for name, meant in mistyped(config.HiCacheConfig.model_fields, os.environ):
            click.echo(f"hicache: {name} is ignored; did you mean {meant}?", err=True)


def main(args: list[str] | None = None) -> None:
    """Runs ``hicache``; an error becomes one line on stderr and exit status 2.

    That is a ``HiCacheError``, a refusal of the operating system such as a full disk, or input that
    takes more memory than there is.
    """
    given = sys.argv[1:] if args is None else args
    try:
        cli.main(args=given, prog_name="hicache")
    except (HiCacheError, OSError, MemoryError, RecursionError) as error:
        if "--debug" in given:
            raise
        click.echo(f"hicache: {masked_text(' '.join(_words(error).split()))}", err=True)
        _drop_unwritable_output()
        sys.exit(2)


def _words(error: BaseException) -> str:
    if isinstance(error, HiCacheError):  # some of them are errors of memory as well
        return str(error)
    if isinstance(error, MemoryError):
        return "there is not enough memory for this"
    if isinstance(error, RecursionError):
        return "the input is nested too deeply"
    return str(error)


def _drop_unwritable_output() -> None:
    """Output that cannot be written would be tried again when Python ends, with its own message."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError):
            sys.stdout.close()


if __name__ == "__main__":
    main()
