"""Remove objects from a store: by their keys, or all of a namespace."""

from __future__ import annotations

import itertools
import json

import click

from hicache_core.cli._backend import BackendChoice, Cannot, able, names_backend
from hicache_core.storage.base import Clearable, Listable, StorageBackend

_REMOVED_AT_ONCE = 1024


@click.command("rm")
@names_backend()
@click.argument("keys", nargs=-1)
@click.option("--namespace", help="Remove all objects of this namespace.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def command(
    ctx: click.Context,
    *,
    backend: BackendChoice,
    keys: tuple[str, ...],
    namespace: str | None,
    yes: bool,
    as_json: bool,
) -> None:
    """Remove the objects under KEYS, or those of a --namespace, from the backend NAME.

    The exit status is 1 if nothing was there to be removed, or the question was not answered with
    yes.
    """
    if bool(keys) == (namespace is not None):
        raise click.UsageError("give either keys or --namespace")
    keys = tuple(dict.fromkeys(keys))
    with backend.changing() as store:
        if namespace is None:
            what = f"{len(keys)} objects" if len(keys) > 1 else keys[0]
            n = _remove(store, keys) if yes or _agreed(what, backend) else 0
        else:
            prefix = f"{namespace.rstrip('/')}/"
            agreed = yes or _agreed(f"all objects of namespace {prefix[:-1]}", backend)
            n = _clear(store, prefix) if agreed else 0
    if as_json:
        click.echo(json.dumps({"backend": backend.name, "removed": n}))
    else:
        click.echo(f"{n:,} removed")
    ctx.exit(0 if n else 1)


def _agreed(what: str, backend: BackendChoice) -> bool:
    """Asks; at the end of the input the command ends."""
    return click.confirm(f"Remove {what} from {backend.name}?", err=True)


def _remove(store: StorageBackend, keys: tuple[str, ...]) -> int:
    """Removes objects; returns how many of them were there.

    Raises:
        Cannot: the backend cannot delete.
    """
    n_there = sum(store.exists_each(keys))
    try:
        store.delete(keys)
    except NotImplementedError as error:
        raise Cannot(str(error)) from None
    return n_there


def _clear(store: StorageBackend, prefix: str) -> int:
    """Removes the keys that start with ``prefix``; returns how many there were."""
    clearable = store.capability(Clearable)
    if clearable is not None:
        return clearable.clear(prefix)
    keys = able(store, Listable, "remove a namespace").list_keys(prefix)
    n = 0
    while some := tuple(itertools.islice(keys, _REMOVED_AT_ONCE)):
        n += _remove(store, some)
    return n
