"""How calls on an engine's memory are run: directly, or through staging pages."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from hicache_core.errors import UseAfterClose
from hicache_core.integrations.foreign.answer import Answer, Kind, OnDone, Request
from hicache_core.integrations.foreign.headers import Headers
from hicache_core.integrations.foreign.staging import LentPages, StagedBackend, StagingAreas
from hicache_core.storage.base import RegistersMemory, StorageBackend
from hicache_core.storage.workers.executor import Deadlines, Worker, run_job
from hicache_core.storage.workers.worker import OnResult
from hicache_core.types import JobResult, JobState, Page

logger = logging.getLogger(__name__)

LOOK_INTERVAL_S = 0.1
"""Deadlines of calls are looked at this often."""

MakeWorker: TypeAlias = Callable[[StorageBackend, OnResult], Worker]
"""Makes a worker for a backend; its results go to the callback."""

_FULL = "too many bytes wait to be stored"
_CLOSED = "the store is closed"


class Calls(ABC):
    """Runs the calls of an engine on an open backend.

    Nothing touches the engine's pages once a call is answered. Threads: any.
    """

    @property
    @abstractmethod
    def n_in_flight(self) -> int:
        """Background calls that are not answered."""

    @abstractmethod
    def run(self, request: Request) -> Answer:
        """Blocks until the call is answered."""

    @abstractmethod
    def submit(self, request: Request, on_done: OnDone) -> None:
        """Has ``on_done`` called with the answer."""

    @abstractmethod
    def register_memory(self, buffers: Sequence[memoryview]) -> None:
        """Announces the engine's memory to the backend, if the backend touches it."""

    @abstractmethod
    def close(self, timeout_s: float) -> bool:
        """Ends running calls; returns False if one hangs inside the backend."""


@dataclass(slots=True)
class _Direct:
    """A background call on the engine's memory: headers of ours before its pages."""

    request: Request
    pages: Sequence[Page]
    on_done: OnDone


class DirectCalls(Calls):
    """The backend reads and writes the engine's memory, since it bounds its calls.

    A blocking call runs on the caller's thread. A page that was touched and is not in the answer is
    filled with zeros: it may have held bytes that are not verified.
    """

    def __init__(self, backend: StorageBackend, make_worker: MakeWorker) -> None:
        """Starts no thread.

        Args:
            backend: open; bounds its calls.
            make_worker: for calls in the background.
        """
        self._backend = backend
        self._registers = backend.capability(RegistersMemory)
        self._headers = Headers()
        self._headers_are_registered = False
        self._ids = itertools.count()
        self._lock = threading.Lock()
        self._open: dict[int, _Direct] = {}
        self._worker = make_worker(backend, self._on_result)

    @property
    def n_in_flight(self) -> int:
        with self._lock:
            return len(self._open)

    def run(self, request: Request) -> Answer:
        pages = self._headers.before(request.pages)
        result = run_job(self._backend, request.job(next(self._ids), pages), time.monotonic)
        return self._answer(request, pages, result)

    def submit(self, request: Request, on_done: OnDone) -> None:
        job_id = next(self._ids)
        call = _Direct(request, self._headers.before(request.pages), on_done)
        with self._lock:
            self._open[job_id] = call
        error = ""
        try:
            self._worker.drain()  # looks for threads whose call is late, to replace them
            if not self._worker.submit(request.job(job_id, call.pages)):
                error = _FULL
        except UseAfterClose:
            error = _CLOSED
        if error:
            with self._lock:
                self._open.pop(job_id, None)
            self._headers.give_back(call.pages)
            tell(on_done, Answer([False] * len(request.keys), error))

    def register_memory(self, buffers: Sequence[memoryview]) -> None:
        if self._registers is None:
            return
        own = [] if self._headers_are_registered else [self._headers.memory]
        self._registers.register_memory([*buffers, *own])
        self._headers_are_registered = True

    def close(self, timeout_s: float) -> bool:
        return not self._worker.close(timeout_s)

    def _on_result(self, result: JobResult) -> None:
        if result.state is JobState.OVERDUE:
            return  # its pages may still be touched
        with self._lock:
            call = self._open.pop(result.job.job_id)
        tell(call.on_done, self._answer(call.request, call.pages, result))

    def _answer(self, request: Request, pages: Sequence[Page], result: JobResult) -> Answer:
        mask = result.mask if result.mask is not None else [False] * len(request.keys)
        if request.kind is Kind.READ and False in mask:
            self._headers.wipe_touched(pages, mask)
        self._headers.give_back(pages)
        return Answer(mask, _error_of(result), result.elapsed_s)


@dataclass(slots=True)
class _Staged:
    """A call that is answered when its job ends or when its time is over."""

    request: Request
    lent: LentPages
    on_done: OnDone
    start_s: float
    due_s: float


