"""Pages in a bucket: the object under a key is the page, or the index of the pack with it."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

from hicache_core.errors import BackendError
from hicache_core.plugin.backends import nbytes_of, scatter
from hicache_core.types import Page
from hicache_s3.answers import Answer, Head, new_memory
from hicache_s3.index import INDEX_NBYTES, MARK, IndexCache, PackIndex, is_index_nbytes
from hicache_s3.objects import Objects, total_nbytes

_KEY = re.compile(r"[0-9a-z/]{1,200}")
_PACK = re.compile(r"packs/[0-9a-f]{16}/[0-9a-f]{32}")


class Alone(NamedTuple):
    """A page that is an object of its own, with its length."""

    nbytes: int


Found: TypeAlias = PackIndex | Alone | None
"""Where a page is: in a pack, in an object of its own, or nowhere (None)."""


def page_name(key: str) -> str:
    """Returns the name of the object for a page, without the prefix."""
    return f"pages/{key}"


def key_of(name: str) -> str | None:
    """Returns the key of the page with this name; None if the object is not one of ours."""
    key = name.removeprefix("pages/")
    return key if key != name and _KEY.fullmatch(key) else None


def is_pack_name(name: str) -> bool:
    """Returns whether a name is that of a pack."""
    return _PACK.fullmatch(name) is not None


class Pages:
    """Reads and writes pages and indexes; adds the indexes it reads to ``cache``.

    Attributes:
        objects: of the bucket.
        threads: for the requests of a batch.
        cache: known indexes.
    """

    def __init__(self, objects: Objects, cache: IndexCache) -> None:
        self.objects = objects
        self.threads = objects.threads
        self.cache = cache

    def find(self, key: str, *, packed: bool) -> Found:
        """Looks up where a page is.

        Args:
            key: of the page.
            packed: whether an index is more likely than a page; a wrong guess costs a request.
        """
        name = page_name(key)
        answer = None if packed else self.objects.look(name)
        if answer is not None and _may_be_index(answer.headers, total_nbytes(answer)):
            packed = True
        if packed:
            answer = self.objects.fetch(name, span=(0, INDEX_NBYTES))
        if answer is None:
            return None
        nbytes = total_nbytes(answer)
        if not _may_be_index(answer.headers, nbytes):
            return Alone(nbytes)
        return self._found(key, answer)

    def read(self, key: str, page: Page) -> Found:
        """Reads a page that is an object of its own and has the length of ``page``.

        Returns:
            An index if the page is in a pack (``page`` is unchanged then); None if there is no
            object of this length.
        """
        nbytes = nbytes_of(page)

        def choose(head: Head) -> Page | None:
            if _may_be_index(head.headers, head.nbytes):
                return new_memory(head) if head.nbytes <= INDEX_NBYTES else None
            return page if head.nbytes == nbytes else None

        answer = self.objects.fetch(page_name(key), choose)
        if answer is None or answer.body is None:
            return None
        if answer.body is page:
            return Alone(nbytes)
        found = self._found(key, answer)
        if not isinstance(found, Alone):
            return found
        if found.nbytes != nbytes:
            return None
        scatter(answer.body[0], page)
        return found

    def read_run(self, index: PackIndex, keys: Sequence[str], pages: Sequence[Page]) -> bool:
        """Reads adjacent pages of a pack with one request; returns False if it is missing.

        Args:
            index: of the pack.
            keys: of adjacent pages.
            pages: where to.
        """
        first, last = index.slots[keys[0]], index.slots[keys[-1]]
        span = (first.offset, last.offset + last.nbytes)
        place = tuple(itertools.chain.from_iterable(pages))

        def choose(head: Head) -> Page | None:
            right = head.status == 206 or span[0] == 0
            return place if right and head.nbytes == span[1] - span[0] else None

        if span[0] == span[1]:
            return True
        answer = self.objects.fetch(index.pack_name, choose, span)
        return answer is not None and answer.body is place

    def value(self, key: str) -> memoryview | None:
        """Returns the page under ``key`` in new memory; None if it is absent."""
        answer = self.objects.fetch(page_name(key))
        if answer is None or answer.body is None:
            return None
        if not _may_be_index(answer.headers, total_nbytes(answer)):
            return answer.body[0]
        index = self._found(key, answer)
        if isinstance(index, Alone):
            return answer.body[0]
        if index is None:
            return None
        memory = memoryview(bytearray(index.slots[key].nbytes))
        if self.read_run(index, [key], [(memory,)]):
            return memory
        self.forget(index)
        return None

    def write_index(self, key: str, index: PackIndex) -> None:
        """Stores ``index`` under ``key``."""
        self.objects.store(page_name(key), (memoryview(index.encode()),), dict([MARK]))

    def forget(self, index: PackIndex) -> None:
        """Removes the keys of a missing pack, so that their pages can be written again."""
        self.cache.drop(index)
        # If this fails, the page is a miss all the same.
        with contextlib.suppress(BackendError):
            self.objects.remove([page_name(key) for key in index.slots])

    def _found(self, key: str, answer: Answer) -> Found:
        """Returns what is under ``key``, from an answer that may be an index.

        Tools that copy a bucket may lose the mark, so an index is recognised by its content. An
        object with the mark that is not an index is damaged.
        """
        body = answer.body if answer.body is not None else ()
        index = PackIndex.decode(key.partition("/")[0], b"".join(body))
        if index is None or key not in index.slots:
            return None if _is_marked(answer.headers) else Alone(total_nbytes(answer))
        self.cache.add(index)
        return index


def _is_marked(headers: Mapping[str, str]) -> bool:
    return headers.get(MARK[0]) == MARK[1]


def _may_be_index(headers: Mapping[str, str], nbytes: int) -> bool:
    """Returns whether an object may be an index; pages are rarely that short."""
    return _is_marked(headers) or is_index_nbytes(nbytes)
