"""Storage → host: one request's pages, from the question to the last byte."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import partial

from hicache_core.controller.parts import Parts
from hicache_core.page_keys import PageKeys
from hicache_core.radix.node import Node
from hicache_core.storage.worker import StorageWorker
from hicache_core.types import ExistsJob, ReadJob

log = logging.getLogger(__name__)

TOKEN_NBYTES = 4


@dataclass(slots=True, eq=False)
class Prefetch:
    """What one request has asked storage for.

    Attributes:
        tokens: the request's tokens, packed, without the page that ends with the last one.
        n_pages: whole pages of ``tokens``.
        seed: seed of the chain of page keys.
        n_asked_tokens: tokens that were missing when the request came.
        blocked_since: when the scheduler first wanted to run the request, by the clock.
        waits_for: a read of the same pages that is under way and goes first.
        anchor: deepest node that was matched; locked while the question is open.
        first_page: first page of the pending run, counted from the start of ``tokens``.
        node: lower end of the pending run; None until the read is submitted.
        n_pending: pages of the run that are not settled yet.
        batches: the reads, in order: job id and number of pages.
        n_settled_batches: leading batches that are settled.
        delivered: pages that each finished batch delivered, by its index.
        n_ready: pages that have arrived without a gap and are no hits yet.
        broken: a batch fell short, so nothing behind it can be used.
        n_loaded_pages: pages of the run that are hits now.
        given_up: the request went on without the rest.
        done: nothing more will come.
    """

    tokens: bytes
    n_pages: int
    seed: bytes
    n_asked_tokens: int
    blocked_since: float | None = None
    waits_for: Prefetch | None = None
    anchor: Node | None = None
    first_page: int = 0
    node: Node | None = None
    n_pending: int = 0
    batches: list[tuple[int, int]] = field(default_factory=list)
    n_settled_batches: int = 0
    delivered: dict[int, int] = field(default_factory=dict)
    n_ready: int = 0
    broken: bool = False
    n_loaded_pages: int = 0
    given_up: bool = False
    done: bool = False


class PrefetchPath:
    """Asks storage for what host and device lack, and reads it into host pages. Owner thread only.

    The question comes first; host pages are taken only for what storage says it has. They belong to
    a pending, locked node before the first byte is read ("own first, copy after"). They become hits
    when the reads are done, or, as far as they have arrived, when the request goes on without the
    rest; the tail behind a short batch is freed.
    """

    def __init__(self, parts: Parts, worker: StorageWorker) -> None:
        self._parts = parts
        self._worker = worker
        self._requests: dict[str, Prefetch] = {}
        self._reading: list[Prefetch] = []
        self._waiting: list[Prefetch] = []

    def start(self, request_id: str, tokens: bytes, seed: bytes) -> bool:
        """Asks storage for the request's missing pages; whether there was enough to ask for.

        The page that holds the request's last token is never asked for: that token is computed in
        any case, to have something to predict the next one from.
        """
        parts = self._parts
        page_nbytes = parts.page_size * TOKEN_NBYTES
        n_pages = max(len(tokens) - TOKEN_NBYTES, 0) // page_nbytes
        if len(tokens) % page_nbytes == 0:  # else the tree leaves the tail out by itself
            tokens = tokens[: n_pages * page_nbytes]
        n_missing = n_pages * parts.page_size
        n_missing -= parts.tree.match(tokens, seed, touch=False).n_tokens
        if n_missing < parts.prefetch_threshold:
            parts.counters.prefetch_below_threshold += 1
            return False
        prefetch = self._requests[request_id] = Prefetch(tokens, n_pages, seed, n_missing)
        self._ask(prefetch)
        return True

    def ready(self, request_id: str) -> bool:
        """Whether the request may run now; the prefetch policy decides if storage is not done."""
        prefetch = self._requests.get(request_id)
        if prefetch is None or prefetch.done or prefetch.given_up:
            return True
        now = self._parts.clock()
        if prefetch.blocked_since is None:
            prefetch.blocked_since = now
        waited_s = now - prefetch.blocked_since
        if self._parts.prefetch_policy.gives_up(waited_s, prefetch.n_asked_tokens):
            self._give_up(prefetch)
            return True
        return False

    def finish(self, request_id: str) -> int:
        """Forgets the request and gives up what it still waits for; tokens loaded for it so far."""
        prefetch = self._requests.pop(request_id, None)
        if prefetch is None:
            return 0
        if not prefetch.done:
            self._give_up(prefetch)
        return prefetch.n_loaded_pages * self._parts.page_size

    def _give_up(self, prefetch: Prefetch) -> None:
        if not prefetch.given_up:
            prefetch.given_up = True
            self._parts.counters.prefetch_given_up += 1
            self._cancel_unstarted(prefetch)
            self._commit(prefetch)
            if prefetch.waits_for is not None:
                self._waiting.remove(prefetch)
                prefetch.done = True

    def _cancel_unstarted(self, prefetch: Prefetch) -> None:
        for job_id, _ in prefetch.batches[prefetch.n_settled_batches :]:
            self._worker.cancel(job_id)

    def _tokens_of(self, prefetch: Prefetch, start: int, stop: int) -> memoryview:
        """Tokens of the pages from ``start`` to ``stop``: a view, since a copy would cost more."""
        page_nbytes = self._parts.page_size * TOKEN_NBYTES
        return memoryview(prefetch.tokens)[start * page_nbytes : stop * page_nbytes]

    # The question.

    def _ask(self, prefetch: Prefetch) -> None:
        if self._waits_behind_another(prefetch):
            return
        parts = self._parts
        match = parts.tree.locate(prefetch.tokens, prefetch.seed)
        first_page = match.n_tokens // parts.page_size
        if first_page == prefetch.n_pages:
            self._done(prefetch)
            return
        parts.tree.lock(match.node)
        prefetch.anchor = match.node
        parent = parts.tree.last_digest(match.node)
        tail = self._tokens_of(prefetch, first_page, prefetch.n_pages)
        keys = PageKeys(parts.storage_namespace, tail, parts.page_size, parent)
        job_id = parts.jobs.add(partial(self._answered, prefetch, first_page, keys))
        self._worker.submit(ExistsJob(job_id, keys))

    def _waits_behind_another(self, prefetch: Prefetch) -> bool:
        """Lets a read of the same pages go first; the question is asked again when it is done."""
        for other in self._reading:
            head = self._tokens_of(other, 0, other.first_page + 1)
            if other.seed == prefetch.seed and prefetch.tokens.startswith(head):
                prefetch.waits_for = other
                self._waiting.append(prefetch)
                return True
        return False

    def _answered(self, prefetch: Prefetch, first_page: int, keys: PageKeys, n_found: int) -> None:
        anchor = prefetch.anchor
        assert anchor is not None
        prefetch.anchor = None
        enough = n_found * self._parts.page_size >= self._parts.prefetch_threshold
        if not enough or prefetch.given_up:
            self._done(prefetch)
        elif not self._waits_behind_another(prefetch):
            self._read(prefetch, first_page, keys[:n_found])
        self._parts.tree.unlock(anchor)

    # The read.

    def _read(self, prefetch: Prefetch, first_page: int, keys: PageKeys) -> None:
        """Takes host pages for what storage has, and submits the reads."""
        parts = self._parts
        assert parts.host is not None
        match = parts.tree.locate(prefetch.tokens, prefetch.seed)  # others may have come first
        start = match.n_tokens // parts.page_size
        keys = keys[min(start - first_page, len(keys)) :]
        parts.tree.lock(match.node)
        host_pages = parts.allocate_host(len(keys))
        parts.counters.prefetch_dropped_pages += len(keys) - len(host_pages)
        if host_pages:
            tokens = self._tokens_of(prefetch, start, start + len(host_pages))
            prefetch.node = parts.tree.insert_host(match.node, tokens, host_pages)
            assert prefetch.node is not None  # what is pending was waited for
            digests = keys[: len(host_pages)].digests
            parts.tree.adopt_digests(prefetch.node, len(host_pages), digests)
            prefetch.first_page, prefetch.n_pending = start, len(host_pages)
            self._reading.append(prefetch)
            for first in range(0, len(host_pages), parts.batch_pages):
                last = min(first + parts.batch_pages, len(host_pages))
                index = len(prefetch.batches)
                job_id = parts.jobs.add(partial(self._batch_settled, prefetch, index))
                prefetch.batches.append((job_id, last - first))
                pages = parts.host.pages(host_pages[first:last])
                nbytes = (last - first) * parts.host.object_nbytes
                self._worker.submit(ReadJob(job_id, keys[first:last], pages, nbytes))
        else:
            self._done(prefetch)
        parts.tree.unlock(match.node)

    def _batch_settled(self, prefetch: Prefetch, index: int, n_pages: int) -> None:
        prefetch.delivered[index] = n_pages
        while prefetch.n_settled_batches in prefetch.delivered:
            delivered = prefetch.delivered.pop(prefetch.n_settled_batches)
            wanted = prefetch.batches[prefetch.n_settled_batches][1]
            prefetch.n_settled_batches += 1
            if not prefetch.broken:
                prefetch.n_ready += delivered
                if delivered < wanted:
                    prefetch.broken = True
                    self._cancel_unstarted(prefetch)
        if prefetch.n_settled_batches == len(prefetch.batches):
            self._finish_read(prefetch)

    def _commit(self, prefetch: Prefetch) -> None:
        """Makes what has arrived without a gap a hit."""
        parts, n_ready = self._parts, prefetch.n_ready
        if prefetch.node is None or not n_ready:
            return
        for part in parts.tree.commit_host(prefetch.node, prefetch.n_pending, n_ready):
            part.stored = True
        prefetch.n_ready = 0
        prefetch.n_pending -= n_ready
        prefetch.n_loaded_pages += n_ready
        parts.counters.storage_loaded_tokens += n_ready * parts.page_size

    def _finish_read(self, prefetch: Prefetch) -> None:
        """All reads are settled: frees what did not come."""
        parts, node = self._parts, prefetch.node
        assert node is not None
        assert parts.host is not None
        self._commit(prefetch)
        if not prefetch.given_up:
            parts.counters.prefetch_failed_pages += prefetch.n_pending
        parts.host.allocator.free(parts.tree.settle_host(node, prefetch.n_pending, 0))
        self._reading.remove(prefetch)
        self._done(prefetch)

    def _done(self, prefetch: Prefetch) -> None:
        prefetch.done = True
        waiters = [other for other in self._waiting if other.waits_for is prefetch]
        for other in waiters:
            self._waiting.remove(other)
            other.waits_for = None
            self._ask(other)
