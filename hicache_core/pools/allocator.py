"""Which pages of a pool are free."""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from typing import NoReturn

from hicache_core.errors import IntegrityError, PoolExhausted, SpecError

try:
    if os.environ.get("HICACHE_PURE_PYTHON") == "1":
        raise ImportError("HICACHE_PURE_PYTHON=1")
    from hicache_core.pools._page_marks import are_pages, flip
except ImportError:  # also where there was no C compiler: the twin answers the same, more slowly
    from hicache_core.pools._page_marks_py import are_pages, flip


class PageAllocator:
    """Hands out page ids: a stack of free pages, and a mark for each page in use.

    A new pool hands out pages in ascending order. Pages freed last are handed out first, while they
    are still in the CPU's cache. Only the owner thread calls it.
    """

    def __init__(self, n_pages: int) -> None:
        """All of ``n_pages`` pages are free.

        Raises:
            SpecError: ``n_pages`` is not positive or does not fit a 32-bit page id.
        """
        if not 0 < n_pages < 2**31:
            raise SpecError(f"a pool needs 1 to 2**31 - 1 pages, not {n_pages}")
        self.n_pages = n_pages
        self._free = array("i", range(n_pages - 1, -1, -1))  # top of the stack at the end
        self._used = bytearray(n_pages)

    @property
    def n_free(self) -> int:
        """How many pages are free."""
        return len(self._free)

    def allocate(self, n: int) -> array[int]:
        """Takes ``n`` pages, or none at all.

        Raises:
            PoolExhausted: fewer than ``n`` are free; nothing was taken.
        """
        free = self._free
        left = len(free) - n
        if left < 0 or n < 0:
            raise PoolExhausted(f"{n} pages asked, {len(free)} of {self.n_pages} are free")
        pages = free[left:]
        del free[left:]
        pages.reverse()
        flip(self._used, pages, True)
        return pages

    def free(self, pages: Sequence[int]) -> None:
        """Gives ``pages`` back, all or none.

        Raises:
            IntegrityError: a page is not in use (it was freed before, occurs twice, or does not
                belong to this pool); nothing was changed.
        """
        try:
            ids = array("i", pages)
        except OverflowError:
            self._refuse(pages)
        if not flip(self._used, ids, False):
            self._refuse(pages)
        self._free.extend(ids[::-1])

    def check_integrity(self) -> None:
        """Every page is either free or in use, once.

        Raises:
            IntegrityError: names the pages that are not.
        """
        free, used = set(self._free), self._in_use()
        if len(free) != len(self._free):
            raise IntegrityError(f"{len(self._free) - len(free)} pages are free more than once")
        if not free.isdisjoint(used):
            raise IntegrityError(f"pages {sorted(free & used)[:8]} are free and in use")
        if lost := sorted(free ^ used ^ set(range(self.n_pages))):
            raise IntegrityError(f"pages {lost[:8]} are lost, or not of this pool")

    def _in_use(self) -> set[int]:
        return {page for page, is_used in enumerate(self._used) if is_used}

    def _refuse(self, pages: Sequence[int]) -> NoReturn:
        """Says why ``pages`` cannot be freed."""
        named = set(pages)
        if foreign := sorted(page for page in named if not 0 <= page < self.n_pages):
            raise IntegrityError(
                f"pages {foreign[:8]} do not exist in a pool of {self.n_pages} pages"
            )
        if twice := sorted(named - self._in_use()):
            raise IntegrityError(f"pages {twice[:8]} are freed, but they are free already")
        raise IntegrityError("a page is named twice in one call of free()")


def check_page_ids(pages: array[int], n_pages: int, where: str) -> None:
    """Refuses ids that a pool of ``n_pages`` does not have.

    Args:
        pages: the ids, in any order.
        n_pages: pages of the pool.
        where: begins the message, such as the name of the pool.

    Raises:
        IntegrityError: an id is out of range; the message has the smallest and the largest id.
    """
    if not are_pages(pages, n_pages):
        low, high = min(pages), max(pages)
        raise IntegrityError(f"{where} pages {low} to {high} in a pool of {n_pages} pages")
