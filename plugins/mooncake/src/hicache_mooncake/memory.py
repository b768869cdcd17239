"""Memory that Mooncake reads and writes in place: addresses and registered ranges."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from hicache_core.errors import IntegrityError
from hicache_core.types import Page

_one_byte = ctypes.c_char.from_buffer
_addressof = ctypes.addressof


def address_of(view: memoryview) -> int:
    """Returns the address of the first byte.

    Raises:
        TypeError: the memory is read-only, so ctypes gives no address.
    """
    return _addressof(_one_byte(view))


class Slices(NamedTuple):
    """A page for Mooncake: addresses and sizes, with adjacent segments joined."""

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

    def check_apart(self, view: memoryview) -> None:
        """Checks that ``view`` overlaps no registered range.

        Raises:
            IntegrityError: it overlaps one.
        """
        start, end = address_of(view), address_of(view) + view.nbytes
        at = bisect_right(self._starts, start)
        behind = at < len(self._starts) and self._starts[at] < end
        if behind or (at and self._ends[at - 1] > start):
            raise IntegrityError(
                f"memory {start:#x}..{end:#x} overlaps memory that is registered already; "
                "register every buffer once"
            )

    def add(self, view: memoryview) -> None:
        """Adds a range that was registered and overlaps no other."""
        start = address_of(view)
        at = bisect_right(self._starts, start)
        self._starts.insert(at, start)
        self._ends.insert(at, start + view.nbytes)
        self._views.insert(at, view)

    def clear(self) -> None:
        """Removes all ranges and drops the references to them."""
        self._starts, self._ends, self._views = [], [], []

    def slices(self, page: Page) -> Slices | None:
        """Returns the page as slices; None if a segment is outside registered memory.

        Adjacent segments in the same range become one slice:

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


class Batch(NamedTuple):
    """A batch before it is cut into calls; every field has one entry for each key."""

    keys: Sequence[str]
    sizes: Sequence[int]
    n_slices: Sequence[int]


def runs(batch: Batch, max_nbytes: int, max_slices: int) -> Iterator[slice]:
    """Cuts a batch into ranges, one for each call of the client.

    A range has one page or stays within both limits. It has no key twice: Mooncake would fill one
    of the two pages and report success for both.

    Args:
        batch: keys and places of the pages.
        max_nbytes: maximum bytes of a call.
        max_slices: maximum slices of a call.
    """
    start = nbytes = n_slices = 0
    seen: set[str] = set()
    for n, (key, size, count) in enumerate(zip(*batch, strict=True)):
        full = nbytes + size > max_nbytes or n_slices + count > max_slices
        if n > start and (full or key in seen):
            yield slice(start, n)
            start, nbytes, n_slices = n, 0, 0
            seen.clear()
        nbytes += size
        n_slices += count
        seen.add(key)
    if start < len(batch.keys):
        yield slice(start, len(batch.keys))


class SliceGate:
    """Limits the slices of all running calls.

    The tcp transport queues a thousand transfers for a peer, lets as many wait briefly, and fails
    further ones.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._room = threading.Condition()
        self._n_under_way = 0

    @contextlib.contextmanager
    def passing(self, n_slices: int) -> Iterator[None]:
        """Blocks until the slices fit into the limit; more than the limit passes alone."""
        with self._room:
            self._room.wait_for(
                lambda: not self._n_under_way or self._n_under_way + n_slices <= self.limit
            )
            self._n_under_way += n_slices
        try:
            yield
        finally:
            with self._room:
                self._n_under_way -= n_slices
                self._room.notify_all()
