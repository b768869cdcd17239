"""The capabilities of a chain: those of its links, combined."""

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
        name: its name in messages and statistics; unique in the chain.
        backend: guarded and sealed.
        read_only: whether nothing is written to it, removed from it or promoted into it.
    """

    name: str
    backend: StorageBackend
    read_only: bool = False


class Chain(Protocol):
    """The part of the chain that the adapters use."""

    def settle(self, keys: Sequence[str] | None = None) -> None:
        """See ``ChainBackend.settle``."""
        ...

    def copy_counts(self) -> dict[str, float]:
        """See ``ChainBackend.copy_counts``."""
        ...


@dataclass(frozen=True, slots=True)
class _OfLinks(Generic[C]):
    """A capability that some links have, combined.

    Attributes:
        chain: the chain of these links.
        able: what ``capability(kind)`` of each such link returned, by link name, nearest first.
    """

    chain: Chain
    able: Mapping[str, C]


class _Registering(_OfLinks[RegistersMemory]):
    def register_memory(self, buffers: Sequence[memoryview]) -> None:
        """Announces the memory to every link that needs to know it."""
        for link in self.able.values():
            link.register_memory(buffers)


class _Listing(_OfLinks[Listable]):
    def list_keys(self, prefix: str) -> Iterator[str]:
        """Yields every key of every link that can list, once. Holds all keys in memory."""
        seen: set[str] = set()
        for link in self.able.values():
            for key in link.list_keys(prefix):
                if key not in seen:
                    seen.add(key)
                    yield key


class _Clearing(_OfLinks[Clearable]):
    def clear(self, prefix: str) -> int:
        """Clears every link that can. Returns the largest count, since links share most keys."""
        self.chain.settle()
        return max(link.clear(prefix) for link in self.able.values())


class _Statistics(_OfLinks[HasStats]):
    def stats(self) -> Mapping[str, float]:
        """Returns the statistics of each link under its name, and those of copies between links."""
        found = self.chain.copy_counts()
        for name, link in self.able.items():
            with contextlib.suppress(OSError):  # a dead link has no statistics now
                found |= {f"{name}_{what}": value for what, value in link.stats().items()}
        return found


class _Diagnosis(_OfLinks[Diagnosable]):
    def diagnose(self) -> Iterator[Finding]:
        """Yields the findings of each link, with its name before the topic."""
        for name, link in self.able.items():
            try:
                for found in link.diagnose():
                    yield Finding(found.level, f"{name}: {found.topic}", found.message)
            except BackendError as exc:
                yield Finding("error", name, f"{type(exc).__name__}: {exc}")


class _Pinning(_OfLinks[Pins]):
    def pin(self, keys: Sequence[str], ttl_s: float) -> int:
        """Pins in every link that can and answers. Returns the largest number of present keys."""
        n_present = 0
        for link in self.able.values():
            with contextlib.suppress(OSError):  # a soft pin promises nothing
                n_present = max(n_present, link.pin(keys, ttl_s))
        return n_present


class _Usage(_OfLinks[ReportsUsage]):
    def usage(self) -> Mapping[str, int]:
        """Returns bytes by namespace: the largest of all links, since links share most keys."""
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
"""Makes, for a kind of capability, the object that a chain returns for it. Called with the chain
and with what ``capability(kind)`` of each link that can returned, by link name."""
