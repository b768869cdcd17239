"""The write path: device → host (backup) → storage (store)."""

from __future__ import annotations

import logging
from array import array
from collections import Counter
from functools import partial

from hicache_core.controller.attachment import Attachment
from hicache_core.controller.parts import Parts
from hicache_core.controller.policies import NOWHERE
from hicache_core.controller.received import ReceivedPages
from hicache_core.kv.keys import DIGEST_NBYTES, TOKEN_NBYTES, PageKeys
from hicache_core.observe.journal import PageRun
from hicache_core.observe.tracing import BACKUP, SpanHandle
from hicache_core.radix.node import (
    Node,
    Received,
    adopt_digests,
    path_to,
    path_to_root,
    run_of,
)
from hicache_core.types import Tier, WriteJob

log = logging.getLogger(__name__)


class WritePath:
    """Copies nodes down when the write policy says so. Owner thread only.

    A node that is being copied is locked and its host pages are pending, so neither tier drops it
    before the copy has settled. A node whose host pages are being stored keeps them until then.

    Attributes:
        received: pages of other servers, which storage is asked for before they are written.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.received = ReceivedPages(parts, self.consider)
        self._n_backups = 0
        self._n_backup_pages = 0
        self._stores: list[_Store] = []
        self._orphans: Counter[int] = Counter()  # host pages, by how many stores read them

    @property
    def idle(self) -> bool:
        """Whether every backup, store and question has settled."""
        return not self._n_backups and not self._stores and self.received.idle

    @property
    def n_orphaned_pages(self) -> int:
        """Host pages of unsettled stores whose nodes have left the tree."""
        return len(self._orphans)

    @property
    def n_pages(self) -> int:
        """Host pages that are being filled or stored."""
        return self._n_backup_pages + sum(store.n_pages for store in self._stores.copy())

    def consider(self, node: Node) -> None:
        """Backs up or stores those nodes from the root to ``node`` that the policy wants."""
        policy = self._parts.policies.write
        storage = self._attached()
        epoch = NOWHERE if storage is None else storage.epoch
        unchecked, checking = Received.UNCHECKED, Received.CHECKING  # 70 ns each on Python 3.11
        for part in path_to(node):
            if part.received is unchecked and storage is not None:
                self.received.ask(node, storage)
            if part.received is checking:
                continue  # it is considered again when the answer has come
            if part.host_pages is None:
                n_uses = 1 + part.hit_count  # who computed it, and who matched it
                if policy.backs_up(n_uses) and self._parts.retention.wants(part, epoch):
                    self.backup(part)
            elif storage is not None and part.stored_in != epoch and not part.host_pending:
                self._store(part, storage)

    def backup(self, node: Node) -> bool:
        """Starts to copy a node's device pages to the host.

        If the host has room for a part only, the leading pages are copied and the node is split
        there.

        Returns:
            False if the host has no room at all.
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
        self._n_backups += 1
        self._n_backup_pages += n_pages
        span = parts.spans.begin(BACKUP, pages=n_pages)
        settle = partial(self._backup_settled, node, n_pages, span, parts.clock())
        parts.jobs.add_copy(ticket, n_pages, settle)
        return True

    def _backup_settled(
        self, node: Node, n_pages: int, span: SpanHandle, started_s: float, n_valid: int
    ) -> None:
        parts = self._parts
        span.end(error="" if n_valid == n_pages else "the copy failed")
        self._n_backups -= 1
        self._n_backup_pages -= n_pages
        freed = parts.tree.settle_host(node, n_pages, n_valid)
        if freed:
            assert parts.host is not None
            parts.host.allocator.free(freed)
        if n_valid == n_pages:
            parts.counters.backup_tokens += n_pages * parts.page_size
            parts.timings.backup_s.add(parts.clock() - started_s)
            storage = self._attached()
            for part in run_of(node, n_pages):
                parts.tell_stored(Tier.HOST, part)
                if storage is not None and part.stored_in != storage.epoch:
                    self._store(part, storage)

    def _attached(self) -> Attachment | None:
        tier = self._parts.storage
        return None if tier is None else tier.current

    def _store(self, node: Node, storage: Attachment) -> None:
        """Starts to write a node's host pages to storage, in batches that settle one by one."""
        parts = self._parts
        assert parts.storage is not None
        assert parts.host is not None
        assert node.host_pages is not None
        assert node.parent is not None
        if not parts.host.shape.page_nbytes:
            node.stored_in = storage.epoch  # all that storage needs is in groups
            return
        parent = parts.tree.last_digest(node.parent)
        keys = PageKeys(storage.namespace, node.tokens, parts.page_size, parent)
        store = _Store(node, keys, storage, parent)
        # From now on, and taken back if storage does not take all of it.
        node.stored_in, node.received = storage.epoch, Received.NO
        parts.tree.lock_host(node, node.n_pages)
        self._stores.append(store)
        pages, object_nbytes = parts.host.pages(node.host_pages), parts.host.object_nbytes
        batches = [
            (start, min(parts.batch_pages, node.n_pages - start))
            for start in range(0, node.n_pages, parts.batch_pages)
        ]
        store.n_batches = len(batches)
        job_ids = parts.jobs.add_writes(
            [partial(self._batch_settled, store, start, n_pages) for start, n_pages in batches]
        )
        jobs = [
            WriteJob(
                job_id, keys[at : at + n_pages], pages[at : at + n_pages], n_pages * object_nbytes
            )
            for job_id, (at, n_pages) in zip(job_ids, batches, strict=True)
        ]
        parts.storage.submit_all(storage, jobs)

    def _batch_settled(self, store: _Store, start: int, n_pages: int, n_stored: int) -> None:
        parts = self._parts
        store.n_batches -= 1
        if n_stored < n_pages:
            store.n_leading = min(store.n_leading, start + n_stored)
        parts.counters.stored_pages += n_stored
        parts.counters.store_dropped_pages += n_pages - n_stored
        if store.n_batches:
            return
        self._stores.remove(store)
        self._tell_stored(store)
        if store.orphans is not None:
            assert parts.host is not None
            parts.host.allocator.free(self._let_go(store.orphans))
            return
        parts.tree.unlock_host(store.node, store.n_pages)
        adopt_digests(store.node, store.n_pages, store.keys.digests)
        if store.n_leading < store.n_pages:
            log.debug("storage did not take all of %d pages; the next use tries again", n_pages)
            for part in run_of(store.node, store.n_pages):
                if part.stored_in == store.storage.epoch:
                    part.stored_in = 0
        for spare in parts.retention.spare(store.node, parts.epoch):
            parts.drop_host(spare, "stored")

    def _let_go(self, pages: array[int]) -> array[int]:
        """Ends a store's use of orphaned pages; returns those that no other store reads.

        Two stores read the same pages if a second backend was attached while the first one hung.
        """
        self._orphans.subtract(pages)
        freed = array("i", [page for page in pages if not self._orphans[page]])
        for page in freed:
            del self._orphans[page]
        return freed

    def _tell_stored(self, store: _Store) -> None:
        """Tells the journal which leading pages storage now has."""
        parts, n = self._parts, store.n_leading
        if parts.journal is None or not parts.journal.hears_gains or n == 0:
            return
        if parts.storage is None or store.storage is not parts.storage.current:
            return  # detached: nobody can load them from there
        digests = store.keys.digests[: n * DIGEST_NBYTES]
        tokens = store.tokens[: n * parts.page_size * TOKEN_NBYTES]
        run = PageRun(store.parent, digests, tokens, store.seed, stored=True)
        parts.journal.stored(Tier.STORAGE, run)

    def orphan_below(self, node: Node) -> None:
        """Prepares ``node`` to leave the tree although pages below it are being stored.

        The host pages below belong to their stores from now on, and no longer to the tree. They are
        freed when the stores have settled. So a slow store cannot keep device pages from leaving.
        """
        parts = self._parts
        for store in self._stores:
            if store.orphans is not None or not _is_below(store.node, node):
                continue
            store.orphans = array("i")
            parts.tree.unlock_host(store.node, store.n_pages)
            for part in run_of(store.node, store.n_pages):
                assert part.host_pages is not None
                store.orphans.extend(part.host_pages)
            self._orphans.update(store.orphans)

    def is_orphaned(self, host_pages: array[int]) -> set[int]:
        """Those of ``host_pages`` that belong to unsettled stores, and may not be freed yet."""
        return self._orphans.keys() & set(host_pages)


