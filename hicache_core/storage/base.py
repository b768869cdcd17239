"""The contract of a storage backend: three methods to write, batch methods for speed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, TypeVar, runtime_checkable

from pydantic import BaseModel, ConfigDict

from hicache_core.errors import BackendFull
from hicache_core.storage.segments import join, nbytes_of, scatter
from hicache_core.types import BackendContext, Page

API_VERSION = 1

Buffer = bytes | bytearray | memoryview

C = TypeVar("C")


def namespace_of(key: str) -> str:
    """The namespace of a key: what stands before its first ``/``."""
    return key.partition("/")[0]


class BackendConfig(BaseModel):
    """Base of a backend's own settings: frozen, an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class StorageBackend(ABC):
    """L3: immutable objects under content keys, shared by many servers.

    Threads: ``open`` and ``close`` are called once each, by the owner. Everything else is called
    from several worker threads at once; the implementation is responsible for its own locking.

    Answers and failures: a key that is not there is an answer (``None``, ``False``, a smaller
    count). A store that cannot answer raises a ``BackendError``, best the fitting subclass; the
    caller counts it and goes on without the store.

    Objects are immutable: two values under one key are always equal, so ``set`` of a key that
    exists may be skipped.

    Keys are text of ``[0-9a-z/]``, at most 200 characters: ``<namespace>/<page hash>``.
    """

    name: ClassVar[str]
    """Entry-point name and the name in the configuration."""
    api_version: ClassVar[int] = API_VERSION
    """The version of this contract that the class was written for."""
    Config: ClassVar[type[BackendConfig]] = BackendConfig
    """This backend's settings."""

    def __init__(self, config: BackendConfig, context: BackendContext) -> None:
        """Keeps its arguments; connects to nothing and allocates nothing (``open`` does)."""
        self.config = config
        self.context = context

    def open(self) -> None:  # noqa: B027 - a backend with nothing to connect need not override it
        """Connects. A bad address, bad credentials or a missing directory fail here, soon.

        Raises:
            BackendError: with what was tried, what was found and what to do.
        """

    def close(self) -> None:  # noqa: B027 - a backend with nothing to release need not override it
        """Releases everything, joins its threads; a second call does nothing.

        A call of any other method afterwards raises ``UseAfterClose``.
        """

    @abstractmethod
    def get(self, key: str) -> Buffer | None:
        """The whole object under ``key``, or None if there is none."""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Whether ``key`` is present: a hint, since it may be evicted before it is read."""

    @abstractmethod
    def set(self, key: str, value: Buffer) -> None:
        """Stores ``value``; when it returns, a ``get`` by any process finds it whole or not at all.

        The caller may reuse the memory of ``value`` as soon as this returns.

        Raises:
            BackendFull: there is no room; nothing was stored.
        """

    def delete(self, keys: Sequence[str]) -> None:
        """Removes ``keys``; those that are absent are passed over."""
        raise NotImplementedError(f"backend {self.name!r} cannot delete")

    def batch_exists(self, keys: Sequence[str]) -> int:
        """How many leading keys are present, without a gap."""
        for n, key in enumerate(keys):
            if not self.exists(key):
                return n
        return len(keys)

    def batch_get(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        """Fills ``pages[i]`` with the object under ``keys[i]``; how many leading pages are filled.

        A page counts only if its object is exactly as long as the page's segments together.
        Pages behind the first that is missing hold undefined bytes afterwards.
        """
        for n, (key, page) in enumerate(zip(keys, pages, strict=True)):
            value = self.get(key)
            if value is None or memoryview(value).nbytes != nbytes_of(page):
                return n
            scatter(value, page)
        return len(keys)

    def batch_set(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        """Stores ``pages[i]`` under ``keys[i]``; how many leading pages are stored afterwards.

        A full store is an answer here, not an error: the count ends where the room ended.
        """
        for n, (key, page) in enumerate(zip(keys, pages, strict=True)):
            try:
                self.set(key, join(page))
            except BackendFull:
                return n
        return len(keys)

    def capability(self, kind: type[C]) -> C | None:
        """The object that does ``kind`` for this backend; None if it cannot.

        The one way to ask a backend for what only some can do. A backend that has the methods of
        ``kind`` needs no more: this finds them. Override it to give another object, and call
        ``super()`` for every ``kind`` that you do not know.

        The answer stays the same for the life of the backend, so ask once and keep the object. Its
        methods may be called from any thread, while the backend is open.

        Args:
            kind: ``Listable`` or another protocol of this module.
        """
        return self if isinstance(self, kind) else None


# What only some backends can do. Ask with ``backend.capability(kind)``, never by a backend's name
# nor with isinstance: a wrapper has no such methods of its own.


@runtime_checkable
class RegistersMemory(Protocol):
    """A transport that must know the memory it reads and writes (RDMA)."""

    def register_memory(self, buffers: Sequence[memoryview]) -> None:
        """Announces memory that pages will lie in; called once, after ``open``, before any page."""
        ...


@runtime_checkable
class Listable(Protocol):
    """A backend that can enumerate what it holds."""

    def list_keys(self, prefix: str) -> Iterator[str]:
        """Every key that starts with ``prefix``, in no order; a snapshot is not promised."""
        ...


@runtime_checkable
class Clearable(Protocol):
    """A backend that can remove a whole namespace at once."""

    def clear(self, prefix: str) -> int:
        """Removes every key that starts with ``prefix``; how many there were."""
        ...


@runtime_checkable
class HasStats(Protocol):
    """A backend that counts what it does."""

    def stats(self) -> Mapping[str, float]:
        """Counters and gauges since ``open``: ``used_nbytes``, ``dropped_writes``, …"""
        ...


@runtime_checkable
class Pins(Protocol):
    """A backend that keeps named objects longer than others, for a while."""

    def pin(self, keys: Sequence[str], ttl_s: float) -> int:
        """Asks to evict ``keys`` last for ``ttl_s`` seconds; how many of them are present.

        A soft pin that decays: it ends by itself, another call renews it, 0 ends it now, and when
        all that could be evicted is pinned, the least recently used goes all the same.
        """
        ...


@runtime_checkable
class ReportsUsage(Protocol):
    """A backend that knows how many bytes each namespace takes."""

    def usage(self) -> Mapping[str, int]:
        """Bytes of stored objects by namespace (what stands before the ``/`` of a key)."""
        ...


@runtime_checkable
class Flushable(Protocol):
    """A backend that acknowledges writes before they are where they belong (write-behind)."""

    def flush(self, timeout_s: float) -> bool:
        """Waits until all acknowledged writes have reached every store; False if time ran out."""
        ...


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of ``hicache doctor``.

    Attributes:
        level: ok, warning or error.
        topic: what was looked at, one or two words.
        message: what was found and, unless ok, what to change.
    """

    level: Literal["ok", "warning", "error"]
    topic: str
    message: str


@runtime_checkable
class Diagnosable(Protocol):
    """A backend that can examine its own store (versions, rights, eviction policy, room)."""

    def diagnose(self) -> Iterator[Finding]:
        """Findings, most basic first; called on an open backend."""
        ...
