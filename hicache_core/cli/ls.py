"""List what a store holds: its namespaces in words, or the keys of one."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable, Iterator

import click

from hicache_core.cli._backend import BackendChoice, able, names_backend
from hicache_core.cli._columns import columns
from hicache_core.cli._stored import Stored, counted, date_words, size_words, stored
from hicache_core.storage.base import Listable

_WRITTEN_AT_ONCE = 4096


@click.command("ls")
@names_backend()
@click.argument("namespace", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def command(
    ctx: click.Context, *, backend: BackendChoice, namespace: str | None, as_json: bool
) -> None:
    """List the namespaces in the store of the backend NAME, or the keys of a NAMESPACE.

    A namespace is the part of a key before the /: one model with one format of its KV. Its
    manifest, if a cache left one, says which. The exit status is 1 if there is nothing to list.
    """
    with backend.reading() as store:
        if namespace is None:
            found = stored(store, counts=True)
            click.echo(_as_json(backend.name, found) if as_json else _table(found))
            n = len(found)
        else:
            listable = able(store, Listable, "list its keys")
            n = _print_keys(listable.list_keys(f"{namespace.rstrip('/')}/"), as_json=as_json)
            if n == 0 and not as_json:
                click.echo(f"no object has namespace {namespace}", err=True)
    ctx.exit(0 if n else 1)


def _table(found: list[Stored]) -> str:
    if not found:
        return "the store holds no object"
    header = ("NAMESPACE", "OBJECTS", "SIZE", "LAST WRITTEN", "WHAT")
    rows = [
        (
            one.namespace,
            counted(one.objects),
            size_words(one.nbytes),
            date_words(one.newest),
            one.words,
        )
        for one in found
    ]
    return columns([header, *rows])


def _as_json(name: str, found: list[Stored]) -> str:
    namespaces = [one.as_json() for one in found]
    return json.dumps({"backend": name, "namespaces": namespaces}, indent=2)


def _print_keys(keys: Iterable[str], *, as_json: bool) -> int:
    """Prints keys as they come, one a line or as a JSON array; returns how many."""
    n = 0
    lines = _json_lines(keys) if as_json else (f"{key}\n" for key in keys)
    while some := list(itertools.islice(lines, _WRITTEN_AT_ONCE)):
        sys.stdout.write("".join(some))
        n += len(some)
    return n - int(as_json)  # the last line closes the array


def _json_lines(keys: Iterable[str]) -> Iterator[str]:
    before = "["
    for key in keys:
        yield f"{before}\n  {json.dumps(key)}"
        before = ","
    yield "[]\n" if before == "[" else "\n]\n"
