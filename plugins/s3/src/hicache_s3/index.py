"""The index of a pack: the places of its pages.

A pack is one object that holds the pages of one write, one after the other. In addition there is a
small object under the key of each page, which holds the index of the whole pack:

    0        4          20         24
    | "HiS3" | pack id  | n_pages  | n_pages × (page hash 32, offset u32, length u32) |

So one page of a pack leads to all of them, and no second service is needed. Little-endian. The
namespace is that of the key under which the index is stored.
"""

from __future__ import annotations

import hashlib
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Self

from hicache_core.plugin.backends import parse_key

MAX_PACK_PAGES = 128
MARK = ("x-amz-meta-hicache", "pack-index-1")
"""Header of an index when it is written; readers also recognise an index without it."""

_MAGIC = b"HiS3"
_HEAD = struct.Struct("<4s16sI")
_ENTRY = struct.Struct("<32sII")
INDEX_NBYTES = _HEAD.size + MAX_PACK_PAGES * _ENTRY.size
"""Maximum length of an index."""


def is_index_nbytes(nbytes: int) -> bool:
    """Returns whether an index can have this length; a page may have it by chance."""
    return _HEAD.size < nbytes <= INDEX_NBYTES and (nbytes - _HEAD.size) % _ENTRY.size == 0


class Slot(NamedTuple):
    """The place of a page in its pack, in bytes."""

    offset: int
    nbytes: int


@dataclass(frozen=True)
class PackIndex:
    """The pages of one pack.

    Attributes:
        namespace: 16 hex digits.
        pack_id: 32 hex digits; a function of the pages, so that the same write is the same pack.
        slots: the place of each page, by key.
    """

    namespace: str
    pack_id: str
    slots: Mapping[str, Slot]

    @classmethod
    def of(cls, sizes: Mapping[str, int]) -> Self:
        """Makes the index of a new pack.

        Args:
            sizes: keys of one namespace, in the order of the pack, and the length of each page.
        """
        slots, offset = {}, 0
        for key, nbytes in sizes.items():
            slots[key] = Slot(offset, nbytes)
            offset += nbytes
        digest = hashlib.blake2b(digest_size=16)
        for entry in _entries(slots):
            digest.update(entry)
        return cls(next(iter(slots)).partition("/")[0], digest.hexdigest(), slots)

    @classmethod
    def decode(cls, namespace: str, data: bytes) -> Self | None:
        """Parses the bytes of an index; None if they are not one."""
        if len(data) < _HEAD.size:
            return None
        magic, pack_id, n_pages = _HEAD.unpack_from(data)
        entries = data[_HEAD.size :]
        if magic != _MAGIC or len(entries) != n_pages * _ENTRY.size:
            return None
        slots = {
            f"{namespace}/{page_hash.hex()}": Slot(offset, nbytes)
            for page_hash, offset, nbytes in _ENTRY.iter_unpack(entries)
        }
        return cls(namespace, pack_id.hex(), slots)

    def encode(self) -> bytes:
        """Returns the bytes of the index."""
        head = _HEAD.pack(_MAGIC, bytes.fromhex(self.pack_id), len(self.slots))
        return head + b"".join(_entries(self.slots))

    def without(self, keys: Collection[str]) -> PackIndex:
        """Returns the index without ``keys``."""
        left = {key: slot for key, slot in self.slots.items() if key not in keys}
        return PackIndex(self.namespace, self.pack_id, left)

    @property
    def pack_name(self) -> str:
        """Name of the pack's object, without the prefix."""
        return f"packs/{self.namespace}/{self.pack_id}"


def _entries(slots: Mapping[str, Slot]) -> list[bytes]:
    return [_ENTRY.pack(parse_key(key)[1], *slot) for key, slot in slots.items()]


class IndexCache:
    """The indexes used last: at most ``limit``, each for ``ttl_s``. Any thread may call it."""

    def __init__(
        self, limit: int, ttl_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Starts empty.

        Args:
            limit: maximum number of indexes.
            ttl_s: how long an index is used, in seconds.
            clock: seconds; only differences count.
        """
        self._limit = limit
        self._ttl_s = ttl_s
        self._clock = clock
        self._lock = threading.Lock()
        self._packs: OrderedDict[str, tuple[PackIndex, float]] = OrderedDict()
        self._pack_of: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._packs)

    def find(self, key: str) -> PackIndex | None:
        """Returns the index that lists ``key``; None if there is none in the cache."""
        with self._lock:
            name = self._pack_of.get(key)
            if name is None:
                return None
            index, expires_at = self._packs[name]
            if self._clock() >= expires_at:
                self._drop(name)
                return None
            self._packs.move_to_end(name)
            return index

    def add(self, index: PackIndex) -> None:
        """Adds ``index``; replaces an older one of the same pack."""
        with self._lock:
            self._drop(index.pack_name)
            for key in index.slots:
                self._pack_of[key] = index.pack_name
            self._packs[index.pack_name] = (index, self._clock() + self._ttl_s)
            if len(self._packs) > self._limit:
                self._drop(next(iter(self._packs)))

    def drop(self, index: PackIndex) -> None:
        """Removes the pack of ``index``."""
        with self._lock:
            self._drop(index.pack_name)

    def clear(self) -> None:
        """Removes everything."""
        with self._lock:
            self._packs.clear()
            self._pack_of.clear()

    def check_integrity(self) -> None:
        """Checks that every key refers to a pack that lists it."""
        with self._lock:
            assert len(self._packs) <= self._limit
            for key, name in self._pack_of.items():
                assert key in self._packs[name][0].slots

    def _drop(self, name: str) -> None:
        known = self._packs.pop(name, None)
        if known is not None:
            for key in known[0].slots:
                if self._pack_of.get(key) == name:
                    del self._pack_of[key]
