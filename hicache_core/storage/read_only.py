"""A backend that is only read: nothing is stored, removed or pinned in its store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, TypeVar

from hicache_core.errors import BackendDenied
from hicache_core.storage.base import Buffer, Clearable, Flushable, Pins
from hicache_core.storage.visiting import VisitsEachPage, VisitsPages
from hicache_core.storage.wrapper import Adapters, BackendWrapper
from hicache_core.types import Page

C = TypeVar("C")

_CHANGES = frozenset([Clearable, Flushable, Pins])
"""The kinds of capabilities that change a store, which are not passed on."""


@dataclass(frozen=True, slots=True)
class _Visits:
    """Reads visiting each page as ``inner`` does; stores nothing."""

    wrapper: ReadOnlyBackend
    inner: VisitsPages

    def batch_get_visiting(
        self, keys: Sequence[str], pages: Sequence[Page], arrived: Callable[[int], bool]
    ) -> int:
        return self.inner.batch_get_visiting(keys, pages, arrived)

    def batch_set_visiting(
        self,
        keys: Sequence[str],
        pages: Sequence[Page],
        leaving: Callable[[int], None],  # noqa: ARG002 - of a protocol
    ) -> int:
        return self.wrapper.batch_set(keys, pages)


@dataclass(frozen=True, slots=True)
class _VisitsEach:
    """As ``_Visits``, for the calls that answer for each page."""

    wrapper: ReadOnlyBackend
    inner: VisitsEachPage

    def get_each_visiting(
        self, keys: Sequence[str], pages: Sequence[Page], arrived: Callable[[int], bool]
    ) -> Sequence[bool]:
        return self.inner.get_each_visiting(keys, pages, arrived)

    def set_each_visiting(
        self,
        keys: Sequence[str],
        pages: Sequence[Page],
        leaving: Callable[[int], None],  # noqa: ARG002 - likewise
    ) -> Sequence[bool]:
        return self.wrapper.set_each(keys, pages)


class ReadOnlyBackend(BackendWrapper):
    """Reads as ``inner`` does. Of pages to be stored it takes none, as a full store.

    It is the innermost layer, so that no other one changes the store either: a damaged object is a
    miss, and stays.
    """

    adapters: ClassVar[Adapters] = MappingProxyType(
        {VisitsPages: _Visits, VisitsEachPage: _VisitsEach}
    )

    def capability(self, kind: type[C]) -> C | None:
        return None if kind in _CHANGES else super().capability(kind)

    def set(self, key: str, value: Buffer) -> None:
        """Raises ``BackendDenied``."""
        raise self._refusal(f"{key} with {memoryview(value).nbytes} bytes is not stored")

    def delete(self, keys: Sequence[str]) -> None:
        """Raises ``BackendDenied``."""
        raise self._refusal(f"none of {len(keys)} objects is removed")

    def batch_set(self, keys: Sequence[str], pages: Sequence[Page]) -> int:  # noqa: ARG002 - none
        """Stores nothing, and says so: returns 0."""
        return 0

    def exists_each(self, keys: Sequence[str]) -> Sequence[bool]:
        return self.inner.exists_each(keys)

    def get_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        return self.inner.get_each(keys, pages)

    def set_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        """Stores nothing, and says so for each page."""
        return [False] * len(pages[: len(keys)])

    def _refusal(self, what: str) -> BackendDenied:
        return BackendDenied(f"backend {self.name!r} is used read-only: {what}")
