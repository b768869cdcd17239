"""Capabilities: the caller sees each page while it is being moved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from hicache_core.types import Page


@runtime_checkable
class VisitsPages(Protocol):
    """A backend that calls back for each page it moves, on the thread that moves it.

    A checksum computed in the callback finds the page in the processor's cache and overlaps with
    the transport of other pages. Several threads may call the callbacks at the same time.

    A wrapper does not pass this capability on by itself: its own ``batch_get`` would be skipped.
    """

    def batch_get_visiting(
        self, keys: Sequence[str], pages: Sequence[Page], arrived: Callable[[int], bool]
    ) -> int:
        """As ``StorageBackend.batch_get``, with a callback after each page.

        Args:
            keys: one for each page.
            pages: where to read to.
            arrived: called with the index of a page that was read; the page counts only if it
                returns True. It may also be called for a page whose object was overwritten during
                the read; such a page never counts.
        """
        ...

    def batch_set_visiting(
        self, keys: Sequence[str], pages: Sequence[Page], leaving: Callable[[int], None]
    ) -> int:
        """As ``StorageBackend.batch_set``, with a callback before each page.

        Args:
            keys: one for each page.
            pages: what to store.
            leaving: called with the index of a page before it is stored, and may still change it.
                It need not be called for a page that is stored already.
        """
        ...


@runtime_checkable
class VisitsEachPage(Protocol):
    """As ``VisitsPages``, for the calls that answer for each page."""

    def get_each_visiting(
        self, keys: Sequence[str], pages: Sequence[Page], arrived: Callable[[int], bool]
    ) -> Sequence[bool]:
        """As ``StorageBackend.get_each``, with a callback after each page.

        Args:
            keys: one for each page.
            pages: where to read to.
            arrived: as for ``VisitsPages.batch_get_visiting``; a page that it refuses does not end
                the call.
        """
        ...

    def set_each_visiting(
        self, keys: Sequence[str], pages: Sequence[Page], leaving: Callable[[int], None]
    ) -> Sequence[bool]:
        """As ``StorageBackend.set_each``, with a callback before each page.

        Args:
            keys: one for each page.
            pages: what to store.
            leaving: as for ``VisitsPages.batch_set_visiting``.
        """
        ...
