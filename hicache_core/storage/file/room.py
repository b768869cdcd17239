"""Room on a full disk for the index of a file backend: what its store gives up for it."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from pathlib import Path

from hicache_core.storage.file.extents import PINNED, Place, select
from hicache_core.storage.file.records import RecordStore
from hicache_core.storage.sqlite import ROOM_NBYTES

RESERVE = "reserve"
"""A file of the store's directory that goes when the disk is full and the index is to be opened."""

_RESERVE_NBYTES = 256 << 10
_MOST_PLACES = 1024


def take_reserve(directory: Path, store: RecordStore) -> None:
    """Makes the reserve, unless it is there or the disk is short of room."""
    path = directory / RESERVE
    if not path.exists() and store.free_nbytes() > 4 * ROOM_NBYTES:
        path.write_bytes(bytes(_RESERVE_NBYTES))


def give_reserve(directory: Path) -> bool:
    """Gives the reserve back to the disk; whether there was one."""
    try:
        (directory / RESERVE).unlink()
    except FileNotFoundError:
        return False
    return True


def give_room(index: Path, store: RecordStore) -> list[Place]:
    """Gives the disk back what is free in the segments, then the least recently used objects.

    The index is read as it lies on the disk, since opening it takes room. The caller is the only
    one who uses the store, and drops the rows of what this returns.
    """
    given: list[Place] = []
    for place in _spare(index):
        if sum(one.capacity for one in given) >= ROOM_NBYTES:
            break
        with contextlib.suppress(OSError):
            if store.punch(place.segment, place.offset, place.capacity):
                given.append(place)
    store.close()
    return given


def _spare(index: Path) -> list[Place]:
    """What may go, the first first; nothing if the index cannot be read so."""
    where = f"TRUE ORDER BY key IS NOT NULL, {PINNED}, used_at LIMIT ?"
    uri = f"{index.absolute().as_uri()}?immutable=1"
    try:
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as connection:
            return select(connection, where, time.time(), _MOST_PLACES)
    except sqlite3.Error:
        return []
