"""The quota of namespaces of the file backend: which of their objects to evict."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection, Iterable, Sequence

from hicache_core.storage.base import namespace_of
from hicache_core.storage.file.extents import FREE, PINNED, UNPINNED, Wanted
from hicache_core.storage.file.index import FileIndex

_NAMESPACE = "substr(key, 1, instr(key || '/', '/') - 1)"


class FileQuota:
    """Limits every namespace to ``nbytes``; does nothing if that is None.

    ``nbytes`` counts the bytes of objects, as ``FileIndex.usage`` does. Freed extents can be reused
    by the next objects.

    Threads: every method is called inside a transaction of the index.
    """

    def __init__(self, index: FileIndex, nbytes: int | None, clock: Callable[[], float]) -> None:
        """Does nothing yet; ``trim`` enforces the quota on what is stored.

        Args:
            index: of the store.
            nbytes: maximum bytes of each namespace; None for no quota.
            clock: seconds since the epoch.
        """
        self._index = index
        self._nbytes = nbytes
        self._clock = clock
        self.evicted_objects = 0

    def unfitting(self, wanted: Sequence[Wanted], stored: Collection[str]) -> list[int]:
        """Returns the places of those that do not fit into their quotas with those before them.

        Args:
            wanted: to be stored.
            stored: keys of those that are stored already; they stay, so they count first.
        """
        unfitting: list[int] = []
        if self._nbytes is not None:
            sums: dict[str, int] = {}
            for want in wanted:
                if want.key in stored:
                    _add(sums, want)
            for n, want in enumerate(wanted):
                if want.key not in stored and _add(sums, want) > self._nbytes:
                    sums[namespace_of(want.key)] -= want.nbytes
                    unfitting.append(n)
        return unfitting

    def make_room(
        self,
        connection: sqlite3.Connection,
        new: Iterable[Wanted],
        kept: Iterable[int],
        seq: int,
    ) -> None:
        """Evicts objects so that new ones fit.

        Args:
            connection: in a transaction.
            new: the objects to be stored.
            kept: ids of extents that must not be evicted.
            seq: number of this change.
        """
        if self._nbytes is None:
            return
        added: dict[str, int] = {}
        for want in new:
            _add(added, want)
        usage, kept = self._index.usage(), frozenset(kept)
        for namespace, nbytes in added.items():
            excess_nbytes = usage.get(namespace, 0) + nbytes - self._nbytes
            self._free(connection, namespace, excess_nbytes, kept, seq)

    def trim(self, connection: sqlite3.Connection, seq: int) -> None:
        """Evicts what exceeds the quota, and creates the index that evictions need."""
        if self._nbytes is None:
            return
        # Finds the least recently used objects of a namespace; costs nothing without a quota.
        connection.execute(
            f"CREATE INDEX IF NOT EXISTS by_use_in ON extents ({_NAMESPACE}, used_at) "
            "WHERE key IS NOT NULL"
        )
        for namespace, nbytes in self._index.usage().items():
            self._free(connection, namespace, nbytes - self._nbytes, (), seq)

    def _free(
        self,
        connection: sqlite3.Connection,
        namespace: str,
        excess_nbytes: int,
        kept: Collection[int],
        seq: int,
    ) -> None:
        """Evicts least recently used objects of ``excess_nbytes`` in total, pinned ones last."""
        victims: list[int] = []
        for pins in (UNPINNED, PINNED):
            if excess_nbytes <= 0:
                break
            rows = connection.execute(
                f"SELECT extent_id, nbytes FROM extents WHERE key IS NOT NULL "
                f"AND {_NAMESPACE} = ? AND {pins} ORDER BY used_at",
                (namespace, self._clock()),
            )
            for extent_id, nbytes in rows:
                if excess_nbytes <= 0:
                    break
                if extent_id not in kept:
                    victims.append(extent_id)
                    excess_nbytes -= nbytes
            rows.close()
        connection.executemany(
            f"UPDATE extents SET {FREE}, seq = ? WHERE extent_id = ?",
            ((seq, extent_id) for extent_id in victims),
        )
        self.evicted_objects += len(victims)


def _add(sums: dict[str, int], want: Wanted) -> int:
    """Adds the length of ``want`` to the sum of its namespace; returns the new sum."""
    namespace = namespace_of(want.key)
    sums[namespace] = sums.get(namespace, 0) + want.nbytes
    return sums[namespace]
