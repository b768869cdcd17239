"""Base of the backends that stand around another backend and look like it from outside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import ClassVar, Protocol, Self, cast

from hicache_core.storage.base import (
    Buffer,
    Clearable,
    Diagnosable,
    Finding,
    Flushable,
    HasStats,
    Listable,
    Pins,
    RegistersMemory,
    ReportsUsage,
    StorageBackend,
)
from hicache_core.types import Page


class _Wraps(Protocol):
    inner: StorageBackend


class _RegistersMemory:
    def register_memory(self: _Wraps, buffers: Sequence[memoryview]) -> None:
        cast(RegistersMemory, self.inner).register_memory(buffers)


class _Listable:
    def list_keys(self: _Wraps, prefix: str) -> Iterator[str]:
        return cast(Listable, self.inner).list_keys(prefix)


class _Clearable:
    def clear(self: _Wraps, prefix: str) -> int:
        return cast(Clearable, self.inner).clear(prefix)


class _HasStats:
    def stats(self: _Wraps) -> Mapping[str, float]:
        return cast(HasStats, self.inner).stats()


class _Diagnosable:
    def diagnose(self: _Wraps) -> Iterator[Finding]:
        return cast(Diagnosable, self.inner).diagnose()


class _Pins:
    def pin(self: _Wraps, keys: Sequence[str], ttl_s: float) -> int:
        return cast(Pins, self.inner).pin(keys, ttl_s)


class _ReportsUsage:
    def usage(self: _Wraps) -> Mapping[str, int]:
        return cast(ReportsUsage, self.inner).usage()


class _Flushable:
    def flush(self: _Wraps, timeout_s: float) -> bool:
        return cast(Flushable, self.inner).flush(timeout_s)


_CAPABILITIES: tuple[tuple[type, type], ...] = (
    (RegistersMemory, _RegistersMemory),
    (Listable, _Listable),
    (Clearable, _Clearable),
    (HasStats, _HasStats),
    (Diagnosable, _Diagnosable),
    (Pins, _Pins),
    (ReportsUsage, _ReportsUsage),
    (Flushable, _Flushable),
)


@cache
def _wrapper_class(wrapper: type, inner: type[StorageBackend]) -> type:
    """``wrapper`` with the name and settings of ``inner``, and what only ``inner`` can do.

    ``isinstance`` looks capabilities up on the class, so they have to be there: a ``__getattr__``
    would not be seen. What ``wrapper`` defines itself goes before what is forwarded.
    """
    translated = cast("type[BackendWrapper]", wrapper).translated
    forwards = [
        translated.get(capability, mixin)
        for capability, mixin in _CAPABILITIES
        if issubclass(inner, capability) and not issubclass(wrapper, capability)
    ]
    namespace = {
        "__module__": wrapper.__module__,
        "__doc__": wrapper.__doc__,
        "name": getattr(inner, "name", inner.__name__),
        "api_version": inner.api_version,
        "Config": inner.Config,
    }
    return type(wrapper.__name__, (wrapper, *forwards), namespace)


class BackendWrapper(StorageBackend):
    """Forwards every call to ``inner``; a subclass overrides what it is there for.

    A wrapper has the name, the settings and the optional capabilities of what it wraps:
    ``isinstance(wrapper, Listable)`` answers as it does for ``inner``.

    Attributes:
        inner: the next backend inward.
    """

    translated: ClassVar[Mapping[type, type]] = MappingProxyType({})
    """For a capability of ``inner`` the mixin that stands in its place, where to forward the
    arguments as they are would be wrong."""

    def __new__(cls, inner: StorageBackend, *_: object, **__: object) -> Self:
        """Makes the object of a class that can do what ``inner`` can do."""
        return cast(Self, super().__new__(_wrapper_class(cls, type(inner))))

    def __init__(self, inner: StorageBackend) -> None:
        super().__init__(inner.config, inner.context)
        self.inner = inner

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
