"""A backend that keeps its objects in this process, for tests, demos and single servers."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar
from weakref import WeakValueDictionary

from pydantic import Field

from hicache_core.errors import BackendFull, UseAfterClose
from hicache_core.storage.base import BackendConfig, Buffer, StorageBackend, namespace_of
from hicache_core.storage.segments import join, nbytes_of, scatter
from hicache_core.storage.settings import Nbytes, Seconds
from hicache_core.types import BackendContext, Page


class MemoryConfig(BackendConfig):
    """Settings of the ``memory`` backend."""

    max_nbytes: Nbytes | None = Field(
        default=None,
        description="maximum number of stored bytes; the least recently used objects are evicted",
    )
    namespace_quota_nbytes: Nbytes | None = Field(
        default=None,
        description="maximum number of bytes in one namespace; its least recently used objects are "
        "evicted",
    )
    ttl_s: Seconds | None = Field(default=None, description="objects expire after this time")
    share: str | None = Field(
        default=None,
        description="backends of this process with the same text share one store, which lasts "
        "while one of them is open",
    )


class _Store:
    """Objects, ordered by use and by age. The caller of any method holds ``lock``."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.objects: dict[str, bytes] = {}
        self.written: OrderedDict[str, float] = OrderedDict()  # the oldest first
        self.used: OrderedDict[str, None] = OrderedDict()  # the least recently used first
        self.used_in: dict[str, OrderedDict[str, None]] = {}  # the same for each namespace
        self.usage: dict[str, int] = {}  # bytes by namespace
        self.used_nbytes = 0
        self.pinned_until: dict[str, float] = {}

    def add(self, key: str, data: bytes, now: float) -> None:
        """Stores ``data`` as the newest and most recently used object; ``key`` is absent."""
        namespace = namespace_of(key)
        self.objects[key] = data
        self.written[key] = now
        self.used[key] = self.used_in.setdefault(namespace, OrderedDict())[key] = None
        self.usage[namespace] = self.usage.get(namespace, 0) + len(data)
        self.used_nbytes += len(data)

    def touch(self, key: str) -> None:
        """Makes ``key`` the most recently used."""
        self.used.move_to_end(key)
        self.used_in[namespace_of(key)].move_to_end(key)

    def discard(self, key: str) -> bool:
        """Removes ``key`` but keeps its pin; returns whether it was there."""
        data = self.objects.pop(key, None)
        if data is None:
            return False
        namespace = namespace_of(key)
        del self.written[key], self.used[key], self.used_in[namespace][key]
        self.usage[namespace] -= len(data)
        self.used_nbytes -= len(data)
        if not self.used_in[namespace]:
            del self.used_in[namespace], self.usage[namespace]
        return True

    def remove(self, key: str) -> bool:
        """Removes ``key`` and its pin; returns whether it was there."""
        self.pinned_until.pop(key, None)
        return self.discard(key)

    def victim(self, order: OrderedDict[str, None], now: float) -> str:
        """Returns the first key of ``order`` that is not pinned, or the first if all are."""
        return next(
            (key for key in order if self.pinned_until.get(key, now) <= now), next(iter(order))
        )


_shared: WeakValueDictionary[str, _Store] = WeakValueDictionary()
_shared_lock = threading.Lock()


