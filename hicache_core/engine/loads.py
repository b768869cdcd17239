"""Loads: the copies to the device that are under way, and the waits for them."""

from __future__ import annotations

import contextlib

from hicache_core.controller.controller import Controller
from hicache_core.engine.task import Task
from hicache_core.errors import LoadFailed

_SETTLE_S = 0.001
"""So long a look for the end of a copy may take."""


class Loads:
    """What requests wait for that stand on pages of the host. Owner thread only."""

    def __init__(self, cache: Controller, *, is_alone: bool) -> None:
        """``is_alone``: no other rank computes the same forwards."""
        self._cache = cache
        self._is_alone = is_alone

    def wait_layer(self, layer: int) -> None:
        """Returns when a layer's pages are there, or with several ranks, will never be.

        A rank that left a forward would leave the others in it; all start over after it.

        Raises:
            LoadFailed: they will never be, and nobody else waits.
        """
        try:
            self._cache.wait_layer(layer)
        except LoadFailed:
            if self._is_alone:
                raise

    def have_arrived(self, task: Task) -> bool:
        """Whether a request's prefix is there; from then on something may be stored below it."""
        settle_loads(self._cache)
        if self._cache.n_failed_loads == task.n_failed_loads:
            return True
        with contextlib.suppress(LoadFailed):
            self._cache.wait_layer(0)  # tells a failure once more, for requests that do not count
        return False


def settle_loads(cache: Controller) -> None:
    """Returns when every copy to the device has ended, and all ranks know how."""
    while not cache.loads_settled:
        cache.wait(_SETTLE_S)
        cache.poll()
