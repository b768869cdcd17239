"""Test whether a live backend keeps the storage contract."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click

from hicache_core.cli._backend import BackendChoice, names_backend
from hicache_core.cli._out_file import OutFile
from hicache_core.testing.features import Target
from hicache_core.testing.kit_settings import FULL, QUICK, KitSettings
from hicache_core.testing.recipe import Scope
from hicache_core.testing.report import RuleResult
from hicache_core.testing.rules import RULES
from hicache_core.testing.runner import run

_GRACE_S = 30.0
_STDERR = 2


@click.command("conformance")
@names_backend()
@click.option("--json", "json_file", type=OutFile(), help="Write the report here, as JSON.")
@click.option("--quick", is_flag=True, help="Run all rules with fewer rounds, smaller batches.")
@click.option(
    "--scope",
    type=click.Choice([scope.value for scope in Scope]),
    default=Scope.SHARED.value,
    show_default=True,
    help="Who sees what an instance has stored: any process, the same process, or only itself.",
)
@click.option(
    "--max-object-nbytes", default=0, help="Bytes of the largest object to store; 0: no limit."
)
@click.pass_context
def command(
    ctx: click.Context,
    *,
    backend: BackendChoice,
    json_file: Path | None,
    quick: bool,
    scope: str,
    max_object_nbytes: int,
) -> None:
    """Run the conformance kit on the backend NAME, or on 'dynamic' with a class in --config.

    The kit uses random namespaces, and deletes its keys at the end if the backend can delete. The
    exit status is 0 if all base rules and all rules of the backend's capabilities pass, 1 if one
    fails, and 2 if the backend does not load.
    """
    recipe = backend.recipe(Scope(scope), max_object_nbytes)
    recipe.make()  # a wrong setting is the user's error, not the backend's
    settings = QUICK if quick else FULL
    progress = sys.stderr.isatty()

    def on_result(result: RuleResult) -> None:
        _arm(settings)
        if progress:
            click.echo(f"\r\033[K{result.status:16} {result.id}", nl=False, err=True)

    _arm(settings)
    with _hypothesis_elsewhere():
        report = run(Target(recipe), settings, on_result=on_result)
    faulthandler.cancel_dump_traceback_later()
    if progress:
        click.echo("\r\033[K", nl=False, err=True)
    click.echo("\n".join(report.lines()))
    if json_file is not None:
        json_file.write_text(report.to_json() + "\n", encoding="utf-8")
    ctx.exit(0 if report.passed else 1)


@contextlib.contextmanager
def _hypothesis_elsewhere() -> Iterator[None]:
    """Gives Hypothesis a temporary folder for its files instead of the working directory."""
    name = "HYPOTHESIS_STORAGE_DIRECTORY"
    if name in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="hicache-") as folder:
        os.environ[name] = folder
        try:
            yield
        finally:
            del os.environ[name]


def _arm(settings: KitSettings) -> None:
    """Ends the process with a traceback, unless armed again in time.

    The kit's watchdog is a thread: a backend that holds the interpreter's lock stops it too.
    """
    longest_s = max(rule.patience for rule in RULES) * settings.rule_s
    faulthandler.dump_traceback_later(longest_s + _GRACE_S, exit=True, file=_STDERR)
