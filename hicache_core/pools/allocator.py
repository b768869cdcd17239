"""Which pages of a pool are free."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NoReturn

import torch

from hicache_core.errors import IntegrityError, PoolExhausted, SpecError

VECTOR_FROM = 512
"""Ids from which on torch finds their bounds sooner than Python."""


class PageAllocator:
    """Hands out page ids: a stack of free ones and a set of those in use.

    Pages come in ascending order from a fresh pool, and those freed last come first, while they
    are warm. One thread, the owner, calls everything.
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
        self._used: set[int] = set()

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
        self._used.update(pages)
        return pages

    def free(self, pages: Sequence[int]) -> None:
        """Gives ``pages`` back, all or none.

        Raises:
            IntegrityError: a page is not in use (freed before, named twice, or no page of this
                pool); nothing was changed.
        """
        used = self._used
        n_used = len(used) - len(pages)
        used.difference_update(pages)
        if len(used) != n_used:
            self._refuse(pages)
        self._free.extend(pages[::-1])

    def check_integrity(self) -> None:
        """Every page is either free or in use, once.

        Raises:
            IntegrityError: names the pages that are not.
        """
        free = set(self._free)
        if len(free) != len(self._free):
            raise IntegrityError(f"{len(self._free) - len(free)} pages are free more than once")
        if not free.isdisjoint(self._used):
            both = sorted(free & self._used)
            raise IntegrityError(f"pages {both[:8]} are free and in use")
        known = free | self._used
        if len(known) != self.n_pages or min(known) != 0 or max(known) != self.n_pages - 1:
            lost = sorted(set(range(self.n_pages)) ^ known)
            raise IntegrityError(f"pages {lost[:8]} are lost, or not of this pool")

    def _refuse(self, pages: Sequence[int]) -> NoReturn:
        """Puts back what ``free`` took out of the set before it saw that a page was not in it."""
        free = set(self._free)
        named = set(pages)
        foreign = sorted(page for page in named if not 0 <= page < self.n_pages)
        self._used |= named.difference(free, foreign)
        if foreign:
            raise IntegrityError(
                f"pages {foreign[:8]} do not exist in a pool of {self.n_pages} pages"
            )
        if twice := sorted(named & free):
            raise IntegrityError(f"pages {twice[:8]} are freed, but they are free already")
        raise IntegrityError("a page is named twice in one call of free()")


def check_page_ids(pages: array[int], n_pages: int, where: str) -> None:
    """Refuses ids that a pool of ``n_pages`` does not have.

    Raises:
        IntegrityError: names the pool and the ids.
    """
    if len(pages) < VECTOR_FROM:
        low, high = (min(pages), max(pages)) if pages else (0, 0)
    else:
        bounds = torch.frombuffer(pages, dtype=torch.int32).aminmax()
        low, high = int(bounds.min), int(bounds.max)
    if low < 0 or high >= n_pages:
        raise IntegrityError(f"{where} pages {low} to {high} in a pool of {n_pages} pages")
