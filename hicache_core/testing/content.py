"""Bytes that are a function of their key, so that torn, foreign and shifted ones are told apart."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from hicache_core.storage.segments import join, nbytes_of
from hicache_core.types import Page

_GUARD = b"\xa5" * 16
_UNFILLED = b"\xee"


def content(key: str, nbytes: int) -> bytes:
    """The one right object of ``nbytes`` bytes under ``key``; the same in every process.

    The length takes part: a shorter object is no prefix of a longer one.
    """
    return random.Random(f"{key} {nbytes}").randbytes(nbytes)


class GuardedPage:
    """A page whose segments lie in one buffer, with guard bytes before and behind each of them.

    Attributes:
        segments: the page; its bytes are no object's until it is filled.
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
    """Overwrites ``page``, as a caller does who uses its memory for something else."""
    for segment in page:
        segment[:] = b"\x11" * segment.nbytes


def difference(key: str, nbytes: int, found: bytes | bytearray | memoryview) -> str:
    """What is wrong with ``found`` as the object of ``key``, in words; empty if nothing is."""
    right, given = content(key, nbytes), bytes(found)
    if given == right:
        return ""
    if len(given) != nbytes:
        return f"{len(given)} bytes came back for an object of {nbytes} bytes"
    first = next(n for n, (a, b) in enumerate(zip(given, right, strict=True)) if a != b)
    n_wrong = sum(a != b for a, b in zip(given, right, strict=True))
    return f"{n_wrong} of {nbytes} bytes are wrong, the first at offset {first}"


def page_difference(key: str, page: Page) -> str:
    """What is wrong with ``page`` as the object of ``key``, in words; empty if nothing is."""
    return difference(key, nbytes_of(page), join(page))
