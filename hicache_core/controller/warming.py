"""Warming: what is loaded from storage for a prompt before any request needs it."""

from __future__ import annotations

from hicache_core.controller.prefetch_record import Prefetch, Shortfall


class Warming:
    """The loading of one prompt. The owner changes it; any thread may read.

    ``Controller.finish_prefetch`` ends it.
    """

    def __init__(self, prefetch: Prefetch | None, not_begun: Shortfall | None = None) -> None:
        """Follows a prefetch.

        Args:
            prefetch: what was begun; None if nothing was.
            not_begun: why not.
        """
        self._prefetch = prefetch
        self._not_begun = not_begun

    @property
    def done(self) -> bool:
        """Whether no more pages will come."""
        return self._prefetch is None or self._prefetch.done

    @property
    def shortfall(self) -> Shortfall | None:
        """Why storage did not deliver everything, once it is ``done``; None if it did."""
        return self._not_begun if self._prefetch is None else self._prefetch.shortfall
