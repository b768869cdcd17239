"""The directory of a file backend: opening, its users, cleaning up after dead ones, rebuilding."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from hicache_core.errors import (
    BackendCorrupt,
    BackendDenied,
    BackendError,
    BackendFull,
    BackendTimeout,
    BackendUnavailable,
)
from hicache_core.storage.base import Finding
from hicache_core.storage.file.extents import drop, remove_empty
from hicache_core.storage.file.index import FileIndex, move
from hicache_core.storage.file.records import BLOCK_NBYTES, Record, RecordStore
from hicache_core.storage.file.reserve import give_reserve, give_room, take_reserve
from hicache_core.storage.sqlite import ROOM_NBYTES

logger = logging.getLogger(__name__)

_LOCK_POLL_S = 0.02
_LET_GO_S = 2.0
"""How long to wait for other users of a damaged index, who notice it with their next call."""

T = TypeVar("T")


@contextlib.contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Translates an ``OSError`` to the ``BackendError`` that fits."""
    try:
        yield
    except BackendError:
        raise
    except OSError as exc:
        raise _backend_error(path, exc) from exc


def _backend_error(path: Path, exc: OSError) -> BackendError:
    text = f"{path}: {exc.strerror or exc}"
    match exc:
        case PermissionError():
            return BackendDenied(f"{text}; give this user read and write access")
        case FileNotFoundError():
            return BackendUnavailable(f"{text}; create the parent directory first")
        case NotADirectoryError() | FileExistsError():
            return BackendUnavailable(f"{text}; use the path of a directory")
    match exc.errno:
        case errno.EROFS:
            return BackendDenied(f"{text}; use a writable path")
        case errno.ENOSPC | errno.EDQUOT:
            return BackendFull(f"{text}; free some space or lower max_nbytes")
    return BackendUnavailable(text)


