"""Wrong backends: what they answer or store is wrong. Each docstring names the rule.

See ``defects`` for those that are wrong over time: opening, closing, races, sharing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from hicache_core.errors import BackendDenied, BackendFull
from hicache_core.storage.base import Buffer
from hicache_core.storage.sealed import MAGIC
from hicache_core.storage.segments import join, nbytes_of, scatter
from hicache_core.types import Page
from tests.conformance.right import RightBackend


class DoesNotOpen(RightBackend):
    """opens"""

    def open(self) -> None:
        raise RuntimeError("no")


class GetReverses(RightBackend):
    """get_after_set"""

    def get(self, key: str) -> Buffer | None:
        value = self.objects.get(key)
        return None if value is None else value[::-1]


class BatchGetFindsNothing(RightBackend):
    """batch_round_trip"""

    def batch_get(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        return 0


class SegmentsInWrongOrder(RightBackend):
    """segments_of_every_shape"""

    def batch_get(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        return super().batch_get(keys, [tuple(reversed(page)) for page in pages])


class MissRaises(RightBackend):
    """miss_is_an_answer"""

    def get(self, key: str) -> Buffer | None:
        return self.objects[key]


class RemembersMisses(RightBackend):
    """miss_is_an_answer"""

    missed: set[str]

    def open(self) -> None:
        super().open()
        self.missed = set()

    def get(self, key: str) -> Buffer | None:
        value = super().get(key)
        if value is None:
            self.missed.add(key)
        return value

    def exists(self, key: str) -> bool:
        return super().exists(key) and key not in self.missed


class CountsAllPresent(RightBackend):
    """exists_counts_leading"""

    def batch_exists(self, keys: Sequence[str]) -> int:
        return sum(map(self.exists, keys))


class HitsMoveUp(RightBackend):
    """get_counts_leading"""

    def batch_get(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        hits = [key for key in keys if self.exists(key)]
        return super().batch_get(hits, pages[: len(hits)])


class EmptyBatchRaises(RightBackend):
    """empty_batch"""

    def batch_exists(self, keys: Sequence[str]) -> int:
        if not keys:
            raise ValueError("wrong number of arguments")
        return super().batch_exists(keys)


class FillsEachKeyOnce(RightBackend):
    """same_key_twice"""

    def batch_get(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        once = dict(zip(keys, pages, strict=True))
        n_filled = super().batch_get(list(once), list(once.values()))
        return len(keys) if n_filled == len(once) else n_filled


class DropsBehindHundred(RightBackend):
    """large_batch"""

    def batch_set(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        return super().batch_set(keys[:100], pages[:100])


class RefusesKnownKeys(RightBackend):
    """re_put"""

    def set(self, key: str, value: Buffer) -> None:
        if self.exists(key):
            raise BackendDenied("it exists")
        super().set(key, value)


class KeepsTheCallersMemory(RightBackend):
    """set_copies"""

    def batch_set(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        n_stored = super().batch_set(keys, pages)
        pages_of = self.__dict__.setdefault("pages", {})
        pages_of.update(zip(keys, pages, strict=True))
        return n_stored

    def get(self, key: str) -> Buffer | None:
        value = super().get(key)
        page = self.__dict__.get("pages", {}).get(key)
        return value if value is None or page is None else join(page)


class SpoilsItsPages(RightBackend):
    """set_only_reads"""

    def batch_set(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        n_stored = super().batch_set(keys, pages)
        for segment in [s for page in pages for s in page if s.nbytes]:
            segment[0] ^= 1
        return n_stored


class OneBufferForAnswers(RightBackend):
    """get_gives_its_own_bytes"""

    buffer: bytearray

    def open(self) -> None:
        super().open()
        self.buffer = bytearray(4 << 20)

    def get(self, key: str) -> Buffer | None:
        value = super().get(key)
        if value is None:
            return None
        self.buffer[: len(value)] = value
        return memoryview(self.buffer)[: len(value)]


class ViewsOfItsArena(RightBackend):
    """get_gives_its_own_bytes"""

    arena: bytearray
    places: dict[str, int]

    def open(self) -> None:
        super().open()
        self.arena, self.places = bytearray(8 * 4096), {}

    def set(self, key: str, value: Buffer) -> None:
        super().set(key, value)
        free = sorted(set(range(8)) - set(self.places.values()))
        if len(value) == 4096 and key not in self.places and free:
            self.places[key] = free[0]
            self.arena[free[0] * 4096 : (free[0] + 1) * 4096] = value

    def get(self, key: str) -> Buffer | None:
        value, place = super().get(key), self.places.get(key)
        if value is None or place is None:
            return value
        return memoryview(self.arena)[place * 4096 : (place + 1) * 4096]

    def delete(self, keys: Sequence[str]) -> None:
        super().delete(keys)
        for key in keys:
            self.places.pop(key, None)


class GivesSealedPagesOnce(RightBackend):
    """bad_link_removes_nothing"""

    def get(self, key: str) -> Buffer | None:
        value = super().get(key)
        if value is not None and value[:4] == MAGIC:
            self.delete([key])
        return value


class KeyWithoutNamespace(RightBackend):
    """namespaces_are_apart behaves_like_memory"""

    def get(self, key: str) -> Buffer | None:
        return super().get(key.partition("/")[2])

    def exists(self, key: str) -> bool:
        return super().exists(key.partition("/")[2])

    def set(self, key: str, value: Buffer) -> None:
        super().set(key.partition("/")[2], value)

    def delete(self, keys: Sequence[str]) -> None:
        super().delete([key.partition("/")[2] for key in keys])


class KeyCutShort(RightBackend):
    """every_legal_key"""

    def get(self, key: str) -> Buffer | None:
        return super().get(key[:128])

    def exists(self, key: str) -> bool:
        return super().exists(key[:128])

    def set(self, key: str, value: Buffer) -> None:
        super().set(key[:128], value)


class FillsWhatThereIs(RightBackend):
    """wrong_size_is_a_miss"""

    def batch_get(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        for n, (key, page) in enumerate(zip(keys, pages, strict=True)):
            value = self.get(key)
            if value is None:
                return n
            scatter(bytes(value).ljust(nbytes_of(page), b"\0")[: nbytes_of(page)], page)
        return len(keys)


class WritesBeforeItsPage(RightBackend):
    """stays_in_its_page"""

    def batch_get(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        for page in pages:
            if page and page[0].nbytes:
                first = ctypes.addressof(ctypes.c_ubyte.from_buffer(page[0]))
                ctypes.memset(first - 1, 0, 1)
        return super().batch_get(keys, pages)


class EmptyIsMissing(RightBackend):
    """empty_object"""

    def get(self, key: str) -> Buffer | None:
        return super().get(key) or None


class PadsToSixteen(RightBackend):
    """tiny_objects"""

    def set(self, key: str, value: Buffer) -> None:
        super().set(key, bytes(value).ljust(16, b"\0") if len(value) else value)


class NothingLarge(RightBackend):
    """large_object"""

    def set(self, key: str, value: Buffer) -> None:
        if len(value) > 1 << 20:
            raise BackendFull("over 1 MiB")
        super().set(key, value)
