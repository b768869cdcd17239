"""The checks of ``hicache doctor hf3fs``."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from hicache_core.storage.base import Finding
from hicache_hf3fs.config import Hf3fsConfig
from hicache_hf3fs.store import Store
from hicache_hf3fs.usrbio import UsrbioIO

_HOST_LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "tmpfs", "overlay", "zfs"}
_NOT_COHERENT = {"nfs", "nfs4", "cifs", "smb3"}


def findings(settings: Hf3fsConfig, store: Store) -> Iterator[Finding]:
    """Yields findings on mode and mount, free space, slots, other slabs and metadata."""
    kind = filesystem_of(store.prefix.parent)
    yield from _mode(settings, store, kind)
    yield from _slots(settings, store)
    yield from _other_slabs(store)
    yield from _metadata(store, kind)


def filesystem_of(directory: Path) -> str:
    """Returns the type of the file system of ``directory``, from the mount table."""
    best, kind = "", "unknown"
    real = f"{directory.resolve()}/"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, its_kind, *_ = line.split(" ")
        mount = mount.replace("\\040", " ")
        if real.startswith(f"{mount.rstrip('/')}/") and len(mount) >= len(best):
            best, kind = mount, its_kind
    return kind


def _mode(settings: Hf3fsConfig, store: Store, kind: str) -> Iterator[Finding]:
    if isinstance(store.io, UsrbioIO):
        yield Finding(
            "ok",
            "mode",
            f"usrbio on 3FS mount {store.io.mount}: {settings.numjobs} pairs of rings with "
            f"{settings.entries} entries",
        )
        if store.io.lost_rings:
            yield Finding(
                "warning",
                "rings",
                f"{store.io.lost_rings} rings were lost to operations that 3FS never completed; "
                "see the log of the mount",
            )
        return
    yield Finding("ok", "mode", f"posix on {kind} at {store.prefix.parent}")
    if kind in _NOT_COHERENT:
        yield Finding(
            "warning",
            "file system",
            f"{kind} caches on each host, so a host may read what another has overwritten; such "
            "reads are misses, but use 3FS or another coherent file system",
        )


def _slots(settings: Hf3fsConfig, store: Store) -> Iterator[Finding]:
    totals = store.metadata.totals(store.own.name)
    status = os.statvfs(store.prefix.parent)
    free_nbytes = status.f_bavail * status.f_frsize
    yield Finding(
        "ok",
        "slots",
        f"{totals.bound} of {totals.n_slots} slots of {store.own.slot_nbytes} bytes hold objects, "
        f"{totals.held} are reserved or wait for a lease; the disk has {free_nbytes} bytes free",
    )
    if totals.held * 4 > totals.n_slots:
        yield Finding(
            "warning",
            "slots",
            "more than a quarter cannot be written now; lower lease_s or raise file_size",
        )
    if store.own.n_slots * store.own.slot_nbytes > settings.file_size:
        yield Finding(
            "warning",
            "slab",
            f"{store.own.path} was created larger than file_size and does not shrink; to get the "
            "space back, stop all processes and remove it",
        )
    if store.rebuilt:
        yield Finding("warning", "metadata", "were lost; rebuilt from the slab when it was opened")


def _other_slabs(store: Store) -> Iterator[Finding]:
    size = store.own.name.partition(".")[2]
    pattern = f"{store.prefix.name}.r*.slab"
    others = [
        path
        for path in sorted(store.prefix.parent.glob(pattern))
        if path.name.rsplit(".", 2)[1] != size
    ]
    if others:
        nbytes = sum(path.stat().st_blocks * 512 for path in others)
        yield Finding(
            "warning",
            "slab",
            f"{len(others)} slabs of other slot sizes take {nbytes} bytes, such as {others[0]}; if "
            "no cache with that object size runs any more, remove them",
        )


def _metadata(store: Store, kind: str) -> Iterator[Finding]:
    start = time.perf_counter()
    store.metadata.leading(["0"])
    took_ms = (time.perf_counter() - start) * 1e3
    yield Finding("ok", "metadata", f"{store.metadata.where} answers in {took_ms:.2f} ms")
    yield from store.metadata.findings()
    if store.metadata.where.startswith("/"):
        at = filesystem_of(Path(store.metadata.where).parent)
        if at not in _HOST_LOCAL:
            yield Finding(
                "warning",
                "metadata",
                f"the SQLite file is on {at}: SQLite needs a local disk and serves one host; set "
                "metadata_url to sqlite:///DIR/FILE on a local disk, or redis://… for many hosts",
            )
        elif kind not in _HOST_LOCAL:
            yield Finding(
                "ok", "metadata", "SQLite serves this host only; other hosts need redis://…"
            )
