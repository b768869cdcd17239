"""The USRBIO mode: reads and writes of a 3FS mount through rings in shared memory.

3FS moves bytes between its servers and an *iovec*, shared memory that it knows. Pages are in other
memory, so each page is copied once to or from the iovec. The copy of one piece overlaps with the
transfer of others.
"""

from __future__ import annotations

import errno
import importlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from hicache_core.errors import BackendTimeout, BackendUnavailable
from hicache_hf3fs.page_io import PageIO, Transfer

LIBRARY = "hf3fs_fuse.io"
_ALIGNMENT = 4096


def load_library() -> Any | None:
    """Returns 3FS's client; None if it is not installed."""
    try:
        return importlib.import_module(LIBRARY)
    except ImportError:
        return None


def mount_of(library: Any, path: Path) -> str | None:
    """Returns the 3FS mount that contains ``path``; None if there is none."""
    found = library.extract_mount_point(str(path))
    return str(found) if found else None


class _Piece(NamedTuple):
    """A part of a transfer that fits into a cell; ``start`` is its offset in the transfer."""

    transfer: int
    start: int
    nbytes: int


class _Visit(NamedTuple):
    """The callbacks of a call: ``arrived`` for reads, ``leaving`` for writes."""

    arrived: Callable[[int], bool] | None = None
    leaving: Callable[[int], None] | None = None

    @property
    def reads(self) -> bool:
        """Whether it reads."""
        return self.arrived is not None


