"""The rows of the SQLite metadata: tables, types, and the statements that several modules use."""

from __future__ import annotations

from typing import NamedTuple

from hicache_hf3fs.metadata import Binding

# Of objects that came in one call the last goes first: without it the others are of use.
LEAST_USED_FIRST = "pinned_until IS NOT NULL, used_at, number DESC"
"""The order in which objects go when room is needed."""

SCHEMA = f"""
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
CREATE INDEX by_use ON slots (slab_id, {LEAST_USED_FIRST})
    WHERE key IS NOT NULL;
CREATE INDEX by_pin ON slots (pinned_until) WHERE pinned_until IS NOT NULL;
CREATE INDEX by_hold ON slots (slab_id, held_until) WHERE key IS NULL;
"""
# Each write pays for what follows, so it is made by the first who has a use for it.
FOR_TTL = "CREATE INDEX IF NOT EXISTS by_age ON slots (generation) WHERE key IS NOT NULL;"
FOR_QUOTA = f"""
CREATE INDEX by_space ON slots (namespace, {LEAST_USED_FIRST})
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


class SlabRow(NamedTuple):
    """A row of ``slabs``; slots from ``fresh`` to ``n_slots`` were never used."""

    slab_id: int
    n_slots: int
    fresh: int


class BoundRow(NamedTuple):
    """A row of ``slots`` that has a key."""

    slab_id: int
    number: int
    generation: int
    nbytes: int
    held_until: float


class Bound(NamedTuple):
    """What a ``BoundRow`` says: where the object of a key is, and until when that is leased."""

    binding: Binding
    held_until: float


SLAB = f"SELECT {', '.join(SlabRow._fields)} FROM slabs WHERE name = ?"
"""Gives a ``SlabRow``."""

BOUND = f"SELECT key, {', '.join(BoundRow._fields)} FROM slots WHERE key IN ({{}})"
"""Gives each key that is bound, then its ``BoundRow``; a mark for each key is filled in."""

UNBIND = "UPDATE slots SET key = NULL, generation = 0, pinned_until = NULL WHERE key IS NOT NULL "
"""Begins a statement that lets objects go; what follows says which."""

FREE = "UPDATE slots SET held_until = 0, generation = 0 WHERE slab_id = ? AND number = ?"
"""Ends a reservation."""
