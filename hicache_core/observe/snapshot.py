"""The snapshot: the state of a cache as frozen data, for metrics and for ``hicache status``.

A field that a cache cannot fill stays empty, and its series are then absent: a metric is never 0
only because nothing was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hicache_core.histogram import Histogram

BREAKER_STATES = ("closed", "open", "half_open")
"""The values of ``BackendStatus.breaker``, besides an empty text."""

OTHER = "other"
"""The label for everything beyond a bounded number of labels."""


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """Pages of one pool; free + cached + held by requests = all.

    Attributes:
        n_pages: all pages.
        free_pages: pages without an owner.
        locked_pages: cached pages that a request uses, so that they cannot be evicted now.
        in_flight_pages: pages that a copy or a storage job reads or writes.
        evictable_pages: cached pages that can be evicted. These three are None if not counted.
        cached_pages: pages in the prefix tree, even while they are copied or read.
    """

    n_pages: int
    free_pages: int
    locked_pages: int | None
    in_flight_pages: int | None
    evictable_pages: int | None
    cached_pages: int | None = None

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
        pages: pages of each batch that was moved; None if nobody counts them.
        gib_per_s: GiB per second of each of these batches, likewise.
    """

    op: str
    latency_s: Histogram
    errors: Mapping[str, int] = field(default_factory=dict)
    pages: Histogram | None = None
    gib_per_s: Histogram | None = None


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """One storage backend, and what its guard knows about it.

    Attributes:
        name: the backend's name, unique in its chain.
        breaker: ``closed``, ``open`` or ``half_open``; empty without a breaker.
        breaker_since_s: seconds since it entered that state.
        breaker_changes: how often it entered each state.
        next_probe_s: seconds until an open breaker lets a probe through; otherwise 0.
        last_error: the last failure; empty if there was none.
        operations: one item for each operation.
        retries: calls that were retried.
        short_circuits: calls not made because the breaker was open.
        negative_hits: pages not requested because they failed to load a moment ago.
        stored_nbytes: bytes that the store acknowledged.
        loaded_nbytes: bytes that it delivered.
        usage_nbytes: stored bytes by namespace, as far as the store knows.
        read_only: whether nothing is stored there.
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
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class EventsStatus:
    """What the publisher of KV events did.

    Attributes:
        sent_batches: batches handed to the socket.
        dropped_runs: runs of pages dropped because the queue was full.
        queued_runs: runs waiting to be sent.
    """

    sent_batches: int
    dropped_runs: int
    queued_runs: int


@dataclass(frozen=True, slots=True)
class TransferStatus:
    """What a transfer backend moved between prefill and decode nodes.

    Attributes:
        backend: its name.
        nbytes: bytes of KV in transfers that have ended, by ``sent`` and ``received``.
        rows: the same in rows; a row is one token of one layer, with all heads of the rank.
        outcomes: transfers that have ended, by ``sent``, ``arrived`` and ``failed``.
        seconds: from offering KV (prefill) or asking for it (decode) to the end of each transfer.
        in_flight: transfers that have not ended, by ``sent`` and ``received``.
        connections: open connections; None if the backend does not know.
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
class GroupStatus:
    """One group of layers that needs other pages of a prefix than all: a window or a state.

    Attributes:
        name: of the group, such as ``swa`` or ``mamba``.
        kind: ``window`` or ``state``.
        window: tokens of a window; 0 for a state.
        unit_tokens: tokens of a unit of a window; 1 for a state, whose unit is a snapshot.
        unit_nbytes: bytes of a unit on this rank.
        device: units in the L1 pool.
        host: units in the L2 pool; None without one.
        moved_units: units that were moved, by ``load_back``, ``backup``, ``prefetch``, ``store``.
        skipped_units: units that were not, since there was no room, by the same words; also those
            that storage refused.
        cut_matches: matches that are shorter than their full pages, since units were missing.
        cut_tokens: tokens that these matches are shorter.
        evicted_units: by tier and cause.
    """

    name: str
    kind: str
    window: int
    unit_tokens: int
    unit_nbytes: int
    device: PoolStatus
    host: PoolStatus | None = None
    moved_units: Mapping[str, int] = field(default_factory=dict)
    skipped_units: Mapping[str, int] = field(default_factory=dict)
    cut_matches: int = 0
    cut_tokens: int = 0
    evicted_units: Sequence[EvictedPages] = ()


@dataclass(frozen=True, slots=True)
class CacheSnapshot:
    """The state of a cache. Taken on any thread, so its numbers may be from slightly different
    moments.

    Attributes:
        page_size: tokens in a page.
        page_nbytes: bytes of a page's KV on this rank.
        device: the L1 pool.
        host: the L2 pool; None without one.
        counters: the fields of ``controller.parts.Counters`` by name.
        hit_tokens: cached tokens by tier, disjoint: ``device``, ``host``, ``storage`` (tokens that
            storage delivered to the host for this request).
        evicted_pages: by tier and cause.
        bytes_in_flight: bytes of queued and running storage jobs, by ``read`` and ``write``.
        queue_depths: queued storage jobs, by ``exists``, ``read`` and ``write``.
        jobs_in_flight: jobs that are not settled yet, by ``storage`` and ``copy``.
        overdue_jobs: jobs that are running past their deadline.
        quarantined_pages: host pages that a stuck job may still access.
        draining_backends: detached storage backends whose last jobs have not ended.
        backends: the storage backends in the order they are asked.
        rejected_pages: objects rejected on reading, by kind: ``corrupt``, ``foreign``, …
        admission: decisions of the admission policy, by outcome.
        missed_tokens: computed tokens, by the reason why they were missed.
        prefetch_wait_s: seconds that each request waited for storage.
        load_back_s: seconds of each copy of a request from host to device.
        backup_s: seconds of each copy from device to host; None without a host pool.
        eviction_s: seconds of each eviction that freed device pages.
        events: the publisher of KV events; None if there is none.
        transfers: the transfer backend of a prefill or decode node; otherwise empty.
        groups: the model's groups of layers, in the order of its spec; empty for full attention.
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
    draining_backends: int = 0
    backends: Sequence[BackendStatus] = ()
    rejected_pages: Mapping[str, int] = field(default_factory=dict)
    admission: Mapping[str, int] = field(default_factory=dict)
    missed_tokens: Mapping[str, int] = field(default_factory=dict)
    prefetch_wait_s: Histogram | None = None
    load_back_s: Histogram | None = None
    backup_s: Histogram | None = None
    eviction_s: Histogram | None = None
    events: EventsStatus | None = None
    transfers: Sequence[TransferStatus] = ()
    groups: Sequence[GroupStatus] = ()

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
        """Number of lookups in all backends."""
        return sum(
            operation.latency_s.n
            for backend in self.backends
            for operation in backend.operations
            if operation.op.endswith("exists")
        )


def bounded(counts: Mapping[str, int], limit: int) -> dict[str, int]:
    """``counts`` with at most ``limit`` labels; ``OTHER`` has the sum of the rest.

    The first labels stay, so that a counter under a label never shrinks.
    """
    items = list(counts.items())
    kept = dict(items[:limit])
    rest = items[limit:]
    if rest:
        kept[OTHER] = kept.get(OTHER, 0) + sum(n for _, n in rest)
    return kept
