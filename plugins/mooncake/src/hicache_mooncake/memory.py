"""Memory that Mooncake reads and writes in place: addresses and registered ranges."""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from hicache_core.errors import IntegrityError
from hicache_core.types import Page

_one_byte = ctypes.c_char.from_buffer
_addressof = ctypes.addressof


def address_of(view: memoryview) -> int:
    """Address of the first byte.

    Raises:
        TypeError: the memory is read-only; ctypes gives no address of it.
    """
    return _addressof(_one_byte(view))


class Slices(NamedTuple):
    """A page as Mooncake takes it: parallel addresses and sizes, adjacent segments joined."""

    addresses: list[int]
    sizes: list[int]
    nbytes: int


class RegisteredMemory:
    """The address ranges that were announced to the transport.

    Keeps a reference to each buffer, since the transport writes to its address. ``add`` and
    ``release`` are called by the owner; ``slices`` by any thread, after the last ``add``.
    """

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._views: list[memoryview] = []

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def nbytes(self) -> int:
        """Bytes registered."""
        return sum(view.nbytes for view in self._views)

    @property
    def addresses(self) -> list[int]:
        """First address of each range."""
        return list(self._starts)

    def add(self, view: memoryview) -> None:
        """Remembers a range that was registered.

        Raises:
            IntegrityError: the range overlaps another.
        """
        start, end = address_of(view), address_of(view) + view.nbytes
        at = bisect_right(self._starts, start)
        if (at and self._ends[at - 1] > start) or (
            at < len(self._starts) and self._starts[at] < end
        ):
            raise IntegrityError(
                f"memory {start:#x}..{end:#x} overlaps memory that is registered already; "
                "register every buffer once"
            )
        self._starts.insert(at, start)
        self._ends.insert(at, end)
        self._views.insert(at, view)

    def clear(self) -> None:
        """Forgets every range and drops the references."""
        self._starts, self._ends, self._views = [], [], []

    def slices(self, page: Page) -> Slices | None:
        """The page as addresses and sizes; None if a segment is not wholly in registered memory.

        Segments that follow each other in one range become one slice:

            segment   |--0--|--1--|        |--2--|
            slice     |-----0-----|        |--1--|
        """
        starts, ends = self._starts, self._ends
        addresses: list[int] = []
        sizes: list[int] = []
        total, next_address, last_range = 0, -1, -1
        for segment in page:
            nbytes = segment.nbytes
            if not nbytes:
                continue
            if segment.readonly:
                return None
            address = _addressof(_one_byte(segment))
            at = bisect_right(starts, address) - 1
            if at < 0 or address + nbytes > ends[at]:
                return None
            if address == next_address and at == last_range:
                sizes[-1] += nbytes
            else:
                addresses.append(address)
                sizes.append(nbytes)
            total += nbytes
            next_address, last_range = address + nbytes, at
        return Slices(addresses, sizes, total)


def runs(sizes: Sequence[int], limit: int) -> Iterator[slice]:
    """Consecutive stretches of ``sizes`` that each add up to at most ``limit``, or are one long."""
    start = total = 0
    for n, size in enumerate(sizes):
        if n > start and total + size > limit:
            yield slice(start, n)
            start, total = n, 0
        total += size
    if start < len(sizes):
        yield slice(start, len(sizes))
