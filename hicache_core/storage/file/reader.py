"""The file backend for those who only read: it takes no lock, and needs no right to write."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar

from hicache_core.errors import BackendDenied, BackendUnavailable
from hicache_core.storage.answers import n_leading, yes_at
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
from hicache_core.storage.file.filesystem import is_local
from hicache_core.storage.file.index import Row, readable
from hicache_core.storage.file.index_view import IndexView
from hicache_core.storage.file.records import RecordStore
from hicache_core.storage.lanes import Lanes, n_leading_done
from hicache_core.types import BackendContext, Page


class _View:
    """The open index and the segment files. See ``Openable``."""

    def __init__(self, settings: FileConfig) -> None:
        """Opens them; raises ``BackendError`` if there is no store."""
        self.index = IndexView(settings.path / "index.sqlite", timeout_s=settings.lock_timeout_s)
        self.records = RecordStore(settings.path / "segments", read_only=True)
        self._epoch = self.index.epoch()

    def trouble(self) -> str:
        return self.index.trouble()

    def close(self) -> None:
        self.index.close()
        self.records.close()

    def lookup(self, keys: Sequence[str]) -> tuple[int, list[Row | None]]:
        """As ``IndexView.lookup``; also closes the files of removed segments."""
        epoch = self.index.epoch()
        if epoch != self._epoch:
            self._epoch = epoch
            self.records.forget_files(self.index.segments())
        return self.index.lookup(keys)


class FileReader(StorageBackend):
    """An existing store of the file backend, of which nothing is changed.

    Reads do not count as uses: they do not keep an object from being evicted.
    """

    name: ClassVar[str] = "file"
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
        self._calls: Calls[_View] = Calls(f"file backend {config.path}", self._opened)

    def check_reachable(self) -> None:
        self.open()  # changes nothing
        self.close()

    def open(self) -> None:
        if self._calls.open():
            self._lanes = Lanes(self._settings.io_threads, "hicache-file")

    def close(self) -> None:
        if self._calls.close():
            self._lanes.close()

    def _opened(self) -> _View:
        path = self._settings.path
        with os_errors(path):
            if not (path / "index.sqlite").exists():
                raise BackendUnavailable(
                    f"{path} holds no store of the file backend; check path"
                    if not (path / "segments").is_dir()
                    else f"{path} has no index; open it once for writing, which rebuilds it"
                )
            return _View(self._settings)

    def get(self, key: str) -> Buffer | None:
        with self._calls.call() as view:
            row = view.index.lookup([key])[1][0]
        if row is None:
            return None
        value = bytearray(row.nbytes)
        return value if self.batch_get([key], [[memoryview(value)]]) == 1 else None

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    def set(self, key: str, value: Buffer) -> None:
        """Raises ``BackendDenied``."""
        raise BackendDenied(
            f"{self._settings.path} is open for reading only: {key} with "
            f"{memoryview(value).nbytes} bytes is not stored"
        )

    def batch_exists(self, keys: Sequence[str]) -> int:
        return n_leading(self.exists_each(keys))

    def exists_each(self, keys: Sequence[str]) -> Sequence[bool]:
        oldest = self._oldest()
        with self._calls.call() as view:
            rows = view.index.lookup(keys)[1]
        return [row is not None and row.written_at > oldest for row in rows]

    def batch_get(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        return self.batch_get_visiting(keys, pages, lambda _: True)

    def get_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        return self.get_each_visiting(keys, pages, lambda _: True)

    def batch_get_visiting(
        self, keys: Sequence[str], pages: Sequence[Page], arrived: Callable[[int], bool]
    ) -> int:
        # docstring inherited from VisitsPages; ``arrived`` is called right after a page was read
        with self._calls.call() as view:
            version, found = view.lookup(keys)
            there = readable(found, pages, self._oldest())
            wanted = list(itertools.takewhile(lambda one: one[0] == one[1][0], enumerate(there)))
            rows = [row for _, (_, row) in wanted]
            parts = self._lanes.split(len(rows), sum(row.nbytes for row in rows))

            def read(part: range) -> int:
                for done, n in enumerate(part):
                    if not view.records.read(keys[n], pages[n], rows[n].extent) or not arrived(n):
                        return done
                return len(part)

            with os_errors(self._settings.path):
                n_read = n_leading_done(parts, self._lanes.run(read, parts))
            return n_leading(view.index.unchanged_each(version, keys[:n_read], rows[:n_read]))

    def get_each_visiting(
        self, keys: Sequence[str], pages: Sequence[Page], arrived: Callable[[int], bool]
    ) -> Sequence[bool]:
        # docstring inherited from VisitsEachPage; ``arrived`` is called right after a page was read
        with self._calls.call() as view:
            version, found = view.lookup(keys)
            wanted = readable(found, pages, self._oldest())
            parts = self._lanes.split(len(wanted), sum(row.nbytes for _, row in wanted))

            def read(part: range) -> list[tuple[int, Row]]:
                return [
                    (n, row)
                    for n, row in (wanted[i] for i in part)
                    if view.records.read(keys[n], pages[n], row.extent) and arrived(n)
                ]

            with os_errors(self._settings.path):
                good = [one for part in self._lanes.run(read, parts) for one in part]
            names, rows = [keys[n] for n, _ in good], [row for _, row in good]
            same = view.index.unchanged_each(version, names, rows)
            return yes_at((n for n, _ in itertools.compress(good, same)), len(keys))

    def batch_set_visiting(
        self,
        keys: Sequence[str],
        pages: Sequence[Page],
        leaving: Callable[[int], None],  # noqa: ARG002 - of a protocol
    ) -> int:
        # docstring inherited from VisitsPages
        return self.batch_set(keys, pages)

    def set_each_visiting(
        self,
        keys: Sequence[str],
        pages: Sequence[Page],
        leaving: Callable[[int], None],  # noqa: ARG002 - likewise
    ) -> Sequence[bool]:
        # docstring inherited from VisitsEachPage
        return self.set_each(keys, pages)

    def bounds_calls(self) -> bool:
        """Returns whether the directory is on a disk of this host: others may hang for ever."""
        return is_local(self._settings.path) and is_local(self._settings.path / "segments")

    def list_keys(self, prefix: str) -> Iterator[str]:
        """Yields the keys that start with ``prefix``, sorted; holds a few thousand in memory."""
        with self._calls.call() as view:
            return view.index.keys(prefix, self._oldest())

    def usage(self) -> Mapping[str, int]:
        """Returns bytes of objects by namespace; expired ones count until they are freed."""
        return {name: totals.nbytes for name, totals in self.namespace_totals().items()}

    def namespace_totals(self) -> Mapping[str, NamespaceTotals]:
        """Returns what is stored by namespace; expired objects count until they are freed."""
        with self._calls.call() as view:
            return view.index.namespace_totals()

    def stats(self) -> Mapping[str, float]:
        """Returns the use of the disk now; see ``FileBackend.stats``."""
        found = self.namespace_totals().values()
        with self._calls.call() as view:
            held_nbytes = view.index.held_nbytes()
        limit = {"max_nbytes": self._settings.max_nbytes} if self._settings.max_nbytes else {}
        return {
            "objects": sum(totals.objects for totals in found),
            "used_nbytes": sum(totals.nbytes for totals in found),
            "held_nbytes": held_nbytes,
            **limit,
        }

    def diagnose(self) -> Iterator[Finding]:
        """Yields what is held; rights and space matter only to those who write."""
        with self._calls.call() as view:
            held_nbytes = view.index.held_nbytes()
        yield Finding("ok", "directory", f"{self._settings.path} can be read")
        yield Finding("ok", "room", f"{held_nbytes} bytes held")

    def _oldest(self) -> float:
        """Returns the time at or before which written objects have expired."""
        ttl_s = self._settings.ttl_s
        return float("-inf") if ttl_s is None else self._clock() - ttl_s
