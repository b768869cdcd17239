"""An open backend for an engine that has a cache of its own: its keys, memory and threads."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from hicache_core.integrations.foreign.namespace import ForeignNamespace
from hicache_core.observe.snapshot import BackendStatus
from hicache_core.storage.base import Clearable, RegistersMemory, StorageBackend
from hicache_core.storage.manifest import manifest_page
from hicache_core.storage.sealed import HEADER_NBYTES
from hicache_core.storage.segments import nbytes_of
from hicache_core.storage.workers.executor import Worker, run_job
from hicache_core.types import ExistsJob, Job, JobResult, JobState, Page, ReadJob, WriteJob


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a call; nothing touches the caller's pages any more.

    Attributes:
        mask: for each page whether it is present, was read and verified, or is stored. A page that
            was not read may hold anything.
        error: why the store could not answer, for logs; empty if it did.
        elapsed_s: time the call took.
    """

    mask: Sequence[bool]
    error: str = ""
    elapsed_s: float = 0.0

    @property
    def n_leading(self) -> int:
        """How many leading pages the answer is yes for."""
        return self.mask.index(False) if False in self.mask else len(self.mask)


OnDone: TypeAlias = Callable[[Answer], None]
"""Called once with the answer, on a thread of the store. It must be short and must not raise."""


