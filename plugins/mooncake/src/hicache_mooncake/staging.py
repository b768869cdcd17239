"""Copies pages outside registered memory through one registered buffer."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from hicache_core.errors import BackendError
from hicache_core.plugin.backends import nbytes_of, scatter
from hicache_core.types import Page
from hicache_mooncake.client import Store
from hicache_mooncake.errors import INVALID_PARAMS
from hicache_mooncake.memory import address_of

EMPTY = bytes.fromhex("9d1f6c0b7ae84e52b3c85f0e21d7a694")
"""Mooncake cannot store empty objects; these 16 bytes represent one. A real object of these bytes
is refused. Sealed objects are 64 bytes at least, so they never meet it."""


def may_be_empty(nbytes: int) -> bool:
    """Returns whether an object of that size is empty, or could be taken for an empty one."""
    return nbytes in {0, len(EMPTY)}


class Staging:
    """One registered buffer through which pages are copied, one call at a time.

    It is allocated when it is first needed and grows up to ``limit_nbytes``. Any thread may call
    ``fetch``, ``read``, ``write`` and ``rewrite``; they block each other.
    """

    def __init__(
        self,
        limit_nbytes: int,
        register: Callable[[int, int], None],
        unregister: Callable[[int], None],
    ) -> None:
        """Allocates nothing yet.

        Args:
            limit_nbytes: maximum size of the buffer.
            register: announces memory to the transport; called with address and length.
            unregister: withdraws memory; called with its address.
        """
        self.limit_nbytes = limit_nbytes
        self._lock = threading.Lock()
        self._register = register
        self._unregister = unregister
        self._map: mmap.mmap | None = None
        self._view = memoryview(b"")
        self._address = 0

    def fetch(self, store: Store, key: str) -> bytes | int:
        """Returns the object under ``key``, or Mooncake's negative code."""
        size = store.get_size(key)
        if size < 0:
            return size
        with self._lock:
            room = self._room(size)
            code = store.batch_get_into([key], [self._address], [size])[0]
            if code < 0:
                return code
            value = bytes(room[:code])
        return b"" if value == EMPTY else value

    def read(self, store: Store, keys: Sequence[str], pages: Sequence[Page]) -> list[int]:
        """Reads pages; returns for each its size in bytes, or a negative code.

        Args:
            store: of the client.
            keys: one for each page.
            pages: where to.
        """
        wanted = [nbytes_of(page) for page in pages]
        sizes = [size or len(EMPTY) for size in wanted]
        with self._lock:
            room = self._room(sum(sizes))
            starts = [0, *accumulate(sizes)]
            addresses = [self._address + start for start in starts[:-1]]
            codes = store.batch_get_into(list(keys), addresses, sizes)
            for n, page in enumerate(pages):
                if codes[n] != sizes[n]:
                    continue
                value = room[starts[n] : starts[n + 1]]
                if (value == EMPTY) == (wanted[n] == 0):
                    scatter(value[: wanted[n]], page)
                    codes[n] = wanted[n]
                else:  # empty where bytes are wanted, or the other way round
                    codes[n] = INVALID_PARAMS
        return codes

    def write(
        self, store: Store, keys: Sequence[str], pages: Sequence[Page], replication: Any
    ) -> list[int]:
        """Stores pages; returns Mooncake's code for each.

        Args:
            store: of the client.
            keys: one for each page.
            pages: what to store.
            replication: Mooncake's properties of the objects.

        Raises:
            BackendError: a page consists of the bytes that represent an empty object.
        """
        sizes = [nbytes_of(page) or len(EMPTY) for page in pages]
        with self._lock:
            room = self._room(sum(sizes))
            starts = [0, *accumulate(sizes)]
            for n, page in enumerate(pages):
                place = room[starts[n] : starts[n + 1]]
                if nbytes_of(page):
                    _gather(page, place)
                    if place == EMPTY:
                        raise BackendError(
                            f"{keys[n]} consists of the 16 bytes that represent an empty object in "
                            "Mooncake; it cannot be stored"
                        )
                else:
                    place[:] = EMPTY
            addresses = [self._address + start for start in starts[:-1]]
            return store.batch_put_from(list(keys), addresses, sizes, replication)

    def rewrite(self, store: Store, key: str, replication: Any) -> int:
        """Writes an object again, with other properties; returns Mooncake's code.

        Args:
            store: of the client.
            key: of the object.
            replication: its new properties.

        Raises:
            BackendError: it is larger than the maximum size of the buffer.
        """
        size = store.get_size(key)
        if size < 0:
            return size
        with self._lock:
            self._room(size)
            code = store.batch_get_into([key], [self._address], [size])[0]
            if code != size:
                return code if code < 0 else INVALID_PARAMS
            return store.upsert_from(key, self._address, size, replication)

    def release(self) -> None:
        """Releases the buffer."""
        with self._lock:
            self._release()

    def _room(self, nbytes: int) -> memoryview:
        """Returns the first ``nbytes`` bytes of the buffer, which is at ``_address``.

        Raises:
            BackendError: more than ``limit_nbytes``, or the transport refused the memory.
        """
        if nbytes > self.limit_nbytes:
            raise BackendError(
                f"{nbytes} bytes in memory that is not registered do not fit the staging buffer of "
                f"{self.limit_nbytes} bytes; register the memory or raise staging_nbytes"
            )
        if nbytes > self._view.nbytes:
            size = min(self.limit_nbytes, max(nbytes, 1 << 20, 2 * self._view.nbytes))
            self._release()
            memory = mmap.mmap(-1, size)
            view = memoryview(memory)
            address = address_of(view)
            self._register(address, size)
            self._map, self._view, self._address = memory, view, address
        return self._view[:nbytes]

    def _release(self) -> None:
        if self._map is not None:
            self._unregister(self._address)
            # The last slice of it to go unmaps it.
            self._map, self._view, self._address = None, memoryview(b""), 0


def _gather(page: Page, target: memoryview) -> None:
    """Copies the segments into ``target``, one after the other."""
    start = 0
    for segment in page:
        target[start : start + segment.nbytes] = segment
        start += segment.nbytes
