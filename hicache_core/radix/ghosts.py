"""Ghosts: names of pages that recently left a tier, the oldest first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from sys import getsizeof

from hicache_core.kv.keys import DIGEST_NBYTES
from hicache_core.radix.node import Node, node_digests

_WORDS_A_DIGEST = DIGEST_NBYTES // 8


def page_names(node: Node, page_size: int) -> list[int]:
    """A name of 8 bytes for each page of ``node``: the first bytes of its digest.

    Computes the digests if they are not known, and keeps them in the node.
    """
    return memoryview(node_digests(node, page_size)).cast("Q")[::_WORDS_A_DIGEST].tolist()


def last_page_name(node: Node, page_size: int) -> list[int]:
    """The last of ``page_names``: what a snapshot at the end of ``node`` is known by."""
    return page_names(node, page_size)[-1:]


class Ghosts:
    """Remembers pages without their KV; the caller keeps their number bounded."""

    def __init__(self) -> None:
        self._names: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        """How many pages are remembered."""
        return len(self._names)

    def add(self, names: list[int]) -> None:
        """Remember the pages of a node. Its last page left first, so its first is the youngest."""
        self._names.update(dict.fromkeys(reversed(names)))

    def take(self, names: Iterable[int]) -> int:
        """Forget those of ``names`` that are remembered; returns how many there were."""
        before = len(self._names)
        for name in names if before else ():
            self._names.pop(name, None)
        return before - len(self._names)

    def trim(self, limit: int) -> None:
        """Forget the oldest beyond ``limit``, which is at least 0."""
        for _ in range(len(self._names) - limit):
            self._names.popitem(last=False)

    def clear(self) -> None:
        """Forget all."""
        self._names.clear()

    def memory_nbytes(self) -> int:
        """Bytes of the table and of the names."""
        return getsizeof(self._names) + sum(map(getsizeof, self._names))
