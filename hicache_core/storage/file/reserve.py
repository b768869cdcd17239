"""Space for the index of a file backend on a full disk: a reserve, then the oldest objects."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from pathlib import Path

from hicache_core.storage.file.extents import PINNED, Place, select
from hicache_core.storage.file.records import RecordStore
from hicache_core.storage.sqlite import ROOM_NBYTES

RESERVE = "reserve"
"""A file that is deleted when the disk is full and the index must be opened."""

_RESERVE_NBYTES = 256 << 10
_MOST_PLACES = 1024


def take_reserve(directory: Path, store: RecordStore) -> None:
    """Creates the reserve unless it exists or the disk is nearly full."""
    path = directory / RESERVE
    if not path.exists() and store.free_nbytes() > 4 * ROOM_NBYTES:
        path.write_bytes(bytes(_RESERVE_NBYTES))


def give_reserve(directory: Path) -> bool:
    """Deletes the reserve; returns whether there was one."""
    try:
        (directory / RESERVE).unlink()
    except FileNotFoundError:
        return False
    return True


def give_room(index: Path, store: RecordStore) -> list[Place]:
    """Frees unused extents, then those of the least recently used objects.

    Reads the file of the index directly, since opening it needs space. The caller is the only user
    of the store, and deletes the rows of the returned places.
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
    """Returns what may be freed, in order; empty if the index cannot be read."""
    where = f"TRUE ORDER BY key IS NOT NULL, {PINNED}, used_at LIMIT ?"
    uri = f"{index.absolute().as_uri()}?immutable=1"
    try:
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as connection:
            return select(connection, where, time.time(), _MOST_PLACES)
    except sqlite3.Error:
        return []
