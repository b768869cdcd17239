"""The index of a pack: which pages lie where in it.

A pack is one object, the pages of one write end to end. Each of its pages also has a small object
under the page's own key, and that holds the index of the whole pack:

    0        4          20         24
    | "HiS3" | pack id  | n_pages  | n_pages × (page hash 32, offset u32, length u32) |

So whoever finds one page of a pack finds all of them, and no second service is needed.
Little-endian. The namespace is that of the key under which the index is found.
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

from hicache_core.storage.sealed import parse_key

MAX_PACK_PAGES = 128
MARK = ("x-amz-meta-hicache", "pack-index-1")
"""The header that the index of a pack is written with; what reads knows an index without it."""

_MAGIC = b"HiS3"
_HEAD = struct.Struct("<4s16sI")
_ENTRY = struct.Struct("<32sII")
INDEX_NBYTES = _HEAD.size + MAX_PACK_PAGES * _ENTRY.size
"""No index is longer."""


def is_index_nbytes(nbytes: int) -> bool:
    """Whether an index may be so long; a page may be so by chance."""
    return _HEAD.size < nbytes <= INDEX_NBYTES and (nbytes - _HEAD.size) % _ENTRY.size == 0


class Slot(NamedTuple):
    """Where a page lies in its pack, in bytes."""

    offset: int
    nbytes: int


@dataclass(frozen=True)
class PackIndex:
    """The pages of one pack.

    Attributes:
        namespace: 16 hex digits.
        pack_id: 32 hex digits; a function of the pages, so that the same write is the same pack.
        slots: key of each page, and where it lies.
    """

    namespace: str
    pack_id: str
    slots: Mapping[str, Slot]

    @classmethod
    def of(cls, sizes: Mapping[str, int]) -> Self:
        """The index of a new pack.

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
        """The index that ``encode`` wrote; None if these bytes are none."""
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
        """The bytes of the index."""
        head = _HEAD.pack(_MAGIC, bytes.fromhex(self.pack_id), len(self.slots))
        return head + b"".join(_entries(self.slots))

    def without(self, keys: Collection[str]) -> PackIndex:
        """The same pack when ``keys`` are no longer to be found in it."""
        left = {key: slot for key, slot in self.slots.items() if key not in keys}
        return PackIndex(self.namespace, self.pack_id, left)

    @property
    def pack_name(self) -> str:
        """Name of the pack's object below the prefix."""
        return f"packs/{self.namespace}/{self.pack_id}"


def _entries(slots: Mapping[str, Slot]) -> list[bytes]:
    return [_ENTRY.pack(parse_key(key)[1], *slot) for key, slot in slots.items()]


class IndexCache:
    """The indexes that were seen last, at most ``limit`` and for ``ttl_s`` each. Thread-safe."""

    def __init__(
        self, limit: int, ttl_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit = limit
        self._ttl_s = ttl_s
        self._clock = clock
        self._lock = threading.Lock()
        self._packs: OrderedDict[str, tuple[PackIndex, float]] = OrderedDict()
        self._pack_of: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._packs)

    def find(self, key: str) -> PackIndex | None:
        """The index that lists ``key``, if one is known."""
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
        """Remembers ``index``, in place of what was known of the same pack."""
        with self._lock:
            self._drop(index.pack_name)
            for key in index.slots:
                self._pack_of[key] = index.pack_name
            self._packs[index.pack_name] = (index, self._clock() + self._ttl_s)
            if len(self._packs) > self._limit:
                self._drop(next(iter(self._packs)))

    def drop(self, index: PackIndex) -> None:
        """Forgets the pack of ``index``."""
        with self._lock:
            self._drop(index.pack_name)

    def clear(self) -> None:
        """Forgets all."""
        with self._lock:
            self._packs.clear()
            self._pack_of.clear()

    def check_integrity(self) -> None:
        """Every key that is known leads to a pack that lists it."""
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
