"""Possible faults in the index of a file backend; each query returns a row if there is one."""

from __future__ import annotations

from hicache_core.storage.file.records import BLOCK_NBYTES, MAX_KEY_NBYTES, OVERHEAD_NBYTES

_MOST = 1 << 53
_COUNTER = "(SELECT value FROM counters WHERE name = '{}')"

FAULTS = {
    "a counter is missing or not a number": (
        "SELECT 1 FROM (SELECT count(*) AS n, "
        f"sum(typeof(value) = 'integer' AND value BETWEEN 0 AND {_MOST}) AS good FROM counters "
        "WHERE name IN ('seq', 'epoch', 'segment', 'owner', 'held', 'complete')) "
        "WHERE n != 6 OR good != 6"
    ),
    "a segment has an invalid length or number": (
        f"SELECT 1 FROM segments WHERE typeof(end) != 'integer' OR end < {BLOCK_NBYTES} "
        f"OR end % {BLOCK_NBYTES} OR segment NOT BETWEEN 0 AND {0xFFFFFFFF}"
    ),
    "an extent lies outside its segment": (
        "SELECT 1 FROM extents LEFT JOIN segments USING (segment) WHERE end IS NULL "
        "OR typeof(offset) != 'integer' OR typeof(capacity) != 'integer' "
        f"OR offset < {BLOCK_NBYTES} OR offset % {BLOCK_NBYTES} "
        f"OR capacity < {BLOCK_NBYTES} OR capacity % {BLOCK_NBYTES} OR offset + capacity > end"
    ),
    "two extents overlap": (
        "SELECT 1 FROM (SELECT offset, lag(offset + capacity) OVER "
        "(PARTITION BY segment ORDER BY offset) AS before FROM extents) WHERE offset < before"
    ),
    "an object has invalid values": (
        # In order of the table: along the index of keys each row would be looked up on its own.
        "SELECT 1 FROM extents NOT INDEXED WHERE key IS NOT NULL AND (typeof(key) != 'text' "
        f"OR length(key) NOT BETWEEN 1 AND {MAX_KEY_NBYTES} OR owner IS NOT NULL "
        "OR typeof(nbytes) != 'integer' OR nbytes < 0 "
        f"OR nbytes + {OVERHEAD_NBYTES} > capacity OR typeof(written_at) != 'real' "
        "OR typeof(used_at) != 'real')"
    ),
    "a claim has no owner": (
        "SELECT 1 FROM extents WHERE owner IS NOT NULL AND owner NOT IN (SELECT owner FROM owners)"
    ),
    "a change has an invalid number": (
        "SELECT 1 FROM extents WHERE typeof(seq) != 'integer' OR typeof(generation) != 'integer' "
        f"OR seq NOT BETWEEN 0 AND {_COUNTER.format('seq')} "
        f"OR generation NOT BETWEEN 0 AND {_COUNTER.format('seq')} "
        "OR typeof(pinned_until) NOT IN ('null', 'real')"
    ),
    "an owner or a segment has a number that has not been assigned yet": (
        f"SELECT 1 FROM owners WHERE owner NOT BETWEEN 1 AND {_COUNTER.format('owner')} "
        f"UNION ALL SELECT 1 FROM segments WHERE segment > {_COUNTER.format('segment')}"
    ),
    "the sum of the extents is wrong": (
        "SELECT 1 FROM (SELECT coalesce(sum(capacity), 0) AS n FROM extents) "
        f"WHERE n != {_COUNTER.format('held')}"
    ),
}
