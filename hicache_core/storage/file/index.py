"""The index of the file backend: an SQLite database, and a copy of it in this process.

Each range of a segment that is or was in use is a row of ``extents``:

    key set                 published: the object can be read
    key NULL, owner set     claimed: that process is writing there
    key NULL, owner NULL    free: any process may claim it

Each change of a row gets the next ``seq``. So a process learns about changes by reading the rows
above the last ``seq`` that it has seen. Rows are deleted only when disk space is freed; then
``epoch`` increases and every process reads the whole table again.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

from hicache_core.errors import BackendCorrupt, BackendError, BackendUnavailable, IntegrityError
from hicache_core.storage.base import NamespaceTotals, namespace_of
from hicache_core.storage.file.index_faults import FAULTS
from hicache_core.storage.file.late_check import LateCheck
from hicache_core.storage.file.records import BLOCK_NBYTES, OVERHEAD_NBYTES, Extent
from hicache_core.storage.segments import nbytes_of
from hicache_core.storage.sqlite import Database, is_empty, room_nbytes
from hicache_core.types import Page

APPLICATION_ID = 0x48694361  # "HiCa"
FORMAT_VERSION = 2

_UPGRADES = {1: "ALTER TABLE extents ADD COLUMN pinned_until REAL"}
"""Statements that upgrade a version to the next one; objects do not move."""

_SCHEMA = f"""
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO counters VALUES ('seq', 0), ('epoch', 0), ('segment', 0), ('owner', 0), ('held', 0),
    ('format', {FORMAT_VERSION}), ('complete', 0);  -- 1 as soon as it speaks of all segment files
