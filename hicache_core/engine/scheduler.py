"""Scheduler: which requests are computed in a step, and with which pages."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch

from hicache_core.controller.controller import Controller
from hicache_core.engine.blame import Blame
from hicache_core.engine.config import EngineConfig
from hicache_core.engine.connector import Connector
from hicache_core.engine.feed import KvFeed
from hicache_core.engine.limits import units_needed
from hicache_core.engine.loads import Loads, settle_loads
from hicache_core.engine.page_table import PageTable
from hicache_core.engine.rate import Rate
from hicache_core.engine.request import CachedTokens
from hicache_core.engine.runner import Past, Runner, nothing
from hicache_core.engine.tally import Tally
from hicache_core.engine.task import Task
from hicache_core.engine.tensor_ranks import TensorRanks
from hicache_core.errors import LoadFailed, PoolExhausted
from hicache_core.kv.keys import TOKEN_NBYTES
from hicache_core.observe.tracing import on_behalf_of
from hicache_core.radix.results import Match, cached_tokens

log = logging.getLogger(__name__)

Clock = Callable[[], float]


class MakeScheduler(Protocol):
    """Makes the scheduler of an engine: the class ``Scheduler``, or a function that extends one."""

    def __call__(
        self,
        cache: Controller,
        runner: Runner,
        config: EngineConfig,
        *,
        n_pages: int,
        clock: Clock,
        ranks: TensorRanks | None = None,
    ) -> Scheduler:
        """Takes the arguments of ``Scheduler``."""
        ...


class Scheduler:
    """Continuous batching over the pages of one cache. Owner thread only.

    Decisions depend on the requests, in order of arrival, and on what the cache says; never on a
    clock. So all ranks decide alike.

    Room: a request starts when there are pages for its whole prompt, and then gets one page at a
    time. If there is none, the request that is last in order gives up its pages (complete ones stay
    in the cache) and waits again. The first in order never gives up. It fits into the pool alone,
    so it ends; the same then holds for the next one.

    Errors: an error of one request ends that request only. A batch that fails is computed again,
    one request at a time.
    """

    def __init__(
        self,
        cache: Controller,
        runner: Runner,
        config: EngineConfig,
        *,
        n_pages: int,
        clock: Clock,
        ranks: TensorRanks | None = None,
    ) -> None:
        """Joins its parts; ``connector`` and ``feed.listener`` may be set before the first call.

        Args:
            cache: has the prefixes; its device pool is the runner's.
            runner: computes the model.
            config: limits on what runs at once.
            n_pages: size of the device pool.
            clock: seconds, monotonic.
            ranks: the ranks that compute the model together; None for this process alone.
        """
        self.tally = Tally()
        self.feed = KvFeed(runner.pool.spec, runner.pool.page_size)
        self.connector = Connector()
        self.loads = Loads(cache, is_alone=ranks is None)
        self.blame = Blame(cache, runner, ranks, self.tally, self._end)
        self.decoded = Rate(clock)
        self.prefilled = Rate(clock)
        self.progressed_s = 0.0  # when any request made progress, the last time
        self._cache = cache
        self._runner = runner
        self._config = config
        self._n_pages = n_pages
        self._clock = clock
        self._ranks = ranks
        self._waiting: dict[str, Task] = {}
        self._running: dict[str, Task] = {}

    # What others ask.

    @property
    def n_waiting(self) -> int:
        """Number of waiting requests."""
        return len(self._waiting) + self.connector.n_waiting

    @property
    def n_running(self) -> int:
        """Number of requests that hold pages."""
        return len(self._running) + self.connector.n_running

    @property
    def is_busy(self) -> bool:
        """Whether a request waits or runs, or its pages or its client still wait for a transfer."""
        has_any = bool(self._waiting or self._running)
        return has_any or self.feed.is_holding or self.connector.is_busy

    @property
    def n_used_pages(self) -> int:
        """Device pages that running requests and transfers hold, shared ones once."""
        return len(self._used_pages())

    def add(self, task: Task) -> None:
        """Takes a new request."""
        task.note(arrived=self._clock())
        if not self.connector.takes(task):
            self.queue(task)

    def queue(self, task: Task) -> None:
        """Queues a request, and asks storage for what the other tiers lack of its prompt."""
        self._waiting[task.request.request_id] = task
        with self.blame.on(task):
            self._ask_storage(task)

    def abort(self, request_id: str) -> None:
        """Ends a request, whatever its state; what was computed of it stays in the cache."""
        task = self._waiting.get(request_id) or self._running.get(request_id)
        task = task or self.connector.abort(request_id)
        if task is not None:
            self.tally.aborted += 1
            with self.blame.on(task):
                self._end(task, (), "", "abort")

    def abort_all(self) -> None:
        """Ends every request with ``abort``."""
        for request_id in [*self.connector.requests(), *self._waiting, *self._running]:
            self.abort(request_id)

    def give_up(self) -> None:
        """Releases all pages after a failure; nothing is stored and no client is told."""
        for task in self._running.values():
            task.table.release()
        self.feed.give_up()
        self._running.clear()
        self._waiting.clear()
        self.connector.give_up()

    def close(self) -> None:
        """Ends the connector; afterwards no transfer reads or writes pages."""
        self.connector.close()

    # What a connector calls, beside ``queue``.

    def may_start(self, task: Task, n_others: int) -> bool:
        """Whether a request may get its pages now.

        Args:
            task: the request.
            n_others: requests that the connector has started and the scheduler does not know yet.
        """
        n_busy = len(self._running) + n_others
        return n_busy < self._config.max_running and self._has_room_for(task)

    def go_on(self, task: Task, token: int) -> None:
        """Runs a request whose whole prompt is in its pages; ``token`` begins its answer."""
        task.note(first_scheduled=self._clock(), first_token=self._clock())
        task.n_computed = task.n_prompt
        self._running[task.request.request_id] = task
        task.table.units.computed(task.n_computed, self._runner.copy_state)
        task.table.receive(task.tokens[: task.n_computed])
        self._answer(task, token)

    # A step.

    def step(self) -> bool:
        """Computes a chunk of prompts and one token of each running answer.

        Returns:
            Whether anything was computed.

        Raises:
            RankLost: another rank died, or does not answer.
        """
        self._cache.poll()
        self.feed.step()
        self.connector.step()
        decoding = [task for task in self._in_order() if task.decodes]
        n_prefilled = self._prefill(self._config.chunk_tokens)
        n_decoded = self._decode(decoding)
        return n_prefilled + n_decoded > 0

    def _in_order(self) -> list[Task]:
        return sorted(self._running.values(), key=lambda task: task.order)

    def _used_pages(self) -> set[int]:
        return set().union(*(table.pages for table in self._tables()))

    def _tables(self) -> list[PageTable]:
        """Of all requests that hold pages and units, or whose transfer still uses them."""
        running = [task.table for task in self._running.values()]
        return [*running, *self.feed.tables(), *self.connector.tables()]

    # Prompts.

    def _prefill(self, budget: int) -> int:
        """Computes at most ``budget`` tokens of prompts, first those of requests that run."""
        n_left = budget
        for task in self._in_order():
            if n_left and not task.decodes:
                n_tokens = task.n_next(n_left)
                if self._gets_room(task, task.n_computed + n_tokens):
                    with self.blame.on(task):
                        n_left -= n_tokens
                        self._compute(task, n_tokens)
        while n_left and len(self._running) < self._config.max_running:
            ready = self._first_ready()
            if ready is None:
                break
            with self.blame.on(ready):
                if not self._has_room_for(ready) or self._asks_again(ready):
                    break
                n_tokens = self._admit(ready, n_left)
                if not n_tokens:
                    break
                n_left -= n_tokens
                self._compute(ready, n_tokens, is_first=True)
        return budget - n_left

    def _first_ready(self) -> Task | None:
        """The first waiting request whose prefetch is not worth waiting for any longer."""
        in_order = sorted(self._waiting.values(), key=lambda task: task.order)
        for task in in_order:
            if not task.asked_storage or self._cache.prefetch_ready(task.request.request_id):
                return task
        return None

    def _ask_storage(self, task: Task) -> None:
        """Has what other tiers lack brought from storage meanwhile."""
        request = task.request
        if not task.n_reusable:
            return
        with on_behalf_of(request.origin):
            task.asked_storage = self._cache.prefetch(
                request.request_id, task.packed(0, task.n_reusable), request.namespace
            )

    def _asks_again(self, task: Task) -> bool:
        """Whether storage is asked now, as at its arrival, for what a preempted request has lost.

        Not before there is room for it: until then it may lose more.
        """
        again, task.was_preempted = task.was_preempted and task.may_load, False
        if again:
            self._ask_storage(task)
        return again and task.asked_storage

    def _admit(self, task: Task, budget: int) -> int:
        """Gives a waiting request the pages of its prompt.

        Returns:
            How many tokens, ``budget`` at most, it computes first; 0 if there is too little room.
        """
        match, from_storage = self._find(task)
        self._cache.lock(match.node)
        task.table.begin(match.node, array("i"), array("i"))  # it keeps the lock, whatever fails
        n_missing = -(-(len(task.tokens) - match.n_tokens) // self._cache.page_size)
        try:
            pages = self._cache.allocate(n_missing)
        except PoolExhausted:
            task.table.release()
            return 0
        task.table.begin(match.node, array("i"), pages)
        with on_behalf_of(task.request.origin):
            loaded = self._cache.load_back(match)
        if loaded.node is not match.node:  # what is used of it has other units at its end
            self._cache.lock(loaded.node)
            self._cache.unlock(match.node)
        task.table.begin(loaded.node, loaded.device_pages, pages)
        task.table.units.begin(loaded, len(task.tokens))
        n_tokens = task.n_next(budget, loaded.n_tokens)
        try:
            task.table.extend(len(task.tokens))
            task.table.units.extend(loaded.n_tokens + n_tokens)
        except PoolExhausted:
            settle_loads(self._cache)  # nothing is freed while it is written
            task.table.release()
            return 0
        if task.n_new == 0:
            task.cached = cached_tokens(match, loaded, from_storage)
        self._progress(task)
        task.note(first_scheduled=self._clock())
        task.n_computed = loaded.n_tokens
        self._running[task.request.request_id] = self._waiting.pop(task.request.request_id)
        self.feed.begin(task)
        return n_tokens

    def _has_room_for(self, task: Task) -> bool:
        """Whether the prompt fits beside what runs, with a page for each to go on with."""
        if not self._running:
            return True
        used = self._used_pages()
        look = self._cache.match_prefix(
            task.packed(0, task.n_loadable), task.request.namespace, touch=False
        )
        n_shared = sum(page in used for page in look.device_pages)
        n_needed = len(task.tokens) // self._cache.page_size + 1 - n_shared
        has_pages = len(used) + n_needed + len(self._running) <= self._n_pages
        return has_pages and self._have_groups_room(len(task.tokens))

    def _have_groups_room(self, n_tokens: int) -> bool:
        """Whether a prompt fits into the groups beside what runs, with a unit for each to go on."""
        pool, n_running = self._runner.pool, len(self._running)
        held = [table.units.n_held for table in self._tables()] if pool.groups else []
        for at, group in enumerate(pool.spec.groups):
            n_used = sum(n_units[at] for n_units in held) + n_running
            n_needed = units_needed(group, n_tokens, self._config.chunk_tokens, pool.page_size)
            if n_used + n_needed > pool.groups[at].n_pages:
                return False
        return True

    def _find(self, task: Task) -> tuple[Match, int]:
        """What the cache has of all tokens but the last, and the tokens that storage delivered."""
        request, from_storage = task.request, 0
        if task.asked_storage:
            task.asked_storage = False
            from_storage = self._cache.finish_prefetch(request.request_id)
        usable = task.packed(0, task.n_loadable)
        first_time = not task.times.first_scheduled
        request_id = request.request_id if first_time else None
        task.n_failed_loads = self._cache.n_failed_loads
        match = self._cache.match_prefix(
            usable,
            request.namespace,
            request_id=request_id,
            n_behind=len(task.tokens) - len(usable) // TOKEN_NBYTES,
        )
        return match, from_storage

    def _compute(self, task: Task, n_tokens: int, *, is_first: bool = False) -> None:
        """Computes the next ``n_tokens`` of a running request.

        The first time, the pages of its prefix may still be on their way; if they do not arrive,
        the request starts over.
        """
        started_s = self._clock()
        start = task.n_computed
        stop = start + n_tokens
        rows = None
        try:
            rows = self._runner.prefill(
                task.tokens[start:stop],
                start,
                task.table.pages,
                task.table.units.held,
                n_rows=1 if task.logprobs is None else task.logprobs.n_rows(start, stop),
                before_layer=self.loads.wait_layer if is_first else nothing,
                after_layer=self.feed.after_layer(task, stop),
            )
        except LoadFailed as error:
            log.warning("request %s starts over: %s", task.request.request_id, error)
        if (is_first and not self.loads.have_arrived(task)) or rows is None:
            self._start_over(task)
            return
        if task.logprobs is not None:
            task.logprobs.take_rows(stop, rows)
        if not (is_first and task.cached.total):  # else it waited for pages as well
            self._cache.prefilled(n_tokens, self._clock() - started_s)
        self.prefilled.add(n_tokens)
        self._progress(task)
        task.n_computed = stop
        units = task.table.units
        units.computed(task.n_computed, self._runner.copy_state)
        if task.n_missing == 0 or units.has_windows:
            self._store(task, keep_end=task.n_missing == 0)
        units.leave(task.n_computed)
        if task.n_missing == 0:
            self._begin_answer(task, rows[-1])

    def _start_over(self, task: Task) -> None:
        """Its prefix did not arrive: the next time, it computes everything."""
        self.tally.restarted += 1
        task.may_load = False
        if task.n_new == 0:
            task.cached = CachedTokens()
        self._let_wait(task)

    # Answers.

    def _begin_answer(self, task: Task, row: torch.Tensor) -> None:
        """The first token of an answer, from the logits of the prompt's last one."""
        if task.n_new_max == 0:
            self._end(task, (), "", "length")
            return
        (token,) = self._choose([task], [row])
        self._record(task, token, row)
        self._answer(task, token)

    def _decode(self, tasks: list[Task]) -> int:
        """One more token for each of ``tasks`` that still runs and gets room; how many."""
        if not (batch := [task for task in tasks if self._gets_room(task, len(task.tokens))]):
            return 0
        pasts = [
            Past(task.tokens[-1], task.n_computed, task.table.pages, task.table.units.held)
            for task in batch
        ]
        try:
            rows = self._runner.decode(pasts).unbind()
            tokens = self._choose(batch, rows)
        except Exception as error:  # of one request, or of their company
            return self._find_out(batch, error)
        for task, token, row in zip(batch, tokens, rows, strict=True):
            with self.blame.on(task):
                self._record(task, token, row)
                task.n_computed += 1
                task.table.units.computed(task.n_computed, self._runner.copy_state)
                task.table.units.leave(task.n_computed)
                self._answer(task, token)
        return len(batch)

    def _find_out(self, batch: Sequence[Task], error: Exception) -> int:
        """Computes a batch that failed one by one; of one alone it is clear whose error it was."""
        if len(batch) == 1:
            self.blame.fail(batch[0], error)
            return 1
        self.blame.check(error)
        log.warning("a batch of %d is computed one by one: %r", len(batch), error)
        return sum(self._decode([task]) for task in batch)

    def _gets_room(self, task: Task, n_tokens: int) -> bool:
        """Whether a running request has room for its tokens up to ``n_tokens``."""
        has_room = task.request.request_id in self._running
        with self.blame.on(task):
            has_room = has_room and self._make_room(task, n_tokens)
        return has_room and task.request.request_id in self._running

    def _choose(self, tasks: Sequence[Task], rows: Iterable[torch.Tensor]) -> list[int]:
        """The next token of each answer: with several ranks, what rank 0 chooses."""
        tokens = [
            task.sampler.choose(row, task.n_new, task.tokens)
            for task, row in zip(tasks, rows, strict=True)
        ]
        return tokens if self._ranks is None else self._ranks.first_numbers(tokens)

    def _record(self, task: Task, token: int, row: torch.Tensor) -> None:
        """Keeps the log probabilities of a token for the client that wants them."""
        if task.logprobs is not None:
            task.logprobs.take_token(token, row)

    def _answer(self, task: Task, token: int) -> None:
        """Adds a token to an answer and tells the client."""
        text, finish_reason = task.answer(token)
        self.decoded.add(1)
        self._progress(task)
        task.note(first_token=self._clock())
        if finish_reason is not None:
            self._end(task, (token,), text, finish_reason)
            return
        stride = self._config.offload_stride
        if stride and task.n_computed // self._cache.page_size >= task.table.n_stored + stride:
            self._store(task, keep_end=False)
        task.emit((token,), text, None)

    # Pages.

    def _make_room(self, task: Task, n_tokens: int) -> bool:
        """Pages for ``n_tokens`` of a running request; False if it cannot be computed now."""
        while True:
            try:
                task.table.extend(n_tokens)
                task.table.units.extend(n_tokens)
            except PoolExhausted:
                last = self._in_order()[-1]
                if last is task and len(self._running) == 1 and not task.table.has_spares:
                    return False  # what storage or a transfer still holds comes back by itself
                self.tally.preempted += 1
                with self.blame.on(last):
                    self._store(last)
                    self._let_wait(last)
                    last.was_preempted = True
                if last is task:
                    return False
            else:
                return True

    def _store(self, task: Task, *, keep_end: bool = True) -> None:
        """Gives the whole pages that are computed to the cache; ``keep_end`` as of its insert."""
        with on_behalf_of(task.request.origin):
            task.table.store(task.tokens[: task.n_computed], keep_end=keep_end)

    def _let_wait(self, task: Task) -> None:
        """Takes the pages away from a running request."""
        self.feed.release(task)
        task.n_computed = 0
        self._waiting[task.request.request_id] = self._running.pop(task.request.request_id)

    def _end(
        self, task: Task, tokens: tuple[int, ...], text: str, finish_reason: str, error: str = ""
    ) -> None:
        """Ends a request, whatever its state; what an error left in its pages is not stored."""
        request_id = task.request.request_id
        self._waiting.pop(request_id, None)
        if task.asked_storage:
            task.asked_storage = False
            self._cache.finish_prefetch(request_id)
        if self._running.pop(request_id, None) is not None and not error:
            self._store(task)
        self.feed.release(task)
        self.tally.finished += 1
        self._progress(task)
        task.note(finished=self._clock())
        task.emit(tokens, text, finish_reason, error)
        self.connector.ended(task, tokens)

    def _progress(self, task: Task) -> None:
        task.progressed_s = self.progressed_s = self._clock()
