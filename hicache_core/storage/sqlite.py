"""SQLite as the index of a store: how it is opened and checked, and what its errors mean."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from hicache_core.errors import (
    BackendCorrupt,
    BackendDenied,
    BackendError,
    BackendFull,
    BackendTimeout,
    BackendUnavailable,
)

_REBUILT = "it is damaged, and is built anew when the backend is opened"
_ERRORS: dict[int, tuple[type[BackendError], str]] = {
    sqlite3.SQLITE_BUSY: (BackendTimeout, "another process held its lock for too long"),
    sqlite3.SQLITE_LOCKED: (BackendTimeout, "another process held its lock for too long"),
    sqlite3.SQLITE_FULL: (BackendFull, "its disk is full"),
    sqlite3.SQLITE_READONLY: (BackendDenied, "it may not be written; check owner and mount"),
    sqlite3.SQLITE_PERM: (BackendDenied, "it may not be opened; check its owner"),
    sqlite3.SQLITE_CANTOPEN: (BackendDenied, "it cannot be opened; check directory and owner"),
    sqlite3.SQLITE_CORRUPT: (BackendCorrupt, _REBUILT),
    sqlite3.SQLITE_NOTADB: (BackendCorrupt, _REBUILT),
    # The statements are ours, so what follows comes of tables that are not as they were made.
    sqlite3.SQLITE_ERROR: (BackendCorrupt, _REBUILT),
    sqlite3.SQLITE_CONSTRAINT: (BackendCorrupt, _REBUILT),
    sqlite3.SQLITE_MISMATCH: (BackendCorrupt, _REBUILT),
    sqlite3.SQLITE_FORMAT: (BackendCorrupt, _REBUILT),
    sqlite3.SQLITE_TOOBIG: (BackendCorrupt, _REBUILT),
}
_LEAST_ROOM_NBYTES = 1 << 20
"""With less than this on its disk, SQLite's "disk I/O error" means that the disk is full."""
ROOM_NBYTES = 1 << 20
"""What an index takes of the disk ahead, so that a change needs no room when the disk got full."""
_LOG_ROOM_NBYTES = 256 << 10


