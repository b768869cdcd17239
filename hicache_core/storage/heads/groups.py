"""Stores the pages of a rank as one object for each group of KV heads.

With two ranks, each holds twice as many heads as with four. If each object holds the heads of one
rank of four, both fleets share the objects: each is, byte for byte and under the same key, what a
rank with exactly those heads would store.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Generic, TypeVar

import numpy as np

from hicache_core.errors import BackendTimeout, UseAfterClose
from hicache_core.kv.keys import storage_namespace
from hicache_core.kv.spec import KVSpec
from hicache_core.pools.layout import layout_named
from hicache_core.storage.base import (
    Buffer,
    Clearable,
    Listable,
    Pins,
    RegistersMemory,
    StorageBackend,
)
from hicache_core.storage.heads.cut import Bytes, HeadCut, head_group_namespaces
from hicache_core.storage.sealed import HEADER_NBYTES
from hicache_core.storage.wrapper import Adapters, BackendWrapper
from hicache_core.types import Page

C = TypeVar("C")

SLOT_NBYTES = 32 << 20
"""Staging memory for each call, roughly: enough pages for a store to work in parallel."""

SLOT_PAGES = 128
"""Maximum number of pages in it: those of one storage job."""


class _Slot:
    """Staging memory of one call: ``n_pages`` pages, each as objects of its groups.

    ::

        page 0                                                            │ page 1 …
        group 0: header (64), payload, gap │ group 1: header, payload, gap │
    """

    def __init__(self, memory: memoryview, n_pages: int, cut: HeadCut) -> None:
        step = _aligned(HEADER_NBYTES + cut.group_nbytes)
        objects = np.frombuffer(memory, np.uint8).reshape(n_pages, cut.n_groups, step)
        payloads = objects[:, :, HEADER_NBYTES : HEADER_NBYTES + cut.group_nbytes]
        self.groups: list[Bytes] = list(payloads)  # of each page: (n_groups, group_nbytes)
        self.pages: list[Page] = [
            (
                memory[start : start + HEADER_NBYTES],
                memory[start + HEADER_NBYTES : start + HEADER_NBYTES + cut.group_nbytes],
            )
            for start in range(0, n_pages * cut.n_groups * step, step)
        ]


@dataclass(frozen=True, slots=True)
class _OfGroups(Generic[C]):
    """A capability of ``inner``, which knows groups, translated to pages."""

    heads: HeadGroupBackend
    inner: C


class _RegistersStaging(_OfGroups[RegistersMemory]):
    def register_memory(self, _buffers: Sequence[memoryview]) -> None:
        """Announces the staging memory instead: ``inner`` reads and writes no other memory."""
        self.inner.register_memory([self.heads.staging])


class _ListsPages(_OfGroups[Listable]):
    def list_keys(self, prefix: str) -> Iterator[str]:
        """Returns the keys of pages whose groups are all listed."""
        listed = [
            {key[len(group) :] for key in self.inner.list_keys(group + rest)}
            for group, rest in self.heads.inner_prefixes(prefix)
        ]
        hashes = set.intersection(*listed) if listed else set()
        return (self.heads.key_prefix + page_hash for page_hash in hashes)


class _ClearsPages(_OfGroups[Clearable]):
    def clear(self, prefix: str) -> int:
        """Removes all groups; returns how many pages had at least one."""
        prefixes = self.heads.inner_prefixes(prefix)
        return max((self.inner.clear(group + rest) for group, rest in prefixes), default=0)


class _PinsPages(_OfGroups[Pins]):
    def pin(self, keys: Sequence[str], ttl_s: float) -> int:
        """Pins all groups; returns how many pages are completely present."""
        inner_keys = self.heads.inner_keys(keys)
        if self.inner.pin(inner_keys, ttl_s) == len(inner_keys):
            return len(keys)
        return sum(self.heads.exists(key) for key in keys)


class HeadGroupBackend(BackendWrapper):
    """Cuts each page into objects of ``group`` KV heads to store it, and joins them to read it.

    Wraps a sealed backend, so each object is sealed and checked by itself. A page is present only
    if all of its groups are. It is written to only after all of its groups have arrived.

    Callers use keys ``<namespace of the rank>/<hash>``. The keys of ``inner`` are ``<namespace of
    the heads>/<hash>``, and ``usage`` reports those namespaces.

    Threads: as every backend. ``n_slots`` calls can copy at the same time. A further one blocks for
    at most ``slot_timeout_s`` and then raises ``BackendTimeout``.
    """

    adapters: ClassVar[Adapters] = MappingProxyType(
        {
            RegistersMemory: _RegistersStaging,
            Listable: _ListsPages,
            Clearable: _ClearsPages,
            Pins: _PinsPages,
        }
    )

    def __init__(
        self,
        inner: StorageBackend,
        spec: KVSpec,
        page_size: int,
        layout: str,
        *,
        group: int,
        n_slots: int,
        slot_timeout_s: float = 1.0,
    ) -> None:
        """Wraps ``inner``; ``open`` allocates the staging memory.

        Args:
            inner: a sealed backend.
            spec: what this rank holds.
            page_size: tokens in a page.
            layout: name of the host layout.
            group: number of KV heads in one object (``storage_head_group``).
            n_slots: maximum number of calls at the same time: the threads of the worker, and some
                more for calls that hang.
            slot_timeout_s: how long a call waits for staging memory, in seconds.

        Raises:
            SpecError: ``group`` does not fit the heads of ``spec``.
        """
        super().__init__(inner)
        self._cut = HeadCut(spec, page_size, layout_named(layout), group)
        self.key_prefix = storage_namespace(spec.identity(), page_size, layout) + "/"
        namespaces = head_group_namespaces(spec, page_size, layout, group)
        self._prefixes = [namespace + "/" for namespace in namespaces]
        page_nbytes = self._cut.n_groups * _aligned(HEADER_NBYTES + self._cut.group_nbytes)
        self._slot_pages = max(1, min(SLOT_PAGES, SLOT_NBYTES // page_nbytes))
        self._slot_nbytes = self._slot_pages * page_nbytes
        self._n_slots = n_slots
        self._slot_timeout_s = slot_timeout_s
        self._changed = threading.Condition()
        self._memory: memoryview | None = None
        self._free: list[_Slot] = []

    @property
    def staging_nbytes(self) -> int:
        """Bytes of memory that ``open`` allocates."""
        return self._n_slots * self._slot_nbytes

    def open(self) -> None:
        """Opens ``inner`` and allocates the staging memory."""
        self.inner.open()
        if self._memory is not None:
            return
        self._memory = memoryview(mmap.mmap(-1, self.staging_nbytes))
        self._free = [
            _Slot(self._memory[start : start + self._slot_nbytes], self._slot_pages, self._cut)
            for start in range(0, self.staging_nbytes, self._slot_nbytes)
        ]

    def close(self) -> None:
        """Closes ``inner`` and releases the staging memory; calls that use it keep their part."""
        self.inner.close()
        with self._changed:
            self._memory = None
            self._free.clear()
            self._changed.notify_all()

    def get(self, key: str) -> Buffer | None:
        groups = np.empty((self._cut.n_groups, self._cut.group_nbytes), np.uint8)
        for group, inner_key in zip(groups, self.inner_keys([key]), strict=True):
            value = self.inner.get(inner_key)
            if value is None or memoryview(value).nbytes != self._cut.group_nbytes:
                return None
            group[:] = np.frombuffer(value, np.uint8)
        payload = bytearray(sum(self._cut.segment_nbytes))
        self._cut.join(groups, self._segments(memoryview(payload)))
        return payload

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    def set(self, key: str, value: Buffer) -> None:
        groups = np.empty((self._cut.n_groups, self._cut.group_nbytes), np.uint8)
        self._cut.split(self._segments(memoryview(value).cast("B")), groups)
        for group, inner_key in zip(groups, self.inner_keys([key]), strict=True):
            self.inner.set(inner_key, group.tobytes())

    def delete(self, keys: Sequence[str]) -> None:
        self.inner.delete(self.inner_keys(keys))

    def batch_exists(self, keys: Sequence[str]) -> int:
        return self.inner.batch_exists(self.inner_keys(keys)) // self._cut.n_groups

    def batch_get(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        n_groups, done = self._cut.n_groups, 0
        with self._slot() as slot:
            while done < len(keys):
                chunk = pages[done : done + self._slot_pages]
                inner_keys = self.inner_keys(keys[done : done + self._slot_pages])
                n_whole = (
                    self.inner.batch_get(inner_keys, slot.pages[: len(inner_keys)]) // n_groups
                )
                for n in range(n_whole):
                    self._cut.join(slot.groups[n], chunk[n][1:])
                done += n_whole
                if n_whole < len(chunk):
                    break
        return done

    def batch_set(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        n_groups, done = self._cut.n_groups, 0
        with self._slot() as slot:
            while done < len(keys):
                chunk = pages[done : done + self._slot_pages]
                inner_keys = self.inner_keys(keys[done : done + self._slot_pages])
                for n, page in enumerate(chunk):
                    self._cut.split(page[1:], slot.groups[n])
                n_whole = (
                    self.inner.batch_set(inner_keys, slot.pages[: len(inner_keys)]) // n_groups
                )
                done += n_whole
                if n_whole < len(chunk):
                    break
        return done

    def exists_each(self, keys: Sequence[str]) -> Sequence[bool]:
        return self._whole(self.inner.exists_each(self.inner_keys(keys)))

    def get_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        mask: list[bool] = []
        with self._slot() as slot:
            for start in range(0, len(keys), self._slot_pages):
                part = slice(start, start + self._slot_pages)
                inner_keys = self.inner_keys(keys[part])
                filled = self.inner.get_each(inner_keys, slot.pages[: len(inner_keys)])
                whole = self._whole(filled)
                for groups, page, is_whole in zip(slot.groups, pages[part], whole, strict=False):
                    if is_whole:
                        self._cut.join(groups, page[1:])
                mask += whole
        return mask

    def set_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        mask: list[bool] = []
        with self._slot() as slot:
            for start in range(0, len(keys), self._slot_pages):
                part = slice(start, start + self._slot_pages)
                inner_keys = self.inner_keys(keys[part])
                for groups, page in zip(slot.groups, pages[part], strict=False):
                    self._cut.split(page[1:], groups)
                mask += self._whole(self.inner.set_each(inner_keys, slot.pages[: len(inner_keys)]))
        return mask

    @property
    def staging(self) -> memoryview:
        """The staging memory.

        Raises:
            UseAfterClose: it is not open.
        """
        if self._memory is None:
            raise UseAfterClose("the head groups are not open; call open() first")
        return self._memory

    def inner_keys(self, keys: Sequence[str]) -> list[str]:
        """Returns the keys of all groups, page by page: leading objects are leading pages."""
        result = []
        for key in keys:
            page_hash = key.removeprefix(self.key_prefix)
            if len(page_hash) == len(key):
                raise ValueError(
                    f"{key!r} is not a key of this rank; its keys start with {self.key_prefix!r}"
                )
            result += [prefix + page_hash for prefix in self._prefixes]
        return result

    def verdict(self, key: str, of_object: Callable[[str], str | None]) -> str | None:
        """Returns why the page under ``key`` was refused: the verdict on one of its objects.

        Args:
            key: of the page.
            of_object: returns the verdict on an object, None if it was not refused.

        Returns:
            None if no object of the page was refused.
        """
        return next(filter(None, map(of_object, self.inner_keys([key]))), None)

    def inner_prefixes(self, prefix: str) -> list[tuple[str, str]]:
        """Returns, for page keys that start with ``prefix``, the prefix of each group and the rest.

        Empty if no page key starts with ``prefix``.
        """
        if self.key_prefix.startswith(prefix):
            return [(group, "") for group in self._prefixes]
        if prefix.startswith(self.key_prefix):
            return [(group, prefix.removeprefix(self.key_prefix)) for group in self._prefixes]
        return []

    def _whole(self, groups: Sequence[bool]) -> list[bool]:
        """Returns for each page whether all of its groups are there, given that of each group."""
        n_groups = self._cut.n_groups
        return [all(groups[n : n + n_groups]) for n in range(0, len(groups), n_groups)]

    def _segments(self, payload: memoryview) -> Page:
        """Returns a payload in one piece as the segments of a page."""
        segments, start = [], 0
        for nbytes in self._cut.segment_nbytes:
            segments.append(payload[start : start + nbytes])
            start += nbytes
        if start != payload.nbytes:
            raise ValueError(f"expected a payload of {start} bytes, found {payload.nbytes}")
        return segments

    @contextmanager
    def _slot(self) -> Iterator[_Slot]:
        """Yields staging memory for one call; it is returned when the call ends, however late."""
        with self._changed:
            ready = self._changed.wait_for(
                lambda: self._free or self._memory is None, self._slot_timeout_s
            )
            memory = self.staging
            if not ready:
                raise BackendTimeout(
                    f"no staging memory became free in {self._slot_timeout_s:g} s: "
                    f"{self._n_slots} calls of backend {self.name!r} have not returned"
                )
            slot = self._free.pop()
        try:
            yield slot
        finally:
            with self._changed:
                if self._memory is memory:
                    self._free.append(slot)
                    self._changed.notify()


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 64) * 64
