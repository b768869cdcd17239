"""Prefetch, storage → host: the pages of a request, from the question to the last byte."""

from __future__ import annotations

from array import array
from functools import partial
from math import inf

from hicache_core.controller.admission import PrefetchCandidate
from hicache_core.controller.parts import Parts
from hicache_core.controller.prefetch_record import (
    Batch,
    Prefetch,
    Shortfall,
    UnitReads,
    shortfall_of,
)
from hicache_core.controller.storage_tier import StorageTier
from hicache_core.controller.unit_reads import Question, UnitReader
from hicache_core.kv.keys import TOKEN_NBYTES, PageKeys
from hicache_core.observe.tracing import PREFETCH
from hicache_core.pools.host import HostPool
from hicache_core.radix.node import adopt_digests
from hicache_core.types import ExistsJob, JobResult, ReadJob, Tier


class PrefetchPath:
    """Reads pages from storage that neither host nor device has. Owner thread only.

    The question comes first; host pages are taken only for what storage says it has. They belong to
    a pending, locked node before the first byte is read ("own first, copy after"). They become hits
    when the reads are done. If the request goes on before that, those become hits that have
    arrived. The tail after a short batch is freed once no call can write into it.

    Every decision follows from what all ranks know: calls of the engine and settled jobs. What one
    rank alone knows (its clock, its store, its estimates) only changes what it reports of a job.
    """

    def __init__(
        self, parts: Parts, storage: StorageTier, host: HostPool, units: UnitReader
    ) -> None:
        """Starts without requests.

        Args:
            parts: of the cache.
            storage: its storage tier, ``parts.storage``.
            host: its host pool, ``parts.host``.
            units: reads units of groups.
        """
        self._parts = parts
        self._units = units
        self._storage = storage
        self._host = host
        self._requests: dict[str, Prefetch] = {}
        self._reading: list[Prefetch] = []
        self._waiting: list[Prefetch] = []
        self._timed: list[Prefetch] = []

    @property
    def idle(self) -> bool:
        """Whether every read has settled."""
        return not self._reading and not self._units.n_running

    @property
    def n_pending_pages(self) -> int:
        """Host pages that unsettled reads may write into."""
        reads = self._reading.copy()
        return sum(prefetch.n_pending + len(prefetch.orphans or ()) for prefetch in reads)

    @property
    def n_orphaned_pages(self) -> int:
        """Host pages of unsettled reads whose nodes have left the tree."""
        return sum(len(prefetch.orphans or ()) for prefetch in self._reading)

    def of(self, request_id: str) -> Prefetch | None:
        """The prefetch of a request that has not finished it; None if there is none."""
        return self._requests.get(request_id)

    def start(self, request_id: str, tokens: bytes, seed: bytes) -> bool:
        """See ``Controller.prefetch``.

        The page that ends with the request's last token is never asked for: the engine computes
        that token in any case, to predict the next one from it.

        Args:
            request_id: of the request.
            tokens: packed token ids.
            seed: chain seed of the namespace.
        """
        parts, storage = self._parts, self._storage.current
        page_nbytes = parts.page_size * TOKEN_NBYTES
        n_pages = max(len(tokens) - TOKEN_NBYTES, 0) // page_nbytes
        if len(tokens) % page_nbytes == 0:  # else the tree ignores the tail by itself
            tokens = tokens[: n_pages * page_nbytes]
        if storage is None:
            self._tell(request_id, Shortfall("no_storage"))
            return False
        n_missing = n_pages * parts.page_size
        n_missing -= parts.tree.match(tokens, seed, touch=False).n_tokens
        threshold = parts.policies.prefetch_threshold
        if n_missing < threshold:
            parts.counters.prefetch_below_threshold += 1
            limit = f"{n_missing} tokens are missing, {threshold} are the threshold"
            self._tell(request_id, Shortfall("below_threshold", limit))
            return False
        self.finish(request_id)  # an id that is used again starts over
        span = parts.spans.begin(PREFETCH, request_id=request_id, tokens=n_missing)
        prefetch = Prefetch(
            request_id, tokens, n_pages, seed, n_missing, storage, parts.clock(), span
        )
        self._requests[request_id] = prefetch
        self._ask(prefetch)
        return True

    def ready(self, request_id: str) -> bool:
        """See ``Controller.prefetch_ready``."""
        prefetch = self._requests.get(request_id)
        if prefetch is None or prefetch.done or prefetch.given_up:
            return True
        if prefetch.timer is not None:
            return False
        limit_s = self._parts.policies.prefetch.limit_s(prefetch.n_asked_tokens)
        patience_s = prefetch.storage.admission.patience_s(prefetch.n_asked_tokens)
        if limit_s == 0:
            self._give_up(prefetch)
        elif limit_s is not None or prefetch.storage.admission.has_patience:
            limits = [limit for limit in (limit_s, patience_s) if limit is not None]
            prefetch.due_s = self._parts.clock() + min(limits, default=inf)
            prefetch.timer = self._parts.jobs.add(partial(self._expired, prefetch))
            self._timed.append(prefetch)
        return prefetch.given_up

    def tick(self) -> None:
        """Reports the timers that have run out by this rank's clock."""
        if not self._timed:
            return
        now = self._parts.clock()
        for prefetch in [prefetch for prefetch in self._timed if now > prefetch.due_s]:
            self._timed.remove(prefetch)
            assert prefetch.timer is not None
            self._parts.jobs.report(prefetch.timer, 0)

    def finish(self, request_id: str) -> int:
        """See ``Controller.finish_prefetch``."""
        prefetch = self._requests.pop(request_id, None)
        if prefetch is None:
            return 0
        if not prefetch.done:
            self._give_up(prefetch)
        self._stop_timer(prefetch)
        parts = self._parts
        parts.timings.prefetch_wait_s.add(parts.clock() - prefetch.started_s)
        self._tell(request_id, prefetch.shortfall or Shortfall("absent"))
        n_pages = prefetch.n_delivered_pages if parts.groups else prefetch.n_loaded_pages
        n_tokens = n_pages * parts.page_size
        parts.counters.storage_hit_tokens += n_tokens
        return n_tokens

    def _tell(self, request_id: str, shortfall: Shortfall) -> None:
        if self._parts.explainer is not None:
            self._parts.explainer.prefetched(request_id, shortfall)

    def _expired(self, prefetch: Prefetch, _: int) -> None:
        prefetch.timer = None
        if not prefetch.done:
            self._give_up(prefetch)

    def _give_up(self, prefetch: Prefetch) -> None:
        """Lets the request go on: keeps what has arrived, cancels reads that have not begun."""
        if prefetch.given_up:
            return
        prefetch.given_up = True
        prefetch.falls_short(Shortfall("deadline", "the request did not wait for the rest"))
        self._parts.counters.prefetch_given_up += 1
        self._cancel_unstarted(prefetch)
        self._commit(prefetch)
        self._lift_anchor(prefetch)  # nobody waits for the answer any more
        if prefetch.waits_for is not None:
            self._waiting.remove(prefetch)
            prefetch.waits_for = None
            self._done(prefetch)

    def _cancel_unstarted(self, prefetch: Prefetch) -> None:
        for batch in prefetch.batches[prefetch.n_settled_batches :]:
            prefetch.storage.worker.cancel(batch.job_id)
        if prefetch.unit_reads is not None:
            self._units.cancel_unstarted(prefetch.unit_reads, prefetch.storage)

    def _tokens_of(self, prefetch: Prefetch, start: int, stop: int) -> memoryview:
        """Tokens of the pages from ``start`` to ``stop``, as a view: a copy costs more."""
        page_nbytes = self._parts.page_size * TOKEN_NBYTES
        return memoryview(prefetch.tokens)[start * page_nbytes : stop * page_nbytes]

    # The question.

    def _ask(self, prefetch: Prefetch) -> None:
        if self._waits_behind_another(prefetch):
            return
        parts = self._parts
        if prefetch.storage is not self._storage.current:
            prefetch.falls_short(Shortfall("no_storage", "the backend was detached"))
            self._done(prefetch)
            return
        match = parts.tree.locate(prefetch.tokens, prefetch.seed)
        first_page = match.n_tokens // parts.page_size
        reached = first_page
        if parts.groups:
            usable = parts.tree.match(prefetch.tokens, prefetch.seed, touch=False)
            reached = usable.n_tokens // parts.page_size
        if reached == prefetch.n_pages:
            self._done(prefetch)
            return
        parts.tree.lock(match.node)
        prefetch.anchor = match.node
        parent = parts.tree.last_digest(match.node)
        tail = self._tokens_of(prefetch, first_page, prefetch.n_pages)
        keys = PageKeys(prefetch.storage.namespace, tail, parts.page_size, parent)
        settle = partial(self._answered, prefetch, first_page, reached, keys)
        job_id = parts.jobs.add(settle)
        n_asked = prefetch.n_pages - reached
        if not prefetch.storage.admission.is_worth_asking(self._candidate(prefetch, n_asked)):
            prefetch.falls_short(Shortfall("declined", "to compute is expected to be faster"))
            parts.jobs.report(job_id, 0)
            return
        if not parts.groups:
            judge = partial(self._judge_answer, prefetch)
            self._storage.submit(prefetch.storage, ExistsJob(job_id, keys), judge)
            return
        question = self._units.question(
            prefetch.tokens, prefetch.seed, match.node, reached, prefetch.storage
        )
        judge = partial(self._judge_answer, prefetch, question=question)
        self._storage.submit(prefetch.storage, ExistsJob(job_id, question.keys, each=True), judge)

    def _candidate(self, prefetch: Prefetch, n_found: int) -> PrefetchCandidate:
        parts = self._parts
        return PrefetchCandidate(
            request_id=prefetch.request_id,
            n_found=n_found,
            n_missing_tokens=prefetch.n_asked_tokens,
            page_size=parts.page_size,
            batch_pages=parts.batch_pages,
        )

    def _waits_behind_another(self, prefetch: Prefetch) -> bool:
        """Whether a read of the same pages goes first; storage is asked again when it is done."""
        for other in self._reading:
            head = self._tokens_of(other, 0, other.first_page + 1)
            is_same = other.seed == prefetch.seed and prefetch.tokens.startswith(head)
            if is_same and other.orphans is None:
                prefetch.waits_for = other
                self._waiting.append(prefetch)
                return True
        return False

    def _judge_answer(
        self, prefetch: Prefetch, result: JobResult, question: Question | None = None
    ) -> int:
        """How many of the pages that storage has this rank wants."""
        parts, n_found = self._parts, result.n_pages
        if (shortfall := shortfall_of(result)) is not None:
            prefetch.falls_short(shortfall)
            return 0
        cut_by = ""
        if question is not None:
            n_found, cut_by = question.n_more(result.mask or ())
        parts.counters.prefetch_found_pages += n_found
        if n_found == 0 and prefetch.given_up and parts.explainer is not None:
            parts.explainer.storage_had_nothing(prefetch.request_id)
        admission = prefetch.storage.admission
        admission.asked(result.elapsed_s)
        if n_found * parts.page_size < parts.policies.prefetch_threshold:
            if n_found:
                prefetch.falls_short(Shortfall("below_threshold", f"storage has {n_found} pages"))
            elif cut_by:
                prefetch.falls_short(_cut(cut_by))
            return 0
        n_wanted = admission.admit(self._candidate(prefetch, n_found))
        if n_wanted < n_found:
            detail = f"{n_wanted} of {n_found} pages are expected to pay"
            prefetch.falls_short(Shortfall("declined", detail))
            if question is not None:  # fewer may end where a group has nothing
                n_wanted = question.n_more(result.mask or (), n_wanted)[0]
        elif cut_by:
            prefetch.falls_short(_cut(cut_by))
        return n_wanted

    def _answered(
        self, prefetch: Prefetch, first_page: int, reached: int, keys: PageKeys, n_wanted: int
    ) -> None:
        if n_wanted == 0 or prefetch.given_up or prefetch.storage is not self._storage.current:
            self._done(prefetch)
        elif not self._waits_behind_another(prefetch):
            boundary = reached + n_wanted
            if self._parts.groups:
                prefetch.unit_reads = UnitReads(boundary)
            self._read(prefetch, first_page, keys[: max(0, boundary - first_page)])
        self._lift_anchor(prefetch)

    def _lift_anchor(self, prefetch: Prefetch) -> None:
        anchor, prefetch.anchor = prefetch.anchor, None
        if anchor is not None:
            self._parts.tree.unlock(anchor)

    # The read.

    def _read(self, prefetch: Prefetch, first_page: int, keys: PageKeys) -> None:
        """Takes host pages for what storage has, and submits the reads."""
        parts = self._parts
        match = parts.tree.locate(
            prefetch.tokens, prefetch.seed
        )  # other requests may have come first
        start = match.n_tokens // parts.page_size
        keys = keys[min(start - first_page, len(keys)) :]
        parts.tree.lock(match.node)
        host_pages = parts.allocate_host(len(keys))
        parts.counters.prefetch_dropped_pages += len(keys) - len(host_pages)
        if len(host_pages) < len(keys):
            prefetch.falls_short(Shortfall("no_room", "the host had no page that could leave"))
        if host_pages:
            tokens = self._tokens_of(prefetch, start, start + len(host_pages))
            prefetch.node = parts.tree.insert_host(match.node, tokens, host_pages)
            assert prefetch.node is not None  # what is pending was waited for
            digests = keys[: len(host_pages)].digests
            adopt_digests(prefetch.node, len(host_pages), digests)
            prefetch.first_page, prefetch.n_pending = start, len(host_pages)
            prefetch.read_at_s = parts.clock()
            self._reading.append(prefetch)
            self._submit_reads(prefetch, keys, host_pages)
        if prefetch.unit_reads is not None and len(host_pages) == len(keys):
            self._read_units(prefetch, prefetch.unit_reads)
        if not prefetch.batches:
            self._finish_read(prefetch)
        parts.tree.unlock(match.node)

    def _read_units(self, prefetch: Prefetch, reads: UnitReads) -> None:
        """Submits the reads of groups, once nothing else of the request lacks room."""
        has_room = self._units.start(
            reads,
            prefetch.tokens,
            prefetch.seed,
            prefetch.storage,
            partial(self._judge_read, prefetch),
            partial(self._end_if_all_ended, prefetch),
        )
        if not has_room:
            prefetch.falls_short(Shortfall("no_room", "the host had no unit that could leave"))

    def _submit_reads(self, prefetch: Prefetch, keys: PageKeys, host_pages: array[int]) -> None:
        parts, pages = self._parts, self._host.pages(host_pages)
        if not self._host.shape.page_nbytes:  # nothing is stored of them: all is in groups
            prefetch.n_ready = len(host_pages)
            return
        object_nbytes, n_pages = self._host.object_nbytes, len(host_pages)
        starts = range(0, n_pages, parts.batch_pages)
        job_ids = parts.jobs.add_all(
            [partial(self._batch_settled, prefetch, index) for index in range(len(starts))]
        )
        jobs: list[ReadJob] = []
        for job_id, start in zip(job_ids, starts, strict=True):
            part = slice(start, min(start + parts.batch_pages, n_pages))
            prefetch.batches.append(Batch(job_id, host_pages[part]))
            nbytes = (part.stop - start) * object_nbytes
            jobs.append(ReadJob(job_id, keys[part], pages[part], nbytes))
        self._storage.submit_all(prefetch.storage, jobs, partial(self._judge_read, prefetch))

    def _judge_read(self, prefetch: Prefetch, result: JobResult) -> int:
        shortfall = shortfall_of(result)
        if shortfall is not None:
            prefetch.falls_short(shortfall)
        elif result.n_pages < len(result.job.keys):
            key = result.job.keys[result.n_pages]
            verdict = prefetch.storage.verdict(key)
            reason = "vanished" if verdict is None else "corrupt"
            prefetch.falls_short(Shortfall(reason, verdict or "it was there when it was asked for"))
        return result.n_pages

    def _batch_settled(self, prefetch: Prefetch, index: int, n_pages: int) -> None:
        prefetch.batches[index].n_delivered = n_pages
        while prefetch.n_settled_batches < len(prefetch.batches):
            batch = prefetch.batches[prefetch.n_settled_batches]
            if batch.n_delivered < 0:
                return
            prefetch.n_settled_batches += 1
            if not prefetch.broken:
                prefetch.n_ready += batch.n_delivered
                self._learn(prefetch)
                if batch.n_delivered < len(batch.host_pages):
                    prefetch.broken = True
                    self._cancel_unstarted(prefetch)
        self._finish_read(prefetch)

    def _learn(self, prefetch: Prefetch) -> None:
        """Tells the admission policy how long the pages took that have arrived so far."""
        n_pages = prefetch.n_loaded_pages + prefetch.n_ready
        elapsed_s = self._parts.clock() - prefetch.read_at_s
        prefetch.storage.admission.loaded(n_pages, elapsed_s)

    def _commit(self, prefetch: Prefetch) -> None:
        """Makes hits of the pages that have arrived without a gap."""
        parts, n_ready = self._parts, prefetch.n_ready
        if prefetch.node is None or not n_ready:
            return
        for part in parts.tree.commit_host(prefetch.node, prefetch.n_pending, n_ready):
            part.stored_in = prefetch.storage.epoch
            parts.tell_stored(Tier.HOST, part)
            if prefetch.storage is self._storage.current:
                parts.tell_stored(Tier.STORAGE, part)
        prefetch.n_ready = 0
        prefetch.n_pending -= n_ready
        prefetch.n_loaded_pages += n_ready
        parts.counters.storage_loaded_tokens += n_ready * parts.page_size

    def _finish_read(self, prefetch: Prefetch) -> None:
        """Gives up the pages that did not come, once all reads have settled."""
        parts = self._parts
        if prefetch not in self._reading:  # there was nothing to read
            self._full_pages_ended(prefetch)
            return
        self._commit(prefetch)
        if not prefetch.given_up:
            parts.counters.prefetch_failed_pages += prefetch.n_pending
        left = self._taken_out(prefetch) if prefetch.orphans is None else prefetch.orphans
        prefetch.orphans = None
        for batch in prefetch.batches:
            if batch.n_delivered == 0:  # on some rank the call may still run
                self._storage.quarantine.hold(batch.job_id, batch.host_pages)
                left.difference_update(batch.host_pages)
        self._host.allocator.free(array("i", sorted(left)))
        self._reading.remove(prefetch)
        self._full_pages_ended(prefetch)

    def _full_pages_ended(self, prefetch: Prefetch) -> None:
        if prefetch.unit_reads is None:
            self._done(prefetch)
            return
        prefetch.unit_reads.full_ended = True
        self._end_if_all_ended(prefetch)

    def _end_if_all_ended(self, prefetch: Prefetch) -> None:
        """Gives the units that have arrived to the tree, once nothing more will come."""
        reads = prefetch.unit_reads
        if reads is None or not reads.ended:
            return
        epoch = prefetch.storage.epoch
        if self._units.attach(reads, prefetch.tokens, prefetch.seed, epoch):
            start = prefetch.first_page
            full = range(start, start + prefetch.n_loaded_pages)
            prefetch.n_delivered_pages = len(reads.pages().union(full))
        prefetch.unit_reads = None
        self._done(prefetch)

    def orphan(self) -> bool:
        """Takes the nodes of reads that no request waits for out of the tree.

        So a slow store cannot keep device pages from leaving. Pages that the calls may still write
        into belong to the reads until these have settled.

        Returns:
            Whether there was such a read.
        """
        found = [it for it in self._reading if it.given_up and it.orphans is None]
        for prefetch in found:
            prefetch.orphans = self._taken_out(prefetch)
            prefetch.node, prefetch.n_pending = None, 0
        return bool(found)

    def _taken_out(self, prefetch: Prefetch) -> set[int]:
        """Takes the pages that have not arrived out of the tree; returns their host pages."""
        assert prefetch.node is not None
        return set(self._parts.tree.settle_host(prefetch.node, prefetch.n_pending, 0))

    def _done(self, prefetch: Prefetch) -> None:
        prefetch.done = True
        reason = "" if prefetch.shortfall is None else prefetch.shortfall.reason
        prefetch.span.end(pages=prefetch.n_loaded_pages, shortfall=reason)
        self._stop_timer(prefetch)
        waiters = [other for other in self._waiting if other.waits_for is prefetch]
        for other in waiters:
            self._waiting.remove(other)
            other.waits_for = None
            self._ask(other)

    def _stop_timer(self, prefetch: Prefetch) -> None:
        if prefetch.timer is not None:
            self._parts.jobs.withdraw(prefetch.timer)
            prefetch.timer = None
            if prefetch in self._timed:
                self._timed.remove(prefetch)


def _cut(group: str) -> Shortfall:
    return Shortfall(
        "cut_by_group",
        f"cut by group {group!r}: storage has full pages further on, but not the units that the "
        "group needs there",
    )
