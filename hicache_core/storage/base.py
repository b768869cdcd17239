"""The contract of a storage backend: three methods to write, batch methods for speed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Protocol, TypeVar, runtime_checkable

from pydantic import BaseModel, ConfigDict, field_validator

from hicache_core.errors import BackendFull
from hicache_core.storage.segments import join, nbytes_of, scatter
from hicache_core.types import BackendContext, Page

API_VERSION = 1

Buffer = bytes | bytearray | memoryview

C = TypeVar("C")


def namespace_of(key: str) -> str:
    """The namespace of a key: the part before its first ``/``."""
    return key.partition("/")[0]


class BackendConfig(BaseModel):
    """Base class of a backend's own settings: frozen; an unknown key is an error.

    In a ``Path``, a leading ``~`` is the user's home.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="after")
    @classmethod
    def _at_home(cls, value: object) -> object:
        try:
            return value.expanduser() if isinstance(value, Path) else value
        except RuntimeError as error:  # there is no such user
            raise ValueError(f"{value}: {error}") from None


class StorageBackend(ABC):
    """L3: immutable objects under content keys, shared by many servers.

    Threads: the owner calls ``open`` and ``close`` once each. Worker threads call everything else,
    several at the same time; the implementation does its own locking.

    Answers and failures: a missing key is an answer (``None``, ``False``, a smaller count). A store
    that cannot answer raises a ``BackendError``, preferably the subclass that fits. The caller
    counts the failure and goes on without the store.

    Objects are immutable: two values under the same key are always equal, so ``set`` may skip a key
    that exists.

    Keys match ``[0-9a-z/]+`` and have at most 200 characters: ``<namespace>/<page hash>``.

    A page is a sequence of writable memoryviews (segments). Its object is the bytes of the segments
    in order.
    """

    name: ClassVar[str]
    """Name of the entry point, and of the backend in the configuration."""
    api_version: ClassVar[int] = API_VERSION
    """Version of this contract that the class was written for."""
    in_process: ClassVar[bool] = False
    """Whether its objects are kept in this process, where no other finds them."""
    pins_last: ClassVar[bool] = False
    """Whether a pin (see ``Pins``) goes on when the backend that set it is closed."""
    Config: ClassVar[type[BackendConfig]] = BackendConfig
    """Model of this backend's settings."""

    def __init__(self, config: BackendConfig, context: BackendContext) -> None:
        """Stores its arguments. Connecting and allocating is left to ``open``.

        Args:
            config: the settings, an instance of ``Config``.
            context: what the backend may know about the cache that uses it.
        """
        self.config = config
        self.context = context

    @classmethod
    def for_reading(cls, config: BackendConfig, context: BackendContext) -> StorageBackend:
        """Returns a backend on the same store that is only read, not opened yet.

        Override it if another class reads the store without changing it in any way. Otherwise
        ``context.read_only`` tells the instance.

        Args:
            config: as for the constructor.
            context: as for the constructor, with ``read_only``.
        """
        return cls(config, context)

    @classmethod
    def taken_nbytes(cls, nbytes: int) -> int:
        """Returns the bytes that the store takes for an object of ``nbytes``; for estimates."""
        return nbytes

    def check_reachable(self) -> None:  # noqa: B027 - likewise, see open()
        """Checks that the store answers, without opening it. Called before ``open``, if at all.

        A server calls it before it loads a model, on an instance that it then discards. It creates
        nothing: a store that ``open`` would create may be absent. The default checks nothing.

        Raises:
            BackendError: as ``open`` would.
        """

    def open(self) -> None:  # noqa: B027 - a backend with nothing to connect need not override it
        """Connects. A wrong address, wrong credentials or a missing directory fail here, quickly.

        Raises:
            BackendError: the message says what was tried, what was found and what to do.
        """

    def close(self) -> None:  # noqa: B027 - a backend with nothing to release need not override it
        """Releases everything and joins the backend's threads. A second call does nothing.

        Every other method raises ``UseAfterClose`` afterwards.
        """

    @abstractmethod
    def get(self, key: str) -> Buffer | None:
        """Returns the whole object under ``key``, or None if there is none."""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Returns whether ``key`` is present. A hint: it may be evicted before it is read."""

    @abstractmethod
    def set(self, key: str, value: Buffer) -> None:
        """Stores ``value``.

        Once this has returned, ``get`` in any process finds the object, unless it was evicted. No
        ``get`` ever sees a part of it. The caller may then reuse the memory of ``value``.

        Raises:
            BackendFull: the store has no room; nothing was stored.
        """

    def delete(self, keys: Sequence[str]) -> None:
        """Removes ``keys``; ignores those that are absent.

        Raises:
            NotImplementedError: this backend cannot delete.
        """
        raise NotImplementedError(f"backend {self.name!r} cannot delete")

    def batch_exists(self, keys: Sequence[str]) -> int:
        """Returns how many leading keys are present: the index of the first missing one."""
        for n, key in enumerate(keys):
            if not self.exists(key):
                return n
        return len(keys)

    def batch_get(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        """Reads the object under ``keys[i]`` into ``pages[i]``.

        A page counts only if its object has exactly the length of the page's segments together.
        Pages after the first one that does not count hold undefined bytes afterwards.

        Args:
            keys: one for each page.
            pages: where to; memory of the caller, which nothing writes to after the call.

        Returns:
            How many leading pages were filled.
        """
        for n, (key, page) in enumerate(zip(keys, pages, strict=True)):
            value = self.get(key)
            if value is None or memoryview(value).nbytes != nbytes_of(page):
                return n
            scatter(value, page)
        return len(keys)

    def batch_set(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        """Stores ``pages[i]`` under ``keys[i]``.

        A full store is an answer here and not an error: the count ends at the first page without
        room.

        Args:
            keys: one for each page.
            pages: what to store; is only read, and not after the call.

        Returns:
            How many leading pages are stored afterwards.
        """
        for n, (key, page) in enumerate(zip(keys, pages, strict=True)):
            try:
                self.set(key, join(page))
            except BackendFull:
                return n
        return len(keys)

    def exists_each(self, keys: Sequence[str]) -> Sequence[bool]:
        """Returns, for each key, whether it is present, also behind gaps.

        The default asks ``batch_exists`` again behind each gap: one question for each absent key. A
        store that can answer for all keys at once should override it.
        """
        return _behind_gaps(len(keys), lambda start: self.batch_exists(keys[start:]))

    def get_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        """Reads as ``batch_get``, also behind gaps.

        Args:
            keys: one for each page.
            pages: where to; as for ``batch_get``.

        Returns:
            For each page, whether it was filled. A page that was not holds undefined bytes.
        """
        return _behind_gaps(len(keys), lambda start: self.batch_get(keys[start:], pages[start:]))

    def set_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        """Stores as ``batch_set``, also behind a page that found no room.

        Args:
            keys: one for each page.
            pages: what to store; as for ``batch_set``.

        Returns:
            For each page, whether it is stored afterwards.
        """
        return _behind_gaps(len(keys), lambda start: self.batch_set(keys[start:], pages[start:]))

    def bounds_calls(self) -> bool:
        """Returns whether no call of an open backend touches the caller's pages without limit.

        True promises that a call which the store does not answer ends by itself, with
        ``BackendTimeout`` or another error, and touches no page afterwards. Engines that hand out
        their own memory are then read into directly; otherwise through pages of ours.
        """
        return False

    def capability(self, kind: type[C]) -> C | None:
        """Returns the object that does ``kind`` for this backend, or None if it cannot.

        This is the one way to ask for what only some backends can do. A backend that has the
        methods of ``kind`` need not override it. Override it to return another object, and call
        ``super()`` for every ``kind`` that you do not know.

        The answer does not change during the life of the backend, so ask once and keep the object.
        Its methods may be called from any thread while the backend is open.

        Args:
            kind: ``Listable`` or another protocol of this module.
        """
        return self if isinstance(self, kind) else None


def _behind_gaps(n: int, leading: Callable[[int], int]) -> list[bool]:
    """Returns answers for ``n`` pages from the number of leading ones at and after a place."""
    answers: list[bool] = []
    while len(answers) < n:
        answers += [True] * leading(len(answers))
        if len(answers) < n:
            answers.append(False)
    return answers


# What only some backends can do. Ask with ``backend.capability(kind)``, never by a backend's name
# nor with isinstance: a wrapper has no such methods of its own.


@runtime_checkable
class RegistersMemory(Protocol):
    """A backend whose transport must know the memory that it reads and writes (RDMA)."""

    def register_memory(self, buffers: Sequence[memoryview]) -> None:
        """Announces the memory of all pages; called once, after ``open`` and before any page."""
        ...


@runtime_checkable
class Listable(Protocol):
    """A backend that can enumerate what it holds."""

    def list_keys(self, prefix: str) -> Iterator[str]:
        """Yields every key that starts with ``prefix``, in any order.

        Keys that are stored or removed meanwhile may be missing or present.
        """
        ...


@runtime_checkable
class Clearable(Protocol):
    """A backend that can remove a whole namespace at once."""

    def clear(self, prefix: str) -> int:
        """Removes every key that starts with ``prefix``; returns how many there were."""
        ...


@runtime_checkable
class HasStats(Protocol):
    """A backend that counts what it does."""

    def stats(self) -> Mapping[str, float]:
        """Returns counters since ``open`` and gauges: ``used_nbytes``, ``dropped_writes``, …"""
        ...


@runtime_checkable
class Pins(Protocol):
    """A backend that keeps chosen objects longer than others, for a limited time."""

    def pin(self, keys: Sequence[str], ttl_s: float) -> int:
        """Asks the store to evict ``keys`` last, for ``ttl_s`` seconds.

        The pin is soft: it expires by itself, another call renews it and 0 seconds end it. When
        everything that could be evicted is pinned, the least recently used object is evicted.

        Returns:
            How many of ``keys`` are present.
        """
        ...


@runtime_checkable
class ReportsUsage(Protocol):
    """A backend that knows how many bytes each namespace occupies."""

    def usage(self) -> Mapping[str, int]:
        """Returns the bytes of stored objects by namespace (see ``namespace_of``)."""
        ...


@dataclass(frozen=True, slots=True)
class NamespaceTotals:
    """What a store holds of one namespace.

    Attributes:
        objects: number of objects.
        nbytes: their bytes.
        oldest: when the oldest of them was written, in seconds since 1970; None if unknown.
        newest: when the newest was; None if unknown.
    """

    objects: int
    nbytes: int
    oldest: float | None = None
    newest: float | None = None


@runtime_checkable
class ReportsTotals(Protocol):
    """A backend that counts its objects by namespace."""

    def namespace_totals(self) -> Mapping[str, NamespaceTotals]:
        """Returns what is stored, by namespace (see ``namespace_of``)."""
        ...


@runtime_checkable
class Flushable(Protocol):
    """A backend that acknowledges writes before they have reached every store (write-behind)."""

    def flush(self, timeout_s: float) -> bool:
        """Blocks until all acknowledged writes have reached every store.

        Returns:
            False if that took longer than ``timeout_s``.
        """
        ...


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of ``hicache doctor``.

    Attributes:
        level: ok, warning or error.
        topic: what was checked, in one or two words.
        message: what was found and, unless the level is ok, what to change.
    """

    level: Literal["ok", "warning", "error"]
    topic: str
    message: str


@runtime_checkable
class Diagnosable(Protocol):
    """A backend that can check its own store (versions, rights, eviction policy, free space)."""

    def diagnose(self) -> Iterator[Finding]:
        """Yields findings, the most basic ones first; called on an open backend."""
        ...
