"""What a backend offers that lets its caller look at each page while the page is being moved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from hicache_core.types import Page


@runtime_checkable
class VisitsPages(Protocol):
    """A backend that calls back for each page it moves, on the thread that moves it.

    A checksum that is taken then finds the page in the processor's cache, and runs beside the
    transport of other pages. The callbacks are called from several threads at once. A wrapper does
    not pass this capability on by itself: what it does in ``batch_get`` would be left out.
    """

    def batch_get_visiting(
        self, keys: Sequence[str], pages: Sequence[Page], arrived: Callable[[int], bool]
    ) -> int:
        """As ``batch_get``; a page counts only if ``arrived(index)`` says so.

        A page that was overwritten while it was read may be shown to ``arrived`` too; it does not
        count then, whatever the answer.
        """
        ...

    def batch_set_visiting(
        self, keys: Sequence[str], pages: Sequence[Page], leaving: Callable[[int], None]
    ) -> int:
        """As ``batch_set``; calls ``leaving(index)`` before a page is stored.

        A page that is stored already may be passed over.
        """
        ...
