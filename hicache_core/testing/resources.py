"""The resources of this process: descriptors, threads, memory. Linux only."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self


@dataclass(frozen=True, slots=True)
class Resources:
    """The resources of the process at one moment.

    Attributes:
        n_descriptors: open file descriptors.
        n_threads: threads that Python and the kernel count.
        n_blocks: blocks of memory that Python's allocator has given out: about two an object.
        resident_nbytes: memory in use, that of native libraries included.
    """

    n_descriptors: int
    n_threads: int
    n_blocks: int
    resident_nbytes: int

    @classmethod
    def now(cls) -> Self:
        """Looks, after a collection of garbage."""
        gc.collect()
        resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
        n_native = len(os.listdir("/proc/self/task"))
        return cls(
            n_descriptors=len(os.listdir("/proc/self/fd")),
            n_threads=max(n_native, threading.active_count()),
            n_blocks=sys.getallocatedblocks(),
            resident_nbytes=resident_pages * os.sysconf("SC_PAGE_SIZE"),
        )


def settled(before: Resources, patience_s: float = 2.0) -> Resources:
    """Resources once descriptors and threads are back to ``before``, or when the time is over.

    A closed socket or a joined thread may take the kernel a moment.
    """
    stop_at = time.monotonic() + patience_s
    now = Resources.now()
    while _above(now, before) and time.monotonic() < stop_at:
        time.sleep(0.02)
        now = Resources.now()
    return now


def _above(now: Resources, before: Resources) -> bool:
    return now.n_descriptors > before.n_descriptors or now.n_threads > before.n_threads
