"""What a chain can do because one of its links can."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

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


@dataclass(frozen=True, slots=True)
class Link:
    """One backend of a chain.

    Attributes:
        name: what it is called in messages and figures; no other link is called so.
        backend: guarded and sealed.
    """

    name: str
    backend: StorageBackend


class _Chain(Protocol):
    links: tuple[Link, ...]

    def settle(self, keys: Sequence[str] | None = None) -> None: ...

    def copy_counts(self) -> dict[str, float]: ...


class _RegistersMemory:
    def register_memory(self: _Chain, buffers: Sequence[memoryview]) -> None:
        """Announces memory to every link that must know it."""
        for link in self.links:
            if isinstance(link.backend, RegistersMemory):
                link.backend.register_memory(buffers)


class _Listable:
    def list_keys(self: _Chain, prefix: str) -> Iterator[str]:
        """Every key of every link that can list, each once. Holds all keys in memory."""
        seen: set[str] = set()
        for link in self.links:
            if isinstance(link.backend, Listable):
                for key in link.backend.list_keys(prefix):
                    if key not in seen:
                        seen.add(key)
                        yield key


class _Clearable:
    def clear(self: _Chain, prefix: str) -> int:
        """Clears every link that can; the largest of their counts, since most keys are in all."""
        self.settle()
        able = [link.backend for link in self.links if isinstance(link.backend, Clearable)]
        return max(backend.clear(prefix) for backend in able)


class _HasStats:
    def stats(self: _Chain) -> Mapping[str, float]:
        """Figures of each link under its name, and those of the copies between them."""
        figures = self.copy_counts()
        for link in self.links:
            if isinstance(link.backend, HasStats):
                with contextlib.suppress(OSError):  # a dead link has no figures just now
                    own = link.backend.stats()
                    figures |= {f"{link.name}_{name}": value for name, value in own.items()}
        return figures


class _Diagnosable:
    def diagnose(self: _Chain) -> Iterator[Finding]:
        """What each link finds, its name before the topic."""
        for link in self.links:
            if isinstance(link.backend, Diagnosable):
                try:
                    for found in link.backend.diagnose():
                        yield Finding(found.level, f"{link.name}: {found.topic}", found.message)
                except BackendError as exc:
                    yield Finding("error", link.name, f"{type(exc).__name__}: {exc}")


class _Pins:
    def pin(self: _Chain, keys: Sequence[str], ttl_s: float) -> int:
        """Pins in every link that can and answers; the largest number of keys that one has."""
        n_present = 0
        for link in self.links:
            if isinstance(link.backend, Pins):
                with contextlib.suppress(OSError):  # a soft pin promises nothing
                    n_present = max(n_present, link.backend.pin(keys, ttl_s))
        return n_present


class _ReportsUsage:
    def usage(self: _Chain) -> Mapping[str, int]:
        """Bytes by namespace; the largest of the links that answer, since most keys are in all."""
        largest: dict[str, int] = {}
        for link in self.links:
            if isinstance(link.backend, ReportsUsage):
                with contextlib.suppress(OSError):
                    for namespace, nbytes in link.backend.usage().items():
                        largest[namespace] = max(nbytes, largest.get(namespace, 0))
        return largest


_CAPABILITIES: tuple[tuple[type, type], ...] = (
    (RegistersMemory, _RegistersMemory),
    (Listable, _Listable),
    (Clearable, _Clearable),
    (HasStats, _HasStats),
    (Diagnosable, _Diagnosable),
    (Pins, _Pins),
    (ReportsUsage, _ReportsUsage),
)


@cache
def chain_class(chain: type, links: tuple[type[StorageBackend], ...]) -> type:
    """``chain`` with what any of ``links`` can do.

    ``isinstance`` looks capabilities up on the class, so they have to be there; see
    ``wrapper.BackendWrapper``.
    """
    mixins = [
        mixin
        for capability, mixin in _CAPABILITIES
        if any(issubclass(link, capability) for link in links)
    ]
    namespace = {"__module__": chain.__module__, "__doc__": chain.__doc__}
    return type(chain.__name__, (chain, *mixins), namespace)
