"""The database file of the SQLite metadata: made once, checked, and made anew when damaged.

Every process that has it open holds a shared lock on ``<file>.lock``. Who makes the file, the first
time or anew, holds the exclusive one: so there are never two databases that speak of one slab.
"""

from __future__ import annotations

import fcntl
import logging
import os
import sqlite3
import time
from contextlib import AbstractContextManager
from pathlib import Path

from hicache_core.errors import BackendCorrupt, BackendDenied, BackendUnavailable
from hicache_core.storage.sqlite import Database, is_empty

logger = logging.getLogger(__name__)

APPLICATION_ID = 0x48334653  # "H3FS"
FORMAT_VERSION = 2
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_POLL_S = 0.02

_SCHEMA = """
CREATE TABLE boots (boot_id TEXT NOT NULL);
CREATE TABLE slabs (
    slab_id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    n_slots INTEGER NOT NULL,
    fresh INTEGER NOT NULL  -- slots from here on were never used and have no row
);
CREATE TABLE slots (
    slab_id INTEGER NOT NULL,
    number INTEGER NOT NULL,
    generation INTEGER NOT NULL,
    key TEXT,
    namespace TEXT,
    nbytes INTEGER,
    used_at REAL,
    pinned_until REAL,
    held_until REAL NOT NULL,  -- end of the lease, of the reservation, or of the quarantine
    PRIMARY KEY (slab_id, number)
) WITHOUT ROWID;
CREATE UNIQUE INDEX by_key ON slots (key) WHERE key IS NOT NULL;
CREATE INDEX by_use ON slots (slab_id, pinned_until IS NOT NULL, used_at, number DESC)
    WHERE key IS NOT NULL;
CREATE INDEX by_pin ON slots (pinned_until) WHERE pinned_until IS NOT NULL;
CREATE INDEX by_hold ON slots (slab_id, held_until) WHERE key IS NULL;
"""
# Each write pays for what follows, so it is made by the first who has a use for it.
_FOR_TTL = "CREATE INDEX IF NOT EXISTS by_age ON slots (generation) WHERE key IS NOT NULL;"
_FOR_QUOTA = """
CREATE INDEX by_space ON slots (namespace, pinned_until IS NOT NULL, used_at, number DESC)
    WHERE key IS NOT NULL;
CREATE TABLE spaces (namespace TEXT PRIMARY KEY, used_nbytes INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO spaces
    SELECT namespace, sum(nbytes) FROM slots WHERE key IS NOT NULL GROUP BY namespace;
CREATE TRIGGER unbound AFTER UPDATE OF key ON slots WHEN OLD.key IS NOT NULL BEGIN
    UPDATE spaces SET used_nbytes = used_nbytes - OLD.nbytes WHERE namespace = OLD.namespace;
END;
CREATE TRIGGER bound AFTER UPDATE OF key ON slots WHEN NEW.key IS NOT NULL BEGIN
    INSERT INTO spaces VALUES (NEW.namespace, NEW.nbytes)
        ON CONFLICT (namespace) DO UPDATE SET used_nbytes = used_nbytes + NEW.nbytes;
END;
"""


def counts_bytes(db: sqlite3.Connection) -> bool:
    """Whether the bytes of each namespace are counted, for somebody's quota."""
    return db.execute("SELECT 1 FROM sqlite_master WHERE name = 'spaces'").fetchone() is not None


def add_bounds(db: sqlite3.Connection, *, ttl: bool, quota: bool) -> None:
    """Makes what an age limit and a quota need, if it is missing; the caller is in a transaction.

    Whoever has the database open follows: triggers and indexes are the database's own.
    """
    script = _FOR_TTL if ttl else ""
    if quota and not counts_bytes(db):
        script += _FOR_QUOTA
    statement = ""
    for line in script.splitlines():
        statement += f"{line}\n"
        if sqlite3.complete_statement(statement):
            db.execute(statement)
            statement = ""


