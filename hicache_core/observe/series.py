"""A series: one metric, and the readers that take its samples from a snapshot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from hicache_core.histogram import Histogram
from hicache_core.observe.snapshot import (
    BREAKER_STATES,
    BackendStatus,
    CacheSnapshot,
    OperationStatus,
    PoolStatus,
    bounded,
)
from hicache_core.observe.windows import Observation

Kind = Literal["counter", "gauge", "histogram"]
Sample = tuple[tuple[str, ...], float | Histogram]
"""Values of the labels in order, and the value."""

MAX_BACKENDS = 8
MAX_OPERATIONS = 8
MAX_ERROR_KINDS = 24
MAX_NAMESPACES = 16
MAX_WORDS = 16  # causes, outcomes, kinds of rejected pages: short lists that the code itself fixes


Read = Callable[[Observation], Iterable[Sample]]


@dataclass(frozen=True)
class Series:
    """One metric.

    Attributes:
        name: without prefix; a counter ends in ``_total``.
        kind: type of the metric in Prometheus.
        unit: of its values.
        meaning: one sentence, shown by ``# HELP`` and in the docs.
        read: returns its samples; none if the cache does not have what it counts.
        labels: the values that each label can have.
        sglang: whether SGLang has a series of this name and meaning.
    """

    name: str
    kind: Kind
    unit: str
    meaning: str
    read: Read
    labels: Mapping[str, str] = field(default_factory=dict)
    sglang: bool = False


def counter(name: str, *, tokens: bool = False, labels: tuple[str, ...] = ()) -> Read:
    """Reads a counter of the controller.

    Args:
        name: of the counter.
        tokens: the counter is in pages; report it in tokens.
        labels: fixed values of the labels of the series.
    """

    def read(seen: Observation) -> Iterator[Sample]:
        value = seen.snapshot.counters.get(name)
        if value is not None:
            yield labels, value * (seen.snapshot.page_size if tokens else 1)

    return read


def moved_tokens(name: str, move: str) -> Read:
    """Reads a counter of copied tokens of full pages, and the tokens of each group's units.

    A snapshot of a state counts as one token.

    Args:
        name: of the counter.
        move: a key of ``GroupStatus.moved_units``.
    """

    def read(seen: Observation) -> Iterator[Sample]:
        value = seen.snapshot.counters.get(name)
        if value is not None:
            yield ("kv",), value
        for group in seen.snapshot.groups:
            if move in group.moved_units:
                yield (group.name,), group.moved_units[move] * group.unit_tokens

    return read


def moved_bytes(name: str, move: str) -> Read:
    """As ``moved_tokens``, in bytes of all pools together.

    Args:
        name: of the counter.
        move: a key of ``GroupStatus.moved_units``.
    """

    def read(seen: Observation) -> Iterator[Sample]:
        value, snapshot = seen.snapshot.counters.get(name), seen.snapshot
        if value is not None:
            of_units = sum(
                group.moved_units.get(move, 0) * group.unit_nbytes for group in snapshot.groups
            )
            yield (), value * snapshot.page_nbytes // snapshot.page_size + of_units

    return read


def words(get: Callable[[CacheSnapshot], Mapping[str, int]]) -> Read:
    """Reads a mapping whose keys are the one label."""
    return lambda seen: (((word,), n) for word, n in bounded(get(seen.snapshot), MAX_WORDS).items())


def device_tokens(get: Callable[[PoolStatus], int]) -> Read:
    """Reads a number of device pages as tokens."""

    def read(seen: Observation) -> Iterator[Sample]:
        yield (), get(seen.snapshot.device) * seen.snapshot.page_size

    return read


def host_tokens(get: Callable[[PoolStatus], int]) -> Read:
    """Reads a number of host pages as tokens; nothing without a host pool."""

    def read(seen: Observation) -> Iterator[Sample]:
        if seen.snapshot.host is not None:
            yield (), get(seen.snapshot.host) * seen.snapshot.page_size

    return read


def backends(get: Callable[[BackendStatus], float]) -> Read:
    """Reads one number of each storage backend."""
    return lambda seen: (
        ((backend.name,), get(backend)) for backend in seen.snapshot.backends[:MAX_BACKENDS]
    )


def histogram(get: Callable[[CacheSnapshot], Histogram | None]) -> Read:
    """Reads a histogram without labels."""

    def read(seen: Observation) -> Iterator[Sample]:
        histogram = get(seen.snapshot)
        if histogram is not None:
            yield (), histogram

    return read


def in_use(pool: PoolStatus) -> int:
    """Pages that are neither free nor could be evicted: SGLang's notion of used."""
    return pool.n_pages - pool.free_pages - (pool.evictable_pages or 0)


def token_usage(seen: Observation) -> Iterator[Sample]:
    """Share of device pages that are in use."""
    device = seen.snapshot.device
    yield (), in_use(device) / device.n_pages if device.n_pages else 0.0


