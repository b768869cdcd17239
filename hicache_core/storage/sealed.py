"""Seals each page with a header when it is stored, and checks the header when it is read.

Every stored object starts with 64 bytes, little-endian:

    0        4         6       8                16           24                  32          64
    | magic  | version | flags | payload_nbytes | xxh3-64 of | namespace digest  | page hash |
    | "HiCP" | 1       | 0     |                | payload    | 8 bytes           | 32 bytes  |

The namespace and the page hash must be those of the key. So an object that is damaged, or that was
stored under another key or by another model, is a miss and never a hit.
"""

from __future__ import annotations

import contextlib
import re
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

import xxhash

from hicache_core.errors import BackendError
from hicache_core.storage.base import Buffer, HasStats, StorageBackend
from hicache_core.storage.segments import nbytes_of, scatter
from hicache_core.storage.visiting import VisitsEachPage, VisitsPages
from hicache_core.storage.wrapper import BackendWrapper
from hicache_core.types import Page

T = TypeVar("T")

HEADER_NBYTES = 64
MAX_VERDICTS = 1024
MAGIC = b"HiCP"
VERSION = 1

_HEADER = struct.Struct("<4sHHQQ40s")
_KEY = re.compile(r"[0-9a-f]{16}/[0-9a-f]{64}")
_NAMESPACE_NBYTES = 8


def parse_key(key: str) -> tuple[bytes, bytes]:
    """Returns the namespace digest (8 bytes) and the page hash (32 bytes) of a key.

    Raises:
        ValueError: ``key`` is not ``<16 hex digits>/<64 hex digits>``.
    """
    name = _name_of(key)
    return name[:_NAMESPACE_NBYTES], name[_NAMESPACE_NBYTES:]


def is_page_key(key: str) -> bool:
    """Returns whether ``key`` is the key of a page: ``<16 hex digits>/<64 hex digits>``."""
    return _KEY.fullmatch(key) is not None


def _name_of(key: str) -> bytes:
    """Returns the key as it appears in the header: namespace digest and page hash, 40 bytes."""
    if _KEY.fullmatch(key) is None:
        raise ValueError(f"{key!r} is not a page key; expected <16 hex digits>/<64 hex digits>")
    return bytes.fromhex(key.replace("/", ""))


def _names_of(keys: Sequence[str]) -> list[bytes]:
    """As ``_name_of``, for many keys in one call."""
    _check_keys(keys)
    return [bytes.fromhex(key.replace("/", "")) for key in keys]


def checksum(payload: Sequence[memoryview]) -> int:
    """Returns xxh3-64 over the segments in order."""
    if len(payload) == 1:
        return xxhash.xxh3_64_intdigest(payload[0])
    state = xxhash.xxh3_64()
    for segment in payload:
        state.update(segment)
    return state.intdigest()


def seal(key: str, page: Page) -> None:
    """Writes the header of ``page`` into its first segment.

    Raises:
        ValueError: ``key`` is not a page key, or the first segment is not 64 bytes long.
    """
    name = _name_of(key)
    _check_pages([page])
    _seal(name, page)


def _seal(name: bytes, page: Page) -> None:
    payload = page[1:]
    nbytes = nbytes_of(payload)
    _HEADER.pack_into(page[0], 0, MAGIC, VERSION, 0, nbytes, checksum(payload), name)


def _check_pages(pages: Sequence[Page]) -> None:
    for page in pages:
        if not page or page[0].nbytes != HEADER_NBYTES:
            found = f"{page[0].nbytes} bytes" if page else "no segment"
            raise ValueError(
                f"the first segment of a page must have {HEADER_NBYTES} bytes; found {found}"
            )


def mismatch(key: str, page: Page) -> str | None:
    """Checks whether ``page`` is the intact object under ``key``.

    Returns:
        None if it is; else ``corrupt``, ``wrong_version``, ``wrong_length`` or ``foreign`` (sealed
        for another key).
    """
    return _mismatch(_name_of(key), page)


def _mismatch(name: bytes, page: Page) -> str | None:
    magic, version, flags, nbytes, digest, its_name = _HEADER.unpack(page[0])
    payload = page[1:]
    if magic != MAGIC:
        return "corrupt"
    if version != VERSION or flags != 0:
        return "wrong_version"
    if nbytes != (payload[0].nbytes if len(payload) == 1 else nbytes_of(payload)):
        return "wrong_length"
    if its_name != name:
        return "foreign"
    return None if checksum(payload) == digest else "corrupt"


