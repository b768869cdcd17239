"""The storage tier (L3): which backend is attached, and which are being drained."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from hicache_core.controller.attachment import (
    ANY_COUNT,
    Attaching,
    Attachment,
    Clearing,
    OpenStorage,
)
from hicache_core.controller.jobs import JobTable
from hicache_core.controller.quarantine import Quarantine
from hicache_core.errors import ConfigError
from hicache_core.storage.base import Clearable
from hicache_core.types import Job, JobResult, JobState, ReadJob, WriteJob

log = logging.getLogger(__name__)

Judge = Callable[[JobResult], int]
"""Says how many pages this rank reports for a result. Called at most once a job, by the owner."""

_OVERDUE = JobState.OVERDUE  # looked up once: Python 3.11 takes 70 ns for a member of an enum

RunInBackground = Callable[[Callable[[], object]], None]
"""Runs something that may block on another thread, and returns at once.

Raises:
    RuntimeError: no thread can be started, so it will not run.
"""


def on_a_thread(work: Callable[[], object]) -> None:
    """The real ``RunInBackground``: a daemon thread, since a store that hangs cannot be stopped."""
    threading.Thread(target=work, name="hicache-aside", daemon=True).start()


class StorageTier:
    """The attached backend, if any, and detached ones whose last jobs still run. Owner thread only.

    Backends come and go while requests run. A detached backend gets no more questions. Its waiting
    reads are cancelled, its accepted writes are finished, and it is closed when its last call has
    ended. A job belongs to the attachment that it started on.

    Attributes:
        when_lost: called when storage holds nothing for this cache any more.
        quarantine: host pages that a read was given up on.
        current: the attached backend; None without one.
    """

    def __init__(
        self,
        jobs: JobTable,
        quarantine: Quarantine,
        open_storage: OpenStorage,
        run_in_background: RunInBackground = on_a_thread,
    ) -> None:
        """Starts without a backend.

        Args:
            jobs: the table of jobs.
            quarantine: takes host pages that overdue reads may still write into.
            open_storage: makes and opens a backend.
            run_in_background: runs what may block.
        """
        self.when_lost: Callable[[], None] = lambda: None
        self.quarantine = quarantine
        self.current: Attachment | None = None
        self._jobs = jobs
        self._open_storage = open_storage
        self._run_in_background = run_in_background
        self._draining: list[Attachment] = []
        self._attaching: list[Attaching] = []  # not attached yet, and not failed
        self._opening: dict[int, Attaching] = {}  # those that this rank has not reported
        self._clearing: dict[int, Clearing] = {}  # by the job that reports of this rank
        self._judges: dict[int, Judge] = {}
        self._overdue: set[int] = set()  # reported as 0 pages, and not ended
        self._epoch = 0

    def open(self, name: str, settings: Mapping[str, object]) -> None:
        """Attaches the first backend; blocks until it is open.

        Raises:
            HiCacheError: it cannot be used.
        """
        self._attach(self._open_storage(name, settings))

    def attach(self, name: str, settings: Mapping[str, object]) -> Attaching:
        """Opens a backend in the background; ``poll`` attaches it once all ranks have it open.

        Args:
            name: an installed plugin, ``chain`` or ``dynamic``.
            settings: the backend's own settings.
        """
        attaching = Attaching(name)
        job_id = self._jobs.add(partial(self._opened, attaching))
        self._opening[job_id] = attaching
        self._attaching.append(attaching)
        try:
            self._run_in_background(partial(attaching.open, self._open_storage, settings))
        except RuntimeError as error:  # no thread can be started
            attaching.fail(error)
        return attaching

    def detach(self) -> None:
        """Detaches the backend, which is drained and then closed."""
        attachment, self.current = self.current, None
        if attachment is not None:
            for job_id in self._judges:  # questions and reads; those that run go on
                attachment.worker.cancel(job_id)
            self._draining.append(attachment)
            self.when_lost()

    def clear(self) -> Clearing:
        """Removes, in the background, what all ranks of this cache have stored in the backend.

        Raises:
            ConfigError: none is attached, or it cannot be cleared.
        """
        if self.current is None:
            raise ConfigError("no storage backend is attached")
        if self.current.backend.capability(Clearable) is None:
            raise ConfigError(f"backend {self.current.name!r} cannot be cleared")
        n_ranks = self._jobs.n_ranks
        clearing = Clearing(self.current, n_ranks)
        for rank in range(n_ranks):
            job_id = self._jobs.add(partial(self._cleared, clearing))
            if rank == self._jobs.rank:
                self._clearing[job_id] = clearing
            else:
                self._jobs.report(job_id, ANY_COUNT)
        try:
            self._run_in_background(clearing.run)
        except RuntimeError as error:  # no thread can be started
            clearing.fail(error)
        return clearing

    def submit(self, attachment: Attachment, job: Job, judge: Judge | None = None) -> None:
        """As ``submit_all``, for one job.

        Args:
            attachment: the backend whose worker gets the job.
            job: a question, a read or a write.
            judge: as for ``submit_all``.
        """
        self.submit_all(attachment, [job], judge)

    def submit_all(
        self, attachment: Attachment, jobs: Sequence[Job], judge: Judge | None = None
    ) -> None:
        """Hands jobs of one kind to the worker; reports those that it does not take with 0 pages.

        A rank that does not write reports all pages at once: the writer reports how many were
        written, and the least counts. To a backend that is only read, no rank writes.

        Args:
            attachment: the backend whose worker gets the jobs.
            jobs: of one kind, not empty.
            judge: says how many pages this rank reports for a result; as many as it has if None.
        """
        writes_here = attachment.is_writer and not attachment.read_only
        if not writes_here and isinstance(jobs[0], WriteJob):
            for job in jobs:
                self._jobs.report(job.job_id, 0 if attachment.read_only else len(job.keys))
            return
        if judge is not None:
            for job in jobs:
                self._judges[job.job_id] = judge
        for job in attachment.worker.submit_all(jobs):
            self._judges.pop(job.job_id, None)
            self._jobs.report(job.job_id, 0)  # the write queue is full: dropped, and counted

    def collect(self) -> None:
        """Reports the jobs that have finished on this rank."""
        for attachment in self.attachments:
            if results := attachment.worker.drain():
                self._take(results)
        if self._opening:
            for job_id in [job_id for job_id, opening in self._opening.items() if opening._ended]:
                self._jobs.report(job_id, int(self._opening.pop(job_id)._opened is not None))
        if self._clearing:
            for job_id, clearing in list(self._clearing.items()):
                if clearing.report is not None:
                    self._jobs.report(job_id, clearing.report)
                    del self._clearing[job_id]

    def sweep(self) -> None:
        """Closes the backends that have been drained."""
        if not self._draining:
            return
        in_use = [clearing.attachment for clearing in self._clearing.values()]
        for attachment in self._draining.copy():
            if attachment.worker.n_in_flight == 0 and attachment not in in_use:
                self._take(attachment.worker.drain())
                with contextlib.suppress(
                    RuntimeError
                ):  # no thread can be started: it stays for now
                    self._run_in_background(partial(attachment.close, 0.0))
                    self._draining.remove(attachment)

    @property
    def attachments(self) -> list[Attachment]:
        """The attached backend, if any, then those that are being drained."""
        return self._draining[:] if self.current is None else [self.current, *self._draining]

    def _cleared(self, clearing: Clearing, reported: int) -> None:
        """When all ranks are done, no page counts as stored: the backend gets a new number, and its
        manifests again, for the pages that follow."""
        clearing.settle(reported)
        if clearing.done and clearing.attachment is self.current:
            self._epoch += 1
            self.current.epoch = self._epoch
            self.when_lost()
            self._leave_manifests(self.current)

    def wait(self, timeout_s: float, *, for_all: bool = False) -> None:
        """Blocks until a call has ended (``for_all``: all calls), for at most ``timeout_s``."""
        attachments = self.attachments
        for attachment in attachments:
            attachment.worker.wait(timeout_s / len(attachments), for_all=for_all)

    def flush(self, timeout_s: float) -> bool:
        """Blocks until acknowledged writes have reached every store behind the backend.

        Returns:
            False if that took longer than ``timeout_s`` for one of the backends.
        """
        return all(attachment.flush(timeout_s) for attachment in self.attachments)

    def close(self, timeout_s: float) -> list[Job]:
        """Ends all workers and backends, within ``timeout_s`` each.

        A backend whose own ``close`` hangs is abandoned too, and the log says so. One that is being
        opened is closed as soon as it is open.

        Returns:
            The jobs that were abandoned: they may still touch host memory.
        """
        opened = [attaching.give_up() for attaching in self._attaching]
        self._attaching.clear()
        self._draining += [attachment for attachment in opened if attachment is not None]
        abandoned: list[Job] = []
        for attachment in self.attachments:
            closed = threading.Event()

            def work(attachment: Attachment = attachment, closed: threading.Event = closed) -> None:
                abandoned.extend(attachment.close(timeout_s))
                closed.set()

            try:
                self._run_in_background(work)
            except RuntimeError as error:  # no thread can be started, and the backend may hang
                log.warning("backend %s is not closed: %s", attachment.name, error)
                abandoned.extend(attachment.worker.close(timeout_s))
                continue
            if not closed.wait(2 * timeout_s + 1.0):
                log.warning("backend %s does not close; it is abandoned", attachment.name)
        self.current = None
        self._draining.clear()
        return abandoned

    def _attach(self, attachment: Attachment) -> None:
        self.detach()
        self._epoch += 1
        attachment.epoch = self._epoch
        self.current = attachment
        self._leave_manifests(attachment)

    def _leave_manifests(self, attachment: Attachment) -> None:
        """Stores the manifests, which say what the namespaces mean. All ranks have the job; one
        writes."""
        job_id = self._jobs.add_write(lambda _n_pages: None)
        if not attachment.manifests:
            self._jobs.report(job_id, 0)
        else:
            keys = [key for key, _ in attachment.manifests]
            pages = [page for _, page in attachment.manifests]
            nbytes = sum(segment.nbytes for page in pages for segment in page)
            self.submit(attachment, WriteJob(job_id, keys, pages, nbytes))

    def _opened(self, attaching: Attaching, on_all_ranks: int) -> None:
        attaching.done = True
        self._attaching.remove(attaching)
        mine, attaching._opened = attaching._opened, None
        if on_all_ranks and mine is not None:
            self._attach(mine)
            log.info("storage backend %s is attached", attaching.name)
            return
        if mine is not None:
            self._draining.append(mine)
            attaching.error = f"another rank could not open backend {attaching.name!r}"
        log.warning("storage backend %s is not attached: %s", attaching.name, attaching.error)

    def _take(self, results: Sequence[JobResult]) -> None:
        """Reports what came of jobs: a batch of pages costs one step of a loop, and its judge."""
        judges, overdue = self._judges, self._overdue
        reports: list[tuple[int, int]] = []
        for result in results:
            job = result.job
            job_id = job.job_id
            if result.state is _OVERDUE:
                if isinstance(job, WriteJob):
                    continue  # its pages stay locked until the call has ended
                overdue.add(job_id)
                if isinstance(job, ReadJob):
                    self.quarantine.overdue(job_id)
            elif job_id in overdue:
                overdue.discard(job_id)
                self.quarantine.ended(job_id)
                continue
            judge = judges.pop(job_id, None)
            reports.append((job_id, result.n_pages if judge is None else judge(result)))
        self._jobs.report_all(reports)
