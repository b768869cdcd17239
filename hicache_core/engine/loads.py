"""Loads: the copies to the device that are under way, and the wait for their end."""

from __future__ import annotations

from hicache_core.controller.controller import Controller

_SETTLE_S = 0.001
"""So long a look for the end of a copy may take."""


def settle_loads(cache: Controller) -> None:
    """Returns when every copy to the device has ended, and all ranks know how. Owner thread."""
    while not cache.loads_settled:
        cache.wait(_SETTLE_S)
        cache.poll()
