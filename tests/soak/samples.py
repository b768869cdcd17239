"""What the process holds, second by second, and whether that grows."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

PAGE_NBYTES = os.sysconf("SC_PAGE_SIZE")


class Sample(NamedTuple):
    """One look at this process.

    Attributes:
        at_s: seconds since the start.
        resident_nbytes: memory in use.
        n_threads: threads of Python.
        n_descriptors: open descriptors.
    """

    at_s: float
    resident_nbytes: int
    n_threads: int
    n_descriptors: int

    @classmethod
    def now(cls, at_s: float) -> Sample:
        """Looks at the process."""
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_NBYTES
        return cls(at_s, resident, threading.active_count(), len(os.listdir("/proc/self/fd")))


@dataclass(frozen=True, slots=True)
class Growth:
    """A figure at the start and at the end: medians of the second and of the last fifth.

    The first fifth is left out: caches and pools still fill.

    Attributes:
        name: of the figure.
        early: median of the second fifth.
        late: median of the last fifth.
        highest: the largest sample of all.
        noise: growth that says nothing.
    """

    name: str
    early: float
    late: float
    highest: float
    noise: float

    @property
    def grows(self) -> bool:
        """Whether it grew by more than the noise."""
        return self.late - self.early > self.noise


def growth(samples: list[Sample]) -> list[Growth]:
    """The growth of each figure.

    The noise: 5 % and 16 MiB of memory, since allocators keep what was used once; 8 threads and
    8 descriptors, since a backend that is attached or drained at the moment has so many.
    """
    fifth = max(1, len(samples) // 5)
    early, late = samples[fifth : 2 * fifth] or samples, samples[-fifth:]
    found = []
    for name, noise in (("resident_nbytes", 16 << 20), ("n_threads", 8), ("n_descriptors", 8)):
        first = float(median(getattr(sample, name) for sample in early))
        last = float(median(getattr(sample, name) for sample in late))
        highest = max(float(getattr(sample, name)) for sample in samples)
        share = 0.05 * first if name == "resident_nbytes" else 0.0
        found.append(Growth(name, first, last, highest, noise + share))
    return found
