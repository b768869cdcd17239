"""List the installed storage and transfer backends, and check that they load."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from hicache_core.cli._columns import columns
from hicache_core.plugin.check import check_backends
from hicache_core.plugin.manager import list_backends, list_transfer_backends


@click.command("backends")
@click.option(
    "--check/--no-check",
    default=True,
    show_default=True,
    help="Load each backend in a child process. --no-check only reads package metadata.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(*, check: bool, as_json: bool) -> None:
    """List the name, kind, distribution, version and status of each installed backend.

    The status is ok, broken (with the error), or installed (with --no-check). Plugins are never
    imported into this process.
    """
    infos = [*list_backends(), *list_transfer_backends()]
    if check:
        infos = check_backends(infos)
    if as_json:
        click.echo(json.dumps([asdict(info) for info in infos], indent=2))
        return
    if not infos:
        click.echo("no backend is installed, not even those of the core: pip install hicache-core")
        return
    header = ("NAME", "KIND", "DISTRIBUTION", "VERSION", "STATUS", "ERROR")
    rows = [(i.name, i.kind, i.distribution, i.version, i.status, i.error) for i in infos]
    click.echo(columns([header, *rows]))
