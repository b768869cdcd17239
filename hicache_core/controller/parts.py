"""What the controller is made of; chosen in ``build.py``, handed to both paths."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

from hicache_core.controller.jobs import JobTable
from hicache_core.controller.prefetch_policy import PrefetchPolicy
from hicache_core.controller.write_policy import WritePolicy
from hicache_core.pools.device import DevicePool
from hicache_core.pools.host import HostPool
from hicache_core.radix.tree import RadixTree
from hicache_core.storage.base import StorageBackend
from hicache_core.storage.worker import StorageWorker
from hicache_core.transfer.base import Transfer

Clock = Callable[[], float]
"""Seconds since any fixed moment; never goes back."""


@dataclass(slots=True)
class Counters:
    """What happened since the start, in tokens, pages or events; owner thread only.

    Attributes:
        device_hit_tokens: tokens that ``match_prefix`` found on the device.
        host_hit_tokens: tokens that it found on the host.
        storage_loaded_tokens: tokens that storage delivered to the host.
        missed_tokens: tokens that no tier had, when matched.
        prefetch_below_threshold: requests whose missing part was too short to ask storage for.
        prefetch_failed_pages: pages that ``exists`` promised and the read did not deliver.
        prefetch_dropped_pages: pages not loaded, since the host had no room.
        prefetch_given_up: requests that went on before storage had delivered everything.
        backup_skipped_pages: pages not copied to the host, since it had no room.
        stored_pages: pages that storage acknowledged.
        store_dropped_pages: pages not offered to storage (write queue full) or not taken by it.
        evicted_device_pages: pages that left the device.
        evicted_host_pages: pages that left the host.
        load_back_skipped_pages: host hits computed again, since the device had no room.
    """

    device_hit_tokens: int = 0
    host_hit_tokens: int = 0
    storage_loaded_tokens: int = 0
    missed_tokens: int = 0
    prefetch_below_threshold: int = 0
    prefetch_failed_pages: int = 0
    prefetch_dropped_pages: int = 0
    prefetch_given_up: int = 0
    backup_skipped_pages: int = 0
    stored_pages: int = 0
    store_dropped_pages: int = 0
    evicted_device_pages: int = 0
    evicted_host_pages: int = 0
    load_back_skipped_pages: int = 0


@dataclass(frozen=True)
class Parts:
    """The pieces of one cache; all but ``transfer`` and ``worker`` belong to the owner thread.

    Attributes:
        page_size: tokens a page.
        tree: the prefix index.
        device: the L1 pool.
        host: the L2 pool; None for a cache of the device alone.
        transfer: copies between the two; None without a host pool.
        write_policy: when pages go down.
        prefetch_policy: when a request stops waiting for storage.
        jobs: everything under way.
        storage_namespace: prefix of every storage key.
        prefetch_threshold: tokens that must be missing before storage is asked.
        backend: the storage backend with what stands around it; None without storage.
        worker: runs storage jobs on it.
        clock: the time, passed in so that tests can drive it.
        batch_pages: pages of one storage job at most.
        counters: what happened so far.
    """

    page_size: int
    tree: RadixTree
    device: DevicePool
    host: HostPool | None
    transfer: Transfer | None
    write_policy: WritePolicy
    prefetch_policy: PrefetchPolicy
    jobs: JobTable
    storage_namespace: str
    prefetch_threshold: int
    backend: StorageBackend | None = None
    worker: StorageWorker | None = None
    clock: Clock = time.monotonic
    batch_pages: int = 128
    counters: Counters = field(default_factory=Counters)

    def allocate_host(self, n_pages: int) -> array[int]:
        """Up to ``n_pages`` host pages; evicts what may go, never waits.

        Fewer (or none) come back when the rest of the host is locked or in flight: the caller takes
        what it gets, so host pressure can slow nothing down but the tier itself.
        """
        if self.host is None:
            return array("i")
        allocator = self.host.allocator
        while allocator.n_free < n_pages:
            victim = self.tree.host_victim(n_pages - allocator.n_free)
            if victim is None:
                break
            dropped = self.tree.drop_host(victim)
            allocator.free(dropped.host_pages)
            self.device.allocator.free(dropped.device_pages)
            self.counters.evicted_host_pages += len(dropped.host_pages)
        return allocator.allocate(min(n_pages, allocator.n_free))
