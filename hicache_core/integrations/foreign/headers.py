"""Headers of ours before an engine's pages."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Sequence

from hicache_core.storage.sealed import HEADER_NBYTES
from hicache_core.types import Page

N_HEADERS = 16_384
"""Pages that may use headers of the reserved memory; 1 MiB of it."""

_ZEROS = bytes(1 << 20)
_UNTOUCHED = os.urandom(HEADER_NBYTES)
"""What a header holds before a call: no stored object begins so, damaged or not."""


class Headers:
    """Lends a header to each page of a call, and sees whether it was written. Threads: any.

    Attributes:
        memory: where they lie, for transports that must know it.
    """

    def __init__(self, n: int = N_HEADERS) -> None:
        """Reserves memory for ``n`` headers; more are made as they are needed."""
        self.memory = memoryview(mmap.mmap(-1, n * HEADER_NBYTES))
        self._lock = threading.Lock()
        self._n_cut = 0
        self._free: list[memoryview] = []

    def before(self, pages: Sequence[Page]) -> Sequence[Page]:
        """Returns the pages of an engine with a header before each."""
        if not pages:
            return ()
        with self._lock:
            while len(self._free) < len(pages):
                self._free.append(self._cut())
            taken = self._free[-len(pages) :]
            del self._free[-len(pages) :]
        return [(header, *page) for header, page in zip(taken, pages, strict=True)]

    def give_back(self, pages: Sequence[Page]) -> None:
        """Takes the headers back from pages that nothing touches any more."""
        headers = [page[0] for page in pages]
        for header in headers:
            header[:] = _UNTOUCHED
        with self._lock:
            self._free += headers

    @staticmethod
    def wipe_touched(pages: Sequence[Page], mask: Sequence[bool]) -> None:
        """Fills the pages with zeros that are not in ``mask`` and whose header was written.

        Args:
            pages: with the headers that they had in the call.
            mask: for each page whether it was verified.
        """
        for page, good in zip(pages, mask, strict=True):
            if not good and page[0] != _UNTOUCHED:
                wipe(page[1:])

    def _cut(self) -> memoryview:
        start = self._n_cut * HEADER_NBYTES
        if start >= self.memory.nbytes:
            return memoryview(bytearray(_UNTOUCHED))
        self._n_cut += 1
        header = self.memory[start : start + HEADER_NBYTES]
        header[:] = _UNTOUCHED
        return header


def wipe(page: Page) -> None:
    """Fills a page with zeros."""
    for segment in page:
        for start in range(0, segment.nbytes, len(_ZEROS)):
            part = segment[start : start + len(_ZEROS)]
            part[:] = _ZEROS[: part.nbytes]