class StagedCalls(Calls):
    """The backend reads and writes staging pages, since its calls may hang.

    Every call runs on a thread of the worker. It is answered at its deadline at the latest, with
    what was done by then. The deadline counts from the submission and allows for the bytes of the
    calls of its kind that are running.
    """

    def __init__(
        self,
        backend: StorageBackend,
        make_worker: MakeWorker,
        areas: StagingAreas,
        deadlines: Deadlines,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts no thread.

        Args:
            backend: open.
            make_worker: runs every call.
            areas: memory for the calls.
            deadlines: how long a call may take.
            clock: seconds; only differences count.
        """
        self._areas = areas
        self._deadlines = deadlines
        self._clock = clock
        self._ids = itertools.count()
        self._changed = threading.Condition()
        self._open: dict[int, _Staged] = {}
        self._nbytes = dict.fromkeys(Kind, 0)
        self._watcher: threading.Thread | None = None
        self._watcher_rests = False
        self._closed = False
        self._worker = make_worker(StagedBackend(backend, areas), self._on_result)

    @property
    def n_in_flight(self) -> int:
        with self._changed:
            return len(self._open)

    def run(self, request: Request) -> Answer:
        answers: list[Answer] = []
        answered = threading.Event()

        def on_done(answer: Answer) -> None:
            answers.append(answer)
            answered.set()

        self.submit(request, on_done)
        answered.wait()
        return answers[0]

    def submit(self, request: Request, on_done: OnDone) -> None:
        job_id = next(self._ids)
        lent = LentPages(request.pages)
        error = self._begin(job_id, request, lent, on_done)
        if error:
            self._end(job_id, None, error)
            return
        try:
            self._worker.drain()  # looks for threads whose call is late, to replace them
            if not self._worker.submit(request.job(job_id, lent)):
                self._end(job_id, None, _FULL)
        except UseAfterClose:
            self._end(job_id, None, _CLOSED)

    def register_memory(self, buffers: Sequence[memoryview]) -> None:
        """Does nothing: the backend only touches staging pages."""

    def close(self, timeout_s: float) -> bool:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            left = list(self._open)
        for job_id in left:
            self._worker.cancel(job_id)
        with self._changed:
            self._changed.wait_for(lambda: not self._open, timeout_s)
            left = list(self._open)
        for job_id in left:
            self._end(job_id, None, _CLOSED)
        abandoned = self._worker.close(LOOK_INTERVAL_S)  # what was given up on is not waited for
        if self._watcher is not None:
            self._watcher.join()
        return not abandoned

    def _begin(self, job_id: int, request: Request, lent: LentPages, on_done: OnDone) -> str:
        """Notes a call. Returns why it cannot be made, or an empty text."""
        with self._changed:
            self._nbytes[request.kind] += request.nbytes
            now = self._clock()
            due_s = now + self._deadlines.for_nbytes(self._nbytes[request.kind])
            self._open[job_id] = _Staged(request, lent, on_done, now, due_s)
            if self._closed:
                return _CLOSED
            if self._watcher_rests:
                self._watcher_rests = False
                self._changed.notify_all()
            return "" if self._watcher is not None else self._start_watcher()

    def _start_watcher(self) -> str:
        watcher = threading.Thread(target=self._watch, name="hicache-deadlines", daemon=True)
        try:
            watcher.start()
        except RuntimeError as error:  # without it, nothing would end a call that hangs
            return f"no thread: {error}"
        self._watcher = watcher
        return ""

    def _on_result(self, result: JobResult) -> None:
        if result.state is not JobState.OVERDUE:  # the watcher ends the call
            self._end(result.job.job_id, result.mask, _error_of(result))

    def _end(self, job_id: int, found: Sequence[bool] | None, error: str) -> None:
        """Answers a call, unless it is answered already.

        Args:
            job_id: of the call.
            found: the answer of a question.
            error: why there is no answer for all pages; empty if there is.
        """
        with self._changed:
            call = self._open.pop(job_id, None)
            if call is None:
                return
            self._nbytes[call.request.kind] -= call.request.nbytes
            if self._closed and not self._open:
                self._changed.notify_all()
        if call.request.kind is Kind.EXISTS:
            mask = [False] * len(call.request.keys) if found is None else found
        else:
            mask = call.lent.end()
        tell(call.on_done, Answer(mask, error, self._clock() - call.start_s))

    def _watch(self) -> None:
        """Ends calls whose time is over, until the store is closed."""
        while True:
            with self._changed:
                if self._closed and not self._open:
                    return
                self._watcher_rests = not self._open
                self._changed.wait(LOOK_INTERVAL_S if self._open else None)
                now = self._clock()
                late = [(n, call) for n, call in self._open.items() if call.due_s <= now]
            for job_id, call in late:
                self._worker.cancel(job_id)
                allowed_s = call.due_s - call.start_s
                self._end(job_id, None, f"the store has not answered within {allowed_s:.1f} s")
            if late:
                self._areas.look()
            self._worker.drain()  # looks for threads whose call is late, to replace them


def tell(on_done: OnDone, answer: Answer) -> None:
    """Calls ``on_done``; logs what it raises."""
    try:
        on_done(answer)
    except (Exception, SystemExit):  # code of the engine: the thread of the store goes on
        logger.exception("on_done of a storage call failed")


def _error_of(result: JobResult) -> str:
    if result.state is JobState.CANCELLED:
        return "the store is busy: the call has waited too long"
    return result.error
