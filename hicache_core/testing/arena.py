"""The memory of the kit's pages: separate buffers, or one block that a transport registers."""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from collections import deque

_ALIGNMENT = 64


class Arena:
    """One block of memory for buffers; each is returned to it when its last view is gone.

    Threads: any.

    Attributes:
        memory: the whole block, for ``RegistersMemory.register_memory``.
    """

    def __init__(self, nbytes: int) -> None:
        """Reserves ``nbytes`` bytes; the system gives them as they are touched."""
        self._block = mmap.mmap(-1, nbytes)
        self.memory = memoryview(self._block)
        self._lock = threading.Lock()
        self._free = [(0, nbytes)]  # spans [start, stop), in order, never adjacent
        # A finalizer may run inside take(), under its lock: it only leaves a note here.
        self._returned: deque[tuple[int, int]] = deque()

    def take(self, nbytes: int) -> memoryview:
        """A buffer of ``nbytes`` bytes with undefined content.

        Raises:
            MemoryError: no gap is wide enough.
        """
        wanted = max(-(-nbytes // _ALIGNMENT) * _ALIGNMENT, _ALIGNMENT)
        with self._lock:
            self._reclaim()
            for n, (start, stop) in enumerate(self._free):
                if stop - start >= wanted:
                    self._free[n] = (start + wanted, stop)
                    break
            else:
                raise MemoryError(f"no gap of {wanted} bytes in an arena of {len(self._block)}")
        buffer = (ctypes.c_ubyte * nbytes).from_buffer(self._block, start)
        weakref.finalize(buffer, self._returned.append, (start, start + wanted))
        return memoryview(buffer).cast("B")

    def _reclaim(self) -> None:
        """Puts what came back among the free spans and joins neighbours."""
        if not self._returned:
            return
        spans = [span for span in self._free if span[0] < span[1]]
        while self._returned:
            spans.append(self._returned.popleft())
        spans.sort()
        joined = spans[:1]
        for start, stop in spans[1:]:
            if start == joined[-1][1]:
                joined[-1] = (joined[-1][0], stop)
            else:
                joined.append((start, stop))
        self._free = joined
