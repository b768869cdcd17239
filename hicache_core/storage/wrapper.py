"""Base class of backends that wrap another backend and look like it from outside."""

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
    ReportsTotals,
    ReportsUsage,
    StorageBackend,
)
from hicache_core.types import Page

C = TypeVar("C")

Adapters: TypeAlias = Mapping[type, Callable[[Any, Any], object]]
"""Makes, for a kind of capability, the object that a wrapper returns for it. Called with the
wrapper and with what the inner backend returned for that kind."""

PASSED_ON = frozenset(
    [
        RegistersMemory,
        Listable,
        Clearable,
        HasStats,
        Diagnosable,
        Pins,
        ReportsUsage,
        ReportsTotals,
        Flushable,
    ]
)
"""The kinds that a wrapper without an adapter passes on unchanged. Kinds that move pages are not
among them: pages would then go around the wrapper, past what it does to each of them."""


class BackendWrapper(StorageBackend):
    """Forwards every call to ``inner``; a subclass overrides what it changes.

    A wrapper has the name and the configuration of ``inner``. Its capabilities are those whose
    methods it has, and those of ``inner`` that are in ``adapters`` or in ``PASSED_ON``.

    Attributes:
        inner: the wrapped backend.
    """

    adapters: ClassVar[Adapters] = MappingProxyType({})
    """The kinds that this class changes, or passes on although they move pages."""

    def __init__(self, inner: StorageBackend) -> None:
        super().__init__(inner.config, inner.context)
        self.inner = inner

    @property
    def name(self) -> str:  # type: ignore[override]  # a class has no inner backend to ask
        """The name of ``inner``."""
        return self.inner.name

    @property
    def in_process(self) -> bool:  # type: ignore[override]  # likewise
        """As that of ``inner``."""
        return self.inner.in_process

    def capability(self, kind: type[C]) -> C | None:
        own = super().capability(kind)
        adapter = self.adapters.get(kind)
        if own is not None or (adapter is None and kind not in PASSED_ON):
            return own
        found = self.inner.capability(kind)
        return found if found is None or adapter is None else cast(C, adapter(self, found))

    def check_reachable(self) -> None:
        self.inner.check_reachable()

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

    def bounds_calls(self) -> bool:
        return self.inner.bounds_calls()
