"""Watchdog: finds a request that makes no progress, for health checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from hicache_core.engine.task import Task


class Watchdog:
    """Looks at requests from another thread, since the engine's own may be stuck."""

    def __init__(self, limit_s: float, clock: Callable[[], float]) -> None:
        """A request without progress for more than ``limit_s`` seconds of ``clock`` is stalled."""
        self._limit_s = limit_s
        self._clock = clock

    def look(self, tasks: Iterable[Task], progressed_s: float) -> str:
        """A sentence about the first stalled request; empty if none is stalled. Any thread.

        A request whose answer is being decoded gets a token each step. Any other waits for its
        turn: it is stalled only while nobody else makes progress either.

        Args:
            tasks: requests that have not ended.
            progressed_s: when any request made progress last, by the clock.
        """
        now = self._clock()
        for task in sorted(tasks, key=lambda task: task.order):
            is_decoded = task.decodes and len(task.table.pages) > 0
            last_s = task.progressed_s if is_decoded else max(task.progressed_s, progressed_s)
            if now - last_s > self._limit_s:
                doing = f"has {task.n_new} of at most {task.n_new_max} new tokens"
                if not is_decoded:
                    doing = f"waits with a prompt of {task.n_prompt} tokens"
                return (
                    f"request {task.request.request_id} {doing} and has made no progress for "
                    f"{now - last_s:.0f} s: the engine is stuck; restart it"
                )
        return ""
