"""DecodeScheduler: fetches the KV of prompts from prefill nodes and goes on from there."""

from __future__ import annotations

import logging
from array import array
from typing import Self

from hicache_core.disaggregation.figures import Figures
from hicache_core.disaggregation.first_token import FirstToken
from hicache_core.engine.page_table import PageTable
from hicache_core.engine.scheduler import Scheduler
from hicache_core.engine.task import Task
from hicache_core.errors import PoolExhausted, TransferError
from hicache_core.kv_transfer.base import KvTransferBackend, Notice, TransferState

log = logging.getLogger(__name__)


class DecodeScheduler(Scheduler):
    """A scheduler whose requests with a room come with the KV of their prompt.

    ::

        expected  →  fetching  →  running          (it arrived)
                              ↘  waiting → running (it did not: the prompt is computed here)

    A request whose KV does not come is computed here like any other: later, but right.
    """

    def join(self, transfer: KvTransferBackend, timeout_s: float, figures: Figures) -> Self:
        """Fetches by ``transfer``, which is open and is closed with the scheduler."""
        self._transfer = transfer
        self._timeout_s = timeout_s
        self._figures = figures
        self._expected: dict[str, Task] = {}
        self._fetching: dict[int, Task] = {}
        self._abandoned: dict[int, PageTable] = {}
        return self

    @property
    def is_busy(self) -> bool:
        # docstring inherited
        return super().is_busy or bool(self._expected or self._fetching or self._abandoned)

    @property
    def n_waiting(self) -> int:
        # docstring inherited
        return super().n_waiting + len(self._expected)

    @property
    def n_running(self) -> int:
        # docstring inherited; pages into which rows may still come are in use
        return super().n_running + len(self._fetching) + len(self._abandoned)

    def add(self, task: Task) -> None:
        # docstring inherited
        if task.request.bootstrap is None:
            super().add(task)
            return
        task.note(arrived=self._clock())
        self._expected[task.request.request_id] = task

    def abort(self, request_id: str) -> None:
        # docstring inherited
        task = self._expected.pop(request_id, None)
        for room, fetching in list(self._fetching.items()):
            if fetching.request.request_id == request_id:
                task = self._fetching.pop(room)
                self._transfer.cancel(room, "the client has left")
                self._abandoned[room] = task.table
                task.table = task.table.another()
        if task is not None:
            self._waiting[request_id] = task
        super().abort(request_id)

    def abort_all(self) -> None:
        # docstring inherited
        fetching = [task.request.request_id for task in self._fetching.values()]
        for request_id in [*self._expected, *fetching]:
            self.abort(request_id)
        super().abort_all()

    def give_up(self) -> None:
        # docstring inherited
        super().give_up()
        for task in self._fetching.values():
            task.table.release()
        for table in self._abandoned.values():
            table.release()
        self._expected.clear()
        self._fetching.clear()
        self._abandoned.clear()

    def step(self) -> bool:
        # docstring inherited
        for notice in self._transfer.poll():
            self._settle(notice)
        self._fetch_expected()
        return super().step()

    def close(self) -> None:
        # docstring inherited
        self._transfer.close()

    def _used_pages(self) -> set[int]:
        tables = [task.table for task in self._fetching.values()] + [*self._abandoned.values()]
        return super()._used_pages().union(*(table.pages for table in tables))

    def _fetch_expected(self) -> None:
        for task in sorted(self._expected.values(), key=lambda task: task.order):
            n_busy = len(self._running) + len(self._fetching)
            if n_busy >= self._config.max_running:
                return
            is_full = False
            with self._blame.on(task):
                is_full = not self._has_room_for(task) or not self._takes_pages(task)
            if is_full:
                return
            if task.request.request_id in self._expected:
                self._fetch(task)

    def _takes_pages(self, task: Task) -> bool:
        """Gives a request pages for its whole prompt; False if there are too few.

        ::

            prompt   | on this device already | to be fetched .... tail |
        """
        look = self._cache.match_prefix(task.packed(0, task.n_prompt - 1), task.request.namespace)
        match = look.device_part()
        task.n_failed_loads = self._cache.n_failed_loads
        self._cache.lock(match.node)
        task.table.begin(match.node, match.device_pages, array("i"))
        try:
            task.table.extend(task.n_prompt)
        except PoolExhausted:
            task.table.release()
            return False
        return True

    def _fetch(self, task: Task) -> None:
        """Asks for the rows that are not here."""
        bootstrap = task.request.bootstrap
        assert bootstrap is not None
        del self._expected[task.request.request_id]
        address = f"{bootstrap.host}:{bootstrap.port}"
        span = (task.table.n_stored * self._cache.page_size, task.n_prompt)
        room = bootstrap.room
        try:
            self._transfer.receive(room, [address], task.table.pages, span, self._timeout_s)
        except TransferError as error:
            self._compute_here(task, str(error))
        else:
            self._fetching[room] = task

    def _settle(self, notice: Notice) -> None:
        abandoned = self._abandoned.pop(notice.room, None)
        if abandoned is not None:
            abandoned.release()
            return
        task = self._fetching.pop(notice.room, None)
        if task is not None:
            with self._blame.on(task):
                self._take(task, notice)

    def _take(self, task: Task, notice: Notice) -> None:
        """Nobody writes into the pages of a request any more: it goes on, however that ended."""
        if notice.state is not TransferState.ARRIVED:
            self._compute_here(task, notice.error)
            return
        try:
            first = FirstToken.unpack(notice.note, task.n_prompt, self._runner.vocabulary)
        except TransferError as error:
            self._compute_here(task, str(error))
            return
        if not self._loads.have_arrived(task):
            task.may_load = False
            self._compute_here(task, "what was on this device already did not get there")
            return
        self._figures.received += 1
        self._figures.nbytes += notice.nbytes
        self._go_on(task, first)

    def _go_on(self, task: Task, first: FirstToken) -> None:
        """The prompt's rows are here: the request runs as if they had been computed here."""
        task.note(first_scheduled=self._clock(), first_token=self._clock())
        task.cached = first.cached
        task.n_computed = task.n_prompt
        self._running[task.request.request_id] = task
        task.table.receive(task.tokens[: task.n_computed])
        self._answer(task, first.token)

    def _end(
        self, task: Task, tokens: tuple[int, ...], text: str, finish_reason: str, error: str = ""
    ) -> None:
        self._expected.pop(task.request.request_id, None)
        super()._end(task, tokens, text, finish_reason, error)

    def _compute_here(self, task: Task, error: str) -> None:
        """The rows did not come, and nobody writes into the pages any more: starts like others."""
        request_id = task.request.request_id
        log.warning("request %s is computed here: %s", request_id, error)
        self._figures.failed += 1
        self._figures.recomputed += 1
        self._figures.last_error = error
        task.table.release()
        super().add(task)
