"""What a chain does through those of its links that can."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Generic, Protocol, TypeVar

from hicache_core.errors import BackendError
from hicache_core.storage.base import (
    Clearable,
    Diagnosable,
    Finding,
    HasStats,
    Listable,
    Pins,
    RegistersMemory,
    ReportsUsage,
    StorageBackend,
)

C = TypeVar("C")


@dataclass(frozen=True, slots=True)
class Link:
    """One backend of a chain.

    Attributes:
        name: what it is called in messages and statistics; unique in the chain.
        backend: guarded and sealed.
    """

    name: str
    backend: StorageBackend


class Chain(Protocol):
    """What the adapters need of the chain."""

    def settle(self, keys: Sequence[str] | None = None) -> None:
        """Waits for copies of ``keys`` that are on their way, or for all of them."""
        ...

    def copy_counts(self) -> dict[str, float]:
        """Pages and bytes of copies between the links, by name."""
        ...


@dataclass(frozen=True, slots=True)
class _OfLinks(Generic[C]):
    """A capability of some links, as one.

    Attributes:
        chain: whose links they are.
        able: what does it for each link that can, by the link's name, the nearest first.
    """

    chain: Chain
    able: Mapping[str, C]


class _Registering(_OfLinks[RegistersMemory]):
    def register_memory(self, buffers: Sequence[memoryview]) -> None:
        """Announces memory to every link that must know it."""
        for link in self.able.values():
            link.register_memory(buffers)


class _Listing(_OfLinks[Listable]):
    def list_keys(self, prefix: str) -> Iterator[str]:
        """Every key of every link that can list, each once. Holds all keys in memory."""
        seen: set[str] = set()
        for link in self.able.values():
            for key in link.list_keys(prefix):
                if key not in seen:
                    seen.add(key)
                    yield key


class _Clearing(_OfLinks[Clearable]):
    def clear(self, prefix: str) -> int:
        """Clears every link that can; the largest of their counts, since most keys are in all."""
        self.chain.settle()
        return max(link.clear(prefix) for link in self.able.values())


class _Statistics(_OfLinks[HasStats]):
    def stats(self) -> Mapping[str, float]:
        """The statistics of each link under its name, and those of the copies between them."""
        found = self.chain.copy_counts()
        for name, link in self.able.items():
            with contextlib.suppress(OSError):  # a dead link has no statistics just now
                found |= {f"{name}_{what}": value for what, value in link.stats().items()}
        return found


class _Diagnosis(_OfLinks[Diagnosable]):
    def diagnose(self) -> Iterator[Finding]:
        """What each link finds, its name before the topic."""
        for name, link in self.able.items():
            try:
                for found in link.diagnose():
                    yield Finding(found.level, f"{name}: {found.topic}", found.message)
            except BackendError as exc:
                yield Finding("error", name, f"{type(exc).__name__}: {exc}")


class _Pinning(_OfLinks[Pins]):
    def pin(self, keys: Sequence[str], ttl_s: float) -> int:
        """Pins in every link that can and answers; the largest number of keys that one has."""
        n_present = 0
        for link in self.able.values():
            with contextlib.suppress(OSError):  # a soft pin promises nothing
                n_present = max(n_present, link.pin(keys, ttl_s))
        return n_present


class _Usage(_OfLinks[ReportsUsage]):
    def usage(self) -> Mapping[str, int]:
        """Bytes by namespace; the largest of the links that answer, since most keys are in all."""
        largest: dict[str, int] = {}
        for link in self.able.values():
            with contextlib.suppress(OSError):
                for namespace, nbytes in link.usage().items():
                    largest[namespace] = max(nbytes, largest.get(namespace, 0))
        return largest


ADAPTERS: Mapping[type, Callable[[Chain, Mapping[str, Any]], object]] = MappingProxyType(
    {
        RegistersMemory: _Registering,
        Listable: _Listing,
        Clearable: _Clearing,
        HasStats: _Statistics,
        Diagnosable: _Diagnosis,
        Pins: _Pinning,
        ReportsUsage: _Usage,
    }
)
"""For a kind of capability, what makes the object that does it for a chain: called with the chain,
and with what ``capability(kind)`` gave of each link that can, by name."""
