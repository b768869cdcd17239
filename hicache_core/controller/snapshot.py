"""Takes the snapshot of a cache that metrics and ``hicache status`` are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict

from hicache_core.controller.attachment import Attachment
from hicache_core.controller.parts import GroupParts, Parts
from hicache_core.controller.prefetch import PrefetchPath
from hicache_core.controller.write_path import WritePath
from hicache_core.observe.snapshot import CacheSnapshot, GroupStatus, PoolStatus
from hicache_core.pools.host import HostPool
from hicache_core.pools.pins import PinnedUnits
from hicache_core.radix.tree import RadixTree


def take_snapshot(
    parts: Parts, write_path: WritePath, prefetch_path: PrefetchPath | None
) -> CacheSnapshot:
    """Takes one look at the cache. Any thread; without a lock, so numbers may be an instant apart.

    Args:
        parts: of the cache.
        write_path: what goes down.
        prefetch_path: what comes from storage; None without storage.
    """
    storage = parts.storage
    attachments = [] if storage is None else storage.attachments
    in_flight: Counter[str] = Counter()
    depths: Counter[str] = Counter()
    for attachment in attachments:
        worker = attachment.worker
        depths.update(dict(worker.depths))
        in_flight["read"] += worker.read_nbytes_in_flight
        in_flight["write"] += worker.write_nbytes_in_flight
    counters = parts.counters
    n_storage = min(counters.storage_hit_tokens, counters.host_hit_tokens)
    n_reading = 0 if prefetch_path is None else prefetch_path.n_pending_pages
    current = None if storage is None else storage.current
    return CacheSnapshot(
        page_size=parts.page_size,
        page_nbytes=parts.device.spec.page_nbytes(parts.page_size),
        device=_device(parts),
        host=None
        if parts.host is None
        else _host(parts.host, parts.tree, n_reading + write_path.n_pages),
        counters=asdict(counters),
        hit_tokens={
            "device": counters.device_hit_tokens,
            "host": counters.host_hit_tokens - n_storage,
            "storage": n_storage,
        },
        evicted_pages=parts.removals.evicted_pages(),
        bytes_in_flight=dict(in_flight),
        queue_depths=dict(depths),
        jobs_in_flight={
            "copy": parts.jobs.n_copies,
            "storage": parts.jobs.n_jobs - parts.jobs.n_copies,
        },
        overdue_jobs=sum(attachment.worker.n_overdue for attachment in attachments),
        quarantined_pages=0 if storage is None else storage.quarantine.n_pages,
        draining_backends=len(attachments) - (current is not None),
        backends=[] if current is None else current.statuses(),
        rejected_pages=_rejected(attachments),
        admission={} if current is None else dict(current.admission.decisions),
        missed_tokens={} if parts.explainer is None else dict(parts.explainer.missed_tokens),
        prefetch_wait_s=parts.timings.prefetch_wait_s.histogram(),
        load_back_s=parts.timings.load_back_s.histogram(),
        backup_s=None if parts.host is None else parts.timings.backup_s.histogram(),
        eviction_s=parts.timings.eviction_s.histogram(),
        groups=[_group(group, parts) for group in parts.groups],
    )


def _group(parts: GroupParts, cache: Parts) -> GroupStatus:
    held, counters = parts.held, parts.counters
    group = held.group
    moved = {"load_back": counters.loaded_units, "backup": counters.backup_units}
    skipped = {
        "load_back": counters.load_skipped_units,
        "backup": counters.backup_skipped_units,
    }
    if cache.storage is not None:
        moved |= {"prefetch": counters.fetched_units, "store": counters.stored_units}
        skipped |= {
            "prefetch": counters.fetch_skipped_units,
            "store": counters.store_dropped_units,
        }
    return GroupStatus(
        name=group.name,
        kind=group.kind.value,
        window=group.window,
        unit_tokens=group.page_size(cache.page_size),
        unit_nbytes=group.spec.page_nbytes(group.page_size(cache.page_size)),
        device=_units(held.device, held.n_device_units),
        host=None if held.host is None else _units(held.host, held.n_host_units),
        moved_units={} if held.host is None else moved,
        skipped_units={} if held.host is None else skipped,
        cut_matches=counters.cut_matches,
        cut_tokens=counters.cut_tokens,
        evicted_units=counters.removals.evicted_pages(),
    )


def _units(pool: PinnedUnits, n_cached: int) -> PoolStatus:
    return PoolStatus(
        n_pages=pool.n_units,
        free_pages=pool.n_free,
        locked_pages=None,
        in_flight_pages=None,
        evictable_pages=None,
        cached_pages=n_cached,
    )


def _device(parts: Parts) -> PoolStatus:
    allocator, tree = parts.device.allocator, parts.tree
    n_evictable = tree.n_evictable_device_pages
    return PoolStatus(
        n_pages=allocator.n_pages,
        free_pages=allocator.n_free,
        locked_pages=allocator.n_pages - allocator.n_free - n_evictable,
        in_flight_pages=None,
        evictable_pages=n_evictable,
        cached_pages=tree.n_device_pages,
    )


def _host(host: HostPool, tree: RadixTree, n_in_flight: int) -> PoolStatus:
    allocator = host.allocator
    return PoolStatus(
        n_pages=allocator.n_pages,
        free_pages=allocator.n_free,
        locked_pages=None,
        in_flight_pages=n_in_flight,
        evictable_pages=None,
        cached_pages=tree.n_host_pages,
    )


def _rejected(attachments: Iterable[Attachment]) -> Mapping[str, int]:
    counts: Counter[str] = Counter()
    for attachment in attachments:
        counts.update(attachment.rejected())
    return dict(counts)
