"""Pages of ours between a backend and an engine's memory, for calls that may be given up on.

A call of a backend that does not bound its calls may hang, and touch its pages when it wakes up. So
it gets staging pages. A page is copied to the engine, or from it, only while somebody waits.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self, overload

from hicache_core.errors import BackendTimeout, BackendUnavailable
from hicache_core.integrations.foreign.headers import wipe
from hicache_core.storage.base import RegistersMemory, StorageBackend
from hicache_core.storage.sealed import HEADER_NBYTES, mismatch
from hicache_core.storage.segments import nbytes_of, scatter
from hicache_core.storage.wrapper import BackendWrapper
from hicache_core.types import Page

CHUNK_NBYTES = 8 << 20
"""Bytes of one call of the backend: few enough to stay in a processor's cache for the copy."""

_ALIGN = 64


def room_for(nbytes: int) -> int:
    """Returns the length of a staging page for ``nbytes``, header included."""
    return HEADER_NBYTES + -(-nbytes // _ALIGN) * _ALIGN


class LentPages(Sequence[Page]):
    """Pages of an engine during one call, until somebody gives up on the call.

    Threads: the storage thread of the call copies; any thread may call ``end``, which waits for the
    copy of one page at most.
    """

    def __init__(self, pages: Sequence[Page]) -> None:
        """Touches nothing.

        Args:
            pages: the engine's memory.
        """
        self.nbytes = [nbytes_of(page) for page in pages]
        self._lock = threading.Lock()
        self._pages: Sequence[Page] | None = pages
        self._mask = [False] * len(pages)

    def __len__(self) -> int:
        return len(self.nbytes)

    @overload
    def __getitem__(self, index: int) -> Page: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Page]: ...
    def __getitem__(self, index: int | slice) -> Page | Sequence[Page]:
        raise TypeError("pages of an engine are copied to or from staging pages, never touched")

    @property
    def ended(self) -> bool:
        """Whether nobody waits for the call."""
        return self._pages is None

    def fill(self, n: int, staged: Page, key: str | None) -> bool:
        """Copies a verified page to the engine; returns False if nobody waits any more.

        Args:
            n: index of the page.
            staged: header and payload.
            key: verifies the copy, and wipes it if it is wrong; None if ``staged`` cannot change.
        """
        with self._lock:
            if self._pages is None:
                return False
            page = self._pages[n]
            scatter(staged[1], page)
            if key is None or mismatch(key, (memoryview(bytes(staged[0])), *page)) is None:
                self._mask[n] = True
            else:
                wipe(page)
            return True

    def copy(self, n: int, staged: memoryview) -> bool:
        """Copies a page of the engine to ``staged``; returns False if nobody waits any more."""
        with self._lock:
            if self._pages is None:
                return False
            start = 0
            for segment in self._pages[n]:
                staged[start : start + segment.nbytes] = segment
                start += segment.nbytes
            return True

    def stored(self, n: int) -> None:
        """Notes that page ``n`` is stored."""
        with self._lock:
            self._mask[n] = True

    def so_far(self) -> list[bool]:
        """Returns for each page whether it was filled or is stored."""
        with self._lock:
            return list(self._mask)

    def end(self) -> list[bool]:
        """Ends the call: nothing touches the engine's pages afterwards. Returns the answer."""
        with self._lock:
            self._pages = None
            return list(self._mask)


@dataclass(slots=True)
class _Lease:
    start: int
    stop: int
    pages: LentPages


class Staging:
    """A fixed amount of memory, of which each running call has a part of its own.

    The memory is reserved at once; the system provides what is used. Threads: any.
    """

    def __init__(self, nbytes: int, chunk_nbytes: int = CHUNK_NBYTES) -> None:
        """Reserves the memory.

        Args:
            nbytes: all of it.
            chunk_nbytes: what a call uses, unless a single page of it is longer.
        """
        self.chunk_nbytes = min(chunk_nbytes, nbytes)
        self.memory = memoryview(mmap.mmap(-1, nbytes))
        self._changed = threading.Condition()
        self._leases: list[_Lease] = []  # by place
        self._n_refused = 0

    @property
    def n_refused(self) -> int:
        """Number of calls that found all memory held by calls that hang."""
        return self._n_refused

    @property
    def held_nbytes(self) -> int:
        """Bytes that running calls hold."""
        with self._changed:
            return sum(lease.stop - lease.start for lease in self._leases)

    @contextmanager
    def lease(self, pages: LentPages) -> Iterator[memoryview]:
        """Lends memory for one call; waits for calls that do not hang.

        Raises:
            BackendTimeout: calls that nobody waits for hold the memory, or nobody waits for this
                one.
            BackendUnavailable: a page is longer than all memory.
        """
        rooms = [*map(room_for, pages.nbytes)]
        nbytes = max(*rooms, min(sum(rooms), self.chunk_nbytes))
        if nbytes > self.memory.nbytes:
            raise BackendUnavailable(
                f"a page of {max(pages.nbytes)} bytes does not fit the staging memory of "
                f"{self.memory.nbytes} bytes; raise staging_nbytes"
            )
        held = self._wait_for(nbytes, pages)
        try:
            yield self.memory[held.start : held.stop]
        finally:
            with self._changed:
                self._leases.remove(held)
                self._changed.notify_all()

    def look(self) -> None:
        """Makes calls that wait for memory look whether it is worth it."""
        with self._changed:
            self._changed.notify_all()

    def _wait_for(self, nbytes: int, pages: LentPages) -> _Lease:
        with self._changed:
            while (start := self._gap(nbytes)) is None:
                hang = [lease.pages.ended for lease in self._leases]
                if pages.ended or all(hang):
                    self._n_refused += 1
                    raise BackendTimeout(
                        f"no staging memory: {sum(hang)} calls that hang hold "
                        f"{self.memory.nbytes} bytes"
                    )
                self._changed.wait()
            held = _Lease(start, start + nbytes, pages)
            self._leases.append(held)
            self._leases.sort(key=lambda lease: lease.start)
            return held

    def _gap(self, nbytes: int) -> int | None:
        """Returns where the first free run of that length starts; None if there is none."""
        start = 0
        for lease in self._leases:
            if lease.start - start >= nbytes:
                return start
            start = lease.stop
        return start if self.memory.nbytes - start >= nbytes else None


