"""Allocation in the segment files: claiming extents, eviction, and freeing disk space."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from hicache_core.errors import BackendFull
from hicache_core.storage.file.extents import (
    FREE,
    Place,
    Wanted,
    drop,
    free,
    held,
    mark,
    oldest,
    remove_empty,
    select,
    unused,
)
from hicache_core.storage.file.index import FileIndex, move
from hicache_core.storage.file.quota import FileQuota
from hicache_core.storage.file.records import (
    BLOCK_NBYTES,
    SEGMENT_NBYTES,
    Extent,
    RecordStore,
    capacity_for,
)

SWEEP_INTERVAL_S = 10.0
"""Expired objects are searched for at most this often, when space is needed."""

_MAX_PENDING_USES = 4096
_SPREAD = 2  # files to write a batch to, since writers of one file wait for each other


class Claim(NamedTuple):
    """What ``FileSpace.claim`` found, by the places of the objects in its argument.

    Attributes:
        extents: where to write those that are new.
        no_room: those for which there is no space.
    """

    extents: dict[int, Extent]
    no_room: list[int]


class FileSpace:
    """Hands out extents up to a byte limit, and evicts the least recently used objects.

    Everything happens in transactions of the index, so it is safe among processes. Space is taken
    in this order: free extents of the right length; new space below the limit; expired objects;
    free extents of other lengths; the least recently used objects. An extent of the right length is
    reused in place: its pages are in the page cache, and new ones are slower.

    Threads: every method may be called from any thread.
    """

    def __init__(
        self,
        index: FileIndex,
        store: RecordStore,
        *,
        ttl_s: float | None,
        quota: FileQuota,
        clock: Callable[[], float],
    ) -> None:
        """Allocates nothing yet; the caller sets ``max_nbytes`` and ``owner``.

        Args:
            index: of the store.
            store: its segment files.
            ttl_s: age in seconds after which objects expire; None for never.
            quota: of the namespaces.
            clock: seconds since the epoch.
        """
        self._index = index
        self._store = store
        self._ttl_s = ttl_s
        self._quota = quota
        self._clock = clock
        self.max_nbytes = 0
        self.owner = 0
        self._uses: dict[Extent, float] = {}
        self._uses_lock = threading.Lock()
        self._next_sweep = 0.0
        self._evicted_objects = 0
        self.expired_objects = 0

    @property
    def evicted_objects(self) -> int:
        """Number of objects evicted because of the limit or of the quota of their namespace."""
        return self._evicted_objects + self._quota.evicted_objects

    def claim(self, wanted: Sequence[Wanted]) -> Claim:
        """Claims an extent for each of ``wanted`` that is not stored already, if there is space.

        The caller writes the extents and then calls ``publish``, ``release`` or ``give_up``.
        """
        now = self._clock()
        dropped: list[Place] = []
        with self._index.transaction() as connection:
            seq = move(connection, "seq")
            stored = self._refresh_stored(connection, wanted, now, seq)
            self._flush_uses(connection)
            unfitting = self._quota.unfitting(wanted, stored)
            left_out = frozenset(unfitting)
            new = [
                n for n, want in enumerate(wanted) if want.key not in stored and n not in left_out
            ]
            self._quota.make_room(connection, (wanted[n] for n in new), stored.values(), seq)
            claim = Claim({}, unfitting)
            kept = frozenset(stored.values())
            for capacity, group in itertools.groupby(new, lambda n: capacity_for(wanted[n].nbytes)):
                numbers = list(group)
                places = self._take(connection, capacity, len(numbers), seq, kept, dropped)
                for n, place in zip(numbers, places, strict=False):
                    claim.extents[n] = Extent(*place, seq)
                claim.no_room.extend(numbers[len(places) :])
            emptied = remove_empty(connection, dropped)
        self._give_back(dropped, emptied)
        return claim

    def publish(self, done: Sequence[tuple[Extent, Wanted]], written_at: float) -> None:
        """Makes written extents readable for all processes.

        If another process was first to store a key, its copy stays. Of the objects of one call the
        first ones count as used last, so that the last page of a prefix is evicted first.

        Args:
            done: the extents, with their objects.
            written_at: seconds since the epoch.
        """
        with self._index.transaction() as connection:
            seq = move(connection, "seq")
            parameters = [
                (want.key, want.nbytes, written_at, written_at - n * 1e-6, seq, extent.extent_id)
                for n, (extent, want) in enumerate(done)
            ]
            cursor = connection.executemany(
                "UPDATE OR IGNORE extents SET owner = NULL, key = ?, nbytes = ?, written_at = ?, "
                "used_at = ?, seq = ? WHERE extent_id = ?",
                parameters,
            )
            if cursor.rowcount != len(done):
                free(connection, self.owner, (extent for extent, _ in done), seq)
            # Again, since other processes may have published since the claim.
            kept = (extent.extent_id for extent, _ in done)
            self._quota.make_room(connection, (want for _, want in done), kept, seq)

    def release(self, extents: Iterable[Extent]) -> None:
        """Releases claimed extents that were not used."""
        with self._index.transaction() as connection:
            free(connection, self.owner, extents, move(connection, "seq"))

    def give_up(self, extents: Sequence[Extent]) -> None:
        """Removes claimed extents for which the disk had no space."""
        dropped = [Place(*extent[:4]) for extent in extents]
        with self._index.transaction() as connection:
            drop(connection, dropped)
            emptied = remove_empty(connection, dropped)
        self._give_back(dropped, emptied)

    def delete(self, keys: Sequence[str]) -> None:
        """Frees the extents of ``keys``."""
        with self._index.transaction() as connection:
            seq = move(connection, "seq")
            connection.executemany(
                f"UPDATE extents SET {FREE}, seq = ? WHERE key = ?", ((seq, key) for key in keys)
            )

    def clear(self, prefix: str) -> int:
        """Frees the extents of keys that start with ``prefix``; returns how many there were."""
        with self._index.transaction() as connection:
            seq = move(connection, "seq")
            cursor = connection.execute(
                f"UPDATE extents SET {FREE}, seq = ? WHERE key >= ? AND key < ?",
                (seq, prefix, prefix + "\x7f"),  # keys have only characters below DEL
            )
            return cursor.rowcount

    def pin(self, keys: Sequence[str], ttl_s: float) -> int:
        """Pins ``keys`` for ``ttl_s`` seconds; returns how many of them are present."""
        now = self._clock()
        with self._index.transaction() as connection:
            return connection.executemany(
                "UPDATE extents SET pinned_until = ? WHERE key = ? AND written_at > ?",
                (
                    (now + ttl_s if ttl_s > 0 else None, key, self._expired_before(now))
                    for key in keys
                ),
            ).rowcount

    def used(self, extents: Sequence[Extent]) -> None:
        """Remembers that these were read now; stored in batches."""
        now = self._clock()
        with self._uses_lock:
            for n, extent in enumerate(extents):
                self._uses[extent] = now - n * 1e-6
            full = len(self._uses) >= _MAX_PENDING_USES
        if full:
            with contextlib.suppress(BackendFull):  # a read must not fail on a full disk
                self.flush_uses()

    def flush_uses(self) -> None:
        """Stores the times of use, for all processes and the next start."""
        if self._uses:
            with self._index.transaction() as connection:
                self._flush_uses(connection)

    def trim(self) -> None:
        """Evicts least recently used objects until the limit and the quotas are met."""
        dropped: list[Place] = []
        now = self._clock()
        with self._index.transaction() as connection:
            self._quota.trim(connection, move(connection, "seq"))
            while (excess := held(connection) - self.max_nbytes) > 0:
                victims = unused(connection, 0, 64)
                victims = victims or oldest(connection, 64, frozenset(), now)
                if not victims:
                    break
                before = itertools.accumulate((place.capacity for place in victims), initial=0)
                victims = [place for place, n in zip(victims, before, strict=False) if n < excess]
                drop(connection, victims)
                dropped += victims
            emptied = remove_empty(connection, dropped)
        self._give_back(dropped, emptied)

    # From here on inside a transaction, except for _give_back.

    def _refresh_stored(
        self, connection: sqlite3.Connection, wanted: Sequence[Wanted], now: float, seq: int
    ) -> dict[str, int]:
        """Returns the keys that are stored already, with the ids of their extents.

        Frees objects of ``wanted`` that are expired or have another length.
        """
        oldest = self._expired_before(now)
        stored: dict[str, int] = {}
        used = []
        for n, want in enumerate(wanted):
            if not want.seen:
                continue
            found = connection.execute(
                "SELECT extent_id, nbytes, written_at FROM extents WHERE key = ?", (want.key,)
            ).fetchone()
            if found is None:
                continue
            if found[1] == want.nbytes and found[2] > oldest:
                stored[want.key] = found[0]
                used.append((now - n * 1e-6, found[0]))
            else:
                connection.execute(
                    f"UPDATE extents SET {FREE}, seq = ? WHERE extent_id = ?", (seq, found[0])
                )
        connection.executemany("UPDATE extents SET used_at = ? WHERE extent_id = ?", used)
        return stored

    def _expired_before(self, now: float) -> float:
        """Returns the time at or before which written objects have expired."""
        return float("-inf") if self._ttl_s is None else now - self._ttl_s

    def _take(
        self,
        connection: sqlite3.Connection,
        capacity: int,
        n: int,
        seq: int,
        kept: frozenset[int],
        dropped: list[Place],
    ) -> list[Place]:
        """Claims up to ``n`` extents of ``capacity`` bytes; evicts none of ``kept``.

        Extents of other lengths that were removed for them are added to ``dropped``.
        """
        places = self._reuse(connection, capacity, n, seq)
        places += self._grow(connection, capacity, n - len(places), seq)
        if len(places) == n or not self._can_hold(connection, capacity):
            return places
        self._sweep(connection, seq)
        places += self._reuse(connection, capacity, n - len(places), seq)
        while len(places) < n:
            missing = n - len(places)
            victims = unused(connection, capacity, missing)
            if not victims:
                victims = oldest(connection, missing, kept, self._clock())
                self._evicted_objects += len(victims)
            if not victims:
                break
            fitting = [place for place in victims if place.capacity == capacity]
            others = [place for place in victims if place.capacity != capacity]
            mark(connection, self.owner, fitting, seq)
            drop(connection, others)
            dropped += others
            places += fitting
            pending_nbytes = sum(place.capacity for place in dropped)
            places += self._grow(connection, capacity, n - len(places), seq, pending_nbytes)
        return places

    def _reuse(
        self, connection: sqlite3.Connection, capacity: int, n: int, seq: int
    ) -> list[Place]:
        """Claims up to ``n`` free extents of exactly ``capacity`` bytes."""
        where = "key IS NULL AND owner IS NULL AND capacity = ? ORDER BY extent_id LIMIT ?"
        places = select(connection, where, capacity, n)
        mark(connection, self.owner, places, seq)
        return places

    def _grow(
        self,
        connection: sqlite3.Connection,
        capacity: int,
        n: int,
        seq: int,
        pending_nbytes: int = 0,
    ) -> list[Place]:
        """Claims new space at the ends of segments, up to the limit and the free disk space."""
        places: list[Place] = []
        n = min(n, max(0, self.max_nbytes - held(connection)) // capacity)
        # Dropped extents are freed before anything is written, so they count as free space.
        n = n and min(n, (self._store.free_nbytes() + pending_nbytes) // capacity)
        if n == 0:
            return places
        (next_id,) = connection.execute(
            "SELECT coalesce(max(extent_id), 0) + 1 FROM extents"
        ).fetchone()
        share = max(1, -(-n // _SPREAD))
        taken: set[int] = set()
        while len(places) < n:
            segment, end = self._open_segment(connection, capacity, taken)
            fit = max(1, (SEGMENT_NBYTES - end) // capacity)
            count = min(share, fit, n - len(places))
            for i in range(count):
                places.append(Place(next_id + len(places), segment, end + i * capacity, capacity))
            connection.execute(
                "UPDATE segments SET end = ? WHERE segment = ?", (end + count * capacity, segment)
            )
            taken.add(segment)
        connection.executemany(
            "INSERT INTO extents (extent_id, segment, offset, capacity, generation, seq, owner) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            ((*place, seq, seq, self.owner) for place in places),
        )
        move(connection, "held", capacity * len(places))
        return places

    def _open_segment(
        self, connection: sqlite3.Connection, capacity: int, taken: set[int]
    ) -> tuple[int, int]:
        """Returns a segment with space for an extent, and its end; creates one if needed."""
        for segment, end in connection.execute(
            "SELECT segment, end FROM segments WHERE end + ? <= ? ORDER BY segment",
            (capacity, SEGMENT_NBYTES),
        ):
            if segment not in taken:
                return segment, end
        while True:
            segment = move(connection, "segment")
            try:
                self._store.create(segment)
            except FileExistsError:  # a foreign file has that name
                continue
            connection.execute("INSERT INTO segments VALUES (?, ?)", (segment, BLOCK_NBYTES))
            return segment, BLOCK_NBYTES

    def _can_hold(self, connection: sqlite3.Connection, capacity: int) -> bool:
        """Returns whether an extent of this length would fit if all others were evicted."""
        room = held(connection) + self._store.free_nbytes()
        return capacity <= min(self.max_nbytes, room)

    def _sweep(self, connection: sqlite3.Connection, seq: int) -> None:
        """Frees expired objects, at most every ``SWEEP_INTERVAL_S``."""
        now = self._clock()
        if self._ttl_s is None or now < self._next_sweep:
            return
        self._next_sweep = now + min(SWEEP_INTERVAL_S, self._ttl_s)
        cursor = connection.execute(
            f"UPDATE extents SET {FREE}, seq = ? WHERE key IS NOT NULL AND written_at <= ?",
            (seq, now - self._ttl_s),
        )
        self.expired_objects += cursor.rowcount

    def _give_back(self, dropped: Sequence[Place], emptied: set[int]) -> None:
        """Frees the disk space of deleted rows, which no process can use any more."""
        for segment in emptied:
            self._store.unlink(segment)
        for place in dropped:
            if place.segment not in emptied:
                self._store.punch(place.segment, place.offset, place.capacity)

    def _flush_uses(self, connection: sqlite3.Connection) -> None:
        with self._uses_lock:
            uses, self._uses = self._uses, {}
        connection.executemany(
            "UPDATE extents SET used_at = ? "
            "WHERE extent_id = ? AND generation = ? AND key IS NOT NULL AND used_at < ?",
            ((at, e.extent_id, e.generation, at) for e, at in uses.items()),
        )
