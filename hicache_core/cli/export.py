"""Write stored objects into an archive, one file."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

import click

from hicache_core.cli._backend import BackendChoice, names_backend
from hicache_core.cli._moving import ObjectChoice, Plan, names_objects, planned
from hicache_core.cli._moving_view import MoveView, show_report
from hicache_core.errors import ConfigError
from hicache_core.storage.moving.archive import Head, Planned
from hicache_core.storage.moving.archive_reader import kept_in, refuses_nothing
from hicache_core.storage.moving.archive_writer import ArchiveWriter
from hicache_core.storage.moving.mover import DEFAULT_THREADS, make_slabs, move
from hicache_core.storage.moving.store import StoreReader, count_keys, register

STDIO = Path("-")


@click.command("export")
@names_backend()
@click.argument("file", type=click.Path(dir_okay=False, allow_dash=True, path_type=Path))
@names_objects
@click.option("--resume", is_flag=True, help="Go on with FILE, which an interrupted export left.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    *,
    backend: BackendChoice,
    file: Path,
    choice: ObjectChoice,
    resume: bool,
    as_json: bool,
) -> None:
    """Write the stored objects of the backend NAME into the archive FILE, or - for stdout.

    The archive is a tar file; hicache import reads it into any backend. Each object is checked
    before it is written: damaged ones are counted and left out. An interrupted export leaves a half
    archive, which --resume goes on with. The exit status is 0 if the archive has everything, 1 if
    something was damaged, and 2 on errors.
    """
    with planned(backend, choice) as (store, plan):
        counts = count_keys(store, plan.parts)
        with _writer(file, plan, counts, resume=resume) as writer:
            slabs = make_slabs(DEFAULT_THREADS, plan.context.object_nbytes)
            register(slabs, store)
            reader = StoreReader(store, plan.parts, refuses_nothing)
            with MoveView("export", sum(counts.values())) as view:
                totals = move(reader, writer, slabs, view.told)
                writer.finish()
    to_stdout = file == STDIO
    show_report(totals, view, plan.manifests, plan.found, as_json=as_json, err=to_stdout)


@contextlib.contextmanager
def _writer(
    file: Path, plan: Plan, counts: dict[str, int], *, resume: bool
) -> Iterator[ArchiveWriter]:
    """What appends to the archive: a new one, or the half one that is to be gone on with."""
    if resume:
        if file == STDIO:
            raise click.UsageError("--resume needs a file: stdout cannot be read")
        with _opened(file, "r+b") as archive:
            _, kept, end = kept_in(archive, list(plan.manifests))
            archive.truncate(end)
            archive.seek(end)
            yield ArchiveWriter(archive, kept)
        return
    with contextlib.nullcontext(sys.stdout.buffer) if file == STDIO else _opened(file, "xb") as new:
        writer = ArchiveWriter(new)
        writer.begin(_head(plan, counts))
        yield writer


def _opened(file: Path, mode: str) -> BinaryIO:
    """The file, locked: two exports at once would write over each other."""
    try:
        archive: BinaryIO = file.expanduser().open(mode, buffering=0)  # type: ignore[assignment]
    except FileExistsError:
        raise ConfigError(
            f"{file} exists: add --resume to go on with it, or name another file"
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot open {file}: {error.strerror}") from None
    try:
        fcntl.flock(archive, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        archive.close()
        raise ConfigError(
            f"another export writes {file}; wait until it ends, or name another file"
        ) from None
    except OSError:
        pass  # a file system without locks
    return archive


def _head(plan: Plan, counts: dict[str, int]) -> Head:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    planned_of = {
        name: Planned(
            counts[name],
            0 if manifest is None else manifest.object_nbytes,
            {} if manifest is None else manifest.fields | dict(manifest.told),
        )
        for name, manifest in plan.manifests.items()
    }
    return Head(now, f"hicache-core {version('hicache-core')}", planned_of)
