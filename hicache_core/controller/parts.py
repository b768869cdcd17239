"""What a controller is made of. ``build`` chooses the parts; the controller's paths use them."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hicache_core.controller.explain import Explainer
from hicache_core.controller.jobs import JobTable
from hicache_core.controller.policies import NOWHERE, HostRetention, KeepOnHost, Policies
from hicache_core.controller.storage_tier import StorageTier
from hicache_core.copies.base import Transfer
from hicache_core.errors import IntegrityError
from hicache_core.histogram import Distribution
from hicache_core.observe.journal import Journal, PageRun
from hicache_core.observe.snapshot import EvictedPages
from hicache_core.observe.tracing import NoSpans, Spans
from hicache_core.pools.device import DevicePool
from hicache_core.pools.host import HostPool
from hicache_core.radix.holdings import Holdings
from hicache_core.radix.node import Node, descendants, path_to_root
from hicache_core.radix.tree import RadixTree
from hicache_core.types import Namespace, Tier

Clock = Callable[[], float]
"""Returns seconds since some fixed moment; never goes back."""

WAIT_BOUNDS_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
# Those of SGLang, so that a query for a bucket finds it.
EVICTION_BOUNDS_S = (
    0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.007, 0.008, 0.009, 0.01, 0.02, 0.03, 0.04, 0.05,
    0.1, 0.2, 0.5, 1.0,
)  # fmt: skip
BACKUP_BOUNDS_S = (
    0.001, 0.005, 0.01, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip


@dataclass(slots=True)
class Counters:
    """What happened since the start, in tokens, pages or events. The owner thread counts.

    Attributes:
        device_hit_tokens: tokens that ``match_prefix`` found on the device.
        host_hit_tokens: tokens that it found on the host.
        storage_loaded_tokens: tokens that storage delivered to the host.
        storage_hit_tokens: tokens that storage delivered to requests that waited for them.
        missed_tokens: tokens that no tier had, when matched.
        prefetch_found_pages: pages that storage said it had, before room was taken for them.
        prefetch_below_threshold: requests that missed too few tokens to ask storage.
        prefetch_failed_pages: pages that storage said it had and did not deliver.
        prefetch_dropped_pages: pages not loaded because the host had no room.
        prefetch_given_up: requests that went on before storage had delivered everything.
        backup_skipped_pages: pages not copied to the host because it had no room.
        stored_pages: pages that storage acknowledged.
        store_dropped_pages: pages not stored: the write queue was full, or storage refused them.
        store_skipped_pages: received pages not written because storage had them.
        evicted_device_pages: pages that left the device.
        write_back_lost_pages: of those, pages that were to be copied to the host before they left,
            and were not, since it had no room.
        write_through_lost_pages: of those, pages that left under ``write_through`` before the host
            had a copy.
        evicted_host_pages: pages that left the host.
        load_back_skipped_pages: host hits computed again because the device had no room.
        load_back_tokens: tokens copied from the host to the device.
        backup_tokens: tokens copied from the device to the host.
    """

    device_hit_tokens: int = 0
    host_hit_tokens: int = 0
    storage_loaded_tokens: int = 0
    storage_hit_tokens: int = 0
    missed_tokens: int = 0
    prefetch_found_pages: int = 0
    prefetch_below_threshold: int = 0
    prefetch_failed_pages: int = 0
    prefetch_dropped_pages: int = 0
    prefetch_given_up: int = 0
    backup_skipped_pages: int = 0
    stored_pages: int = 0
    store_dropped_pages: int = 0
    store_skipped_pages: int = 0
    evicted_device_pages: int = 0
    write_back_lost_pages: int = 0
    write_through_lost_pages: int = 0
    evicted_host_pages: int = 0
    load_back_skipped_pages: int = 0
    load_back_tokens: int = 0
    backup_tokens: int = 0


@dataclass(slots=True)
class Timings:
    """How long things took. The owner thread measures.

    Attributes:
        prefetch_wait_s: from a prefetch to its ``finish_prefetch``.
        load_back_s: from a load_back to its settlement.
        backup_s: from a backup to its settlement.
        eviction_s: of each eviction that freed device pages, copies that it waited for included.
    """

    prefetch_wait_s: Distribution = field(default_factory=lambda: Distribution(WAIT_BOUNDS_S))
    load_back_s: Distribution = field(default_factory=lambda: Distribution(WAIT_BOUNDS_S))
    backup_s: Distribution = field(default_factory=lambda: Distribution(BACKUP_BOUNDS_S))
    eviction_s: Distribution = field(default_factory=lambda: Distribution(EVICTION_BOUNDS_S))


class RemovalCounts:
    """Counts pages that leave a tier, by cause. The owner thread counts; any thread may read."""

    def __init__(self) -> None:
        """Starts at zero."""
        self._counts: dict[tuple[Tier, str], int] = {}

    def add(self, tier: Tier, cause: str, n_pages: int) -> None:
        """Counts ``n_pages`` that left ``tier``; ``cause`` is one word, such as ``evicted``."""
        key = (tier, cause)
        self._counts[key] = self._counts.get(key, 0) + n_pages

    def evicted_pages(self) -> Sequence[EvictedPages]:
        """The pages that have left so far."""
        counts = dict(self._counts)  # one step, so that it may grow meanwhile
        return [EvictedPages(tier.value, cause, n) for (tier, cause), n in counts.items()]


@dataclass(slots=True)
class GroupCounters:
    """What happened to one group of layers since the start. The owner thread counts.

    Attributes:
        loaded_units: copied from the host to the device.
        load_skipped_units: of host hits that were not used, since the device had no room.
        backup_units: copied from the device to the host.
        backup_skipped_units: not copied to the host, since it had no room.
        fetched_units: delivered by storage to the host.
        fetch_skipped_units: not read from storage, since the host had no room.
        stored_units: acknowledged by storage.
        store_dropped_units: not stored: the write queue was full, or storage refused them.
        cut_matches: matches that are shorter than their full pages, since units were missing.
        cut_tokens: tokens that these matches are shorter.
        removals: units that left a tier, by cause.
    """

    loaded_units: int = 0
    load_skipped_units: int = 0
    backup_units: int = 0
    backup_skipped_units: int = 0
    fetched_units: int = 0
    fetch_skipped_units: int = 0
    stored_units: int = 0
    store_dropped_units: int = 0
    cut_matches: int = 0
    cut_tokens: int = 0
    removals: RemovalCounts = field(default_factory=RemovalCounts)


@dataclass(frozen=True, eq=False)
class GroupParts:
    """The parts of one group of layers. Owner thread.

    Attributes:
        held: which nodes have units of it, and the allocators of its pools.
        device: its pool of the device.
        host: its pool of the host; None without a host tier.
        transfer: copies between the two; None without a host tier.
        counters: how often things happened.
    """

    held: Holdings
    device: DevicePool
    host: HostPool | None
    transfer: Transfer | None
    counters: GroupCounters = field(default_factory=GroupCounters)


@dataclass(frozen=True)
class Parts:
    """The parts of one cache. All but ``transfer`` belong to the owner thread.

    Attributes:
        page_size: tokens per page.
        tree: the prefix index.
        device: the L1 pool.
        host: the L2 pool; None for a cache of the device alone.
        transfer: copies between the two pools; None without a host pool.
        policies: what may change while requests run.
        jobs: all jobs that have not settled.
        storage: the L3 tier; None without a host pool.
        clock: the time; passed in so that tests can drive it.
        sleep: lets seconds pass when there is nothing to wait for.
        batch_pages: most pages of one storage job.
        retention: whether the host keeps what storage has.
        explainer: remembers why tokens were missed; None if that is switched off.
        removals: counts what leaves the tiers.
        journal: is told which pages the tiers gain and lose; None if nobody listens.
        spans: traces of what takes time.
        counters: how often things happened.
        timings: how long things took.
        groups: the groups of layers that need fewer pages than all, in the order of the spec.
    """

    page_size: int
    tree: RadixTree
    device: DevicePool
    host: HostPool | None
    transfer: Transfer | None
    policies: Policies
    jobs: JobTable
    storage: StorageTier | None
    clock: Clock = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    batch_pages: int = 128
    retention: HostRetention = field(default_factory=KeepOnHost)
    explainer: Explainer | None = None
    removals: RemovalCounts = field(default_factory=RemovalCounts)
    journal: Journal | None = None
    spans: Spans = field(default_factory=NoSpans)
    counters: Counters = field(default_factory=Counters)
    timings: Timings = field(default_factory=Timings)
    groups: tuple[GroupParts, ...] = ()

    def allocate_host(self, n_pages: int) -> array[int]:
        """Takes up to ``n_pages`` host pages. Evicts what may go, and never waits.

        Fewer pages, or none, come back when the rest of the host is locked or in flight. The caller
        goes on with what it gets, so a full host slows down nothing but the host tier.

        Returns:
            Page ids of the host pool, shape ``(n_taken,)``.
        """
        if self.host is None:
            return array("i")
        allocator = self.host.allocator
        while allocator.n_free < n_pages:
            victim = self.tree.host_victim(n_pages - allocator.n_free)
            if victim is None:
                break
            self.drop_host(victim, "evicted")
        return allocator.allocate(min(n_pages, allocator.n_free))

    def drop_host(self, node: Node, cause: str) -> None:
        """Frees the host pages of ``node``; ``cause`` is one word for metrics."""
        assert self.host is not None
        self.tell_removed(Tier.HOST, node, cause)
        dropped = self.tree.drop_host(node)
        self.host.allocator.free(dropped.host_pages)
        self.counters.evicted_host_pages += len(dropped.host_pages)

    @property
    def epoch(self) -> int:
        """Number of the attached storage, which ``Node.stored_in`` is compared with."""
        attached = None if self.storage is None else self.storage.current
        return NOWHERE if attached is None else attached.epoch

    def drop_device(
        self, node: Node, in_use: Callable[[array[int]], set[int]] = lambda _pages: set()
    ) -> int:
        """Frees the device pages of a node, and of nodes below it the pages that only the host has.

        Those go only if the node leaves the tree, because it has no host copy.

        Args:
            node: the node.
            in_use: says which of the host pages that leave the tree somebody else frees later.

        Returns:
            How many device pages were freed.
        """
        if not node.on_host:
            for below in descendants(node):
                if below.on_host:
                    self.tell_removed(Tier.HOST, below, "evicted")
        self.tell_removed(Tier.DEVICE, node, "evicted")
        dropped = self.tree.drop_device(node)
        self.device.allocator.free(dropped.device_pages)
        if dropped.host_pages:
            assert self.host is not None
            kept = in_use(dropped.host_pages)
            free = array("i", [page for page in dropped.host_pages if page not in kept])
            self.host.allocator.free(free)
            self.counters.evicted_host_pages += len(dropped.host_pages)
        self.counters.evicted_device_pages += len(dropped.device_pages)
        return len(dropped.device_pages)

    def check_integrity(self, n_orphaned: int) -> None:
        """Checks tree and pools, and that every page is free or has an owner; slow, for tests.

        Args:
            n_orphaned: host pages of unsettled stores and reads whose nodes have left the tree.

        Raises:
            IntegrityError: says what does not add up.
        """
        self.tree.check_integrity()
        for group in self.groups:
            held, name = group.held, group.held.group.name
            held.device.check_integrity(held.n_device_units, f"{name} on the device", exactly=False)
            if held.host is not None:
                held.host.check_integrity(held.n_host_units, f"{name} on the host", exactly=True)
        allocator = self.device.allocator
        allocator.check_integrity()
        n_allocated = allocator.n_pages - allocator.n_free
        if self.tree.n_device_pages > n_allocated:
            raise IntegrityError(
                f"the tree holds {self.tree.n_device_pages} device pages, but {n_allocated} are "
                "allocated"
            )
        if self.host is None:
            return
        allocator = self.host.allocator
        allocator.check_integrity()
        n_allocated = allocator.n_pages - allocator.n_free
        n_quarantined = 0 if self.storage is None else self.storage.quarantine.n_pages
        if self.tree.n_host_pages + n_quarantined + n_orphaned != n_allocated:
            raise IntegrityError(
                f"the tree holds {self.tree.n_host_pages} host pages, {n_quarantined} are in "
                f"quarantine and {n_orphaned} are being stored or read, but {n_allocated} are "
                "allocated"
            )

    def tell_namespace(self, seed: bytes, namespace: Namespace) -> None:
        """Tells the journal which namespace ``seed`` belongs to, before runs with it follow."""
        if seed and self.journal is not None and self.journal.hears_gains:
            self.journal.named(seed, namespace)

    def tell_stored(self, tier: Tier, node: Node) -> None:
        """Tells the journal that ``tier`` now holds the pages of ``node``."""
        if self.journal is not None and self.journal.hears_gains:
            self.journal.stored(tier, self.page_run(node))

    def tell_everything_again(self) -> None:
        """Tells the journal that storage is empty, and what device and host hold, once more."""
        if self.journal is None or not self.journal.hears_gains:
            return
        self.journal.cleared()
        for node in self.tree.nodes():
            if node.on_device and not node.device_pending:
                self.tell_stored(Tier.DEVICE, node)
            if node.on_host:
                self.tell_stored(Tier.HOST, node)

    def tell_removed(self, tier: Tier, node: Node, cause: str) -> None:
        """Counts, and tells the journal, that a tier is about to lose pages.

        Args:
            tier: the tier.
            node: whose pages leave it.
            cause: as in ``Journal.removed``.
        """
        self.removals.add(tier, cause, node.n_pages)
        if self.journal is not None:
            self.journal.removed(tier, self.page_run(node), cause)

    def page_run(self, node: Node) -> PageRun:
        """The pages of ``node`` for the journal. Computes their digests if they are not known."""
        digests = self.tree.digests(node)
        assert node.parent is not None
        seed = node.parent.key
        for above in path_to_root(node):
            assert above.parent is not None
            seed = above.parent.key
        parent = self.tree.last_digest(node.parent)
        return PageRun(parent, digests, node.tokens, seed, stored=bool(node.stored_in))
