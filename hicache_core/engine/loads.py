"""Loads: the running copies from host to device, and the waits for them."""

from __future__ import annotations

import contextlib

from hicache_core.controller.controller import Controller
from hicache_core.engine.task import Task
from hicache_core.errors import LoadFailed

_SETTLE_S = 0.001
"""So long a look for the end of a copy may take."""


class Loads:
    """Waits for pages that are copied from the host. Owner thread only."""

    def __init__(self, cache: Controller, *, is_alone: bool) -> None:
        """``is_alone``: True if no other rank computes the same forwards."""
        self._cache = cache
        self._is_alone = is_alone

    def wait_layer(self, layer: int) -> None:
        """Blocks until a layer's pages are there; with several ranks also until they failed.

        A rank that left a forward early would leave the others waiting in it, so all ranks finish
        the forward and start the request over.

        Raises:
            LoadFailed: the pages will not come, and this process computes alone.
        """
        try:
            self._cache.wait_layer(layer)
        except LoadFailed:
            if self._is_alone:
                raise

    def have_arrived(self, task: Task) -> bool:
        """Whether a request's prefix has arrived; only then may pages be stored below it."""
        settle_loads(self._cache)
        if self._cache.n_failed_loads == task.n_failed_loads:
            return True
        with contextlib.suppress(LoadFailed):
            self._cache.wait_layer(0)  # tells a failure once more, for requests that do not count
        return False


def settle_loads(cache: Controller) -> None:
    """Blocks until every copy to the device has ended and all ranks know the outcome."""
    while not cache.loads_settled:
        cache.wait(_SETTLE_S)
        cache.poll()
