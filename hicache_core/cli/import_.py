"""Read the objects of an archive into a backend."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import click

from hicache_core.cli._backend import BackendChoice, names_backend
from hicache_core.cli._moving import context_of, refusing_other_models
from hicache_core.cli._moving_view import MoveView, show_report
from hicache_core.errors import ConfigError
from hicache_core.storage.manifest import read_manifest
from hicache_core.storage.moving.archive_reader import ArchiveReader
from hicache_core.storage.moving.mover import DEFAULT_THREADS, make_slabs, move
from hicache_core.storage.moving.store import StoreWriter, count_gone, register

STDIO = Path("-")


@click.command("import")
@click.argument(
    "file", type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path)
)
@names_backend()
@click.option(
    "--model-fingerprint",
    default="",
    help="Refuse pages of other models than this: its fingerprint, or the beginning.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(*, file: Path, backend: BackendChoice, model_fingerprint: str, as_json: bool) -> None:
    """Read the objects of the archive FILE, or - for stdin, into the backend NAME.

    Each object is checked before it is stored: damaged ones, and those of another cache, are
    counted and not stored. What the backend has already is not written again. Of a half archive the
    whole objects are stored, and the others counted. The exit status is 0 if the backend has
    everything now, 1 if something was damaged or refused or the archive is not whole, and 2 on
    errors.
    """
    opened = contextlib.nullcontext(sys.stdin.buffer) if file == STDIO else file.open("rb", 0)
    with opened as archive:
        reader = ArchiveReader(archive, refusing_other_models(model_fingerprint))
        planned = reader.head.namespaces
        if not planned:
            raise ConfigError(f"{file} is an archive of nothing")
        context = context_of({name: own.object_nbytes for name, own in planned.items()})
        with backend.writing(context) as store:
            slabs = make_slabs(DEFAULT_THREADS, context.object_nbytes)
            register(slabs, store)
            total = sum(own.objects for own in planned.values())
            with MoveView("import", total) as view:
                totals = move(reader, StoreWriter(store), slabs, view.told)
            reader.finish(totals)
            totals.n_gone = count_gone(store, totals)
            manifests = {name: read_manifest(store, name) for name in planned}
    show_report(totals, view, manifests, as_json=as_json)
