"""SQLite as the index of a store: opening and checking the file, and translating errors."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Mapping
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

_REBUILT = "it is damaged and will be rebuilt when the backend is opened"
_ERRORS: dict[int, tuple[type[BackendError], str]] = {
    sqlite3.SQLITE_BUSY: (BackendTimeout, "another process held its lock for too long"),
    sqlite3.SQLITE_LOCKED: (BackendTimeout, "another process held its lock for too long"),
    sqlite3.SQLITE_FULL: (BackendFull, "its disk is full"),
    sqlite3.SQLITE_READONLY: (BackendDenied, "it is not writable; check its owner and the mount"),
    sqlite3.SQLITE_PERM: (BackendDenied, "opening it is not permitted; check its owner"),
    sqlite3.SQLITE_CANTOPEN: (BackendDenied, "it cannot be opened; check its directory and owner"),
    sqlite3.SQLITE_CORRUPT: (BackendCorrupt, _REBUILT),
    sqlite3.SQLITE_NOTADB: (BackendCorrupt, _REBUILT),
    # The statements are correct, so these errors mean that the tables are damaged.
    sqlite3.SQLITE_ERROR: (BackendCorrupt, _REBUILT),
    sqlite3.SQLITE_CONSTRAINT: (BackendCorrupt, _REBUILT),
    sqlite3.SQLITE_MISMATCH: (BackendCorrupt, _REBUILT),
    sqlite3.SQLITE_FORMAT: (BackendCorrupt, _REBUILT),
    sqlite3.SQLITE_TOOBIG: (BackendCorrupt, _REBUILT),
}
_LEAST_ROOM_NBYTES = 1 << 20
"""With less free space than this, SQLite's "disk I/O error" means that the disk is full."""
ROOM_NBYTES = 1 << 20
"""Disk space that an index reserves, so that it can still change when the disk is full."""
_LOG_ROOM_NBYTES = 256 << 10


class Database(NamedTuple):
    """A database file of a store.

    Only SQLite may open the file while it is in use: closing any other descriptor of it would
    release the locks that SQLite holds for this process.

    Attributes:
        path: the file.
        what: its name in error messages: ``index``, ``metadata``.
        application_id: identifies files of this store.
        version: of its tables.
        schema: statements that create them.
        faults: possible faults of the tables, each with a query that returns a row if it is there.
        optional: further tables that may exist.
        version_again: a query for a second copy of the version. If the two copies differ, one of
            them is damaged; if they are equal, the file has that version.
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
        """Returns a new connection, which any one thread may use at a time.

        A killed process never loses a transaction. A power cut may, unless ``durable``; then the
        store must be able to rebuild the file.

        Args:
            timeout_s: how long to wait for locks of other connections.
            durable: every transaction reaches the disk before it ends.
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
        """Creates the tables in an empty file."""
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(
            f"BEGIN IMMEDIATE; PRAGMA application_id = {self.application_id}; "
            f"PRAGMA user_version = {self.version}; {self.schema} COMMIT;"
        )

    def check(self, connection: sqlite3.Connection, *, whole: bool = True) -> None:
        """Checks that the file belongs to the store and is intact; reads every row.

        Args:
            connection: to the file.
            whole: whether to compare rows with each other and with their indexes, too. That takes
                ten seconds a million rows.

        Raises:
            BackendUnavailable: it is a file of another application or version.
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
                raise BackendCorrupt(f"{self.what} {self.path} is damaged: its header is wrong")
            raise BackendUnavailable(
                f"{self.what} {self.path} is of application {application:#x}, version {version}; "
                f"expected {self.application_id:#x}, version {self.version}; use another path"
            )
        if not is_ours:
            raise BackendCorrupt(f"{self.what} {self.path} is damaged: its tables are wrong")
        (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
        if mode != "wal":
            raise BackendCorrupt(f"{self.what} {self.path} is damaged: its journal mode is {mode}")
        kind = "integrity_check" if whole else "quick_check"
        (verdict,) = connection.execute(f"PRAGMA {kind}(1)").fetchone()
        if verdict != "ok":
            raise BackendCorrupt(f"{self.what} {self.path} is damaged: {verdict}")
        if not whole:
            return
        for fault, query in self.faults.items():
            if connection.execute(f"{query} LIMIT 1").fetchone() is not None:
                raise BackendCorrupt(f"{self.what} {self.path} is damaged: {fault}")

    def identity(self) -> tuple[int, int] | None:
        """Returns device and inode of the file; None if it does not exist."""
        try:
            status = os.stat(self.path)
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def translated(
        self, damaged: Callable[[], None] = lambda: None
    ) -> contextlib.AbstractContextManager[None]:
        """Translates errors of SQLite to ``BackendError``; calls ``damaged`` if the file is.

        What it returns may be entered any number of times, by several threads at once.
        """
        return _Translated(self, damaged)

    def _raise_translated(self, error: BaseException, damaged: Callable[[], None]) -> None:
        """Raises the ``BackendError`` for an error of SQLite; returns for any other error.

        Args:
            error: was raised by a call of SQLite.
            damaged: called if the file is damaged.
        """
        if isinstance(error, BackendCorrupt):
            damaged()
        elif isinstance(error, UnicodeDecodeError):  # text in the file, or in SQLite's message
            damaged()
            raise BackendCorrupt(f"{self.what} {self.path}: {error.reason}: {_REBUILT}") from error
        elif isinstance(error, sqlite3.Error):
            kind, advice = self._meaning(error)
            if kind is BackendCorrupt:
                damaged()
            raise kind(f"{self.what} {self.path}: {error}: {advice}") from error

    def _meaning(self, exc: sqlite3.Error) -> tuple[type[BackendError], str]:
        """Returns the class of an error, and what to do about it."""
        code = getattr(exc, "sqlite_errorcode", None)
        if code is None and isinstance(exc, (sqlite3.OperationalError, sqlite3.InternalError)):
            return BackendCorrupt, _REBUILT  # raised by the sqlite3 module, not by SQLite
        code = code or 0
        if code == sqlite3.SQLITE_IOERR_SHORT_READ:
            return BackendCorrupt, _REBUILT
        if code == sqlite3.SQLITE_READONLY and os.access(self.path, os.W_OK):
            return BackendCorrupt, _REBUILT  # only its header says read-only
        if code & 0xFF == sqlite3.SQLITE_IOERR and self._is_disk_full():
            return _ERRORS[sqlite3.SQLITE_FULL]
        return _ERRORS.get(code & 0xFF, (BackendUnavailable, "see the message before this"))

    def _is_disk_full(self) -> bool:
        try:
            status = os.statvfs(self.path.parent)
        except OSError:
            return False
        return status.f_bavail * status.f_frsize < _LEAST_ROOM_NBYTES


class _Translated:
    """See ``Database.translated``. A generator would cost a read a microsecond each time."""

    __slots__ = ("_damaged", "_database")

    def __init__(self, database: Database, damaged: Callable[[], None]) -> None:
        self._database = database
        self._damaged = damaged

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            self._database._raise_translated(error, self._damaged)


def room_nbytes(connection: sqlite3.Connection) -> int:
    """Returns how many bytes to write and delete, so that file and log have reserved space."""
    (n_pages,) = connection.execute("PRAGMA freelist_count").fetchone()
    (page_nbytes,) = connection.execute("PRAGMA page_size").fetchone()
    return _LOG_ROOM_NBYTES if n_pages * page_nbytes >= ROOM_NBYTES else ROOM_NBYTES


def is_empty(connection: sqlite3.Connection) -> bool:
    """Returns whether the database has no tables."""
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