class ForeignStore:
    """Runs an engine's questions, reads and writes on a backend with seal and guard.

    Pages are the engine's own memory: sequences of writable memoryviews of format ``B``, without a
    header. Nothing of them is touched after a call has returned, or after its ``on_done`` was
    called. A store that fails, hangs or has damaged pages is an answer, never an exception.

    Nothing waits for ``close``: what a write has answered yes for is stored.

    Threads: all methods may be called from any thread, several at the same time.
    """

    def __init__(
        self,
        backend: StorageBackend,
        worker: Worker,
        *,
        statuses: Callable[[], Sequence[BackendStatus]],
        rejected: Callable[[], Mapping[str, int]],
        verdict: Callable[[str], str | None],
        is_writer: bool = True,
    ) -> None:
        """Made by ``open_store``.

        Args:
            backend: open: seal and guard, perhaps a chain of them.
            worker: runs jobs on it.
            statuses: what is known of each store, the nearest first; asks no store.
            rejected: how many objects were refused at a read, by kind.
            verdict: why the object under a key was refused at its last read.
            is_writer: whether this process stores; if not, every write answers yes at once.
        """
        self.backend = backend
        self.statuses = statuses
        self.rejected = rejected
        self.verdict = verdict
        self.is_writer = is_writer
        self._worker = worker
        self._ids = itertools.count()
        self._lock = threading.Lock()
        self._described: set[str] = set()
        self._callbacks: dict[int, OnDone] = {}
        self._closed = threading.Event()
        self._pump = threading.Thread(target=self._pump_results, name="hicache-done", daemon=True)
        self._pump.start()

    def describe(self, namespace: ForeignNamespace) -> str:
        """Leaves the manifest of a namespace in the store, in the background, once.

        Returns:
            ``namespace.digest``.
        """
        digest = namespace.digest
        with self._lock:
            if digest in self._described:
                return digest
            self._described.add(digest)
        made = manifest_page(namespace.described, HEADER_NBYTES + namespace.object_nbytes)
        if made is not None and self.is_writer:
            key, page = made
            job = WriteJob(next(self._ids), [key], [page], nbytes_of(page), each=True)
            self._worker.submit(job)
        return digest

    def register_memory(self, buffers: Sequence[memoryview]) -> None:
        """Announces the memory that pages lie in, for transports that must know it."""
        registers = self.backend.capability(RegistersMemory)
        if registers is not None:
            registers.register_memory(buffers)

    def exists(self, keys: Sequence[str]) -> Answer:
        """Returns which keys are present. Blocks."""
        return self._run(ExistsJob(next(self._ids), keys, each=True))

    def read(self, keys: Sequence[str], pages: Sequence[Page]) -> Answer:
        """Reads and verifies pages. Blocks."""
        return self._run(ReadJob(next(self._ids), keys, _sealed(pages), _nbytes(pages), each=True))

    def write(self, keys: Sequence[str], pages: Sequence[Page]) -> Answer:
        """Stores pages. Blocks."""
        if not self.is_writer:
            return Answer([True] * len(keys))
        return self._run(WriteJob(next(self._ids), keys, _sealed(pages), _nbytes(pages), each=True))

    def submit_exists(self, keys: Sequence[str], on_done: OnDone) -> None:
        """As ``exists``, in the background."""
        self._submit(ExistsJob(next(self._ids), keys, each=True), on_done)

    def submit_read(self, keys: Sequence[str], pages: Sequence[Page], on_done: OnDone) -> None:
        """As ``read``, in the background.

        Args:
            keys: one for each page.
            pages: where to read to; the caller leaves them alone until ``on_done`` is called.
            on_done: gets the answer.
        """
        job = ReadJob(next(self._ids), keys, _sealed(pages), _nbytes(pages), each=True)
        self._submit(job, on_done)

    def submit_write(self, keys: Sequence[str], pages: Sequence[Page], on_done: OnDone) -> None:
        """As ``write``, in the background. Answers no at once if too many bytes wait already.

        Args:
            keys: one for each page.
            pages: what to store; the caller leaves them alone until ``on_done`` is called.
            on_done: gets the answer.
        """
        if not self.is_writer:
            on_done(Answer([True] * len(keys)))
            return
        job = WriteJob(next(self._ids), keys, _sealed(pages), _nbytes(pages), each=True)
        self._submit(job, on_done)

    @property
    def n_in_flight(self) -> int:
        """Jobs in the background that have not called back."""
        with self._lock:
            return len(self._callbacks)

    def clear(self, prefix: str) -> int:
        """Removes every key that starts with ``prefix``; returns how many there were.

        Raises:
            BackendError: the store cannot answer.
            NotImplementedError: the backend cannot be cleared.
        """
        clearable = self.backend.capability(Clearable)
        if clearable is None:
            raise NotImplementedError(f"backend {self.backend.name!r} cannot be cleared")
        return clearable.clear(prefix)

    def close(self, timeout_s: float = 10.0) -> None:
        """Ends running calls within ``timeout_s``, then closes the backend, unless one hangs."""
        if self._closed.is_set():
            return
        abandoned = self._worker.close(timeout_s)
        self._closed.set()
        self._pump.join(timeout_s)
        if not abandoned:
            self.backend.close()

    def _run(self, job: Job) -> Answer:
        return _answer(run_job(self.backend, job, time.monotonic))

    def _submit(self, job: Job, on_done: OnDone) -> None:
        with self._lock:
            self._callbacks[job.job_id] = on_done
        if not self._worker.submit(job):
            with self._lock:
                del self._callbacks[job.job_id]
            on_done(Answer([False] * len(job.keys), "too many bytes wait to be stored"))

    def _pump_results(self) -> None:
        while not self._closed.is_set() or self._worker.n_in_flight:
            self._worker.wait(0.1)
            for result in self._worker.drain():
                if result.state is not JobState.OVERDUE:
                    with self._lock:
                        on_done = self._callbacks.pop(result.job.job_id, None)
                    if on_done is not None:
                        on_done(_answer(result))


def _answer(result: JobResult) -> Answer:
    mask = result.mask if result.mask is not None else [False] * len(result.job.keys)
    return Answer(mask, result.error, result.elapsed_s)


def _sealed(pages: Sequence[Page]) -> list[Page]:
    """Returns the pages with a header of ours before each."""
    headers = memoryview(bytearray(HEADER_NBYTES * len(pages)))
    return [
        (headers[n * HEADER_NBYTES : (n + 1) * HEADER_NBYTES], *page)
        for n, page in enumerate(pages)
    ]


def _nbytes(pages: Sequence[Page]) -> int:
    return sum(map(nbytes_of, pages))
