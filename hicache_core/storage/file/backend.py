"""The file backend: objects in segment files of one directory, shared by the processes of a host.

``records`` reads and writes the bytes, ``index`` knows which object lies where, ``space`` decides
who writes where and what has to go, ``directory`` opens and cleans up.
docs/file-backend.md tells how they work together; docs/decisions/0003-file-store.md why so.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import ClassVar, NamedTuple

from hicache_core.errors import BackendError, BackendFull, UseAfterClose
from hicache_core.hookspecs import hookimpl
from hicache_core.storage.base import BackendConfig, Buffer, Finding, StorageBackend
from hicache_core.storage.file.config import FileConfig
from hicache_core.storage.file.directory import FileDirectory, os_errors
from hicache_core.storage.file.extents import Wanted
from hicache_core.storage.file.index import Row
from hicache_core.storage.file.quota import FileQuota
from hicache_core.storage.file.records import MAX_KEY_NBYTES, Extent
from hicache_core.storage.file.space import FileSpace
from hicache_core.storage.lanes import Lanes
from hicache_core.storage.segments import nbytes_of
from hicache_core.types import BackendContext, Page

logger = logging.getLogger(__name__)

__all__ = ["FileBackend", "FileConfig", "hicache_backends"]

DEFAULT_SHARE = 0.9
"""Without ``max_nbytes``: of what the store holds and what is free together."""

CLOSE_TIMEOUT_S = 30.0
"""``close`` waits so long for calls that other threads are still in."""

_FULL = (errno.ENOSPC, errno.EDQUOT)


class FileBackend(StorageBackend):
    """Whole objects or none, below a byte cap, for any number of processes of one host."""

    name: ClassVar[str] = "file"
    Config: ClassVar[type[BackendConfig]] = FileConfig

    def __init__(
        self,
        config: FileConfig,
        context: BackendContext,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(config, context)
        self._settings = config
        self._clock = clock
        self._directory: FileDirectory | None = None
        self._calls = 0
        self._calls_ended = threading.Condition()
        self._counts = dict.fromkeys(
            ("reads", "misses", "writes", "dropped_writes", "raced_reads", "damaged_records"), 0
        )

    def open(self) -> None:
        if self._directory is not None:
            return
        settings = self._settings
        directory = FileDirectory(
            settings.path, timeout_s=settings.lock_timeout_s, durable=settings.fsync
        )
        directory.open()
        self._pid = os.getpid()
        self._lanes = Lanes(settings.io_threads, "hicache-file")
        quota = FileQuota(directory.index, settings.namespace_quota_nbytes, self._clock)
        self._space = FileSpace(
            directory.index, directory.store, ttl_s=settings.ttl_s, quota=quota, clock=self._clock
        )
        self._space.owner = directory.owner
        self._epoch = directory.index.epoch
        try:
            self._space.max_nbytes = settings.max_nbytes or self._default_cap(directory)
            self._space.trim()
        except BaseException:
            directory.close()
            raise
        self._directory = directory

    def close(self) -> None:
        with self._calls_ended:
            directory, self._directory = self._directory, None
            if directory is None or self._pid != os.getpid():
                return  # what a forked child inherited is its parent's to close
            idle = self._calls_ended.wait_for(lambda: self._calls == 0, CLOSE_TIMEOUT_S)
        if not idle:
            # Its claims stay claimed until this process ends: nobody may write where it may still.
            logger.warning("%s: a call still runs; its files stay open", self._settings.path)
            return
        self._lanes.close()
        try:
            self._space.flush_uses()
        except BackendError as exc:  # only the order of eviction suffers
            logger.warning("%s: the last uses were not written: %s", self._settings.path, exc)
        directory.close()

    def get(self, key: str) -> Buffer | None:
        with self._call() as directory:
            row = directory.index.lookup([key])[1][0]
        if row is None:
            return None
        value = bytearray(row.nbytes)
        return value if self.batch_get([key], [[memoryview(value)]]) == 1 else None

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    def set(self, key: str, value: Buffer) -> None:
        if self.batch_set([key], [[memoryview(value).cast("B")]]) == 0:
            raise BackendFull(
                f"{self._settings.path} has no room for {memoryview(value).nbytes} bytes; raise "
                "max_nbytes or free some disk space"
            )

    def batch_exists(self, keys: Sequence[str]) -> int:
        with self._call() as directory:
            return directory.index.leading(keys, self._oldest())

    def batch_get(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        return self.batch_get_visiting(keys, pages, lambda _: True)

    def batch_set(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        return self.batch_set_visiting(keys, pages, lambda _: None)

    def batch_get_visiting(
        self, keys: Sequence[str], pages: Sequence[Page], arrived: Callable[[int], bool]
    ) -> int:
        """See ``VisitsPages``: ``arrived`` is called right after a page was read."""
        with self._call() as directory:
            version, found = self._lookup(directory, keys)
            rows = self._readable(found, pages)
            parts = self._lanes.split(len(rows), sum(row.nbytes for row in rows))

            damaged: set[int] = set()

            def read(part: range) -> int:
                for done, n in enumerate(part):
                    if not directory.store.read(keys[n], pages[n], rows[n].extent):
                        damaged.add(n)
                        return done
                    if not arrived(n):
                        return done
                return len(part)

            with os_errors(self._settings.path):
                n_read = _leading(parts, self._lanes.run(read, parts))
            n_valid = directory.index.unchanged(version, keys[:n_read], rows[:n_read])
            self._space.used([row.extent for row in rows[:n_valid]])
            if n_valid == n_read and n_read in damaged:
                self._drop_damaged(directory, keys[n_read], rows[n_read])
            self._count(reads=n_valid, misses=len(keys) - n_valid, raced_reads=n_read - n_valid)
            return n_valid

    def batch_set_visiting(
        self, keys: Sequence[str], pages: Sequence[Page], leaving: Callable[[int], None]
    ) -> int:
        """See ``VisitsPages``: ``leaving`` is called right before a page is written."""
        wanted = [
            Wanted(_checked(key), nbytes_of(page)) for key, page in zip(keys, pages, strict=True)
        ]
        with self._call() as directory:
            try:
                with os_errors(self._settings.path):
                    n_stored = self._store(directory, wanted, pages, leaving)
            except BackendFull:
                n_stored = 0
            self._count(writes=n_stored, dropped_writes=len(keys) - n_stored)
            return n_stored

    def delete(self, keys: Sequence[str]) -> None:
        with self._call():
            self._space.delete(keys)

    def list_keys(self, prefix: str) -> Iterator[str]:
        """Every key that starts with ``prefix``, as of now."""
        with self._call() as directory:
            return iter(directory.index.keys(prefix, self._oldest()))

    def clear(self, prefix: str) -> int:
        """Removes every key that starts with ``prefix``; how many there were."""
        with self._call():
            return self._space.clear(prefix)

    def pin(self, keys: Sequence[str], ttl_s: float) -> int:
        """See ``Pins``; all processes keep to it, and it survives a restart."""
        with self._call():
            return self._space.pin(keys, ttl_s)

    def usage(self) -> Mapping[str, int]:
        """Bytes of stored objects by namespace; those past their TTL count until they are freed."""
        with self._call() as directory:
            return directory.index.usage()

    def stats(self) -> Mapping[str, float]:
        """Counts since ``open``; ``objects``, ``used_nbytes``, ``held_nbytes`` and ``max_nbytes``.

        ``used_nbytes`` are the objects' own bytes, ``held_nbytes`` the disk space kept for them,
        rounded up and with what is free to be written again; ``max_nbytes`` is the cap on that.
        """
        with self._call() as directory:
            objects, used_nbytes, held_nbytes = directory.index.totals()
            return {
                "objects": objects,
                "used_nbytes": used_nbytes,
                "held_nbytes": held_nbytes,
                "max_nbytes": self._space.max_nbytes,
                "evicted_objects": self._space.evicted_objects,
                "expired_objects": self._space.expired_objects,
                **self._counts,
            }

    def diagnose(self) -> Iterator[Finding]:
        """The directory's rights, room, file system and what was found when it was opened."""
        with self._call() as directory:
            return iter(directory.findings(self._space.max_nbytes))

    def check_integrity(self) -> None:
        """Extents do not overlap, all sums hold, and the index is known as it stands.

        Raises:
            IntegrityError: it is not so.
        """
        with self._call() as directory:
            directory.index.check_integrity()

    @contextmanager
    def _call(self) -> Iterator[FileDirectory]:
        """The open directory, which ``close`` leaves open until the block has ended."""
        with self._calls_ended:
            directory = self._directory
            if directory is None:
                raise UseAfterClose(f"file backend {self._settings.path} is not open")
            if self._pid != os.getpid():
                raise UseAfterClose(
                    f"file backend {self._settings.path} was opened in process {self._pid}; a "
                    "forked child has to open one of its own"
                )
            self._calls += 1
        try:
            yield directory
        finally:
            with self._calls_ended:
                self._calls -= 1
                if not self._calls:
                    self._calls_ended.notify_all()

    def _store(
        self,
        directory: FileDirectory,
        wanted: Sequence[Wanted],
        pages: Sequence[Page],
        leaving: Callable[[int], None],
    ) -> int:
        """Writes and publishes what is not stored yet; how many leading pages are stored then."""
        rows = self._lookup(directory, [want.key for want in wanted])[1]
        if self._all_stored(rows, wanted):
            self._space.used([row.extent for row in rows if row is not None])
            return len(wanted)
        wanted = [
            want if row is None else want._replace(seen=True)
            for want, row in zip(wanted, rows, strict=True)
        ]
        extents = self._space.claim(wanted)
        writes = [
            _Write(n, wanted[n], pages[n], extent)
            for n, extent in enumerate(extents)
            if extent is not None
        ]
        try:
            full = self._write(directory, writes, leaving)
        except BaseException:
            # A full disk may refuse this too; the claims are then given back at close.
            with suppress(BackendError):
                self._space.release([write.extent for write in writes])
            raise
        if full:
            self._space.give_up([write.extent for write in full])
        return min((write.position for write in full), default=len(extents))

    def _write(
        self, directory: FileDirectory, writes: list[_Write], leaving: Callable[[int], None]
    ) -> list[_Write]:
        """Writes and publishes; returns those that the disk had no room for."""
        # Neighbours go to one thread: two that write to one file would wait for each other.
        writes.sort(key=lambda write: (write.extent.segment, write.extent.offset))
        written_at = self._clock()

        def write_part(part: range) -> list[_Write]:
            full = []
            for write in (writes[i] for i in part):
                leaving(write.position)
                try:
                    directory.store.write(write.want.key, write.page, write.extent, written_at)
                except OSError as exc:
                    if exc.errno not in _FULL:
                        raise
                    full.append(write)
            return full

        parts = self._lanes.split(len(writes), sum(write.want.nbytes for write in writes))
        full = [write for part in self._lanes.run(write_part, parts) for write in part]
        for write in full:  # at once, since the index needs some room as well
            directory.store.punch(write.extent.segment, write.extent.offset, write.extent.capacity)
        failed = {write.position for write in full}
        done = sorted(
            (write for write in writes if write.position not in failed),
            key=lambda write: write.position,
        )
        if self._settings.fsync:
            directory.store.sync({write.extent.segment for write in done})
        self._space.publish([(write.extent, write.want) for write in done], written_at)
        return full

    def _lookup(
        self, directory: FileDirectory, keys: Sequence[str]
    ) -> tuple[int, list[Row | None]]:
        version, rows = directory.index.lookup(keys)
        if directory.index.epoch != self._epoch:
            self._epoch = directory.index.epoch
            directory.store.forget_files(directory.index.segments)
        return version, rows

    def _readable(self, found: Sequence[Row | None], pages: Sequence[Page]) -> list[Row]:
        """The leading rows that are there, young enough, and as long as their pages."""
        oldest, rows = self._oldest(), []
        for row, page in zip(found, pages, strict=True):
            if row is None or row.written_at <= oldest or row.nbytes != nbytes_of(page):
                break
            rows.append(row)
        return rows

    def _all_stored(self, rows: Sequence[Row | None], wanted: Sequence[Wanted]) -> bool:
        oldest = self._oldest()
        return all(
            row is not None and row.written_at > oldest and row.nbytes == want.nbytes
            for row, want in zip(rows, wanted, strict=True)
        )

    def _drop_damaged(self, directory: FileDirectory, key: str, row: Row) -> None:
        """Removes an object whose record is not what the index says: it was cut or overwritten."""
        _, rows = directory.index.lookup([key])
        if rows == [row]:
            logger.warning("%s: the record of %s is damaged; removed", self._settings.path, key)
            self._count(damaged_records=1)
            self._space.delete([key])

    def _oldest(self) -> float:
        """Objects that were written at or before this time are gone."""
        ttl_s = self._settings.ttl_s
        return float("-inf") if ttl_s is None else self._clock() - ttl_s

    def _default_cap(self, directory: FileDirectory) -> int:
        held = directory.index.totals()[2]
        return int(DEFAULT_SHARE * (held + directory.store.free_nbytes()))

    def _count(self, **by: int) -> None:
        with self._calls_ended:
            for name, n in by.items():
                self._counts[name] += n


class _Write(NamedTuple):
    """An object on its way to an extent; ``position`` is its place in the call's batch."""

    position: int
    want: Wanted
    page: Page
    extent: Extent


def _leading(parts: Sequence[range], counts: Sequence[int]) -> int:
    """How many leading items are done when ``counts`` of each part are."""
    total = 0
    for part, count in zip(parts, counts, strict=True):
        total += count
        if count < len(part):
            break
    return total


def _checked(key: str) -> str:
    """``key``, if a record's header has room for it."""
    if not 0 < len(key.encode()) <= MAX_KEY_NBYTES:
        raise ValueError(f"a key has 1 to {MAX_KEY_NBYTES} characters; found {len(key)}: {key!r}")
    return key


@hookimpl
def hicache_backends() -> list[type[StorageBackend]]:
    """The backend of this module."""
    return [FileBackend]
