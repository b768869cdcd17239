"""A backend that keeps its objects in this process: for tests, demos and single servers."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar
from weakref import WeakValueDictionary

from pydantic import Field

from hicache_core.errors import BackendFull, UseAfterClose
from hicache_core.hookspecs import hookimpl
from hicache_core.storage.base import BackendConfig, Buffer, StorageBackend
from hicache_core.storage.settings import Nbytes, Seconds
from hicache_core.types import BackendContext


class MemoryConfig(BackendConfig):
    """Settings of the ``memory`` backend."""

    max_nbytes: Nbytes | None = Field(
        default=None, description="cap on the stored bytes; the least recently used go first"
    )
    ttl_s: Seconds | None = Field(default=None, description="objects older than this are gone")
    share: str | None = Field(
        default=None,
        description="backends of this process with the same text share one store, for as long as "
        "one of them is open",
    )


class _Store:
    """Objects in order of use, under one lock; ``ttl_s`` and the cap are those of the caller."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.objects: OrderedDict[str, tuple[bytes, float]] = OrderedDict()
        self.used_nbytes = 0

    def discard(self, key: str) -> bool:
        """Removes ``key``; whether it was there. The caller holds the lock."""
        entry = self.objects.pop(key, None)
        if entry is None:
            return False
        self.used_nbytes -= len(entry[0])
        return True


_shared: WeakValueDictionary[str, _Store] = WeakValueDictionary()
_shared_lock = threading.Lock()


class MemoryBackend(StorageBackend):
    """Objects in a dict of this process, with an optional cap and age limit."""

    name: ClassVar[str] = "memory"
    Config: ClassVar[type[BackendConfig]] = MemoryConfig

    def __init__(
        self,
        config: MemoryConfig,
        context: BackendContext,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(config, context)
        self._settings = config
        self._clock = clock
        self._opened: _Store | None = None
        self._counts = {"evicted_objects": 0, "expired_objects": 0, "dropped_writes": 0}

    @property
    def _store(self) -> _Store:
        if self._opened is None:
            raise UseAfterClose("the memory backend is not open; call open() first")
        return self._opened

    def open(self) -> None:
        if self._opened is not None:
            return
        if self._settings.share is None:
            self._opened = _Store()
            return
        with _shared_lock:
            self._opened = _shared.setdefault(self._settings.share, _Store())

    def close(self) -> None:
        self._opened = None

    def get(self, key: str) -> Buffer | None:
        store = self._store
        with store.lock:
            if not self._fresh(store, key):
                return None
            store.objects.move_to_end(key)
            return store.objects[key][0]

    def exists(self, key: str) -> bool:
        store = self._store
        with store.lock:
            return self._fresh(store, key)

    def set(self, key: str, value: Buffer) -> None:
        store, data, cap = self._store, bytes(value), self._settings.max_nbytes
        with store.lock:
            if cap is not None and len(data) > cap:
                self._counts["dropped_writes"] += 1
                raise BackendFull(f"an object of {len(data)} bytes is over max_nbytes={cap}")
            store.discard(key)
            store.objects[key] = (data, self._clock())
            store.used_nbytes += len(data)
            while cap is not None and store.used_nbytes > cap:
                store.discard(next(iter(store.objects)))
                self._counts["evicted_objects"] += 1

    def delete(self, keys: Sequence[str]) -> None:
        store = self._store
        with store.lock:
            for key in keys:
                store.discard(key)

    def list_keys(self, prefix: str) -> Iterator[str]:
        """Every key that starts with ``prefix``, as of now."""
        store = self._store
        with store.lock:
            keys = [key for key in store.objects if key.startswith(prefix)]
            return iter([key for key in keys if self._fresh(store, key)])

    def clear(self, prefix: str) -> int:
        """Removes every key that starts with ``prefix``; how many there were."""
        store = self._store
        with store.lock:
            keys = [key for key in store.objects if key.startswith(prefix)]
            return sum(store.discard(key) for key in keys)

    def stats(self) -> Mapping[str, float]:
        """``used_nbytes``, ``objects``, and counts of what was evicted, expired and dropped."""
        store = self._store
        with store.lock:
            return {
                "used_nbytes": store.used_nbytes,
                "objects": len(store.objects),
                **self._counts,
            }

    def _fresh(self, store: _Store, key: str) -> bool:
        """Whether ``key`` is there and young enough; drops it if not. The caller holds the lock."""
        entry = store.objects.get(key)
        if entry is None:
            return False
        ttl_s = self._settings.ttl_s
        if ttl_s is None or self._clock() - entry[1] < ttl_s:
            return True
        self._counts["expired_objects"] += store.discard(key)
        return False


@hookimpl
def hicache_backends() -> list[type[StorageBackend]]:
    """The backend of this module."""
    return [MemoryBackend]