class SqliteFile:
    """Opens the database, under the lock that keeps it the only one."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        self._path = path
        self._database = Database(path, "metadata", APPLICATION_ID, FORMAT_VERSION, _SCHEMA)
        self._timeout_s = timeout_s
        self._lock_fd = -1
        self._identity = (0, 0)

    def open(self) -> sqlite3.Connection:
        """A connection to a database that is whole and of this version.

        Raises:
            BackendCorrupt: it is missing or damaged while other processes use what it was.
            BackendError: it cannot be opened.
        """
        deadline = time.monotonic() + self._timeout_s
        self._lock_fd = self._open_lock()
        try:
            while True:
                if self._lock(fcntl.LOCK_SH):
                    connection = self._sound()
                    if connection is not None:
                        status = self._path.stat()
                        self._identity = (status.st_dev, status.st_ino)
                        return connection
                    fcntl.flock(self._lock_fd, fcntl.LOCK_UN)
                if self._lock(fcntl.LOCK_EX):
                    self._make()
                    continue
                if time.monotonic() > deadline:
                    raise BackendCorrupt(
                        f"metadata {self._path} is missing or damaged, and other processes still "
                        "use it; stop them all, then it is rebuilt from the slabs"
                    )
                time.sleep(_POLL_S)
        except BaseException:
            self.close()
            raise

    def connection(self) -> sqlite3.Connection:
        """One more connection. What a power cut may take, a scan of the slabs gives back."""
        return self._database.connect(self._timeout_s)

    def translated(self) -> AbstractContextManager[None]:
        """Raises the ``BackendError`` that fits what SQLite raises."""
        return self._database.translated()

    def check_current(self) -> None:
        """Raises ``BackendUnavailable`` if the file was removed or replaced under its users."""
        try:
            status = self._path.stat()
        except OSError:
            status = None
        if status is None or (status.st_dev, status.st_ino) != self._identity:
            raise BackendUnavailable(
                f"metadata {self._path} was removed while in use; stop all processes that use it, "
                "then it is rebuilt from the slabs"
            )

    def close(self) -> None:
        """Gives up the lock."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def _open_lock(self) -> int:
        path = self._path.with_name(self._path.name + ".lock")
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError as exc:
            raise BackendUnavailable(
                f"directory {path.parent} does not exist; create it or set metadata_url"
            ) from exc
        except OSError as exc:
            raise BackendDenied(f"{path} cannot be opened: {exc.strerror}") from exc

    def _lock(self, kind: int) -> bool:
        try:
            fcntl.flock(self._lock_fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _sound(self) -> sqlite3.Connection | None:
        """A connection to the database, None if it is missing or damaged. Holds the shared lock."""
        if not self._path.exists():
            return None
        connection = None
        try:
            with self.translated():
                connection = self.connection()
                self._check(connection)
            return connection
        except BackendCorrupt as exc:
            logger.warning("%s", exc)
            if connection is not None:
                connection.close()
            return None
        except BaseException:
            if connection is not None:
                connection.close()
            raise

    def _check(self, connection: sqlite3.Connection) -> None:
        if is_empty(connection):  # whoever made it was killed before it was done
            raise BackendCorrupt(f"metadata {self._path} is empty")
        self._database.check(connection)
        connection.execute("BEGIN IMMEDIATE")
        boot_id = _BOOT_ID.read_text().strip()
        if connection.execute("SELECT boot_id FROM boots").fetchone() != (boot_id,):
            # The clock began anew: nobody of before lives, and all of now comes after.
            connection.execute("DELETE FROM boots")
            connection.execute("INSERT INTO boots VALUES (?)", (boot_id,))
            connection.execute(
                "UPDATE slots SET held_until = 0, pinned_until = NULL, "
                "used_at = used_at - (SELECT max(used_at) FROM slots)"
            )
        connection.execute("COMMIT")

    def _make(self) -> None:
        """An empty database in place of what is there. Holds the exclusive lock."""
        for suffix in ("-wal", "-shm"):
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
        if self._path.exists():
            self._path.replace(self._path.with_name(self._path.name + ".damaged"))
        with self.translated():
            connection = self.connection()
            try:
                self._database.make(connection)
            finally:
                connection.close()
