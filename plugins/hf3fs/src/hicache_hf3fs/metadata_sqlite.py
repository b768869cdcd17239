"""Metadata in an SQLite database on a local disk, for all processes of one host.

Times are those of the host's monotonic clock, which is never adjusted. After a reboot all holds and
pins have ended, since their processes have. Only ages use the calendar.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from hicache_core.errors import BackendError, BackendFull, IntegrityError, UseAfterClose
from hicache_core.plugin.backends import room_nbytes
from hicache_core.storage.base import namespace_of
from hicache_hf3fs.metadata import (
    Binding,
    Found,
    Limits,
    MetadataStore,
    SlabUnknown,
    Slot,
    Totals,
    Wanted,
    Written,
    oldest_generation,
)
from hicache_hf3fs.slab import is_slab_name
from hicache_hf3fs.sqlite_file import SqliteFile, add_bounds, counts_bytes
from hicache_hf3fs.sqlite_room import Room
from hicache_hf3fs.sqlite_rows import BOUND, SLAB, UNBIND, Bound, BoundRow, SlabRow

_CHUNK = 500  # parameters of one statement
_MEMORY_ROWS = 100_000


class SqliteMetadata(MetadataStore):
    """Two connections: one writes, one reads. In WAL mode reads never wait for writers."""

    def __init__(
        self,
        path: Path,
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
        calendar: Callable[[], float] = time.time,
    ) -> None:
        """Opens nothing; ``open`` does.

        Args:
            path: of the database file.
            limits: times and quota.
            clock: seconds of the host's monotonic clock.
            calendar: seconds since 1970, for ages.
        """
        self.where = str(path)
        self._file = SqliteFile(path, limits.timeout_s)
        self._limits = limits
        self._clock = clock
        self._calendar = calendar
        self._read_lock = threading.Lock()
        self._write_lock = threading.Lock()
        self._names: dict[int, str] = {}  # slab_id -> name
        self._translated = self._file.translated()
        self._memory: dict[str, Bound] = {}  # as of the reader's _version
        self._version = -1
        self._reader: sqlite3.Connection | None = None
        self._writer: sqlite3.Connection | None = None

    def open(self) -> None:
        self._writer = self._file.open()
        with self._file.translated():
            self._reader = self._file.connection()
        limits = self._limits
        if limits.ttl_s is not None or limits.namespace_quota_nbytes is not None:
            with self._writing() as db:
                ttl, quota = limits.ttl_s is not None, limits.namespace_quota_nbytes is not None
                add_bounds(db, ttl=ttl, quota=quota)
        if self._file.has_room():
            self._take_room()

    def _take_room(self) -> None:
        """Grows database and log in advance, so that changes need no space on a full disk."""
        with self._writing() as db:
            db.execute("INSERT INTO boots VALUES (zeroblob(?))", (room_nbytes(db),))
        with self._writing() as db:
            db.execute("DELETE FROM boots WHERE typeof(boot_id) = 'blob'")
        self.restart_log()

    def close(self) -> None:
        with self._write_lock, self._read_lock:
            self._memory.clear()
            for connection in (self._reader, self._writer):
                if connection is not None:
                    connection.close()
            self._reader = self._writer = None
            self._file.close()

    def trouble(self) -> str:
        return self._file.trouble()

    def restart_log(self) -> None:
        with self._write_lock, self._file.translated():
            if self._writer is not None:
                self._writer.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()

    def n_slots(self, slab: str) -> int | None:
        with self._reading() as db:
            row = db.execute("SELECT n_slots FROM slabs WHERE name = ?", (slab,)).fetchone()
            return None if row is None else int(row[0])

    def register(self, slab: str, n_slots: int, found: Sequence[Found]) -> None:
        # docstring inherited
        with self._writing() as db:
            known = db.execute("SELECT n_slots FROM slabs WHERE name = ?", (slab,)).fetchone()
            if known is not None:
                db.execute(
                    "UPDATE slabs SET n_slots = max(n_slots, ?) WHERE name = ?", (n_slots, slab)
                )
                return
            fresh = max((one.number + 1 for one in found), default=0)
            slab_id = db.execute(
                "INSERT INTO slabs (name, n_slots, fresh) VALUES (?, ?, ?)", (slab, n_slots, fresh)
            ).lastrowid
            db.executemany(
                "INSERT INTO slots (slab_id, number, generation, held_until) VALUES (?, ?, 0, 0)",
                ((slab_id, number) for number in range(fresh)),
            )
            now = self._clock()
            db.executemany(  # a key that was found twice, or is bound elsewhere, stays where it is
                "UPDATE OR IGNORE slots SET generation = ?, key = ?, namespace = ?, nbytes = ?, "
                "used_at = ? WHERE slab_id = ? AND number = ?",
                (
                    (f.generation, f.key, namespace_of(f.key), f.nbytes, now, slab_id, f.number)
                    for f in found
                ),
            )

    def lookup(self, keys: Sequence[str], lease_s: float | None = None) -> list[Binding | None]:
        lease_s = lease_s or self._limits.lease_s
        bound = self._bound(keys)
        now = self._clock()
        if any(one.held_until < now + lease_s for one in bound.values()):
            # A lease is given for twice its time, so that most lookups of a hot key only read.
            # Not on a full disk: then only the second lookup shows what was overwritten.
            until, found = now + 2 * lease_s, list(bound)
            with contextlib.suppress(BackendFull), self._writing() as db:
                for part in _chunks(found):
                    db.execute(
                        "UPDATE slots SET used_at = ?, held_until = max(held_until, ?) "
                        f"WHERE key IN ({_marks(part)})",
                        (now, until, *part),
                    )
                bound = self._bound(found, db)
        return [None if (one := bound.get(key)) is None else one.binding for key in keys]

    def remembered(self, keys: Sequence[str]) -> list[Binding] | None:
        # Without the lock: each access of the dictionary is atomic, and what it holds may be old.
        if self._limits.ttl_s is not None:
            return None
        memory, known = self._memory, []
        until = self._clock() + self._limits.lease_s
        for key in keys:
            one = memory.get(key)
            if one is None or one.held_until < until:
                return None
            known.append(one.binding)
        return known

    def leading(self, keys: Sequence[str]) -> int:
        n_bound = 0
        oldest = self._oldest()
        with self._reading() as db:
            for part in _chunks(keys):
                bound = _bound_of(db, part, oldest)
                for key in part:
                    if key not in bound:
                        return n_bound
                    n_bound += 1
        return n_bound

    def present(self, keys: Sequence[str]) -> list[bool]:
        bound: set[str] = set()
        oldest = self._oldest()
        with self._reading() as db:
            for part in _chunks(keys):
                bound |= _bound_of(db, part, oldest)
        return [key in bound for key in keys]

    def unchanged(self, keys: Sequence[str], bindings: Sequence[Binding]) -> list[bool]:
        if self._limits.ttl_s is None:
            with self._read_lock, self._translated:
                self._follow(self._open_reader())
                memory = self._memory
                for key, binding in zip(keys, bindings, strict=True):
                    one = memory.get(key)
                    if one is None or one.binding is not binding:
                        break
                else:
                    return [True] * len(keys)
        bound = map(self._bound(keys).get, keys)
        return [
            one is not None and one.binding.slot.generation == binding.slot.generation
            for one, binding in zip(bound, bindings, strict=True)
        ]

    def reserve(self, slab: str, wanted: Sequence[Wanted]) -> list[Slot | None]:
        with self._writing() as db:
            row = db.execute(SLAB, (slab,)).fetchone()
            if row is None:
                raise SlabUnknown(slab)
            its = SlabRow(*row)
            room = self._room(db)
            room.drop_expired(want.key for want in wanted)
            bound = self._bound([want.key for want in wanted], db)
            stored = [
                want.key in bound and bound[want.key].binding.nbytes == want.nbytes
                for want in wanted
            ]
            # Touched, so that making room for the others of this call cannot remove them.
            db.executemany(
                "UPDATE slots SET used_at = ? WHERE key = ?", ((room.now, key) for key in bound)
            )
            del stored[room.within_quota(wanted, stored) :]
            numbers = room.take(its, stored.count(False))
            until, now_s = room.now + self._limits.write_lease_s, self._calendar()
            slots: list[Slot | None] = []
            free = iter(numbers)
            for is_stored in stored:
                if is_stored:
                    slots.append(None)
                    continue
                number = next(free, None)
                if number is None:
                    break
                slots.append(room.hold(its, slab, number, until, now_s))
            db.execute(
                "UPDATE slabs SET fresh = max(fresh, ?) WHERE slab_id = ?",
                (max((number + 1 for number in numbers), default=0), its.slab_id),
            )
            return slots

    def publish(self, written: Sequence[Written]) -> list[bool]:
        with self._writing() as db:
            room = self._room(db)
            return [room.bind(one) for one in written]

    def release(self, slots: Sequence[Slot]) -> None:
        with self._writing() as db:
            db.executemany(
                "UPDATE slots SET held_until = 0, generation = 0 "
                "WHERE key IS NULL AND generation = ? AND number = ? "
                "AND slab_id = (SELECT slab_id FROM slabs WHERE name = ?)",
                ((slot.generation, slot.number, slot.slab) for slot in slots),
            )

    def delete(self, keys: Sequence[str], generations: Sequence[int] | None = None) -> int:
        with self._writing() as db:
            if generations is None:
                return db.executemany(f"{UNBIND} AND key = ?", ((key,) for key in keys)).rowcount
            return db.executemany(
                f"{UNBIND} AND key = ? AND generation = ?", zip(keys, generations, strict=True)
            ).rowcount

    def keys(self, prefix: str) -> Iterator[str]:
        with self._reading() as db:
            rows = db.execute(
                "SELECT key FROM slots WHERE key >= ? AND key < ? AND generation >= ?",
                (prefix, prefix + "\x7f", self._oldest()),
            ).fetchall()
        return (key for (key,) in rows)

    def pin(self, keys: Sequence[str], ttl_s: float) -> int:
        with self._writing() as db:
            until = self._clock() + ttl_s if ttl_s > 0 else None
            return db.executemany(
                "UPDATE slots SET pinned_until = ? WHERE key = ? AND generation >= ?",
                ((until, key, self._oldest()) for key in keys),
            ).rowcount

    def usage(self) -> Mapping[str, int]:
        with self._reading():
            pass  # it is open
        # With a connection of its own: it reads every slot, and no lookup must wait for that.
        with self._file.translated(), contextlib.closing(self._file.connection()) as db:
            rows = db.execute(
                "SELECT namespace, sum(nbytes) FROM slots "
                "WHERE key IS NOT NULL AND generation >= ? GROUP BY namespace",
                (self._oldest(),),
            )
            return dict(rows.fetchall())

    def totals(self, slab: str) -> Totals:
        with self._reading() as db:
            row = db.execute(
                "SELECT n_slots, "
                "(SELECT count(*) FROM slots WHERE slab_id = s.slab_id AND key IS NOT NULL "
                "AND generation >= ?), "
                "(SELECT count(*) FROM slots WHERE slab_id = s.slab_id AND key IS NULL "
                "AND held_until > ?) FROM slabs s WHERE name = ?",
                (self._oldest(), self._clock(), slab),
            ).fetchone()
            return Totals(*row) if row is not None else Totals(0, 0, 0)

    def check_integrity(self) -> None:
        with self._writing() as db:
            for name, n_slots, fresh, n_rows, last in db.execute(
                "SELECT name, n_slots, fresh, count(number), max(number) "
                "FROM slabs LEFT JOIN slots USING (slab_id) GROUP BY slab_id"
            ):
                if n_rows != fresh or fresh > n_slots or (last is not None and last != fresh - 1):
                    raise IntegrityError(
                        f"{self.where}: slab {name} has {n_rows} rows of {fresh} used slots, the "
                        f"last is {last}, of {n_slots} in all"
                    )
            self._check_bytes(db)

    def _check_bytes(self, db: sqlite3.Connection) -> None:
        if not counts_bytes(db):
            return
        counted = dict(db.execute("SELECT * FROM spaces WHERE used_nbytes != 0").fetchall())
        summed = dict(
            db.execute(
                "SELECT namespace, sum(nbytes) FROM slots WHERE key IS NOT NULL "
                "GROUP BY namespace HAVING sum(nbytes) != 0"
            ).fetchall()
        )
        if counted != summed:
            raise IntegrityError(f"{self.where}: counted {counted} bytes, but there are {summed}")

    def _bound(self, keys: Sequence[str], db: sqlite3.Connection | None = None) -> dict[str, Bound]:
        """Returns those of the keys that are bound and not expired."""
        if db is None:
            with self._read_lock, self._translated:
                return self._young(self._current(keys, self._open_reader()))
        rows = {}
        for part in _chunks(keys):
            for key, *row in db.execute(BOUND.format(_marks(part)), part):
                rows[key] = BoundRow(*row)
        if any(row.slab_id not in self._names for row in rows.values()):
            self._names.update(db.execute("SELECT slab_id, name FROM slabs").fetchall())
        bound = {}
        for key, its in rows.items():
            self._check_row(its)
            slot = Slot(self._names[its.slab_id], its.number, its.generation)
            bound[key] = Bound(Binding(slot, its.nbytes), its.held_until)
        return self._young(bound)

    def _check_row(self, row: BoundRow) -> None:
        """Raises ``sqlite3.DatabaseError`` if the row is invalid."""
        name = self._names.get(row.slab_id)
        types = (type(row.number), type(row.generation), type(row.nbytes), type(row.held_until))
        if types != (int, int, int, float) or not is_slab_name(name) or row.nbytes < 0:
            raise sqlite3.OperationalError(f"a row of slots is invalid: {tuple(row)}")

    def _young(self, bound: dict[str, Bound]) -> dict[str, Bound]:
        """Returns what is not expired."""
        oldest = self._oldest()
        if not oldest:
            return bound
        return {key: one for key, one in bound.items() if one.binding.slot.generation >= oldest}

    def _oldest(self) -> int:
        """Returns the first generation that is not expired."""
        ttl_s = self._limits.ttl_s
        return 0 if ttl_s is None else oldest_generation(self._calendar(), ttl_s)

    def _room(self, db: sqlite3.Connection) -> Room:
        quota = self._limits.namespace_quota_nbytes
        return Room(db, self._clock(), oldest=self._oldest(), quota=quota)

    def _current(self, keys: Sequence[str], db: sqlite3.Connection) -> dict[str, Bound]:
        """As ``_bound``, with a cache that is valid until any process commits.

        So a read, which looks at its keys before and after, needs one query if nothing changed.
        """
        self._follow(db)
        asked = [key for key in keys if key not in self._memory]
        if asked:
            self._memory.update(self._bound(asked, db))
        return {key: self._memory[key] for key in keys if key in self._memory}

    def _follow(self, db: sqlite3.Connection) -> None:
        """Forgets what is remembered if any process has committed since."""
        (version,) = db.execute("PRAGMA data_version").fetchone()
        if version != self._version or len(self._memory) > _MEMORY_ROWS:
            self._memory.clear()
            self._version = version

    def _open_reader(self) -> sqlite3.Connection:
        if self._reader is None:
            raise UseAfterClose(f"metadata {self.where} is not open")
        return self._reader

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._read_lock, self._translated:
            yield self._open_reader()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """Yields the writing connection, in a transaction that ends with the block."""
        with self._write_lock, self._file.translated():
            db = self._writer
            if db is None:
                raise UseAfterClose(f"metadata {self.where} is not open")
            self._file.check_current()
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error, BackendError):
                    db.execute("ROLLBACK")
                raise


def _bound_of(db: sqlite3.Connection, keys: Sequence[str], oldest: int) -> set[str]:
    """Returns those of ``keys`` that are bound to a generation from ``oldest`` on."""
    query = f"SELECT key FROM slots WHERE generation >= ? AND key IN ({_marks(keys)})"
    return {key for (key,) in db.execute(query, (oldest, *keys))}


def _chunks(keys: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yields the keys in parts that fit into one statement."""
    return (keys[start : start + _CHUNK] for start in range(0, len(keys), _CHUNK))


def _marks(part: Sequence[str]) -> str:
    return ",".join("?" * len(part))
