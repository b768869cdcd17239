"""Base of the backends that stand around another backend and look like it from outside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, TypeAlias, TypeVar, cast

from hicache_core.storage.base import (
    Buffer,
    Clearable,
    Diagnosable,
    Flushable,
    HasStats,
    Listable,
    Pins,
    RegistersMemory,
    ReportsUsage,
    StorageBackend,
)
from hicache_core.types import Page

C = TypeVar("C")

Adapters: TypeAlias = Mapping[type, Callable[[Any, Any], object]]
"""For a kind of capability, what makes the object that does it for a wrapper: called with the
wrapper, and with what ``capability(kind)`` of its inner backend gave."""

PASSED_ON = frozenset(
    [
        RegistersMemory,
        Listable,
        Clearable,
        HasStats,
        Diagnosable,
        Pins,
        ReportsUsage,
        Flushable,
    ]
)
"""What a wrapper without an adapter passes on as it is. Capabilities that move pages are not among
them: what the wrapper does to each page would be left out."""


class BackendWrapper(StorageBackend):
    """Forwards every call to ``inner``; a subclass overrides what it is there for.

    A wrapper has the name and the configuration of ``inner``. It can do what it has the methods of,
    what it has an adapter for and ``inner`` can do, and of ``PASSED_ON`` what ``inner`` can do.

    Attributes:
        inner: the next backend inward.
    """

    adapters: ClassVar[Adapters] = MappingProxyType({})
    """What this class puts around the capabilities of ``inner``."""

    def __init__(self, inner: StorageBackend) -> None:
        super().__init__(inner.config, inner.context)
        self.inner = inner

    @property
    def name(self) -> str:  # type: ignore[override]  # a class has no inner backend to ask
        """That of ``inner``."""
        return self.inner.name

    def capability(self, kind: type[C]) -> C | None:
        own = super().capability(kind)
        adapter = self.adapters.get(kind)
        if own is not None or (adapter is None and kind not in PASSED_ON):
            return own
        found = self.inner.capability(kind)
        return found if found is None or adapter is None else cast(C, adapter(self, found))

    def open(self) -> None:
        self.inner.open()

    def close(self) -> None:
        self.inner.close()

    def get(self, key: str) -> Buffer | None:
        return self.inner.get(key)

    def exists(self, key: str) -> bool:
        return self.inner.exists(key)

    def set(self, key: str, value: Buffer) -> None:
        self.inner.set(key, value)

    def delete(self, keys: Sequence[str]) -> None:
        self.inner.delete(keys)

    def batch_exists(self, keys: Sequence[str]) -> int:
        return self.inner.batch_exists(keys)

    def batch_get(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        return self.inner.batch_get(keys, pages)

    def batch_set(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        return self.inner.batch_set(keys, pages)
