"""The way down: device → host (backup) → storage (store)."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial

from hicache_core.controller.parts import Parts
from hicache_core.page_keys import PageKeys
from hicache_core.radix.node import Node
from hicache_core.types import WriteJob

log = logging.getLogger(__name__)


class WritePath:
    """Copies nodes down when the write policy says so. Owner thread only.

    A node that is on its way is locked and its host pages are pending, so that neither tier lets it
    go before the copy has settled; a node whose host pages are being stored keeps them until then.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._under_way = 0  # backups and stores that were accepted and have not settled

    @property
    def idle(self) -> bool:
        """Whether everything that was accepted has settled."""
        return self._under_way == 0

    def consider(self, node: Node) -> None:
        """Backs up, or stores, what the policy wants of the path from the root to ``node``."""
        tree, policy = self._parts.tree, self._parts.write_policy
        for part in tree.path(node):
            if part.host_pages is None:
                if policy.backs_up(1 + part.hit_count):  # who computed it, and who matched it
                    self.backup(part)
            elif not part.stored and not part.host_pending:
                self._store(part)

    def backup(self, node: Node) -> bool:
        """Starts to copy a node's device pages to the host; False if the host has no room at all.

        With room for a part only, the leading pages are copied and the node is split there.
        """
        parts = self._parts
        host_pages = parts.allocate_host(node.n_pages)
        parts.counters.backup_skipped_pages += node.n_pages - len(host_pages)
        if not host_pages:
            return False
        if len(host_pages) < node.n_pages:
            node = parts.tree.split(node, len(host_pages))
        device_pages = node.device_pages
        assert device_pages is not None
        n_pages = len(host_pages)
        parts.tree.attach_host(node, host_pages)
        assert parts.transfer is not None
        ticket = parts.transfer.to_host(device_pages, host_pages)
        self._under_way += 1
        parts.jobs.add_copy(ticket, n_pages, partial(self._backup_settled, node, n_pages))
        return True

    def _backup_settled(self, node: Node, n_pages: int, n_valid: int) -> None:
        parts = self._parts
        self._under_way -= 1
        freed = parts.tree.settle_host(node, n_pages, n_valid)
        if freed:
            assert parts.host is not None
            parts.host.allocator.free(freed)
        if n_valid == n_pages:
            for part in parts.tree.run(node, n_pages):
                if not part.stored:
                    self._store(part)

    def _store(self, node: Node) -> None:
        """Offers a node's host pages to storage, in batches that settle on their own."""
        parts = self._parts
        if parts.worker is None or parts.host is None or node.host_pages is None:
            return
        assert node.parent is not None
        parent = parts.tree.last_digest(node.parent)
        keys = PageKeys(parts.storage_namespace, node.tokens, parts.page_size, parent)
        store = _Store(node, keys)
        node.stored = True  # from now on; taken back if storage does not take all of it
        parts.tree.lock_host(node, node.n_pages)
        self._under_way += 1
        for start in range(0, node.n_pages, parts.batch_pages):
            stop = min(start + parts.batch_pages, node.n_pages)
            pages = parts.host.pages(node.host_pages[start:stop])
            job_id = parts.jobs.add(partial(self._batch_settled, store, stop - start))
            store.n_batches += 1
            nbytes = (stop - start) * parts.host.object_nbytes
            if not parts.worker.submit(WriteJob(job_id, keys[start:stop], pages, nbytes)):
                parts.jobs.report(job_id, 0)  # the write queue is full: dropped, and counted

    def _batch_settled(self, store: _Store, n_pages: int, n_stored: int) -> None:
        parts = self._parts
        store.n_batches -= 1
        store.complete = store.complete and n_stored == n_pages
        parts.counters.stored_pages += n_stored
        parts.counters.store_dropped_pages += n_pages - n_stored
        if store.n_batches:
            return
        self._under_way -= 1
        parts.tree.unlock_host(store.node, store.n_pages)
        parts.tree.adopt_digests(store.node, store.n_pages, store.keys.digests)
        if not store.complete:
            log.debug("storage did not take all of %d pages; the next use tries again", n_pages)
            for part in parts.tree.run(store.node, store.n_pages):
                part.stored = False


@dataclass(slots=True)
class _Store:
    """A node on its way to storage: by now perhaps a run of nodes, which ends at ``node``."""

    node: Node
    keys: PageKeys
    n_batches: int = 0
    complete: bool = True

    @property
    def n_pages(self) -> int:
        """Pages of the run."""
        return len(self.keys)
