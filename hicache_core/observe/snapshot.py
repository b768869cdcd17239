"""The snapshot: one look at a cache, as frozen data, for metrics and for ``hicache status``.

A field that a cache cannot fill stays empty, and its
series are then absent: a metric never stands at a zero that nobody measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hicache_core.histogram import Histogram

BREAKER_STATES = ("closed", "open", "half_open")
"""What ``BackendStatus.breaker`` may say, besides nothing."""

OTHER = "other"
"""The label that everything beyond a bounded number of labels goes under."""


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """Pages of one pool; free + cached + held by requests = all.

    Attributes:
        n_pages: all of them.
        free_pages: without an owner.
        locked_pages: cached, and kept for a request: may not be evicted now.
        in_flight_pages: a copy or a storage job reads or writes them.
        evictable_pages: cached and free to go. These three are None where nobody counts them.
    """

    n_pages: int
    free_pages: int
    locked_pages: int | None
    in_flight_pages: int | None
    evictable_pages: int | None

    @property
    def used_pages(self) -> int:
        """Pages with an owner."""
        return self.n_pages - self.free_pages


@dataclass(frozen=True, slots=True)
class OperationStatus:
    """One operation of one storage backend.

    Attributes:
        op: ``exists``, ``get``, ``set``, …
        latency_s: seconds of each call that reached the store.
        errors: failed calls by kind, which is the class name of the error.
    """

    op: str
    latency_s: Histogram
    errors: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """One storage backend and what its guard knows of it.

    Attributes:
        name: the backend's name, unique in its chain.
        breaker: ``closed``, ``open`` or ``half_open``; empty without a breaker.
        breaker_since_s: seconds since it came into that state.
        breaker_changes: how often it came into each state.
        next_probe_s: seconds until an open breaker lets a probe through; else 0.
        last_error: the failure that was seen last; empty if there was none.
        operations: one for each operation.
        retries: calls that were repeated.
        short_circuits: calls not made, since the breaker was open.
        negative_hits: pages not asked for, since they failed to load a moment ago.
        stored_nbytes: bytes that the store acknowledged.
        loaded_nbytes: bytes that it delivered.
        usage_nbytes: stored bytes by namespace, as far as the store knows.
    """

    name: str
    breaker: str = ""
    breaker_since_s: float = 0.0
    breaker_changes: Mapping[str, int] = field(default_factory=dict)
    next_probe_s: float = 0.0
    last_error: str = ""
    operations: Sequence[OperationStatus] = ()
    retries: int = 0
    short_circuits: int = 0
    negative_hits: int = 0
    stored_nbytes: int = 0
    loaded_nbytes: int = 0
    usage_nbytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EventsStatus:
    """What the publisher of KV events did.

    Attributes:
        sent_batches: batches handed to the socket.
        dropped_runs: runs of pages given up because the queue was full.
        queued_runs: runs that wait to be sent.
    """

    sent_batches: int
    dropped_runs: int
    queued_runs: int


@dataclass(frozen=True, slots=True)
class TransferStatus:
    """What a transfer backend moved between prefill and decode nodes.

    Attributes:
        backend: its name.
        nbytes: of KV, by ``sent`` and ``received``, in transfers that have ended.
        rows: the same in rows: a token of a layer, with all heads of the rank.
        outcomes: transfers that have ended by ``sent``, ``arrived`` and ``failed``.
        seconds: from the offer or the demand to the end of each.
        in_flight: transfers that have not ended, by ``sent`` and ``received``.
        connections: that are open; None if the backend does not know.
    """

    backend: str
    nbytes: Mapping[str, int]
    rows: Mapping[str, int]
    outcomes: Mapping[str, int]
    seconds: Histogram
    in_flight: Mapping[str, int]
    connections: int | None


@dataclass(frozen=True, slots=True)
class EvictedPages:
    """Pages that left a tier, by cause (``evicted``, ``corrupt``, …)."""

    tier: str
    cause: str
    n_pages: int


@dataclass(frozen=True, slots=True)
class CacheSnapshot:
    """One look at a cache. Taken from any thread, so single numbers may be an instant apart.

    Attributes:
        page_size: tokens a page.
        page_nbytes: bytes of a page's KV on this rank.
        device: the L1 pool.
        host: the L2 pool; None without one.
        counters: the fields of ``controller.parts.Counters`` by name.
        hit_tokens: tokens served by tier, disjoint: ``device``, ``host``, ``storage`` (what storage
            had delivered to the host for this very hit).
        evicted_pages: by tier and cause.
        bytes_in_flight: of storage jobs under way, by ``read`` and ``write``.
        queue_depths: waiting storage jobs by ``exists``, ``read`` and ``write``.
        jobs_in_flight: jobs not yet settled: ``storage``, ``copy``.
        overdue_jobs: jobs that run beyond their deadline now.
        quarantined_pages: host pages that a stuck job may still touch.
        backends: the storage backends in the order they are asked.
        rejected_pages: objects refused on read by kind: ``corrupt``, ``foreign``, …
        admission: decisions of the admission policy by outcome.
        missed_tokens: computed tokens by the reason why they were missed.
        prefetch_wait_s: seconds that each request waited for storage.
        load_back_s: seconds of each copy of a request from host to device.
        events: the publisher of KV events; None without one.
        transfers: one for the transfer backend of a prefill or decode node, else none.
    """

    page_size: int
    page_nbytes: int
    device: PoolStatus
    host: PoolStatus | None = None
    counters: Mapping[str, int] = field(default_factory=dict)
    hit_tokens: Mapping[str, int] = field(default_factory=dict)
    evicted_pages: Sequence[EvictedPages] = ()
    bytes_in_flight: Mapping[str, int] = field(default_factory=dict)
    queue_depths: Mapping[str, int] = field(default_factory=dict)
    jobs_in_flight: Mapping[str, int] = field(default_factory=dict)
    overdue_jobs: int = 0
    quarantined_pages: int = 0
    backends: Sequence[BackendStatus] = ()
    rejected_pages: Mapping[str, int] = field(default_factory=dict)
    admission: Mapping[str, int] = field(default_factory=dict)
    missed_tokens: Mapping[str, int] = field(default_factory=dict)
    prefetch_wait_s: Histogram | None = None
    load_back_s: Histogram | None = None
    events: EventsStatus | None = None
    transfers: Sequence[TransferStatus] = ()

    @property
    def stored_nbytes(self) -> int:
        """Bytes that all backends acknowledged."""
        return sum(backend.stored_nbytes for backend in self.backends)

    @property
    def loaded_nbytes(self) -> int:
        """Bytes that all backends delivered."""
        return sum(backend.loaded_nbytes for backend in self.backends)

    @property
    def questions(self) -> int:
        """How often any backend was asked what it has."""
        return sum(
            operation.latency_s.n
            for backend in self.backends
            for operation in backend.operations
            if operation.op.endswith("exists")
        )


def bounded(counts: Mapping[str, int], limit: int) -> dict[str, int]:
    """``counts`` under at most ``limit`` labels and ``OTHER``, which sums up the rest.

    The first labels keep theirs, so that a counter under a label never shrinks.
    """
    items = list(counts.items())
    kept = dict(items[:limit])
    rest = items[limit:]
    if rest:
        kept[OTHER] = kept.get(OTHER, 0) + sum(n for _, n in rest)
    return kept
