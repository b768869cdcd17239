"""The database file of the SQLite metadata: creating, checking, and replacing a damaged one.

Every process that has it open holds a shared lock on ``<file>.lock``. Creating or replacing the
file needs the exclusive lock. So there are never two databases for one slab.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sqlite3
import time
from pathlib import Path

from hicache_core.errors import BackendCorrupt, BackendDenied, BackendUnavailable
from hicache_core.plugin.backends import ROOM_NBYTES, Database, is_empty
from hicache_hf3fs.slab import FOOTER_NBYTES, HEADER_NBYTES, MAX_KEY_NBYTES
from hicache_hf3fs.sqlite_rows import FOR_QUOTA, FOR_TTL, SCHEMA

logger = logging.getLogger(__name__)

APPLICATION_ID = 0x48334653  # "H3FS"
FORMAT_VERSION = 2
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_POLL_S = 0.02


def counts_bytes(db: sqlite3.Connection) -> bool:
    """Returns whether the bytes of each namespace are counted, for a quota."""
    return db.execute("SELECT 1 FROM sqlite_master WHERE name = 'spaces'").fetchone() is not None


def add_bounds(db: sqlite3.Connection, *, ttl: bool, quota: bool) -> None:
    """Creates what a TTL or a quota needs, if it is missing; the caller is in a transaction.

    It applies to every process: triggers and indexes belong to the database.

    Args:
        db: in a transaction.
        ttl: whether a TTL is set.
        quota: whether a quota is set.
    """
    script = FOR_TTL if ttl else ""
    if quota and not counts_bytes(db):
        script += FOR_QUOTA
    statement = ""
    for line in script.splitlines():
        statement += f"{line}\n"
        if sqlite3.complete_statement(statement):
            db.execute(statement)
            statement = ""


_SIZE = "CAST(substr(name, instr(name, '.') + 1) AS INTEGER)"
_RANK = "CAST(substr(name, 2, instr(name, '.') - 2) AS INTEGER)"
_FAULTS = {
    "a slab has invalid values": (
        f"SELECT 1 FROM slabs WHERE typeof(name) != 'text' "
        f"OR name != 'r' || {_RANK} || '.' || {_SIZE} OR typeof(n_slots) != 'integer' "
        "OR typeof(fresh) != 'integer' OR fresh NOT BETWEEN 0 AND n_slots"
    ),
    "a slot has invalid values": (
        "SELECT 1 FROM slots LEFT JOIN slabs USING (slab_id) WHERE name IS NULL "
        "OR typeof(number) != 'integer' OR number NOT BETWEEN 0 AND fresh - 1 "
        "OR typeof(generation) != 'integer' OR generation < 0 OR typeof(held_until) != 'real' "
        "OR typeof(pinned_until) NOT IN ('null', 'real')"
    ),
    "an object has invalid values": (
        "SELECT 1 FROM slots JOIN slabs USING (slab_id) WHERE key IS NOT NULL "
        f"AND (typeof(key) != 'text' OR length(key) NOT BETWEEN 1 AND {MAX_KEY_NBYTES} "
        "OR namespace IS NOT substr(key, 1, instr(key || '/', '/') - 1) "
        "OR typeof(nbytes) != 'integer' OR nbytes < 0 "
        f"OR nbytes + {HEADER_NBYTES + FOOTER_NBYTES} > {_SIZE} OR typeof(used_at) != 'real')"
    ),
    "a slot is missing": (
        "SELECT 1 FROM slabs LEFT JOIN slots USING (slab_id) GROUP BY slab_id "
        "HAVING count(number) != fresh"
    ),
}
_BYTES_DIFFER = """
SELECT 1 FROM (SELECT namespace, sum(nbytes) AS nbytes FROM slots WHERE key IS NOT NULL
    GROUP BY namespace) FULL JOIN spaces USING (namespace)
    WHERE coalesce(nbytes, 0) IS NOT coalesce(used_nbytes, 0) LIMIT 1