def _is_below(node: Node, above: Node) -> bool:
    return node is not above and any(at is above for at in path_to_root(node))


class _Store:
    """A node that is being stored. Splits may have made a run of it, which ends at ``node``.

    Attributes:
        node: the last node of the run.
        keys: of all its pages.
        storage: the backend that they go to.
        parent: digest of the page before the first.
        tokens: packed tokens of all its pages.
        seed: seed of the chain of page keys.
        n_batches: batches that have not settled.
        n_leading: leading pages that storage has without a gap, as far as is known.
        orphans: host pages of a run that has left the tree; None while it is there.
    """

    __slots__ = ("keys", "n_batches", "n_leading", "node", "orphans", "parent", "seed", "storage",
                 "tokens")  # fmt: skip

    def __init__(self, node: Node, keys: PageKeys, storage: Attachment, parent: bytes) -> None:
        self.node = node
        self.keys = keys
        self.storage = storage
        self.parent = parent
        self.tokens = node.tokens
        self.seed = b""
        for above in path_to_root(node):
            if above.parent is not None and above.parent.parent is None:
                self.seed = above.parent.key
        self.n_batches = 0
        self.n_leading = len(keys)
        self.orphans: array[int] | None = None

    @property
    def n_pages(self) -> int:
        """Pages of the run."""
        return len(self.keys)
