"""Check every stored page of a backend; remove corrupt and foreign ones."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

import click
from rich.filesize import decimal
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

from hicache_core.cli._backend import BackendChoice, names_backend
from hicache_core.cli._cache_choice import summary
from hicache_core.cli._columns import columns
from hicache_core.cli._progress import watched
from hicache_core.storage.manifest import Manifest, read_manifest
from hicache_core.storage.scrub import (
    GOOD,
    REMOVED,
    UNKNOWN,
    VANISHED,
    ScrubResult,
    ScrubTotals,
    scrub,
)
from hicache_core.testing.recipe import NAMESPACE
from hicache_core.types import BackendContext


@click.command("scrub")
@names_backend()
@click.option(
    "--namespace", default="", help="Check only this namespace: the 16 digits before the /."
)
@click.option("--dry-run", is_flag=True, help="Check, but remove nothing.")
@click.option(
    "--remove-unknown", is_flag=True, help="Also remove objects without a page key or page header."
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Check at most N objects.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--max-object-nbytes", default=0, help="Bytes of a stored page; some backends need it."
)
def command(
    *,
    backend: BackendChoice,
    namespace: str,
    dry_run: bool,
    remove_unknown: bool,
    limit: int | None,
    as_json: bool,
    max_object_nbytes: int,
) -> None:
    """Check every stored page of the backend NAME; remove corrupt and foreign ones.

    An object is foreign if it was sealed for another key. An object without a page key or a page
    header is unknown: it may belong to another tool, and is kept unless --remove-unknown is given.
    The exit status is 0 if nothing had to be removed, 1 if something was removed (or would be,
    without --dry-run), and 2 if the store could not be scrubbed.
    """
    kinds = REMOVED | {UNKNOWN} if remove_unknown else REMOVED
    context = BackendContext(NAMESPACE, object_nbytes=max_object_nbytes)
    opened = backend.reading(context) if dry_run else backend.changing(context)
    totals = ScrubTotals(removed_kinds=kinds)
    with opened as store:
        prefix = f"{namespace}/" if namespace else ""
        found = scrub(store, prefix=prefix, remove=not dry_run, kinds=kinds, limit=limit)
        for checked in _shown(found):
            totals.add(checked)
            if not as_json and checked.kind not in (GOOD, VANISHED):
                click.echo(f"{checked.kind:13} {checked.key}")
        manifests = [read_manifest(store, name) for name in totals.by_namespace() if name]
    if as_json:
        click.echo(json.dumps(_report(totals, backend.name, dry_run=dry_run), indent=2))
    else:
        click.echo("\n".join(_lines(totals, manifests, dry_run=dry_run)))
    click.get_current_context().exit(1 if totals.n_bad else 0)


def _shown(found: Iterable[ScrubResult]) -> Iterator[ScrubResult]:
    """Passes ``found`` on and shows the progress if stderr is a terminal."""
    progress = watched(
        SpinnerColumn(),
        TextColumn("{task.completed:,.0f} objects, {task.fields[read]}"),
        TimeElapsedColumn(),
    )
    with progress:
        task, nbytes = progress.add_task("scrub", total=None, read=decimal(0)), 0
        for checked in found:
            nbytes += checked.nbytes
            progress.update(task, advance=1, read=decimal(nbytes))
            yield checked


def _report(totals: ScrubTotals, name: str, *, dry_run: bool) -> dict[str, object]:
    return {
        "backend": name,
        "dry_run": dry_run,
        "objects": totals.objects.total(),
        "nbytes": totals.nbytes.total(),
        "bad": totals.n_bad,
        "removed": totals.n_removed,
        "namespaces": totals.by_namespace(),
    }


def _lines(
    totals: ScrubTotals, manifests: Iterable[Manifest | None], *, dry_run: bool
) -> Iterator[str]:
    rows = [
        (namespace or "(no page keys)", kind, f"{sums['objects']:,}", f"{sums['nbytes']:,}")
        for namespace, kinds in totals.by_namespace().items()
        for kind, sums in kinds.items()
    ]
    if rows:
        yield columns([("NAMESPACE", "KIND", "OBJECTS", "BYTES"), *rows])
    yield from (summary(manifest) for manifest in manifests if manifest is not None)
    done = f"{totals.n_bad:,} would be removed" if dry_run else f"{totals.n_removed:,} removed"
    yield f"{totals.objects.total():,} objects, {totals.nbytes.total():,} bytes checked; {done}"
