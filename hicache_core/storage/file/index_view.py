"""The index of the file backend for those who only read: each answer is a query, nothing is kept.

Opening it reads a page or two, whatever the number of objects, and it never writes: neither a lock
nor the log of the database.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from hicache_core.errors import BackendCorrupt, BackendUnavailable, UseAfterClose
from hicache_core.storage.base import NamespaceTotals
from hicache_core.storage.file.index import (
    APPLICATION_ID,
    FORMAT_VERSION,
    STORED,
    Row,
    index_database,
    row_of,
    totals_of,
)

_LISTED_AT_ONCE = 8192
_LAST = chr(0x10FFFF)
"""Sorts behind every character of a key."""


class IndexView:
    """One connection that only reads.

    While a process writes to the store, the connection follows its log. Otherwise SQLite takes the
    file as it is, which needs no right to write into its directory.

    Threads: every method may be called from any thread.
    """

    def __init__(self, path: Path, *, timeout_s: float) -> None:
        """Opens the index.

        Args:
            path: of the database file.
            timeout_s: how long to wait for locks of other processes, in seconds.

        Raises:
            BackendError: it cannot be opened, is damaged, or is of another application or version.
        """
        self.path = path
        self._database = index_database(path)
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._is_damaged = False
        self._identity = self._database.identity()
        with self._database.translated():
            self._connection = self._opened()

    def trouble(self) -> str:
        """Returns why it has become unusable while open; empty if it is usable."""
        if self._is_damaged:
            return f"index {self.path} is damaged"
        if self._database.identity() != self._identity:
            return f"index {self.path} was removed or replaced while in use"
        if self._is_still and self._log.exists():
            return f"a process began to write to {self.path}"
        return ""

    def close(self) -> None:
        """Closes the connection."""
        with self._lock:
            self._connection.close()

    def lookup(self, keys: Sequence[str]) -> tuple[int, list[Row | None]]:
        """As ``FileIndex.lookup``."""
        with self._reading() as connection:
            (version,) = connection.execute("PRAGMA data_version").fetchone()
            return version, [_row(connection, key) for key in keys]

    def unchanged_each(
        self, version: int, keys: Sequence[str], rows: Sequence[Row]
    ) -> Sequence[bool]:
        """As ``FileIndex.unchanged_each``.

        Args:
            version: of ``lookup``.
            keys: some of those of ``lookup``.
            rows: one for each of ``keys``.
        """
        now, found = self.lookup(keys)
        if now == version:
            return [True] * len(rows)
        return [one == other for one, other in zip(found, rows, strict=True)]

    def keys(self, prefix: str, older_than: float) -> Iterator[str]:
        """Yields the keys that start with ``prefix`` and were written after ``older_than``, sorted.

        Each few thousand are asked for when they are needed.
        """
        query = "SELECT key FROM extents WHERE key {} ? AND key < ? {} ORDER BY key LIMIT ?"
        is_young = "AND written_at > ?" if older_than > float("-inf") else "AND ? IS NOT NULL"
        after, operator = prefix, ">="
        while True:
            with self._reading() as connection:
                found = connection.execute(
                    query.format(operator, is_young),
                    (after, prefix + _LAST, older_than, _LISTED_AT_ONCE),
                ).fetchall()
            for (key,) in found:
                yield key
            if len(found) < _LISTED_AT_ONCE:
                return
            after, operator = found[-1][0], ">"

    def namespace_totals(self) -> dict[str, NamespaceTotals]:
        """As ``FileIndex.namespace_totals``."""
        with self._reading() as connection:
            return totals_of(
                connection.execute(
                    "SELECT key, nbytes, written_at FROM extents NOT INDEXED WHERE key IS NOT NULL"
                )
            )

    def held_nbytes(self) -> int:
        """Returns the bytes of all extents."""
        with self._reading() as connection:
            return _counter(connection, "held")

    def epoch(self) -> int:
        """Returns a number that increases when segments are removed."""
        with self._reading() as connection:
            return _counter(connection, "epoch")

    def segments(self) -> frozenset[int]:
        """Returns the numbers of the segments."""
        with self._reading() as connection:
            return frozenset(n for (n,) in connection.execute("SELECT segment FROM segments"))

    @property
    def _log(self) -> Path:
        return Path(f"{self.path}-wal")

    def _opened(self) -> sqlite3.Connection:
        """Connects, with the log if there is one: whoever has the index open for writing has."""
        self._is_still = not self._log.exists()
        try:
            return self._connected()
        except sqlite3.OperationalError:
            if self._is_still:
                raise
            # There is a log, and no right to lock it: what it holds stays unseen.
            self._is_still = True
            return self._connected()

    def _connected(self) -> sqlite3.Connection:
        how = "immutable=1" if self._is_still else "mode=ro"
        connection = sqlite3.connect(
            f"file:{quote(str(self.path))}?{how}",
            uri=True,
            timeout=self._timeout_s,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            self._check(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _check(self, connection: sqlite3.Connection) -> None:
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if application != APPLICATION_ID or not 0 < version <= FORMAT_VERSION:
            raise BackendUnavailable(
                f"index {self.path} is of application {application:#x}, version {version}; "
                f"expected {APPLICATION_ID:#x}, version {FORMAT_VERSION} or older"
            )
        if not _counter(connection, "complete"):
            raise BackendCorrupt(
                f"index {self.path} is not complete; open the store once for writing, which "
                "rebuilds it"
            )

    def _damaged(self) -> None:
        self._is_damaged = True

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """Yields the connection, in a transaction: all queries see the same moment."""
        with self._database.translated(self._damaged), self._lock:
            connection = self._connection
            try:
                connection.execute("BEGIN")
            except sqlite3.ProgrammingError:
                raise UseAfterClose(f"index {self.path} is not open") from None
            try:
                yield connection
            finally:
                with contextlib.suppress(sqlite3.Error):  # the first error says more
                    connection.execute("ROLLBACK")


def _row(connection: sqlite3.Connection, key: str) -> Row | None:
    return row_of(
        connection.execute(f"SELECT {STORED} FROM extents WHERE key = ?", (key,)).fetchone()
    )


def _counter(connection: sqlite3.Connection, name: str) -> int:
    found = connection.execute("SELECT value FROM counters WHERE name = ?", (name,)).fetchone()
    return int(found[0]) if found else 0