"""


class SqliteFile:
    """Opens the database under the lock that makes it the only one."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        self._path = path
        self._database = Database(
            *(path, "metadata", APPLICATION_ID, FORMAT_VERSION, SCHEMA, _FAULTS),
            optional=frozenset(["spaces"]),
        )
        self._is_damaged = False
        self._timeout_s = timeout_s
        self._lock_fd = -1
        self._identity: tuple[int, int] | None = None

    def open(self) -> sqlite3.Connection:
        """Returns a connection to an intact database of this version.

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
                        self._identity = self._database.identity()
                        return connection
                    fcntl.flock(self._lock_fd, fcntl.LOCK_UN)
                if self._lock(fcntl.LOCK_EX):
                    self._make()
                    continue
                if time.monotonic() > deadline:
                    raise BackendCorrupt(
                        f"metadata {self._path} is missing or damaged, and others use it; it is "
                        "rebuilt as soon as they have noticed, which their next call does, or ended"
                    )
                time.sleep(_POLL_S)
        except BaseException:
            self.close()
            raise

    def connection(self) -> sqlite3.Connection:
        """Returns a new connection. A scan of the slabs restores what a power cut destroys."""
        return self._database.connect(self._timeout_s)

    def translated(self) -> contextlib.AbstractContextManager[None]:
        """Translates errors of SQLite to ``BackendError``."""
        return self._database.translated(self._damaged)

    def _damaged(self) -> None:
        self._is_damaged = True

    def trouble(self) -> str:
        """Returns why it has become unusable while open; empty if it is usable."""
        if self._is_damaged:
            return f"metadata {self._path} is damaged"
        if self._database.identity() != self._identity:
            return f"metadata {self._path} was removed or replaced while in use"
        return ""

    def check_current(self) -> None:
        """Raises ``BackendUnavailable`` if the file has become unusable."""
        if trouble := self.trouble():
            raise BackendUnavailable(f"{trouble}; the next call reopens the store")

    def has_room(self) -> bool:
        """Returns whether its disk has enough free space."""
        status = os.statvfs(self._path.parent)
        return status.f_bavail * status.f_frsize > 4 * ROOM_NBYTES

    def put_aside(self) -> None:
        """Renames a damaged file, so that other users notice. The caller holds the lock."""
        if self._database.identity() == self._identity:
            with contextlib.suppress(FileNotFoundError):
                self._path.replace(self._path.with_name(self._path.name + ".damaged"))

    def close(self) -> None:
        """Renames the file if it is damaged, and releases the lock."""
        if self._is_damaged and self._lock_fd >= 0:
            self.put_aside()
        self._is_damaged = False
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
        """Returns a connection; None if the file is missing or damaged. Needs the shared lock."""
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
            self._is_damaged, self._identity = False, self._database.identity()
            self.put_aside()
            return None
        except BaseException:
            if connection is not None:
                connection.close()
            raise

    def _check(self, connection: sqlite3.Connection) -> None:
        if is_empty(connection):  # its creator was killed before it had finished
            raise BackendCorrupt(f"metadata {self._path} is empty")
        self._database.check(connection)
        if counts_bytes(connection) and connection.execute(_BYTES_DIFFER).fetchone() is not None:
            raise BackendCorrupt(f"metadata {self._path} is damaged: sums of bytes are others")
        connection.execute("BEGIN IMMEDIATE")
        boot_id = _BOOT_ID.read_text().strip()
        if connection.execute("SELECT boot_id FROM boots").fetchone() != (boot_id,):
            # The clock started again at boot: all earlier processes have ended.
            connection.execute("DELETE FROM boots")
            connection.execute("INSERT INTO boots VALUES (?)", (boot_id,))
            connection.execute(
                "UPDATE slots SET held_until = 0, pinned_until = NULL, "
                "used_at = used_at - (SELECT max(used_at) FROM slots)"
            )
        connection.execute("COMMIT")

    def _make(self) -> None:
        """Replaces the file by an empty database. Needs the exclusive lock."""
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