@dataclass(frozen=True, slots=True)
class StagingAreas:
    """The memory through which reads and writes go: one area, or one for each.

    A transport that memory is registered with may write a page after its call has failed, when
    another call has that memory. Then reads have an area of their own, which nothing is stored
    from, and what they bring is verified again in the engine's memory.

    Attributes:
        reading: of reads.
        writing: of writes.
    """

    reading: Staging
    writing: Staging

    @classmethod
    def of(cls, backend: StorageBackend, nbytes: int) -> Self:
        """Reserves ``nbytes`` for each area, and registers them if ``backend`` wants that."""
        registers = backend.capability(RegistersMemory)
        if registers is None:
            both = Staging(nbytes)
            return cls(both, both)
        areas = cls(Staging(nbytes), Staging(nbytes))
        registers.register_memory([areas.reading.memory, areas.writing.memory])
        return areas

    @property
    def may_be_written_late(self) -> bool:
        """Whether a page of a read may change after it was verified."""
        return self.reading is not self.writing

    @property
    def n_refused(self) -> int:
        """Number of calls that found all memory held by calls that hang."""
        return sum(area.n_refused for area in {self.reading, self.writing})

    @property
    def held_nbytes(self) -> int:
        """Bytes that running calls hold."""
        return sum(area.held_nbytes for area in {self.reading, self.writing})

    def look(self) -> None:
        """Makes calls that wait for memory look whether it is worth it."""
        for area in {self.reading, self.writing}:
            area.look()


class StagedBackend(BackendWrapper):
    """Answers for each page, through staging pages. Its pages are ``LentPages``.

    A job is done in chunks. What has arrived is in the ``LentPages``, whatever came of the rest.
    """

    def __init__(self, inner: StorageBackend, areas: StagingAreas) -> None:
        """Wraps ``inner``.

        Args:
            inner: open; seals and checks pages.
            areas: lend memory to each call.
        """
        super().__init__(inner)
        self._areas = areas

    def exists_each(self, keys: Sequence[str]) -> Sequence[bool]:
        return self.inner.exists_each(keys)

    def get_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        lent = _lent(pages)
        wanted = range(len(keys))
        with self._areas.reading.lease(lent) as memory:
            for chunk in _chunks(wanted, lent.nbytes, memory.nbytes):
                staged = _cut(memory, [lent.nbytes[n] for n in chunk])
                mask = self.inner.get_each([keys[n] for n in chunk], staged)
                for n, page, arrived in zip(chunk, staged, mask, strict=True):
                    key = keys[n] if self._areas.may_be_written_late else None
                    if arrived and not lent.fill(n, page, key):
                        return lent.so_far()
        return lent.so_far()

    def set_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        lent = _lent(pages)
        missing = []
        for n, there in enumerate(self.inner.exists_each(keys)):  # cheaper than copying the page
            if there:
                lent.stored(n)
            else:
                missing.append(n)
        if not missing:
            return lent.so_far()
        with self._areas.writing.lease(lent) as memory:
            for chunk in _chunks(missing, lent.nbytes, memory.nbytes):
                staged = _cut(memory, [lent.nbytes[n] for n in chunk])
                for n, page in zip(chunk, staged, strict=True):
                    if not lent.copy(n, page[1]):
                        return lent.so_far()
                mask = self.inner.set_each([keys[n] for n in chunk], staged)
                for n, stored in zip(chunk, mask, strict=True):
                    if stored:
                        lent.stored(n)
        return lent.so_far()


def _lent(pages: Sequence[Page]) -> LentPages:
    assert isinstance(pages, LentPages)
    return pages


def _chunks(wanted: Sequence[int], sizes: Sequence[int], room: int) -> Iterator[list[int]]:
    """Yields the indexes ``wanted``, as many at a time as fit into ``room``."""
    chunk: list[int] = []
    used = 0
    for n in wanted:
        nbytes = room_for(sizes[n])
        if chunk and used + nbytes > room:
            yield chunk
            chunk, used = [], 0
        chunk.append(n)
        used += nbytes
    if chunk:
        yield chunk


def _cut(memory: memoryview, sizes: Sequence[int]) -> list[Page]:
    """Returns staging pages, one after the other: ``| header | payload, padded | header | …``."""
    pages: list[Page] = []
    start = 0
    for nbytes in sizes:
        payload = start + HEADER_NBYTES
        pages.append((memory[start:payload], memory[payload : payload + nbytes]))
        start += room_for(nbytes)
    return pages
