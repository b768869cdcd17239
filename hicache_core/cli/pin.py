"""Keep objects of a store longer than others, for a limited time."""

from __future__ import annotations

import contextlib
import itertools
import json
import time

import click

from hicache_core.cli._backend import BackendChoice, Cannot, able, names_backend
from hicache_core.config.flags import FiniteRange
from hicache_core.storage.base import Listable, Pins, StorageBackend

_PINNED_AT_ONCE = 1024


@click.command("pin")
@names_backend()
@click.argument("keys", nargs=-1)
@click.option("--namespace", help="Pin all objects of this namespace.")
@click.option(
    "--for",
    "ttl_s",
    type=FiniteRange(min=0, min_open=True),
    default=3600.0,
    show_default=True,
    metavar="SECONDS",
    help="How long the pin lasts.",
)
@click.option("--remove", is_flag=True, help="End the pins instead.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def command(
    ctx: click.Context,
    *,
    backend: BackendChoice,
    keys: tuple[str, ...],
    namespace: str | None,
    ttl_s: float,
    remove: bool,
    as_json: bool,
) -> None:
    """Ask the backend NAME to evict the objects under KEYS, or of a --namespace, last.

    Where a pin belongs to the process that set it (redis), the command goes on until the time is
    over or Ctrl-C. The exit status is 1 if none of the objects is there.
    """
    if bool(keys) == (namespace is not None):
        raise click.UsageError("give either keys or --namespace")
    with backend.changing() as store:
        pins = able(store, Pins, "pin objects")
        if remove and not store.pins_last:
            raise Cannot(f"backend {store.name!r} ends a pin with the process that set it")
        wanted = iter(dict.fromkeys(keys))
        if namespace is not None:
            wanted = able(store, Listable, "list its keys").list_keys(f"{namespace.rstrip('/')}/")
        n = 0
        while some := list(itertools.islice(wanted, _PINNED_AT_ONCE)):
            n += pins.pin(some, 0.0 if remove else ttl_s)
        if as_json:
            said = {"backend": backend.name, "pinned": 0 if remove else n, "objects": n}
            click.echo(json.dumps(said))
        else:
            click.echo(f"{n:,} no longer pinned" if remove else f"{n:,} pinned for {ttl_s:g} s")
        if n and not remove:
            _stay(store, ttl_s)
    ctx.exit(0 if n else 1)


def _stay(store: StorageBackend, ttl_s: float) -> None:
    """Waits until the pins have ended, if they would end with the backend."""
    if not store.pins_last:
        click.echo(
            f"backend {store.name!r} keeps a pin only while this command runs; Ctrl-C ends it",
            err=True,
        )
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(ttl_s)
