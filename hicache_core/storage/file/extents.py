"""Statements on the table of extents; each must be called inside a transaction."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from hicache_core.storage.file.index import move
from hicache_core.storage.file.records import Extent

EMPTY = "key = NULL, nbytes = NULL, written_at = NULL, used_at = NULL, pinned_until = NULL"
FREE = f"{EMPTY}, owner = NULL"
UNPINNED, PINNED = "coalesce(pinned_until, 0) <= ?", "pinned_until > ?"


class Place(NamedTuple):
    """The place of an extent; offset and capacity in bytes."""

    extent_id: int
    segment: int
    offset: int
    capacity: int


class Wanted(NamedTuple):
    """An object to be stored.

    Attributes:
        key: its key.
        nbytes: its length.
        seen: whether the key was present at the last lookup. If another process stores it between
            then and ``publish``, that copy stays and ours is dropped.
    """

    key: str
    nbytes: int
    seen: bool = False


def select(connection: sqlite3.Connection, where: str, *parameters: float) -> list[Place]:
    """Returns the extents that match ``where``."""
    query = f"SELECT extent_id, segment, offset, capacity FROM extents WHERE {where}"
    return [Place(*row) for row in connection.execute(query, parameters)]


def unused(connection: sqlite3.Connection, capacity: int, n: int) -> list[Place]:
    """Returns up to ``n`` free extents whose length is not ``capacity``.

    Args:
        connection: in a transaction.
        capacity: in bytes; 0 for every free extent.
        n: maximum number of extents.
    """
    where = "key IS NULL AND owner IS NULL AND capacity != ? LIMIT ?"
    return select(connection, where, capacity, n)


def oldest(connection: sqlite3.Connection, n: int, kept: frozenset[int], now: float) -> list[Place]:
    """Returns up to ``n`` least recently used objects outside ``kept``; pinned ones last.

    Args:
        connection: in a transaction.
        n: maximum number of extents.
        kept: ids of extents that must not be evicted.
        now: seconds since the epoch; decides which pins have ended.
    """
    for pins in (UNPINNED, PINNED):
        where = f"key IS NOT NULL AND {pins} ORDER BY used_at LIMIT ?"
        places = select(connection, where, now, n + len(kept))
        places = [place for place in places if place.extent_id not in kept][:n]
        if places:
            return places
    return []


def mark(connection: sqlite3.Connection, owner: int, places: Sequence[Place], seq: int) -> None:
    """Claims ``places`` for ``owner``.

    Args:
        connection: in a transaction.
        owner: number of the process's claim.
        places: to be claimed; their objects are dropped.
        seq: number of this change, and the generation of the next records.
    """
    connection.executemany(
        f"UPDATE extents SET {EMPTY}, owner = ?, generation = ?, seq = ? WHERE extent_id = ?",
        ((owner, seq, seq, place.extent_id) for place in places),
    )


def free(connection: sqlite3.Connection, owner: int, extents: Iterable[Extent], seq: int) -> None:
    """Frees those of ``extents`` that are still claimed by ``owner``.

    Args:
        connection: in a transaction.
        owner: number of the process's claim.
        extents: to be freed.
        seq: number of this change.
    """
    connection.executemany(
        "UPDATE extents SET owner = NULL, seq = ? WHERE extent_id = ? AND owner = ?",
        ((seq, extent.extent_id, owner) for extent in extents),
    )


def drop(connection: sqlite3.Connection, places: Sequence[Place]) -> None:
    """Deletes the rows of ``places``; the caller frees their disk space."""
    if places:
        connection.executemany(
            "DELETE FROM extents WHERE extent_id = ?", ((p.extent_id,) for p in places)
        )
        move(connection, "held", -sum(place.capacity for place in places))
        move(connection, "epoch")


def remove_empty(connection: sqlite3.Connection, dropped: Sequence[Place]) -> set[int]:
    """Deletes the rows of segments without extents; returns the numbers of those segments."""
    emptied = set()
    for segment in {place.segment for place in dropped}:
        cursor = connection.execute(
            "DELETE FROM segments WHERE segment = ?1 "
            "AND NOT EXISTS (SELECT 1 FROM extents WHERE segment = ?1)",
            (segment,),
        )
        if cursor.rowcount:
            emptied.add(segment)
    return emptied


def held(connection: sqlite3.Connection) -> int:
    """Returns the bytes of all extents."""
    (held,) = connection.execute("SELECT value FROM counters WHERE name = 'held'").fetchone()
    return int(held)