class _Ring:
    """A ring for reads, one for writes, and their common memory, cut into equal cells."""

    def __init__(self, library: Any, mount: str, entries: int, iovec_nbytes: int) -> None:
        self.cell_nbytes = max(_ALIGNMENT, iovec_nbytes // entries // _ALIGNMENT * _ALIGNMENT)
        self._n_cells = entries
        self._memory = SharedMemory(create=True, size=self.cell_nbytes * entries)
        try:
            self._iovec = library.make_iovec(self._memory, mount)
            self._rings = {
                read: library.make_ioring(mount, entries, for_read=read) for read in (True, False)
            }
        except BaseException:
            self._iovec = None
            self._memory.close()
            self._memory.unlink()
            raise
        assert self._memory.buf is not None
        self._view = memoryview(self._memory.buf)

    def close(self) -> None:
        """Withdraws the memory from 3FS, then releases it."""
        self._rings.clear()
        self._iovec = None  # removes its link in the mount
        self._view.release()
        self._memory.close()
        self._memory.unlink()

    def run(
        self, transfers: Sequence[Transfer], visit: _Visit, *, deadline: float, timeout_s: float
    ) -> list[int]:
        """Moves all transfers; each cell moves one piece at a time.

        Raises:
            BackendTimeout: nothing was completed for ``timeout_s``; this object must not be used
                again, since 3FS may still write to its memory.
        """
        ring = self._rings[visit.reads]
        batch = _Batch(transfers, visit, self.cell_nbytes)
        free = list(range(self._n_cells))
        under_way: dict[int, _Piece] = {}
        while True:
            while free and time.monotonic() <= deadline and (piece := batch.next_piece()):
                cell = free.pop()
                self._prepare(ring, cell, piece, batch)
                under_way[cell] = piece
            if not under_way:
                break
            done = ring.submit().wait(min_results=1, timeout=timedelta(seconds=timeout_s))
            if not done:
                raise BackendTimeout(
                    f"3FS completed none of {len(under_way)} operations within {timeout_s} s"
                )
            for completion in done:  # in any order: userdata says which it is
                cell = int(completion.userdata)
                piece = under_way.pop(cell)
                batch.ended(piece, int(completion.result), self._memory_of(cell))
                free.append(cell)
        return batch.results_at_end(late=time.monotonic() > deadline)

    def _prepare(self, ring: Any, cell: int, piece: _Piece, batch: _Batch) -> None:
        batch.begins(piece, self._memory_of(cell))
        start = cell * self.cell_nbytes
        transfer = batch.transfers[piece.transfer]
        ring.prepare(
            self._iovec[start : start + piece.nbytes],
            batch.visit.reads,
            transfer.fd,
            transfer.offset + piece.start,
            userdata=cell,
        )

    def _memory_of(self, cell: int) -> memoryview:
        return self._view[cell * self.cell_nbytes : (cell + 1) * self.cell_nbytes]


class _Batch:
    """The transfers of one call, cut into pieces, with their results so far."""

    def __init__(self, transfers: Sequence[Transfer], visit: _Visit, cell_nbytes: int) -> None:
        self.transfers = transfers
        self.visit = visit
        self._results = [0] * len(transfers)
        self._pieces = (
            _Piece(n, start, min(cell_nbytes, transfer.nbytes - start))
            for n, transfer in enumerate(transfers)
            for start in range(0, transfer.nbytes, cell_nbytes)
        )

    def next_piece(self) -> _Piece | None:
        """Returns the next piece to move; None at the end."""
        return next(self._pieces, None)

    def begins(self, piece: _Piece, memory: memoryview) -> None:
        """Copies a piece to be written into its cell."""
        if self.visit.leaving is None:
            return
        if piece.start == 0:
            self.visit.leaving(piece.transfer)
        at = 0
        for part in self._parts(piece, piece.nbytes):
            memory[at : at + part.nbytes] = part
            at += part.nbytes

    def ended(self, piece: _Piece, result: int, memory: memoryview) -> None:
        """Copies a piece that was read from its cell; keeps the first error of each transfer."""
        n = piece.transfer
        if self._results[n] < 0:
            return
        if result < 0:
            self._results[n] = result
            return
        self._results[n] += result
        if self.visit.arrived is None:
            return
        at = 0
        for part in self._parts(piece, min(result, piece.nbytes)):
            part[:] = memory[at : at + part.nbytes]
            at += part.nbytes
        if self._results[n] == self.transfers[n].nbytes and not self.visit.arrived(n):
            self._results[n] = -errno.EBADMSG

    def results_at_end(self, *, late: bool) -> list[int]:
        """Returns the results; ``-ETIME`` for what was not started, or read too late."""
        never_begun = {piece.transfer for piece in self._pieces}
        if late and self.visit.reads:
            never_begun = set(range(len(self.transfers)))
        for n in never_begun:
            self._results[n] = -errno.ETIME
        return self._results

    def _parts(self, piece: _Piece, nbytes: int) -> Iterator[memoryview]:
        """Returns the page memory of a piece, or of its first ``nbytes``."""
        buffers = self.transfers[piece.transfer].buffers
        return _window(buffers, piece.start, piece.start + nbytes)


class UsrbioIO(PageIO):
    """Rings on one 3FS mount. A call uses one pair, and waits while all are in use."""

    mode: ClassVar[str] = "usrbio"

    def __init__(
        self,
        library: Any,
        mount: str,
        *,
        n_rings: int,
        entries: int,
        iovec_nbytes: int,
        timeout_s: float,
    ) -> None:
        """Makes no ring before ``open``.

        Args:
            library: 3FS's client, from ``load_library``.
            mount: mount point of 3FS.
            n_rings: pairs of rings, one for each call that runs at once.
            entries: reads or writes in flight in one ring.
            iovec_nbytes: shared memory of each pair of rings.
            timeout_s: limit in seconds for the next completion, and for a free pair.
        """
        self.mount = mount
        self.lost_rings = 0
        self._library = library
        self._n_rings = n_rings
        self._timeout_s = timeout_s
        self._new_ring: Callable[[], _Ring] = lambda: _Ring(library, mount, entries, iovec_nbytes)
        self._idle: queue.LifoQueue[_Ring] = queue.LifoQueue()
        self._lost: list[_Ring] = []
        self._lock = threading.Lock()
        self._n_live = n_rings  # idle or in use, or about to be made

    def open(self) -> None:
        try:
            for _ in range(self._n_rings):
                self._idle.put(self._new_ring())
        except OSError as exc:
            self.close()
            raise BackendUnavailable(
                f"3FS at {self.mount} gives no ring: {exc}; check the mount and lower numjobs, "
                "entries or iovec_nbytes"
            ) from exc

    def close(self) -> None:
        while not self._idle.empty():
            self._idle.get_nowait().close()
        for ring in self._lost:
            ring.close()
        self._lost.clear()

    def add_file(self, fd: int) -> None:
        try:
            self._library.register_fd(fd)
        except OSError as exc:
            raise BackendUnavailable(f"3FS at {self.mount} refuses a file: {exc}") from exc

    def remove_file(self, fd: int) -> None:
        self._library.deregister_fd(fd)

    def read(
        self, transfers: Sequence[Transfer], deadline: float, arrived: Callable[[int], bool]
    ) -> list[int]:
        # docstring inherited
        return self._run(transfers, deadline, _Visit(arrived=arrived))

    def write(
        self, transfers: Sequence[Transfer], deadline: float, leaving: Callable[[int], None]
    ) -> list[int]:
        # docstring inherited
        return self._run(transfers, deadline, _Visit(leaving=leaving))

    def _run(self, transfers: Sequence[Transfer], deadline: float, visit: _Visit) -> list[int]:
        ring = self._take_ring()
        try:
            results = ring.run(transfers, visit, deadline=deadline, timeout_s=self._timeout_s)
        except BaseException:
            # Its running transfers may still write to its memory, so that is never used again.
            with self._lock:
                self._lost.append(ring)
                self.lost_rings += 1
                self._n_live -= 1
            raise
        self._idle.put(ring)
        return results

    def _take_ring(self) -> _Ring:
        """Returns an idle ring, or a new one for a lost one, at most ``numjobs`` times."""
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            pass
        with self._lock:
            makes_one = self._n_live < self._n_rings >= len(self._lost)
            self._n_live += makes_one
        if makes_one:
            return self._replacement()
        try:
            return self._idle.get(timeout=self._timeout_s)
        except queue.Empty:
            raise BackendTimeout(
                f"no ring of 3FS at {self.mount} was free within {self._timeout_s} s; "
                f"{len(self._lost)} were lost to operations that never ended: raise numjobs, or "
                "check the mount and reopen"
            ) from None

    def _replacement(self) -> _Ring:
        try:
            return self._new_ring()
        except OSError as exc:
            with self._lock:
                self._n_live -= 1
            raise BackendUnavailable(f"3FS at {self.mount} gives no ring: {exc}") from exc


def _window(buffers: Sequence[memoryview], start: int, stop: int) -> Iterator[memoryview]:
    """Yields the parts of the buffers with bytes ``start`` to ``stop`` of all of them."""
    at = 0
    for buffer in buffers:
        end = at + buffer.nbytes
        if end > start and at < stop and buffer.nbytes:
            yield buffer[max(start - at, 0) : min(stop, end) - at]
        at = end
        if at >= stop:
            return
