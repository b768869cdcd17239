"""Helpers for pages, that is for sequences of memoryviews (segments)."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter

from hicache_core.types import Page

_NBYTES = attrgetter("nbytes")


def nbytes_of(page: Iterable[memoryview]) -> int:
    """Length in bytes of the object whose segments these are."""
    return sum(map(_NBYTES, page))


def join(page: Page) -> bytes:
    """The object as one ``bytes``: a copy, for clients that cannot take segments."""
    return b"".join(page)


def scatter(value: bytes | bytearray | memoryview, page: Page) -> None:
    """Copies ``value`` into the segments, in order.

    Raises:
        ValueError: ``value`` is not exactly as long as the segments together; nothing was copied.
    """
    source = memoryview(value).cast("B")
    if source.nbytes != nbytes_of(page):
        raise ValueError(f"{source.nbytes} bytes do not fit a page of {nbytes_of(page)} bytes")
    start = 0
    for segment in page:
        segment[:] = source[start : start + segment.nbytes]
        start += segment.nbytes
