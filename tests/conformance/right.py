"""Backends that do everything right, to be broken one defect at a time."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from pydantic import SecretStr

from hicache_core.errors import BackendFull, UseAfterClose
from hicache_core.storage.base import BackendConfig, Buffer, Finding, StorageBackend
from hicache_core.types import BackendContext

STORES: defaultdict[str, dict[str, bytes]] = defaultdict(dict)
"""What the instances of this process share, by the setting ``store``."""


class RightConfig(BackendConfig):
    """Settings of the backends of these tests."""

    store: str = "kit"
    password: SecretStr | None = None
    max_nbytes: int | None = None


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
    """Has every optional capability too."""

    name: ClassVar[str] = "rich"

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
