"""The status of an engine, from its parts."""

from __future__ import annotations

from hicache_core.engine.config import EngineStatus
from hicache_core.engine.limits import Limits
from hicache_core.engine.scheduler import Scheduler


def status_of(
    scheduler: Scheduler, limits: Limits, page_size: int, n_queued: int, error: str, stalled: str
) -> EngineStatus:
    """One look; any thread.

    Args:
        scheduler: what it does, and did.
        limits: of the engine.
        page_size: tokens of a page.
        n_queued: requests that the scheduler has not heard of yet.
        error, stalled: as of ``EngineStatus``.
    """
    tally = scheduler.tally
    return EngineStatus(
        waiting=n_queued + scheduler.n_waiting,
        running=scheduler.n_running,
        n_slots=limits.n_slots,
        used_slots=scheduler.n_used_pages * page_size,
        tokens_per_s=scheduler.decoded.per_s(),
        prefill_tokens_per_s=scheduler.prefilled.per_s(),
        finished=tally.finished,
        aborted=tally.aborted,
        failed=tally.failed,
        preempted=tally.preempted,
        context_length=limits.context_length,
        error=error,
        stalled=stalled,
    )