def _judge(key: str, data: memoryview, nbytes: int | None = None) -> str | None:
    """As ``mismatch`` for an object in one piece; it must have ``nbytes`` bytes unless None."""
    if data.nbytes < HEADER_NBYTES or nbytes not in (None, data.nbytes):
        return "wrong_length"
    return mismatch(key, (data[:HEADER_NBYTES], data[HEADER_NBYTES:]))


def _check_keys(keys: Sequence[str]) -> None:
    for key in keys:
        if _KEY.fullmatch(key) is None:
            parse_key(key)


def _digest(page: Page) -> bytes:
    """Returns a digest by which two reads of an object are compared."""
    state = xxhash.xxh3_128()
    for segment in page:
        state.update(segment)
    return state.digest()


class SealedBackend(BackendWrapper):
    """Seals what it stores, and returns only objects whose seal is right.

    Pages of calls for several keys start with a segment of 64 bytes for the header.
    ``get`` and ``set`` take and return payloads without a header.

    An object whose seal is wrong is read a second time. If the seal is right then, it is a hit. If
    not, it is a miss and is counted by kind. It is deleted only if both reads returned the same
    bytes: if they differ, the bytes were damaged on the way and the stored object may be intact.

    Every method raises ``ValueError`` for a key that is not ``<16 hex digits>/<64 hex digits>``.
    """

    def __init__(self, inner: StorageBackend) -> None:
        super().__init__(inner)
        self._lock = threading.Lock()
        self._visiting = inner.capability(VisitsPages)
        self._visiting_each = inner.capability(VisitsEachPage)
        self._inner_stats = inner.capability(HasStats)
        self._verdicts: OrderedDict[str, str] = OrderedDict()
        self._counts = {
            "sealed_corrupt": 0,
            "sealed_foreign": 0,
            "sealed_wrong_length": 0,
            "sealed_wrong_version": 0,
        }

    def get(self, key: str) -> Buffer | None:
        parse_key(key)
        value = self.inner.get(key)
        if value is None:
            return None
        data = memoryview(value).cast("B")
        good = data if _judge(key, data) is None else self._look_again(key, (data,))
        return None if good is None else good[HEADER_NBYTES:]

    def exists(self, key: str) -> bool:
        parse_key(key)
        return self.inner.exists(key)

    def set(self, key: str, value: Buffer) -> None:
        header = memoryview(bytearray(HEADER_NBYTES))
        page = (header, memoryview(value).cast("B"))
        seal(key, page)
        self.inner.set(key, b"".join(page))

    def batch_exists(self, keys: Sequence[str]) -> int:
        _check_keys(keys)
        return self.inner.batch_exists(keys)

    def batch_get(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        pages = list(pages)  # lazy ones are made once
        names = _names_of(keys)
        n_good, n_filled = self._fill(keys, names, pages)
        for n in range(n_good, n_filled):
            if _mismatch(names[n], pages[n]) is not None:
                good = self._look_again(keys[n], pages[n], nbytes_of(pages[n]))
                if good is None:
                    return n
                scatter(good, pages[n])
        if n_filled < len(keys):
            self._reject_wrong_length(keys[n_filled], nbytes_of(pages[n_filled]))
        return n_filled

    def batch_set(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        visiting = None if self._visiting is None else self._visiting.batch_set_visiting
        return self._store(keys, pages, visiting, self.inner.batch_set)

    def exists_each(self, keys: Sequence[str]) -> Sequence[bool]:
        _check_keys(keys)
        return self.inner.exists_each(keys)

    def get_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        pages = list(pages)
        names = _names_of(keys)
        filled, refused = self._fill_each(keys, names, pages)
        absent = [n for n, is_filled in enumerate(filled) if not is_filled and n not in refused]
        with contextlib.suppress(BackendError):  # these pages are misses anyway
            for n in sorted(refused):
                good = self._second_look(keys[n], pages[n], nbytes_of(pages[n]))
                filled[n] = good is not None
                if good is not None:
                    scatter(good, pages[n])
            present = self.inner.exists_each([keys[n] for n in absent]) if absent else ()
            for n, is_present in zip(absent, present, strict=True):
                if is_present:
                    self._remove_wrong_length(keys[n], nbytes_of(pages[n]))
        return filled

    def set_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        each = self._visiting_each
        visiting = None if each is None else each.set_each_visiting
        return self._store(keys, pages, visiting, self.inner.set_each)

    def rejections(self) -> Mapping[str, int]:
        """Returns how many objects were refused, by kind. Any thread; does not call the store."""
        with self._lock:
            return {name.removeprefix("sealed_"): n for name, n in self._counts.items()}

    def stats(self) -> Mapping[str, float]:
        """Returns the statistics of ``inner`` and how many objects were refused, by kind."""
        inside = {} if self._inner_stats is None else self._inner_stats.stats()
        with self._lock:
            return {**inside, **self._counts}

    def verdict(self, key: str) -> str | None:
        """Returns why the object under ``key`` was refused; None if it was not.

        Only the last ``MAX_VERDICTS`` refusals are known.
        """
        with self._lock:
            return self._verdicts.get(key)

    @staticmethod
    def _store(
        keys: Sequence[str],
        pages: Sequence[Page],
        visiting: Callable[[Sequence[str], Sequence[Page], Callable[[int], None]], T] | None,
        plain: Callable[[Sequence[str], Sequence[Page]], T],
    ) -> T:
        """Seals pages and stores them.

        Args:
            keys: one for each page.
            pages: with a first segment for the header.
            visiting: stores them and calls back for each before it leaves; None if there is none.
            plain: stores them.

        Returns:
            The answer of the one that was called.
        """
        names, pages = _names_of(keys), list(pages)
        _check_pages(pages)
        if visiting is not None:
            return visiting(keys, pages, lambda n: _seal(names[n], pages[n]))
        for name, page in zip(names, pages, strict=True):
            _seal(name, page)
        return plain(keys, pages)

    def _fill(
        self, keys: Sequence[str], names: Sequence[bytes], pages: Sequence[Page]
    ) -> tuple[int, int]:
        """Reads pages.

        Returns:
            How many leading pages have a right seal, and how many were read or refused: those in
            between are still to be checked.
        """
        if self._visiting is None:
            return 0, self.inner.batch_get(keys, pages)
        refused: set[int] = set()

        def arrived(n: int) -> bool:
            good = _mismatch(names[n], pages[n]) is None
            if not good:
                refused.add(n)
            return good

        n = self._visiting.batch_get_visiting(keys, pages, arrived)
        return n, n + (n in refused)

    def _fill_each(
        self, keys: Sequence[str], names: Sequence[bytes], pages: Sequence[Page]
    ) -> tuple[list[bool], Collection[int]]:
        """Reads pages.

        Returns:
            For each page whether it has a right seal, and the numbers of those that have a wrong
            one.
        """
        refused: set[int] = set()

        def arrived(n: int) -> bool:
            good = _mismatch(names[n], pages[n]) is None
            if not good:
                refused.add(n)
            return good

        if self._visiting_each is None:
            filled = self.inner.get_each(keys, pages)
            return [is_filled and arrived(n) for n, is_filled in enumerate(filled)], refused
        return list(self._visiting_each.get_each_visiting(keys, pages, arrived)), refused

    def _look_again(self, key: str, refused: Page, nbytes: int | None = None) -> memoryview | None:
        """As ``_second_look``; None if the store fails meanwhile, since the page is a miss then."""
        try:
            return self._second_look(key, refused, nbytes)
        except BackendError:
            return None

    def _second_look(self, key: str, refused: Page, nbytes: int | None = None) -> memoryview | None:
        """Reads a refused object a second time, into other memory.

        Args:
            key: of the object.
            refused: the bytes of the first read.
            nbytes: length of the page; None for any.

        Returns:
            The object if its seal is right now, else None.
        """
        value = self.inner.get(key)
        if value is None:  # it was evicted or overwritten during the first read: not damaged
            return None
        data = memoryview(value).cast("B")
        kind = _judge(key, data, nbytes)
        if kind is None:
            return data
        self._count(key, kind)
        if data.nbytes == nbytes_of(refused) and _digest((data,)) == _digest(refused):
            self._remove(key)
        return None

    def _count(self, key: str, kind: str) -> None:
        with self._lock:
            self._counts[f"sealed_{kind}"] += 1
            self._verdicts[key] = kind
            if len(self._verdicts) > MAX_VERDICTS:
                self._verdicts.popitem(last=False)

    def _remove(self, key: str) -> None:
        """Deletes a damaged object, so that a good one can be stored under its key."""
        # The page is a miss whether or not the store can delete.
        with contextlib.suppress(NotImplementedError, BackendError):
            self.inner.delete([key])

    def _reject_wrong_length(self, key: str, nbytes: int) -> None:
        """As ``_remove_wrong_length`` for a page that may be absent; the store may fail."""
        with contextlib.suppress(BackendError):
            if self.inner.exists(key):
                self._remove_wrong_length(key, nbytes)

    def _remove_wrong_length(self, key: str, nbytes: int) -> None:
        """Deletes the object under ``key`` if its length is not that of the page.

        It would stay forever otherwise: no read fits it, and a write to an existing key may be
        skipped.
        """
        value = self.inner.get(key)
        if value is not None and memoryview(value).nbytes != nbytes:
            self._second_look(key, (memoryview(value).cast("B"),), nbytes)
