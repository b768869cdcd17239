"""Copy stored objects from one backend to another."""

from __future__ import annotations

import click

from hicache_core.cli._backend import BackendChoice, names_backend
from hicache_core.cli._moving import ObjectChoice, names_objects, planned
from hicache_core.cli._moving_view import MoveView, show_report
from hicache_core.storage.moving.archive_reader import refuses_nothing
from hicache_core.storage.moving.mover import DEFAULT_THREADS, make_slabs, move
from hicache_core.storage.moving.store import StoreReader, StoreWriter, count_gone, register


@click.command("copy")
@names_backend("source", "from-config", "FROM")
@names_backend("target", "to-config", "TO")
@names_objects
@click.option(
    "--threads",
    type=click.IntRange(1, 64),
    default=DEFAULT_THREADS,
    show_default=True,
    help="Batches that are moved at the same time.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    *,
    source: BackendChoice,
    target: BackendChoice,
    choice: ObjectChoice,
    threads: int,
    as_json: bool,
) -> None:
    """Copy the stored objects of the backend FROM to the backend TO.

    FROM and TO are names of installed backends. Each object is checked before it is written:
    damaged ones, and those of another cache, are counted and not copied. What TO has already is not
    read, so an interrupted copy goes on when it is called again. FROM stays as it is; a missing TO
    is created. The exit status is 0 if TO has everything now, 1 if something was damaged, refused
    or without room, and 2 on errors.
    """
    with (
        planned(source, choice) as (store, plan),
        target.writing(plan.context) as other,
    ):
        slabs = make_slabs(threads, plan.context.object_nbytes)
        register(slabs, store, other)
        reader = StoreReader(store, plan.parts, refuses_nothing)
        with MoveView("copy", plan.count(store)) as view:
            totals = move(reader, StoreWriter(other), slabs, view.told)
        totals.n_gone = count_gone(other, totals)
    show_report(totals, view, plan.manifests, plan.found, as_json=as_json)
