"""Backends that do everything right, to be broken one defect at a time."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from pydantic import SecretStr

from hicache_core.errors import BackendFull, UseAfterClose
from hicache_core.storage.base import BackendConfig, Buffer, Finding, StorageBackend
from hicache_core.types import BackendContext

STORES: defaultdict[str, dict[str, bytes]] = defaultdict(dict)
"""What the instances of this process share, by the setting ``store``."""
WRITTEN: defaultdict[str, dict[str, float]] = defaultdict(dict)
PINNED: defaultdict[str, dict[str, float]] = defaultdict(dict)
"""When the objects of a store were written, and until when they are pinned."""


class RightConfig(BackendConfig):
    """Settings of the backends of these tests."""

    store: str = "kit"
    password: SecretStr | None = None
    max_nbytes: int | None = None
    quota_nbytes: int | None = None
    ttl_s: float | None = None


class RightBackend(StorageBackend):
    """Objects in a dict that the instances of one process share."""

    name: ClassVar[str] = "right"
    Config: ClassVar[type[BackendConfig]] = RightConfig

    def __init__(self, config: RightConfig, context: BackendContext) -> None:
        super().__init__(config, context)
        self.settings = config
        self.lock = threading.Lock()
        self.is_open = False

    @property
    def objects(self) -> dict[str, bytes]:
        """The objects, while the backend is open."""
        if not self.is_open:
            raise UseAfterClose("the backend is not open")
        return STORES[self.settings.store]

    def open(self) -> None:
        self.is_open = True

    def close(self) -> None:
        self.is_open = False

    def get(self, key: str) -> Buffer | None:
        return self.objects.get(key)

    def exists(self, key: str) -> bool:
        return key in self.objects

    def set(self, key: str, value: Buffer) -> None:
        used = sum(map(len, self.objects.values())) if self.settings.max_nbytes else 0
        if self.settings.max_nbytes and used + len(value) > self.settings.max_nbytes:
            raise BackendFull("no room")
        self.objects[key] = bytes(value)

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            self.objects.pop(key, None)


class RichBackend(RightBackend):
    """Has every optional capability too, a quota by namespace, and a TTL."""

    name: ClassVar[str] = "rich"

    @property
    def objects(self) -> dict[str, bytes]:
        """The objects that are young enough, the oldest first."""
        objects, ttl_s = super().objects, self.settings.ttl_s
        if ttl_s is not None:
            for key, written_at in list(WRITTEN[self.settings.store].items()):
                if written_at <= time.monotonic() - ttl_s:
                    del WRITTEN[self.settings.store][key]
                    objects.pop(key, None)
        return objects

    def set(self, key: str, value: Buffer) -> None:
        """Stores it, then makes room in its namespace, if that is over its quota."""
        super().set(key, value)
        if self.settings.ttl_s is not None:
            WRITTEN[self.settings.store][key] = time.monotonic()
        quota = self.settings.quota_nbytes
        while quota is not None and sum(len(self.objects[k]) for k in self.within(key)) > quota:
            del self.objects[self.victim(key)]

    def within(self, key: str) -> list[str]:
        """The keys of the namespace of ``key``."""
        namespace = key.partition("/")[0] + "/"
        return [k for k in list(self.objects) if k.startswith(namespace)]

    def victim(self, key: str) -> str:
        """What goes first for ``key``: the oldest that is not pinned, else the oldest."""
        others = [other for other in self.within(key) if other != key]
        return next((k for k in others if not self.is_pinned(k)), others[0])

    def is_pinned(self, key: str) -> bool:
        """Whether its pin is not over yet."""
        return PINNED[self.settings.store].get(key, 0.0) > time.monotonic()

    def pin(self, keys: Sequence[str], ttl_s: float) -> int:
        """Pins those that are there."""
        present = [key for key in keys if key in self.objects]
        PINNED[self.settings.store].update(dict.fromkeys(present, time.monotonic() + ttl_s))
        return len(present)

    def usage(self) -> Mapping[str, int]:
        """Sums of what is there."""
        sums: dict[str, int] = defaultdict(int)
        for key, value in list(self.objects.items()):
            sums[key.partition("/")[0]] += len(value)
        return sums

    def register_memory(self, buffers: Sequence[memoryview]) -> None:
        """Takes any memory."""

    def list_keys(self, prefix: str) -> Iterator[str]:
        """The keys that start with ``prefix``."""
        return iter([key for key in list(self.objects) if key.startswith(prefix)])

    def clear(self, prefix: str) -> int:
        """Removes the keys that start with ``prefix``."""
        keys = list(self.list_keys(prefix))
        self.delete(keys)
        return len(keys)

    def stats(self) -> Mapping[str, float]:
        """The number of objects."""
        return {"objects": len(self.objects)}

    def diagnose(self) -> Iterator[Finding]:
        """All is well."""
        yield Finding("ok", "store", "it is a dict")