class FileDirectory:
    """The files under ``path``, and this process as one of their users.

        path/index.sqlite         where each object is (with SQLite's -wal and -shm)
        path/segments/*.seg       the objects
        path/owners/*.lock        one for each open backend, locked while it is open
        path/open.lock            held while a process opens the directory
        path/reserve              space for opening the index when the disk is full

    Files with other names are left alone, and so are foreign segment files that are not empty.
    """

    def __init__(self, path: Path, *, timeout_s: float, durable: bool) -> None:
        """Opens nothing; ``open`` does.

        Args:
            path: of the directory.
            timeout_s: how long to wait for locks of other processes, in seconds.
            durable: every transaction and new file reaches the disk before it is used.
        """
        self.path = path
        self._timeout_s = timeout_s
        self.store = RecordStore(path / "segments", durable=durable)
        self.index = FileIndex(path / "index.sqlite", timeout_s=timeout_s, durable=durable)
        self.owner = 0
        self.rebuilt = False
        self._owner_fd = -1
        self._segments = self._segments_identity()
        self._lost = ""

    def open(self, *, creates: bool = True) -> None:
        """Creates or opens the directory, registers this process, cleans up after dead ones.

        Args:
            creates: whether to create a store where there is none.

        Raises:
            BackendError: the message says what to do.
        """
        segments = self.path / "segments"
        if not creates and not (self.index.path.exists() or segments.is_dir()):
            raise BackendUnavailable(f"{self.path} holds no store of the file backend; check path")
        with os_errors(self.path):
            self.path.mkdir(exist_ok=True)
            segments.mkdir(exist_ok=True)
            (self.path / "owners").mkdir(exist_ok=True)
            self._segments = self._segments_identity()
            with self._opening():
                try:
                    self._enter()
                except BackendFull:
                    self._enter_with_room()

    def trouble(self) -> str:
        """Returns why these files are no longer usable; empty if they are. See ``Openable``."""
        if self._segments_identity() != self._segments:
            return f"{self.path / 'segments'} was removed or replaced while in use"
        return self._lost or self.index.trouble()

    def check_written(self, segments: set[int]) -> None:
        """Raises ``BackendUnavailable`` if the file of one of ``segments`` was removed."""
        if lost := self.store.removed(segments):
            self._lost = f"segment {min(lost):08x} of {self.path} was removed while in use"
            raise BackendUnavailable(f"{self._lost}; the next call reopens the store")

    def with_room(self, do: Callable[[], T]) -> T:
        """Returns ``do()``; on a full disk frees the log of the index and calls ``do`` again."""
        try:
            return do()
        except BackendFull:
            self.index.restart_log()
            return do()

    def close(self) -> None:
        """Releases the claims of this process, and closes everything."""
        try:
            if not self.trouble():
                with self.index.transaction() as connection:
                    self._forget(connection, self.owner)
        except BackendError as exc:  # the next process that opens the directory does it
            logger.warning("%s: closed without releasing its claims: %s", self.path, exc)
        finally:
            self._leave()

    def findings(self, max_nbytes: int) -> list[Finding]:
        """Returns findings on the directory, for a limit of ``max_nbytes``."""
        held, room = self.index.totals()[2], self.store.free_nbytes()
        found = [Finding("ok", "directory", f"{self.path} can be read and written")]
        if held + room < max_nbytes:
            message = (
                f"max_nbytes is {max_nbytes}, but the store holds {held} bytes and the disk has "
                f"only {room} more: lower max_nbytes or free some space"
            )
            found.append(Finding("warning", "room", message))
        else:
            message = f"{held} of {max_nbytes} bytes held, {room} free on the disk"
            found.append(Finding("ok", "room", message))
        if self.rebuilt:
            message = "was lost or damaged, and was rebuilt"
            found.append(Finding("warning", "index", message))
        if not self.store.can_punch():
            message = (
                "cannot free parts of a file: if the object size changes, the store may use more "
                "than max_nbytes; clear the directory then"
            )
            found.append(Finding("warning", "file system", message))
        return found

    def _enter(self) -> None:
        """Connects and registers; on failure nothing stays open."""
        self._connect()
        try:
            with self.index.transaction() as connection:
                self._register(connection)
                self._clean_up(connection)
            if self.store.free_nbytes() > 4 * ROOM_NBYTES:
                self.index.take_room()
            take_reserve(self.path, self.store)
        except BaseException:
            self._leave()
            raise

    def _enter_with_room(self) -> None:
        """As ``_enter`` on a full disk: gives up the reserve, then objects."""
        if give_reserve(self.path):
            with contextlib.suppress(BackendFull):
                self._enter()
                return
        if not self._is_alone():
            raise BackendFull(f"{self.path}: its disk is full; free some space")
        self._give_room()  # no other process reads the objects that are removed
        self._enter()

    def _leave(self) -> None:
        """Closes everything; the lock last, so that nobody creates another index before."""
        self.index.discard()
        self.index.close()
        self.store.close()
        if self._owner_fd >= 0:
            path = self._lock_path(self.owner)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), os.fstat(self._owner_fd)):
                    path.unlink()
            os.close(self._owner_fd)
            self._owner_fd = -1

    def _segments_identity(self) -> tuple[int, int] | None:
        try:
            status = (self.path / "segments").stat()
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def _give_room(self) -> None:
        """Frees space on a full disk to open the index. There is no other user."""
        given = give_room(self.index.path, self.store)
        if not given:
            raise BackendFull(
                f"{self.path}: the disk is full and the store is empty; free some space"
            )
        logger.warning("%s: the disk is full; removed %d objects", self.path, len(given))
        self._connect()
        try:
            with self.index.transaction() as connection:
                drop(connection, given)
                remove_empty(connection, given)
        finally:
            self.index.close()

    @contextlib.contextmanager
    def _opening(self) -> Iterator[None]:
        """Lets one process at a time open the directory; waits at most ``timeout_s``."""
        fd = os.open(self.path / "open.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            deadline = time.monotonic() + self._timeout_s
            while not _try_lock(fd):
                if time.monotonic() > deadline:
                    raise BackendTimeout(
                        f"{self.path}: another process has been opening it for "
                        f"{self._timeout_s:g} s; find out which one holds open.lock"
                    )
                time.sleep(_LOCK_POLL_S)
            yield
        finally:
            os.close(fd)

    def _connect(self) -> None:
        """Connects to the index; rebuilds it from the segments if it is lost or damaged."""
        if not self.index.path.exists() or self.index.path.stat().st_size == 0:
            # Others must not use it, not even if it is empty: SQLite finds -wal by its name.
            self._check_alone()
            self._remove_index()
        try:
            self.index.connect()
        except BackendCorrupt as exc:
            logger.warning("%s; rebuilding it from the segment files", exc)
            self.index.path.unlink(missing_ok=True)  # so that others notice
            self._check_alone()
            self._remove_index()
            self.index.connect()
        try:
            self._complete()
        except BaseException:
            self.index.close()
            raise

    def _complete(self) -> None:
        """Fills an index that is new, or whose rebuilding was interrupted."""
        with self.index.transaction() as connection:
            (complete,) = connection.execute(
                "SELECT value FROM counters WHERE name = 'complete'"
            ).fetchone()
            if complete:
                return
            move(connection, "complete")
            if self.store.segments():
                n_objects = self._rebuild(connection)
                self.rebuilt = True
                logger.warning("%s: index rebuilt, %d objects found", self.path, n_objects)

    def _remove_index(self) -> None:
        for suffix in ("", "-wal", "-shm"):
            Path(f"{self.index.path}{suffix}").unlink(missing_ok=True)

    def _check_alone(self) -> None:
        """Waits briefly for other users of a lost index; raises while there are any."""
        deadline = time.monotonic() + min(_LET_GO_S, self._timeout_s)
        while not self._is_alone():
            if time.monotonic() > deadline:
                raise BackendCorrupt(
                    f"index {self.index.path} is lost or damaged while other processes use it; it "
                    "can be rebuilt after their next call, or when they have ended"
                )
            time.sleep(_LOCK_POLL_S)

    def _is_alone(self) -> bool:
        """Returns whether there is no other user; removes locks of dead ones. Needs open.lock."""
        alone = True
        for lock in (self.path / "owners").glob("*.lock"):
            if self._is_dead(lock):
                lock.unlink(missing_ok=True)
            else:
                alone = False
        return alone

    @staticmethod
    def _is_dead(lock: Path) -> bool:
        """Returns whether nobody holds ``lock``; remains true while open.lock is held."""
        try:
            fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            return _try_lock(fd)
        finally:
            os.close(fd)

    def _lock_path(self, owner: int) -> Path:
        return self.path / "owners" / f"{owner}.lock"

    def _register(self, connection: sqlite3.Connection) -> None:
        self.owner = move(connection, "owner")
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._owner_fd = os.open(self._lock_path(self.owner), flags, 0o644)
        if not _try_lock(self._owner_fd):
            raise BackendCorrupt(f"{self._lock_path(self.owner)} is held by another process")
        connection.execute("INSERT INTO owners VALUES (?)", (self.owner,))

    def _clean_up(self, connection: sqlite3.Connection) -> None:
        """Releases the claims of dead processes and removes the files they left."""
        owners = [owner for (owner,) in connection.execute("SELECT owner FROM owners")]
        dead = [
            owner
            for owner in owners
            if owner != self.owner and self._is_dead(self._lock_path(owner))
        ]
        for owner in dead:
            self._forget(connection, owner)
        alive = {self._lock_path(owner).name for owner in owners if owner not in dead}
        for lock in (self.path / "owners").glob("*.lock"):
            if lock.name not in alive:
                lock.unlink(missing_ok=True)
        known = {segment for (segment,) in connection.execute("SELECT segment FROM segments")}
        present = set(self.store.segments())
        for segment in present - known:
            self.store.unlink(segment)
        for segment in known - present:
            self._forget_segment(connection, segment)
        if dead or self.rebuilt:
            self._punch_gaps(connection)

    def _forget(self, connection: sqlite3.Connection, owner: int) -> None:
        seq = move(connection, "seq")
        connection.execute("UPDATE extents SET owner = NULL, seq = ? WHERE owner = ?", (seq, owner))
        connection.execute("DELETE FROM owners WHERE owner = ?", (owner,))

    def _forget_segment(self, connection: sqlite3.Connection, segment: int) -> None:
        """Removes the rows of a segment whose file was removed."""
        (nbytes,) = connection.execute(
            "SELECT coalesce(sum(capacity), 0) FROM extents WHERE segment = ?", (segment,)
        ).fetchone()
        connection.execute("DELETE FROM extents WHERE segment = ?", (segment,))
        connection.execute("DELETE FROM segments WHERE segment = ?", (segment,))
        move(connection, "held", -nbytes)
        move(connection, "epoch")
        logger.warning("%s: segment %08x was removed, and its objects with it", self.path, segment)

    def _punch_gaps(self, connection: sqlite3.Connection) -> None:
        """Frees the space between extents, which can no longer be claimed."""
        for segment, end in connection.execute("SELECT segment, end FROM segments").fetchall():
            at = BLOCK_NBYTES
            for offset, capacity in [
                *connection.execute(
                    "SELECT offset, capacity FROM extents WHERE segment = ? ORDER BY offset",
                    (segment,),
                ),
                (end, 0),
            ]:
                if offset > at:
                    self.store.punch(segment, at, offset - at)
                at = offset + capacity

    def _rebuild(self, connection: sqlite3.Connection) -> int:
        """Fills an empty index from the headers of the records; returns the number of objects."""
        newest: dict[str, Record] = {}
        generation = last = 0
        for segment in self.store.segments():
            last = max(last, segment)
            end = self.store.end_of(segment)
            connection.execute("INSERT INTO segments VALUES (?, ?)", (segment, end))
            for record in self.store.scan(segment):
                generation = max(generation, record.extent.generation)
                before = newest.get(record.key)
                if before is None or before.extent.generation < record.extent.generation:
                    newest[record.key] = record
        seq = move(connection, "seq", generation + 1)
        move(connection, "segment", last)
        move(connection, "held", sum(r.extent.capacity for r in newest.values()))
        connection.executemany(
            "INSERT INTO extents (segment, offset, capacity, generation, seq, key, nbytes, "
            "written_at, used_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                (*r.extent[1:], seq, r.key, r.nbytes, r.written_at, r.written_at)
                for r in newest.values()
            ),
        )
        connection.execute(
            "DELETE FROM segments WHERE segment NOT IN (SELECT segment FROM extents)"
        )
        return len(newest)


def _try_lock(fd: int) -> bool:
    """Locks the whole file of ``fd``; returns False if another process has locked it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
