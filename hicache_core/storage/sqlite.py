"""SQLite as the index of a store: how it is opened and checked, and what its errors mean."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from hicache_core.errors import (
    BackendCorrupt,
    BackendDenied,
    BackendError,
    BackendFull,
    BackendTimeout,
    BackendUnavailable,
)

_ERRORS: dict[int, tuple[type[BackendError], str]] = {
    sqlite3.SQLITE_BUSY: (BackendTimeout, "another process held its lock for too long"),
    sqlite3.SQLITE_LOCKED: (BackendTimeout, "another process held its lock for too long"),
    sqlite3.SQLITE_FULL: (BackendFull, "its disk is full"),
    sqlite3.SQLITE_READONLY: (BackendDenied, "it may not be written; check owner and mount"),
    sqlite3.SQLITE_PERM: (BackendDenied, "it may not be opened; check its owner"),
    sqlite3.SQLITE_CANTOPEN: (BackendDenied, "it cannot be opened; check directory and owner"),
    sqlite3.SQLITE_CORRUPT: (BackendCorrupt, "it is damaged; reopen the backend to rebuild it"),
    sqlite3.SQLITE_NOTADB: (BackendCorrupt, "it is damaged; reopen the backend to rebuild it"),
}


class Database(NamedTuple):
    """A database file of a store.

    Attributes:
        path: the file.
        what: what errors call it: ``index``, ``metadata``.
        application_id: marks the file as the store's own.
        version: of its tables.
        schema: statements that make them.
    """

    path: Path
    what: str
    application_id: int
    version: int
    schema: str

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
        """Looks whether it is the store's own and whole.

        Raises:
            BackendUnavailable: it is something else, or of another version.
            BackendCorrupt: it is damaged.
        """
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if (application, version) != (self.application_id, self.version):
            raise BackendUnavailable(
                f"{self.what} {self.path} is of application {application:#x}, version {version}; "
                f"expected {self.application_id:#x}, version {self.version}; give another path"
            )
        (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise BackendCorrupt(f"{self.what} {self.path} is damaged: {verdict}")

    @contextlib.contextmanager
    def translated(self) -> Iterator[None]:
        """Raises the ``BackendError`` that fits what SQLite raises."""
        try:
            yield
        except sqlite3.Error as exc:
            code = getattr(exc, "sqlite_errorcode", 0) & 0xFF
            kind, advice = _ERRORS.get(code, (BackendUnavailable, "see the text before"))
            raise kind(f"{self.what} {self.path}: {exc}: {advice}") from exc


def is_empty(connection: sqlite3.Connection) -> bool:
    """Whether it has no tables."""
    (n_tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    return bool(n_tables == 0)
