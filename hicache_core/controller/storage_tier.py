"""L3 as the controller sees it: which backend is attached, and which are being drained."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from hicache_core.controller.attachment import Attaching, Attachment, OpenStorage
from hicache_core.controller.clearing import ANY_COUNT, Clearing
from hicache_core.controller.jobs import JobTable
from hicache_core.controller.quarantine import Quarantine
from hicache_core.errors import ConfigError
from hicache_core.storage.base import Clearable
from hicache_core.types import Job, JobResult, JobState, ReadJob, WriteJob

log = logging.getLogger(__name__)

Judge = Callable[[JobResult], int]
"""Pages that this rank reports for a result; called at most once for a job, on the owner thread."""

RunAside = Callable[[Callable[[], object]], None]
"""Runs something that may block elsewhere, and returns at once.

Raises:
    RuntimeError: there is no thread for it, and it will not run.
"""


def on_a_thread(work: Callable[[], object]) -> None:
    """``RunAside`` of a real process: a daemon, since a store that hangs cannot be stopped."""
    threading.Thread(target=work, name="hicache-aside", daemon=True).start()


class StorageTier:
    """The attached backend, if any, and those whose last jobs still run. Owner thread only.

    Backends come and go while requests run. A detached one takes no more questions; reads that wait
    are cancelled, writes that were accepted are finished, and it is closed when its last call has
    ended. What is under way belongs to the attachment that it started on.
    """

    def __init__(
        self,
        jobs: JobTable,
        quarantine: Quarantine,
        open_storage: OpenStorage,
        run_aside: RunAside = on_a_thread,
    ) -> None:
        self.when_lost: Callable[[], None] = lambda: None  # storage holds nothing for us any more
        self.quarantine = quarantine
        self.current: Attachment | None = None
        self._jobs = jobs
        self._open_storage = open_storage
        self._run_aside = run_aside
        self._draining: list[Attachment] = []
        self._opening: dict[int, Attaching] = {}
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
        """Opens a backend aside; ``poll`` attaches it once it is open on all ranks."""
        attaching = Attaching(name)
        job_id = self._jobs.add(partial(self._opened, attaching))
        self._opening[job_id] = attaching
        try:
            self._run_aside(partial(attaching.open, self._open_storage, settings))
        except RuntimeError as error:  # no thread is to be had
            attaching.fail(error)
        return attaching

    def detach(self) -> None:
        """Lets go of the attached backend, which is drained and then closed."""
        attachment, self.current = self.current, None
        if attachment is not None:
            for job_id in self._judges:  # questions and reads; those that run go on
                attachment.worker.cancel(job_id)
            self._draining.append(attachment)
            self.when_lost()

    def clear(self) -> Clearing:
        """Removes aside what this cache, on all ranks, has put into the attached backend.

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
            self._run_aside(clearing.run)
        except RuntimeError as error:  # no thread is to be had
            clearing.fail(error)
        return clearing

    def submit(self, attachment: Attachment, job: Job, judge: Judge | None = None) -> None:
        """As ``submit_all``, of one job."""
        self.submit_all(attachment, [job], judge)

    def submit_all(
        self, attachment: Attachment, jobs: Sequence[Job], judge: Judge | None = None
    ) -> None:
        """Hands jobs of one kind to the worker; those it does not take are reported with 0 pages.

        A rank that does not write reports what the writer will: the least counts.
        """
        if not attachment.is_writer and isinstance(jobs[0], WriteJob):
            for job in jobs:
                self._jobs.report(job.job_id, len(job.keys))
            return
        if judge is not None:
            self._judges.update((job.job_id, judge) for job in jobs)
        for job in attachment.worker.submit_all(jobs):
            self._judges.pop(job.job_id, None)
            self._jobs.report(job.job_id, 0)  # the write queue is full: dropped, and counted

    def collect(self) -> None:
        """Reports what has finished on this rank."""
        for attachment in self.attachments:
            for result in attachment.worker.drain():
                self._take(result)
        for job_id in [job_id for job_id, opening in self._opening.items() if opening._ended]:
            self._jobs.report(job_id, int(self._opening.pop(job_id)._opened is not None))
        for job_id, clearing in list(self._clearing.items()):
            if clearing.report is not None:
                self._jobs.report(job_id, clearing.report)
                del self._clearing[job_id]

    def sweep(self) -> None:
        """Closes what has been drained."""
        in_use = [clearing.attachment for clearing in self._clearing.values()]
        for attachment in self._draining.copy():
            if attachment.worker.n_in_flight == 0 and attachment not in in_use:
                for result in attachment.worker.drain():
                    self._take(result)
                with contextlib.suppress(RuntimeError):  # no thread is to be had: it stays for now
                    self._run_aside(partial(attachment.close, 0.0))
                    self._draining.remove(attachment)

    @property
    def attachments(self) -> list[Attachment]:
        """The attached backend, if any, and those that are being drained."""
        return [*([] if self.current is None else [self.current]), *self._draining]

    @property
    def n_overdue(self) -> int:
        """Calls of this rank that were given up and have not ended."""
        return len(self._overdue)

    @property
    def is_draining(self) -> bool:
        """Whether a detached backend has not been closed, or an attached one is being opened."""
        return bool(self._draining or self._opening)

    def _cleared(self, clearing: Clearing, reported: int) -> None:
        """Once all ranks have ended, no page counts as stored: the backend gets a new number."""
        clearing.settle(reported)
        if clearing.done and clearing.attachment is self.current:
            self._epoch += 1
            self.current.epoch = self._epoch
            self.when_lost()

    def wait(self, timeout_s: float, *, for_all: bool = False) -> None:
        """Waits until a call has ended, or with ``for_all`` all have, or for ``timeout_s``."""
        attachments = self.attachments
        for attachment in attachments:
            attachment.worker.wait(timeout_s / len(attachments), for_all=for_all)

    def flush(self, timeout_s: float) -> bool:
        """Waits until what was acknowledged has reached every store behind the backend."""
        return all(attachment.flush(timeout_s) for attachment in self.attachments)

    def close(self, timeout_s: float) -> list[Job]:
        """Ends all workers and backends within ``timeout_s`` each; the jobs that were abandoned.

        A backend whose own ``close`` hangs is abandoned too, and the log says so.
        """
        abandoned: list[Job] = []
        for attachment in self.attachments:
            closed = threading.Event()

            def work(attachment: Attachment = attachment, closed: threading.Event = closed) -> None:
                abandoned.extend(attachment.close(timeout_s))
                closed.set()

            try:
                self._run_aside(work)
            except RuntimeError as error:  # no thread is to be had, and the backend may hang
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
        self._leave_manifest(attachment)

    def _leave_manifest(self, attachment: Attachment) -> None:
        """Stores what the namespace stands for; every rank has the job, and one may write."""
        job_id = self._jobs.add_write(lambda _n_pages: None)
        if attachment.manifest is None:
            self._jobs.report(job_id, 0)
        else:
            key, page = attachment.manifest
            job = WriteJob(job_id, [key], [page], sum(segment.nbytes for segment in page))
            self.submit(attachment, job)

    def _opened(self, attaching: Attaching, on_all_ranks: int) -> None:
        attaching.done = True
        mine, attaching._opened = attaching._opened, None
        if on_all_ranks and mine is not None:
            self._attach(mine)
            log.info("storage backend %s is attached", attaching.name)
            return
        if mine is not None:
            self._draining.append(mine)
            attaching.error = f"another rank could not open backend {attaching.name!r}"
        log.warning("storage backend %s is not attached: %s", attaching.name, attaching.error)

    def _take(self, result: JobResult) -> None:
        job = result.job
        if result.state is JobState.OVERDUE:
            if isinstance(job, WriteJob):
                return  # its pages stay locked until the call has ended
            self._overdue.add(job.job_id)
            if isinstance(job, ReadJob):
                self.quarantine.overdue(job.job_id)
        elif job.job_id in self._overdue:
            self._overdue.discard(job.job_id)
            self.quarantine.ended(job.job_id)
            return
        judge = self._judges.pop(job.job_id, None)
        self._jobs.report(job.job_id, result.n_pages if judge is None else judge(result))
