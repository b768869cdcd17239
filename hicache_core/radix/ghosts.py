"""Ghosts: the names of pages that left a tier lately, oldest first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from sys import getsizeof

from hicache_core.kv.keys import DIGEST_NBYTES
from hicache_core.radix.node import Node, node_digests

_WORDS_A_DIGEST = DIGEST_NBYTES // 8


def page_names(node: Node, page_size: int) -> list[int]:
    """A name of 8 bytes for each page of ``node``: the head of its digest, which names its prefix.

    The digests are computed where nobody has asked for them yet, and stay in the node.
    """
    return memoryview(node_digests(node, page_size)).cast("Q")[::_WORDS_A_DIGEST].tolist()


class Ghosts:
    """A bounded memory of pages without their KV."""

    def __init__(self) -> None:
        self._names: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        """Pages remembered."""
        return len(self._names)

    def add(self, names: list[int]) -> None:
        """Remember the pages of a node. They left last page first, so the first is the youngest."""
        self._names.update(dict.fromkeys(reversed(names)))

    def take(self, names: Iterable[int]) -> int:
        """Forget those of ``names`` that are remembered; returns how many were."""
        before = len(self._names)
        for name in names if before else ():
            self._names.pop(name, None)
        return before - len(self._names)

    def trim(self, limit: int) -> None:
        """Forget the oldest beyond ``limit``, which is not negative."""
        for _ in range(len(self._names) - limit):
            self._names.popitem(last=False)

    def clear(self) -> None:
        """Forget all."""
        self._names.clear()

    def memory_nbytes(self) -> int:
        """Bytes of the table and of the names."""
        return getsizeof(self._names) + sum(map(getsizeof, self._names))
