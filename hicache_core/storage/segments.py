"""Helpers for pages, which are sequences of memoryviews (segments)."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter

from hicache_core.types import Page

_NBYTES = attrgetter("nbytes")


def nbytes_of(page: Iterable[memoryview]) -> int:
    """Returns the length of a page's object in bytes."""
    return sum(map(_NBYTES, page))


def join(page: Page) -> bytes:
    """Returns a copy of the object as one ``bytes``, for clients that cannot take segments."""
    return b"".join(page)


def scatter(value: bytes | bytearray | memoryview, page: Page) -> None:
    """Copies ``value`` into the segments, in order.

    Raises:
        ValueError: ``value`` and the segments differ in length; nothing was copied.
    """
    source = memoryview(value).cast("B")
    if source.nbytes != nbytes_of(page):
        raise ValueError(f"expected {nbytes_of(page)} bytes for the page, got {source.nbytes}")
    start = 0
    for segment in page:
        segment[:] = source[start : start + segment.nbytes]
        start += segment.nbytes
