"""Room in an SQLite metadata store: which slots may be written, and which objects go for that."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from hicache_core.storage.base import namespace_of
from hicache_hf3fs.metadata import Slot, Wanted, Written, new_generation
from hicache_hf3fs.sqlite_rows import FREE, LEAST_USED_FIRST, UNBIND, SlabRow

_EXPIRED_AT_ONCE = 1000


class Room:
    """What one transaction needs to know to make room; it begins by letting go what is over.

    Attributes:
        now: the host's clock.
        oldest: objects of a generation below are expired.
        quota: cap on the bytes of a namespace, None if there is none.
    """

    def __init__(
        self, db: sqlite3.Connection, now: float, *, oldest: int, quota: int | None
    ) -> None:
        """Lets go what is over.

        Args:
            db: a connection inside the transaction.
            now: seconds of the host's monotonic clock.
            oldest: objects of a generation below are expired; 0 if none expires.
            quota: cap on the bytes of a namespace; None if there is none.
        """
        self._db = db
        self.now = now
        self.oldest = oldest
        self.quota = quota
        db.execute("UPDATE slots SET pinned_until = NULL WHERE pinned_until <= ?", (now,))
        if oldest:  # a part of them: what was expired for long must not keep a writer waiting
            db.execute(
                f"{UNBIND} AND (slab_id, number) IN (SELECT slab_id, number FROM slots "
                "WHERE key IS NOT NULL AND generation < ? LIMIT ?)",
                (oldest, _EXPIRED_AT_ONCE),
            )

    def drop_expired(self, keys: Iterable[str]) -> None:
        """Unbinds those of ``keys`` that are expired, so that they can be stored anew."""
        if self.oldest:
            self._db.executemany(
                f"{UNBIND} AND key = ? AND generation < ?", ((key, self.oldest) for key in keys)
            )

    def within_quota(self, wanted: Sequence[Wanted], stored: Sequence[bool]) -> int:
        """How many leading objects their namespaces have room for, after what had to go is gone."""
        needed: Counter[str] = Counter()
        for n, (want, is_stored) in enumerate(zip(wanted, stored, strict=True)):
            if not is_stored:
                namespace = namespace_of(want.key)
                needed[namespace] += want.nbytes
                if not self._fit(namespace, needed[namespace]):
                    return n
        return len(wanted)

    def take(self, slab: SlabRow, n_slots: int) -> list[int]:
        """Up to ``n_slots`` slots that may be written, bound to nothing any more."""
        numbers = list(islice(self._free(slab), n_slots))
        self._db.executemany(
            f"{UNBIND} AND slab_id = ? AND number = ?", ((slab.slab_id, n) for n in numbers)
        )
        return numbers

    def hold(self, slab: SlabRow, name: str, number: int, until: float, now_s: float) -> Slot:
        """Reserves a slot that was taken.

        Args:
            slab: its row.
            name: of the slab.
            number: of the slot.
            until: end of the reservation, by the host's monotonic clock.
            now_s: seconds since 1970, for the generation.
        """
        slot = Slot(name, number, new_generation(now_s))
        self._db.execute(
            "INSERT OR REPLACE INTO slots (slab_id, number, generation, held_until) "
            "VALUES (?, ?, ?, ?)",
            (slab.slab_id, number, slot.generation, until),
        )
        return slot

    def bind(self, one: Written) -> bool:
        """Binds a reserved slot; False if it is not reserved so, or the namespace is full."""
        key, nbytes, slot = one
        place = self._db.execute(
            "SELECT slab_id, number FROM slots JOIN slabs USING (slab_id) "
            "WHERE name = ? AND number = ? AND generation = ? AND key IS NULL",
            (slot.slab, slot.number, slot.generation),
        ).fetchone()
        if place is None:
            return False
        self.drop_expired([key])
        other = self._db.execute("SELECT nbytes FROM slots WHERE key = ?", (key,)).fetchone()
        if other == (nbytes,):  # somebody was faster; no reader has seen ours
            self._db.execute(FREE, place)
            return True
        if other is not None:
            self._db.execute(f"{UNBIND} AND key = ?", (key,))
        if not self._fit(namespace_of(key), nbytes):  # others have published since the reservation
            self._db.execute(FREE, place)
            return False
        self._db.execute(
            "UPDATE slots SET key = ?, namespace = ?, nbytes = ?, used_at = ?, held_until = 0 "
            "WHERE slab_id = ? AND number = ?",
            (key, namespace_of(key), nbytes, self.now, *place),
        )
        return True

    def _free(self, slab: SlabRow) -> Iterator[int]:
        """Free slots, those never used, then those of the least recently used objects."""
        free = "SELECT number FROM slots WHERE slab_id = ? AND key IS NULL AND held_until <= ?"
        yield from (number for (number,) in self._db.execute(free, (slab.slab_id, self.now)))
        yield from range(slab.fresh, slab.n_slots)
        oldest = (
            "SELECT number FROM slots WHERE slab_id = ? AND key IS NOT NULL AND used_at < ? "
            f"AND held_until <= ? ORDER BY {LEAST_USED_FIRST}"
        )
        victims = self._db.execute(oldest, (slab.slab_id, self.now, self.now))
        yield from (number for (number,) in victims)

    def _fit(self, namespace: str, nbytes: int) -> bool:
        """Makes room for ``nbytes`` under the cap; False, and all is as before, if it cannot be."""
        if self.quota is None:
            return True
        row = self._db.execute(
            "SELECT used_nbytes FROM spaces WHERE namespace = ?", (namespace,)
        ).fetchone()
        excess = nbytes + (row[0] if row else 0) - self.quota
        victims = []
        if excess > 0 and nbytes <= self.quota:
            oldest = self._db.execute(
                "SELECT slab_id, number, nbytes FROM slots WHERE namespace = ? AND key IS NOT NULL "
                f"AND used_at < ? ORDER BY {LEAST_USED_FIRST}",
                (namespace, self.now),
            )
            for slab_id, number, its_nbytes in oldest:
                victims.append((slab_id, number))
                excess -= its_nbytes
                if excess <= 0:
                    break
        if excess > 0:
            return False
        self._db.executemany(f"{UNBIND} AND slab_id = ? AND number = ?", victims)
        return True