def pool_pages(seen: Observation) -> Iterator[Sample]:
    """Pages of both pools, by state."""
    for tier, pool in (("device", seen.snapshot.device), ("host", seen.snapshot.host)):
        if pool is not None:
            yield (tier, "free"), pool.free_pages
            for state in ("locked", "in_flight", "evictable"):
                n_pages = getattr(pool, f"{state}_pages")
                if n_pages is not None:
                    yield (tier, state), n_pages


_EVICTED = (
    ("device", "evicted"),
    ("device", "flushed"),
    ("host", "evicted"),
    ("host", "flushed"),
    ("host", "stored"),
)


def evicted(seen: Observation) -> Iterator[Sample]:
    """Pages that left a tier, by cause."""
    tiers = ("device",) if seen.snapshot.host is None else ("device", "host")
    counts = {(tier, cause): 0 for tier, cause in _EVICTED if tier in tiers}
    for item in seen.snapshot.evicted_pages[: 3 * MAX_WORDS]:
        counts[item.tier, item.cause] = item.n_pages
    yield from counts.items()


def unfulfilled(seen: Observation) -> Iterator[Sample]:
    """Tokens that storage had but that were not loaded, by reason."""
    for reason, name in (
        ("storage_transfer", "prefetch_failed_pages"),
        ("host_capacity", "prefetch_dropped_pages"),
    ):
        yield from counter(name, tokens=True, labels=(reason,))(seen)


def dropped(seen: Observation) -> Iterator[Sample]:
    """Tokens that left the device without a host copy, by reason; nothing without a host pool."""
    if seen.snapshot.host is None:
        return
    for reason, name in (
        ("host_pressure", "write_back_lost_pages"),
        ("write_through_unbacked_eviction", "write_through_lost_pages"),
    ):
        yield from counter(name, tokens=True, labels=(reason, "kv"))(seen)


def operation_seconds(seen: Observation) -> Iterator[Sample]:
    """How long calls took, by backend and operation."""
    for backend in seen.snapshot.backends[:MAX_BACKENDS]:
        for operation in backend.operations[:MAX_OPERATIONS]:
            yield (backend.name, operation.op), operation.latency_s


def batches(op: str, get: Callable[[OperationStatus], Histogram | None]) -> Read:
    """Reads a histogram of the batches that one operation of each backend moved.

    Args:
        op: ``get`` or ``set``.
        get: the histogram.
    """

    def read(seen: Observation) -> Iterator[Sample]:
        for backend in seen.snapshot.backends[:MAX_BACKENDS]:
            for operation in backend.operations[:MAX_OPERATIONS]:
                found = get(operation) if operation.op == op else None
                if found is not None:
                    yield (backend.name,), found

    return read


_ERROR_KINDS = (
    "BackendCorrupt",
    "BackendDenied",
    "BackendFull",
    "BackendTimeout",
    "BackendUnavailable",
)
"""Errors that a store may raise; series that exist from the start show a rate at the first one."""


def errors(seen: Observation) -> Iterator[Sample]:
    """Failed calls by backend, operation and kind."""
    for backend in seen.snapshot.backends[:MAX_BACKENDS]:
        for operation in backend.operations[:MAX_OPERATIONS]:
            known = dict.fromkeys(_ERROR_KINDS, 0)
            for kind, n in bounded({**known, **operation.errors}, MAX_ERROR_KINDS).items():
                yield (backend.name, operation.op, kind), n


def breaker(seen: Observation) -> Iterator[Sample]:
    """Each state of each breaker: 1 for the current one, 0 for the others."""
    for backend in seen.snapshot.backends[:MAX_BACKENDS]:
        if backend.breaker:
            for state in BREAKER_STATES:
                yield (backend.name, state), float(backend.breaker == state)


def breaker_changes(seen: Observation) -> Iterator[Sample]:
    """How often each breaker entered each state."""
    for backend in seen.snapshot.backends[:MAX_BACKENDS]:
        for state in BREAKER_STATES:
            if backend.breaker:
                yield (backend.name, state), backend.breaker_changes.get(state, 0)


def usage(seen: Observation) -> Iterator[Sample]:
    """Stored bytes by backend and namespace."""
    for backend in seen.snapshot.backends[:MAX_BACKENDS]:
        largest = dict(sorted(backend.usage_nbytes.items(), key=lambda item: -item[1]))
        for namespace, nbytes in bounded(largest, MAX_NAMESPACES).items():
            yield (backend.name, namespace), nbytes


def events(name: str) -> Read:
    """Reads a number of the publisher of KV events."""

    def read(seen: Observation) -> Iterator[Sample]:
        if seen.snapshot.events is not None:
            yield (), getattr(seen.snapshot.events, name)

    return read
