"""What is known of one request's prefetch while it is under way."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import NamedTuple

from hicache_core.controller.attachment import Attachment
from hicache_core.observe.tracing import SpanHandle
from hicache_core.radix.node import Node
from hicache_core.types import JobResult, JobState


class Shortfall(NamedTuple):
    """Why storage delivered no more than it did.

    Attributes:
        reason: one of ``explain.Reason``'s values.
        detail: in words; may be empty.
    """

    reason: str
    detail: str = ""


def shortfall_of(result: JobResult) -> Shortfall | None:
    """What a result says of a job that did not end well; None for an answer."""
    if result.state is JobState.OVERDUE:
        return Shortfall("deadline", result.error)
    if result.state is JobState.CANCELLED:
        return Shortfall("deadline", "it waited too long for a free thread")
    if result.state is JobState.FAILED:
        kind = "breaker_open" if result.error_kind == "BreakerOpen" else "storage_error"
        return Shortfall(kind, result.error)
    return None


@dataclass(slots=True)
class Batch:
    """One read of a prefetch.

    Attributes:
        job_id: its job.
        host_pages: where its pages go.
        n_delivered: leading pages that all ranks have; -1 until settled.
    """

    job_id: int
    host_pages: array[int]
    n_delivered: int = -1


@dataclass(slots=True, eq=False)
class Prefetch:
    """What one request has asked storage for.

    Attributes:
        request_id: whose.
        tokens: the request's tokens, packed, without the page that ends with the last one.
        n_pages: whole pages of ``tokens``.
        seed: seed of the chain of page keys.
        n_asked_tokens: tokens that were missing when the request came.
        storage: the attachment that is asked.
        started_s: when it was asked, by the clock.
        span: its trace.
        timer: the job that ends the wait, once the scheduler wants to run the request.
        due_s: when this rank reports the timer.
        waits_for: a read of the same pages that is under way and goes first.
        anchor: deepest node that was matched; locked while the question is open.
        first_page: first page of the pending run, counted from the start of ``tokens``.
        node: lower end of the pending run; None until the read is submitted.
        n_pending: pages of the run that are not settled yet.
        orphans: host pages of such a run that was taken out of the tree; None while it is there.
        batches: the reads, in order.
        n_settled_batches: leading batches that are settled.
        read_at_s: when the reads were submitted.
        n_ready: pages that have arrived without a gap and are no hits yet.
        broken: a batch fell short, so nothing behind it can be used.
        n_loaded_pages: pages of the run that are hits now.
        shortfall: why there is no more, as far as this rank knows.
        given_up: the request went on without the rest.
        done: nothing more will come.
    """

    request_id: str
    tokens: bytes
    n_pages: int
    seed: bytes
    n_asked_tokens: int
    storage: Attachment
    started_s: float
    span: SpanHandle
    timer: int | None = None
    due_s: float = 0.0
    waits_for: Prefetch | None = None
    anchor: Node | None = None
    first_page: int = 0
    node: Node | None = None
    n_pending: int = 0
    orphans: set[int] | None = None
    batches: list[Batch] = field(default_factory=list)
    n_settled_batches: int = 0
    read_at_s: float = 0.0
    n_ready: int = 0
    broken: bool = False
    n_loaded_pages: int = 0
    shortfall: Shortfall | None = None
    given_up: bool = False
    done: bool = False

    def falls_short(self, shortfall: Shortfall) -> None:
        """Remembers the first reason: what comes after it follows from it."""
        if self.shortfall is None:
            self.shortfall = shortfall
