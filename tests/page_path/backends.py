"""Backends that misbehave on purpose; loaded by the dynamic loader, as a user's class would be."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import ClassVar

from hicache_core.errors import BackendDenied, BackendUnavailable
from hicache_core.storage.base import BackendConfig, Buffer, StorageBackend
from hicache_core.types import BackendContext, Page


class Store(StorageBackend):
    """A dict shared by all instances."""

    name = "store"
    objects: ClassVar[dict[str, bytes]] = {}

    def get(self, key: str) -> Buffer | None:
        return self.objects.get(key)

    def exists(self, key: str) -> bool:
        return key in self.objects

    def set(self, key: str, value: Buffer) -> None:
        self.objects[key] = bytes(value)

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            self.objects.pop(key, None)


class Gated(Store):
    """Each read says that it has ``entered`` and waits until the ``gate`` lets it through."""

    name = "gated"
    entered: ClassVar[threading.Semaphore] = threading.Semaphore(0)
    gate: ClassVar[threading.Semaphore] = threading.Semaphore(0)

    @classmethod
    def reset(cls) -> None:
        cls.entered, cls.gate = threading.Semaphore(0), threading.Semaphore(0)

    def batch_get(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        self.entered.release()
        self.gate.acquire()
        return super().batch_get(keys, pages)


class GatedQuestions(Store):
    """As ``Gated``, for questions."""

    name = "gated_questions"
    entered: ClassVar[threading.Semaphore] = threading.Semaphore(0)
    gate: ClassVar[threading.Semaphore] = threading.Semaphore(0)

    @classmethod
    def reset(cls) -> None:
        cls.entered, cls.gate = threading.Semaphore(0), threading.Semaphore(0)

    def batch_exists(self, keys: Sequence[str]) -> int:
        self.entered.release()
        self.gate.acquire()
        return super().batch_exists(keys)


class OpensSlowly(Store):
    """``open`` says that it was ``entered`` and waits at the ``gate``; ``closed`` counts closes."""

    name = "opens_slowly"
    entered: ClassVar[threading.Semaphore] = threading.Semaphore(0)
    gate: ClassVar[threading.Semaphore] = threading.Semaphore(0)
    closed: ClassVar[threading.Semaphore] = threading.Semaphore(0)

    @classmethod
    def reset(cls) -> None:
        cls.entered, cls.gate, cls.closed = (threading.Semaphore(0) for _ in range(3))

    def open(self) -> None:
        self.entered.release()
        self.gate.acquire()

    def close(self) -> None:
        self.closed.release()


class EvictsBeforeRead(Store):
    """Says that keys exist, and then has only the first ``n_kept`` of what is asked for."""

    name = "evicts"
    n_kept: ClassVar[int] = 0

    def batch_get(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        return super().batch_get(keys[: self.n_kept], pages[: self.n_kept])


class Forgets(Store):
    """Says that it has the objects under ``forgotten`` keys, and does not deliver them."""

    name = "forgets"
    forgotten: ClassVar[set[str]] = set()

    def get(self, key: str) -> Buffer | None:
        return None if key in self.forgotten else super().get(key)


class Flips(Store):
    """Flips one bit of every third object that it gives out."""

    name = "flips"

    def get(self, key: str) -> Buffer | None:
        value = self.objects.get(key)
        if value is None or sorted(self.objects).index(key) % 3:
            return value
        flipped = bytearray(value)
        flipped[len(flipped) * 2 // 3] ^= 0x10
        return flipped


class Raises(StorageBackend):
    """Raises in every method that the page path calls."""

    name = "raises"

    def get(self, key: str) -> Buffer | None:
        raise BackendUnavailable("gone")

    def exists(self, key: str) -> bool:
        raise ValueError("not even a BackendError")

    def set(self, key: str, value: Buffer) -> None:
        raise BackendUnavailable("gone")

    def batch_get(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        raise KeyError("boom")

    def delete(self, keys: Sequence[str]) -> None:
        raise RuntimeError("boom")


class RaisesOnRead(Store):
    """Has everything, and fails to deliver it."""

    name = "raises_on_read"

    def batch_get(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        raise BackendUnavailable("lost in the middle")


class RaisesOnWrite(Store):
    """Takes nothing."""

    name = "raises_on_write"

    def batch_set(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        raise BackendUnavailable("not now")


class Lies(Store):
    """Claims more pages than were asked for, and to have filled what it never touched."""

    name = "lies"

    def batch_exists(self, keys: Sequence[str]) -> int:
        return len(keys)

    def batch_get(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        return len(keys)

    def batch_set(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        return len(keys) + 5


class GatedWrites(Store):
    """Each write waits until the ``gate`` lets it through."""

    name = "gated_writes"
    gate: ClassVar[threading.Semaphore] = threading.Semaphore(0)

    @classmethod
    def reset(cls) -> None:
        cls.gate = threading.Semaphore(0)

    def batch_set(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        self.gate.acquire()
        return super().batch_set(keys, pages)


class Counts(Store):
    """Counts the objects that it was given, and the questions; answers wait for the ``gate``."""

    name = "counts"
    n_written: ClassVar[int] = 0
    n_asked: ClassVar[int] = 0
    looked: ClassVar[threading.Event] = threading.Event()
    gate: ClassVar[threading.Event] = threading.Event()

    @classmethod
    def reset(cls) -> None:
        cls.n_written = cls.n_asked = 0
        cls.looked, cls.gate = threading.Event(), threading.Event()

    def batch_exists(self, keys: Sequence[str]) -> int:
        Counts.n_asked += 1
        n_found = super().batch_exists(keys)
        self.looked.set()
        self.gate.wait()
        return n_found

    def clear(self, prefix: str) -> int:
        keys = [key for key in self.objects if key.startswith(prefix)]
        for key in keys:
            del self.objects[key]
        return len(keys)

    def batch_set(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        Counts.n_written += len(keys)
        return super().batch_set(keys, pages)


class RaisesOnClear(Store):
    """Lets nobody remove anything."""

    name = "raises_on_clear"

    def clear(self, prefix: str) -> int:
        raise BackendDenied("not you")


def reset() -> None:
    """Empties the store that all share, and shuts the gates."""
    Store.objects.clear()
    Forgets.forgotten.clear()
    Gated.reset()
    GatedQuestions.reset()
    GatedWrites.reset()
    Counts.reset()


def open_gates() -> None:
    """Lets every call that waits go on."""
    Gated.gate.release(1000)
    GatedQuestions.gate.release(1000)
    GatedWrites.gate.release(1000)
    Counts.gate.set()


class Registering(Store):
    """A transport that fails on memory that it was not told of, as RDMA does."""

    name = "registering"

    def __init__(self, config: BackendConfig, context: BackendContext) -> None:
        super().__init__(config, context)
        self.known: list[range] = []

    def register_memory(self, buffers: Sequence[memoryview]) -> None:
        self.known += [self._place(buffer) for buffer in buffers]

    def batch_set(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        for page in pages:
            for place in map(self._place, page):
                if not any(k.start <= place.start and place.stop <= k.stop for k in self.known):
                    raise BackendDenied(f"{place} is not registered")
        return super().batch_set(keys, pages)

    @staticmethod
    def _place(view: memoryview) -> range:
        start = ctypes.addressof(ctypes.c_char.from_buffer(view))
        return range(start, start + view.nbytes)