class Database(NamedTuple):
    """A database file of a store.

    Nothing but SQLite may open the file while it is in use: to close any other descriptor of it
    would end the locks that SQLite holds for this process.

    Attributes:
        path: the file.
        what: what errors call it: ``index``, ``metadata``.
        application_id: marks the file as the store's own.
        version: of its tables.
        schema: statements that make them.
        faults: what may be wrong in the tables, and a query that then finds a row.
        optional: tables that may be there too.
        version_again: a query for the version, which stands in a second place. Where the two
            differ one of them is damaged; where they are equal, the file is of that version.
    """

    path: Path
    what: str
    application_id: int
    version: int
    schema: str
    faults: Mapping[str, str] = MappingProxyType({})
    optional: frozenset[str] = frozenset()
    version_again: str = ""

    def connect(self, timeout_s: float, *, durable: bool = False) -> sqlite3.Connection:
        """One more connection; any thread may use it, one at a time.

        A killed process loses nothing either way. Unless ``durable``, a power cut may, so the store
        must be able to make the file anew.
        """
        connection = sqlite3.connect(
            self.path,
            timeout=timeout_s,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=64,
        )
        connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'OFF'}")
        return connection

    def make(self, connection: sqlite3.Connection) -> None:
        """Makes the tables of an empty file."""
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(
            f"BEGIN IMMEDIATE; PRAGMA application_id = {self.application_id}; "
            f"PRAGMA user_version = {self.version}; {self.schema} COMMIT;"
        )

    def check(self, connection: sqlite3.Connection) -> None:
        """Looks whether it is the store's own and whole, row by row.

        Raises:
            BackendUnavailable: it is something else, or of another version.
            BackendCorrupt: it is damaged.
        """
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        found = _columns(connection)
        is_ours = {t: c for t, c in found.items() if t not in self.optional} == _made_by(
            self.schema
        )
        if (application, version) != (self.application_id, self.version):
            again = (
                connection.execute(self.version_again or "SELECT 0").fetchone() if is_ours else 0
            )
            if is_ours and (version == self.version or again == (self.version,)):
                raise BackendCorrupt(f"{self.what} {self.path} is damaged: its header is another")
            raise BackendUnavailable(
                f"{self.what} {self.path} is of application {application:#x}, version {version}; "
                f"expected {self.application_id:#x}, version {self.version}; give another path"
            )
        if not is_ours:
            raise BackendCorrupt(f"{self.what} {self.path} is damaged: its tables are others")
        (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
        if mode != "wal":
            raise BackendCorrupt(f"{self.what} {self.path} is damaged: its mode is {mode}")
        (verdict,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
        if verdict != "ok":
            raise BackendCorrupt(f"{self.what} {self.path} is damaged: {verdict}")
        for fault, query in self.faults.items():
            if connection.execute(f"{query} LIMIT 1").fetchone() is not None:
                raise BackendCorrupt(f"{self.what} {self.path} is damaged: {fault}")

    def identity(self) -> tuple[int, int] | None:
        """Device and inode of the file; None if there is none."""
        try:
            status = os.stat(self.path)
        except OSError:
            return None
        return status.st_dev, status.st_ino

    @contextlib.contextmanager
    def translated(self, damaged: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Raises the ``BackendError`` that fits what SQLite raises; ``damaged`` hears of damage."""
        try:
            yield
        except BackendCorrupt:
            damaged()
            raise
        except UnicodeDecodeError as exc:  # of a text in the file, or of SQLite's words about it
            damaged()
            raise BackendCorrupt(f"{self.what} {self.path}: {exc.reason}: {_REBUILT}") from exc
        except sqlite3.Error as exc:
            kind, advice = self._meaning(exc)
            if kind is BackendCorrupt:
                damaged()
            raise kind(f"{self.what} {self.path}: {exc}: {advice}") from exc

    def _meaning(self, exc: sqlite3.Error) -> tuple[type[BackendError], str]:
        """The kind of error, and what to do."""
        code = getattr(exc, "sqlite_errorcode", None)
        if code is None and isinstance(exc, (sqlite3.OperationalError, sqlite3.InternalError)):
            return BackendCorrupt, _REBUILT  # Python could not make sense of what it was given
        code = code or 0
        if code == sqlite3.SQLITE_IOERR_SHORT_READ:
            return BackendCorrupt, _REBUILT
        if code == sqlite3.SQLITE_READONLY and os.access(self.path, os.W_OK):
            return BackendCorrupt, _REBUILT  # its header says that nobody of today may write it
        if code & 0xFF == sqlite3.SQLITE_IOERR and self._is_disk_full():
            return _ERRORS[sqlite3.SQLITE_FULL]
        return _ERRORS.get(code & 0xFF, (BackendUnavailable, "see the text before"))

    def _is_disk_full(self) -> bool:
        try:
            status = os.statvfs(self.path.parent)
        except OSError:
            return False
        return status.f_bavail * status.f_frsize < _LEAST_ROOM_NBYTES


def room_nbytes(connection: sqlite3.Connection) -> int:
    """How much to write and delete again, so that file and log have room of their own."""
    (n_pages,) = connection.execute("PRAGMA freelist_count").fetchone()
    (page_nbytes,) = connection.execute("PRAGMA page_size").fetchone()
    return _LOG_ROOM_NBYTES if n_pages * page_nbytes >= ROOM_NBYTES else ROOM_NBYTES


def is_empty(connection: sqlite3.Connection) -> bool:
    """Whether it has no tables."""
    (n_tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    return bool(n_tables == 0)


@cache
def _made_by(schema: str) -> dict[str, list[str]]:
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(schema)
        return _columns(connection)


def _columns(connection: sqlite3.Connection) -> dict[str, list[str]]:
    """The columns of each table."""
    names = [
        name
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
    ]
    query = "SELECT name FROM pragma_table_info(?) ORDER BY cid"
    return {name: [row[0] for row in connection.execute(query, (name,))] for name in names}