class MemoryBackend(StorageBackend):
    """Objects in a dict of this process, with optional limits on bytes and age."""

    name: ClassVar[str] = "memory"
    in_process: ClassVar[bool] = True
    Config: ClassVar[type[BackendConfig]] = MemoryConfig

    def __init__(
        self,
        config: MemoryConfig,
        context: BackendContext,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Stores its arguments; opens nothing.

        Args:
            config: the settings.
            context: what the backend may know about the cache.
            clock: seconds; only differences count.
        """
        super().__init__(config, context)
        self._settings = config
        self._has_limits = (config.max_nbytes, config.namespace_quota_nbytes) != (None, None)
        self._clock = clock
        self._opened: _Store | None = None
        self._counts = {"evicted_objects": 0, "expired_objects": 0, "dropped_writes": 0}

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
        with self._fresh() as store:
            data = store.objects.get(key)
            if data is not None:
                store.touch(key)
            return data

    def exists(self, key: str) -> bool:
        with self._fresh() as store:
            return key in store.objects

    def set(self, key: str, value: Buffer) -> None:
        data = bytes(value)
        store = self._store()
        with store.lock:
            self._put(store, key, data)

    def batch_set(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        store = self._store()
        for n, (key, page) in enumerate(zip(keys, pages, strict=True)):
            data = join(page)  # not under the lock: a copy takes time
            try:
                with store.lock:
                    self._put(store, key, data)
            except BackendFull:
                return n
        return len(keys)

    def exists_each(self, keys: Sequence[str]) -> Sequence[bool]:
        with self._fresh() as store:
            return [key in store.objects for key in keys]

    def get_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        with self._fresh() as store:
            found = [store.objects.get(key) for key in keys]
            for key, data in zip(keys, found, strict=True):
                if data is not None:
                    store.touch(key)
        mask = []
        for data, page in zip(found, pages, strict=True):
            fits = data is not None and len(data) == nbytes_of(page)
            if data is not None and fits:
                scatter(data, page)
            mask.append(fits)
        return mask

    def set_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        taken = [self._takes(key, page) for key, page in zip(keys, pages, strict=True)]
        present = self.exists_each(keys)  # the later pages may have evicted the first ones
        return [one and other for one, other in zip(taken, present, strict=True)]

    def _takes(self, key: str, page: Page) -> bool:
        """Stores one page; returns whether it has room."""
        try:
            self.set(key, join(page))
        except BackendFull:
            return False
        return True

    def bounds_calls(self) -> bool:
        return True

    def delete(self, keys: Sequence[str]) -> None:
        with self._fresh() as store:
            for key in keys:
                store.remove(key)

    def list_keys(self, prefix: str) -> Iterator[str]:
        """Returns the keys that start with ``prefix`` now."""
        with self._fresh() as store:
            return iter([key for key in store.objects if key.startswith(prefix)])

    def clear(self, prefix: str) -> int:
        """Removes every key that starts with ``prefix``; returns how many there were."""
        with self._fresh() as store:
            keys = [key for key in store.objects if key.startswith(prefix)]
            return sum(store.remove(key) for key in keys)

    def pin(self, keys: Sequence[str], ttl_s: float) -> int:
        """See ``Pins``. A pinned object still expires after ``ttl_s``."""
        with self._fresh() as store:
            present = [key for key in keys if key in store.objects]
            until = self._clock() + ttl_s
            for key in present:
                if ttl_s > 0:
                    store.pinned_until[key] = until
                else:
                    store.pinned_until.pop(key, None)
            return len(present)

    def usage(self) -> Mapping[str, int]:
        """Returns the bytes of stored objects by namespace."""
        with self._fresh() as store:
            return dict(store.usage)

    def stats(self) -> Mapping[str, float]:
        """Returns ``used_nbytes``, ``objects``, and counts of evictions, expiries and drops."""
        with self._fresh() as store:
            return {
                "used_nbytes": store.used_nbytes,
                "objects": len(store.objects),
                **self._counts,
            }

    def _store(self) -> _Store:
        store = self._opened
        if store is None:
            raise UseAfterClose("the memory backend is not open; call open() first")
        return store

    @contextmanager
    def _fresh(self) -> Iterator[_Store]:
        """Yields the store, locked and without expired objects."""
        store = self._store()
        with store.lock:
            if self._settings.ttl_s is not None:
                self._expire(store, self._settings.ttl_s)
            yield store

    # From here on the caller holds the lock of the store.

    def _expire(self, store: _Store, ttl_s: float) -> None:
        """Removes the objects that are older than ``ttl_s``."""
        now = self._clock()
        while store.written and now - next(iter(store.written.values())) >= ttl_s:
            store.remove(next(iter(store.written)))
            self._counts["expired_objects"] += 1

    def _put(self, store: _Store, key: str, data: bytes) -> None:
        """Stores an object in place of an older one.

        Args:
            store: where to.
            key: of the object.
            data: its bytes.

        Raises:
            BackendFull: it is larger than a limit; the older one stays.
        """
        if self._settings.ttl_s is not None:
            self._expire(store, self._settings.ttl_s)
        if self._has_limits:
            self._check_size(len(data))
        if key in store.objects:
            store.discard(key)
        if self._has_limits:
            self._make_room(store, namespace_of(key), len(data))
        store.add(key, data, self._clock())

    def _check_size(self, nbytes: int) -> None:
        settings = self._settings
        for name, cap in (
            ("max_nbytes", settings.max_nbytes),
            ("namespace_quota_nbytes", settings.namespace_quota_nbytes),
        ):
            if cap is not None and nbytes > cap:
                self._counts["dropped_writes"] += 1
                raise BackendFull(f"an object of {nbytes} bytes is larger than {name}={cap}")

    def _make_room(self, store: _Store, namespace: str, nbytes: int) -> None:
        """Evicts objects until ``nbytes`` more fit into the namespace and into the store."""
        quota, cap = self._settings.namespace_quota_nbytes, self._settings.max_nbytes
        while quota is not None and store.usage.get(namespace, 0) + nbytes > quota:
            self._evict(store, store.used_in[namespace])
        while cap is not None and store.used_nbytes + nbytes > cap:
            self._evict(store, store.used)

    def _evict(self, store: _Store, order: OrderedDict[str, None]) -> None:
        store.remove(store.victim(order, self._clock()))
        self._counts["evicted_objects"] += 1
