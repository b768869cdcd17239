"""What a killed writer was told and what it had asked for, and what the store owes for it.

A writer says over a pipe, a line each, before and after every call:

    <word> <time> <run> <thread> <first> <n> <scratch>

``store`` and ``drop`` come before the call, ``stored`` and ``dropped`` after it returned. The other
fields name a batch of objects; keys, lengths and bytes are functions of that name.
"""

from __future__ import annotations

import bisect
import itertools
from dataclasses import dataclass
from hashlib import sha256
from typing import NamedTuple

from hicache_core.storage.file.records import capacity_for
from hicache_core.storage.sealed import HEADER_NBYTES

KEPT, SHARED = sha256(b"kept").hexdigest()[:16], sha256(b"shared").hexdigest()[:16]
SIZES = (0, 1_000, 4_000, 30_000, 100_000)


class Batch(NamedTuple):
    """Objects that one thread of one run of a writer stores by one call.

    Attributes:
        run: which start of a writer.
        thread: which of its threads.
        first: number of the first object.
        n: how many there are.
        scratch: they lie in a namespace of their thread, which is cleared as a whole.
    """

    run: int
    thread: int
    first: int
    n: int
    scratch: bool

    @property
    def namespace(self) -> str:
        """The namespace of its keys; two threads of all writers share what is not scratch."""
        if self.scratch:
            return sha256(f"scratch {self.run} {self.thread}".encode()).hexdigest()[:16]
        return (KEPT, SHARED)[self.thread % 2]

    def page_keys(self) -> list[str]:
        """The keys, in order."""
        names = (f"{self.run} {self.thread} {self.first + i}" for i in range(self.n))
        return [f"{self.namespace}/{sha256(name.encode()).hexdigest()}" for name in names]


def payload_nbytes(key: str) -> int:
    """How long the payload under ``key`` is; small ones are as frequent as large ones."""
    return SIZES[int(key[-2:], 16) % len(SIZES)]


def held_nbytes(key: str) -> int:
    """Disk space that the object under ``key`` takes."""
    return capacity_for(HEADER_NBYTES + payload_nbytes(key))


def line(word: str, at: float, batch: Batch) -> bytes:
    """What a writer says; short enough for a pipe to take it whole or not at all."""
    return f"{word} {at!r} {' '.join(str(int(field)) for field in batch)}\n".encode()


@dataclass
class Entry:
    """One batch: when its store began, when it ended, and what became of it.

    Attributes:
        began_at: before ``batch_set`` was called.
        ended_at: after it returned, or when its process was dead; infinite before.
        acknowledged: the writer was told that all is stored.
        leaving: a delete has begun.
        gone: the delete has returned.
        nbytes: disk space of all of its objects.
    """

    began_at: float
    ended_at: float = float("inf")
    acknowledged: bool = False
    leaving: bool = False
    gone: bool = False
    nbytes: int = 0


class Reports:
    """All that the writers said so far."""

    def __init__(self) -> None:
        self.entries: dict[Batch, Entry] = {}
        self.keys: dict[str, Batch] = {}

    def take(self, text: str) -> None:
        """Takes over one line."""
        word, at, *fields = text.split()
        run, thread, first, n, scratch = map(int, fields)
        batch = Batch(run, thread, first, n, bool(scratch))
        if word == "store":
            keys = batch.page_keys()
            self.entries[batch] = Entry(float(at), nbytes=sum(map(held_nbytes, keys)))
            self.keys |= dict.fromkeys(keys, batch)
            return
        entry = self.entries[batch]
        if word == "stored":
            entry.ended_at, entry.acknowledged = float(at), True
        elif word == "drop":
            entry.leaving = True
        elif word == "dropped":
            entry.gone = True
        else:
            raise ValueError(f"a writer said {text!r}")

    def buried(self, run: int, at: float) -> None:
        """The writer of ``run`` is dead: what it had begun goes no further."""
        for batch, entry in self.entries.items():
            if batch.run == run:
                entry.ended_at = min(entry.ended_at, at)

    def owed(self, max_nbytes: int) -> list[Batch]:
        """Batches that must be in the store, whatever was evicted under a cap of ``max_nbytes``.

        The least recently used object goes first, and the clock of a batch starts when its store
        began. So before one of its objects may go, the cap must have been filled by batches that
        ended later than that. Two thirds of a cap are left for extents of other lengths: a claim
        evicts by number, whatever the lengths. Half a cap did not suffice on a busy machine.
        """
        ended = sorted(self.entries.values(), key=lambda entry: entry.ended_at)
        times = [entry.ended_at for entry in ended]
        before = list(itertools.accumulate((entry.nbytes for entry in ended), initial=0))

        def written_since(at: float) -> int:
            return before[-1] - before[bisect.bisect_left(times, at)]

        return [
            batch
            for batch, entry in self.entries.items()
            if entry.acknowledged
            and not entry.leaving
            and written_since(entry.began_at) <= max_nbytes // 3
        ]

    def gone(self) -> set[str]:
        """Keys whose delete returned."""
        return {key for key, batch in self.keys.items() if self.entries[batch].gone}
