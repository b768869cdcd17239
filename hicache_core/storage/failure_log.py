"""Warnings about failed storage jobs, rate-limited so that a dead store cannot flood the log."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from hicache_core.types import JobResult, JobState

logger = logging.getLogger(__name__)

LOG_INTERVAL_S = 60.0
"""Failures of the same kind are logged at most once per this many seconds."""


class FailureLog:
    """Logs failed and overdue jobs of one backend. Any thread may call it."""

    def __init__(self, backend_name: str, clock: Callable[[], float]) -> None:
        self._backend_name = backend_name
        self._clock = clock
        self._lock = threading.Lock()
        self._logged_at: dict[tuple[JobState, str], float] = {}

    def warn(self, result: JobResult) -> None:
        """Logs a failure, unless one of the same kind was logged within ``LOG_INTERVAL_S``."""
        now, kind = self._clock(), (result.state, result.error_kind)
        with self._lock:
            last = self._logged_at.get(kind)
            if last is not None and now - last < LOG_INTERVAL_S:
                return
            self._logged_at[kind] = now
        did = "is late with" if result.state is JobState.OVERDUE else "failed"
        what = type(result.job).__name__
        logger.warning("backend %s %s a %s: %s", self._backend_name, did, what, result.error)
