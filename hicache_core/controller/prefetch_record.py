"""The record of one request's prefetch, from the question until the last read has settled."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import NamedTuple

from hicache_core.controller.attachment import Attachment
from hicache_core.observe.tracing import SpanHandle
from hicache_core.radix.node import Node
from hicache_core.types import JobResult, JobState

_DONE = JobState.DONE  # looked up once: Python 3.11 takes 70 ns for a member of an enum


class Shortfall(NamedTuple):
    """Why storage did not deliver everything.

    Attributes:
        reason: a value of ``explain.Reason``.
        detail: the same in words, for operators; may be empty.
    """

    reason: str
    detail: str = ""


def shortfall_of(result: JobResult) -> Shortfall | None:
    """Why a job failed, by its result; None if it did not."""
    if result.state is _DONE:
        return None
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
    """One read job of a prefetch.

    Attributes:
        job_id: of the read.
        host_pages: where its pages go.
        n_delivered: leading pages that all ranks have; -1 until settled.
    """

    job_id: int
    host_pages: array[int]
    n_delivered: int = -1


@dataclass(slots=True, eq=False)
class UnitRead:
    """One read of units of a group.

    Attributes:
        group: index of the group.
        first: the page that the first unit belongs to.
        units: host units that are filled.
        job_id: of the read.
        n_delivered: leading units that all ranks have; -1 until settled.
    """

    group: int
    first: int
    units: array[int]
    job_id: int = -1
    n_delivered: int = -1


@dataclass(slots=True, eq=False)
class UnitReads:
    """The reads of one prefetch.

    Attributes:
        boundary: pages of the prefix that can be used once all have arrived.
        full_ended: the read of full pages has ended.
        reads: one for each group that lacks units.
    """

    boundary: int
    full_ended: bool = False
    reads: list[UnitRead] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self.full_ended and all(read.n_delivered >= 0 for read in self.reads)

    def pages(self) -> set[int]:
        """The pages for which a unit has arrived."""
        arrived = (range(read.first, read.first + read.n_delivered) for read in self.reads)
        return set[int]().union(*arrived)


@dataclass(slots=True, eq=False)
class Prefetch:
    """One request and what it has asked storage for.

    Attributes:
        request_id: of the request.
        tokens: the request's tokens, packed, without the page that ends with the last one.
        n_pages: whole pages of ``tokens``.
        seed: seed of the chain of page keys.
        n_asked_tokens: tokens that were missing when the request arrived.
        storage: the backend that is asked.
        started_s: when the prefetch began, by the cache's clock.
        span: its trace span.
        timer: the job that ends the wait, once the scheduler wants to run the request.
        due_s: when this rank reports the timer.
        waits_for: an earlier read of the same pages, which goes first.
        anchor: deepest node that was matched; locked until storage has answered.
        first_page: first page of the pending run, counted from the start of ``tokens``.
        node: last node of the pending run; None until the reads are submitted.
        n_pending: pages of the run that are not settled yet.
        orphans: host pages of the run if it was taken out of the tree; None while it is there.
        batches: the reads, in order.
        n_settled_batches: leading batches that are settled.
        read_at_s: when the reads were submitted.
        n_ready: pages that have arrived without a gap and are not hits yet.
        broken: a batch fell short, so pages after it cannot be used.
        n_loaded_pages: pages of the run that are hits now.
        unit_reads: reads of units of groups; None until they are submitted.
        n_delivered_pages: pages of a usable prefix of which storage delivered something: the page,
            or a unit of a group. Of a model without groups it stays 0.
        shortfall: why storage did not deliver everything, as far as this rank knows.
        given_up: the request went on without the rest.
        done: no more pages will come.
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
    unit_reads: UnitReads | None = None
    n_delivered_pages: int = 0
    shortfall: Shortfall | None = None
    given_up: bool = False
    done: bool = False

    def falls_short(self, shortfall: Shortfall) -> None:
        """Remembers the first reason: later ones follow from it."""
        if self.shortfall is None:
            self.shortfall = shortfall
