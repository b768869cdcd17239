"""Bytes that are a function of their key, so that torn, foreign and shifted objects show."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from hicache_core.storage.segments import join, nbytes_of
from hicache_core.types import Page

_GUARD = b"\xa5" * 16
_UNFILLED = b"\xee"


def content(key: str, nbytes: int) -> bytes:
    """The right object of ``nbytes`` bytes under ``key``; the same in every process.

    It depends on the length too: a shorter object is not a prefix of a longer one.
    """
    return random.Random(f"{key} {nbytes}").randbytes(nbytes)


class GuardedPage:
    """A page whose segments are in one buffer, with guard bytes before and after each of them.

    Attributes:
        segments: the page; it holds no object until it is filled.
    """

    def __init__(self, shape: Sequence[int], take: Callable[[int], memoryview]) -> None:
        """Makes a page with one segment for each length (bytes) in ``shape``.

        Args:
            shape: lengths of the segments in bytes.
            take: gives a buffer of that many bytes.
        """
        # | guard | segment | guard | segment | guard |
        view = take(sum(shape) + len(_GUARD) * (len(shape) + 1))
        segments, guards = [], [view[: len(_GUARD)]]
        start = len(_GUARD)
        for nbytes in shape:
            segments.append(view[start : start + nbytes])
            guards.append(view[start + nbytes : start + nbytes + len(_GUARD)])
            start += nbytes + len(_GUARD)
        for segment in segments:
            segment[:] = _UNFILLED * segment.nbytes
        for guard in guards:
            guard[:] = _GUARD
        self.segments: Page = tuple(segments)
        self._guards = guards

    def guards_intact(self) -> bool:
        """Whether no byte outside of the segments has changed."""
        return all(guard == _GUARD for guard in self._guards)


def scribble(page: Page) -> None:
    """Overwrites ``page``, as a caller does that reuses its memory."""
    for segment in page:
        segment[:] = b"\x11" * segment.nbytes


def difference(key: str, nbytes: int, found: bytes | bytearray | memoryview) -> str:
    """Compares bytes that came back with the object that the kit stores under a key.

    Args:
        key: of the object.
        nbytes: length of the object.
        found: the bytes that came back.

    Returns:
        The first difference, in words; empty if there is none.
    """
    right, given = content(key, nbytes), bytes(found)
    if given == right:
        return ""
    if len(given) != nbytes:
        return f"{len(given)} bytes came back for an object of {nbytes} bytes"
    first = next(n for n, (a, b) in enumerate(zip(given, right, strict=True)) if a != b)
    n_wrong = sum(a != b for a, b in zip(given, right, strict=True))
    return f"{n_wrong} of {nbytes} bytes are wrong, the first at offset {first}"


def page_difference(key: str, page: Page) -> str:
    """As :func:`difference`, for the bytes of a page."""
    return difference(key, nbytes_of(page), join(page))
