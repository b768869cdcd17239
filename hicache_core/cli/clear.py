"""Remove everything from a store."""

from __future__ import annotations

import json

import click

from hicache_core.cli._backend import BackendChoice, able, names_backend
from hicache_core.cli._stored import size_words, stored
from hicache_core.storage.base import Clearable, StorageBackend


@click.command("clear")
@names_backend()
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(*, backend: BackendChoice, yes: bool, as_json: bool) -> None:
    """Remove all objects of all namespaces from the store of the backend NAME.

    Servers that use the store go on, with misses. One namespace: hicache rm --namespace. What a
    running server has stored: POST /hicache/storage-backend/clear.
    """
    with backend.changing() as store:
        clearable = able(store, Clearable, "be cleared")
        if not yes:
            click.confirm(f"Remove {_everything(store)} from {backend.name}?", abort=True, err=True)
        n = clearable.clear("")
    if as_json:
        click.echo(json.dumps({"backend": backend.name, "removed": n}))
    else:
        click.echo(f"{n:,} removed")


def _everything(store: StorageBackend) -> str:
    found = stored(store, counts=False)
    nbytes = sum(one.nbytes or 0 for one in found)
    return f"all objects ({size_words(nbytes)} in {len(found)} namespaces)"
