"""The file backend: objects in segment files of one directory, shared by the processes of a host.

``records`` reads and writes the bytes, ``index`` knows where each object is, ``space`` decides
where to write and what to evict, ``directory`` opens and cleans up, ``store`` combines them.
docs/file-backend.md describes how they work together, and docs/decisions/0003-file-store.md why.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import ClassVar, NamedTuple

from hicache_core.errors import BackendDenied, BackendError, BackendFull, BackendUnavailable
from hicache_core.storage.answers import yes_at
from hicache_core.storage.base import (
    BackendConfig,
    Buffer,
    Finding,
    NamespaceTotals,
    StorageBackend,
)
from hicache_core.storage.calls import Calls
from hicache_core.storage.file.config import FileConfig
from hicache_core.storage.file.directory import os_errors
from hicache_core.storage.file.extents import Wanted
from hicache_core.storage.file.filesystem import is_local
from hicache_core.storage.file.index import Row, readable
from hicache_core.storage.file.reader import FileReader
from hicache_core.storage.file.records import MAX_KEY_NBYTES, Extent, capacity_for
from hicache_core.storage.file.store import FileStore
from hicache_core.storage.lanes import Lanes, n_leading_done
from hicache_core.storage.segments import nbytes_of
from hicache_core.types import BackendContext, Page

logger = logging.getLogger(__name__)

__all__ = ["FileBackend", "FileConfig"]

_FULL = (errno.ENOSPC, errno.EDQUOT)


class FileBackend(StorageBackend):
    """Objects in files of one directory, up to a byte limit, shared by the processes of a host."""

    name: ClassVar[str] = "file"
    pins_last: ClassVar[bool] = True
    Config: ClassVar[type[BackendConfig]] = FileConfig

    def __init__(
        self,
        config: FileConfig,
        context: BackendContext,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Stores its arguments; opens nothing.

        Args:
            config: the settings.
            context: what the backend may know about the cache.
            clock: seconds since the epoch.
        """
        super().__init__(config, context)
        self._settings = config
        self._clock = clock
        self._calls: Calls[FileStore] = Calls(f"file backend {config.path}", self._opened)
        self._counts = dict.fromkeys(
            ("reads", "misses", "writes", "dropped_writes", "raced_reads", "damaged_records"), 0
        )

    @classmethod
    def for_reading(cls, config: BackendConfig, context: BackendContext) -> StorageBackend:
        """Returns a ``FileReader``, which takes no lock and needs no right to write."""
        assert isinstance(config, FileConfig)
        return FileReader(config, context)

    @classmethod
    def taken_nbytes(cls, nbytes: int) -> int:
        """Returns the length of the extent: whole blocks of 4 KiB, with the record's header."""
        return capacity_for(nbytes)

    def check_reachable(self) -> None:
        path = self._settings.path
        existing = path if path.exists() else path.parent
        if not existing.is_dir():
            raise BackendUnavailable(f"{existing} is not a directory; create it, or correct path")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise BackendDenied(f"{existing} is not writable for this user; change that, or path")

    def open(self) -> None:
        if self._calls.open():
            self._lanes = Lanes(self._settings.io_threads, "hicache-file")

    def close(self) -> None:
        if self._calls.close():
            self._lanes.close()

    def _opened(self) -> FileStore:
        return FileStore(self._settings, self._clock, creates=self.context.creates)

    def get(self, key: str) -> Buffer | None:
        with self._calls.call() as store:
            row = store.index.lookup([key])[1][0]
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
        with self._calls.call() as store:
            return store.index.leading(keys, self._oldest())

    def batch_get(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        return self.batch_get_visiting(keys, pages, lambda _: True)

    def batch_set(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        return self.batch_set_visiting(keys, pages, lambda _: None)

    def exists_each(self, keys: Sequence[str]) -> Sequence[bool]:
        with self._calls.call() as store:
            return store.index.present(keys, self._oldest())

    def get_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        return self.get_each_visiting(keys, pages, lambda _: True)

    def set_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        return self.set_each_visiting(keys, pages, lambda _: None)

    def batch_get_visiting(
        self, keys: Sequence[str], pages: Sequence[Page], arrived: Callable[[int], bool]
    ) -> int:
        # docstring inherited from VisitsPages; ``arrived`` is called right after a page was read
        with self._calls.call() as store:
            version, found = store.lookup(keys)
            rows = self._readable(found, pages)
            parts = self._lanes.split(len(rows), sum(row.nbytes for row in rows))

            damaged: set[int] = set()

            def read(part: range) -> int:
                for done, n in enumerate(part):
                    if not store.records.read(keys[n], pages[n], rows[n].extent):
                        damaged.add(n)
                        return done
                    if not arrived(n):
                        return done
                return len(part)

            with os_errors(self._settings.path):
                n_read = n_leading_done(parts, self._lanes.run(read, parts))
            n_valid = store.index.unchanged(version, keys[:n_read], rows[:n_read])
            store.space.used([row.extent for row in rows[:n_valid]])
            if n_valid == n_read and n_read in damaged:
                self._drop_damaged(store, keys[n_read], rows[n_read])
            self._count(reads=n_valid, misses=len(keys) - n_valid, raced_reads=n_read - n_valid)
            return n_valid

    def batch_set_visiting(
        self, keys: Sequence[str], pages: Sequence[Page], leaving: Callable[[int], None]
    ) -> int:
        # docstring inherited from VisitsPages; ``leaving`` is called right before a page is written
        n_stored = min(self._set(keys, pages, leaving), default=len(keys))
        self._count(writes=n_stored, dropped_writes=len(keys) - n_stored)
        return n_stored

    def get_each_visiting(
        self, keys: Sequence[str], pages: Sequence[Page], arrived: Callable[[int], bool]
    ) -> Sequence[bool]:
        # docstring inherited from VisitsEachPage; ``arrived`` is called right after a page was read
        with self._calls.call() as store:
            version, found = store.lookup(keys)
            wanted = readable(found, pages, self._oldest())
            parts = self._lanes.split(len(wanted), sum(row.nbytes for _, row in wanted))
            damaged: list[tuple[int, Row]] = []

            def read(part: range) -> list[tuple[int, Row]]:
                good = []
                for n, row in (wanted[i] for i in part):
                    if not store.records.read(keys[n], pages[n], row.extent):
                        damaged.append((n, row))
                    elif arrived(n):
                        good.append((n, row))
                return good

            with os_errors(self._settings.path):
                good = [one for part in self._lanes.run(read, parts) for one in part]
            names, rows = [keys[n] for n, _ in good], [row for _, row in good]
            valid = list(itertools.compress(good, store.index.unchanged_each(version, names, rows)))
            store.space.used([row.extent for _, row in valid])
            for n, row in damaged:
                self._drop_damaged(store, keys[n], row)
            self._count(
                reads=len(valid),
                misses=len(keys) - len(valid),
                raced_reads=len(good) - len(valid),
            )
            return yes_at((n for n, _ in valid), len(keys))

    def set_each_visiting(
        self, keys: Sequence[str], pages: Sequence[Page], leaving: Callable[[int], None]
    ) -> Sequence[bool]:
        # docstring inherited from VisitsEachPage; as ``batch_set_visiting``
        dropped = frozenset(self._set(keys, pages, leaving))
        self._count(writes=len(keys) - len(dropped), dropped_writes=len(dropped))
        return [n not in dropped for n in range(len(keys))]

    def bounds_calls(self) -> bool:
        """Returns whether the directory is on a disk of this host: others may hang for ever."""
        return is_local(self._settings.path) and is_local(self._settings.path / "segments")

    def delete(self, keys: Sequence[str]) -> None:
        with self._calls.call() as store:
            store.directory.with_room(lambda: store.space.delete(keys))

    def list_keys(self, prefix: str) -> Iterator[str]:
        """Returns the keys that start with ``prefix`` now."""
        with self._calls.call() as store:
            return iter(store.index.keys(prefix, self._oldest()))

    def clear(self, prefix: str) -> int:
        """Removes every key that starts with ``prefix``; returns how many there were."""
        with self._calls.call() as store:
            return store.directory.with_room(lambda: store.space.clear(prefix))

    def pin(self, keys: Sequence[str], ttl_s: float) -> int:
        """See ``Pins``; a pin holds for all processes and survives a restart."""
        with self._calls.call() as store:
            return store.directory.with_room(lambda: store.space.pin(keys, ttl_s))

    def usage(self) -> Mapping[str, int]:
        """Returns bytes of objects by namespace; expired ones count until they are freed."""
        with self._calls.call() as store:
            return store.index.usage()

    def namespace_totals(self) -> Mapping[str, NamespaceTotals]:
        """Returns what is stored by namespace; expired objects count until they are freed."""
        with self._calls.call() as store:
            return store.index.namespace_totals()

    def stats(self) -> Mapping[str, float]:
        """Returns counts since ``open``, and the use of the disk now.

        ``objects`` is their number and ``used_nbytes`` their bytes. ``held_nbytes`` is the disk
        space of the store, including rounding and free extents; ``max_nbytes`` is its limit.
        """
        with self._calls.call() as store:
            objects, used_nbytes, held_nbytes = store.index.totals()
            return {
                "objects": objects,
                "used_nbytes": used_nbytes,
                "held_nbytes": held_nbytes,
                "max_nbytes": store.space.max_nbytes,
                "evicted_objects": store.space.evicted_objects,
                "expired_objects": store.space.expired_objects,
                **self._counts,
            }

    def diagnose(self) -> Iterator[Finding]:
        """Yields findings on access rights, free space, index and file system."""
        with self._calls.call() as store:
            found = store.directory.findings(store.space.max_nbytes)
        if trouble := self._calls.last_trouble:
            found.append(Finding("warning", "store", f"{trouble}; it was reopened"))
        return iter(found)

    def check_integrity(self) -> None:
        """Checks that extents do not overlap, that sums are right and that the index is current.

        Raises:
            IntegrityError: the message says what is wrong.
        """
        with self._calls.call() as store:
            store.index.check_integrity()

    def _set(
        self, keys: Sequence[str], pages: Sequence[Page], leaving: Callable[[int], None]
    ) -> Sequence[int]:
        """Stores pages; returns the places of those without room."""
        wanted = [
            Wanted(_checked(key), nbytes_of(page)) for key, page in zip(keys, pages, strict=True)
        ]
        with self._calls.call() as store:
            try:
                with os_errors(self._settings.path):
                    return store.directory.with_room(
                        lambda: self._store(store, wanted, pages, leaving)
                    )
            except BackendFull:
                return range(len(keys))

    def _store(
        self,
        store: FileStore,
        wanted: Sequence[Wanted],
        pages: Sequence[Page],
        leaving: Callable[[int], None],
    ) -> Sequence[int]:
        """Writes and publishes what is missing; returns the places of pages without room."""
        rows = store.lookup([want.key for want in wanted])[1]
        if self._all_stored(rows, wanted):
            store.space.used([row.extent for row in rows if row is not None])
            return ()
        wanted = [
            want if row is None else want._replace(seen=True)
            for want, row in zip(wanted, rows, strict=True)
        ]
        claim = store.space.claim(wanted)
        writes = [_Write(n, wanted[n], pages[n], extent) for n, extent in claim.extents.items()]
        try:
            full = self._write(store, writes, leaving)
        except BaseException:
            # This may fail on a full disk too; then ``close`` releases the claims.
            with suppress(BackendError):
                store.space.release([write.extent for write in writes])
            raise
        if full:
            store.space.give_up([write.extent for write in full])
        return claim.no_room + [write.position for write in full]

    def _write(
        self, store: FileStore, writes: list[_Write], leaving: Callable[[int], None]
    ) -> list[_Write]:
        """Writes and publishes; returns those for which the disk had no space."""
        # Neighbours go to the same thread: two that write to one file wait for each other.
        writes.sort(key=lambda write: (write.extent.segment, write.extent.offset))
        written_at = self._clock()

        def write_part(part: range) -> list[_Write]:
            full = []
            for write in (writes[i] for i in part):
                leaving(write.position)
                try:
                    store.records.write(write.want.key, write.page, write.extent, written_at)
                except OSError as exc:
                    if exc.errno not in _FULL:
                        raise
                    full.append(write)
            return full

        parts = self._lanes.split(len(writes), sum(write.want.nbytes for write in writes))
        full = [write for part in self._lanes.run(write_part, parts) for write in part]
        for write in full:  # before the index is written, which needs space too
            store.records.punch(write.extent.segment, write.extent.offset, write.extent.capacity)
        failed = {write.position for write in full}
        done = sorted(
            (write for write in writes if write.position not in failed),
            key=lambda write: write.position,
        )
        segments = {write.extent.segment for write in done}
        store.directory.check_written(segments)
        if self._settings.fsync:
            store.records.sync(segments)
        store.space.publish([(write.extent, write.want) for write in done], written_at)
        return full

    def _readable(self, found: Sequence[Row | None], pages: Sequence[Page]) -> list[Row]:
        """Returns the leading rows that are present, not expired, and as long as their pages."""
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

    def _drop_damaged(self, store: FileStore, key: str, row: Row) -> None:
        """Removes an object whose record is not the one in the index: cut off or overwritten."""
        _, rows = store.index.lookup([key])
        if rows == [row]:
            logger.warning("%s: the record of %s is damaged; removed", self._settings.path, key)
            self._count(damaged_records=1)
            with suppress(BackendFull):  # a read must not fail on a full disk
                store.space.delete([key])

    def _oldest(self) -> float:
        """Returns the time at or before which written objects have expired."""
        ttl_s = self._settings.ttl_s
        return float("-inf") if ttl_s is None else self._clock() - ttl_s

    def _count(self, **by: int) -> None:
        with self._calls.lock:
            for name, n in by.items():
                self._counts[name] += n


class _Write(NamedTuple):
    """An object to be written to an extent; ``position`` is its index in the batch."""

    position: int
    want: Wanted
    page: Page
    extent: Extent


def _checked(key: str) -> str:
    """Returns ``key`` if it fits into the header of a record."""
    if not 0 < len(key.encode()) <= MAX_KEY_NBYTES:
        raise ValueError(f"a key has 1 to {MAX_KEY_NBYTES} characters; found {len(key)}: {key!r}")
    return key
