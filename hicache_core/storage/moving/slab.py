"""Slab: the memory of one worker, filled with objects again and again."""

from __future__ import annotations

import mmap


class Slab:
    """A piece of memory that is cut into objects. One thread uses it at a time.

    Attributes:
        memory: all of it, writable.
    """

    def __init__(self, nbytes: int) -> None:
        """Maps ``nbytes`` of memory, which is freed with the last view of it."""
        self.memory = memoryview(mmap.mmap(-1, nbytes))

    @property
    def nbytes(self) -> int:
        """Its length."""
        return self.memory.nbytes

    def cut(self, nbytes: int, n: int) -> list[memoryview]:
        """Returns ``n`` pieces of ``nbytes`` each, from the beginning; fewer if it is too short."""
        n = min(n, self.nbytes // nbytes)
        return [self.memory[i * nbytes : (i + 1) * nbytes] for i in range(n)]