CREATE TABLE segments (segment INTEGER PRIMARY KEY, end INTEGER NOT NULL);
CREATE TABLE owners (owner INTEGER PRIMARY KEY);
CREATE TABLE extents (
    extent_id INTEGER PRIMARY KEY,
    segment INTEGER NOT NULL,
    offset INTEGER NOT NULL,
    capacity INTEGER NOT NULL,
    generation INTEGER NOT NULL,
    seq INTEGER NOT NULL,
    owner INTEGER,
    key TEXT,
    nbytes INTEGER,
    written_at REAL,
    used_at REAL,
    pinned_until REAL
);
CREATE UNIQUE INDEX by_key ON extents (key) WHERE key IS NOT NULL;
CREATE INDEX by_use ON extents (used_at) WHERE key IS NOT NULL;
CREATE INDEX by_capacity ON extents (capacity) WHERE key IS NULL AND owner IS NULL;
CREATE INDEX by_owner ON extents (owner) WHERE owner IS NOT NULL;
CREATE UNIQUE INDEX by_place ON extents (segment, offset);
CREATE INDEX by_seq ON extents (seq);
"""


CHECKED_AT_ONCE_NBYTES = 16 << 20
"""Of a larger index the rows are checked against each other after it was opened."""

STORED = "key, extent_id, segment, offset, capacity, generation, nbytes, written_at"
"""The columns of a published object."""
_Stored: TypeAlias = tuple[str, int, int, int, int, int, int, float]
"""A published object, as SQLite returns it. The garbage collector does not follow plain tuples of
numbers and texts, so a million of them costs it nothing."""
_EXTENT_ID: Final = 1
_OFFSET: Final = 3
_CAPACITY: Final = 4
_NBYTES: Final = 6
_WRITTEN_AT: Final = 7


class Row(NamedTuple):
    """A published object."""

    extent: Extent
    nbytes: int
    written_at: float


def index_database(path: Path) -> Database:
    """Returns the index as a database file."""
    return Database(
        *(path, "index", APPLICATION_ID, FORMAT_VERSION, _SCHEMA, FAULTS),
        version_again="SELECT value FROM counters WHERE name = 'format'",
    )


def row_of(stored: _Stored | None) -> Row | None:
    """Returns what SQLite returned for the columns ``STORED`` as a row; None for None."""
    if stored is None:
        return None
    _, extent_id, segment, offset, capacity, generation, nbytes, written_at = stored
    return Row(Extent(extent_id, segment, offset, capacity, generation), nbytes, written_at)


def readable(
    found: Sequence[Row | None], pages: Sequence[Page], oldest: float
) -> list[tuple[int, Row]]:
    """Returns the rows that are present, not expired and as long as their pages, by place.

    Args:
        found: what a lookup found.
        pages: one for each.
        oldest: objects written then or before have expired; seconds since 1970.
    """
    return [
        (n, row)
        for n, (row, page) in enumerate(zip(found, pages, strict=True))
        if row is not None and row.written_at > oldest and row.nbytes == nbytes_of(page)
    ]


def totals_of(objects: Iterable[tuple[str, int, float]]) -> dict[str, NamespaceTotals]:
    """Returns number, bytes and age by namespace of objects: key, bytes, time of writing."""
    found: dict[str, tuple[int, int, float, float]] = {}
    for key, nbytes, at in objects:
        namespace = namespace_of(key)
        n, sum_nbytes, oldest, newest = found.get(namespace, (0, 0, at, at))
        found[namespace] = (
            n + 1,
            sum_nbytes + nbytes,
            at if at < oldest else oldest,
            at if at > newest else newest,
        )
    return {name: NamespaceTotals(*totals) for name, totals in found.items()}


class FileIndex:
    """Two connections: one writes, the other one follows the writes of all processes.

    Threads: every method may be called from any thread. Reads never wait for writers, since the
    database is in WAL mode.
    """

    def __init__(self, path: Path, *, timeout_s: float, durable: bool) -> None:
        """Opens nothing; ``connect`` does.

        Args:
            path: of the database file.
            timeout_s: how long to wait for transactions of other processes, in seconds.
            durable: every transaction reaches the disk before it ends.
        """
        self.path = path
        self._database = index_database(path)
        self._identity: tuple[int, int] | None = None
        self._is_damaged = False
        self._timeout_s = timeout_s
        self._durable = durable
        self._read_lock = threading.Lock()
        self._write_lock = threading.Lock()
        self._rows: dict[str, _Stored] = {}
        self._keys: dict[int, str] = {}  # extent_id -> key, of those in _rows
        self._usage: dict[str, int] = {}  # bytes of _rows by namespace
        self._version = 0  # increases whenever _rows or _segments change
        self._seen = (-1, -1, -1)  # data_version, epoch, seq
        self.segments: frozenset[int] = frozenset()  # as of the last change of epoch
        self._is_large = False
        self._late_check: LateCheck | None = None

    def connect(self) -> None:
        """Opens both connections; creates missing tables and checks existing ones.

        Raises:
            BackendCorrupt: the file is damaged.
            BackendError: it cannot be opened, or belongs to another application or version.
        """
        self._is_damaged = False
        self._seen = (-1, -1, -1)
        with self._database.translated():
            self._writer = self._connection()
            try:
                self._is_large = self.path.stat().st_size > CHECKED_AT_ONCE_NBYTES
                self._check(whole=not self._is_large)
                self._reader = self._connection()
            except BaseException:
                self._writer.close()
                raise
        self._identity = self._database.identity()
        try:
            with self._read_lock:
                self._follow()  # reads every row
        except BackendError:
            self.close()
            raise

    def check_late(self) -> None:
        """Begins what ``connect`` left out for a large index, if anything.

        While it runs the log cannot be restarted, so opening comes first.
        """
        if self._is_large:
            with self._database.translated():
                self._late_check = LateCheck(self._database, self._connection(), self._damaged)

    def trouble(self) -> str:
        """Returns why it has become unusable while open; empty if it is usable."""
        if self._is_damaged:
            return f"index {self.path} is damaged"
        if self._database.identity() != self._identity:
            return f"index {self.path} was removed or replaced while in use"
        return ""

    def _damaged(self) -> None:
        self._is_damaged = True

    def check_current(self) -> None:
        """Raises ``BackendUnavailable`` if it has become unusable."""
        if trouble := self.trouble():
            raise BackendUnavailable(f"{trouble}; the next call reopens it")

    def discard(self) -> None:
        """Deletes the file if it is damaged and still the same, so that other users notice.

        Nobody creates another one while the caller holds the lock of its owner.
        """
        if self._is_damaged and self._database.identity() == self._identity:
            self.path.unlink(missing_ok=True)

    def take_room(self) -> None:
        """Grows database and log in advance, so that changes need no space on a full disk."""
        with self.transaction() as connection:
            nbytes = room_nbytes(connection)
            connection.execute(
                "INSERT OR REPLACE INTO counters VALUES ('room', zeroblob(?))", (nbytes,)
            )
        with self.transaction() as connection:
            connection.execute("DELETE FROM counters WHERE name = 'room'")
        self.restart_log()

    def restart_log(self) -> None:
        """Writes the log (SQLite's WAL) into the database, so that its space can be reused."""
        with self._database.translated(), self._write_lock:
            self._writer.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()

    def _connection(self) -> sqlite3.Connection:
        return self._database.connect(self._timeout_s, durable=self._durable)

    def _check(self, *, whole: bool) -> None:
        if is_empty(self._writer):
            self._database.make(self._writer)
        self._upgrade()
        self._database.check(self._writer, whole=whole)

    def _upgrade(self) -> None:
        """Upgrades an index of an older version. The caller holds ``open.lock``."""
        connection = self._writer
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if application != APPLICATION_ID:
            return
        for n in range(version, FORMAT_VERSION):
            if n not in _UPGRADES:
                return  # ``check`` reports it
            connection.executescript(
                f"BEGIN IMMEDIATE; {_UPGRADES[n]}; PRAGMA user_version = {n + 1}; COMMIT;"
            )

    def close(self) -> None:
        """Closes all connections."""
        if self._late_check is not None:
            self._late_check.close()
            self._late_check = None
        with self._write_lock, self._read_lock:
            self._writer.close()
            self._reader.close()
            self._clear()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Yields the writing connection, in a transaction that ends with the block."""
        with self._database.translated(self._damaged), self._write_lock:
            connection = self._writer
            self.check_current()  # writes to a deleted file would be lost
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    with contextlib.suppress(sqlite3.Error):  # the first error says more
                        connection.execute("ROLLBACK")
                raise

    def lookup(self, keys: Sequence[str]) -> tuple[int, list[Row | None]]:
        """Returns a version for ``unchanged``, and the rows of ``keys``; None for absent ones."""
        with self._read_lock:
            self._follow()
            return self._version, list(map(row_of, map(self._rows.get, keys)))

    def leading(self, keys: Sequence[str], older_than: float) -> int:
        """Returns how many leading keys are present and were written after ``older_than``."""
        with self._read_lock:
            self._follow()
            rows = self._rows
            for n, key in enumerate(keys):
                row = rows.get(key)
                if row is None or row[_WRITTEN_AT] <= older_than:
                    return n
        return len(keys)

    def present(self, keys: Sequence[str], older_than: float) -> list[bool]:
        """Returns for each key whether it is present and was written after ``older_than``."""
        with self._read_lock:
            self._follow()
            rows = list(map(self._rows.get, keys))
        return [row is not None and row[_WRITTEN_AT] > older_than for row in rows]

    def unchanged(self, version: int, keys: Sequence[str], rows: Sequence[Row | None]) -> int:
        """Returns how many leading ``rows`` are still the ones that ``lookup`` returned.

        To be called after reading extents: an extent is rewritten only after its row was changed.
        If the row has not changed, the bytes that were read belong to the key.

        Args:
            version: of ``lookup``.
            keys: of ``lookup``, or leading ones of them.
            rows: one for each of ``keys``.
        """
        with self._read_lock:
            self._follow()
            if self._version == version:
                return len(rows)
            for n, (key, row) in enumerate(zip(keys, rows, strict=True)):
                if row_of(self._rows.get(key)) != row:
                    return n
        return len(rows)

    def unchanged_each(
        self, version: int, keys: Sequence[str], rows: Sequence[Row]
    ) -> Sequence[bool]:
        """As ``unchanged``, for each row; returns which of them are still the same.

        Args:
            version: of ``lookup``.
            keys: some of those of ``lookup``.
            rows: one for each of ``keys``.
        """
        with self._read_lock:
            self._follow()
            if self._version == version:
                return [True] * len(rows)
            return [row_of(self._rows.get(key)) == row for key, row in zip(keys, rows, strict=True)]

    def keys(self, prefix: str, older_than: float) -> list[str]:
        """Returns the keys that start with ``prefix`` and were written after ``older_than``."""
        with self._read_lock:
            self._follow()
            return [
                key
                for key, row in self._rows.items()
                if key.startswith(prefix) and row[_WRITTEN_AT] > older_than
            ]

    def totals(self) -> tuple[int, int, int]:
        """Returns the number of objects, their bytes, and the bytes of all extents."""
        with self._read_lock, self._database.translated(self._damaged):
            self._follow()
            (held,) = self._reader.execute(
                "SELECT value FROM counters WHERE name = 'held'"
            ).fetchone()
            return len(self._rows), sum(self._usage.values()), held

    def usage(self) -> dict[str, int]:
        """Returns the bytes of the objects by namespace."""
        with self._read_lock:
            self._follow()
            return {name: nbytes for name, nbytes in self._usage.items() if nbytes}

    def namespace_totals(self) -> dict[str, NamespaceTotals]:
        """Returns number, bytes and age of the objects by namespace."""
        with self._read_lock:
            self._follow()
            rows = list(self._rows.values())
        return totals_of((row[0], row[_NBYTES], row[_WRITTEN_AT]) for row in rows)

    def check_integrity(self) -> None:
        """Checks the rows against each other, the segments, the counters and this process's copy.

        Raises:
            IntegrityError: the message says what does not fit.
        """
        with self.transaction() as connection, self._read_lock:
            self._follow()
            extents = connection.execute(
                "SELECT segment, offset, capacity, owner, key FROM extents ORDER BY segment, offset"
            ).fetchall()
            ends = dict(connection.execute("SELECT segment, end FROM segments"))
            owners = {owner for (owner,) in connection.execute("SELECT owner FROM owners")}
            (held,) = connection.execute(
                "SELECT value FROM counters WHERE name = 'held'"
            ).fetchone()
            at = dict.fromkeys(ends, BLOCK_NBYTES)
            for segment, offset, capacity, owner, key in extents:
                if segment not in at or not at[segment] <= offset <= ends[segment] - capacity:
                    raise IntegrityError(f"extent at {segment:08x}:{offset} overlaps or is outside")
                if owner is not None and (key is not None or owner not in owners):
                    raise IntegrityError(f"extent at {segment:08x}:{offset}: unknown owner {owner}")
                at[segment] = offset + capacity
            if held != sum(extent[2] for extent in extents):
                raise IntegrityError(f"{held} bytes counted as held: not the sum of the extents")
            if {extent[4] for extent in extents if extent[4] is not None} != self._rows.keys():
                raise IntegrityError("the copy of the index in this process differs from the table")
            usage = dict.fromkeys(self._usage, 0)
            for key, row in self._rows.items():
                usage[namespace_of(key)] += row[_NBYTES]
            if usage != self._usage:
                raise IntegrityError("the bytes by namespace are not the sums of the objects")

    @property
    def epoch(self) -> int:
        """Increases when rows are deleted; ``segments`` belongs to this epoch."""
        return self._seen[1]

    def _follow(self) -> None:
        """Applies what any connection committed since the last call. Needs the read lock."""
        with self._database.translated(self._damaged):
            connection = self._reader
            (data_version,) = connection.execute("PRAGMA data_version").fetchone()
            if data_version == self._seen[0]:
                return
            connection.execute("BEGIN")
            try:
                (epoch,) = connection.execute(
                    "SELECT value FROM counters WHERE name = 'epoch'"
                ).fetchone()
                last = self._seen[2] if epoch == self._seen[1] else -1
                if last == -1:
                    self._clear()
                    self.segments = frozenset(
                        segment for (segment,) in connection.execute("SELECT segment FROM segments")
                    )
                last = self._take_over(connection, last)
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")
            self._version += 1
            self._seen = (data_version, epoch, last)

    def _take_over(self, connection: sqlite3.Connection, last: int) -> int:
        """Applies the changes above ``last``; returns the seq of the newest.

        Raises:
            BackendCorrupt: a row is invalid.
        """
        try:
            return self._loaded(connection) if last == -1 else self._taken_over(connection, last)
        except (TypeError, AttributeError, ValueError) as exc:
            raise BackendCorrupt(f"index {self.path} is damaged: a row is invalid: {exc}") from exc

    def _loaded(self, connection: sqlite3.Connection) -> int:
        """Reads all rows into an empty copy, in order of the table; as ``_taken_over``."""
        (last,) = connection.execute("SELECT coalesce(max(seq), -1) FROM extents").fetchone()
        query = f"SELECT {STORED} FROM extents NOT INDEXED WHERE key IS NOT NULL"
        rows, keys, usage = self._rows, self._keys, self._usage
        for stored in connection.execute(query):
            key, extent_id, _, offset, capacity, _, nbytes, written_at = stored
            _check_row(offset, capacity, nbytes, written_at)
            rows[key], keys[extent_id] = stored, key
            namespace = namespace_of(key)
            usage[namespace] = usage.get(namespace, 0) + nbytes
        if len(rows) != len(keys):
            raise ValueError(f"{len(keys)} extents have {len(rows)} keys")
        return int(last)

    def _taken_over(self, connection: sqlite3.Connection, last: int) -> int:
        query = f"SELECT seq, {STORED} FROM extents WHERE seq > ? ORDER BY seq"
        for seq, *changed in connection.execute(query, (last,)):
            last = seq
            key, extent_id = changed[0], changed[_EXTENT_ID]
            before = self._keys.pop(extent_id, None)
            if before is not None and self._rows[before][_EXTENT_ID] == extent_id:
                self._drop(before)
            if key is not None:
                if key in self._rows:
                    self._drop(key)
                self._add(tuple(changed))
        return last

    def _add(self, stored: _Stored) -> None:
        key, nbytes = stored[0], stored[_NBYTES]
        _check_row(stored[_OFFSET], stored[_CAPACITY], nbytes, stored[_WRITTEN_AT])
        self._rows[key] = stored
        self._keys[stored[_EXTENT_ID]] = key
        namespace = namespace_of(key)
        self._usage[namespace] = self._usage.get(namespace, 0) + nbytes

    def _drop(self, key: str) -> None:
        stored, namespace = self._rows.pop(key), namespace_of(key)
        self._usage[namespace] -= stored[_NBYTES]

    def _clear(self) -> None:
        self._rows.clear()
        self._keys.clear()
        self._usage.clear()


def _check_row(offset: int, capacity: int, nbytes: int, written_at: float) -> None:
    if type(written_at) is not float:
        raise TypeError(f"written at {written_at!r}")
    if not 0 <= nbytes <= capacity - OVERHEAD_NBYTES or offset < BLOCK_NBYTES:
        raise ValueError(f"{nbytes} bytes at {offset}, {capacity} long")


def move(connection: sqlite3.Connection, counter: str, by: int = 1) -> int:
    """Adds ``by`` to a counter; returns its new value.

    Args:
        connection: in a transaction.
        counter: name of the counter.
        by: what to add.
    """
    row = connection.execute(
        "UPDATE counters SET value = value + ? WHERE name = ? RETURNING value", (by, counter)
    ).fetchone()
    return int(row[0])
