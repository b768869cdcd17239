"""A file store that one rank can be told to misuse; loaded by name, as a user's class would be."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, ClassVar

from hicache_core.errors import BackendUnavailable
from hicache_core.storage.base import Buffer, StorageBackend
from hicache_core.storage.file.backend import FileBackend
from hicache_core.storage.file.config import FileConfig
from hicache_core.storage.manifest import MANIFEST_HASH
from hicache_core.types import BackendContext, Page


class Store(StorageBackend):
    """The file backend, with a trouble of this process in front of it.

    Attributes:
        latency_s: every call waits so long.
        failing: every call raises.
        n_kept: of each read the pages after so many are missing.
        n_written: pages that this process stored.
    """

    name = "troubled"
    Config = FileConfig
    latency_s: ClassVar[float] = 0.0
    failing: ClassVar[bool] = False
    n_kept: ClassVar[int | None] = None
    n_written: ClassVar[int] = 0

    def __init__(self, config: FileConfig, context: BackendContext) -> None:
        super().__init__(config, context)
        self.inner = FileBackend(config, context)

    @classmethod
    def trouble(cls, **attributes: Any) -> None:
        """Sets what is named, and everything else back to health."""
        cls.latency_s, cls.failing, cls.n_kept, cls.n_written = 0.0, False, None, 0
        for name, value in attributes.items():
            setattr(cls, name, value)

    def _suffer(self) -> None:
        time.sleep(self.latency_s)
        if self.failing:
            raise BackendUnavailable("this rank's store is gone")

    def open(self) -> None:
        self.inner.open()

    def close(self) -> None:
        self.inner.close()

    def get(self, key: str) -> Buffer | None:
        self._suffer()
        return self.inner.get(key)

    def exists(self, key: str) -> bool:
        self._suffer()
        return self.inner.exists(key)

    def set(self, key: str, value: Buffer) -> None:
        self._suffer()
        self.inner.set(key, value)

    def delete(self, keys: Sequence[str]) -> None:
        self.inner.delete(keys)

    def batch_exists(self, keys: Sequence[str]) -> int:
        self._suffer()
        return self.inner.batch_exists(keys)

    def batch_get(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        self._suffer()
        n_kept = len(keys) if self.n_kept is None else self.n_kept
        return self.inner.batch_get(keys[:n_kept], pages[:n_kept])

    def batch_set(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        self._suffer()
        n_stored = self.inner.batch_set(keys, pages)
        Store.n_written += sum(MANIFEST_HASH not in key for key in keys[:n_stored])
        return n_stored
