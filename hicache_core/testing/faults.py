"""Backends that are slow, flaky, corrupt or stuck on purpose, around any other backend.

A fault depends on the seed, the method, the first key and the number of earlier calls with that
method and key. So it is the same in every run, whatever the order of threads.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from hicache_core.errors import BackendError, BackendUnavailable
from hicache_core.storage.base import Buffer, StorageBackend
from hicache_core.storage.segments import nbytes_of
from hicache_core.storage.wrapper import BackendWrapper
from hicache_core.types import Page

T = TypeVar("T")


class _Draws:
    """A random generator for each call, by seed, method, key and count; from any thread."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._asked: Counter[str] = Counter()
        self._lock = threading.Lock()

    def next(self, method: str, keys: Sequence[str]) -> random.Random:
        call = f"{method} {keys[0] if keys else ''}"
        with self._lock:
            self._asked[call] += 1
            n_asked = self._asked[call]
        return random.Random(f"{self._seed} {call} {n_asked}")


class _Asked(NamedTuple):
    """One call: its method, its keys, and the bytes that it moves as far as the caller says."""

    method: str
    keys: Sequence[str]
    nbytes: int


class _AroundEveryCall(BackendWrapper):
    """Sends every call but ``open`` and ``close`` through ``_around``."""

    def _around(self, asked: _Asked, call: Callable[[], T]) -> T:
        raise NotImplementedError

    def get(self, key: str) -> Buffer | None:
        return self._around(_Asked("get", [key], 0), lambda: self.inner.get(key))

    def exists(self, key: str) -> bool:
        return self._around(_Asked("exists", [key], 0), lambda: self.inner.exists(key))

    def set(self, key: str, value: Buffer) -> None:
        nbytes = memoryview(value).nbytes
        self._around(_Asked("set", [key], nbytes), lambda: self.inner.set(key, value))

    def delete(self, keys: Sequence[str]) -> None:
        self._around(_Asked("delete", keys, 0), lambda: self.inner.delete(keys))

    def batch_exists(self, keys: Sequence[str]) -> int:
        return self._around(_Asked("batch_exists", keys, 0), lambda: self.inner.batch_exists(keys))

    def batch_get(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        nbytes = sum(nbytes_of(page) for page in pages)
        return self._around(
            _Asked("batch_get", keys, nbytes), lambda: self.inner.batch_get(keys, pages)
        )

    def batch_set(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        nbytes = sum(nbytes_of(page) for page in pages)
        return self._around(
            _Asked("batch_set", keys, nbytes), lambda: self.inner.batch_set(keys, pages)
        )

    def exists_each(self, keys: Sequence[str]) -> Sequence[bool]:
        return self._around(_Asked("exists_each", keys, 0), lambda: self.inner.exists_each(keys))

    def get_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        nbytes = sum(nbytes_of(page) for page in pages)
        return self._around(
            _Asked("get_each", keys, nbytes), lambda: self.inner.get_each(keys, pages)
        )

    def set_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        nbytes = sum(nbytes_of(page) for page in pages)
        return self._around(
            _Asked("set_each", keys, nbytes), lambda: self.inner.set_each(keys, pages)
        )


class SlowBackend(_AroundEveryCall):
    """Each call waits before it is made: a fixed time, and the time its bytes take."""

    def __init__(
        self,
        inner: StorageBackend,
        *,
        latency_s: float = 0.0,
        bytes_per_s: float = float("inf"),
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Wraps ``inner``.

        Args:
            inner: what is made slow.
            latency_s: seconds that every call waits.
            bytes_per_s: bandwidth of each call that names pages, and of ``set``.
            sleep: how it waits; a virtual clock's in tests.
        """
        super().__init__(inner)
        self._latency_s = latency_s
        self._bytes_per_s = bytes_per_s
        self._sleep = sleep

    def _around(self, asked: _Asked, call: Callable[[], T]) -> T:
        self._sleep(self._latency_s + asked.nbytes / self._bytes_per_s)
        return call()


class FlakyBackend(_AroundEveryCall):
    """A share of the calls raises instead of being made; which ones follows from the seed."""

    def __init__(
        self,
        inner: StorageBackend,
        *,
        error_rate: float,
        seed: int = 0,
        error: type[BackendError] = BackendUnavailable,
    ) -> None:
        """Wraps ``inner``.

        Args:
            inner: what is made flaky.
            error_rate: the share of calls that raise, 0 to 1.
            seed: decides which calls raise.
            error: the class that they raise.
        """
        super().__init__(inner)
        self._error_rate = error_rate
        self._error = error
        self._draws = _Draws(seed)

    def _around(self, asked: _Asked, call: Callable[[], T]) -> T:
        if self._draws.next(asked.method, asked.keys).random() < self._error_rate:
            raise self._error(f"injected fault: {asked.method} of {len(asked.keys)} keys")
        return call()


class CorruptBackend(BackendWrapper):
    """Flips one bit in a share of the objects that are read; the seed decides in which."""

    def __init__(self, inner: StorageBackend, *, rate: float = 1.0, seed: int = 0) -> None:
        """Wraps ``inner``.

        Args:
            inner: the backend to read from; stored objects are not changed.
            rate: the share of objects that is damaged, 0 to 1.
            seed: decides which objects and which bit.
        """
        super().__init__(inner)
        self._rate = rate
        self._draws = _Draws(seed)

    def get(self, key: str) -> Buffer | None:
        value = self.inner.get(key)
        if value is None:
            return None
        copy = bytearray(value)
        self._damage("get", key, [memoryview(copy)])
        return bytes(copy)

    def batch_get(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        n_filled = self.inner.batch_get(keys, pages)
        for key, page in zip(keys[:n_filled], pages, strict=False):
            self._damage("batch_get", key, page)
        return n_filled

    def exists_each(self, keys: Sequence[str]) -> Sequence[bool]:
        return self.inner.exists_each(keys)

    def get_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        mask = self.inner.get_each(keys, pages)
        for key, page, is_filled in zip(keys, pages, mask, strict=True):
            if is_filled:
                self._damage("get_each", key, page)
        return mask

    def set_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        return self.inner.set_each(keys, pages)

    def _damage(self, method: str, key: str, page: Page) -> None:
        draw = self._draws.next(method, [key])
        nbytes = nbytes_of(page)
        if nbytes == 0 or draw.random() >= self._rate:
            return
        offset, bit = draw.randrange(nbytes), draw.randrange(8)
        for segment in page:
            if offset < segment.nbytes:
                segment[offset] ^= 1 << bit
                return
            offset -= segment.nbytes


class StuckBackend(_AroundEveryCall):
    """While it is stuck, every call waits until ``release``, and is made then."""

    def __init__(self, inner: StorageBackend, *, stuck: bool = True) -> None:
        """Wraps ``inner``; by default it is stuck from the start."""
        super().__init__(inner)
        self._changed = threading.Condition()
        self._stuck = stuck
        self._n_waiting = 0

    def bounds_calls(self) -> bool:
        """A call that waits is made as soon as it is released, however late that is."""
        return False

    @property
    def n_waiting(self) -> int:
        """How many calls wait."""
        return self._n_waiting

    def stick(self) -> None:
        """Makes all later calls wait."""
        with self._changed:
            self._stuck = True

    def release(self) -> None:
        """Lets all waiting and later calls proceed."""
        with self._changed:
            self._stuck = False
            self._changed.notify_all()

    def wait_for_calls(self, n_calls: int, timeout_s: float) -> bool:
        """Waits until ``n_calls`` calls wait; returns whether they do."""
        with self._changed:
            return self._changed.wait_for(lambda: self._n_waiting >= n_calls, timeout_s)

    def _around(self, _asked: _Asked, call: Callable[[], T]) -> T:
        with self._changed:
            self._n_waiting += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._stuck)
            self._n_waiting -= 1
        return call()
