"""The capabilities of a guarded backend: each call passes through the guard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Generic, ParamSpec, Protocol, TypeVar

from hicache_core.storage.base import Clearable, Listable, Pins, ReportsUsage
from hicache_core.storage.wrapper import Adapters

C = TypeVar("C")
P = ParamSpec("P")
T = TypeVar("T")


class Guard(Protocol):
    """The part of the guard that the adapters use."""

    def call_unjudged(
        self, operation: str, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """See ``GuardedBackend.call_unjudged``."""
        ...


@dataclass(frozen=True, slots=True)
class _Guarded(Generic[C]):
    """A capability of the backend, called through its guard."""

    guard: Guard
    inner: C


class _GuardedList(_Guarded[Listable]):
    def list_keys(self, prefix: str) -> Iterator[str]:
        """As ``inner``. The guard measures the call, but not the iteration over the keys."""
        return self.guard.call_unjudged("list", self.inner.list_keys, prefix)


class _GuardedClear(_Guarded[Clearable]):
    def clear(self, prefix: str) -> int:
        return self.guard.call_unjudged("clear", self.inner.clear, prefix)


class _GuardedPins(_Guarded[Pins]):
    def pin(self, keys: Sequence[str], ttl_s: float) -> int:
        return self.guard.call_unjudged("pin", self.inner.pin, keys, ttl_s)


class _GuardedUsage(_Guarded[ReportsUsage]):
    def usage(self) -> Mapping[str, int]:
        return self.guard.call_unjudged("usage", self.inner.usage)


ADAPTERS: Adapters = MappingProxyType(
    {
        Listable: _GuardedList,
        Clearable: _GuardedClear,
        Pins: _GuardedPins,
        ReportsUsage: _GuardedUsage,
    }
)
