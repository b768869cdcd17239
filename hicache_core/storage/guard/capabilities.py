"""What a guard does with the optional capabilities of its backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ParamSpec, Protocol, TypeVar, cast

from hicache_core.storage.base import Clearable, Listable, Pins, ReportsUsage, StorageBackend

P = ParamSpec("P")
T = TypeVar("T")


class _Guard(Protocol):
    inner: StorageBackend

    def aside(
        self, operation: str, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T: ...


class _GuardedList:
    def list_keys(self: _Guard, prefix: str) -> Iterator[str]:
        """As ``inner``; the guard sees the call, but not what it costs to walk over the keys."""
        return self.aside("list", cast(Listable, self.inner).list_keys, prefix)


class _GuardedClear:
    def clear(self: _Guard, prefix: str) -> int:
        return self.aside("clear", cast(Clearable, self.inner).clear, prefix)


class _GuardedPins:
    def pin(self: _Guard, keys: Sequence[str], ttl_s: float) -> int:
        return self.aside("pin", cast(Pins, self.inner).pin, keys, ttl_s)


class _GuardedUsage:
    def usage(self: _Guard) -> Mapping[str, int]:
        return self.aside("usage", cast(ReportsUsage, self.inner).usage)


GUARDED: Mapping[type, type] = {
    Listable: _GuardedList,
    Clearable: _GuardedClear,
    Pins: _GuardedPins,
    ReportsUsage: _GuardedUsage,
}
"""For a capability, what stands in its place in a guarded backend."""
