"""The part of the catalogue on groups of layers: windows and states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from hicache_core.observe.series import Read, Sample, Series
from hicache_core.observe.snapshot import GroupStatus
from hicache_core.observe.windows import Observation

GROUP = {"group": "`swa`, `mamba`, …: as the model's spec names it"}
MOVES = "`load_back` (host to device), `backup` (device to host)"
MOVE = {**GROUP, "move": f"{MOVES}, `prefetch` (storage to host), `store` (host to storage)"}


def _one(get: Callable[[GroupStatus], int]) -> Read:
    return lambda seen: (((group.name,), get(group)) for group in seen.snapshot.groups)


def _words(get: Callable[[GroupStatus], Mapping[str, int]]) -> Read:
    """Reads a mapping whose keys are the second label."""

    def read(seen: Observation) -> Iterator[Sample]:
        for group in seen.snapshot.groups:
            for word, n in get(group).items():
                yield (group.name, word), n

    return read


def _units(seen: Observation) -> Iterator[Sample]:
    """Units of both pools by state; the states add up to all units."""
    for group in seen.snapshot.groups:
        for tier, pool in (("device", group.device), ("host", group.host)):
            if pool is not None:
                cached = pool.cached_pages or 0
                yield (group.name, tier, "free"), pool.free_pages
                yield (group.name, tier, "cached"), cached
                yield (group.name, tier, "in_use"), max(0, pool.used_pages - cached)


_CAUSES = (
    ("device", "evicted"),
    ("device", "flushed"),
    ("device", "outside_window"),
    ("host", "evicted"),
    ("host", "flushed"),
    ("host", "stored"),
)


def _evicted(seen: Observation) -> Iterator[Sample]:
    for group in seen.snapshot.groups:
        tiers = ("device",) if group.host is None else ("device", "host")
        counts = {
            (tier, cause): 0
            for tier, cause in _CAUSES
            if tier in tiers and (cause != "outside_window" or group.window)
        }
        for item in group.evicted_units:
            counts[item.tier, item.cause] = item.n_pages
        for (tier, cause), n in counts.items():
            yield (group.name, tier, cause), n


GROUPS = (
    Series(
        "group_units",
        "gauge",
        "units",
        "Units of a group by state; the states add up to the pool.",
        _units,
        {
            **GROUP,
            "tier": "`device`, `host`",
            "state": "`free`, `cached` (in the tree), `in_use` (of requests and copies alone)",
        },
    ),
    Series(
        "group_unit_bytes",
        "gauge",
        "bytes",
        "Bytes of one unit on this rank: a page of a window, or a snapshot of a state.",
        _one(lambda group: group.unit_nbytes),
        GROUP,
    ),
    Series(
        "group_moved_units_total",
        "counter",
        "units",
        "Units moved from one tier to another.",
        _words(lambda group: group.moved_units),
        MOVE,
    ),
    Series(
        "group_skipped_units_total",
        "counter",
        "units",
        "Units not moved because there was no room; `store`: also those that storage refused.",
        _words(lambda group: group.skipped_units),
        MOVE,
    ),
    Series(
        "group_evicted_units_total",
        "counter",
        "units",
        "Units that left a tier, by cause.",
        _evicted,
        {
            **GROUP,
            "tier": "`device`, `host`",
            "cause": "`evicted`, `flushed`, `stored` (the host freed units that storage has), "
            "`outside_window` (no prefix needs them on the device)",
        },
    ),
    Series(
        "group_cut_matches_total",
        "counter",
        "matches",
        "Matches that are shorter than their full pages because units of the group were missing.",
        _one(lambda group: group.cut_matches),
        GROUP,
    ),
    Series(
        "group_cut_tokens_total",
        "counter",
        "tokens",
        "Tokens that these matches are shorter.",
        _one(lambda group: group.cut_tokens),
        GROUP,
    ),
)
