"""Show how many bytes each namespace of a store takes."""

from __future__ import annotations

import json

import click

from hicache_core.cli._backend import BackendChoice, names_backend
from hicache_core.cli._columns import columns
from hicache_core.cli._stored import counted, size_words, stored


@click.command("du")
@names_backend()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(*, backend: BackendChoice, as_json: bool) -> None:
    """Show the bytes of stored objects in the backend NAME by namespace, the largest first.

    They are the objects' own bytes. What the store takes for them is more: see hicache usage.
    """
    with backend.reading() as store:
        found = stored(store, counts=False)
    known = [one.nbytes for one in found if one.nbytes is not None]
    if as_json:
        namespaces = {one.namespace: one.nbytes for one in found}
        said = {"backend": backend.name, "nbytes": sum(known), "namespaces": namespaces}
        click.echo(json.dumps(said, indent=2))
        return
    rows = [
        (counted(one.nbytes), size_words(one.nbytes), one.namespace, one.words) for one in found
    ]
    rows.append((counted(sum(known)), size_words(sum(known)), "all", ""))
    click.echo(columns([("BYTES", "SIZE", "NAMESPACE", "WHAT"), *rows]))
