"""The evictor frees device pages: which leave, which are copied first, what it waits for."""

from __future__ import annotations

from collections.abc import Callable

from hicache_core.controller.parts import Parts
from hicache_core.controller.prefetch import PrefetchPath
from hicache_core.controller.write_path import WritePath
from hicache_core.radix.node import Node
from hicache_core.types import Tier


class Evictor:
    """Frees device pages. Owner thread only; all ranks decide alike."""

    def __init__(
        self,
        parts: Parts,
        write_path: WritePath,
        prefetch_path: PrefetchPath | None,
        poll: Callable[[], object],
    ) -> None:
        """Makes the evictor of one cache.

        Args:
            parts: of the cache.
            write_path: copies pages to the host before they leave.
            prefetch_path: the reads from storage; None without storage.
            poll: settles what has finished, on all ranks.
        """
        self._parts = parts
        self._prefetch_path = prefetch_path
        self._write_path = write_path
        self._poll = poll

    def evict(self, n_pages: int) -> int:
        """See ``Controller.evict``."""
        parts = self._parts
        started_s = parts.clock()
        n_freed = self._free(n_pages)
        if n_freed:
            parts.timings.eviction_s.add(parts.clock() - started_s)
        return n_freed

    def _free(self, n_pages: int) -> int:
        parts = self._parts
        n_freed = n_on_their_way = 0
        while n_freed < n_pages:
            n_wanted = n_pages - n_freed - n_on_their_way
            n_sent = self._send_to_host(n_wanted) if n_wanted > 0 else 0
            if n_sent:
                n_on_their_way += n_sent
            elif n_wanted > 0 and (victim := parts.tree.device_victim(n_wanted)) is not None:
                self._count_lost(victim)
                n_freed += parts.drop_device(victim)
            elif self.wait_for_copy():
                n_on_their_way = 0
            elif (n_dropped := self._drop_what_is_being_stored(n_pages - n_freed)) > 0:
                n_freed += n_dropped
            elif self._prefetch_path is None or not self._prefetch_path.orphan():
                break
        return n_freed

    def _send_to_host(self, n_pages: int) -> int:
        """Under write_back, starts to copy the next victim to the host; returns its pages, or 0."""
        parts, tree = self._parts, self._parts.tree
        if not parts.policies.write.backs_up_before_eviction or parts.host is None:
            return 0
        victim = tree.device_victim(n_pages, Node.may_leave_or_back_up)
        if victim is None or victim.host_pages is not None:
            return 0
        if not parts.retention.wants(victim, parts.epoch) or not self._write_path.backup(victim):
            return 0
        return victim.n_pages

    def _drop_what_is_being_stored(self, n_pages: int) -> int:
        """Drops a node that only stays because of a store that has not ended; returns its pages."""
        parts = self._parts
        victim = parts.tree.device_victim(n_pages, Node.is_idle_on_device_alone)
        if victim is None:
            return 0
        self._write_path.orphan_below(victim)
        self._count_lost(victim)
        return parts.drop_device(victim, self._write_path.is_orphaned)

    def _count_lost(self, victim: Node) -> None:
        """Counts the pages of a victim that the host should have had and has not."""
        parts = self._parts
        if victim.host_pages is not None or parts.host is None:
            return
        if not parts.retention.wants(victim, parts.epoch):
            return  # storage has them
        policy, counters = parts.policies.write, parts.counters
        if policy.backs_up_before_eviction:
            counters.write_back_lost_pages += victim.n_pages
        elif policy.backs_up(1):
            counters.write_through_lost_pages += victim.n_pages

    def wait_for_copy(self) -> bool:
        """Waits for the oldest copy and settles it; False if no rank has one."""
        jobs = self._parts.jobs
        if not jobs.n_copies:
            return False
        if jobs.oldest_copy is not None:
            jobs.oldest_copy.wait()
        self._poll()
        return True

    def reset(self) -> bool:
        """See ``Controller.reset``."""
        parts = self._parts
        if not self._write_path.idle or parts.jobs.n_copies:
            return False
        nodes = parts.tree.nodes()
        if any(node.lock_count or node.host_lock_count for node in nodes):
            return False
        for node in nodes:  # the journal is told before they go; storage keeps its copies
            if node.on_device:
                parts.tell_removed(Tier.DEVICE, node, "flushed")
            if node.on_host:
                parts.tell_removed(Tier.HOST, node, "flushed")
            for group in parts.groups:
                group.held.remove(node, "flushed")
        dropped = parts.tree.reset()
        parts.device.allocator.free(dropped.device_pages)
        if parts.host is not None:
            parts.host.allocator.free(dropped.host_pages)
        return True
