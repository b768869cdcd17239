"""Snapshots for the tests of what operators see."""

from __future__ import annotations

from dataclasses import fields

from hicache_core.controller.parts import Counters
from hicache_core.histogram import Distribution, Histogram
from hicache_core.observe.snapshot import (
    BackendStatus,
    CacheSnapshot,
    EventsStatus,
    EvictedPages,
    GroupStatus,
    OperationStatus,
    PoolStatus,
    TransferStatus,
)

BOUNDS = (0.001, 0.01, 0.1, 1.0)


def histogram(*values: float) -> Histogram:
    """``values`` under ``BOUNDS``."""
    distribution = Distribution(BOUNDS)
    for value in values:
        distribution.add(value)
    return distribution.histogram()


def backend(name: str = "redis", **changed: object) -> BackendStatus:
    """A backend that has seen something of everything."""
    settings: dict[str, object] = {
        "breaker": "closed",
        "breaker_since_s": 12.3,
        "breaker_changes": {"open": 2, "half_open": 2, "closed": 2},
        "last_error": "BackendTimeout: redis://user:hunter2@host did not answer",
        "operations": (
            OperationStatus("exists", histogram(0.002, 0.003)),
            OperationStatus(
                "get", histogram(0.02, 0.5), {"BackendTimeout": 3}, histogram(2), histogram(0.3)
            ),
            OperationStatus("set", histogram(0.05), {"BackendFull": 1}, histogram(3), histogram(1)),
        ),
        "retries": 4,
        "short_circuits": 5,
        "negative_hits": 6,
        "stored_nbytes": 7_000,
        "loaded_nbytes": 8_000,
        "usage_nbytes": {"0011223344556677": 9_000},
    }
    return BackendStatus(name, **{**settings, **changed})  # type: ignore[arg-type]


def transfers(n: int = 1) -> TransferStatus:
    """A transfer backend that has moved something, ``n`` times."""
    return TransferStatus(
        backend="tcp",
        nbytes={"sent": 2000 * n, "received": 1000 * n},
        rows={"sent": 20 * n, "received": 10 * n},
        outcomes={"sent": 2 * n, "arrived": n, "failed": n},
        seconds=histogram(*[0.02] * n),
        in_flight={"sent": 1, "received": 0},
        connections=1,
    )


def group(name: str = "swa", window: int = 4096, unit_tokens: int = 16) -> GroupStatus:
    """A group of layers that has seen something of everything."""
    moves = ("load_back", "backup", "prefetch", "store")
    return GroupStatus(
        name,
        "window" if window else "state",
        window,
        unit_tokens,
        1 << 18,
        PoolStatus(20, 8, None, None, None, 10),
        PoolStatus(200, 80, None, None, None, 120),
        moved_units=dict(zip(moves, (1, 2, 3, 4), strict=True)),
        skipped_units=dict(zip(moves, (5, 6, 7, 8), strict=True)),
        cut_matches=9,
        cut_tokens=10,
        evicted_units=(EvictedPages("host", "evicted", 11),),
    )


def full_snapshot(**changed: object) -> CacheSnapshot:
    """A snapshot with every field filled; counters are 1, 2, 3, … in the order of their names."""
    names = [field.name for field in fields(Counters)]
    settings: dict[str, object] = {
        "device": PoolStatus(100, 40, 20, 10, 30),
        "host": PoolStatus(1000, 400, 200, 100, 300),
        "counters": {name: n for n, name in enumerate(names, 1)},
        "hit_tokens": {"device": 100, "host": 50, "storage": 25},
        "evicted_pages": (
            EvictedPages("device", "evicted", 11),
            EvictedPages("host", "corrupt", 1),
        ),
        "bytes_in_flight": {"read": 4096, "write": 8192},
        "queue_depths": {"exists": 1, "read": 2, "write": 3},
        "jobs_in_flight": {"storage": 6, "copy": 4},
        "overdue_jobs": 1,
        "quarantined_pages": 2,
        "backends": (backend(), backend("s3", breaker="open", next_probe_s=4.5)),
        "rejected_pages": {"corrupt": 2, "foreign": 1},
        "missed_tokens": {"never_seen": 100, "evicted": 20},
        "admission": {"all": 10, "part": 2, "none": 1},
        "prefetch_wait_s": histogram(0.02, 0.03),
        "load_back_s": histogram(0.0005),
        "backup_s": histogram(0.002),
        "eviction_s": histogram(0.001),
        "transfers": (transfers(),),
        "groups": (group(), group("mamba", 0, 1)),
        "events": EventsStatus(sent_batches=5, dropped_runs=0, queued_runs=1),
    }
    return CacheSnapshot(16, 1 << 20, **{**settings, **changed})  # type: ignore[arg-type]
