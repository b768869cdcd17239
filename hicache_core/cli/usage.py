"""Show what a store says of itself: bytes, objects, its limit, its counters."""

from __future__ import annotations

import json
from collections.abc import Mapping

import click

from hicache_core.cli._backend import BackendChoice, Cannot, names_backend
from hicache_core.cli._columns import columns
from hicache_core.cli._stored import counted, size_words, stored
from hicache_core.storage.base import HasStats, StorageBackend

_GAUGES = {
    "used_nbytes": "bytes of the objects",
    "held_nbytes": "bytes that the store takes for them",
    "max_nbytes": "limit",
    "objects": "objects",
}


@click.command("usage")
@names_backend()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(*, backend: BackendChoice, as_json: bool) -> None:
    """Show how full the store of the backend NAME is, as far as the backend knows.

    What it does not know is left out. The memory of a Redis server is in hicache doctor.
    """
    with backend.reading() as store:
        known = _known(store)
    if as_json:
        click.echo(json.dumps({"backend": backend.name, **known}, indent=2))
        return
    rows = [
        (words, counted(known[name]), size_words(known[name]) if name != "objects" else "")
        for name, words in _GAUGES.items()
        if name in known
    ]
    click.echo(columns(rows))


def _known(store: StorageBackend) -> Mapping[str, int]:
    """The gauges that the backend reports, or that follow from its namespaces.

    Raises:
        Cannot: the backend reports nothing.
    """
    has_stats = store.capability(HasStats)
    stats = {} if has_stats is None else has_stats.stats()
    known = {name: int(stats[name]) for name in _GAUGES if name in stats}
    if "used_nbytes" not in known:
        try:
            found = stored(store, counts=True)
        except Cannot as error:
            if known:
                return known
            raise Cannot(f"{error.message}, nor does it report what it holds") from None
        if all(one.nbytes is not None for one in found):
            known["used_nbytes"] = sum(one.nbytes or 0 for one in found)
        if all(one.objects is not None for one in found):
            known["objects"] = sum(one.objects or 0 for one in found)
    return known
