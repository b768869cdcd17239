"""A world for the guard and the chain: time that is set, and a store that does as it is told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from hicache_core.errors import BackendFull
from hicache_core.storage.base import BackendConfig, Buffer, StorageBackend
from hicache_core.storage.chain.backend import ChainBackend
from hicache_core.storage.workers.executor import Worker
from hicache_core.storage.workers.worker import StorageWorker
from hicache_core.types import BackendContext, Page

CONTEXT = BackendContext(namespace="0" * 16)
NBYTES = 8

MakeChain: TypeAlias = Callable[..., ChainBackend]
"""Opens a chain of the given backends, with the given settings."""


def key(n: int) -> str:
    return f"{0:016x}/{n:064x}"


def content(name: str) -> bytes:
    """What a page holds is a function of its key."""
    return int(name.rpartition("/")[2], 16).to_bytes(NBYTES, "little")


def blank(n: int) -> list[list[memoryview]]:
    return [[memoryview(bytearray(NBYTES))] for _ in range(n)]


def filled(names: Sequence[str]) -> list[list[memoryview]]:
    return [[memoryview(bytearray(content(name)))] for name in names]


def make_worker(backend: StorageBackend, max_nbytes: int) -> Worker:
    return StorageWorker(
        backend,
        n_threads=1,
        max_read_nbytes=1,
        max_write_nbytes=max_nbytes,
        clock=time.monotonic,
    )


class Clock:
    """Time that passes when the test says so, or when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


class Told(StorageBackend):
    """Objects in a dict; each call takes ``takes_s`` and then raises the next of ``errors``."""

    name = "told"

    def __init__(self, clock: Clock) -> None:
        super().__init__(BackendConfig(), CONTEXT)
        self.clock = clock
        self.objects: dict[str, bytes] = {}
        self.errors: list[BaseException] = []
        self.always: BaseException | None = None
        self.takes_s = 0.0
        self.n_calls = 0
        self.unreadable: set[str] = set()
        self.room: int | None = None
        self.inside: threading.Event | None = None
        self.may_go = threading.Event()

    def _call(self) -> None:
        self.n_calls += 1
        self.clock.now += self.takes_s
        if self.inside is not None:
            self.inside.set()
            assert self.may_go.wait(20)
        if self.errors:
            raise self.errors.pop(0)
        if self.always is not None:
            raise self.always

    def get(self, name: str) -> Buffer | None:
        self._call()
        return None if name in self.unreadable else self.objects.get(name)

    def exists(self, name: str) -> bool:
        self._call()
        return name in self.objects

    def set(self, name: str, value: Buffer) -> None:
        self._call()
        self._store(name, bytes(value))

    def delete(self, keys: Sequence[str]) -> None:
        self._call()
        for name in keys:
            self.objects.pop(name, None)

    def batch_exists(self, keys: Sequence[str]) -> int:
        self._call()
        return _leading(name in self.objects for name in keys)

    def batch_get(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        self._call()
        for n, (name, page) in enumerate(zip(keys, pages, strict=True)):
            if name in self.unreadable or name not in self.objects:
                page[0][:] = b"\xff" * NBYTES
                return n
            page[0][:] = self.objects[name]
        return len(keys)

    def batch_set(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        self._call()
        for n, (name, page) in enumerate(zip(keys, pages, strict=True)):
            try:
                self._store(name, b"".join(page))
            except BackendFull:
                return n
        return len(keys)

    def list_keys(self, prefix: str) -> Iterator[str]:
        self._call()
        return iter([name for name in self.objects if name.startswith(prefix)])

    def _store(self, name: str, value: bytes) -> None:
        if self.room is not None and name not in self.objects and len(self.objects) >= self.room:
            raise BackendFull("no room")
        self.objects[name] = value


class TellsEach(Told):
    """Answers for each key, with one call for all of them.

    Attributes:
        asked: the keys of the last question.
    """

    asked: Sequence[str] = ()

    def exists_each(self, keys: Sequence[str]) -> Sequence[bool]:
        self._call()
        self.asked = list(keys)
        return [name in self.objects for name in keys]

    def get_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        self._call()
        mask = [name in self.objects and name not in self.unreadable for name in keys]
        for name, page, is_there in zip(keys, pages, mask, strict=True):
            page[0][:] = self.objects[name] if is_there else b"\xff" * NBYTES
        return mask

    def set_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        self._call()
        mask = []
        for name, page in zip(keys, pages, strict=True):
            mask.append(self.room is None or name in self.objects or len(self.objects) < self.room)
            if mask[-1]:
                self._store(name, b"".join(page))
        return mask


def _leading(found: Iterator[bool]) -> int:
    n = 0
    for one in found:
        if not one:
            break
        n += 1
    return n
